# SPDX-License-Identifier: Apache-2.0
"""An `Owner` offers rows of its views to readers.

It promises not to change the rows until the offer ends, and answers whether the promise held. It
sends rows through staging buffers to readers that cannot map its memory.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from time import sleep
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace

from portakv import arguments
from portakv.copy.choose_encoding import (
    SAMPLE_AGAIN,
    EncodingChoice,
    Sample,
    Sampled,
    best_of,
    judged,
    packs_of,
    rated_choice,
    stays_raw,
)
from portakv.copy.rows import copy_rows
from portakv.errors import (
    InvalidTerms,
    LayoutError,
    OfferGone,
    PeerError,
    PortaKVError,
    SlotError,
    TransferError,
)
from portakv.graph.alarms import watch
from portakv.graph.meter import by_label
from portakv.graph.trace import Figures
from portakv.migrate import messages
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.checksum import checksum_of
from portakv.migrate.described import EVENTS, Exports, Regions, describe
from portakv.migrate.messages import (
    MOST_ID_BYTES,
    MOST_REGIONS,
    REASONS,
    About,
    Answer,
    Begin,
    Box,
    BoxPart,
    Bye,
    Check,
    Choose,
    Chosen,
    Close,
    EndNamed,
    Find,
    ForRows,
    Found,
    Gather,
    Handshake,
    Hello,
    Marked,
    Marks,
    Message,
    Named,
    Renew,
    RenewNamed,
    Stop,
    Stopped,
    Sum,
    carried,
    is_signed,
    no_ticket,
    offer_name,
)
from portakv.migrate.plan import check_length, index_of, names_of
from portakv.migrate.shards import Shard, device_of, overlap, slices
from portakv.migrate.staged_lanes import (
    BUFFERS,
    MOST_WAITING,
    Line,
    Lines,
    Sending,
    StagingBuffer,
    zero,
)
from portakv.migrate.staging import (
    Slots,
    has_ended,
    part_of,
    rows_bytes,
    staged_bytes,
    unfit_blocks,
)
from portakv.migrate.words import Entry, NameTable, Place, Words
from portakv.registry import bring
from portakv.runtime import tracing
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.interrupts import shielded, uninterrupted
from portakv.runtime.streams import StreamFence, ignore_captures_elsewhere
from portakv.runtime.transfer import Finished, event_pool
from portakv.tasks import Signal, Work, runtime
from portakv.view import KVView
from portakv.view.index import Ids, Index

# ------------------------------------------------------------------------------------------------
# Tickets that any process can make: for offers by their names.


class Ticket:
    """Makes tickets for offers that have a name. Other tickets are made by `Owner.offer`."""

    @staticmethod
    def of(address: str, epoch: bytes, name: bytes) -> bytes:
        """Return a ticket for the offer that an owner has made, or will make, under a name.

        Any process can make it, such as a scheduler, before the offer exists. A pull of it waits
        for the offer until its timeout. Whoever knows the name and the channel's secret may pull,
        so take random bytes: names that can be guessed, such as request ids, are not enough.

        Args:
            address: of the owner's channel (`Channel.address`).
            epoch: the owner's `Owner.epoch`, which changes when its memory does.
            name: 16 to 64 bytes, used for one offer. A name that is used again after the end of
                its offer brings the rows of the next one.

        Raises `InvalidTerms` for other values.
        """
        arguments.text("address", address)
        arguments.octets("epoch", epoch, 16, 16)
        return Named(epoch, address, offer_name(name)).pack()


# ------------------------------------------------------------------------------------------------
# The marks of offers that are made before their rows are complete.

_log = logging.getLogger(__name__)
#: The unit of a mark: whole layers, or tokens in all layers.
Unit: TypeAlias = Literal["layers", "tokens"]
SOON = 5e-5  # seconds between two looks at events, after one had ended
LATER = 5e-4  # the most seconds between two looks
PAST = "rows past the mark of an offer were requested; read its mark first."


class Progress:
    """The mark of an offer. The runtime's lock guards all calls."""

    def __init__(self, unit: Unit, end: int) -> None:
        self.unit = unit
        self.end = end
        self.raised = 0  # the last raise; its stream may still work
        self.mark = 0  # for readers

    def raise_to(self, mark: object) -> int:
        """Record a raise; raise `InvalidTerms` for a mark that is lower, or past the end."""
        self.raised = arguments.whole("mark", mark, self.raised, self.end, f"of {self.unit}")
        return self.raised


def mark_event(device: torch.device) -> torch.Event | None:
    """Return an event after the current stream's work; None on the host, where no work is left.

    Raises `Unsupported` while that stream is captured into a graph.
    """
    if device.type == "cpu":
        return None
    if capturing(device):
        raise refuse_capture(
            "Raising a mark", "its event has to be seen; raise it after the capture"
        )
    return event_pool(device).recorded(None)


class Raise(NamedTuple):
    """A raise whose stream still works.

    Attributes:
        event: recorded after the stream's work.
        show: called under the runtime's lock when the event has ended; ``fail``: if the device
            failed.
    """

    progress: Progress
    event: torch.Event
    device: torch.device
    show: Callable[[], object]
    fail: Callable[[], object]


class Raises:
    """Shows marks after the work of their streams, in the order of each offer's raises.

    A helper looks at the events as long as there are any: the caller's thread must not wait for its
    stream, and the loop would look too seldom.
    """

    def __init__(self) -> None:
        self._runtime = runtime()
        self._pending = deque[Raise]()
        self._looking = False

    def add(self, one: Raise) -> None:
        """Show a mark later; the caller has the runtime's lock."""
        self._pending.append(one)
        if not self._looking:
            self._looking = True
            self._runtime.start(self._look())

    @property
    def pending(self) -> int:
        """Return the number of raises whose streams still work."""
        return len(self._pending)

    def close(self) -> None:
        """Show no further mark."""
        with self._runtime.lock:
            self._pending.clear()

    async def _look(self) -> None:
        """Look at the events until none is left."""
        pause = SOON
        try:
            while self._pending:
                ended = await Work(self._show_ended, [*self._pending])
                pause = SOON if ended else min(2 * pause, LATER)
                await Work(sleep, pause)
        finally:
            self._looking = False

    # --- in a helper

    def _show_ended(self, pending: list[Raise]) -> bool:
        """Show the marks whose events have ended; return True if there are any."""
        for device in {one.device for one in pending}:
            ignore_captures_elsewhere(device)
        unended = set[Progress]()
        shown = False
        for one in pending:
            if one.progress in unended:
                continue
            end = one.show
            try:
                if not one.event.query():
                    unended.add(one.progress)
                    continue
                event_pool(one.device).release(one.event)
            except Exception:  # torch raises errors of many kinds
                _log.exception("The work before a mark failed on its device; the offer ends.")
                end = one.fail
            with self._runtime.lock:
                if one in self._pending:  # else the owner is closed
                    self._pending.remove(one)
                    end()
            shown = True
        return shown


# ------------------------------------------------------------------------------------------------
# The offers of an owner by name, and why its last offers have ended.

MOST_FOUND = 1 << 19  # bytes of the tickets in an answer
MOST_NAMED = MOST_FOUND - (64 << 10)  # bytes of the ids in one of them
REMEMBERED = 4096  # ended offers for which an owner still reports the reason


#: Why an offer has ended whose readers released its name before it was made.
RELEASED = "its readers needed it no longer when it was made"


class Names:
    """The offers of an owner by name. The runtime's lock guards all calls.

    Attributes:
        table: the offers' tickets, for readers of this host.
    """

    def __init__(self, key: bytes) -> None:
        self.table = NameTable(key)
        self._offers = dict[bytes, Offer]()
        self._ended: Bounded[bytes, str] = Bounded("ended names", REMEMBERED)

    def check_new(self, name: object, nbytes: int) -> None:
        """Raise for a name that readers could not find, with so many bytes of ids.

        Raises `InvalidTerms` for a wrong name and for a name of an offer that holds, which the
        error does not show, and `SlotError` for too many bytes.
        """
        self._check_free(offer_name(name))
        if nbytes > MOST_NAMED:
            raise SlotError(
                f"Expected at most {MOST_NAMED} bytes of ids for an offer with a name, got "
                f"{nbytes}. Offer blocks in place of slots, or without a name."
            )

    def _check_free(self, name: bytes) -> None:
        """Raise `InvalidTerms` for a name of an offer that holds."""
        offer = self._offers.get(name)
        if offer is not None and offer.holds():
            raise InvalidTerms(
                "Expected name to be new, got the name of an offer that holds. Take random bytes."
            )

    def add(self, offer: Offer) -> bool:
        """Let readers find an offer by its name; return False if they have released it before.

        Raises `InvalidTerms` if another thread has used the name since `check_new`.
        """
        self._check_free(offer.name)
        why = self._ended.pop(offer.name, None)
        self._offers[offer.name] = offer
        self.table.add(offer)
        return why != RELEASED

    def end(self, offer: Offer, why: str) -> None:
        """Record why an offer has ended."""
        if offer.name and self._offers.get(offer.name) is offer:
            self.table.remove(offer.entry)
            del self._offers[offer.name]
            self._ended[offer.name] = why

    def find(self, names: Sequence[bytes]) -> Found:
        """Return the tickets of names, as many as an answer holds."""
        tickets = list[bytes]()
        why = list[str]()
        left = MOST_FOUND
        for name in names:
            offer = self._offers.get(name)
            holds = offer is not None and offer.holds()  # this may end it
            ticket = offer.ticket if offer is not None and holds else b""
            if len(ticket) > left:
                ticket = b""
            left -= len(ticket)
            tickets.append(ticket)
            why.append("" if holds else self._ended.get(name, ""))
        return Found(tuple(tickets), tuple(why))

    def held(self, names: Sequence[bytes]) -> list[Offer]:
        """Return the offers of names that hold."""
        offers = [self._offers.get(name) for name in names]
        return [offer for offer in offers if offer is not None and offer.holds()]

    def release(self, names: Sequence[bytes]) -> list[Offer]:
        """Return the offers of names that hold. Record the other names, whose offers may come."""
        for name in names:
            if name not in self._offers and name not in self._ended:
                self._ended[name] = RELEASED
        return self.held(names)

    def withdraw(self, name: bytes) -> Offer | None:
        """Return the offer of a name that holds. Without one, record that none will come, for
        readers that wait for it."""
        offer = self._offers.get(name)
        if offer is None and name not in self._ended:
            self._ended[name] = REASONS["revoked"]
        return offer


# ------------------------------------------------------------------------------------------------
# Check the arguments of `Owner.offer`, and record the span of an offer.

#: Block ids of a shard, int32, and the tokens of a block.
BlockList: TypeAlias = tuple[npt.NDArray[np.int32], int]
MOST_LEASE = 1e6  # seconds
SECONDS = "a number of seconds above 0, at most 10^6"


def block_lists(
    shards: Sequence[Shard], blocks: Sequence[Ids | None], tokens: int
) -> list[BlockList]:
    """Return checked ids and the tokens of a block, for each shard; raise as `Owner.offer`."""
    if len(blocks) != len(shards):
        raise SlotError(
            f"Expected blocks to be {len(shards)} lists, one for each shard, got {len(blocks)}. "
            f"Pass a list for each."
        )
    names = names_of(len(shards))
    return [block_list(*each, tokens) for each in zip(names, shards, blocks, strict=True)]


def block_list(name: str, shard: Shard, block_ids: Ids | None, tokens: int) -> BlockList:
    """Return the checked ids of a shard's blocks, and the tokens of a block; ``name``: of the
    list in errors."""
    if block_ids is None:
        raise arguments.invalid(name, "ids", None, "Name the blocks to offer.")
    view = shard.view
    slots = view.slots
    index = index_of(name, view, block_ids)
    check_length(name, index, 0, tokens, slots)
    if not index.on_host:
        index = index.to_host()
    if index.offset or index.ids is None:
        index = Index(index.slots(tokens))
    skips = index.check_named(name, tokens, slots, distinct=True)
    used = index.host_ids()[: -(-tokens // index.step)]
    if skips:
        used = used.clip(min=-1)
    ids = used.astype("<i4")
    if ids.nbytes > MOST_ID_BYTES:
        raise SlotError(
            f"Expected {name} to have at most {MOST_ID_BYTES // 4} ids, "
            f"got {len(ids)}. Offer blocks in place of slots, or make several offers."
        )
    return ids, index.step


def _told(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return ids as a ticket has them: without those at the front that have their rows elsewhere,
    as the first blocks of layers with a window."""
    there = ids >= 0
    return ids[there.argmax() :] if there.any() else ids[:0]


ENDS = ("taken", "expired", "revoked", "lost")  # states of an offer that has ended
LOOK = 0.1  # seconds between two looks at a lease, of a call that waits for the end of an offer
UNKNOWN = Answer("gone", REASONS["gone"])
NOT_SENT = "some of its rows could not be sent; the owner's log has the reason"
SPOILT = Answer("gone", NOT_SENT)


@dataclass
class Lease:
    """The time for which an owner promises not to change rows, by the owner's clock."""

    until: float
    latest: float  # to which a reader may renew the lease

    def renew(self, until: float) -> None:
        """Lengthen the lease for a reader."""
        self.until = max(self.until, min(until, self.latest))


class Offer:
    """Rows that their owner promises not to change until the offer ends; of rows that are still
    being written, those up to its mark.

    An offer ends when its readers have closed it, at its deadline, by `revoke`, or when readers
    that started to read it are gone.

    A helper thread runs the methods that change the offer for the main thread: no interrupt may cut
    them in two. `holds` does not, since its callers may have the runtime's lock.

    Attributes:
        ticket: bytes for the reader, which travel with the request. Any process that has the
            ticket and the channel's secret may pull.
        name: by which readers find the offer without its ticket; empty if it has none.
        shards: of the owner, when it made the offer.
        ids: of the offered blocks, for each shard.
        after: the work that wrote the rows.
        spoilt: the readers to which some of the rows could not be sent.
        place: of the offer's validity word; ``entry``: of its name.
    """

    name = b""
    place = Place()
    entry = Entry()
    began = tracing.UNTRACED
    #: None: all rows were complete when the offer was made.
    progress: Progress | None = None

    def __init__(
        self,
        owner: Owner,
        ids: Sequence[BlockList],
        tokens: int,
        lease: Lease,
        readers: int,
        after: StreamFence,
    ):
        self.shards = owner.shards
        self.ids = ids
        self.tokens = tokens
        self.after = after
        self.spoilt = set[bytes]()
        self.number = secrets.token_bytes(16)
        self.ticket = b""
        self.lease = lease
        self.readers = readers
        # Readers that read it, with the function that stops watching each.
        self.begun: dict[bytes, Callable[[], object]] = {}
        self.through: set[bytes] = set()  # readers that have the rows, or are gone
        self._owner = owner
        self._state = "held"

    @property
    def state(self) -> str:
        """Return "held"; after the end "taken", "expired", "revoked", or "lost" with a reader."""
        uninterrupted(self.holds)
        return self._state

    def holds(self) -> bool:
        """Return True if the offer holds, for a caller that may have the runtime's lock."""
        with self._owner.lock:
            if self._state == "held" and self._owner.now() > self.lease.until:
                self._end("expired")  # a caller that has the lock must not wait for a helper
            return self._state == "held"

    def end(self, state: str) -> None:
        """End the offer in a state, unless it has ended."""
        uninterrupted(partial(self._end, state))

    def _end(self, state: str) -> None:
        """Record the end, stop to watch the readers, and wake the threads that wait for the end."""
        owner = self._owner
        with owner.lock:
            if self._state == "held":
                # First the word: no reader commits rows that it reads from now on. A forked child
                # has the same page, and must not end its parent's offers.
                if not owner.channel.forked:
                    owner.words.end(self.place, state)
                self._state = state
                owner.offers.pop(self.number, None)
                owner.ended[self.number] = why = self._why_ended()
                owner.names.end(self, why)
                owner.counts[state] += 1
                attributes: dict[str, str | int] = {
                    "offer.state": state,
                    "offer.tokens": self.tokens,
                }
                for stop in self.begun.values():
                    stop()
                owner.ends.add(Ended(self, state, frozenset(self.through)))
                owner.changes.notify()
                with owner.runtime.released():  # whoever follows spans may have locks
                    tracing.end("portakv offer", self.began, attributes)

    def _why_ended(self) -> str:
        """Return why the offer ended, as a clause for a reader."""
        if self._state == "taken" and len(self.through) >= self.readers:
            return f"its readers ({self.readers}) have taken it; offer it with a larger readers="
        if self._state == "taken":
            return "its readers have taken it"
        return REASONS[self._state]

    def taken(self, timeout: float | None = None) -> bool:
        """Wait until the offer has ended, at most ``timeout`` seconds; return True if it has.

        The owner may then use its blocks again.
        """
        owner = self._owner
        until = owner.now() + arguments.seconds("timeout", timeout, optional=True)
        while self.state == "held":
            now = owner.now()
            if now >= until:
                return False
            look = min(until, self.lease.until + 1e-3, now + LOOK)
            owner.changes.block(lambda: self._state != "held", max(0.0, look - now))
        return True

    def revoke(self) -> None:
        """End the offer immediately: no reader commits rows that it reads from now on."""
        self.end("revoked")

    @shielded
    def extend(self, seconds: float) -> bool:
        """Hold the offer for ``seconds`` from now on, if its lease ends before; return False if it
        has ended.

        An owner may extend its offer beyond ``max_lease``, which limits readers.
        """
        limits = "a number of seconds from 0 to 10^6"
        seconds = arguments.number("seconds", seconds, 0.0, MOST_LEASE, limits)
        with self._owner.lock:
            if not self.holds():
                return False
            self.lease.until = max(self.lease.until, self._owner.now() + seconds)
            self.lease.latest = max(self.lease.latest, self.lease.until)
            return True

    @property
    def mark(self) -> int | None:
        """Return the layers or tokens that readers may read; None if all were complete from the
        start."""
        return None if self.progress is None else self.progress.mark

    def raise_to(self, mark: int) -> None:
        """Let readers have the first ``mark`` layers or tokens, after the current stream's work.

        Does not block: readers see the mark when the work that the stream has now has ended.

        Raises:
            InvalidTerms: a mark that is lower than the last one or past the end, or an offer that
                was made without ``progress``.
            OfferGone: the offer has ended. Its blocks may be used for other rows.
            PeerError: the owner belongs to the process that this one was forked from.
            Unsupported: the current stream is captured into a graph.
        """
        if self._owner.channel.forked:  # closing an owner ends its offers: see below
            self._owner.refuse_closed()
        event = mark_event(self._owner.device)
        uninterrupted(partial(self._raise_to, mark, event))

    def _raise_to(self, mark: int, event: torch.Event | None) -> None:
        """Record a raise, and show it when its event has ended."""
        owner = self._owner
        with owner.lock:
            progress = self.progress
            if progress is None:
                raise InvalidTerms(
                    "Expected an offer with a mark, got one whose rows were complete when it was "
                    "made. Pass progress= to Owner.offer."
                )
            if not self.holds():
                raise OfferGone(
                    f"Expected an offer that holds, got one that has ended: {self._why_ended()}. "
                    f"Write no more rows for it, and make another offer."
                )
            show = partial(self._show, progress, progress.raise_to(mark))
            if event is None:
                show()
            else:
                fail = partial(self._end, "revoked")
                owner.raises.add(Raise(progress, event, owner.device, show, fail))

    def _show(self, progress: Progress, mark: int) -> None:
        """Let readers see a mark, unless the offer has ended. The caller has the runtime's lock."""
        if self._state == "held":
            progress.mark = mark
            self._owner.words.mark(self.place, mark)

    # --- the rows, as they are sent

    @cached_property
    def indices(self) -> Sequence[Index]:
        """Return the index of each shard. All parts of the offer share them, with their ids on a
        device."""
        return [Index(*each) for each in self.ids]

    def check(self, part: BoxPart) -> None:
        """Raise `LayoutError` if the rows of a part were not offered."""
        shard = self.shards[part.group] if part.group < len(self.shards) else None
        some = 0 < part.count <= self.tokens - part.first
        if shard is None or overlap(part.box, shard.group.box) != part.box or not some:
            raise LayoutError(
                f"Expected offered rows, got layers {part.layers} x heads {part.heads} of group "
                f"{part.group}, tokens {part.first} + {part.count}. Request offered rows."
            )

    def slots(self, gather: Gather, part: BoxPart) -> Slots | None:
        """Return how a part is packed for its reader; None: it is sent raw. Raises as
        `Slots.requested`."""
        view = self.shards[part.group].view
        return Slots.requested(view, gather.encoding, part.first, part.count)

    def size(self, gather: Gather, part: BoxPart) -> int:
        """Return the bytes of a part in a staging buffer; raise as `slots`."""
        view = self.shards[part.group].view.as_bytes()
        layers = part.layers[1] - part.layers[0]
        heads = part.heads[1] - part.heads[0]
        return rows_bytes(view, layers, part.count, heads, self.slots(gather, part))

    def rows(self, part: BoxPart, as_bytes: bool = True) -> tuple[KVView, Index]:
        """Return the rows of a part, as bytes or with their types, and the index of its tokens."""
        shard = self.shards[part.group]
        view = shard.view.as_bytes() if as_bytes else shard.view
        window = part_of(view, **slices(part.box, shard.group.box))
        return window, self.indices[part.group].shifted(part.first)


class Ended(NamedTuple):
    """The end of an offer.

    ``state``: as `Offer.state`. ``readers``: the ids of the channels (`Channel.id`) of readers that
    have the rows, or were lost.
    """

    offer: Offer
    state: str
    readers: frozenset[bytes]


# ------------------------------------------------------------------------------------------------
# Send offered rows through staging buffers, and compute checksums and samples of them. Helpers
# gather the rows into the buffers.

#: The most windows of shards whose samples are kept: those of readers that pull layer by layer are
#: single layers.
MOST_KEPT = 1024
_BUSY = Answer("busy", seconds=1e-3)


@dataclass
class RetainedSample:
    """The facts by which rows of a window of a shard cross packed or raw.

    Attributes:
        why: why they stay raw whatever the rate of the transport, as a sentence; empty if not.
        packing_gbps: 10^9 bytes of raw rows a second that packed copies reach at most.
        sampled: the result of a sample; None: the rates alone decided.
        left: raw bytes of requested rows until the next sample.
    """

    why: str = ""
    packing_gbps: float | None = None
    sampled: Sampled | None = None
    left: int = 0

    def choice(self, view: KVView, link_gbps: float) -> EncodingChoice | None:
        """Return the choice for a transport of so many 10^9 bytes a second; None if only a sample
        decides. Never blocks."""
        if self.why:
            return EncodingChoice(None, self.why, link_gbps)
        rated = rated_choice(view, None, link_gbps, self.packing_gbps)
        if rated.pack is None:
            return rated
        return None if self.sampled is None else judged(rated, self.sampled)


class Gathers(Lines):
    """The staging buffers and transports of an owner of rows, for all of its readers. No call
    blocks.

    A reader repeats its request for what takes longer than a channel may, such as a checksum of
    rows, until the answer exists. Helpers compute it, in turn with those that send rows.
    """

    def __init__(
        self,
        channel: Channel,
        staging_bytes: int,
        transport: str | None,
        device: torch.device,
        most_bytes: int | None = None,
    ) -> None:
        super().__init__(channel, transport, [device])
        self.buffer_bytes = staging_bytes // BUFFERS // 4096 * 4096
        self._most_bytes = most_bytes  # of all buffers of all readers
        self._kept: Bounded[tuple[bytes, int, Box], RetainedSample] = Bounded(
            "samples of pulls", MOST_KEPT
        )

    @property
    def buffers(self) -> int:
        """Return the number of buffers in use."""
        return sum(len(line.buffers) for line in [*self._lines.values()])

    def agree(self, peer: Peer, hello: Hello, device: torch.device) -> str:
        """Choose the transport for a reader, and return its name; raise as `_choose`."""
        self.forget(peer)  # the reader takes no more of the rows that were sent to it before
        transport = self._choose(hello.transport, device, hello.device)
        for kind in transport.asks:
            self._channel.serve(kind, self._answer_transport)
        self._add(Line(peer, transport), peer)
        return transport.name

    def _answer_transport(self, peer: Peer, request: object) -> Message | None:
        """Answer a message of a reader's transport by the transport here."""
        line = self._lines.get((peer, b""))
        if line is None or not isinstance(request, line.transport.asks):
            raise PeerError("Expected the agreed transport, got another. Connect again.")
        return line.transport.answer(peer, self._channel, request)

    def send(self, peer: Peer, gather: Gather, offer: Offer) -> Answer:
        """Have rows sent in parts, after earlier requests of the reader.

        The reader gets zeros in place of rows that it cannot commit: after the end of the offer,
        and after an error, of which the offer keeps a note. Only one thread calls this method,
        after `Offer.check` of each part.
        """
        line = self._lines.get((peer, b""))
        if line is None or line.transport.name != gather.transport:
            return Answer("refused", f"{gather.transport} was not agreed on; connect again.")

        with self._lock:
            line.current()
            full = len(line.sendings) >= MOST_WAITING
        if full:
            return Answer("busy", "earlier requests are not sent yet", seconds=1e-3)

        # Allocate in this thread, so that the reader gets the error if there is no memory.
        sizes = [offer.size(gather, part) for part in gather.parts]
        needs = max(sizes)
        count = self._reserve(line, len(gather.parts), needs)
        if not count:
            why = "earlier pulls use its staging buffers"
            if self._most_bytes is not None:
                why = f"staging buffers of all readers have {self._most_bytes} bytes in total"
            return Answer("busy", why, seconds=1e-2)

        sending = Sending(
            gather.tag,
            sizes,
            # The parts stay with this lane: those that the reader no longer waits for end with it.
            lane=line.transport.lane(peer, self._channel),
            buffers=count,
            after=[offer.after],
            fill=partial(_fill, gather, offer),
            wanted=lambda: peer.id not in offer.spoilt and offer.holds(),
            fail=partial(offer.spoilt.add, peer.id),
        )
        self._queue(line, sending)
        return Answer("done")

    def stop(self, peer: Peer, stop: Stop) -> Stopped:
        """Read no more rows for a request; send only the parts that its reader waits for."""
        line = self._lines.get((peer, b""))
        if line is None or line.last < stop.tag:  # no such request arrived
            return Stopped(0)
        with self._lock:
            for sending in line.sendings:
                if sending.tag == stop.tag:
                    sending.stopped = True
                    sending.parts = min(max(sending.begun, stop.parts), sending.parts)
                    return Stopped(sending.parts)
        return Stopped(1 << 31)  # all parts were sent

    def answer(self, peer: Peer, request: ForRows, offer: Offer) -> Answer:
        """Have rows sent, their checksum computed, or a sample of them taken to choose how they
        cross. The reader repeats its request until the checksum or the sample exists.

        The caller has called `Offer.check` of each part. Raises as `choose`.
        """
        if isinstance(request, Gather):
            return self.send(peer, request, offer)
        if isinstance(request, Sum):
            return self.sum(request, offer)
        return self.choose(request, offer)

    def sum(self, request: Sum, offer: Offer) -> Answer:
        """Return a checksum of rows, or that it does not exist yet."""
        total = self._turn.result_of(request, self._sum, request, offer)
        return _BUSY if total is None else Answer("done", digest=total)

    def choose(self, request: Choose, offer: Offer) -> Answer:
        """Return the choice for rows, or that it does not exist yet.

        Raises `LayoutError` for a part of a block. A sample that fails raises `TransferError`, and
        nothing is kept of it.
        """
        part = request.part
        view = offer.shards[part.group].view
        unit = view.block_size
        if not unit or part.first % unit or part.count % unit:
            raise LayoutError(
                f"Expected a request for whole blocks of {view}, got tokens {part.first} + "
                f"{part.count}. Connect sides of one release."
            )

        # Most requests find a sample, and need no turn.
        key = request.epoch, part.group, part.box
        kept = self._kept.get(key)
        choice = None
        if kept is not None and kept.left > 0 and not request.again:
            choice = kept.choice(view, request.link_gbps)
        if kept is None or choice is None:
            kept = self._turn.result_of(request, self._look, request, offer)
            if kept is None:
                return _BUSY
            self._kept[key] = kept
            kept.left = SAMPLE_AGAIN
            choice = kept.choice(view, request.link_gbps)
            assert choice is not None  # `_look` has looked at what this request needs

        layers = part.layers[1] - part.layers[0]
        kept.left -= rows_bytes(view, layers, part.count, part.heads[1] - part.heads[0])
        return Chosen(
            "done",
            choice.why[:1024],
            encoding="" if choice.pack is None else choice.pack.text,
            packing_gbps=choice.packing_gbps,
            ratio=choice.ratio,
            escapes=choice.escapes,
            fits=choice.fits,
        )

    def _reserve(self, line: Line, parts: int, needs: int) -> int:
        """Return the number of buffers that parts may cross in: as many as the total has room for.

        A buffer that has to grow must be free.
        """
        for number in range(min(parts, BUFFERS)):
            buffer = line.buffers.get(number)
            if buffer is not None and buffer.memory.nbytes >= min(needs, self.buffer_bytes):
                continue
            grows = buffer is None or (buffer.free and not line.active)
            # All buffers of a reader at once if the transport learns them only once.
            nbytes = staged_bytes(needs, self.buffer_bytes)
            numbers = [number]
            if line.transport.knows_once:
                nbytes = BUFFERS * self.buffer_bytes
                numbers = [*range(BUFFERS)]
            if not grows or not self._has_space(nbytes, buffer):
                return number
            self._allocate(line, nbytes, *numbers)
        return min(parts, BUFFERS)

    def _has_space(self, nbytes: int, old: StagingBuffer | None) -> bool:
        """Return True if more memory, in place of an old buffer's, stays below the total."""
        if self._most_bytes is None:
            return True
        lines = [*self._lines.values()]
        used = sum(one.memory.nbytes for line in lines for one in line.buffers.values())
        return used + nbytes - (old.memory.nbytes if old else 0) <= self._most_bytes

    # --- in a helper

    def _sum(self, request: Sum, offer: Offer) -> int:
        with self._turn.inside(offer.after):
            view, ids = offer.rows(request.part)
            return checksum_of(view, ids, request.part)

    def _look(self, request: Choose, offer: Offer) -> RetainedSample:
        """Measure the rate of packing, and take a sample if the rates do not decide already.

        The rate is that of the whole view: another measurement for each window of it would hold up
        the rows of all pulls.
        """
        view = offer.shards[request.part.group].view
        with self._turn.inside(offer.after):
            why = stays_raw(view, None, None)
            if why:
                return RetainedSample(why)
            rated = rated_choice(view, None, request.link_gbps, None)
            if rated.packing_gbps is None:
                raise TransferError(rated.why)
            if rated.pack is None:
                return RetainedSample(packing_gbps=rated.packing_gbps)

            window, ids = offer.rows(request.part, as_bytes=False)
            unit = window.form.block_size
            slots = ids.slots(request.part.count, every=unit)
            blocks = slots[slots >= 0] // unit
            if not len(blocks):
                raise TransferError("No sample was taken: the owner has none of the blocks.")
            try:
                sampled = best_of(window, Sample(window, blocks, packs_of(None)), None)
            except (PortaKVError, RuntimeError) as error:  # such as a lack of memory
                raise TransferError(f"No sample was taken: {error}") from error
            return RetainedSample(packing_gbps=rated.packing_gbps, sampled=sampled)


def _fill(
    gather: Gather, offer: Offer, number: int, buffer: StagingBuffer, full: torch.Tensor
) -> None:
    """Gather a part of a request into a buffer, and pack it if it crosses in slots; positions
    without rows, and padding, become zeros.

    The slots of blocks that do not fit say so to the reader.
    """
    part = gather.parts[number]
    slots = offer.slots(gather, part)
    view, ids = offer.rows(part, as_bytes=slots is None)
    bring([ids], view.device)  # once: all parts of the offer share them

    planes, into = buffer.chunks.of(view, part.count, slots)
    written = sum(plane.nbytes for plane in planes)
    skips = ids.check(part.count, view.slots, "offered")
    if skips or written < full.nbytes:
        zero(full)

    copy = copy_rows(view, into, ids, count=part.count)
    if buffer.memory.is_cpu:
        has_ended(copy, wait=True)
        unfit_blocks(copy)
    else:
        # The transport sends after the copy; ids were checked when they were offered.
        copy.wait()


# ------------------------------------------------------------------------------------------------
# The owner, which makes offers and answers its readers.

#: What readers on this host may map: whole allocations, or nothing.
Expose: TypeAlias = Literal["mapped", "staging"]


class Owner:
    """A process that offers rows to readers.

    A helper thread runs the methods that change the owner for the main thread: no interrupt may cut
    them in two.

    Args:
        channel: the channel at which readers reach it; a channel has at most one owner.
        shards: the views with their windows, one for each group of layers that share block ids.
        model: a fingerprint; readers of another model are rejected.
        staging: the most bytes of the staging buffers of one reader that cannot map the memory, on
            either side; they are as large as its pulls need.
        staging_total: the most bytes of the staging buffers of all readers, on this side. A reader
            that would need more waits for others to leave. None: no limit.
        expose: "mapped": readers on this host may map whole allocations, to be read and written, so
            all of them must trust each other; "staging": readers get copies of offered rows alone.
        transport: the name of the transport for readers that cannot map; None: the reader's.

    Raises:
        LayoutError: no shard, a shard that cannot be described, or shards on several devices.
        InvalidTerms: another ``expose``, no bytes of staging, or a channel that has an owner.
    """

    now = staticmethod(time.monotonic)
    _closed = False
    _exports: Exports | None = None

    def __init__(
        self,
        channel: Channel,
        *shards: Shard,
        model: str,
        staging: int = 512 << 20,
        staging_total: int | None = None,
        expose: Expose = "mapped",
        transport: str | None = None,
    ) -> None:
        arguments.instance("channel", channel, Channel)
        device = device_of(shards)
        arguments.text("model", model)
        staging = arguments.nbytes("staging", staging, BUFFERS << 12)
        if staging_total is not None:
            staging_total = arguments.nbytes("staging_total", staging_total, staging)
        arguments.one_of("expose", expose, get_args(Expose))
        self.channel = channel
        self.model = model
        self.runtime = runtime()
        self.lock = self.runtime.lock
        self.changes = Signal(self.runtime)  # ends of offers
        self.counts = Counter[str]()
        self._key = secrets.token_bytes(32)  # signs tickets, also those of later epochs
        self._expose = expose
        self.offers = dict[bytes, Offer]()
        self.ended: Bounded[bytes, str] = Bounded("ended offers", REMEMBERED)
        self.names = Names(self._key)
        self.words = Words()
        self.ends: Finished[Ended] = Finished()
        self._gathers = Gathers(channel, staging, transport, device, staging_total)
        uninterrupted(partial(self._start, shards), undo=lambda _: self.close())

    def _start(self, shards: Sequence[Shard]) -> None:
        """Serve the offers of the shards on the channel."""
        channel = self.channel
        self.raises = Raises()
        channel.claim("an owner", self)
        try:
            self.reallocate(*shards)
        except BaseException:  # also an interrupt: the channel must become free
            channel.free("an owner", self)
            raise
        self._kinds: dict[type[Message], Callable[..., Message | None]] = {
            Hello: self._hello,
            Begin: self._begin,
            Renew: self._renew,
            Check: self._check,
            Close: self._close,
            Gather: self._gather,
            Sum: self._gather,
            Choose: self._gather,
            Stop: self._gathers.stop,
            Find: self._find,
            RenewNamed: self._renew_named,
            EndNamed: self._end_named,
            Marks: self._marks,
            Bye: lambda peer, _: self._gathers.forget(peer),
        }
        for kind, answer in self._kinds.items():
            channel.serve(kind, answer)
        watch(self)

    @shielded
    def reallocate(self, *shards: Shard) -> None:
        """Replace the views: all offers end, and readers connect again."""
        device = device_of(shards)
        regions = Regions()
        described = tuple(describe(shard, regions) for shard in shards)
        if len(regions.storages) >= MOST_REGIONS:
            raise LayoutError(
                f"Expected shards in at most {MOST_REGIONS - 1} allocations, got "
                f"{len(regions.storages)}. Make the tensors slices of fewer allocations."
            )
        with self.lock:
            self.revoke_all()
            self.epoch = secrets.token_bytes(16)
            self.shards = shards
            self.device = device
            if self._exports is not None:
                self._exports.close()
            pages = self.words, self.names.table
            self._exports = Exports(regions.storages, self.epoch, device, self._expose, *pages)
            self._events = self._exports.events
            self._turn = 0
            self._handshake = Handshake(
                epoch=self.epoch,
                described=described,
                regions=self._exports.regions,
                slots=BUFFERS,
                slot_bytes=self._gathers.buffer_bytes,
                transport=self._gathers.forced or "",
                events=self._exports.event_handles,
                key=self._key,
                words=self._exports.words,
                names=self._exports.names,
            )

    def offer(
        self,
        *blocks: Ids,
        tokens: int,
        lease: float = 30.0,
        readers: int = 1,
        max_lease: float = 3600.0,
        name: bytes | None = None,
        progress: Unit | None = None,
    ) -> Offer:
        """Offer the first ``tokens`` tokens of lists of blocks, one list for each shard.

        A list may be an `Index`, such as one of slots. The rows are those after the current
        stream's work. A negative id has its rows elsewhere.

        Args:
            lease: seconds after which the offer expires once its owner looks, unless its reader
                renews it. Use the blocks again only after `Offer.state`, `Offer.taken`, `finished`
                or `statistics` shows that it ended.
            readers: the number of readers that may pull it.
            max_lease: seconds after which no reader can renew it, at most 10^6.
            name: 16 to 64 bytes by which readers find the offer; see `Ticket.of`. Take random
                bytes, and another name for each offer.
            progress: "layers" or "tokens": the rows are not complete yet, and readers get none
                before `Offer.raise_to` says so: the first layers of each shard, or the first tokens
                in all layers. None: they are complete after the current stream's work.

        Raises:
            SlotError: ids past the view or twice in a list, too few for the tokens, more than a
                ticket holds, or not a list for each shard.
            InvalidTerms: no token, no time, no reader, no such unit, or a name of another offer.
            PeerError: the owner is closed, or belongs to the process that this one was forked from.
        """
        self.refuse_closed()
        tokens = arguments.whole("tokens", tokens, 1, 1 << 31)
        lease = arguments.number("lease", lease, 1e-9, MOST_LEASE, SECONDS)
        readers = arguments.whole("readers", readers, 1, 1 << 31)
        limits = f"a number of seconds from the lease of {lease:g} s to 10^6"
        last = arguments.number("max_lease", max_lease, lease, MOST_LEASE, limits)
        mark = None
        if progress is not None:
            arguments.one_of("progress", progress, get_args(Unit))
            layers = max(shard.view.layers for shard in self.shards)
            mark = Progress(progress, layers if progress == "layers" else tokens)
        lists = block_lists(self.shards, blocks, tokens)
        if name is not None:
            with self.lock:
                self.names.check_new(name, sum(_told(ids).nbytes for ids, _ in lists))
        on = self.device
        stream = None if on.type == "cpu" else torch.get_device_module(on).current_stream(on)
        # No event exists that a reader's stream could wait for. Marks are shown after the work.
        blind = self._exports and self._exports.allocations and not self._events
        if stream and blind and mark is None:
            stream.synchronize()
        now = self.now()
        event = self._record_event(stream)
        after = StreamFence(on, None if event < 0 else self._events[event])
        made = Offer(self, lists, tokens, Lease(now + lease, now + last), readers, after)
        made.name = name or b""
        made.progress = mark
        made.began = tracing.begin()
        try:
            return self._enter(made, event, lease)
        except BaseException:  # also an interrupt: no reader may get an offer without a handle
            made.revoke()
            raise

    def _record_event(self, stream: torch.Stream | None) -> int:
        """Record an event after the work of a stream, for readers' streams and for the rows that
        the owner sends; return its number, -1 if the device exports no events."""
        if not self._events:
            return -1
        with self.lock:
            event = self._turn = (self._turn + 1) % EVENTS
        # An older offer's event, perhaps recorded on another stream.
        self._events[event].wait(stream)
        self._events[event].record(stream)
        return event

    def _enter(self, made: Offer, event: int, lease: float) -> Offer:
        """Register an offer of rows after an event, and write its ticket."""
        with self.lock:
            self.refuse_closed()  # another thread may have closed it since the call began
            ids = tuple([_told(each).tobytes() for each, _ in made.ids])
            steps = tuple([step for _, step in made.ids])
            made.place = self.words.take(
                made.number, (offer.place for offer in self.offers.values())
            )
            terms = self.channel.address, made.tokens, ids, steps, lease, event, made.place.number
            unit: Literal["", "layers", "tokens"] = ""
            if made.progress is not None:
                unit = made.progress.unit
                self.words.mark(made.place, 0)
            own = messages.Ticket(self.epoch, made.number, *terms, unit, made.began.traceparent)
            made.ticket = own.pack(self._key)
            self.offers[made.number] = made
            self.counts["offered"] += 1
            if made.name and not self.names.add(made):
                made._end("taken")
            looks = self.counts["offered"] % EVENTS == 0
        if looks:  # outside of the lock, which a helper thread takes
            self.statistics()  # offers without a request expire here
        return made

    def refuse_closed(self) -> None:
        """Raise `PeerError` if no reader could reach an offer of this owner."""
        why = ""
        if self.channel.forked:
            why = "belongs to the process that this one was forked from"
        elif self._closed:
            why = "is closed"
        if why:
            raise PeerError(
                f"Expected an owner that readers reach, got one that {why}. Make another Owner."
            )

    def revoke(self, ticket: bytes) -> bool:
        """End the offer of a ticket immediately; return False if it has ended before. Readers do
        not wait any longer for a name that has no offer yet.

        Raises `PeerError` for bytes that are not a ticket of this owner, and `InvalidTerms` for
        another type.
        """
        named = Named.read(carried("ticket", ticket, "Pass Offer.ticket."))
        parsed = named or messages.Ticket.read(ticket)
        if named is None and not is_signed(ticket, self._key):
            raise no_ticket()
        if parsed.epoch != self.epoch:
            return False  # all offers before `reallocate` have ended
        if isinstance(parsed, Named):
            with self.lock:
                offer = self.names.withdraw(parsed.name)
        else:
            offer = self.offers.get(parsed.offer)
        if offer is None or offer.state != "held":
            return False
        offer.revoke()
        return offer.state == "revoked"

    def finished(self) -> list[Ended]:
        """Return the ends of offers since the last call, in their order, each with its ``offer``,
        its ``state`` (as `Offer.state`), and the ids of the channels of its ``readers``.

        The first call returns none: nothing is kept before it. At most 65,536 ends are kept. An
        offer whose lease is over ends when its owner looks, as this call does.
        """
        self.ends.start()
        self.statistics()
        return self.ends.take()

    def finished_fd(self) -> int:
        """Return the descriptor that is readable while `finished` has ends; -1 after `close`.

        For ``select``, ``epoll`` and event loops. A lease that is over does not make it readable.
        Do not read or close it.
        """
        return self.ends.fileno()

    @shielded
    def revoke_all(self) -> None:
        """End every offer immediately."""
        for offer in [*self.offers.values()]:
            offer.revoke()

    @shielded
    def statistics(self) -> dict[str, int]:
        """Return the number of active offers, of ends by reason, of answers, and of buffers in
        use."""
        with self.lock:
            exports = sum(offer.state == "held" for offer in [*self.offers.values()])
            return {**self.counts, "held": exports, "slots": self._gathers.buffers}

    def figures(self) -> Figures:
        """Return figures by the names of metrics."""
        counts = self.statistics()
        handshakes = {"accepted": counts.get("paired", 0), "refused": counts.get("refused", 0)}
        reports = {
            "taken": counts.get("closed", 0),
            "failed": counts.get("failed", 0),
            "gone": counts.get("gone", 0),
        }
        return {
            "offers_active": [{"value": counts["held"]}],
            "offers_total": [{"value": counts.get("offered", 0)}],
            "offers_ended_total": by_label("state", counts, ENDS),
            "offer_handshakes_total": by_label("result", handshakes, handshakes),
            "offer_reports_total": by_label("result", reports, reports),
            "offer_staging_buffers": [{"value": counts["slots"]}],
        }

    @shielded
    def close(self) -> None:
        """End every offer, and answer no further request."""
        if not self.channel.free("an owner", self):
            return
        with self.lock:  # no offer comes after the last revoke
            self._closed = True
        self.revoke_all()
        if self._exports is not None:
            self._exports.close()
        for kind in self._kinds:
            self.channel.serve(kind, lambda *_: UNKNOWN)
        self.raises.close()
        self._gathers.close()
        self.ends.close()

    # --- what readers ask, in the channel's thread

    def _hello(self, peer: Peer, hello: Hello) -> Handshake | Answer:
        same = hello.model == self.model
        self.counts["paired" if same else "refused"] += 1
        if not same:
            why = f"the owner's model is {self.model!r}, the reader's {hello.model!r}"
            return Answer("refused", why[:1024])
        if not hello.transport:
            return self._handshake
        return replace(self._handshake, transport=self._gathers.agree(peer, hello, self.device))

    def _current(self, about: About) -> Offer | None:
        offer = self.offers.get(about.offer)
        exports = offer is not None and about.epoch == self.epoch and offer.holds()
        return offer if exports else None

    def _begin(self, peer: Peer, begin: About) -> None:
        with self.lock:
            offer = self._current(begin)
            if offer is not None and peer.id not in offer.begun:
                offer.begun[peer.id] = peer.on_gone(partial(self._less, offer, peer.id, "lost"))

    def _less(self, offer: Offer, reader: bytes, state: str) -> None:
        """Count a reader that has the rows of an offer, or is gone; each counts once."""
        with self.lock:
            offer.begun.pop(reader, lambda: None)()
            offer.through.add(reader)
            if len(offer.through) >= offer.readers:
                offer.end(state)

    def _gone(self, about: About) -> Answer:
        """Answer that an offer does not hold, and why."""
        why = self.ended.get(about.offer) if about.epoch == self.epoch else None
        return Answer("gone", why) if why else UNKNOWN

    def _check(self, peer: Peer, check: Check) -> Answer:
        with self.lock:
            offer = self._current(check)
            if offer is None:
                self.counts["gone"] += 1
                return self._gone(check)
            return SPOILT if peer.id in offer.spoilt else Answer("held")

    def _close(self, peer: Peer, close: Close) -> None:
        with self.lock:
            offer = self._current(close)
            if offer is None:
                return
            if close.taken and peer.id not in offer.spoilt:
                self.counts["closed"] += 1
                self._less(offer, peer.id, "taken")
                return
            # The reader has no rows: it may pull again until the lease expires, but for an offer of
            # which rows could not be sent to it. Another of its pulls may still get zeros for them.
            self.counts["failed"] += 1
            offer.begun.pop(peer.id, lambda: None)()

    def _renew(self, _: Peer, renew: Renew) -> Answer:
        with self.lock:
            offer = self._current(renew)
            if offer is None:
                return self._gone(renew)
            offer.lease.renew(self.now() + renew.seconds)
            return Answer("held", seconds=offer.lease.until - self.now())

    def _find(self, _: Peer, find: Find) -> Found | Answer:
        with self.lock:
            if find.epoch != self.epoch:
                return Answer("gone", REASONS["restarted"])
            return self.names.find(find.names)

    def _renew_named(self, _: Peer, renew: RenewNamed) -> None:
        with self.lock:
            if renew.epoch == self.epoch:
                for offer in self.names.held(renew.names):
                    offer.lease.renew(self.now() + renew.seconds)

    def _end_named(self, _: Peer, end: EndNamed) -> None:
        with self.lock:
            if end.epoch == self.epoch:
                for offer in self.names.release(end.names):
                    offer.end("taken")

    def _marks(self, peer: Peer, marks: Marks) -> Marked | Answer:
        with self.lock:
            if marks.epoch != self.epoch:
                return Answer("gone", REASONS["restarted"])
            shown = list[int]()
            why = list[str]()
            for number in marks.offers:
                offer = self.offers.get(number)
                if offer is None or not offer.holds():
                    shown.append(0)
                    why.append(self.ended.get(number, REASONS["gone"]))
                else:
                    shown.append(offer.mark or 0)
                    why.append(SPOILT.why if peer.id in offer.spoilt else "")
            return Marked(tuple(shown), tuple(why))

    def _gather(self, peer: Peer, request: ForRows) -> Answer:
        with self.lock:
            offer = self._current(request)
            if offer is None:
                return self._gone(request)
            self._begin(peer, request)
            if peer.id in offer.spoilt:
                return SPOILT
            for part in request.parts:
                offer.check(part)
            if not all(self._is_complete(offer, part) for part in request.parts):
                return Answer("refused", PAST)
        return self._gathers.answer(peer, request, offer)

    def _is_complete(self, offer: Offer, part: BoxPart) -> bool:
        """Return True if rows do not reach past the mark of their offer."""
        layers = part.layers[1] - self.shards[part.group].group.layers[0]
        tokens = part.first + part.count
        progress = offer.progress
        if progress is None:
            return True
        return (layers if progress.unit == "layers" else tokens) <= progress.mark
