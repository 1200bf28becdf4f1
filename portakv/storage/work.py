# SPDX-License-Identifier: Apache-2.0
"""Blocking work of block stores: tasks, queues in whose turn they run, and handles of their ends.

Helpers run tasks in the order of their queues. What follows tasks is written as coroutines, which
go on in the thread that ends a task.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import count
from traceback import clear_frames
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import torch

from portakv import arguments, tasks
from portakv.errors import PortaKVError, TransferCancelled, TransferError
from portakv.graph.trace import Figures, Ran, Samples, Trace
from portakv.runtime.streams import ignoring_captures
from portakv.runtime.transfer import Completion, Pending, Statistics, Transfer
from portakv.runtime.transfer import Mask as Mask
from portakv.tasks import SLACK, Limit, Priority, Runtime, Signal, Turn, Wait, Work
from portakv.tasks.runtime import EXIT

T = TypeVar("T")
E = TypeVar("E", bound="End")

#: How blocks that do not land are reported: the end raises, or it does not.
Missing: TypeAlias = Literal["raise", "skip"]
#: How a task ends that did not run.
Unrun: TypeAlias = Literal["cancelled", "late", "dropped"]
#: Figures of queues, and their attributes.
QUEUE_FIGURES = {
    "queue_bytes": "queued_bytes",
    "queue_ran_bytes_total": "ran_bytes",
    "queue_oldest_seconds": "oldest_wait",
    "queue_slow": "slow",
}


class End(tasks.End[None]):
    """The end of work for some blocks, which changes in steps of its runtime.

    A coroutine of the runtime awaits it, which raises nothing, and any thread waits for it.

    Attributes:
        name: the operation.
        blocks: their number.
        state: how it ended; of a task also how far it is, see `Task.state`.
        ended: True after the end.
        cut: True if no block starts any more: the work has ended or is cancelled.
        error: the first exception of the work, or of work before it.
        landed: the blocks that landed, bool ``[blocks]``, which are known after the end.
        stop_work: cancels the work before the end: it takes the state and the error of work that
            has not started, and returns True if there is such work.
        trail: the numbers of the last tasks that ran for it, for the trace.
        short: of a save, the queue that did not take all blocks, without an error; else empty.
    """

    def __init__(self, runtime: Runtime, blocks: int, name: str = "") -> None:
        super().__init__(runtime)
        self.runtime = runtime
        self.name = name
        self.blocks = blocks
        self.state = "new"
        self.cut = False
        self.landed: Mask = np.zeros(blocks, np.bool_)
        self.stop_work: Callable[[str, Exception], bool] | None = None
        self.trail: tuple[int, ...] = ()
        self.short = ""

    def add_error(self, error: BaseException | None) -> None:
        """Record an error, unless an earlier one is known."""
        self.error = self.error or error

    def wake_first(self, wait: Wait) -> None:
        """Wake a coroutine at the end before all others, which look at what follows the work."""
        self._calls.appendleft(wait.wake)

    def __await__(self: E) -> Generator[Wait, None, E]:  # type: ignore[override]
        if not self.ended:
            wait = Wait(here=True)
            self.on_end(wait.wake)
            yield from wait.__await__()
        return self

    def cancel(self, state: Unrun = "cancelled") -> bool:
        """Cancel a task that does not run, or the work before another end; return True if some
        blocks will not be moved."""
        if self.runtime.process.forked:  # the lock may be held for ever
            return False
        why = {"late": ": increase the deadline", "dropped": ": staging was full or the queue slow"}
        kind = TransferCancelled if state == "cancelled" else TransferError
        error = kind(f"Some blocks had not started and are {state}{why.get(state, '')}.")
        return self.runtime.change(partial(self.stop, state, error))

    def stop(self, state: str, error: Exception) -> bool:
        """Do what `cancel` does, with an error, in a step."""
        if self.cut:
            return False
        self.cut = True
        if state == "late":
            self.add_error(error)
        return self.stop_work is not None and self.stop_work(state, error)

    def cancel_at(self, when: float) -> None:
        """Cancel work as late at a time; in a step."""
        if when <= self.runtime.time():
            self.cancel("late")
        else:
            self.runtime.start(self.cancel_later(when))

    async def cancel_later(self, when: float) -> None:
        """Cancel work as late if it has not ended at a time."""
        wait = Wait(until=when)
        self.on_end(wait.wake)
        if not await wait:
            self.cancel("late")

    def finish(
        self, landed: Mask | None, state: str = "landed", error: BaseException | None = None
    ) -> None:
        """Record the end with the blocks that landed; None: no block. In a step."""
        self.add_error(error)
        if landed is not None:
            self.landed = landed
        self.state = state
        self.cut = True
        self.stop_work = None  # it retains what a handle need not
        self.settle(None, self.error)

    async def come_after(
        self, parts: Sequence[Ending], eligible: Callable[[], Mask] | None = None
    ) -> None:
        """End after some parts. A block landed if it did in all of its parts.

        ``eligible``: returns the blocks that may have landed, after all parts; None: all.
        """
        for part in parts:
            self.add_error((await part.end).error)
        landed: Mask = np.ones(self.blocks, np.bool_)
        try:
            if eligible is not None:
                landed &= eligible()
        except Exception as error:  # of the maker of the function
            self.add_error(error)
            landed[:] = False
        for part in parts:
            if not part.end.landed.all():
                rows = np.asarray(part.rows, int)
                landed[np.asarray(part.at, int)[~part.end.landed[rows]]] = False
        if not (self.error or landed.all()):
            tasks = [part.end for part in parts if isinstance(part.end, Task)]
            short = (x.queue.name for x in tasks if (x.left > x.landed).any())
            self.short = next(short, "")
        self.finish(landed)


class Ending(NamedTuple):
    """An end of some of the blocks of another end: their numbers there, and their numbers among the
    blocks of this end; without numbers it says nothing of blocks.

    Attributes:
        layers: the layers that it completes.
    """

    end: End
    at: Sequence[int] = ()
    rows: Sequence[int] = ()
    layers: range = range(0)


class Task(End, Turn):
    """Blocking work for some blocks, and its turn in a queue.

    Args:
        work: ``work(task, mask)`` moves the blocks of a mask (bool ``[blocks]``) and returns the
            blocks that landed; None: all of them.
        queue: the queue that runs the task.
        name: the operation, for figures and traces.
        uses: what the work uses until the end of the task.

    Attributes:
        state: new, waiting (for other work), queued or running; then landed (it ran, or no block
            was left for it), failed, cancelled, late or dropped.
        ended, error, landed: of its end, see `End`.
        left: the blocks to move, which are known before the task is queued.
        number: of the task in the order in which tasks were entered.
        due, background, alone: see `Turn`; set ``alone`` before the task is entered.
        soon: a background task that is due as a normal one is, since a caller waits for it; set it
            before the task is entered.
        since: the time since which the task waits for its turn.
        began, lane: when it began to run, and its place in the trace of its queue.
        followed: the numbers of the tasks that ran before it, for the trace.
    """

    def __init__(
        self,
        work: Callable[[Task, Mask], Any],
        blocks: int,
        *,
        queue: BaseQueue,
        nbytes: int = 0,
        name: str = "",
        uses: Any = None,
    ) -> None:
        End.__init__(self, queue.graph.runtime, blocks, name)
        Turn.__init__(self, nbytes=nbytes)
        self.work: Callable[[Task, Mask], Any] | None = work
        self.queue = queue
        self.uses = uses
        self.left: Mask = self.landed
        self.soon = False
        self.since = 0.0
        self.began = 0.0
        self.lane = 0
        self.followed: tuple[int, ...] = ()

    async def move(self, left: Mask, *before: End) -> Mask:
        """Run for the blocks of a mask, if there are any and the task was not cancelled; return the
        blocks that landed. ``before``: what it follows, whose errors are its errors."""
        if not self.ended:
            self.left = left
            trail = dict[int, None]()
            for each in before:
                self.add_error(each.error)
                trail.update(dict.fromkeys(each.trail))
            self.followed = self.trail = (*trail,)
            if left.any():
                await self.queue.run(self)
            else:
                self.finish(left)
        return self.landed

    def hasten(self, due: float) -> None:
        """Be due at a time, if that is sooner: somebody waits for the task. In a step."""
        if self.due > due and not self.ended and self.state != "running":
            self.due = due
            self.background = False
            if self.state == "queued":
                self.queue.push(self)

    def stop(self, state: str, error: Exception) -> bool:
        """End as cancelled, unless the task runs."""
        if self.cut or self.state == "running":
            return False
        if state == "late":
            self.add_error(error)
        self.finish(None, state, error)
        return True

    def finish(
        self, landed: Mask | None, state: str = "landed", error: BaseException | None = None
    ) -> None:
        """Record the end with the blocks that landed, and forget the task."""
        self.queue.graph.forget(self, state)
        self.work = None
        super().finish(landed, state, error)

    def moved(self) -> Mask:
        """Do the work, and return the blocks that landed."""
        assert self.work is not None  # it has not ended
        landed = self.work(self, self.left.copy())
        if landed is None:
            return self.left
        return self.left & np.asarray(landed, np.bool_).reshape(self.blocks)


class BaseQueue(ABC):
    """The queue of a task, which runs it.

    Attributes:
        tier: empty: no figures count its tasks.
        queued_bytes: of tasks that were entered for it and have not ended.
        running: the tasks that run.
    """

    def __init__(self, graph: Graph, name: str, tier: str) -> None:
        self.graph = graph
        self.name = name
        self.tier = tier
        self.queued_bytes = 0
        self.running = set[Task]()

    @property
    def slow(self) -> bool:
        """Return True if a task runs for too long, so that new background tasks are dropped."""
        return False

    @abstractmethod
    def push(self, task: Task, /) -> None:
        """Queue a task, also one that is queued and is due sooner from now on."""

    async def run(self, task: Task) -> None:
        """Queue a task, and wait for its end."""
        self.push(task)
        if not task.ended:
            wait = Wait(here=True)
            task.wake_first(wait)
            await wait

    def begin(self, task: Task) -> None:
        """Note that a task runs."""
        lanes = {running.lane for running in self.running}
        task.lane = next(lane for lane in count(1) if lane not in lanes)
        task.began = self.graph.runtime.time()
        task.state = "running"
        self.running.add(task)

    def finish(self, task: Task, landed: Mask | None, error: BaseException | None = None) -> None:
        """Record the end of a task that runs. A second call does nothing."""
        if task not in self.running:
            return
        self.running.remove(task)
        end = self.graph.runtime.time()
        what = task.number, task.name, task.blocks, task.nbytes, task.followed
        ran = Ran(self.name, task.lane, task.began, end, *what)
        self.graph.trace.add(self.tier, ran, task.began - task.since)
        task.trail = (task.number,)
        task.finish(landed, "failed" if error else "landed", error)


class Queue(Limit, BaseQueue):
    """A queue of tasks of which ``width`` run at a time, which `Graph.queue` makes.

    Attributes:
        max_gbps: the most 10^9 bytes of tasks that start in a second; None: no limit.
        ran_bytes: of tasks that have run.
    """

    def __init__(
        self, graph: Graph, name: str, width: int, max_gbps: float | None, stall_seconds: float
    ):
        BaseQueue.__init__(self, graph, name, name.partition(":")[0])
        Limit.__init__(self, graph.runtime, max(1, width), max_gbps)
        self.stall = stall_seconds
        self.max_gbps = max_gbps
        self.ran_bytes = 0

    @property
    def oldest_wait(self) -> float:
        """Return the seconds that the oldest task has waited for its turn."""
        tasks = [task for task in self.graph.live if task.queue is self and task.state == "queued"]
        return self.graph.clock() - min(task.since for task in tasks) if tasks else 0.0

    @property
    def slow(self) -> bool:
        """Return True if a task has run longer than ``stall_seconds``; new background tasks are
        dropped."""
        now = self.graph.clock()
        return now - min((task.began for task in self.running), default=now) > self.stall

    async def run(self, task: Task) -> None:
        """Run a task in its turn, unless it ends before that."""
        task.state = "queued"
        task.since = self.graph.clock()
        wait = Wait(here=True)
        task.wake_first(wait)
        if not await self.take(task, wait):
            return
        if not task.ended:  # meanwhile
            self.begin(task)
            await self._move(task)
        # The next turn comes after what follows the task is queued, which may be due before others.
        self.graph.runtime.step.follow(partial(self.release, task))

    async def call(self, name: str, work: Callable[..., T], *arguments: object) -> T:
        """Return the result of a call that blocks, which is made in its turn and urgent.

        ``name``: the operation, for figures and traces.
        """
        results = list[T]()
        task = Task(lambda *_: results.append(work(*arguments)), 1, queue=self, name=name)
        self.graph.enter([task], "urgent")
        try:
            await task.move(np.ones(1, np.bool_))
        finally:
            if not task.ended:
                task.cancel()
        if task.error is not None:
            raise task.error
        return results[0]

    async def _move(self, task: Task) -> None:
        landed: Mask | None = None
        error: BaseException | None = None
        try:
            landed = await Work(task.moved)
        except BaseException as caught:  # whoever waits for the task gets it
            clear_frames(caught.__traceback__)  # frames retain views
            error = caught
        self.ran_bytes += task.nbytes
        self.finish(task, landed, error)
        if not self.running:
            self.graph.idle.notify()


class Counts:
    """The blocks and bytes that moved, by tier and operation. Any thread may call.

    ``lock``: of the graph whose tasks move them.
    """

    def __init__(self, lock: AbstractContextManager[object]) -> None:
        self._lock = lock
        self.blocks = Counter[tuple[str, str, str]]()  # by tier, operation and result
        self.nbytes = Counter[tuple[str, str]]()

    def add(self, tier: str, op: str, result: str, blocks: int, nbytes: int) -> None:
        """Count blocks that moved, or did not."""
        with self._lock:
            self.blocks[tier, op, result] += blocks
            self.nbytes[tier, op] += nbytes

    def statistics(self) -> Figures:
        """Return the figures."""
        with self._lock:
            blocks: Samples = [
                {"tier": tier, "op": op, "result": result, "value": n}
                for (tier, op, result), n in self.blocks.items()
            ]
            nbytes: Samples = [
                {"tier": tier, "op": op, "value": n} for (tier, op), n in self.nbytes.items()
            ]
        return {"tier_blocks_total": blocks, "tier_bytes_total": nbytes}


class Graph:
    """The queues and the tasks of a store, or of several stores that share them.

    All is under one ``lock``, that of a runtime, which a caller may hold for a moment. After an
    interrupt of a caller, all tasks are as before the call or as after the whole call: the main
    thread changes them in a helper (`Runtime.change`).

    Coroutines run tasks one after the other, by ``landed = await task.move(mask, before)``.

    Args:
        runtime: runs the coroutines; None: that of the process.
    """

    def __init__(self, trace_events: int = 100_000, runtime: Runtime | None = None):
        arguments.whole("trace_events", trace_events)
        if runtime is not None:
            arguments.instance("runtime", runtime, Runtime, "Pass None for that of the process.")
        self.trace = Trace(trace_events)
        self.runtime = runtime or tasks.runtime()
        self.process = self.runtime.process
        self.clock = self.runtime.time
        self.lock = self.runtime.lock
        self.closed = False
        self.number = 0
        self.queues = dict[str, Queue]()
        self.counts = Counts(self.lock)
        self.live = set[Task]()
        self.idle = Signal(self.runtime)  # a queue has no task that runs
        self.runtime.shut_at_exit.add(self)

    def queue(
        self,
        name: str,
        width: int | None = None,
        max_gbps: float | None = None,
        stall_seconds: float | None = None,
    ) -> Queue:
        """Return the queue of that name, and create it at the first call.

        The part of the name before ":" is the tier.

        Args:
            width: tasks that run at a time; None: the queue's, or 1.
            max_gbps: the most 10^9 bytes in a second; None: the queue's, or no limit.
            stall_seconds: the seconds before `Queue.slow`; None: the queue's, or 10.

        Raises:
            InvalidTerms: wrong terms, or other terms than the queue of that name has.
        """
        arguments.text("name", name, most=1 << 16)
        if width is not None:
            arguments.whole("width", width, 1, 1 << 16)
        if max_gbps is not None:
            arguments.rate("max_gbps", max_gbps)
        if stall_seconds is not None:
            stall_seconds = arguments.seconds("stall_seconds", stall_seconds)
        queue = self.queues.get(name)
        if queue is None:
            stall = 10.0 if stall_seconds is None else stall_seconds
            return self.queues.setdefault(name, Queue(self, name, width or 1, max_gbps, stall))
        terms = {
            "width": (width, queue.width),
            "max_gbps": (max_gbps, queue.max_gbps),
            "stall_seconds": (stall_seconds, queue.stall),
        }
        for term, (value, has) in terms.items():
            if value is not None and value != has:
                do = f"The queue {name!r} has these terms; pass the same, or None."
                raise arguments.invalid(term, str(has), value, do)
        return queue

    def check_open(self) -> None:
        """Raise `TransferError` after `close`, or in a forked process."""
        got = "is closed"
        if self.process.forked:  # the lock may be held for ever
            got = "belongs to the process that this one was forked from"
        elif not self.closed:
            return
        raise TransferError(f"Expected a graph that is open, got one that {got}. Make another.")

    # --- tasks; all under the lock

    def enter(self, tasks: Iterable[Task], priority: Priority) -> None:
        """Register new tasks, which `move` begins later. Drop those of the background whose queue
        is slow."""
        self.check_open()
        now = self.clock()
        background = priority == "background"
        for task in tasks:
            self.number += 1
            task.number = self.number
            task.due = now + SLACK["normal" if task.soon else priority]
            task.background = background
            task.state = "waiting"
            self.live.add(task)
            task.queue.queued_bytes += task.nbytes
            if background and task.queue.slow:
                task.cancel("dropped")

    def forget(self, task: Task, state: str) -> None:
        """Forget a task that has ended."""
        self.live.discard(task)
        queue = task.queue
        queue.queued_bytes -= task.nbytes
        if state != "landed" and queue.tier:
            self.count(queue.tier, task.name, state, task.blocks)

    def count(self, tier: str, op: str, result: str, blocks: int = 1, nbytes: int = 0) -> None:
        """Add to the figures of `statistics`."""
        self.counts.add(tier, op, result, blocks, nbytes)

    def statistics(self) -> Figures:
        """Return figures by their names in Prometheus without "portakv_".

        Each name has a list of samples with labels and a "value". `Collector` also takes other
        figures.
        """
        if self.process.forked:  # its lock may be locked for ever
            return {}
        return self.runtime.change(self._statistics)

    def _statistics(self) -> Figures:
        """Return the figures, under the lock."""
        figures = self.trace.statistics() | self.counts.statistics()
        queues = [*self.queues.values()]
        for name, attribute in QUEUE_FIGURES.items():
            figures[name] = [{"queue": x.name, "value": getattr(x, attribute)} for x in queues]
        return figures

    def close(self, timeout: float = EXIT) -> bool:
        """Cancel tasks that do not run, and wait for running ones; return True if they ended in
        time."""
        timeout = arguments.seconds("timeout", timeout)
        if self.process.forked:
            return True
        self.runtime.change(self.shut)
        self.idle.block(lambda: not any(x.running for x in self.queues.values()), timeout)
        return not self.live

    def shut(self) -> None:
        """Take no more tasks, and cancel those that do not run; under the lock."""
        self.closed = True
        for task in tuple(self.live):
            task.cancel()


#: `Handle.carried` of blocks that helpers move.
STORED = "store", "helpers move the blocks between the caller and the tiers"


class Handle(Transfer):
    """A transfer that ends with the work of a graph, and retains an object until then.

    If blocks did not land, its end raises `TransferError`, unless ``missing="skip"``, or
    `TransferCancelled` if it was cancelled.

    Args:
        end: its end; the name "save" marks a transfer that writes blocks. None: no helper moves a
            block (see `of_issued`).
        layers: the end of each layer, which becomes a handle in the attribute.
        retained: an object to retain until the end.
        excused: blocks that need not land, bool ``[blocks]``.
        why: takes the blocks that landed, and returns why the others did not, or an empty text.
        block_bytes: bytes of each block, for `statistics`.

    Attributes:
        layers: a handle for each layer.
        cancelled: True if some blocks were not moved, because of `cancel`.
        form: the name of the blocks' form, of a store with several forms; else empty.
        released: of a save, the transfer after which nothing reads the caller's blocks: their rows
            are in staging, or are not saved. Its end raises nothing. None for others.
    """

    __slots__ = (
        "_began",
        "_block_bytes",
        "_ended",
        "_ends",
        "_excused",
        "_issued",
        "_issued_blocks",
        "_ordered",
        "_skip",
        "_why",
        "cancelled",
        "form",
        "layers",
        "released",
    )

    def __init__(
        self,
        end: End | None,
        layers: Sequence[End] = (),
        missing: Missing = "raise",
        retained: object = None,
        excused: Mask | bool = False,
        why: Callable[[Mask], str] | None = None,
        block_bytes: int = 0,
    ) -> None:
        ends = () if end is None else (end,)
        super().__init__(
            [Completion(pendings=(cast(Pending, x),), retained=retained) for x in ends],
            carried=STORED,
        )
        share = block_bytes // max(1, len(layers))
        self.layers: Sequence[Transfer] = [
            Handle(layer, missing=missing, why=why, block_bytes=share) for layer in layers
        ]
        self._ends = (*layers, *ends)
        self._skip = missing == "skip"
        self._excused = excused
        self._why = why
        # The ends of copies that were issued, which no helper makes, and the blocks that they move.
        self._issued: Sequence[Completion] = ()
        self._issued_blocks: Mask | None = None
        self._ordered = False  # a stream waits for these copies
        self.cancelled = False
        self.form = ""
        self._block_bytes = block_bytes
        self._began = time.perf_counter()
        self._ended: float | None = None  # when the end was noticed
        self.released: Transfer | None = None

    def add_release(self, end: End) -> None:
        """Set `released`: the end of the tasks that read the caller's blocks."""
        self.released = Transfer([Completion(pendings=(cast(Pending, end),))])
        self._ends = (end, *self._ends)

    def add_copies(self, ends: Sequence[Completion]) -> None:
        """Add copies to `released` that read the caller's blocks and were issued."""
        assert self.released is not None
        self.released.completions = (*ends, *self.released.completions)

    @classmethod
    def of_issued(
        cls,
        blocks: int,
        transfer: Transfer,
        layers: Sequence[Transfer] = (),
        block_bytes: int = 0,
    ) -> Handle:
        """Return the handle of a transfer that was issued, and that moves all blocks."""
        handle = cls(None, block_bytes=block_bytes)
        share = block_bytes // max(1, len(layers))
        handle.layers = [cls.of_issued(blocks, layer, (), share) for layer in layers]
        handle.add_issued(transfer, np.ones(blocks, np.bool_))
        return handle

    def add_issued(self, transfer: Transfer, blocks: Mask) -> None:
        """Add a transfer that was issued and moves the blocks of a mask, which helpers do not move.

        The handle ends after it, too.
        """
        self._issued = transfer.completions
        self._issued_blocks = blocks
        self.completions = (*transfer.completions, *self.completions)
        self._retained = transfer
        self.carried = transfer.carried

    def issued_ended(self) -> bool:
        """Return True once the transfers that were issued have ended; never block or raise.

        Also while another thread captures a graph.
        """
        for completion in self._issued:
            event = completion.event
            with nullcontext() if event is None else ignoring_captures(event.device):
                if not completion.ended():
                    return False
        return True

    @property
    def is_issued(self) -> bool:
        """Return whether all copies that are left were issued: `wait` orders a stream, and blocks
        no host."""
        return bool(self._issued) and all(end.ended for end in self._ends)

    @property
    def landed(self) -> Mask:
        """Return the blocks that landed, bool ``[blocks]``; none before the end.

        After `wait`, the blocks of a copy that was issued count: the stream finds their bytes.
        """
        return self._landed(self._ordered or all(each.ended() for each in self._issued))

    @property
    def statistics(self) -> Statistics:
        """Return the progress so far; never block or raise.

        Blocks count once they have landed, and their bytes as they are without an encoding.
        """
        there = self.issued_ended() and all(end.ended for end in self._ends)
        if there and self._ended is None:
            self._ended = time.perf_counter()
        landed = self.landed
        blocks = int(landed.sum())
        seconds = None if self._ended is None else self._ended - self._began
        counts = blocks * self._block_bytes, blocks, len(landed)
        return Statistics(*counts, *self.carried, seconds, len(self.completions), self.cancelled)

    def _landed(self, there: bool) -> Mask:
        """Return the blocks that helpers landed, and those that were issued if they are there."""
        landed = np.array(self._ends[-1].landed if self._ends else (), np.bool_)
        blocks = self._issued_blocks
        if blocks is None:
            return landed
        there = there and not any(each.error for each in self._issued)
        if not self._ends:
            return blocks & there
        return np.where(blocks, there, landed)

    def when_ended(self, call: Callable[[], object]) -> None:
        """Have a function called once when helpers have ended their part, or now if they have.

        It may be called under the runtime's lock, in any thread: it must be quick, and wait for
        nothing.
        """
        if self._ends:
            self._ends[-1].on_end(call)
        else:
            call()

    def cancel(self) -> bool:
        """Start no further block; return True if some blocks will not be moved."""
        ends = self._ends
        left = False
        if ends:
            left = any(ends[0].runtime.change(lambda: [end.cancel() for end in ends]))
        self.cancelled = self.cancelled or left
        return left

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Make the current stream (or ``stream``) wait; block the host until helpers have ended.

        No stream has the work of helpers. Raises the same errors as `done` after that.
        """
        super().wait(stream)
        self._ordered = True
        if self._ends:
            self._finish()

    def _finish(self) -> None:
        if self._ended is None:
            self._ended = time.perf_counter()
        super()._finish()
        if not self._ends:
            return
        end = self._ends[-1]
        landed = self._landed(True)
        if not end.ended:
            raise TransferError(
                "Expected the process that started the transfer, got one that was forked from it. "
                "Wait there."
            )
        kind = TransferCancelled if isinstance(end.error, TransferCancelled) else TransferError
        if not ((landed | self._excused).all() or (self._skip and kind is TransferError)):
            counts = f"{landed.sum()} of {len(landed)} blocks landed."
            raise kind(f"{counts} {self._explain(end, landed)}") from end.error

    def _explain(self, end: End, landed: Mask) -> str:
        """Return why blocks did not land, and how the caller may proceed."""
        sentences = []
        details = self._why(landed) if self._why else ""
        if details:
            sentences.append(f"{details}.")
        if end.error:
            known = isinstance(end.error, PortaKVError)
            sentences.append(str(end.error) if known else repr(end.error))

        if end.name == "save":
            if not sentences and end.short:
                sentences.append(f"{end.short} did not take the other blocks.")
        elif not end.error:
            if not details:
                sentences.append("No tier has the other blocks.")
            sentences.append("Begin the load with missing='skip' to accept that.")
        return " ".join(sentences)
