# SPDX-License-Identifier: Apache-2.0
"""The transports by NIXL and Mooncake: the reader reads the owner's staging buffers.

No process writes into another process. Only staging buffers are registered, so the peer reaches
nothing else.

Neither library authenticates connections to its own ports: keep them on an isolated network. A
process that reaches Mooncake's port can also write into staging buffers (0.3.13).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit
from weakref import ref

import torch
from msgspec import Meta

from portakv.backends.base import Decision
from portakv.errors import PortaKVError, TransferError
from portakv.extras import installing
from portakv.migrate.messages import Bytes, Count, Message, prepare
from portakv.migrate.transports.base import Lane, Moving, Transport
from portakv.runtime.devices import Unusable, imported, inside

if TYPE_CHECKING:
    from portakv.migrate.channel import Channel, Peer

#: Seconds between a reader's requests for a buffer that is not ready: the first pause and the
#: longest.
ASK = 1e-4
LONGEST_PAUSE = 5e-3
MOST_UNWANTED = 1024  # tags of one reader that an owner remembers before it offers them


class Where(Message, frozen=True):
    """A reader's transport requests the place of the buffer of a tag."""

    tag: Count


class There(Message, frozen=True):
    """The place of a buffer, and the library's address of it; no address: it is not ready."""

    reach: Annotated[bytes, Meta(max_length=32 << 10)] = b""  # long with many ports
    address: Annotated[int, Meta(ge=0, lt=1 << 62)] = 0
    nbytes: Bytes = 0
    device: int = 0


class Taken(Message, frozen=True):
    """One-way: a reader has read the buffer of a tag, or will not."""

    tag: Count


class Reading(Lane):
    """The buffers that one peer reads or that are read from it, two at a time."""

    width = 2
    transport: OneSided

    def __init__(self, transport: OneSided, channel: Channel, key: str | Peer) -> None:
        # by tag
        self.offered = dict[int, tuple[There, Moving]]()
        self.unwanted = set[int]()  # tags that the reader does not read, before they are offered
        self.names = dict[bytes, str]()  # names of the peer in the library, by its address
        # By address: the base tensor, its memory, the library's handle of it.
        self._entered = dict[int, Any]()
        super().__init__(transport, channel, key)

    def carry(self, moving: Moving, ready: torch.Event | None, tag: int) -> Iterator[None]:
        yield
        if ready is not None:  # libraries do not order their reads after a stream
            ready.synchronize()
        with inside(self.transport.device):
            (self._read if self.address else self._offer)(moving, tag)

    def _enter(self, buffer: torch.Tensor) -> Any:
        """Return the library's handle of a buffer's memory; register it at the first call."""
        memory = buffer.untyped_storage()
        base = buffer if buffer._base is None else buffer._base
        with self.transport.turn:
            self.transport.start(self.address or self.channel.address)
            for at in [at for at, (one, *_) in self._entered.items() if one() is None]:
                self.transport.deregister(self._entered.pop(at)[-1])
            if (at := memory.data_ptr()) not in self._entered:
                registered = self.transport.enter(at, memory.nbytes(), _index(memory))
                self._entered[at] = ref(base), memory, registered
            return self._entered[at][-1]

    def _offer(self, moving: Moving, tag: int) -> None:
        with self.transport.lock:
            if tag in self.unwanted:
                self.unwanted.discard(tag)
                return
            self.offered[tag] = There(), moving
        buffer = moving.buffer
        reach = self.transport.reach(self._enter(buffer))
        there = There(reach, buffer.data_ptr(), buffer.nbytes, _index(buffer))
        with self.transport.lock:
            if self._offers(moving, tag):
                self.offered[tag] = there, moving
        try:
            moving.wait()  # `Taken` ends the buffer
        finally:
            with self.transport.lock:
                if self._offers(moving, tag):
                    del self.offered[tag]

    def _offers(self, moving: Moving, tag: int) -> bool:
        """Return True unless the reader has taken the buffer: then a later one may have its tag."""
        return tag in self.offered and self.offered[tag][1] is moving

    def _read(self, moving: Moving, tag: int) -> None:
        nbytes = moving.buffer.nbytes
        pause = ASK
        try:
            moving.wait(0.0)  # raises if it was ended before its turn
            self._enter(moving.buffer)
            while not (there := self.channel.ask(self.address, Where(tag), There)).reach:
                moving.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            if there.nbytes != nbytes:
                raise TransferError(f"expected {nbytes} B, got {there.nbytes}")
            if moving.begin():
                self.transport.read(self, moving, there)
        finally:
            # Also after this side has closed the lane: else the owner waits for it.
            self.skip([tag])

    def skip(self, tags: Iterable[int]) -> None:
        for tag in tags:
            if not self.released:
                with suppress(PortaKVError):  # the owner may be gone
                    self.channel.tell(self.address, Taken(tag))

    def leave(self) -> None:
        with self.transport.turn:
            for *_, registered in self._entered.values():
                self.transport.deregister(registered)
            others = [x.names.values() for x in [*self.transport.lanes.values()]]
            for name in {*self.names.values()}.difference(*others):
                self.transport.part(name)


class OneSided(Transport):
    """The common part of both: a subclass starts a library, registers memory, and reads."""

    kind = Reading
    asks = (Where, Taken)
    library = ""  # a module
    needs = ""  # a name in it

    def __init__(self, device: torch.device, timeout: float = 30.0) -> None:
        super().__init__(device, timeout)
        self._engine: Any | None = None  # starts at the first buffer, because that is slow
        self.turn = threading.Lock()

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type not in ("cpu", "cuda"):
            return Decision(cls.name, False, f"it is not tested on {device.type} devices")
        how = f"it by {installing(cls.name)}"
        try:
            if hasattr(imported(cls.library, how), cls.needs):
                return Decision(cls.name, True, f"{cls.library} is installed")
            why = f"{cls.library} has no {cls.needs}; install a newer one by {installing(cls.name)}"
        except Unusable as error:
            why = str(error)
        return Decision(cls.name, False, why)

    def answer(self, peer: Peer, channel: Channel, request: Any) -> Message | None:
        lane: Reading = self.lane(peer, channel)
        if isinstance(request, Where):
            there, moving = lane.offered.get(request.tag, (There(), None))
            if moving is not None:
                moving.wait(0)  # raises what it ended with
            return there
        with self.lock:
            offered = lane.offered.pop(request.tag, None)
            if offered is None and len(lane.unwanted) < MOST_UNWANTED:
                lane.unwanted.add(request.tag)
        if offered is not None:
            offered[1].end()
        return None

    @property
    def engine(self) -> Any:
        """Return the library's engine, which `start` made."""
        assert self._engine is not None
        return self._engine

    def start(self, address: str) -> None:
        """Start the library at the first call, as `begin` does."""
        if self._engine is None:
            self._engine = self.begin(address)

    @abstractmethod
    def begin(self, address: str) -> Any:
        """Start the library for peers that reach this host as they reach ``address``."""

    @abstractmethod
    def enter(self, address: int, nbytes: int, device: int) -> Any:
        """Register memory; return the library's handle of it."""

    @abstractmethod
    def deregister(self, registered: Any) -> None:
        """End a registration."""

    def part(self, name: str) -> None:
        """Release a peer."""

    @abstractmethod
    def reach(self, registered: Any) -> bytes:
        """Return the bytes by which a reader's library reaches this memory."""

    @abstractmethod
    def read(self, lane: Reading, moving: Moving, there: There) -> None:
        """Read a place of a peer into a buffer, all of it."""


class Nixl(OneSided):
    """Move buffers by NIXL (1.5 or later) and its UCX: sockets, shared memory, RDMA, NVLink."""

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

    def deregister(self, registered: Any) -> None:
        self.engine.deregister_memory(registered)

    def part(self, name: str) -> None:
        self.engine.remove_remote_agent(name)

    def reach(self, registered: Any) -> bytes:
        return bytes(self.engine.get_partial_agent_metadata(registered, True, ["UCX"]))

    def read(self, lane: Reading, moving: Moving, there: There) -> None:
        agent = self.engine
        buffer = moving.buffer
        kind = self._kind()
        with self.turn:
            if there.reach not in lane.names:
                lane.names[there.reach] = agent.add_remote_agent(there.reach).decode()
        local = agent.get_xfer_descs([(buffer.data_ptr(), buffer.nbytes, _index(buffer))], kind)
        remote = agent.get_xfer_descs([(there.address, there.nbytes, there.device)], kind)
        handle = agent.initialize_xfer("READ", local, remote, lane.names[there.reach], b"")
        try:
            if (state := agent.transfer(handle)) == "PROC":
                moving.poll(lambda: agent.check_xfer_state(handle) != "PROC")
                state = agent.check_xfer_state(handle)
        finally:
            _release(handle)
        if state != "DONE":
            raise TransferError(f"its state is {state}; no byte of it counts")

    def _kind(self) -> str:
        return "DRAM" if self.device.type == "cpu" else "VRAM"


class Mooncake(OneSided):
    """Move buffers by Mooncake's transfer engine.

    It uses sockets for host memory. For devices it uses NVLink if ``MC_INTRANODE_NVLINK=1``, else
    RDMA. It cannot end a read: the buffer is not free until then. A reader does not find memory
    that an owner registers after the reader's first read (0.3.14).
    """

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

    def deregister(self, registered: Any) -> None:
        self.engine.unregister_memory(registered)

    def reach(self, registered: Any) -> bytes:
        return f"{self._host}:{self.engine.get_rpc_port()}".encode()

    def read(self, lane: Reading, moving: Moving, there: There) -> None:
        offered = [moving.buffer.data_ptr()], [there.address], [there.nbytes]
        if self.engine.batch_transfer_sync_read(there.reach.decode(), *offered):
            raise TransferError("the read failed; no byte of it counts")


def _index(of: torch.Tensor | torch.UntypedStorage) -> int:
    return of.device.index or 0


def own_host(address: str) -> str:
    """Return the address of this host on the route to a channel."""
    to = urlsplit(address)
    if to.scheme != "tcp":
        return "127.0.0.1"
    family, kind, *_, place = socket.getaddrinfo(to.hostname, to.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        return str(probe.getsockname()[0])


def _release(handle: Any) -> None:
    """Release a request. A request in flight is cancelled, or waited for."""
    while True:
        try:
            return handle.release()  # type: ignore[no-any-return]
        except Exception:  # NIXL has a type for each error; the request is still in flight
            time.sleep(0.01)


prepare(globals())
