# SPDX-License-Identifier: Apache-2.0
"""The transfer graph: queues of blocking work with priorities, rates and deadlines.

Helpers execute tasks in the order of their queues, for block stores and for other code that moves
blocks. What follows tasks is written as coroutines, which go on in the thread that ends a task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from heapq import heapify, heappop, heappush
from traceback import clear_frames
from typing import Literal, TypeAlias, TypeVar, get_args

import numpy as np

from portakv import arguments, tasks
from portakv.errors import InvalidTerms, TransferCancelled, TransferError
from portakv.graph.task import End, Ending, Mask, Task, Workers
from portakv.graph.trace import COUNTED, Counts, Figures, Trace
from portakv.runtime.interrupts import uninterrupted
from portakv.tasks import Handle, Limit, Runtime, Signal, Wait, Work
from portakv.tasks.limit import SLACK, Priority
from portakv.tasks.runtime import EXIT, Steps

T = TypeVar("T")

#: How a task ends that did not run.
Unrun: TypeAlias = Literal["cancelled", "late", "dropped"]
#: Seconds of `Graph.breathe`, in which a thread wakes that sleeps on the lock.
YIELD = 2e-4
#: Seconds for which a plan may hold the lock. Its steps run together until then, since a thread
#: that sleeps may wait 5 ms for the interpreter.
HOLD = 1e-3
#: Figures of queues, and their attributes.
QUEUE_FIGURES = {
    "queue_bytes": "queued_bytes",
    "queue_ran_bytes_total": "ran_bytes",
    "queue_oldest_seconds": "oldest_wait",
    "queue_slow": "slow",
}


class Queue(Limit, Workers):
    """A queue of tasks of which ``width`` run at a time, which `Graph.queue` makes.

    Attributes:
        max_gbps: the most 10^9 bytes of tasks that start in a second; None: no limit.
        ran_bytes: of tasks that have run.
    """

    graph: Graph

    def __init__(
        self, graph: Graph, name: str, width: int, max_gbps: float | None, stall_seconds: float
    ):
        Workers.__init__(self, graph, name, name.partition(":")[0])
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
        return now - min((x.since for x in self.running.values()), default=now) > self.stall

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
            await self.graph.move(task, np.ones(1, np.bool_))
        finally:
            self.graph.cancel(task)
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


class Graph:
    """Queues and tasks under one ``lock``, that of a runtime, which a caller may hold for a moment.

    After an interrupt of a caller, all tasks are as before the call or as after the whole call: the
    main thread changes them in a helper (`run`). So methods that change them come in pairs, such as
    `cancel` and `_cancel`: the public half checks its arguments, and the private half does the work
    under the lock.

    Coroutines run tasks one after the other, by ``landed = await graph.move(task, mask, before)``.

    Args:
        runtime: runs the coroutines; None: that of the process.
    """

    def __init__(self, trace_events: int = 100_000, runtime: Runtime | None = None):
        arguments.whole("trace_events", trace_events)
        if runtime is not None:
            arguments.instance("runtime", runtime, Runtime, "Pass None for that of the process.")
        self.trace = Trace(trace_events)
        self.runtime = runtime or tasks.runtime()
        self.clock = self.runtime.time
        self.lock = self.runtime.lock
        self.closed = False
        self.number = 0
        self.queues = dict[str, Queue]()
        self.counts = Counts()
        self.live = set[Task]()
        self.idle = Signal(self.runtime)  # a queue has no task that runs
        # The times at which work is late that has not ended: when, number, end.
        self._timers = list[tuple[float, int, End]]()
        self._timed = 0
        self._next_look: Wait | None = None  # of the coroutine that looks at them
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
            width: workers; None: the queue's, or 1.
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
        requested = {"width": width, "max_gbps": max_gbps, "stall_seconds": stall_seconds}
        has = {"width": queue.width, "max_gbps": queue.max_gbps, "stall_seconds": queue.stall}
        for term, value in requested.items():
            if value is not None and value != has[term]:
                do = f"The queue {name!r} has these terms; pass the same, or None."
                raise arguments.invalid(term, str(has[term]), value, do)
        return queue

    def submit(
        self, tasks: Sequence[Task], *, priority: Priority = "normal", deadline: float | None = None
    ) -> None:
        """Start tasks together.

        ``deadline`` seconds from now, those that do not run yet are cancelled. If the caller is
        interrupted, the tasks are cancelled.

        Raises `InvalidTerms` for a wrong priority or deadline, and for a task that was submitted
        before; `TransferError` after `close` or in a forked process.
        """
        tasks = arguments.items("tasks", tasks, "tasks")
        for task in tasks:
            if type(task) is not Task:
                arguments.instance("tasks", task, Task, "Pass a list of tasks.")
        arguments.one_of("priority", priority, SLACK)
        by = np.inf
        if deadline is not None:
            by = arguments.seconds("deadline", deadline)
        if any(task.graph for task in tasks):
            raise InvalidTerms(
                "Expected tasks that are new, got one that was submitted before. Make another."
            )
        self.check_open()
        begin = partial(self._submit, tasks, priority, by)
        self.run(begin, undo=lambda _: [self.cancel(task) for task in tasks])

    def _submit(self, tasks: Sequence[Task], priority: Priority, by: float) -> None:
        """Start tasks, under the lock."""
        self.enter(tasks, priority, by)
        for task in tasks:
            if by < np.inf:
                self.end_at(self.clock() + by, task)
        for task in tasks:
            self.start(self._run(task))

    async def _run(self, task: Task) -> None:
        await self.move(task, np.ones(task.blocks, np.bool_))

    def check_open(self) -> None:
        """Raise `TransferError` after `close`, or in a forked process."""
        got = "is closed"
        if self.runtime.forked:  # the lock may be held for ever
            got = "belongs to the process that this one was forked from"
        elif not self.closed:
            return
        raise TransferError(f"Expected a graph that is open, got one that {got}. Make another.")

    def run(self, work: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """Return ``work()``, run under the lock where no interrupt reaches it.

        If the caller is interrupted, ``undo(result)`` reverts it (see `uninterrupted`). A thread
        that has the lock runs ``work`` itself. Coroutines go on that wait for what it ended.
        """

        def locked() -> T:
            with self.runtime.step:
                return work()

        if self.lock._is_owned():  # as `threading.Condition` asks it
            return locked()
        return uninterrupted(locked, undo)

    # --- coroutines, and the tasks that they run; all under the lock

    def start(self, steps: Steps[None]) -> None:
        """Run a coroutine until it first waits for an `End`. Whoever ends that goes on with it."""
        Handle(self.runtime, steps).step(steps.send, None)

    def enter(self, tasks: Iterable[Task], priority: Priority, by: float = np.inf) -> None:
        """Register new tasks, which `move` begins later. Drop those of the background whose queue
        is slow.

        ``by``: the seconds in which they have to end.
        """
        self.check_open()
        now = self.clock()
        background = priority == "background"
        for task in tasks:
            self.number += 1
            task.number = self.number
            task.due = now + min(by, SLACK["normal" if task.soon else priority])
            task.background = background
            task.graph = self
            task.state = "waiting"
            self.live.add(task)
            task.queue.queued_bytes += task.nbytes
            if background and task.queue.slow:
                self.cancel(task, "dropped")

    async def move(self, task: Task, left: Mask, *before: End) -> Mask:
        """Run a task for the blocks of a mask, if there are any and it was not cancelled; return
        the blocks that landed. ``before``: what it follows, whose errors are its errors."""
        if not task.ended:
            task.left = left
            trail = dict[int, None]()
            for each in before:
                task.add_error(each.error)
                trail.update(dict.fromkeys(each.trail))
            task.followed = task.trail = (*trail,)
            if left.any():
                await task.queue.run(task)
            else:
                self.end(task, left)
        return task.landed

    async def finish(
        self, end: End, parts: Sequence[Ending], eligible: Callable[[], Mask] | None = None
    ) -> None:
        """Let an end come after its parts. A block landed if it did in all of its parts.

        ``eligible``: returns the blocks that may have landed, after all parts; None: all.
        """
        for part in parts:
            end.add_error((await part.end).error)
        landed: Mask = np.ones(end.blocks, np.bool_)
        try:
            if eligible is not None:
                landed &= eligible()
        except Exception as error:  # of the maker of the function
            end.add_error(error)
            landed[:] = False
        for part in parts:
            if not part.end.landed.all():
                rows = np.asarray(part.rows, int)
                landed[np.asarray(part.at, int)[~part.end.landed[rows]]] = False
        if not (end.error or landed.all()):
            tasks = [part.end for part in parts if isinstance(part.end, Task)]
            end.short = next((task.queue.name for task in tasks if task.is_short), "")
        self.end(end, landed)

    async def breathe(self, since: float) -> float:
        """Let others take the lock if it was held for `HOLD` seconds since a time of
        `perf_counter`, so that long work delays no urgent task; return the time since which it is
        held."""
        if time.perf_counter() < since + HOLD:
            return since
        await Wait(until=self.runtime.time() + YIELD)
        return time.perf_counter()

    def hasten(self, task: Task, due: float) -> None:
        """Let a task be due at a time, if that is sooner: somebody waits for it."""
        if task.due > due and not task.ended and task.state != "running":
            task.due = due
            task.background = False
            if task.state == "queued":
                task.queue.push(task)

    def cancel(self, task: End, state: Unrun = "cancelled") -> bool:
        """Cancel a task that does not run, or the work before another end; return True if some
        blocks will not be moved."""
        arguments.instance("task", task, End)
        arguments.one_of("state", state, get_args(Unrun))
        if task.graph is not self or self.runtime.forked:
            return False
        return self.run(partial(self._cancel, task, state))

    def _cancel(self, end: End, state: Unrun) -> bool:
        why = {"late": ": increase the deadline", "dropped": ": staging was full or the queue slow"}
        kind = TransferCancelled if state == "cancelled" else TransferError
        error = kind(f"Some blocks had not started and are {state}{why.get(state, '')}.")
        return self.stop(end, state, error)

    def stop(self, end: End, state: str, error: Exception) -> bool:
        """Do what `cancel` does, with an error, under the lock."""
        if end.cut or end.state == "running":
            return False
        end.cut = True
        if state == "late":
            end.add_error(error)
        if isinstance(end, Task):
            self.end(end, None, state, error)
            return True
        return end.stop is not None and end.stop(state, error)

    def end_at(self, when: float, end: End) -> None:
        """Cancel work as late at a time; under the lock."""
        if when <= self.clock():
            self._cancel(end, "late")
            return
        # Most timers are of work that ended in time.
        if len(self._timers) > 2 * len(self.live) + 100:
            self._timers = [x for x in self._timers if not x[2].ended]
            heapify(self._timers)
        self._timed += 1
        heappush(self._timers, (when, self._timed, end))
        if self._next_look is None:
            self.start(self._look())
        elif self._timers[0][2] is end:
            self._next_look.wake()

    async def _look(self) -> None:
        """Cancel work that is late, in the loop, until no work has a time."""
        while self._timers:
            when = self._timers[0][0]
            if when <= self.clock():
                self._cancel(heappop(self._timers)[2], "late")
            else:
                self._next_look = Wait(until=when)
                await self._next_look
        self._next_look = None

    def end(
        self,
        end: End,
        landed: Mask | None,
        state: str = "landed",
        error: BaseException | None = None,
    ) -> None:
        """Record an end with the blocks that landed; None: no block."""
        end.add_error(error)
        if landed is not None:
            end.landed = landed
        end.state = state
        end.cut = True
        end.stop = None  # it retains what a handle need not
        if isinstance(end, Task):
            self._forget(end)
        end.settle(None, end.error)
        while self._timers and self._timers[0][2].ended:
            heappop(self._timers)  # it retains what the work used

    def _forget(self, task: Task) -> None:
        """Forget a task that has ended."""
        self.live.discard(task)
        task.work = None
        queue = task.queue
        queue.queued_bytes -= task.nbytes
        if task.state != "landed" and queue.tier:
            self.count(queue.tier, task.name, task.state, task.blocks)

    def count(self, tier: str, op: str, result: str, blocks: int = 1, nbytes: int = 0) -> None:
        """Add to the figures of `statistics`."""
        self.counts.new.append((tier, op, result, blocks, nbytes))  # one step, without a lock
        if len(self.counts.new) >= COUNTED:
            self.run(self.counts.sum_up)

    def statistics(self) -> Figures:
        """Return figures by their names in Prometheus without "portakv_".

        Each name has a list of samples with labels and a "value". `Collector` also takes other
        figures.
        """
        if self.runtime.forked:  # its lock may be locked for ever
            return {}
        return self.run(self._statistics)

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
        if self.runtime.forked:
            return True
        self.run(self.shut)
        self.idle.block(lambda: not any(x.running for x in self.queues.values()), timeout)
        return not self.live

    def shut(self) -> None:
        """Take no more tasks, and cancel those that do not run; under the lock."""
        self.closed = True
        for task in tuple(self.live):
            self._cancel(task, "cancelled")
