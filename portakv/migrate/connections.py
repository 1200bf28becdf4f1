# SPDX-License-Identifier: Apache-2.0
"""Connections of a reader to owners, and the staging buffers and figures of each.

A reader connects to each owner once. It rejects an owner with other rows, maps the owner's memory
if it can, and otherwise agrees with the owner on a transport.
"""

from __future__ import annotations

import threading
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from time import monotonic, perf_counter
from traceback import clear_frames
from typing import Any, NamedTuple, Protocol, TypeAlias, cast
from weakref import finalize

import torch

from portakv.copy.choose_encoding import is_out_of_date
from portakv.errors import (
    LayoutError,
    PeerError,
    PortaKVError,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.migrate import shared_memory
from portakv.migrate.channel import Channel, TransportChannel
from portakv.migrate.described import exports_here, rebuild, reserve
from portakv.migrate.messages import (
    REASONS,
    Answer,
    Box,
    Bye,
    Handshake,
    Hello,
    Message,
    Refused,
    Renew,
    Ticket,
    carried,
    is_signed,
    no_ticket,
)
from portakv.migrate.shards import Shard, device_of, unlike
from portakv.migrate.staging import Chunks, has_ended, staging
from portakv.migrate.transports import check_transport, choose_between, forced
from portakv.migrate.transports.base import Lane, Moving, Transport, gone_peer, released_peer
from portakv.migrate.words import NamesOfOwner, Place, WordsOfOwner, open_page
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import inside
from portakv.runtime.late_release import release
from portakv.runtime.resources import reason
from portakv.runtime.streams import own_stream
from portakv.runtime.transfer import Transfer
from portakv.tasks import Handle, Limit, Signal, Wait, blocking, runtime

#: The address and the epoch of an owner.
OwnerKey: TypeAlias = tuple[str, bytes]

# ------------------------------------------------------------------------------------------------
# Map the memory of an owner on this host: its rows, its events, its words and its names.


class NotMapped(Exception):
    """The memory of an owner cannot be mapped; the text says why, as a clause."""


def map_owner(owner: Connection, device: torch.device) -> None:
    """Map the memory of an owner for a device of this process.

    Raises `NotMapped` if that fails, and `PeerError` if no views fit the regions that the owner
    describes.
    """
    _check(owner.address, owner.handshake)  # before any memory is mapped
    regions = list[torch.Tensor]()  # the memory as bytes, whose last reference unmaps it
    try:
        _map(owner, device, regions)
    except BaseException as error:
        clear_frames(error.__traceback__)  # which refer to the memory
        release(regions.clear)
        raise
    # The memory stays as long as the owner, and until no step may wait for this process.
    finalize(owner, release, regions.clear).atexit = False


def _map(owner: Connection, device: torch.device, regions: list[torch.Tensor]) -> None:
    """Map the memory of an owner, and add each region as soon as it is mapped."""
    handshake = owner.handshake
    if missing := [region.why for region in handshake.regions if not region.handle]:
        raise NotMapped(f"the owner does not share it: {missing[0]}")
    try:
        here = exports_here(handshake.epoch, device)
        with _apart(device):
            if here is not None:
                regions += here.flat()
            for x in handshake.regions[len(regions) :]:
                place = "cpu" if x.device.startswith("cpu ") else device
                regions.append(shared_memory.open_shared(x.handle, place))
            *flat, proof = regions
            read = (proof ^ 0).cpu()  # a kernel reads it, as kernels read rows
        if not torch.equal(read, shared_memory.proof_of(handshake.epoch)):
            raise NotMapped("the mapped memory does not show the bytes of its owner")
        shards = [rebuild(one, flat) for one in handshake.described]
        remote = handshake.regions[0].device
        if remote != shared_memory.where(device) and not remote.startswith("cpu "):
            # torch reports another device's memory as this device's: mark the views.
            shards = [Shard(x.view.as_peer(device), x.group.layers, x.group.heads) for x in shards]
        if here is not None:
            owner.events = [*here.events]
        else:
            owner.events = [shared_memory.open_event(one, device) for one in handshake.events]
    except shared_memory.NoDescriptor:  # another method would take descriptors, too
        raise
    except PortaKVError as error:
        raise NotMapped(str(error)) from error
    owner.words = open_page(WordsOfOwner, handshake.words)
    owner.names = open_page(lambda page: NamesOfOwner(page, handshake.key), handshake.names)
    # Last: pulls read an owner that has shards, and need its events to wait for the stream that
    # writes the rows.
    owner.shards = shards


def _apart(device: torch.device) -> AbstractContextManager[object]:
    """Make a private stream current: this thread's may wait for the rows of a pull that waits for
    this connection."""
    return nullcontext() if device.type == "cpu" else inside(own_stream(device))


def _check(address: str, handshake: Handshake) -> None:
    """Raise `PeerError` if no views fit the regions that an owner describes."""
    try:
        regions = [reserve(region.nbytes) for region in handshake.regions]
    except (OSError, OverflowError, ValueError) as error:
        raise PeerError(
            f"Expected regions of memory that this process has addresses for from {address}, got "
            f"others ({error}). Pull from another owner."
        ) from None
    for described in handshake.described:
        rebuild(described, regions)


_HOST = torch.device("cpu")
FAREWELL = 0.5  # seconds for the last message to all owners
ANY = bytes(16)  # the epoch of whoever has an address: no owner has it, and no ticket
MOST_BUFFERS = 64  # staging buffers of an owner, and pulls that take its rows at the same time


class Connection:
    """An owner: the answer to its handshake, and its shards and events if its memory is mapped."""

    def __init__(self, channel: Channel, address: str, handshake: Handshake) -> None:
        self.channel = channel
        self.address = address
        self.handshake = handshake
        self.shards = list[Shard]()
        self.events = list[torch.Event]()
        self.words: WordsOfOwner | None = None  # None: only the owner says if an offer holds
        self.names: NamesOfOwner | None = None  # None: only the owner says which offer has a name
        self.gone = False  # its process is gone, or was connected to anew
        self.why_not_mapped = ""
        self.staged: Staging | None = None  # set if the memory is not mapped
        self.number = 0  # among the open connections; the queue of its tasks has this number
        self.unwatch: Callable[[], object] = lambda: None
        #: The cuts of pulls without skipped positions, by the epochs of all of their owners.
        self.cuts: Bounded[tuple[bytes, ...], Any] = Bounded("cuts of pulls", 16)

    @property
    def strategy(self) -> tuple[str, str]:
        """Return the name of the transport of an owner whose memory is not mapped, and why."""
        return self.staging.transport.name, self.why_not_mapped

    @property
    def staging(self) -> Staging:
        """Return the staging of an owner whose memory is not mapped."""
        if self.staged is None:
            raise PeerError(f"Expected {self.address} to have a transport, got none. Pull again.")
        return self.staged


class Source(NamedTuple):
    """A ticket and the owner that made it.

    ``word``: the place of the offer's validity word; None if only the owner can say whether the
    offer holds.
    """

    ticket: Ticket
    owner: Connection
    word: Place | None = None

    @classmethod
    def of(cls, ticket: Ticket, owner: Connection) -> Source:
        """Return the source of a ticket."""
        words = owner.words
        if words is None:
            return cls(ticket, owner)
        place = Place.of(ticket.place, ticket.offer)
        return cls(ticket, owner, place if words.has(place) else None)

    @property
    def end(self) -> int:
        """Return the mark of the offer when all of its rows are complete; 0 if it has no mark."""
        if self.ticket.progress == "tokens":
            return self.ticket.tokens
        if not self.ticket.progress:
            return 0
        groups = [described.group for described in self.owner.handshake.described]
        return max(group.layers[1] - group.layers[0] for group in groups)

    @property
    def mark(self) -> int:
        """Return the mark that the owner's memory shows; 0 if only the owner can say it."""
        words = self.owner.words
        word = self.word
        return 0 if words is None or word is None else words.mark(word)


Sources = Sequence[Source]


@dataclass(frozen=True)
class Attempt:
    """A handshake with an owner: the coroutine that makes it, and when it began."""

    handle: Handle[None]
    began: float

    @property
    def error(self) -> PortaKVError | None:
        """Return why the handshake failed; None if it has not ended, or connected the owner."""
        error = self.handle.error
        if error is None or isinstance(error, PortaKVError):
            return error
        if isinstance(error, CancelledError):
            return closed_reader()
        why = reason(error) if isinstance(error, OSError) else repr(error)
        return TransferError(f"The handshake failed: {why}.")


class Connections:
    """The owners of one reader; see `Reader` for the arguments.

    Coroutines connect to owners, in steps that have the runtime's lock.

    Attributes:
        on_handshake: called at the end of each handshake of `begin`; it must be quick and take no
            lock.
    """

    def __init__(
        self, channel: Channel, shards: Sequence[Shard], model: str, transport: str | None
    ) -> None:
        self.channel = channel
        self.shards = shards
        self.device = device_of(shards)
        check_transport(transport, self.device)
        self._model = model
        self._transport = forced(transport)
        self._transports = dict[str, Transport]()
        self._owners = dict[tuple[str, bytes], Connection]()
        self._closed = False
        self._runtime = runtime()
        self.on_handshake: Callable[[], object] = bool
        self._attempts = dict[OwnerKey, Attempt]()
        #: Of the handshakes with each address: one at a time.
        self._turns: Bounded[str, Limit] = Bounded("addresses of owners", 1024)

    def __len__(self) -> int:
        return len(self._owners)

    async def resolve(self, packed: Sequence[bytes], until: float = inf) -> list[Source]:
        """Return each ticket of the result of `listed` with its owner, by the time ``until``.

        Raises as `of`, and `PeerError` for bytes that are not a ticket.
        """
        read = [Ticket.read(data) for data in packed]
        try:
            owners = [await self.of(ticket, until) for ticket in read]
        except PeerError as error:
            if monotonic() < until:
                raise
            raise TransferTimeout(
                f"The handshake of the pull timed out; no rows were committed. Increase timeout, "
                f"or pull from another owner: {error}"
            ) from error
        return _signed(packed, read, owners)

    def resolve_connected(self, packed: Sequence[bytes]) -> list[Source] | None:
        """Return what `resolve` returns; None if an owner is not connected. Never blocks."""
        read = [Ticket.read(data) for data in packed]
        owners = [self._owners.get((ticket.address, ticket.epoch)) for ticket in read]
        if None in owners:
            return None
        return _signed(packed, read, owners)

    async def of(self, ticket: Ticket, until: float = inf) -> Connection:
        """Return the owner of a ticket, and connect to it at the first call.

        Raises:
            TransferTimeout: the handshake had not ended by the time ``until``.
            PeerError, OfferGone: the owner is gone, or was restarted since the offer.
            LayoutError: its rows cannot become this reader's.
            Unsupported: its memory can neither be mapped nor sent.
        """
        if (owner := self._owners.get((ticket.address, ticket.epoch))) is not None:
            return owner
        return await self._connect(ticket, until)

    async def prepare(self, address: str) -> None:
        """Connect to the owner at an address; raise as `of`."""
        await Wait(until=0.0)  # the rest runs in the loop
        try:
            await self.begin((address, ANY)).handle
        except CancelledError:
            raise closed_reader() from None

    def begin(self, owner: OwnerKey) -> Attempt:
        """Return the handshake with an owner that is under way; begin one if there is none.

        An address that is not connected at all needs one handshake, whatever the epoch.
        """
        address, epoch = owner
        if self.find(address) is None:
            epoch = ANY
        attempt = self._attempts.get((address, epoch))
        if attempt is not None and not attempt.handle.done():
            return attempt
        ticket = Ticket(epoch, ANY, address, 0, (b"",), (1,), 0.0)
        attempt = Attempt(self._runtime.start(self._prepare(ticket)), monotonic())
        under_way = {k: v for k, v in self._attempts.items() if not v.handle.done()}
        self._attempts = {**under_way, (address, epoch): attempt}
        attempt.handle.on_end(self.on_handshake)
        return attempt

    async def _prepare(self, ticket: Ticket) -> None:
        """Connect to the owner of a ticket, and return nothing: an `Attempt` retains no owner."""
        await self._connect(ticket, inf)

    def cancel(self) -> None:
        """End the handshakes that are under way."""
        for attempt in [*self._attempts.values()]:
            attempt.handle.cancel()

    def find(self, address: str, epoch: bytes = ANY) -> Connection | None:
        """Return the connection to the owner of an epoch at an address, or to whoever has the
        address; None if there is none."""
        if epoch != ANY:
            return self._owners.get((address, epoch))
        owners = [*self._owners.values()]
        return next((owner for owner in owners if owner.address == address), None)

    async def _connect(self, ticket: Ticket, until: float) -> Connection:
        """Connect to the owner of a ticket, unless another coroutine has.

        Only handshakes with one address wait for each other.
        """
        address = ticket.address
        turn = self._turns.get_or_make(address, partial(Limit, self._runtime))
        if not await turn.acquire(until=until if until < inf else None):
            raise TransferTimeout(
                f"The handshake with {address} timed out after one of another call. Pull again "
                f"with a longer timeout."
            )
        try:
            if (owner := self.find(address, ticket.epoch)) is not None:
                return owner
            if self._closed:
                raise closed_reader()
            handshake = await self._shake_hands(ticket, until)
            owner = Connection(self.channel, address, handshake)
            for old in [x for x in [*self._owners.values()] if x.address == address]:
                self._forget(old)
            try:
                await blocking().work(map_owner, owner, self.device)
            except NotMapped as error:
                owner.why_not_mapped = str(error)
                await self._agree_or_raise(owner, ticket, until)
            # Nobody finds an owner whose end nobody would notice.
            gone = partial(self._forget, owner, gone=True)
            try:
                owner.unwatch = self.channel.watch(address, gone)
            except BaseException:
                self._forget(owner)
                raise
            if not owner.gone:
                self._add(owner)
        finally:
            turn.release()
        return owner

    async def _agree_or_raise(self, owner: Connection, ticket: Ticket, until: float) -> None:
        """Agree with an owner on a transport; raise `Unsupported` if there is none for its rows."""
        try:
            await self._agree(owner, ticket, until)
        except PortaKVError as error:
            peer = isinstance(error, PeerError | TransferTimeout)
            if peer and not isinstance(error, Refused):
                raise
            why = f"{owner.why_not_mapped}; and they cannot be sent: {error}"
            raise Unsupported(f"Pulling rows of {ticket.address}", why) from error

    def _add(self, owner: Connection) -> None:
        """Let pulls use an owner, with a number that no other has; raise `PeerError` after
        `close`."""
        if self._closed:
            self._forget(owner)
            raise closed_reader()
        used = {one.number for one in [*self._owners.values()]}
        owner.number = min({*range(len(used) + 1)} - used)
        self._owners[owner.address, owner.handshake.epoch] = owner

    async def extend(self, ticket: bytes, seconds: float, until: float) -> float:
        """Renew the lease of a ticket's offer by the time ``until``; see `Reader.extend`."""
        parsed = Ticket.read(carried("ticket", ticket, "Pass Offer.ticket."))
        owner = await self.of(parsed, until)
        _signed([ticket], [parsed], [owner])
        renewal = Renew(parsed.epoch, parsed.offer, seconds)
        left = until - monotonic()
        answer = await self.channel.answer(owner.address, renewal, Answer, left)
        if answer.state != "held":
            raise parsed.gone(answer.why)
        return answer.seconds

    async def close(self) -> None:
        """Say goodbye to each owner, release it, and close the transports."""
        self._closed = True  # a handshake that ends later adds nothing
        until = monotonic() + min(FAREWELL, self.channel.timeout)
        for owner in [*self._owners.values()]:
            with suppress(PortaKVError):  # the peer may be gone
                left = max(0.0, until - monotonic())
                await self.channel.send(owner.address, Bye(), left)
            self._forget(owner)
        for transport in self._transports.values():
            await blocking().work(transport.close)

    async def _shake_hands(
        self, ticket: Ticket, until: float, transport: str = "", device: torch.device = _HOST
    ) -> Handshake:
        hello = Hello(self._model, shared_memory.where(device), transport)
        seconds = min(self.channel.timeout, max(0.0, until - monotonic()))
        kind: Any = Handshake | Answer
        answer: Handshake | Answer
        answer = await self.channel.answer(ticket.address, hello, kind, seconds)
        if isinstance(answer, Answer):
            if answer.state == "gone":
                raise ticket.gone(answer.why)
            raise _other_rows(ticket, answer.why or "it gives no reason")
        local = [shard.group for shard in self.shards]
        if why := unlike(local, [one.group for one in answer.described]):
            raise _other_rows(ticket, why)
        if ticket.epoch not in (answer.epoch, ANY):
            raise ticket.gone(REASONS["restarted"])
        return answer

    async def _agree(self, owner: Connection, ticket: Ticket, until: float) -> None:
        """Agree with an owner on a transport.

        The staging buffers are on the device of both sides' rows or, if the transport does not run
        there, on the host.
        """
        # The transport that this reader forces, or the owner.
        name = self._transport or owner.handshake.transport or None
        remote = owner.handshake.regions[0].device
        transport = await blocking().work(choose_between, self.device, remote, name)
        device = transport.device
        shared = self._transports.setdefault(f"{transport.name} {device}", transport)
        if self._closed or shared is not transport:
            await blocking().work(transport.close)
        if self._closed:
            raise closed_reader()
        agreed = await self._shake_hands(ticket, until, transport.name, device)
        same_rows = agreed.described == owner.handshake.described
        if not (same_rows and 1 <= agreed.slots <= MOST_BUFFERS):
            raise PeerError(
                f"Expected 1 to {MOST_BUFFERS} staging buffers and the rows that it described "
                f"before from {owner.address}, got {agreed.slots} or others. Pull from another "
                f"owner."
            )
        owner.handshake = agreed
        terms = shared, device, self.device, agreed.slots, owner.channel, owner.address
        owner.staged = await blocking().work(Staging, *terms)

    def _forget(self, owner: Connection, gone: bool = False) -> None:
        """Release an owner. Pulls that still read it retain its memory until they end.

        ``gone``: because the connection to it has ended.
        """
        owner.gone = True
        self._owners.pop((owner.address, owner.handshake.epoch), None)
        for one in [*self._owners.values()]:
            one.cuts.clear()  # cuts with this owner retain its memory
        with self._runtime.released():  # a thread that makes a lane has the lock of the staging
            owner.unwatch()
            if owner.staged:
                owner.staged.release(gone)


def _signed(
    packed: Sequence[bytes], tickets: Sequence[Ticket], owners: Sequence[Connection | None]
) -> list[Source]:
    """Return tickets with their owners; raise `PeerError` for one without a MAC under the key of
    its owner."""
    sources = list[Source]()
    for data, ticket, owner in zip(packed, tickets, owners, strict=True):
        if owner is None or not is_signed(data, owner.handshake.key):
            raise no_ticket()
        sources.append(Source.of(ticket, owner))
    return sources


def closed_reader() -> PeerError:
    """Return the error of a reader that is closed."""
    return PeerError("Expected a reader that is open, got one that is closed. Make another.")


def _other_rows(ticket: Ticket, why: str) -> LayoutError:
    """Return the error of an owner whose rows cannot become this reader's."""
    return LayoutError(
        f"The rows of {ticket.address} cannot become this reader's: {why}. Connect shards of one "
        f"model, by one release."
    )


# ------------------------------------------------------------------------------------------------
# Figures of earlier pulls from an owner: the rate of its transport, and how many blocks did not fit
# into slots.

#: Bytes that cross packed until the rate counts as unknown, so that the next pull measures it.
AGAIN = 8 << 30
#: A smaller or a shorter pull measures no rate: requests have a larger share of its time.
LEAST_NBYTES = 16 << 20
LEAST_SECONDS = 5e-3
#: The rate is the highest of so many measured pulls: all that disturbs a pull, such as work that
#: was queued before it, makes the transport seem slower. If it seems too fast, rows cross raw.
RATES = 5
#: The most windows whose misfits are counted, as many as owners keep samples of.
MOST_KEPT = 1024

#: The group of rows, and their layers and heads: the rows that one sample of an owner is for.
Window: TypeAlias = tuple[int, Box]


class Start(NamedTuple):
    """The beginning of a pull that measures the rate: what had crossed before, and the time."""

    nbytes: int
    other_nbytes: int
    at: float


class PullHistory:
    """The figures of pulls from one owner, by one agreement on a transport.

    Several threads may call it without a lock: a count that is lost changes no row.
    """

    def __init__(self) -> None:
        self._nbytes = 0  # of all slices
        self._packed_nbytes = 0  # of packed slices
        self._other_nbytes = 0  # of slices that measure no rate: packed, or of a limited pull
        self._measured_at = 0  # of `_packed_nbytes`, when a rate was measured last
        self._rates = deque[float](maxlen=RATES)
        # The blocks that crossed packed since the last look at misfits, and how many did not fit.
        self._packed: Bounded[Window, tuple[int, int]] = Bounded("misfits of pulls", MOST_KEPT)

    @property
    def gbps(self) -> float:
        """Return the rate of raw rows, in 10^9 bytes a second; infinite if it is not known."""
        if self._packed_nbytes - self._measured_at >= AGAIN or not self._rates:
            return inf
        return max([*self._rates])

    def count(self, nbytes: int, limited: bool = False) -> None:
        """Count a raw slice of so many bytes that has crossed; ``limited``: its pull has a limited
        rate."""
        self._nbytes += nbytes
        if limited:
            self._other_nbytes += nbytes

    def count_packed(self, nbytes: int, window: Window, blocks: int, misfits: int) -> None:
        """Count a packed slice of so many bytes that has crossed, its blocks, and how many of these
        did not fit."""
        self._nbytes += nbytes
        self._other_nbytes += nbytes
        self._packed_nbytes += nbytes
        before, unfit = self._packed.get(window, (0, 0))
        self._packed[window] = before + blocks, unfit + misfits

    def begin(self) -> Start | None:
        """Return the beginning of a pull; None if nothing has crossed before, since both sides then
        connect first."""
        if not self._nbytes:
            return None
        return Start(self._nbytes, self._other_nbytes, perf_counter())

    def end(self, start: Start) -> None:
        """Add the rate of a pull whose slices have all crossed.

        Slices of other pulls count, since they share the transport. Nothing is added if some slices
        were packed meanwhile, or belong to a pull with a limited rate: packing or the limit may
        have been slower than the transport.
        """
        seconds = perf_counter() - start.at
        nbytes = self._nbytes - start.nbytes
        long_enough = seconds >= LEAST_SECONDS and nbytes >= LEAST_NBYTES
        if not long_enough or self._other_nbytes != start.other_nbytes:
            return
        self._rates.append(nbytes / seconds / 1e9)
        self._measured_at = self._packed_nbytes

    def needs_sample(self, window: Window) -> bool:
        """Return True, once, if too many of the latest packed blocks of a window did not fit."""
        answer = is_out_of_date(*self._packed.get(window, (0, 0)))
        if answer is not None:
            self._packed.pop(window, None)
        return bool(answer)


# ------------------------------------------------------------------------------------------------
# The staging buffers of a reader for one owner whose memory is not mapped, by one agreement.


class StagingBuffer:
    """A staging buffer of a reader, and the last transfers into it and from it.

    ``rows``: the device of the reader's rows.
    """

    def __init__(self, memory: torch.Tensor, rows: torch.device) -> None:
        self.memory = memory
        self.chunks = Chunks(memory)
        self._rows = rows
        self.moving: Moving | None = None
        self.lane: Lane | None = None  # of the last transfer into it
        #: The copy that follows the bytes; None if their pull ended before.
        self.copy: Transfer | None = None

    def must_be_free(self, lane: Lane, nbytes: int) -> bool:
        """Return True if the last transfer into the buffer must be free before `prepare`.

        No stream orders a buffer that grows to ``nbytes``, has another lane, or is of a pull that
        ended early.
        """
        grows = nbytes > self.memory.nbytes
        return self.moving is not None and (self.copy is None or grows or self.lane is not lane)

    def prepare(self, nbytes: int, most: int) -> None:
        """Order the current stream after the last use of the buffer; let it grow to ``nbytes``.

        Its memory has at most ``most`` bytes. The host waits for a copy from host memory, since
        transports write that in no stream's order.
        """
        copy = self.copy
        grows = nbytes > self.memory.nbytes
        if copy is not None:
            if grows or self.memory.device.type == "cpu":
                has_ended(copy, wait=True)
            else:
                copy.wait()
            self.copy = None
        if grows:
            self.memory = staging(nbytes, self.memory.device, most, self._rows)
            self.chunks = Chunks(self.memory)


class Taker(Protocol):
    """A coroutine that takes the rows of an offer for a pull, in slices."""

    @property
    def over(self) -> bool:
        """Return True if the pull waits for no slice any more."""

    @property
    def measures(self) -> bool:
        """Return True if the slices cross raw, and as fast as the transport takes them."""


class Staging:
    """The transport for an owner, and the staging buffers that it fills.

    It belongs to one agreement with the owner. `release` ends it before the next handshake.

    Args:
        device: of the buffers.
        rows: the device of the reader's rows.
        count: the number of buffers.
        enclosed: returns the message that carries a message of the transport.
    """

    def __init__(
        self,
        transport: Transport,
        device: torch.device,
        rows: torch.device,
        count: int,
        channel: Channel,
        address: str,
        enclosed: Callable[[Message], Message] | None = None,
    ) -> None:
        self.transport = transport
        self.device = device
        self._runtime = runtime()
        #: For requests for rows, and for the lane: it sends nothing after `release`.
        self.channel = TransportChannel(channel, self._ended, enclosed)
        self._address = address
        #: Makes the error of what is in flight, or comes later, from `release` on.
        self._over: Callable[[str], PeerError] | None = None
        self._lock = threading.RLock()  # a connection that ends inside of `lane` calls `release`
        #: Of pulls that take slices at the same time, as many as there are buffers.
        self.places = Limit(self._runtime, count)
        #: Of pulls that request slices: buffers are filled in the order of the requests for them.
        self.turn = Limit(self._runtime)
        self.met: Lane | None = None  # the lane that the owner knows
        self.tag = 0  # of the last slice that was requested
        #: What takes slices of this owner now.
        self.takers = set[Taker]()
        self.history = PullHistory()
        #: The free buffers; the last used is taken first. Steps change them.
        self.buffers = [StagingBuffer(staging(0, device), rows) for _ in range(count)]
        #: Notified when a buffer becomes free.
        self.freed = Signal(self._runtime)

    def lane(self) -> Lane:
        """Return the lane to the owner; raise `PeerError` after `release`."""
        with self._lock:
            if ended := self._ended():
                raise ended
            lane: Lane = self.transport.lane(self._address, cast("Channel", self.channel))
            return lane

    def give_back(self, buffer: StagingBuffer) -> None:
        """Let the next pull have a buffer. Any thread may call it."""
        with self._runtime.lock:
            self.buffers.append(buffer)
            self.freed.notify()

    def release(self, gone: bool = False) -> None:
        """End the agreement: its lane, and all messages that are not sent yet. Does not block.

        ``gone``: because the connection to the owner has ended.
        """
        with self._lock:
            self._over = self._over or (gone_peer if gone else released_peer)
            self.transport.forget(self._address, self._over(self._address))

    def _ended(self) -> PeerError | None:
        return None if self._over is None else self._over(self._address)

    def spare(self, nbytes: int) -> torch.Tensor:
        """Return memory for bytes that no pull wants."""
        return staging(nbytes, self.device)
