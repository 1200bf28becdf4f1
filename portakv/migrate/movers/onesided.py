# SPDX-License-Identifier: Apache-2.0
"""The movers by NIXL and by Mooncake: the reader reads the owner's slots, and nobody writes into
another process. Only slots are registered, so that nothing else of a process can be reached.

Neither library authenticates what comes to its own ports: keep them on an isolated network. Who
reaches Mooncake's can also write into slots (0.3.13).
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from abc import abstractmethod
from contextlib import ExitStack, suppress
from importlib import import_module
from secrets import token_hex
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Annotated, Any

import torch
from msgspec import Meta

from portakv.backends.base import Decision
from portakv.errors import PeerError, TransferError, TransferTimeout
from portakv.migrate.messages import Bytes, Count, Handle, Message, Name
from portakv.migrate.movers.base import Key, Lane, Mover, Moving
from portakv.runtime.devices import inside

if TYPE_CHECKING:
    from portakv.migrate.channel import Channel, Peer

#: Seconds between a reader's questions for a slot that is not ready, and the most of them.
ASK, ASKED = 1e-4, 5e-3


class Where(Message, frozen=True):
    """A reader's mover asks where the slot of a tag is."""

    mover: Name
    tag: Count


class There(Message, frozen=True):
    """Where it is, and what the library needs to reach its owner; without, it is not ready yet."""

    reach: Handle = b""
    address: Annotated[int, Meta(ge=0, lt=1 << 62)] = 0
    nbytes: Bytes = 0
    device: int = 0


class Taken(Message, frozen=True):
    """One-way: a reader has read the slot of a tag, or will not."""

    mover: Name
    tag: Count


class Reading(Lane):
    """The slots that one peer reads, or that are read from it, two at a time."""

    def __init__(self, mover: OneSided, channel: Channel, key: Key) -> None:
        self.ours, self.given = mover, dict[int, tuple[There, Moving]]()
        self.peer, self.reached = "", b""  # the name of the peer in the library, if it has one
        super().__init__(mover, channel, key, threads=2)

    def carry(self, moving: Moving, ready: torch.Event | None, tag: int, giving: bool) -> None:
        if ready is not None:  # libraries read and write behind no stream
            ready.synchronize()
        with inside(self.ours.device):
            self.ours.register(moving.slot, self.address or self.channel.address)
            (self._offer if giving else self._read)(moving, tag)

    def _offer(self, moving: Moving, tag: int) -> None:
        slot = moving.slot
        there = There(self.ours.reach(), slot.data_ptr(), slot.nbytes, _index(slot))
        given = self.given[tag] = there, moving
        try:
            while not moving.done():  # `Taken` ends it
                self.check(moving, "taken")
                with suppress(TransferTimeout):
                    moving.wait(0.05)
        finally:
            if self.given.get(tag) is given:  # the tag may be another slot's by now
                del self.given[tag]

    def _read(self, moving: Moving, tag: int) -> None:
        name, pause, slot = self.ours.name, ASK, moving.slot
        with ExitStack() as last:  # what ends later than the reader is told
            try:
                while not (there := self.channel.ask(self.address, Where(name, tag), There)).reach:
                    self.check(moving, "given")
                    time.sleep(pause)
                    pause = min(2 * pause, ASKED)
                if there.nbytes != slot.nbytes:
                    raise TransferError(f"{there.nbytes} B were given, {slot.nbytes} asked for")
                if slot.nbytes and moving.begin():
                    self.ours.read(self, moving, there, last)
            except Exception as error:  # each library has errors of its own
                why = str(error) or type(error).__name__
                what = f"{slot.nbytes} B of {self.address} were not read by {name}"
                moving.end(PeerError(f"{what}: {why}. Pull again, or choose another mover."))
        if self.gone is None:
            self.channel.tell(self.address, Taken(name, tag))


class OneSided(Mover):
    """What both have; a subclass starts a library, registers memory, tells and reads."""

    def __init__(self, device: torch.device, timeout: float = 30.0) -> None:
        super().__init__(device, timeout)
        self.engine: Any = None
        self._kept, self._entering = dict[int, Any](), threading.Lock()

    def lane(self, channel: Channel, key: Key) -> Lane:
        return Reading(self, channel, key)

    def serve(self, channel: Channel) -> None:
        channel.serve(Where, self._where)
        channel.serve(Taken, self._taken)

    def _given(self, peer: Peer, tag: int) -> tuple[There, Moving] | None:
        lane = self.lanes.get(peer.id)
        given = lane.given.get(tag) if isinstance(lane, Reading) else None
        return given if given and not given[1].done() else None

    def _where(self, peer: Peer, where: Where) -> There:
        given = self._given(peer, where.tag)
        return given[0] if given else There()

    def _taken(self, peer: Peer, taken: Taken) -> None:
        if given := self._given(peer, taken.tag):
            given[1].end()

    def register(self, slot: torch.Tensor, address: str) -> None:
        """Let the library reach the memory that a slot is cut from, once and for all."""
        memory = slot.untyped_storage()
        with self._entering:
            if self.engine is None:
                self.engine = self.begin(address)
            if memory.nbytes() and memory.data_ptr() not in self._kept:
                self.enter(memory.data_ptr(), memory.nbytes(), _index(slot))
                self._kept[memory.data_ptr()] = memory

    @abstractmethod
    def begin(self, address: str) -> Any:
        """Start the library, for peers that reach this host as they reach ``address``."""

    @abstractmethod
    def enter(self, address: int, nbytes: int, device: int) -> None:
        """Register memory."""

    @abstractmethod
    def reach(self) -> bytes:
        """What a reader's library needs to read here."""

    @abstractmethod
    def read(self, lane: Reading, moving: Moving, there: There, last: ExitStack) -> None:
        """Read a place of a peer into a slot, all of it; ``last`` ends what goes on."""


class Nixl(OneSided):
    """By NIXL (1.5 or later) and its UCX: sockets, shared memory, RDMA, NVLink."""

    name = "nixl"

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        return _probe(cls.name, "nixl._api", device)

    def begin(self, address: str) -> Any:
        api = import_module("nixl._api")
        strict = api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        terms = api.nixl_agent_config(backends=["UCX"], sync_mode=strict)
        return api.nixl_agent(f"portakv-{token_hex(8)}", terms)

    def enter(self, address: int, nbytes: int, device: int) -> None:
        self.engine.register_memory([(address, nbytes, device, "")], self._kind())

    def reach(self) -> bytes:
        return bytes(self.engine.get_agent_metadata())

    def read(self, lane: Reading, moving: Moving, there: There, last: ExitStack) -> None:
        agent, slot, kind = self.engine, moving.slot, self._kind()
        with self._entering:
            if lane.reached != there.reach:
                lane.peer = agent.add_remote_agent(there.reach).decode()
                lane.reached = there.reach
        mine = agent.get_xfer_descs([(slot.data_ptr(), slot.nbytes, _index(slot))], kind)
        theirs = agent.get_xfer_descs([(there.address, there.nbytes, there.device)], kind)
        handle = agent.initialize_xfer("READ", mine, theirs, lane.peer, b"")
        last.callback(_release, handle)
        state = agent.transfer(handle)
        while state == "PROC":
            lane.check(moving, "read")
            time.sleep(2e-5)
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise TransferError(f"it says {state}, and none of it counts")

    def _kind(self) -> str:
        return "DRAM" if self.device.type == "cpu" else "VRAM"


class Mooncake(OneSided):
    """By Mooncake's transfer engine: sockets for host memory; for devices NVLink if
    ``MC_INTRANODE_NVLINK=1``, else RDMA. It cannot end a read: a slot stays loose until then."""

    name = "mooncake"

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        return _probe(cls.name, "mooncake.engine", device)

    def begin(self, address: str) -> Any:
        engine = import_module("mooncake.engine").TransferEngine()
        nvlink = os.environ.get("MC_INTRANODE_NVLINK") == "1"
        by = "tcp" if self.device.type == "cpu" else "nvlink_intra" if nvlink else "rdma"
        self._host = own_host(address)
        if engine.initialize(self._host, "P2PHANDSHAKE", by, ""):
            raise TransferError(f"Mooncake did not start for {by} on {self._host}")
        return engine

    def enter(self, address: int, nbytes: int, device: int) -> None:
        if self.engine.register_memory(address, nbytes):
            raise TransferError(f"{nbytes} B of staging could not be registered")

    def reach(self) -> bytes:
        return f"{self._host}:{self.engine.get_rpc_port()}".encode()

    def read(self, lane: Reading, moving: Moving, there: There, last: ExitStack) -> None:
        late = TransferTimeout(f"A slot was not read in {self.timeout:g} s; Mooncake goes on.")
        timer = threading.Timer(moving.until - time.monotonic(), moving.end, (late,))
        timer.daemon = True
        timer.start()
        last.callback(timer.cancel)
        given = [moving.slot.data_ptr()], [there.address], [there.nbytes]
        if self.engine.batch_transfer_sync_read(there.reach.decode(), *given):
            raise TransferError("it failed, perhaps after a part, and none of it counts")


def _index(slot: torch.Tensor) -> int:
    return max(slot.get_device(), 0)


def _probe(name: str, module: str, device: torch.device) -> Decision:
    if device.type not in ("cpu", "cuda"):
        return Decision(name, False, f"PortaKV knows no way of it for {device.type} devices")
    try:
        import_module(module)
    except (ImportError, OSError) as error:
        return Decision(name, False, f"{module} cannot be imported: {error}")
    return Decision(name, True, f"{module} is installed")


def own_host(address: str) -> str:
    """The address of this host on the way to one of a channel."""
    if not (found := re.fullmatch(r"tcp://\[?(.*?)\]?:(\d+)", address)):
        return "127.0.0.1"
    host = found[1]
    with socket.socket(AF_INET6 if ":" in host else AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((host, int(found[2])))  # sends nothing
        return str(way.getsockname()[0])


def _release(handle: Any) -> None:
    """Let go of a request; one under way is cancelled, or else waited for."""
    while True:
        try:
            return handle.release()  # type: ignore[no-any-return]
        except Exception:
            time.sleep(0.01)
