# SPDX-License-Identifier: Apache-2.0
"""The transport by torch.distributed: buffers cross by gloo, nccl or a vendor's backend, in groups
that start over a channel.

Each pair of processes has a separate group, so that its end affects no other pair. gloo and nccl
open sockets for the data, neither encrypted nor authenticated (`GLOO_SOCKET_IFNAME`,
`NCCL_SOCKET_IFNAME`): keep them on an isolated network.
"""

from __future__ import annotations

import errno
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from queue import Empty
from secrets import token_hex
from time import monotonic, sleep
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
import torch.distributed as dist
from msgspec import Meta
from torch._C._distributed_c10d import HashStore, PrefixStore, ProcessGroup, Store

from portakv import arguments
from portakv.arguments import instance, text, whole
from portakv.backends.base import Decision
from portakv.errors import PeerError, PortaKVError, TransferError, TransferTimeout, Unsupported
from portakv.migrate.channel import Channel
from portakv.migrate.messages import Answer, Message, Name, prepare
from portakv.migrate.transports.base import Lane, Moving, Transport
from portakv.runtime.devices import inside
from portakv.runtime.interrupts import shielded, uninterrupted
from portakv.runtime.resources import free, raise_limit_if_few, reason
from portakv.runtime.streams import ignore_captures_elsewhere, own_stream
from portakv.tasks import End, runtime

if TYPE_CHECKING:
    from portakv.migrate.channel import Peer

# ------------------------------------------------------------------------------------------------
# Start torch.distributed groups over a channel, for transports and for callers with collectives.
#
# The groups need no TCPStore and no further port. They open separate sockets for data.

KEYS = 1 << 14  # the most keys of one rendezvous
Key = Annotated[str, Meta(max_length=1024)]
Value = Annotated[bytes, Meta(max_length=16 << 10)]


class Keep(Message, frozen=True):
    """Request an operation on keys: see the methods of `torch.distributed.Store`."""

    do: Literal["set", "add", "get", "delete_key"]
    keys: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=256)]
    value: Value = b""
    amount: int = 0


class Meet(Keep, frozen=True):
    """Request an operation on keys of a transport's group, apart from the keys of a rendezvous."""


class Kept(Message, frozen=True):
    """Answer with the values of all keys, with no value if one key has none, or with a number."""

    values: tuple[Value, ...] = ()
    number: int = 0


class ChannelStore(Store):
    """Keys and values of torch.distributed, stored here or by the channel at ``address``.

    Requests to that channel are messages of ``kind``. torch uses the store for as long as the group
    exists: keep a reference, as `pair` does.

    Attributes:
        over: set to True after the other side is gone; calls that wait for keys then end.
    """

    timeout: timedelta  # the attribute of torch's stores, which torch sets

    def __init__(self, channel: Channel, address: str | None, kind: type[Keep] = Keep) -> None:
        super().__init__()
        self._channel = channel
        self._address = address
        self._kind = kind
        self._stored = HashStore()
        self.over = False

    @shielded
    def do(self, request: Keep) -> Kept:
        """Execute a request on the keys that are stored here, and return the answer."""
        stored = self._stored
        keys = [*request.keys]
        with runtime().lock:
            changes = request.do in ("set", "add")
            if changes and stored.num_keys() >= KEYS and not stored.check(keys[:1]):
                raise PeerError(
                    f"Expected at most {KEYS} keys in a rendezvous, got another. Make a second "
                    f"rendezvous."
                )
            if request.do == "set":
                value: Any = request.value  # the stub knows no bytes
                stored.set(keys[0], value)
            elif request.do == "add":
                return Kept(number=stored.add(keys[0], request.amount))
            elif request.do == "delete_key":
                return Kept(number=int(stored.delete_key(keys[0])))
            return Kept(tuple(map(stored.get, keys)) if stored.check(keys) else ())

    def _ask(self, do: Any, *keys: str, **more: Any) -> Kept:
        request = self._kind(do, keys, **more)
        if self._address is None:
            return self.do(request)
        return self._channel.ask(self._address, request, Kept)

    def _await(self, keys: Sequence[str], seconds: float) -> tuple[bytes, ...]:
        until = monotonic() + seconds
        pause = 0.001
        while not (values := self._ask("get", *keys).values):
            if monotonic() > until or self.over:
                raise TransferTimeout(
                    f"No rank set {', '.join(keys)[:200]} in {seconds:g} s. Start all ranks."
                )
            sleep(pause)
            pause = min(0.02, 2 * pause)
        return values

    def set(self, key: str, value: str | bytes | bytearray) -> None:
        self._ask("set", key, value=value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._await([key], self.timeout.total_seconds())[0]

    def add(self, key: str, value: int) -> int:
        return self._ask("add", key, amount=value).number

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._await(keys, (self.timeout if timeout is None else timeout).total_seconds())

    def check(self, keys: list[str]) -> bool:
        return self._ask("get", *keys).values != ()

    def delete_key(self, key: str) -> bool:
        return self._ask("delete_key", key).number == 1

    def num_keys(self) -> int:
        """Return the number of keys that are stored here."""
        return self._stored.num_keys()


def rendezvous(channel: Channel, address: str | None = None) -> ChannelStore:
    """Return a `torch.distributed.Store` over a channel.

    Without ``address`` this channel stores the keys and serves them to others; a channel serves one
    rendezvous. With ``address`` the channel there, which has a rendezvous already, stores them.
    """
    instance("channel", channel, Channel)
    if address is not None:
        text("address", address)
    store = ChannelStore(channel, address)
    if address is not None:
        return store

    def keep() -> ChannelStore:
        channel.claim("a rendezvous", store)
        channel.serve(Keep, lambda _, request: store.do(request))
        return store

    def undo(_: ChannelStore) -> None:
        channel.free("a rendezvous", store)

    return uninterrupted(keep, undo)


def pair(
    store: Store,
    rank: int,
    size: int,
    device: torch.device | str,
    timeout: float = 30.0,
    name: str = "",
) -> ProcessGroup:
    """Return a process group apart from the default group: gloo, nccl or a vendor's for the device.

    A ``name`` serves once, for one of the groups of a store. Aborting the group ends no other
    group.

    Raises:
        Unsupported: torch has no such group for the device.
        PeerError: the other ranks did not join in ``timeout`` seconds.
    """
    instance("store", store, Store, "Make one by rendezvous(channel).")
    whole("size", size, 1, 1 << 20)
    whole("rank", rank, 0, size - 1)
    text("name", name, least=0)
    seconds = timedelta(seconds=arguments.seconds("timeout", timeout, above=True))
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError, ValueError):
        raise arguments.invalid("device", "a device of torch", device) from None
    named = PrefixStore(f"{name}/", store)
    torchs = dist.distributed_c10d.__dict__
    backend = dist.Backend.default_device_backend_map.get(kind, "none")
    plugin: Any = getattr(dist.Backend, "_plugins", {}).get(backend.upper())
    here = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}.get(backend, bool)
    if plugin is None and not here():
        raise Unsupported(f"A process group for {kind}", "torch has none here")
    try:
        if plugin is not None and plugin.extended_api:
            options: Any = torchs["_DistributedBackendOptions"]()
            options.store = named
            options.group_rank = rank
            options.group_size = size
            options.timeout = seconds
            options.group_id = name
            made: Any = plugin.creator_fn(options, None)
        elif plugin is not None:
            made = plugin.creator_fn(named, rank, size, seconds)
        elif backend == "gloo":
            made = torchs["ProcessGroupGloo"](named, rank, size, seconds)
        else:
            options = torchs["ProcessGroupNCCL"].Options()
            options._timeout = seconds
            made = torchs["ProcessGroupNCCL"](named, rank, size, options)
    except RuntimeError as error:  # also the errors that the store raised
        why = str(error).partition("\n")[0].rstrip(".")
        raise PeerError(
            f"Expected {size} ranks to join the group, got too few at rank {rank}: {why}. Pair by "
            f"another name."
        ) from None
    weakref.finalize(made, bool, (store, named))  # retained as long as the group
    return cast(ProcessGroup, made)


def unique_id() -> bytes:
    """Return NCCL's unique id for a caller's communicator. Raises `Unsupported` without NCCL."""
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise Unsupported("A unique id", "this torch has no NCCL, or no device for it")
    return bytes(torch.cuda.nccl.unique_id())


# ------------------------------------------------------------------------------------------------
# The transport by torch.distributed: buffers cross by gloo, nccl or a vendor's backend.

#: After its own timeout NCCL's watchdog ends the process; here a group is aborted long before.
NEVER = 86400.0
#: gloo waits this many times a group's timeout for a peer that connects (`waitUntil`, tcp/pair.h),
#: also for a dead peer; torch has no call that ends the wait.
RELAXED = 5
#: Descriptors that must be free before a group is made: gloo takes about twelve for each side, and
#: both sides may be in one process.
DESCRIPTORS = 64
#: Seconds without a buffer that lands, after which a reader asks whether its owner has the group:
#: nccl does not report the end of a peer's group.
SILENT = 0.5
#: Seconds between two looks at a buffer on a device: other threads need the interpreter as well.
SHORTEST = 5e-5


class Join(Message, frozen=True):
    """A reader makes a group with an owner; ``name`` is random and belongs to the group alone."""

    name: Name


class Alive(Message, frozen=True):
    """A reader requests whether its owner still has the group ``name``."""

    name: Name


class Pair(Lane):
    """The group of two processes, which the first buffer makes; it moves buffers of the host.

    A buffer after a failed one would take its bytes, so a failure closes the group.
    """

    ordered = True

    def __init__(self, transport: Transport, channel: Channel, key: str | Peer) -> None:
        self.name = ""
        self.named = End[None](runtime())
        self.group: dist.ProcessGroup | None = None  # until the first buffer
        super().__init__(transport, channel, key)
        self.store = ChannelStore(channel, self.address or None, Meet)  # by which both meet

    @property
    def other(self) -> int:
        """Return the rank of the peer."""
        return 0 if self.address else 1

    def meet(self, stop: Callable[[], bool] = bool) -> None:
        # One thread at a time: that of the pull whose turn it is, before it moves a buffer, or else
        # that of the lane, at its first buffer.
        if not self.name:
            name = token_hex(16)
            self.channel.ask(self.address, Join(name), Answer, stop=stop)
            self.name = name

    def join(self, moving: Moving) -> dist.ProcessGroup:
        """Return the group of this lane, before a buffer crosses; make it at the first call."""
        if self.gone:  # the library waits long for a peer that is gone, for each buffer
            raise self.gone
        group = self.group = self.group or self._join()
        if self.gone or not moving.begin():  # after the line above, because `cut` reads the group
            raise self.gone or TransferTimeout("its turn came too late")
        return group

    def carry(self, moving: Moving, ready: torch.Event | None, tag: int) -> Iterator[None]:
        """Move the length, then the bytes.

        gloo ends the process if more bytes arrive than it expects, so the length is checked before
        the receive. gloo accepts fewer bytes without an error.
        """
        group = self.join(moving)
        call = group.recv if self.address else group.send
        buffer = moving.buffer.view(-1).view(torch.uint8)
        head = torch.tensor([buffer.nbytes], dtype=torch.int64, device="cpu")
        for each in (head.view(torch.uint8), buffer):
            left = moving.until - time.monotonic()
            call([each], self.other, tag).wait(timedelta(seconds=max(left, 0.001)))
            if (came := int(head)) != buffer.nbytes:
                raise TransferError(f"expected {buffer.nbytes} B, got {came}")
        yield

    def _join(self) -> dist.ProcessGroup:
        raise_limit_if_few()
        if free(DESCRIPTORS) < DESCRIPTORS:  # gloo ends the process if its listener has none
            error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            raise TransferError(reason(error))
        if self.address:
            self.meet(stop=lambda: self.gone is not None)
        elif not self.named.wait(self.transport.timeout):
            raise TransferTimeout("the reader has not joined")
        device = self.transport.device
        seconds = self.transport.timeout / RELAXED if device.type == "cpu" else NEVER
        return pair(self.store, 1 - self.other, 2, device, seconds, self.name)

    def cut(self) -> bool:
        """End a receive of gloo, which has no call for that.

        A receive that times out closes the pair's connection immediately, also in the middle of a
        message. gloo's thread ends with its own timeout.
        """
        self.store.over = True
        self.named.settle(None, None)
        if self.group is not None:
            with suppress(RuntimeError):  # of gloo: the receive timed out
                late = torch.empty(1, dtype=torch.uint8, device="cpu")
                self.group.recv([late], self.other, 0x7FFFFFFF).wait(timedelta(milliseconds=1))
        return True

    def leave(self) -> None:
        self.group = None  # an error's traceback may retain the lane


class DevicePair(Pair):
    """The group of two processes for buffers of a device.

    Buffers are issued on a stream of the lane as they come: by the thread of the lane until one has
    landed, because the library waits for the peer meanwhile, and then by the caller, so that no
    thread has to wake. The thread ends them in their order. The host waits for no buffer before it
    issues the next. No length precedes a buffer: NCCL takes the size that it gets, and both sides
    know it from one `Gather`.
    """

    def __init__(self, transport: Transport, channel: Channel, key: str | Peer) -> None:
        self.stream = own_stream(transport.device)  # a receive may hold it up for long
        #: Buffers that were issued and have not ended; without an event: one that could not be.
        self._flying = deque[tuple[Moving, torch.Event | None]]()
        self._since = 0.0  # when the first of them became the first, or the owner was asked
        self._connected = False  # a buffer has landed, and the thread has none to issue
        super().__init__(transport, channel, key)

    def cut(self) -> bool:
        """End the wait for the peer; the thread aborts what the stream holds."""
        self.store.over = True
        self.named.settle(None, None)
        return False

    def queue(self, moving: Moving, ready: torch.Event | None, tag: int) -> None:
        """Issue a buffer, or have the thread issue it; one caller at a time."""
        if not self._connected:
            self.jobs.put(partial(self._issue, moving, ready, tag))
            return
        self._issue(moving, ready, tag)
        if len(self._flying) == 1:  # the thread may sleep until there is a job
            self.jobs.put(bool)

    def _issue(self, moving: Moving, ready: torch.Event | None, tag: int) -> None:
        """Put a buffer on the stream, after the event ``ready`` and earlier buffers."""
        if not self._flying:
            self._since = time.monotonic()
        try:
            group = self.join(moving)
            call = group.recv if self.address else group.send
            with inside(self.stream):
                if ready is not None:
                    ready.wait(self.stream)
                buffer = moving.buffer.view(-1).view(torch.uint8)
                call([buffer], self.other, tag).wait()  # only the lane's stream waits
                event = self.stream.record_event()
            self._flying.append((moving, event))
            moving.issue(event)
        except Exception as caught:  # whatever failed, later buffers would take its bytes
            error = self.failure(moving, caught)
            moving.end(error)
            self._flying.append((moving, None))  # it is free after the buffers before it
            self.close(error)

    # --- in the thread

    def _work(self) -> None:
        """Do the jobs of the lane and end buffers, until the lane is closed."""
        ignore_captures_elsewhere(self.transport.device)
        while self.gone is None or not self._is_idle():
            self._do_job()
            self._end_landed()
        self.leave()

    def _do_job(self) -> None:
        """Do a job, or pause until the next look at the first buffer. A closed lane has a last job.

        No timed `get` of the queue: it may wait for ever if this thread is held up in it for longer
        than its timeout (Python 3.10 - 3.12).
        """
        try:
            job = self.jobs.get(block=not self._flying)
        except Empty:
            time.sleep(min(max(SHORTEST, (time.monotonic() - self._since) / 8), 1e-3))
        else:
            if job is not None:
                job()

    def _is_idle(self) -> bool:
        """Return True if no buffer is in flight, and no caller issues one."""
        with self.order:
            return not self._flying

    def _end_landed(self) -> None:
        """End the buffers that have landed; abort the others once the lane is closed."""
        while self._flying:
            moving, event = self._flying[0]
            try:
                ended = event is None or event.query()
            except RuntimeError as caught:  # the device has failed, and nothing runs any more
                self.close(self.failure(moving, caught))
                ended = True
            if not ended:
                self._look_at(moving)
                return
            with self.order:  # no caller has another issued meanwhile
                self._flying.popleft()
                self._connected = self._connected or self.jobs.empty()
            self._since = time.monotonic()
            moving.end(self.gone, untouched=True)
            self.forget(moving)

    def _look_at(self, moving: Moving) -> None:
        """Close the lane if its first buffer is late or cut off; abort the group of a closed
        lane."""
        if self.gone is None:
            try:
                moving.wait(0.0)  # raises if it is late
                self._ask_owner()
            except PortaKVError as caught:
                self.close(self.failure(moving, caught))
        group = self.group
        if self.gone is not None and group is not None:
            self.group = None
            with suppress(RuntimeError):  # of a group that has failed already
                group.abort()  # otherwise it waits for the peer as long as the device runs

    def _ask_owner(self) -> None:
        """Raise `PeerError` if nothing lands and the owner does not have this group any more."""
        now = time.monotonic()
        if not self.address or now < self._since + SILENT:
            return
        self._since = now
        try:
            late = partial(self._is_late, now + SILENT)
            answer = self.channel.ask(self.address, Alive(self.name), Answer, stop=late)
        except PortaKVError:  # the channel reports the end of an owner, and its own errors
            return
        if answer.state == "gone":
            raise PeerError("the owner has closed the group")

    def _is_late(self, until: float) -> bool:
        """Return True if an answer is not waited for any longer."""
        return self.gone is not None or time.monotonic() > until


class Distributed(Transport):
    """Move buffers by a group of two processes for each peer, apart from the default group."""

    name = "distributed"
    kind = Pair
    on_device: type[Pair] = DevicePair
    asks = (Join, Meet, Alive)

    def __init__(self, device: torch.device, timeout: float = 30.0) -> None:
        super().__init__(device, timeout)
        if device.type != "cpu":
            self.kind = self.on_device

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        made = {"cpu": dist.is_gloo_available, "cuda": dist.is_nccl_available}
        by = dist.Backend.default_device_backend_map.get(device.type)
        if by is None or not made.get(device.type, lambda: True)():
            return Decision(cls.name, False, f"torch.distributed has no backend for {device.type}")
        return Decision(cls.name, True, f"a group of two by {by}")

    def answer(self, peer: Peer, channel: Channel, request: Any) -> Message:
        if isinstance(request, Alive):
            has = self.lanes.get(peer)
            return Answer("done" if has is not None and has.name == request.name else "gone")
        lane: Pair = self.lane(peer, channel)
        if isinstance(request, Meet):
            return lane.store.do(request)
        if lane.named.ended:  # the reader has lost the group
            lane.close(PeerError("The reader makes a new group, which replaces this one."))
            lane = self.lane(peer, channel)
        lane.name = request.name
        lane.named.settle(None, None)
        return Answer("done")


prepare(globals())
