# SPDX-License-Identifier: Apache-2.0
"""A `Reader` pulls rows that owners offer into its own views.

It copies rows by one launch for each piece if the owner's memory can be mapped. Otherwise the owner
sends the rows through staging buffers.
"""

from __future__ import annotations

import atexit
import logging
import os
from asyncio import CancelledError
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import inf
from time import monotonic
from typing import Any, NamedTuple, get_args
from weakref import ref

import torch

from portakv import arguments
from portakv.copy.inside import copy_checked
from portakv.copy.options import CopyOptions, Overlap, options_from
from portakv.errors import (
    OfferGone,
    PackOverflow,
    PeerError,
    PortaKVError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.graph.meter import by_label
from portakv.graph.trace import Figures, Spent, Trace, histograms
from portakv.layout.encodings import Pack
from portakv.migrate.channel import Channel
from portakv.migrate.connections import (
    ANY,
    Attempt,
    Connections,
    OwnerKey,
    Source,
    Sources,
    closed_reader,
)
from portakv.migrate.crossed import AUTO, Encoding, pack_of
from portakv.migrate.messages import (
    MOST_NAMES,
    Answer,
    Begin,
    Close,
    Find,
    Found,
    Marked,
    Marks,
    Message,
    Named,
    Renew,
    Ticket,
    any_named,
    listed,
)
from portakv.migrate.plan import (
    Step,
    check_arguments,
    check_packed,
    count_blocks,
    indices_of,
    planned,
)
from portakv.migrate.pull import (
    CANCELLED,
    MAPPED,
    Ending,
    LayerTransfer,
    PartTransfer,
    Pull,
    known,
)
from portakv.migrate.shards import Shard
from portakv.migrate.staged_reader import StagedReceiver, verified
from portakv.runtime import tracing
from portakv.runtime.bounded import Until
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.interrupts import shielded
from portakv.runtime.streams import StreamFence, ignore_captures_elsewhere
from portakv.runtime.transfer import Finished
from portakv.tasks import Handle, Runtime, Wait, blocking, runtime
from portakv.view.index import Ids, Index

# ------------------------------------------------------------------------------------------------
# One coroutine of a reader looks after all of its pulls.

_log = logging.getLogger(__name__)
FIRST_LOOK = 1e-3  # seconds until the first look at a pull
#: Seconds after which a pull is reported to its owners as begun, at most a third of a lease. The
#: message would take the interpreter from a caller whose pull ends soon.
BEGIN = 4e-3
LOOK = 0.05  # the most seconds between two looks at a pull
PROMPT = 1e-3  # the same if somebody waits for `Reader.finished`, or a pull for a mark
GATHER = 1e-3  # seconds after the end of a pull in which further ends are reported together
POLLS = 8  # looks for a further end, after which the coroutine sleeps until it is woken
IDLE = 40  # looks without a pull, after which the coroutine waits until it is woken
RENEWAL = 0.5  # the most seconds between two renewals: much of a lease may be over at the pull
SENDING = 0.5  # the most seconds for a message to an owner
BUSY = 0.5  # seconds without a message to an owner, after one could not be sent
CLOSING = 2.0  # the most seconds in which the last messages are sent


@dataclass
class _Watched:
    """A pull in flight."""

    began: float
    begun: bool = False  # reported to the owners that do not learn it by a request for rows
    renew: float = 0.0  # when its leases are renewed next
    renewal: Handle[None] | None = None  # by questions to owners without words
    ended: bool = False  # reported to this process, perhaps not to all owners yet
    span: tracing.Began = tracing.UNTRACED


class Wakes:
    """Wake a coroutine immediately, or within `GATHER` if a pull has ended.

    A caller that pulls on has the interpreter until then, and one look reports several ends. To
    wake the loop costs a caller the interpreter, so for `POLLS` times `GATHER` after an end the
    coroutine wakes by itself. Any thread may call `look` and `end`.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._called = False  # since the last look
        self._now = False  # look immediately
        self._sleeps = False  # until it is woken
        self._polls = 0  # how often the coroutine wakes by itself before it sleeps
        self._wait: Wait | None = None

    def look(self) -> None:
        """Have the coroutine look immediately."""
        self._now = True
        self._called = True
        self._runtime.call_soon(self._wake)

    def end(self) -> None:
        """Have the coroutine look soon; several ends wake it once."""
        self._called = True
        if self._sleeps:
            self._runtime.call_soon(self._wake)

    def _wake(self) -> None:
        self._sleeps = False
        if self._wait is not None:
            self._runtime.wake(self._wait)

    async def wait(self, seconds: float | None) -> bool:
        """Wait until there is a reason to look; return False after ``seconds`` without one."""
        time = self._runtime.time
        until = inf if seconds is None else time() + seconds
        for _ in range(self._polls):
            if self._called or time() >= until:
                break
            await self._pause(min(until, time() + GATHER))
        else:
            self._sleeps = True
            if not self._called:  # since it sleeps
                await self._pause(until)
            self._sleeps = False
            if self._called and not self._now:
                await self._pause(time() + GATHER)  # for further ends, or for a reason to look now
        if not self._called:
            self._polls = 0
            return False
        self._polls = POLLS
        self._now = False
        self._called = False  # before the look, which sees all that ended until then
        return True

    async def _pause(self, until: float) -> None:
        """Wait for a call of `look`, or of `end` if the coroutine sleeps."""
        self._wait = Wait(until=None if until == inf else until)
        await self._wait
        self._wait = None


class Housekeeper:
    """Looks after the pulls of a reader, by a coroutine that begins with the first pull.

    A pull is added by one step, so that no interrupt leaves a half of it.
    """

    def __init__(self, device: torch.device) -> None:
        #: The pulls that have ended, for `Reader.finished`.
        self.finished: Finished[Pull] = Finished()
        # What they have brought. The coroutine counts it.
        self.ends = Counter[str]()  # by result
        self._nbytes = Counter[str]()  # by strategy
        self._spent = defaultdict[str, Spent](Spent)  # by result
        self._device = device
        self._runtime = runtime()
        #: Finds offers by their names, and marks; None before the first pull that waits.
        self.finder: Finder | None = None
        self._most = LOOK  # seconds between two looks; less if a pull waits for a name or a mark
        self._pulls = dict[Pull, _Watched]()
        #: The pulls that wait for owners, offers by name, or rows.
        self.waiting = dict[Pull, LatePull]()
        self._busy: Until[str] = Until("owners that take no message", 1024)  # by address
        self._wakes = Wakes(self._runtime)
        self._parked = True
        #: Pulls that would wait any longer end, because the reader closes.
        self.leaves = False
        self._closing = False
        self._begun = False
        self._steps: Handle[None] | None = None

    @property
    def pulls(self) -> list[Pull]:
        """Return the pulls that have not ended, or whose end is not reported yet."""
        return [*self._pulls]

    def figures(self, owners: int) -> Figures:
        """Return the figures of a reader that has so many owners; see `Reader.figures`."""
        nbytes = self._nbytes.copy()
        ages = [pull.age for pull in self.pulls if not pull.ended]
        return {
            "pulls_in_flight": [{"value": len(ages)}],
            "pull_oldest_seconds": [{"value": max(ages, default=0.0)}],
            "pull_owners": [{"value": owners}],
            "pull_bytes_total": by_label("strategy", nbytes, nbytes),
            **histograms("pull_seconds", self._spent.copy()),
        }

    def add(self, pull: Pull) -> None:
        """Look after a pull from now on."""
        watched = _Watched(monotonic())
        if tracing.chosen is not None:
            watched.span = tracing.begin()
        self._pulls.setdefault(pull, watched)
        if self._parked or self.finished.started or pull in self.waiting:
            self.wake()

    def wake(self) -> None:
        """Have the coroutine look immediately; begin it at the first call."""
        self._wakes.look()
        self._begin()

    def report(self) -> None:
        """Have the coroutine look soon, for a pull that has ended; begin it at the first call."""
        self._wakes.end()
        self._begin()

    def wait(self, seconds: float) -> None:
        """Wait for the pulls in flight, and cancel those that last longer, or wait for owners."""
        until = monotonic() + seconds
        self.leaves = True
        self._wakes.look()
        for pull in self.pulls:
            try:
                pull.synchronize(max(0.0, until - monotonic()))
            except TransferTimeout:
                pull.cancel()
            except PortaKVError:  # its caller gets the error by which it ended
                continue

    def _begin(self) -> None:
        """Begin the coroutine in the loop, at the first call. An interrupted call is made again."""
        if not self._begun:
            self._runtime.call_soon(self._begin_here)
            self._begun = True

    def _begin_here(self) -> None:
        if self._steps is None:
            atexit.register(self.close)
            if self._device.type != "cpu":
                ignore_captures_elsewhere(self._device)
            self._steps = self._runtime.start(self._run())

    @shielded
    def close(self) -> None:
        """Report the ends of pulls that have ended, and end the coroutines."""
        atexit.unregister(self.close)
        self.leaves = True
        until = monotonic() + CLOSING
        for pull in self.pulls:
            if not pull.begun:
                pull.stop(TransferCancelled(CANCELLED))
                if pull.steps is not None:
                    pull.steps.wait(max(0.0, until - monotonic()))
        self._closing = True
        if self._steps is not None:
            self._wakes.look()
            self._steps.wait(max(0.0, until - monotonic()))
        self.finished.close()

    # --- in the coroutine

    async def _run(self) -> None:
        """Look at all pulls until the reader is closed."""
        idle = 0
        pause = FIRST_LOOK
        looked_after = False
        while True:
            # Also a pull that began and ended between two turns: others follow it.
            idle = 0 if self._pulls or looked_after else idle + 1
            self._parked = idle > IDLE
            if self._pulls:  # also one that was added before it could see that this waits
                self._parked = False
            seconds = pause if self._pulls else LOOK
            if await self._wakes.wait(None if self._parked else seconds):
                pause = FIRST_LOOK
            most = PROMPT if self.finished.started else self._most
            pause = min(2 * pause, most) if self._pulls else FIRST_LOOK
            closes = self._closing  # a pull may end while this look goes on
            looked_after = await self._look_at_all()
            if closes:
                return

    async def _look_at_all(self) -> bool:
        """Look at each pull; report the ends. Return True if there are pulls."""
        if self._closing or not self._pulls:  # these are the last messages, or there are none
            self._busy.clear()
        pulls = self._pulls.copy()  # by one step: another thread may add a pull
        try:
            await self._find([*pulls])
        except Exception:  # one answer must not stop the others' pulls
            _log.exception("The offers and marks of pulls that wait could not be found.")
        for pull, watched in pulls.items():
            try:
                # A caller that waits for a pull notices its end, and needs the interpreter then.
                if not (pull.concluded or pull.has_waiter):
                    with self._runtime.released():  # torch may have locks
                        pull.look()
                if pull.concluded:
                    await self._report_end(pull, watched)
                else:
                    await self._look_after(pull, watched)
            except Exception as error:  # one pull must not stop the others
                _log.exception("A pull failed.")
                pull.stop(TransferError(f"The pull failed: {error!r}."))
        return bool(pulls)

    async def _find(self, pulls: list[Pull]) -> None:
        """Ask for the offers and marks that pulls wait for, and wake the coroutines of these
        pulls."""
        waiting = list[LatePull]()
        for pull in pulls:
            late = self.waiting.get(pull)
            if late is None:
                continue
            pull.look_at_copies()  # the coroutine of the pull does not
            if pull.over or self.leaves:
                pull.go_on()
            else:
                waiting.append(late)
        self._most = PAUSE if waiting else LOOK
        if any(late.known for late in waiting):
            self._most = PROMPT
        if self.finder is not None:
            await self.finder.look(waiting)

    async def _report_end(self, pull: Pull, watched: _Watched) -> None:
        """Report the end of a pull to its owners and to `Reader.finished`.

        An owner whose connection is busy gets it at a later look.
        """
        if not watched.ended:
            watched.ended = True
            self.finished.add(pull)
            with self._runtime.released():  # whoever follows spans may have locks
                self._count(pull, watched)
        left = list[Source]()
        for source in pull.sources:
            about = source.ticket.epoch, source.ticket.offer
            if not await self._tell(source, Close(*about, pull.published)):
                left.append(source)
        pull.sources = left  # a handle retains no memory of owners
        if not left:
            self._pulls.pop(pull, None)

    def _count(self, pull: Pull, watched: _Watched) -> None:
        """Count a pull that has ended, and record its span if the process makes spans."""
        result = "failed"
        if pull.published:
            result = "committed"
            self._nbytes[pull.strategy[0]] += int(pull.nbytes)
        self.ends[result] += 1
        self._spent[result].add(pull.age)
        if not watched.span.at:
            return
        done = pull.statistics
        attributes: dict[str, str | int] = {
            "strategy": done.strategy,
            "pull.blocks": done.blocks_requested,
            "pull.size": done.nbytes,
        }
        if done.packed:
            attributes["pull.wire_size"] = done.wire_nbytes
            attributes["pull.blocks_raw"] = done.blocks_raw
        for choice in done.choices[:1]:
            attributes["pull.encoding"] = "raw" if choice.pack is None else choice.pack.text
            attributes["pull.encoding_why"] = choice.why
        parent = next((each.ticket.traceparent for each in pull.sources), "")
        tracing.end("portakv pull", watched.span, attributes, pull.error, parent, pull.age)

    async def _look_after(self, pull: Pull, watched: _Watched) -> None:
        """Stop a pull that cannot be committed any more; else renew its leases."""
        now = monotonic()
        if pull.over:
            pull.stop_copies()  # an interrupt may have come before that
            return
        error = pull.lost()
        if error is not None:
            pull.stop(error)
            return
        third = _third(pull.sources)
        if not watched.begun and now >= watched.began + min(BEGIN, third):
            late = self.waiting.get(pull)  # it has begun if only rows are not complete
            watched.begun = late is None or (late.known and not late.complete)
            watched.renew = now + third
            for source in pull.sources if watched.begun else ():
                await self._tell(source, Begin(source.ticket.epoch, source.ticket.offer))
        elif watched.begun and now >= watched.renew:
            watched.renew = now + third
            # An owner without words also says whether its offer holds; no look waits for that.
            if pull.remote and (watched.renewal is None or watched.renewal.done()):
                watched.renewal = self._runtime.start(pull.renew())
            for source in pull.sources:
                ticket = source.ticket
                if source.word is not None:
                    await self._tell(source, Renew(ticket.epoch, ticket.offer, ticket.lease))

    async def _tell(self, source: Source, message: Message) -> bool:
        """Send a message to an owner, unless the owner is gone; return False if its connection is
        busy."""
        owner = source.owner
        if owner.gone:
            return True
        if self._busy and self._busy.holds(owner.address):
            return False
        try:
            await owner.channel.send(owner.address, message, SENDING)
        except TransferTimeout:  # another request waits for an answer by this connection
            self._busy.hold(owner.address, BUSY)
            return False
        except PortaKVError:  # the owner may be gone
            pass
        return True


def _third(sources: Sources) -> float:
    """Return the seconds until leases are to be renewed, at most `RENEWAL`."""
    third = min((source.ticket.lease for source in sources), default=1.0) / 3
    return max(FIRST_LOOK, min(third, RENEWAL))


# ------------------------------------------------------------------------------------------------
# Issue a pull: its copies in the caller's thread, except for those that would block it.

LONG = 1 << 20  # bytes on the host that other threads copy, so that the call does not block


class Request(NamedTuple):
    """What a caller wants of a pull.

    Attributes:
        indices: for each shard, where the rows go.
        first: the number of tokens that both sides skip.
        options: of the copies.
        verify: compare checksums before the commit.
        pack: how rows are packed that owners send; None: they cross as they are.
        auto: the owners choose whether and how they pack.
    """

    indices: list[Index]
    first: int
    options: CopyOptions
    verify: bool
    pack: Pack | None = None
    auto: bool = False


def late_events(sources: Sources) -> list[torch.Event]:
    """Return the events of offers that have not been reached.

    Rows up to a mark are complete when the mark is seen. Their offer's event may stand for a later
    offer by then.
    """
    late = list[torch.Event]()
    for ticket, owner, _ in sources:
        if ticket.progress:
            continue
        event = owner.events[ticket.event] if 0 <= ticket.event < len(owner.events) else None
        if event is not None and not event.query():
            late.append(event)
    return late


def wait_for_events(sources: Sources, device: torch.device) -> None:
    """Order the current stream after the events of offers that have not been reached."""
    for event in late_events(sources):
        module = torch.get_device_module(device)  # events take streams of their module
        event.wait(module.current_stream(device))


def apart(sources: Sources, device: torch.device) -> AbstractContextManager[object]:
    """Make a private stream current, after the caller's, if an owner's device still writes the
    rows: the caller's stream must not wait for another process."""
    return StreamFence(device).inside() if late_events(sources) else nullcontext()


class Issuing:
    """A pull whose plan is made, and whose copies are issued, all together or part by part.

    Raises the errors of `Reader.pull` about rows and blocks.

    Attributes:
        plan: the steps of the whole pull.
    """

    def __init__(self, shards: Sequence[Shard], trace: Trace, pull: Pull, request: Request) -> None:
        self.plan, self._skips = planned(pull.sources, shards, request.indices, request.first)
        self._device = shards[0].view.device
        self._trace = trace
        self._pull = pull
        self._request = request
        # Both have not begun: those that take rows, and copies by helpers.
        self._takers = list[StagedReceiver]()
        self._calls = list[Handle[None]]()
        #: The ends of the layers of each shard, of a pull by layer.
        self._layers = list[Sequence[LayerTransfer]]()
        if request.options.by_layer:
            ends = iter(pull.layers)
            self._layers = [[*islice(ends, shard.view.layers)] for shard in shards]

        for step in self.plan:
            if step.cut.packed:
                check_packed(step, request.verify, request.auto)
            for layer in self._layers_of(step):
                layer.left += step.tokens
        pull.nbytes = sum([step.nbytes for step in self.plan])
        if request.pack is not None and all(step.cut.src is not None for step in self.plan):
            pull.raw_because = MAPPED[1]
        # A coroutine of the loop issues the slices of a copy at a rate, by helpers.
        on_host = self._device.type == "cpu"
        self._long = on_host and pull.nbytes > LONG and not request.options.max_gbps

    def count_blocks(self) -> None:
        """Count the blocks of the pull, for its statistics."""
        pull = self._pull
        request = self._request
        past = pull.sources[0].ticket.tokens
        pull.blocks = count_blocks(request.indices, request.first, past, self._skips)

    def issue(self, some: Sequence[Step]) -> None:
        """Issue the copies of steps, or of parts of steps; `begin` begins those that would block.

        After an error nothing of these is in flight but copies.
        """
        try:
            self._issue(some)
        except BaseException:
            for call in self._calls:
                call.discard()
            for taker in self._takers:
                for arrival in taker.arrivals:
                    arrival.end(TransferCancelled(CANCELLED))
            raise
        for step in some if self._layers else ():
            for layer in self._layers_of(step):
                layer.note_issued(step.tokens)

    def _issue(self, some: Sequence[Step]) -> None:
        pull = self._pull
        wait_for_events(pull.sources, self._device)
        staged = dict[bytes, list[Step]]()  # by offers whose owners send the rows
        for step in some:
            if step.cut.src is None:
                staged.setdefault(step.ticket.offer, []).append(step)
                pull.strategy = step.owner.strategy
            elif self._long:
                self._copy_elsewhere(step)
            else:
                self._copy(step)
        for steps_of_offer in staged.values():
            self._take(steps_of_offer)

    def _copy(self, step: Step) -> None:
        """Copy the rows of a step, at its share of the rate."""
        options = self._request.options
        if options.max_gbps is not None:
            options = replace(options, max_gbps=self._rate([step]))
        indices = step.src_index, step.dst_index
        copy = copy_checked(step.src, step.cut.dst, *indices, step.tokens, options)
        self._pull.copies.append(copy)
        self._pull.pieces += 1
        if self._layers:
            for layer, end in zip(self._layers_of(step), copy.layers, strict=True):
                layer.add(end)

    def _copy_elsewhere(self, step: Step) -> None:
        """Have helpers copy the rows of a step on the host."""
        options = self._request.options
        layers = step.cut.dst.layers
        each = 1 if options.by_layer else layers
        options = replace(options, by_layer=False)
        for start in range(0, layers, each):
            some = range(start, start + each)
            copy = partial(_copy_here, step, some, self._pull, options)
            call = Handle(runtime(), blocking().work(copy))
            self._calls.append(call)
            self._pull.crossing.append(call)
            self._add(step, some, call)

    def _take(self, some: Sequence[Step]) -> None:
        """Make the coroutine that takes the rows of an offer from the owner that sends them, at
        their share of the rate."""
        request = self._request
        terms = self._rate(some), request.pack, request.auto
        taker = StagedReceiver(self._trace, some, self._pull, *terms)
        self._takers.append(taker)
        for each in taker.arrivals:
            self._add(each.step, each.part.layers, each)

    def _add(self, step: Step, layers: range, ending: Ending) -> None:
        """Let the pull, and some layers of a step, end with work that streams do not order."""
        self._pull.slices.append(ending)
        self._pull.pieces += 1
        for layer in self._layers_of(step)[layers.start : layers.stop]:
            layer.endings.append(ending)

    def _layers_of(self, step: Step) -> Sequence[LayerTransfer]:
        """Return the ends of the layers of a step; none if the pull is not by layer."""
        layers = step.cut.layers
        return self._layers[step.cut.group][layers.start : layers.stop] if self._layers else ()

    def _rate(self, some: Sequence[Step]) -> float:
        """Return the share of steps in the rate of the pull; infinite: it has none."""
        rate = self._request.options.max_gbps
        if rate is None:
            return inf
        return rate * sum(step.nbytes for step in some) / self._pull.nbytes

    def begin(self) -> None:
        """Begin the work of `issue` that would block. Any thread may call it."""
        calls = self._calls
        self._calls = []
        for call in calls:
            call.on_end(self._pull.go_on)
            call.begin()
        takers = self._takers
        self._takers = []
        for taker in takers:
            taker.begin()

    @property
    def waits(self) -> bool:
        """Return True if the pull has to wait for its `finish`; False if whoever looks at the pull
        commits it."""
        pull = self._pull
        return bool(pull.slices or self._request.verify or pull.remote)

    async def finish(self) -> None:
        """Begin the work that would block; wait for all rows, verify and commit them."""
        self.begin()
        verifying = self.plan if self._request.verify else ()
        await self._pull.finish([partial(verified, step, self._pull) for step in verifying])


def _copy_here(step: Step, layers: range, pull: Pull, options: CopyOptions) -> None:
    """Copy layers of a step between views on the host, and wait for the end."""
    if pull.over:
        raise TransferCancelled(CANCELLED)
    try:
        with torch.inference_mode(False):
            part = step.part(layers, 0, step.tokens)
            indices = part.src_index, part.dst_index
            copy_checked(part.src, part.cut.dst, *indices, part.tokens, options).synchronize()
    except PackOverflow:  # the rows of the other copies are moved
        raise
    except BaseException as error:
        pull.stop(known(error))  # no mark is waited for
        raise


# ------------------------------------------------------------------------------------------------
# Issue the copies of pulls that wait, as their offers exist and their marks rise.


class _Reach:
    """How far a step is issued: its layers, or the tokens of all of its layers."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.unit = step.ticket.progress
        if self.unit == "layers":
            owned = step.owner.handshake.described[step.cut.group].group.layers
            self._start = step.cut.piece.box[0][0] - owned[0]
            self.end = step.cut.dst.layers
        else:
            self._start = step.first
            self.end = step.tokens
        self.reached = 0

    def part(self, mark: int) -> Step | None:
        """Return the part of the step that has become complete; None if there is none."""
        past = self.end
        if self.unit:
            past = min(past, mark - self._start)
        if self.unit == "tokens" and past < self.end:
            past -= past % self.step.page  # whole opaque pages, and packed blocks
        begin = self.reached
        if past <= begin:
            return None
        self.reached = past
        if past - begin == self.end:
            return self.step
        if self.unit == "layers":
            return self.step.part(range(begin, past), 0, self.step.tokens)
        return self.step.part(range(self.step.cut.dst.layers), begin, past - begin)


class LatePull:
    """A pull that waits. Its copies are issued as its offers exist and become complete.

    Raises `PeerError` for bytes that are not a ticket.

    Attributes:
        tickets: of the pull; those that are names are replaced when their offers exist.
        names: the tickets that are still names, by their places.
        owners: those of plain tickets that are not known to be connected, with a ticket of each.
        attempts: the handshakes that the pull waits for.
        since: when the pull was called.
        queried: the owners have had the names in a request once.
        sources: of the pull; none before its owners and offers are ``known``.
        marks: the last known mark of each source.
    """

    def __init__(
        self,
        connections: Connections,
        housekeeper: Housekeeper,
        plan: Callable[[], Issuing],
        pull: Pull,
        tickets: list[bytes],
        options: CopyOptions,
    ) -> None:
        self.pull = pull
        self.tickets = tickets
        self.names = dict[int, Named]()
        self.owners = dict[OwnerKey, Ticket]()
        self.attempts = dict[OwnerKey, Attempt]()
        self.since = monotonic()
        self.queried = False
        self.known = False
        self.sources: Sources = ()
        self.marks = list[int]()
        self._connections = connections
        self._housekeeper = housekeeper
        self._plan = plan
        self._whole = not options.by_layer or options.max_gbps is not None
        self._used: list[int] | None = None  # the marks up to which copies were issued
        self._issuing: Issuing | None = None
        self._reaches = list[_Reach]()
        for at, data in enumerate(tickets):
            named = Named.read(data)
            if named is not None:
                self.names[at] = named
            else:
                ticket = Ticket.read(data)
                self.owners[ticket.address, ticket.epoch] = ticket

    # --- what it waits for

    @property
    def complete(self) -> bool:
        """Return True if all rows of all offers are complete."""
        pairs = zip(self.sources, self.marks, strict=False)  # the sources may have been released
        return self.known and all(mark >= source.end for source, mark in pairs)

    def handshakes(self) -> list[str]:
        """Return the addresses of owners whose handshake is under way."""
        attempts = [*self.attempts.items()]
        return [address for (address, _), attempt in attempts if not attempt.handle.done()]

    def look_up(self) -> None:
        """Find offers in the tables of their owners."""
        for at, named in [*self.names.items()]:
            owner = self._connections.find(named.address, named.epoch)
            if owner is not None and owner.names is not None:
                ticket = owner.names.find(named.epoch, named.name)
                if ticket:
                    self.take(at, ticket)

    def take(self, at: int, answer: bytes | int) -> None:
        """Keep the ticket or the mark that an owner has sent for a place."""
        if isinstance(answer, bytes):
            self.tickets[at] = answer
            del self.names[at]
        else:
            self.marks[at] = max(self.marks[at], answer)

    @property
    def may_go_on(self) -> bool:
        """Return True if the pull need not wait for what it knows now."""
        if not self.known:
            return not self.names and not self.owners
        return self.complete or not (self._whole or self.marks == self._used)

    def look(self) -> None:
        """Wake the coroutine of the pull if it can go on; read the marks in shared memory before.

        It wakes once for the same marks.
        """
        self.read_marks()
        if self.may_go_on:
            self.pull.go_on()

    def read_marks(self) -> None:
        """Read the marks in shared memory."""
        for at, source in enumerate(self.sources):
            if source.ticket.progress:
                self.take(at, source.mark)

    # --- the pull itself

    def plan(self, sources: Sources) -> None:
        """Plan the copies of the pull, whose sources are known; raise as `Reader.pull`."""
        self.pull.sources = sources
        self._issuing = self._plan()
        self._issuing.count_blocks()
        self._reaches = [_Reach(step) for step in self._issuing.plan]
        self.attempts.clear()
        self.marks = [0] * len(sources)  # before others see the sources
        self.sources = sources
        self.known = True

    async def run(self, sources: Sources | None) -> None:
        """Wait for the owners, the offers and the rows, and issue the copies; commit what has to
        wait. The first step runs in the caller's thread.

        ``sources``: if they are known, so that only rows are not complete.

        The reader's `Housekeeper` finds what the pull waits for, and wakes this coroutine.
        """
        pull = self.pull
        if sources is not None:
            self.plan(sources)
        device = self._connections.device
        # The present work of the caller's stream, which the host does not have.
        after = None if device.type == "cpu" else StreamFence(device)
        try:  # an interrupt may come after any line
            self._housekeeper.waiting[pull] = self
            pull.handshakes = self.handshakes
            await Wait(until=0.0)  # the rest runs in the loop
            if not self.known:
                await pull.changes.wait_for(self._goes_on)
                sources = await self._connections.resolve(self.tickets, pull.until)
                self._check()  # also while the owners were resolved
                await blocking().work(self._issue, after, sources)
            while not self._is_issued:
                await pull.changes.wait_for(self._goes_on)
                await blocking().work(self._issue, after)
        finally:
            self._housekeeper.waiting.pop(pull, None)
            pull.handshakes = tuple
        assert self._issuing is not None  # `plan` has set it
        if self._issuing.waits:
            await self._issuing.finish()
        self._housekeeper.wake()  # to commit a pull that does not wait

    def _goes_on(self) -> bool:
        """Return True if the pull may go on; raise if it was stopped, or if the reader closes."""
        self._check()
        return self.may_go_on

    def _check(self) -> None:
        if self.pull.over or (self._housekeeper.leaves and not self.may_go_on):
            raise TransferCancelled(CANCELLED)

    @property
    def _is_issued(self) -> bool:
        """Return True if all copies are issued, and all rows are complete: rows that this reader
        does not need may still be written until then."""
        return self.complete and all(each.reached == each.end for each in self._reaches)

    def _issue(self, after: StreamFence | None, sources: Sources | None = None) -> None:
        """Issue what the marks allow, in a thread that may block; plan the pull before.

        ``sources``: of a pull that is not planned yet.
        """
        with torch.inference_mode(False), nullcontext() if after is None else after.inside():
            if sources is not None:
                self.plan(sources)
                if incomplete(sources):
                    self._housekeeper.wake()  # to look at the marks
                self.read_marks()
            assert self._issuing is not None
            self._issuing.issue([*self._parts()])
        if not self._is_issued:
            self._issuing.begin()

    def _parts(self) -> Iterator[Step]:
        """Yield the parts that have become complete, by the marks of the sources."""
        marks = self._used = [*self.marks]
        if self._whole and not self.complete:
            return
        for each in self._reaches:
            part = each.part(marks[each.step.cut.piece.owner])
            if part is not None:
                yield part


# ------------------------------------------------------------------------------------------------
# The reader, which begins pulls: immediately if their owners are connected and their offers exist,
# else when they do; see "Pulls that wait".

#: The options that a pull takes.
OPTIONS = ("by_layer", "overlap", "max_thread_blocks", "max_gbps")
#: The options of a pull that passes no other one than ``overlap``.
PLAIN = {overlap: CopyOptions(overlap=overlap) for overlap in get_args(Overlap)}

TRACED = 100_000  # times at which owners have sent rows, for `Reader.trace`
PATIENCE = 7.0  # seconds for which `Reader.close` waits for pulls, which end within three


class Reader:
    """A process that pulls the rows that owners offer.

    Args:
        channel: the channel for requests to owners; a channel has at most one reader.
        shards: the views with their windows, one for each group of layers that share block ids.
        model: a fingerprint; owners of another model are rejected.
        transport: the name of the transport for memory that cannot be mapped. None: the transport
            that the owner names, else the first that runs here.

    Raises `LayoutError` without a shard or if the shards are on several devices, and `InvalidTerms`
    for a channel that has a reader.
    """

    def __init__(
        self,
        channel: Channel,
        *shards: Shard,
        model: str,
        transport: str | None = None,
    ) -> None:
        arguments.instance("channel", channel, Channel)
        arguments.text("model", model)
        self._owners = Connections(channel, shards, model, transport)
        self.channel = channel
        self.shards = shards
        self.device = self._owners.device
        #: The rows that owners have sent, and choices of an encoding.
        self._trace = Trace(TRACED)
        self._housekeeper = Housekeeper(self.device)
        self._owners.on_handshake = self._housekeeper.wake
        self._finder = Finder(self._owners)
        self._housekeeper.finder = self._finder
        #: The pull of the last call that has asked owners itself.
        self._asked: ref[Pull] | None = None
        self._closed = False
        channel.claim("a reader", self)

    def pull(
        self,
        tickets: bytes | Sequence[bytes],
        *blocks: Ids | None,
        first: int = 0,
        by_layer: bool = False,
        overlap: Overlap = "compute",
        max_thread_blocks: int | None = None,
        max_gbps: float | None = None,
        options: CopyOptions | None = None,
        verify: bool = False,
        encoding: Encoding | None = None,
        timeout: float | None = None,
    ) -> Pull:
        """Pull the rows of tickets into lists of blocks, one list for each shard, of as many blocks
        as the tokens fill. None: a view that is not paged, from its first row on.

        Args:
            tickets: one ticket of each owner that has a part of this reader's windows. A pull by
                `Ticket.of` waits for its offer, of that the call itself for at most 1 ms. Pulls
                wait for handshakes, and for rows that are not complete. An `Index` and ids on a
                device must not change meanwhile. Other lists are copied.
            first: the number of tokens that are here already; both sides skip them.
            by_layer: copy one layer after the other, each with a separate end in `Pull.layers`;
                of offers that are not complete, what their owners have written by then.
            overlap, max_thread_blocks: as for `copy_rows`, for memory that is mapped.
            max_gbps: the most 10^9 bytes in a second, of all owners together. Other pulls of rows
                that the same owner sends wait meanwhile.
            options: these four options, made once for many pulls, in place of them.
            verify: compare checksums of all bytes with the owners' before the commit.
            encoding: "pack" or a `Pack`: owners that send rows pack blocks of bf16; those that do
                not fit follow raw. "auto": each such owner chooses, by a sample and by the rate of
                earlier pulls or ``max_gbps``. Mapped memory is never packed. See `PullStatistics`.
            timeout: seconds from the call, handshake included; then the pull ends without a commit.

        Raises, or with a name, a handshake, or rows that are not complete ends with:
            PeerError, OfferGone: no ticket; an owner that is gone, refuses, or was restarted.
            LayoutError: rows that cannot become this reader's; layers or heads without an owner.
            SlotError: bad blocks on either side, or more or fewer than the tokens fill.
            Unsupported: memory that is neither mapped nor sent; a graph capture; another encoding.
            PackOverflow: blocks of a packed view that did not fit into it.
        """
        options = self._checked(options, by_layer, overlap, max_thread_blocks, max_gbps)
        first = arguments.whole("first", first)
        arguments.flag("verify", verify)
        if self.device.type != "cpu" and capturing(self.device):
            raise refuse_capture("A pull", "it waits for the end of its copies; pull outside")
        self._check_open()
        seconds = arguments.FOREVER
        if timeout is not None:
            seconds = arguments.seconds("timeout", timeout, optional=True)
        until = monotonic() + seconds
        pack = None if encoding is None else pack_of(encoding)
        indices = indices_of(self.shards, blocks)
        request = Request(indices, first, options, verify, pack, encoding == AUTO)
        return self._begin(listed(tickets), request, until)

    def _begin(self, tickets: list[bytes], request: Request, until: float) -> Pull:
        """Return a pull whose copies were issued if its owners are connected, its offers exist and
        their rows are complete; else one that waits, and then begins after the caller's stream."""
        pull = Pull((), until, self._housekeeper.report)
        if request.options.by_layer:
            layers = sum(shard.view.layers for shard in self.shards)
            pull.layers = [LayerTransfer() for _ in range(layers)]
        pull.in_call = True  # another call may have it meanwhile
        steps = self._steps(pull, tickets, request)
        try:
            try:
                wait = steps.send(None)
            except StopIteration:
                wait = None
            self._housekeeper.add(pull)
            if wait is not None:
                pull.steps = Handle(runtime(), steps)
            pull.in_call = False
            if pull.steps is not None:
                pull.steps.follow(wait)
            elif self.device.type == "cpu":  # without a rate its copies have ended
                pull.look()
        except BaseException:  # the caller does not get the handle of the copies in flight
            pull.in_call = False
            pull.stop(TransferCancelled(CANCELLED))
            if pull.steps is not None:
                pull.steps.abandon()
            else:
                pull.block()
            raise
        return pull

    async def _steps(self, pull: Pull, tickets: list[bytes], request: Request) -> None:
        """Issue the copies of a pull, and commit it if it has to wait. This is the way of a pull.

        The step until the first wait runs in the caller's thread. It raises the errors of the
        call's arguments, and of a pull of plain tickets that it begins itself. Any other pull ends
        with those of its owners and rows.
        """
        named = any_named(tickets)
        plan = partial(Issuing, self.shards, self._trace, pull, request)
        sources = None if named else self._owners.resolve_connected(tickets)
        late: LatePull | None = None
        if sources is None or incomplete(sources):
            if sources is None and not named:
                check_arguments(tickets, self.shards, request.indices, request.first)
            terms = plan, pull, tickets, request.options
            late = LatePull(self._owners, self._housekeeper, *terms)
        try:
            if late is not None:
                if named and self._exist(late, pull):
                    sources = self._owners.resolve_connected(late.tickets)
                if sources is None or incomplete(sources):
                    await late.run(sources)
                    return
            assert sources is not None
            pull.sources = sources
            with apart(sources, self.device) if named else nullcontext():
                issuing = plan()
                issuing.issue(issuing.plan)
            issuing.count_blocks()  # what no copy needs comes after the copies
            if issuing.waits:
                await Wait(until=0.0)  # the rest runs in the loop
                await issuing.finish()
        except (Exception, CancelledError) as error:
            if pull.in_call and not (named and isinstance(error, PortaKVError)):
                raise
            await pull.fail(error)
            if late is not None:
                self._housekeeper.wake()

    def _exist(self, late: LatePull, pull: Pull) -> bool:
        """Return True if the offers of a pull by name exist and all owners are connected, as their
        owners' tables say, or the owners: the call asks them for a moment.

        It does not if the pull of the last such call has not ended, so that many pulls that begin
        together need one request.
        """
        late.look_up()
        owners = [*late.owners, *((one.address, one.epoch) for one in late.names.values())]
        if not all(self._owners.find(*owner) for owner in owners):
            return False
        if not late.names:
            return True
        last = None if self._asked is None else self._asked()
        if last is not None and not last.ended:
            return False
        self._asked = ref(pull)
        return self._finder.find_now(late)

    def _checked(
        self,
        options: CopyOptions | None,
        by_layer: bool,
        overlap: Overlap,
        max_thread_blocks: int | None,
        max_gbps: float | None,
    ) -> CopyOptions:
        """Return the options of a pull that takes ``options`` or `OPTIONS` as keywords."""
        usual = by_layer is False and max_thread_blocks is None and max_gbps is None
        if options is None and usual and isinstance(overlap, str) and overlap in PLAIN:
            return PLAIN[overlap]
        keywords = by_layer, overlap, max_thread_blocks, max_gbps
        checked = options_from(options, dict(zip(OPTIONS, keywords, strict=True)))
        checked.check_only("a pull", OPTIONS)
        if checked.max_gbps is not None:
            arguments.rate("max_gbps", checked.max_gbps)
        return checked

    def _check_open(self) -> None:
        """Raise `PeerError` after `close`, and `TransferError` in a forked process."""
        if self._closed:
            raise closed_reader()
        if self.channel.forked:
            raise TransferError(
                "Expected a graph that is open, got one that belongs to the process that this one "
                "was forked from. Make another."
            )

    def prepare(self, address: str) -> PartTransfer:
        """Connect to the owner at an address, and map its memory, in the background.

        The first pull of that owner then waits for no handshake. The result ends with the
        connection, and raises the errors of `pull` that are about owners. An owner that took the
        place of another on one channel counts as connected, and its first pull connects to it.

        The first copy of a process on a device also imports and chooses a backend, in the caller's
        thread: the first pull then takes 25 ms longer on a CPU. Make another copy on the reader's
        device beforehand, such as `copy_blocks` of one block, if the first pull must be quick.
        """
        arguments.text("address", address)
        self._check_open()
        return PartTransfer([runtime().start(self._owners.prepare(address))])

    def extend(self, ticket: bytes, seconds: float, *, timeout: float | None = None) -> float:
        """Have the owner of a ticket keep its offer for ``seconds`` from now on; return the seconds
        for which the owner does, at most to the offer's ``max_lease``.

        Blocks until the owner answers, for at most ``timeout`` seconds, handshake included. None:
        the timeout of the channel. The call waits so long only if the owner's process is stopped or
        busy, or its host does not answer: a process that has ended is detected in 0.1 s.

        A ticket by name has no lease yet. A pull of it renews the lease of the offer that it finds.

        Raises:
            InvalidTerms: a ticket by name.
            OfferGone: the offer has ended.
            TransferTimeout: no answer in time, of the owner or in another thread's handshake with
                it.
            PeerError, LayoutError, Unsupported: no connection to the owner, as for `pull`.
        """
        limits = "a number of seconds from 0 to 10^6"
        seconds = arguments.number("seconds", seconds, 0.0, 1e6, limits)
        limit = self.channel.timeout
        if timeout is not None:
            limit = arguments.seconds("timeout", timeout)
        self._check_open()
        return runtime().run(self._owners.extend, ticket, seconds, monotonic() + limit)

    def explain(self, tickets: bytes | Sequence[bytes]) -> str:
        """Return a line for each ticket: how its rows would be copied, and why.

        Raises as `pull` about owners and about a reader that is closed.
        """
        self._check_open()
        lines = list[str]()
        for ticket, owner, _ in runtime().run(self._owners.resolve, listed(tickets)):
            how = "one launch for each piece reads the rows in the owner's memory"
            if owner.why_not_mapped:
                transport = owner.staging.transport
                how = f"{transport.name} sends the rows through staging buffers: "
                how += f"{owner.why_not_mapped} ({transport.why})"
            lines.append(f"{owner.address}, {ticket.tokens} tokens: {how}.")
        return "\n".join(lines)

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write when owners have sent rows last, and the last choices of an encoding, for Perfetto
        or Chrome.

        Raises:
            InvalidTerms: not a path.
            TransferError: the file cannot be written.
        """
        self._trace.write(path, TransferError)

    def finished(self) -> list[Pull]:
        """Return the pulls that have ended since the last call, in the order of their ends.

        The first call returns none: nothing is kept before it. At most 65,536 pulls are kept.
        """
        return self._housekeeper.finished.take()

    def finished_fd(self) -> int:
        """Return the descriptor that is readable while `finished` has pulls; -1 after `close`.

        For ``select``, ``epoll`` and event loops. Do not read or close it.
        """
        return self._housekeeper.finished.fileno()

    def statistics(self) -> dict[str, int]:
        """Return the numbers of pulls that are in flight or not reported to their owners yet
        (``pulls``), of pulls that were committed and that failed, and of owners now."""
        ends = self._housekeeper.ends
        return {
            "pulls": len(self._housekeeper.pulls),
            "committed": ends["committed"],
            "failed": ends["failed"],
            "owners": len(self._owners),
        }

    def figures(self) -> Figures:
        """Return figures by the names of metrics."""
        return self._housekeeper.figures(len(self._owners))

    def close(self) -> None:
        """Release all owners.

        Waits for pulls in flight, and cancels them early enough to return within ten seconds.
        """
        self._housekeeper.wait(PATIENCE)
        self._closed = True
        self._housekeeper.close()
        self._owners.cancel()
        runtime().run(self._owners.close)
        self.channel.free("a reader", self)


# ------------------------------------------------------------------------------------------------
# Pulls that wait: for owners that are not connected, for offers by name, and for rows that are
# not complete.
#
# A caller looks into the tables of owners on this host. It asks the other owners, for a moment:
# most offers exist by then, and each thread that has to wake costs as much as a small pull. For
# offers that do not exist yet the reader's `Housekeeper` asks the owners which of the names they
# have offered, all names of one owner in one request. It asks in the same way for marks, and
# wakes the coroutines of pulls that need not wait any longer.

ASKING = 0.1  # the most seconds that a question may take, since other pulls wait meanwhile
PAUSE = 4e-3  # seconds between two questions to an owner about the same

#: The most seconds for which a call waits for the answers of owners.
MOMENT = 1e-3
#: Seconds without a question by a call, to an owner that did not answer one in time.
LATE = 0.05


def incomplete(sources: Sources) -> bool:
    """Return True if rows of some offers are not complete, as far as this process can see."""
    for source in sources:  # noqa: SIM110 - each pull asks; a generator is two more calls
        if source.ticket.progress and source.mark < source.end:
            return True
    return False


class _Asked(NamedTuple):
    """A name or an offer of a pull, of which only its owner can say more, and its place."""

    late_pull: LatePull
    at: int
    subject: Named | Ticket


class Finder:
    """Connects to owners, and asks them for the offers of names and for marks. One coroutine calls
    it; any thread may call `find_now`.

    Args:
        owners: of the reader.
    """

    def __init__(self, owners: Connections) -> None:
        self._owners = owners
        # Owners that get no question now, with the kind of the answer, or with `Named` for a
        # question by a call. The value is True if the owner was late with its last answer.
        self._asked: Until[tuple[OwnerKey, type]] = Until(
            "owners of offers by name or with marks", 3072
        )

    def find_now(self, late_pull: LatePull) -> bool:
        """Ask the owners of a pull's names, which are connected, and wait for a moment; return True
        if all offers exist. What else they answer, they answer again to `look`."""
        by_owner = _names_by_owner([late_pull])
        late = any(self._asked.holds((owner, Named)) for owner in by_owner)
        if late or len(late_pull.names) > MOST_NAMES:
            return False
        requests = [(owner[0], _request(owner[1], some)) for owner, some in by_owner.items()]
        kind: Any = Found | Answer
        answers = self._owners.channel.ask_all(requests, kind, MOMENT)
        for (owner, some), answer in zip(by_owner.items(), answers, strict=True):
            if isinstance(answer, TransferTimeout):
                self._asked.hold((owner, Named), LATE)
            elif isinstance(answer, Found) and len(answer.tickets) == len(some):
                self._asked.hold((owner, Found), PAUSE, False)
                for each, ticket in zip(some, answer.tickets, strict=True):
                    if ticket:
                        late_pull.take(each.at, ticket)
        return not late_pull.names

    async def look(self, waiting: Sequence[LatePull]) -> None:
        """Connect to the owners of pulls that wait, ask for their names and marks, and wake the
        coroutines of pulls that can go on."""
        marks = defaultdict[OwnerKey, list[_Asked]](list)
        for late_pull in waiting:
            for owner in [*late_pull.owners]:
                if self._owners.find(*owner):
                    del late_pull.owners[owner]
                else:
                    self._connect(owner, late_pull)
            for at, (ticket, _, word) in enumerate(late_pull.sources):
                if word is None:  # also of complete offers, which may end meanwhile
                    marks[ticket.address, ticket.epoch].append(_Asked(late_pull, at, ticket))

        due = {owner: some for owner, some in marks.items() if self.is_due(owner, Marked)}
        await self._ask(Found, self._due_names(_names_by_owner(waiting)))
        await self._ask(Marked, due)
        for late_pull in waiting:
            late_pull.look()

    def _due_names(
        self, names: Mapping[OwnerKey, Sequence[_Asked]]
    ) -> dict[OwnerKey, Sequence[_Asked]]:
        """Return the names that connected owners may get a question about now; connect to the other
        owners."""
        due = dict[OwnerKey, Sequence[_Asked]]()
        for owner, some in names.items():
            anyone = owner[0], ANY  # also an owner of another epoch answers
            if not self._owners.find(*anyone):
                for each in some:
                    self._connect(anyone, each.late_pull)
            elif self.is_due(owner, Found):
                due[owner] = some
            elif self.is_due(owner, Found, first=True):
                due[owner] = [each for each in some if not each.late_pull.queried]
        return due

    def _connect(self, owner: OwnerKey, late_pull: LatePull) -> None:
        """Connect to an owner that a pull waits for; stop the pull if that failed."""
        error: PortaKVError | None = None
        attempt = late_pull.attempts.get(owner)
        if attempt is None:
            late_pull.attempts[owner] = self._owners.begin(owner)
        elif attempt.handle.done():
            del late_pull.attempts[owner]
            # A pull does not end with a handshake that began before it: the next look begins
            # another. So does a pull whose owner's address has another epoch.
            if attempt.began >= late_pull.since:
                error = attempt.error
        if isinstance(error, OfferGone) and owner in late_pull.owners:
            # The owner answers. The pull gets the same answer when it begins, and the error names
            # its offer.
            del late_pull.owners[owner]
        elif error is not None:
            late_pull.pull.stop(error)

    def is_due(self, owner: OwnerKey, kind: type, first: bool = False) -> bool:
        """Return True if an owner may get a question now.

        ``first``: about something for the first time, which waits for a late owner alone.
        """
        late = self._asked.held((owner, kind))
        return late is None or (first and not late)

    async def _ask(
        self, kind: type[Found | Marked], by_owner: Mapping[OwnerKey, Sequence[_Asked]]
    ) -> None:
        """Ask owners, all at a time, for tickets or marks, and take the answers."""
        batches = [
            (owner, some[first : first + MOST_NAMES])
            for owner, some in by_owner.items()
            for first in range(0, len(some), MOST_NAMES)
        ]
        if not batches:
            return
        requests = [(owner[0], _request(owner[1], some)) for owner, some in batches]
        kinds: Any = kind | Answer
        answers = await self._owners.channel.answers(requests, kinds, ASKING)
        for (owner, some), answer in zip(batches, answers, strict=True):
            late = isinstance(answer, TransferTimeout)
            self._asked.hold((owner, kind), BUSY if late else PAUSE, late)
            for each in some:
                each.late_pull.queried = True
            if not late:
                _take(answer, some)


def _names_by_owner(waiting: Sequence[LatePull]) -> dict[OwnerKey, list[_Asked]]:
    """Return the names that pulls wait for."""
    names = defaultdict[OwnerKey, list[_Asked]](list)
    for late_pull in waiting:
        for at, named in late_pull.names.items():
            names[named.address, named.epoch].append(_Asked(late_pull, at, named))
    return names


def _request(epoch: bytes, some: Sequence[_Asked]) -> Find | Marks:
    """Return the request for the tickets of names, or for the marks of offers."""
    names = [each.subject.name for each in some if isinstance(each.subject, Named)]
    offers = [each.subject.offer for each in some if isinstance(each.subject, Ticket)]
    return Find(epoch, tuple(names)) if names else Marks(epoch, tuple(offers))


def _take(answer: Any, some: Sequence[_Asked]) -> None:
    """Keep the tickets or marks of an answer; stop the pulls of offers that do not hold."""
    if isinstance(answer, Answer):
        for each in some:
            each.late_pull.pull.stop(each.subject.gone(answer.why))
        return
    error = answer
    if isinstance(answer, Found | Marked):
        found = isinstance(answer, Found)
        values: Sequence[bytes | int] = getattr(answer, "tickets" if found else "marks")
        if len(some) == len(values) == len(answer.why):
            for each, value, why in zip(some, values, answer.why, strict=True):
                if why:
                    each.late_pull.pull.stop(each.subject.gone(why))
                elif value:
                    each.late_pull.take(each.at, value)
            return
        subjects, what = ("names", "tickets") if found else ("offers", "marks")
        error = PeerError(
            f"Expected answers for {len(some)} {subjects}, got {len(values)} {what} and "
            f"{len(answer.why)} reasons. Use one release on both sides."
        )
    for each in some:
        each.late_pull.pull.stop(error)
