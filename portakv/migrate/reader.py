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
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from operator import is_
from time import monotonic
from typing import NamedTuple
from weakref import ref

import torch

from portakv import arguments
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import USUAL, CopyOptions, Overlap, options_from
from portakv.errors import (
    PackOverflow,
    PortaKVError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.graph.trace import Trace
from portakv.migrate.channel import Channel
from portakv.migrate.connections import (
    Connections,
    Source,
    Sources,
    closed_reader,
    listed,
)
from portakv.migrate.crossed import Crossed, Encoding, Pack, is_auto, pack_of
from portakv.migrate.figures import PullCounts
from portakv.migrate.messages import Begin, Close, Message, Renew, any_named
from portakv.migrate.named import PAUSE, Finder, LateLayer, Wanted, incomplete
from portakv.migrate.plan import (
    Step,
    check_arguments,
    check_packed,
    copy_checked,
    count_blocks,
    indices_of,
    planned,
)
from portakv.migrate.pull import CANCELLED, Ending, PartTransfer, Pull, known
from portakv.migrate.shards import Shard
from portakv.migrate.staged_reader import StagedReceiver, verified
from portakv.runtime import tracing
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.finished import Finished
from portakv.runtime.interrupts import shielded
from portakv.runtime.streams import StreamFence, ignore_captures_elsewhere, own_stream
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
    ended: bool = False  # reported to this process, perhaps not to all owners yet
    span: tracing.Began = field(default_factory=tracing.begin)


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
        #: The pulls that have ended, for `Reader.finished`; and what they have brought.
        self.finished: Finished[Pull] = Finished()
        self.counts = PullCounts()
        self._device = device
        self._runtime = runtime()
        #: Finds offers by their names, and marks; None before the first pull that waits.
        self.finder: Finder | None = None
        self._most = LOOK  # seconds between two looks; less if a pull waits for a name or a mark
        self._pulls = dict[Pull, _Watched]()
        self._busy = dict[str, float]()  # addresses, with the time of the next message
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

    def figures(self, owners: int) -> dict[str, list[dict[str, str | float]]]:
        """Return the figures of a reader that has so many owners; see `Reader.figures`."""
        ages = [pull.age for pull in self.pulls if not pull.ended]
        return {
            "pulls_in_flight": [{"value": len(ages)}],
            "pull_oldest_seconds": [{"value": max(ages, default=0.0)}],
            "pull_owners": [{"value": owners}],
            **self.counts.figures(),
        }

    def add(self, pull: Pull) -> None:
        """Look after a pull from now on."""
        self._pulls.setdefault(pull, _Watched(monotonic()))
        waits = pull.requested.wanted is not None
        if self._parked or self.finished.started or waits:
            self.wake()

    def wake(self) -> None:
        """Have the coroutine look immediately; begin it at the first call."""
        self._wakes.look()
        if not self._begun:
            self._begin()

    def report(self) -> None:
        """Have the coroutine look soon, for a pull that has ended; begin it at the first call."""
        self._wakes.end()
        if not self._begun:
            self._begin()

    def note_connection(self) -> None:
        """Have the coroutine look at pulls that may wait for the end of a handshake."""
        if self._pulls:
            self._wakes.look()

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
        """Begin the coroutine in the loop. An interrupted call is made again."""
        self._runtime.call_soon(self._begin_here)
        self._begun = True

    def _begin_here(self) -> None:
        if self._steps is None:
            atexit.register(self.close)
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
        try:
            pulls = [*self._pulls.items()]
        except RuntimeError:  # a pull was added meanwhile; the next look is soon
            return True
        try:
            await self._find([pull for pull, _ in pulls])
        except Exception:  # one answer must not stop the others' pulls
            _log.exception("The offers and marks of pulls that wait could not be found.")
        for pull, watched in pulls:
            try:
                # A caller that waits for a pull notices its end, and needs the interpreter then.
                if pull.concluded or (not pull.has_waiter and self._has_ended(pull)):
                    await self._report_end(pull, watched)
                else:
                    await self._look_after(pull, watched)
            except Exception as error:  # one pull must not stop the others
                _log.exception("A pull failed.")
                pull.stop(TransferError(f"The pull failed: {error!r}."))
        return bool(pulls)

    def _has_ended(self, pull: Pull) -> bool:
        """Return True if a pull has ended; torch may have locks."""
        with self._runtime.released():
            return pull.look()

    async def _find(self, pulls: list[Pull]) -> None:
        """Ask for the offers and marks that pulls wait for, and wake the coroutines of these
        pulls."""
        waiting = list[Wanted]()
        for pull in pulls:
            wanted = pull.requested.wanted
            if wanted is None:
                continue
            pull.stop_after_failure()
            if pull.over or self.leaves:
                wanted.go_on()
            else:
                waiting.append(wanted)
        self._most = PAUSE if waiting else LOOK
        if any(wanted.known for wanted in waiting):
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
            pull.requested.quiet = ()
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
        requested = pull.requested
        self.counts.add(requested.strategy[0], int(requested.nbytes), pull.published, pull.age)
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
        wanted = pull.requested.wanted
        # The pull's own coroutine renews the others if the pull does not wait.
        shared = [each for each in pull.sources if wanted is not None or each.word is not None]
        if not watched.begun and now >= watched.began + min(BEGIN, _third(shared)):
            watched.begun = wanted is None or pull.requested.pieces > 0  # else it has not begun
            watched.renew = now + _third(shared)
            for source in pull.requested.quiet:
                await self._tell(source, Begin(source.ticket.epoch, source.ticket.offer))
        elif watched.begun and now >= watched.renew:
            watched.renew = now + _third(shared)
            for source in shared:
                ticket = source.ticket
                await self._tell(source, Renew(ticket.epoch, ticket.offer, ticket.lease))

    async def _tell(self, source: Source, message: Message) -> bool:
        """Send a message to an owner, unless the owner is gone; return False if its connection is
        busy."""
        owner = source.owner
        if owner.gone:
            return True
        if monotonic() < self._busy.get(owner.address, 0.0):
            return False
        self._busy.pop(owner.address, None)
        try:
            await owner.channel.send(owner.address, message, SENDING)
        except TransferTimeout:  # another request waits for an answer by this connection
            self._busy[owner.address] = monotonic() + BUSY
            return False
        except PortaKVError:  # the owner may be gone
            pass
        return True


def _third(sources: list[Source]) -> float:
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


class Issuing:
    """A pull whose plan is made, and whose copies are issued, all together or part by part.

    Raises the errors of `Reader.pull` about rows and blocks.

    Attributes:
        plan: the steps of the whole pull.
    """

    def __init__(self, issuer: Issuer, pull: Pull, request: Request) -> None:
        sources = pull.sources
        self.plan, self._skips = planned(sources, issuer.shards, request.indices, request.first)
        self._issuer = issuer
        self._pull = pull
        self._request = request
        #: The end of each layer of each shard, of a pull by layer.
        self.layers = list[list[PartTransfer]]()
        if request.options.by_layer:
            layers = [shard.view.layers for shard in issuer.shards]
            self.layers = [[PartTransfer() for _ in range(count)] for count in layers]
        self._staged = set[bytes]()  # offers whose owners get requests for rows
        # Both have not begun: those that take rows, and copies by helpers.
        self._takers = list[StagedReceiver]()
        self._calls = list[Handle[None]]()

        for step in self.plan:
            if step.cut.packed:
                check_packed(step, request.verify, request.auto)
        requested = pull.requested
        requested.encoded = request.pack is not None
        requested.nbytes = sum([step.nbytes for step in self.plan])
        # A copy at a rate has a separate thread.
        on_host = issuer.device.type == "cpu"
        self._long = on_host and requested.nbytes > LONG and not request.options.max_gbps
        pull.copies = self._copies = list[BlockTransfer]()
        pull.slices = self._slices = list[Ending]()

    def count_blocks(self) -> None:
        """Count the blocks of the pull, for its statistics."""
        pull = self._pull
        request = self._request
        past = pull.sources[0].ticket.tokens
        blocks = count_blocks(request.indices, request.first, past, self._skips)
        pull.requested.blocks = blocks

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
            self._slices[:] = [each for each in self._slices if not each.done()]
            raise

    def _issue(self, some: Sequence[Step]) -> None:
        pull = self._pull
        options = self._request.options
        requested = pull.requested
        wait_for_events(pull.sources, self._issuer.device)
        staged = dict[bytes, list[Step]]()  # by offers whose owners send the rows
        for step in some:
            if step.cut.src is None:
                staged.setdefault(step.ticket.offer, []).append(step)
                requested.strategy = step.owner.strategy
            elif self._long:
                self._copy_elsewhere(step)
            else:
                copy = _copy_of(step, options, self._rate([step]) if options.max_gbps else None)
                self._copies.append(copy)
                if self.layers:
                    for layer, end in zip(step.cut.layers, copy.layers, strict=True):
                        self.layers[step.cut.group][layer].add(end)
        for steps_of_offer in staged.values():
            self._take(steps_of_offer)
        self._staged |= staged.keys()

    def _take(self, some: Sequence[Step]) -> None:
        """Make the coroutine that takes the rows of an offer from the owner that sends them, at
        their share of the rate."""
        request = self._request
        rate = self._rate(some)
        crossed = Crossed(request.pack, request.auto, inf if rate is None else rate)
        self._pull.requested.crossed.append(crossed)
        taker = StagedReceiver(self._issuer.trace, some, self._pull, rate, crossed)
        self._takers.append(taker)
        for each in taker.arrivals:
            self._add(each.step, each.part.layers, each)

    def _add(self, step: Step, layers: range, ending: Ending) -> None:
        """Let the pull, and some layers of a step, end with work that streams do not order."""
        self._slices.append(ending)
        if self.layers:
            for layer in step.cut.layers[layers.start : layers.stop]:
                self.layers[step.cut.group][layer].endings.append(ending)

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

    def _rate(self, some: Sequence[Step]) -> float | None:
        """Return the share of steps in the rate of the pull; None: it has none."""
        rate = self._request.options.max_gbps
        if rate is None:
            return None
        return rate * sum(step.nbytes for step in some) / self._pull.requested.nbytes

    def end(self) -> bool:
        """Return True if the pull has to wait for its `finish`; False if whoever looks at the pull
        commits it."""
        pull = self._pull
        requested = pull.requested
        requested.quiet = pull.sources
        if self._staged:
            requested.quiet = [x for x in pull.sources if x.ticket.offer not in self._staged]
        # This is set last, for the reader's coroutine.
        requested.pieces = len(self._copies) + len(self._slices)
        return bool(self._slices or self._request.verify or pull.remote)

    async def finish(self) -> None:
        """Begin the work that would block; wait for all rows, verify and commit them."""
        self.begin()
        verifying = self.plan if self._request.verify else ()
        await self._pull.finish([partial(verified, step, self._pull) for step in verifying])

    def _copy_elsewhere(self, step: Step) -> None:
        """Have helpers copy the rows of a step on the host."""
        options = self._request.options
        layers = step.cut.dst.layers
        each = 1 if options.by_layer else layers
        options = replace(options, by_layer=False)
        for start in range(0, layers, each):
            some = range(start, start + each)
            copy = partial(_copy_layers, step, some, self._pull, options)
            call = Handle(runtime(), blocking().work(copy))
            self._calls.append(call)
            self._add(step, some, call)


def _copy_of(step: Step, options: CopyOptions, rate: float | None) -> BlockTransfer:
    """Copy the rows of a step, at its share of the rate."""
    if rate is not None:
        options = replace(options, max_gbps=rate)
    return copy_checked(
        step.src, step.cut.dst, step.src_index, step.dst_index, step.tokens, options
    )


def _copy_layers(step: Step, layers: range, pull: Pull, options: CopyOptions) -> None:
    """Copy layers of a step between views on the host."""
    if pull.over:
        raise TransferCancelled(CANCELLED)
    window = slice(layers.start, layers.stop)
    try:
        with torch.inference_mode(False):
            src = step.src.slice(layers=window)
            dst = step.cut.dst.slice(layers=window)
            indices = step.src_index, step.dst_index
            copy_checked(src, dst, *indices, step.tokens, options).synchronize()
    except PackOverflow:  # the rows of the other copies are moved
        raise
    except BaseException as error:
        pull.stop(known(error) or TransferCancelled(CANCELLED))  # no mark is waited for
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

    def has(self, layer: int) -> bool:
        """Return True if a layer of the reader's view needs no further part of the step."""
        if layer not in self.step.cut.layers:
            return True
        reached = self.step.cut.layers.index(layer) if self.unit == "layers" else self.end - 1
        return reached < self.reached


class LatePull(Wanted):
    """A pull that waits. Its copies are issued as its offers exist and become complete.

    Attributes:
        after: orders its copies after the stream of the caller; set when the pull begins to wait.
    """

    def __init__(self, issuer: Issuer, pull: Pull, tickets: list[bytes], request: Request) -> None:
        super().__init__(tickets)
        self._issuer = issuer
        self.pull = pull
        self._request = request
        options = request.options
        self.whole = not options.by_layer or options.max_gbps is not None
        self.after: StreamFence | None = None
        self._issuing: Issuing | None = None
        self._reaches = list[_Reach]()
        self._settled = set[LateLayer]()  # layers of which all parts are issued
        if options.by_layer:
            layers = sum(shard.view.layers for shard in issuer.shards)
            pull.layers = [LateLayer() for _ in range(layers)]

    def plan(self, sources: Sources) -> Issuing:
        """Plan the copies of the pull, whose sources are known; raise as `Reader.pull`."""
        self.pull.sources = sources
        issuing = self._issuing = Issuing(self._issuer, self.pull, self._request)
        issuing.count_blocks()
        self._reaches = [_Reach(step) for step in issuing.plan]
        self.know(sources)
        return issuing

    def prepare(self) -> None:
        """Have the pull continue after the work of the caller's stream, and say what it waits for.
        Runs in the caller's thread."""
        self.after = StreamFence(self._issuer.device)
        if self.known:
            self._note_begin()
        self.pull.requested.wanted = self

    def stop(self, error: PortaKVError) -> object:
        return self.pull.stop(error)

    def go_on(self) -> None:
        self.pull.go_on()

    async def run(self) -> None:
        """Wait for the owners, the offers and the rows; issue the copies, and commit what has to
        wait.

        The reader's coroutine finds what the pull waits for, and wakes this one.
        """
        pull = self.pull
        issuer = self._issuer
        try:
            await Wait(until=0.0)  # the rest runs in the loop
            if not self.known:
                await pull.changes.wait_for(self._goes_on)
                sources = await issuer.owners.resolve(self.tickets, pull.until)
                self._check()  # also while the owners were resolved
                await blocking().work(self._issue, sources)
            while not self._is_issued:
                await pull.changes.wait_for(self._goes_on)
                await blocking().work(self._issue)
            pull.requested.wanted = None
            assert self._issuing is not None  # `plan` has set it
            if self._issuing.end():
                await self._issuing.finish()
        except (Exception, CancelledError) as error:
            pull.requested.wanted = None
            await pull.fail(error)
        issuer.housekeeper.wake()

    def _goes_on(self) -> bool:
        """Return True if the pull may go on; raise if it was stopped, or if the reader closes."""
        self._check()
        return self.may_go_on

    def _check(self) -> None:
        if self.pull.over or (self._issuer.housekeeper.leaves and not self.may_go_on):
            raise TransferCancelled(CANCELLED)

    @property
    def _is_issued(self) -> bool:
        """Return True if all copies are issued, and all rows are complete: rows that this reader
        does not need may still be written until then."""
        return self.complete and all(each.reached == each.end for each in self._reaches)

    def _issue(self, sources: Sources | None = None) -> None:
        """Issue what the marks allow, in a thread that may block; plan the pull before.

        ``sources``: of a pull that is not planned yet.
        """
        assert self.after is not None  # `prepare` has set it
        with torch.inference_mode(False), self.after.inside():
            if sources is not None:
                self.plan(sources)
                if incomplete(sources):
                    self._note_begin()
                    self._issuer.housekeeper.wake()  # to look at the marks
                self.read_marks()
            assert self._issuing is not None
            self._issuing.issue([*self._parts()])
        if not self._is_issued:
            self._issuing.begin()
        self._settle(self._issuing)

    def _parts(self) -> Iterator[Step]:
        """Yield the parts that have become complete, by the marks of the sources."""
        marks = self.take_marks()
        if self.whole and not self.complete:
            return
        for each in self._reaches:
            part = each.part(marks[each.step.cut.piece.owner])
            if part is not None:
                yield part

    def _note_begin(self) -> None:
        """Have the reader's coroutine report the pull to the owners as begun."""
        self.pull.requested.quiet = self.pull.sources
        self.pull.requested.pieces = 1

    def _settle(self, issuing: Issuing) -> None:
        """Let the layers of which all copies are issued end with these."""
        promises = iter(self.pull.layers)
        for group, shard in enumerate(self._issuer.shards if self.pull.layers else ()):
            reaches = [each for each in self._reaches if each.step.cut.group == group]
            for layer in range(shard.view.layers):
                promise = next(promises)
                if not isinstance(promise, LateLayer) or promise in self._settled:
                    continue
                if all(each.has(layer) for each in reaches):
                    promise.settle(issuing.layers[group][layer])
                    self._settled.add(promise)


# ------------------------------------------------------------------------------------------------
# Begin pulls: immediately if their owners are connected and their offers exist, else when they do;
# see `named`.


class Issuer:
    """Begins the pulls of one reader."""

    def __init__(self, owners: Connections, housekeeper: Housekeeper) -> None:
        #: The rows that owners have sent, and choices of an encoding.
        self.trace = Trace(TRACED)
        self.owners = owners
        self.housekeeper = housekeeper
        self.shards = owners.shards
        self.device = owners.device
        self._runtime = runtime()
        owners.on_handshake = housekeeper.note_connection
        self._finder = Finder(owners)
        housekeeper.finder = self._finder
        #: The pull of the last call that has asked owners itself.
        self._asked: ref[Pull] | None = None
        self._stream: torch.Stream | None = None

    def pull(self, tickets: list[bytes], request: Request, until: float) -> Pull:
        """Return a pull whose copies were issued if its owners are connected, its offers exist and
        their rows are complete; else one that waits, and then begins after the caller's stream.

        The call raises the errors of its arguments, and of a pull of plain tickets that it begins
        itself. Any other pull ends with those of its owners and rows.
        """
        pull = Pull((), until, self.housekeeper.report)
        pull.in_call = True  # another call may have it meanwhile
        steps = self._pull(pull, tickets, request)
        try:
            try:
                wait = steps.send(None)
            except StopIteration:
                pull.in_call = False
                if self.device.type == "cpu":  # without a rate its copies have ended
                    pull.look()
                return pull
            pull.steps = Handle(self._runtime, steps)
            pull.in_call = False
            self.housekeeper.add(pull)
            pull.steps.follow(wait)
        except BaseException:  # the caller does not get the handle of the copies in flight
            pull.in_call = False
            if pull.steps is not None:
                pull.steps.abandon()
            pull.drop()
            raise
        return pull

    async def _pull(self, pull: Pull, tickets: list[bytes], request: Request) -> None:
        """Begin a pull, and go on with it as long as it has to wait. This is the way of a pull.

        The step until the first wait runs in the caller's thread.
        """
        named = any_named(tickets)
        sources = None if named else self.owners.resolve_connected(tickets)
        if sources is not None and not incomplete(sources):
            pull.sources = sources
            await self._finish(self._issued(pull, request), pull)
            return

        if sources is None and not named:
            check_arguments(tickets, self.shards, request.indices, request.first)
        late = LatePull(self, pull, tickets, request)
        if sources is not None:
            late.plan(sources)
        elif self._exist(late) and await self._issue_found(late, pull, request):
            return
        late.prepare()
        await late.run()

    async def _issue_found(self, late: LatePull, pull: Pull, request: Request) -> bool:
        """Issue a pull by name whose offers exist; return False if its rows are not complete.

        The pull ends by the errors of its owners and rows.
        """
        try:
            sources = self.owners.resolve_connected(late.tickets)
            if sources is None:  # an owner has just gone
                return False
            if incomplete(sources):
                late.plan(sources)
                return False
            pull.sources = sources
            with torch.inference_mode(False), self.apart(sources):
                issuing = self._issued(pull, request)
        except PortaKVError as error:
            pull.stop(error)
            self.housekeeper.add(pull)
            await pull.fail(error)
            return True
        await self._finish(issuing, pull)
        return True

    def _issued(self, pull: Pull, request: Request) -> Issuing:
        """Issue the copies of a pull whose rows are complete."""
        issuing = Issuing(self, pull, request)
        issuing.issue(issuing.plan)
        issuing.count_blocks()  # what no copy needs comes after the copies
        pull.layers = [layer for layers in issuing.layers for layer in layers]
        return issuing

    async def _finish(self, issuing: Issuing, pull: Pull) -> None:
        """Have a pull looked after. If it has to wait, do so and commit the rows."""
        if not issuing.end():
            self.housekeeper.add(pull)
            return
        try:
            await Wait(until=0.0)  # the rest runs in the loop
            await issuing.finish()
        except (Exception, CancelledError) as error:
            await pull.fail(error)

    def prepare(self, address: str) -> PartTransfer:
        """Connect to the owner at an address, and return the end."""
        return PartTransfer([self._runtime.start(self.owners.prepare(address))])

    def _exist(self, late: LatePull) -> bool:
        """Return True if the offers of a pull by name exist, as their owners' tables or the owners
        say, and all owners are connected."""
        late.look_up(self.owners)
        if not all(self.owners.find(*owner) for owner in late.owners):
            return False
        return not late.names or (self._may_ask(late) and self._ask(late))

    def _may_ask(self, late: LatePull) -> bool:
        """Return True if a call may ask owners itself: they are connected, and the pull of the last
        such call has ended, so that many pulls that begin together need one request."""
        last = None if self._asked is None else self._asked()
        if last is not None and not last.ended:
            return False
        return all(self.owners.find(one.address, one.epoch) for one in late.names.values())

    def _ask(self, late: LatePull) -> bool:
        """Ask the owners of a pull's names for a moment; return True if all offers exist."""
        self._asked = ref(late.pull)
        try:
            return self._finder.find_now(late)
        except BaseException:  # an interrupt: the next call does not wait for this pull
            self._asked = None
            raise

    def apart(self, sources: Sources) -> AbstractContextManager[object]:
        """Make a private stream current, after the caller's, if an owner's device still writes the
        rows: the caller's stream must not wait for another process."""
        if not late_events(sources):
            return nullcontext()
        if self._stream is None:
            self._stream = own_stream(self.device)
        return StreamFence(self.device).on(self._stream)


#: The options that a pull takes.
OPTIONS = ("by_layer", "overlap", "max_thread_blocks", "max_gbps")
USUAL_TERMS = (USUAL.by_layer, USUAL.overlap, USUAL.max_thread_blocks, USUAL.max_gbps)

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
        self._housekeeper = Housekeeper(self.device)
        self._issuer = Issuer(self._owners, self._housekeeper)
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
        if capturing(self.device):
            raise refuse_capture("A pull", "it waits for the end of its copies; pull outside")
        self._check_open()
        seconds = arguments.FOREVER
        if timeout is not None:
            seconds = arguments.seconds("timeout", timeout, optional=True)
        until = monotonic() + seconds
        pack = pack_of(encoding)
        indices = indices_of(self.shards, blocks)
        request = Request(indices, first, options, verify, pack, is_auto(encoding))
        return self._issuer.pull(listed(tickets), request, until)

    def _checked(self, options: CopyOptions | None, *keywords: object) -> CopyOptions:
        """Return the options of a pull that takes ``options`` or `OPTIONS` as keywords."""
        if options is None and all(map(is_, keywords, USUAL_TERMS)):
            return USUAL
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
        return self._issuer.prepare(address)

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
        self._issuer.trace.write(path, TransferError)

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
        ends = self._housekeeper.counts.ends
        return {
            "pulls": len(self._housekeeper.pulls),
            "committed": ends["committed"],
            "failed": ends["failed"],
            "owners": len(self._owners),
        }

    def figures(self) -> dict[str, list[dict[str, str | float]]]:
        """Return figures by the names of metrics, in the form of `Graph.statistics`."""
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
