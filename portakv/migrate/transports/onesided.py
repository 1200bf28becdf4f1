# SPDX-License-Identifier: Apache-2.0
"""The transports by NIXL and Mooncake: the reader reads the owner's slots. No process writes into
another one. Only slots are registered, so that nothing else of a process can be reached.

Neither library authenticates what comes to its own ports: keep them on an isolated network. Who
reaches Mooncake's can also write into slots (0.3.13).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from importlib import import_module
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated, Any, cast
from urllib.parse import urlsplit
from weakref import ref

import torch
from msgspec import Meta

from portakv.backends.base import Decision
from portakv.errors import TransferError
from portakv.migrate.messages import Bytes, Count, Message
from portakv.migrate.transports.base import Lane, Moving, Transport
from portakv.runtime.devices import Unusable, imported, inside

if TYPE_CHECKING:
    from portakv.migrate.channel import Channel, Peer

#: Seconds between a reader's questions for a slot that is not ready, and the most of them.
ASK = 1e-4
ASKED = 5e-3


class Where(Message, frozen=True):
    """A reader's transport asks where the slot of a tag is."""

    tag: Count


class There(Message, frozen=True):
    """Where it is, and what the library needs to reach it; without, it is not ready yet."""

    reach: Annotated[bytes, Meta(max_length=32 << 10)] = b""  # with many ports it is long
    address: Annotated[int, Meta(ge=0, lt=1 << 62)] = 0
    nbytes: Bytes = 0
    device: int = 0


class Taken(Message, frozen=True):
    """One-way: a reader has read the slot of a tag, or will not."""

    tag: Count


class Reading(Lane):
    """The slots that one peer reads, or that are read from it, two at a time."""

    width = 2

    def __init__(self, transport: OneSided, channel: Channel, key: str | Peer) -> None:
        # by tag
        self.ours = transport
        self.given = dict[int, tuple[There, Moving]]()
        self.names = dict[bytes, str]()  # of the peer in the library, by what reaches it
        self._entered = dict[int, Any]()  # rooms of slots, their memory, the library's word for it
        super().__init__(transport, channel, key)

    def carry(self, moving: Moving, ready: torch.Event | None, tag: int) -> Iterator[None]:
        yield
        if ready is not None:  # libraries read and write behind no stream
            ready.synchronize()
        with inside(self.ours.device):
            (self._read if self.address else self._offer)(moving, tag)

    def _enter(self, slot: torch.Tensor) -> Any:
        """What the library calls a slot's memory, which it can reach as long as it is a slot's."""
        memory = slot.untyped_storage()
        room = slot if slot._base is None else slot._base
        with self.ours.turn:
            if self.ours.engine is None:
                self.ours.engine = self.ours.begin(self.address or self.channel.address)
            for at in [at for at, (one, *_) in self._entered.items() if one() is None]:
                self.ours.let_go(self._entered.pop(at)[-1])
            if (at := memory.data_ptr()) not in self._entered:
                told = self.ours.enter(at, memory.nbytes(), _index(memory))
                self._entered[at] = ref(room), memory, told
            return self._entered[at][-1]

    def _offer(self, moving: Moving, tag: int) -> None:
        self.given[tag] = (There(), moving)
        slot = moving.slot
        reach = self.ours.reach(self._enter(slot))
        self.given[tag] = There(reach, slot.data_ptr(), slot.nbytes, _index(slot)), moving
        moving.wait()  # `Taken` ends it

    def _read(self, moving: Moving, tag: int) -> None:
        nbytes = moving.slot.nbytes
        pause = ASK
        try:
            self._enter(moving.slot)
            while not (there := self.channel.ask(self.address, Where(tag), There)).reach:
                moving.wait(pause)
                pause = min(2 * pause, ASKED)
            if there.nbytes != nbytes:
                raise TransferError(f"{there.nbytes} B were given, {nbytes} asked for")
            if moving.begin():
                self.ours.read(self, moving, there)
        finally:
            if self.gone is None:
                self.channel.tell(self.address, Taken(tag))

    def leave(self) -> None:
        with self.ours.turn:
            for *_, told in self._entered.values():
                self.ours.let_go(told)
            others = [x.names.values() for x in [*self.ours.lanes.values()]]
            for name in {*self.names.values()}.difference(*others):
                self.ours.part(name)


class OneSided(Transport):
    """What both have; a subclass starts a library, registers memory, tells and reads."""

    # a module, and a name in it
    kind = Reading
    asks = (Where, Taken)
    library = ""
    needs = ""

    def __init__(self, device: torch.device, timeout: float = 30.0) -> None:
        super().__init__(device, timeout)
        # the library's, which is slow
        self.engine = cast(Any, None)
        self.turn = threading.Lock()

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type not in ("cpu", "cuda"):
            return Decision(cls.name, False, f"it is not tried for {device.type} devices")
        extra = f"portakv[{cls.name}]"
        try:
            if hasattr(imported(cls.library, extra), cls.needs):
                return Decision(cls.name, True, f"{cls.library} is installed")
            why = f"{cls.library} has no {cls.needs}; install {extra}"
        except Unusable as error:
            why = str(error)
        return Decision(cls.name, False, why)

    def answer(self, peer: Peer, channel: Channel, asked: Any) -> Message | None:
        lane: Reading = self.lane(peer, channel)
        if isinstance(asked, Where):
            there, moving = lane.given.get(asked.tag, (There(), None))
            if moving is not None:
                moving.wait(0)  # raises what it ended with
            return there
        if given := lane.given.pop(asked.tag, None):
            given[1].end()
        return None

    @abstractmethod
    def begin(self, address: str) -> Any:
        """Start the library, for peers that reach this host as they reach ``address``."""

    @abstractmethod
    def enter(self, address: int, nbytes: int, device: int) -> Any:
        """Register memory; what the library calls it."""

    @abstractmethod
    def let_go(self, told: Any) -> None:
        """Register it no more."""

    def part(self, name: str) -> None:
        """Let go of a peer."""

    @abstractmethod
    def reach(self, told: Any) -> bytes:
        """What a reader's library needs to read this memory here."""

    @abstractmethod
    def read(self, lane: Reading, moving: Moving, there: There) -> None:
        """Read a place of a peer into a slot, all of it."""


class Nixl(OneSided):
    """By NIXL (1.5 or later) and its UCX: sockets, shared memory, RDMA, NVLink."""

    name = "nixl"
    library = "nixl._api"
    needs = "nixl_thread_sync_t"

    def begin(self, address: str) -> Any:
        api = import_module(self.library)
        strict = api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        terms = api.nixl_agent_config(backends=["UCX"], sync_mode=strict)
        return api.nixl_agent(f"portakv-{token_hex(8)}", terms)

    def enter(self, address: int, nbytes: int, device: int) -> Any:
        return self.engine.register_memory([(address, nbytes, device, "")], self._kind())

    def let_go(self, told: Any) -> None:
        self.engine.deregister_memory(told)

    def part(self, name: str) -> None:
        self.engine.remove_remote_agent(name)

    def reach(self, told: Any) -> bytes:
        return bytes(self.engine.get_partial_agent_metadata(told, True, ["UCX"]))

    def read(self, lane: Reading, moving: Moving, there: There) -> None:
        agent = self.engine
        slot = moving.slot
        kind = self._kind()
        with self.turn:
            if there.reach not in lane.names:
                lane.names[there.reach] = agent.add_remote_agent(there.reach).decode()
        mine = agent.get_xfer_descs([(slot.data_ptr(), slot.nbytes, _index(slot))], kind)
        theirs = agent.get_xfer_descs([(there.address, there.nbytes, there.device)], kind)
        handle = agent.initialize_xfer("READ", mine, theirs, lane.names[there.reach], b"")
        try:
            if (state := agent.transfer(handle)) == "PROC":
                moving.poll(lambda: agent.check_xfer_state(handle) != "PROC")
                state = agent.check_xfer_state(handle)
        finally:
            _release(handle)
        if state != "DONE":
            raise TransferError(f"it says {state}, and none of it counts")

    def _kind(self) -> str:
        return "DRAM" if self.device.type == "cpu" else "VRAM"


class Mooncake(OneSided):
    """By Mooncake's transfer engine: sockets for host memory; for devices NVLink if
    ``MC_INTRANODE_NVLINK=1``, else RDMA. It cannot end a read: a slot is not free until then. What
    an owner registers after a reader's first read, that reader does not find (0.3.14)."""

    name = "mooncake"
    library = "mooncake.engine"
    needs = "TransferEngine"
    knows_once = True

    def begin(self, address: str) -> Any:
        engine = import_module(self.library).TransferEngine()
        nvlink = os.environ.get("MC_INTRANODE_NVLINK") == "1"
        by = "tcp" if self.device.type == "cpu" else "nvlink_intra" if nvlink else "rdma"
        self._host = own_host(address)
        if ":" in self._host:  # 0.3.13 and 0.3.14 find no peer by it
            raise TransferError(f"Mooncake takes no IPv6 ({self._host}); let channels use IPv4")
        if engine.initialize(self._host, "P2PHANDSHAKE", by, ""):
            raise TransferError(f"Mooncake did not start for {by} on {self._host}")
        return engine

    def enter(self, address: int, nbytes: int, device: int) -> Any:
        if self.engine.register_memory(address, nbytes):
            raise TransferError(f"{nbytes} B of staging could not be registered")
        return address

    def let_go(self, told: Any) -> None:
        self.engine.unregister_memory(told)

    def reach(self, told: Any) -> bytes:
        return f"{self._host}:{self.engine.get_rpc_port()}".encode()

    def read(self, lane: Reading, moving: Moving, there: There) -> None:
        given = [moving.slot.data_ptr()], [there.address], [there.nbytes]
        if self.engine.batch_transfer_sync_read(there.reach.decode(), *given):
            raise TransferError("it failed, perhaps after a part, and none of it counts")


def _index(of: torch.Tensor | torch.UntypedStorage) -> int:
    return of.device.index or 0


def own_host(address: str) -> str:
    """The address of this host on the way to one of a channel."""
    to = urlsplit(address)
    if to.scheme != "tcp":
        return "127.0.0.1"
    family, kind, *_, place = socket.getaddrinfo(to.hostname, to.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as way:
        way.connect(place)  # sends nothing
        return str(way.getsockname()[0])


def _release(handle: Any) -> None:
    """Let go of a request; one under way is cancelled, or else waited for."""
    while True:
        try:
            return handle.release()  # type: ignore[no-any-return]
        except Exception:
            time.sleep(0.01)
