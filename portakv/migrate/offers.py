# SPDX-License-Identifier: Apache-2.0
"""An `Owner` offers rows of its views to readers.

It promises not to change the rows until the offer ends, and answers whether the promise held. It
sends rows through staging buffers to readers that cannot map its memory.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple, get_args

import torch
from msgspec.structs import replace

from portakv import arguments
from portakv.errors import InvalidTerms, OfferGone, PeerError
from portakv.migrate import messages, offer_terms
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.exports import EVENTS, Entry, Exports, Expose, Place, Words, describe_all
from portakv.migrate.gathers import BUFFERS, BlockList, Gathers, Offered, StreamFence
from portakv.migrate.marks import PAST, Progress, Raises, Unit, mark_event, progress_of
from portakv.migrate.names import EndedOffers, Names
from portakv.migrate.shards import Shard, device_of
from portakv.runtime.finished import Finished
from portakv.runtime.interrupts import Condition, abandoned, uninterrupted

LOOK = 0.1  # seconds between two checks of a call that waits for the end of an offer
UNKNOWN = messages.Answer("gone", messages.REASONS["gone"])
NOT_SENT = "some of its rows could not be sent; the owner's log has the reason"
SPOILT = messages.Answer("gone", NOT_SENT)


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

    Methods come in pairs, such as `end` and `_end`: no interrupt may cut the private half in two,
    so a helper thread runs it for the main thread.

    Attributes:
        ticket: bytes for the reader, which travel with the request. Any process that has the
            ticket and the channel's secret may pull.
        name: by which readers find the offer without its ticket; empty if it has none.
        place: of the offer's validity word; ``entry``: of its name.
    """

    name = b""
    place = Place()
    entry = Entry()
    began = offer_terms.UNTRACED
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
        self.number = secrets.token_bytes(16)
        self.ticket = b""
        self.ids = ids
        self.tokens = tokens
        self.lease = lease
        self.readers = readers
        self.after = after
        # Readers that read it, with the function that stops watching each.
        self.begun: dict[bytes, Callable[[], object]] = {}
        self.through: set[bytes] = set()  # readers that have the rows, or are gone
        self.spoilt: set[bytes] = set()  # readers to which some of the rows could not be sent
        self._owner = owner
        self._state = "held"

    @cached_property
    def indices(self) -> Sequence[offer_terms.Index]:
        """Return the index of each shard, for the rows that the owner sends."""
        return [offer_terms.Index(*each) for each in self.ids]

    @property
    def state(self) -> str:
        """Return "held"; after the end "taken", "expired", "revoked", or "lost" with a reader."""
        return uninterrupted(self._look)

    def _look(self) -> str:
        """Return the state now, for a caller that may have the owner's lock."""
        with self._owner.change:
            if self._state == "held" and self._owner.now() > self.lease.until:
                self._end("expired")  # a caller that has the lock must not wait for a helper
            return self._state

    def holds(self) -> bool:
        """Return True if the offer holds, for a caller that may have the owner's lock."""
        return self._look() == "held"

    def end(self, state: str) -> None:
        """End the offer in a state, unless it has ended."""
        uninterrupted(partial(self._end, state))

    def _end(self, state: str) -> None:
        """Record the end, stop to watch the readers, and wake the threads that wait for the end."""
        owner = self._owner
        with owner.change:
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
                offer_terms.end_span(self.began, state, self.tokens)
                for stop in self.begun.values():
                    stop()
                owner.ends.add(Ended(self, state, frozenset(self.through)))
                owner.change.notify_all()

    def _why_ended(self) -> str:
        """Return why the offer ended, as a clause for a reader."""
        if self._state == "taken" and len(self.through) >= self.readers:
            return f"its readers ({self.readers}) have taken it; offer it with a larger readers="
        if self._state == "taken":
            return "its readers have taken it"
        return messages.REASONS[self._state]

    def taken(self, timeout: float | None = None) -> bool:
        """Wait until the offer has ended, at most ``timeout`` seconds; return True if it has.

        The owner may then use its blocks again.
        """
        seconds = arguments.seconds("timeout", timeout, optional=True)
        return uninterrupted(partial(self._wait, seconds))

    def _wait(self, seconds: float) -> bool:
        """Wait for the end; return early if the caller was interrupted."""
        owner = self._owner
        until = owner.now() + seconds
        with owner.change:
            while self.state == "held":
                now = owner.now()
                if now >= until or abandoned():
                    return False
                owner.change.wait(min(until, self.lease.until + 1e-3, now + LOOK) - now)
        return True

    def revoke(self) -> None:
        """End the offer immediately: no reader commits rows that it reads from now on."""
        self.end("revoked")

    def extend(self, seconds: float) -> bool:
        """Hold the offer for ``seconds`` from now on, if its lease ends before; return False if it
        has ended.

        An owner may extend its offer beyond ``max_lease``, which limits readers.
        """
        return uninterrupted(partial(self._extend, offer_terms.checked_extension(seconds)))

    def _extend(self, seconds: float) -> bool:
        """Set the end of the lease, unless the offer has ended."""
        with self._owner.change:
            if self._look() != "held":
                return False
            self.lease.until = max(self.lease.until, self._owner.now() + seconds)
            self.lease.latest = max(self.lease.latest, self.lease.until)
            self._owner.change.notify_all()
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
        with owner.change:
            progress = self.progress
            if progress is None:
                raise InvalidTerms(
                    "Expected an offer with a mark, got one whose rows were complete when it was "
                    "made. Pass progress= to Owner.offer."
                )
            if self._look() != "held":
                raise OfferGone(
                    f"Expected an offer that holds, got one that has ended: {self._why_ended()}. "
                    f"Write no more rows for it, and make another offer."
                )
            show = partial(self._show, progress, progress.raise_to(mark))
            if event is None:
                show()
            else:
                fail = partial(self._end, "revoked")
                owner.raises.after(progress, event, owner.device, show, fail)

    def _show(self, progress: Progress, mark: int) -> None:
        """Let readers see a mark, unless the offer has ended. The caller has the owner's lock."""
        if self._state == "held":
            progress.mark = mark
            self._owner.words.mark(self.place, mark)


class Ended(NamedTuple):
    """The end of an offer.

    ``state``: as `Offer.state`. ``readers``: the ids of the channels (`Channel.id`) of readers that
    have the rows, or were lost.
    """

    offer: Offer
    state: str
    readers: frozenset[bytes]


class Owner:
    """A process that offers rows to readers.

    Methods come in pairs, such as `close` and `_end`: no interrupt may cut the private half in two,
    so a helper thread runs it for the main thread.

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
        self.change = Condition(threading.RLock())
        self.counts = Counter[str]()
        self._key = secrets.token_bytes(32)  # signs tickets, also those of later epochs
        self._expose = expose
        self.offers = dict[bytes, Offer]()
        self.ended = EndedOffers("ended offers")
        self.names: Names[Offer] = Names(self._key)
        self.words = Words()
        self.ends: Finished[Ended] = Finished()
        self._gathers = Gathers(channel, staging, transport, device, staging_total)
        uninterrupted(partial(self._start, shards), undo=lambda _: self.close())

    def _start(self, shards: Sequence[Shard]) -> None:
        """Serve the offers of the shards on the channel."""
        channel = self.channel
        self.raises = Raises(self.change)
        channel.claim("an owner", self)
        try:
            self.reallocate(*shards)
        except BaseException:  # also an interrupt: the channel must become free
            channel.free("an owner", self)
            raise
        self._kinds: dict[type[messages.Message], Callable[..., messages.Message | None]] = {
            messages.Hello: self._hello,
            messages.Begin: self._begin,
            messages.Renew: self._renew,
            messages.Check: self._check,
            messages.Close: self._close,
            messages.Gather: self._gather,
            messages.Sum: self._gather,
            messages.Choose: self._gather,
            messages.Stop: self._stop,
            messages.Find: self._find,
            messages.RenewNamed: self._renew_named,
            messages.EndNamed: self._end_named,
            messages.Marks: self._marks,
            messages.Bye: self._bye,
        }
        for kind, answer in self._kinds.items():
            channel.serve(kind, answer)
        offer_terms.watch(self)

    def reallocate(self, *shards: Shard) -> None:
        """Replace the views: all offers end, and readers connect again."""
        uninterrupted(partial(self._reallocate, shards))

    def _reallocate(self, shards: Sequence[Shard]) -> None:
        """Describe the new views, end all offers, and begin a new epoch."""
        device = device_of(shards)
        described = describe_all(shards)
        with self.change:
            self.revoke_all()
            self.epoch = secrets.token_bytes(16)
            self.shards = shards
            self.device = device
            if self._exports is not None:
                self._exports.close()
            pages = self.words, self.names.table
            self._exports = Exports(described, self.epoch, device, self._expose, *pages)
            self._events = self._exports.events
            self._turn = 0
            self._handshake = messages.Handshake(
                epoch=self.epoch,
                described=described.shards,
                regions=self._exports.regions,
                slots=BUFFERS,
                slot_bytes=self._gathers.buffer_bytes,
                transport=self._gathers.transport or "",
                events=self._exports.event_handles,
                key=self._key,
                words=self._exports.words,
                names=self._exports.names,
            )

    def offer(
        self,
        *blocks: offer_terms.Ids,
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
        tokens, readers, lease, last = offer_terms.checked(tokens, readers, lease, max_lease)
        mark = None
        if progress is not None:
            mark = progress_of(progress, max(shard.view.layers for shard in self.shards), tokens)
        lists = offer_terms.block_lists(self.shards, blocks, tokens)
        if name is not None:
            with self.change:
                self.names.check_new(name, sum(ids.nbytes for ids, _ in lists))
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
        made.began = offer_terms.begin_span()
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
        with self.change:
            event = self._turn = (self._turn + 1) % EVENTS
            # An older offer's event, perhaps recorded on another stream.
            self._events[event].wait(stream)
            self._events[event].record(stream)
        return event

    def _enter(self, made: Offer, event: int, lease: float) -> Offer:
        """Register an offer of rows after an event, and write its ticket."""
        with self.change:
            ids = tuple([each.tobytes() for each, _ in made.ids])
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
            if made.name:
                self.names.add(made)
            self.counts["offered"] += 1
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
        named = messages.Named.read(messages.carried("ticket", ticket, "Pass Offer.ticket."))
        parsed = named or messages.Ticket.read(ticket)
        if named is None and not messages.is_signed(ticket, self._key):
            raise messages.no_ticket()
        if parsed.epoch != self.epoch:
            return False  # all offers before `reallocate` have ended
        if isinstance(parsed, messages.Named):
            with self.change:
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

    def revoke_all(self) -> None:
        """End every offer immediately."""
        uninterrupted(self._revoke_all)

    def _revoke_all(self) -> None:
        """Revoke the offers one by one."""
        for offer in [*self.offers.values()]:
            offer.revoke()

    def statistics(self) -> dict[str, int]:
        """Return the number of active offers, of ends by reason, of answers, and of buffers in
        use."""
        return uninterrupted(self._statistics)

    def figures(self) -> offer_terms.Figures:
        """Return figures by the names of metrics, in the form of `Graph.statistics`."""
        return offer_terms.owner_figures(self.statistics())

    def _statistics(self) -> dict[str, int]:
        """Count the offers and buffers, under the lock."""
        with self.change:
            exports = sum(offer.state == "held" for offer in [*self.offers.values()])
            return {**self.counts, "held": exports, "slots": self._gathers.buffers}

    def close(self) -> None:
        """End every offer, and answer no further request."""
        uninterrupted(self._end)

    def _end(self) -> None:
        """Free the channel, and release the offers, the exports and the staging buffers."""
        if not self.channel.free("an owner", self):
            return
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

    def _hello(self, peer: Peer, hello: messages.Hello) -> messages.Handshake | messages.Answer:
        same = hello.model == self.model
        self.counts["paired" if same else "refused"] += 1
        if not same:
            why = f"the owner's model is {self.model!r}, the reader's {hello.model!r}"
            return messages.Answer("refused", why[:1024])
        if not hello.transport:
            return self._handshake
        return replace(self._handshake, transport=self._gathers.agree(peer, hello, self.device))

    def _current(self, about: messages.About) -> Offer | None:
        offer = self.offers.get(about.offer)
        exports = offer is not None and about.epoch == self.epoch and offer.holds()
        return offer if exports else None

    def _begin(self, peer: Peer, begin: messages.About) -> None:
        with self.change:
            offer = self._current(begin)
            if offer is not None and peer.id not in offer.begun:
                offer.begun[peer.id] = peer.on_gone(partial(self._less, offer, peer.id, "lost"))

    def _less(self, offer: Offer, reader: bytes, state: str) -> None:
        """Count a reader that has the rows of an offer, or is gone; each counts once."""
        with self.change:
            offer.begun.pop(reader, lambda: None)()
            offer.through.add(reader)
            if len(offer.through) >= offer.readers:
                offer.end(state)

    def _gone(self, about: messages.About) -> messages.Answer:
        """Answer that an offer does not hold, and why."""
        why = self.ended.get(about.offer) if about.epoch == self.epoch else None
        return messages.Answer("gone", why) if why else UNKNOWN

    def _check(self, peer: Peer, check: messages.Check) -> messages.Answer:
        with self.change:
            offer = self._current(check)
            if offer is None:
                self.counts["gone"] += 1
                return self._gone(check)
            return SPOILT if peer.id in offer.spoilt else messages.Answer("held")

    def _close(self, peer: Peer, close: messages.Close) -> None:
        with self.change:
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

    def _renew(self, _: Peer, renew: messages.Renew) -> messages.Answer:
        with self.change:
            offer = self._current(renew)
            if offer is None:
                return self._gone(renew)
            offer.lease.renew(self.now() + renew.seconds)
            return messages.Answer("held", seconds=offer.lease.until - self.now())

    def _find(self, _: Peer, find: messages.Find) -> messages.Found | messages.Answer:
        with self.change:
            if find.epoch != self.epoch:
                return messages.Answer("gone", messages.REASONS["restarted"])
            return self.names.find(find.names)

    def _renew_named(self, _: Peer, renew: messages.RenewNamed) -> None:
        with self.change:
            for offer in self.names.held(renew.names if renew.epoch == self.epoch else ()):
                offer.lease.renew(self.now() + renew.seconds)

    def _end_named(self, _: Peer, end: messages.EndNamed) -> None:
        with self.change:
            for offer in self.names.held(end.names if end.epoch == self.epoch else ()):
                offer.end("taken")

    def _marks(self, peer: Peer, marks: messages.Marks) -> messages.Marked | messages.Answer:
        with self.change:
            if marks.epoch != self.epoch:
                return messages.Answer("gone", messages.REASONS["restarted"])
            shown = list[int]()
            why = list[str]()
            for number in marks.offers:
                offer = self.offers.get(number)
                if offer is None or not offer.holds():
                    shown.append(0)
                    why.append(self.ended.get(number, messages.REASONS["gone"]))
                else:
                    shown.append(offer.mark or 0)
                    why.append(SPOILT.why if peer.id in offer.spoilt else "")
            return messages.Marked(tuple(shown), tuple(why))

    def _bye(self, peer: Peer, _: messages.Bye) -> None:
        self._gathers.forget(peer)

    def _gather(self, peer: Peer, request: messages.ForRows) -> messages.Answer:
        with self.change:
            offer = self._current(request)
            if offer is None:
                return self._gone(request)
            self._begin(peer, request)
            if peer.id in offer.spoilt:
                return SPOILT
            terms = offer.tokens, offer.after, offer.spoilt, offer.holds
            rows = Offered(self.shards, lambda: offer.indices, *terms)
            for part in request.parts:
                rows.check(part)
            if not all(self._is_complete(offer, part) for part in request.parts):
                return messages.Answer("refused", PAST)
            return self._gathers.answer(peer, request, rows)

    def _is_complete(self, offer: Offer, part: messages.Part) -> bool:
        """Return True if rows do not reach past the mark of their offer."""
        layers = part.layers[1] - self.shards[part.group].group.layers[0]
        tokens = part.first + part.count
        return offer.progress is None or offer.progress.covers(layers, tokens)

    def _stop(self, peer: Peer, stop: messages.Stop) -> messages.Stopped:
        return self._gathers.stop(peer, stop)
