# SPDX-License-Identifier: Apache-2.0
"""The transfer graph: queues of blocking work with priorities, rates and deadlines.

Workers of the queues execute tasks, for block stores and for other code that moves blocks. What
follows tasks is written as coroutines, which go on in the thread that ends a task.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from heapq import heapify, heappop, heappush
from traceback import clear_frames
from typing import Literal, TypeAlias, TypeVar, get_args

import numpy as np

from portakv import arguments
from portakv.errors import InvalidTerms, TransferCancelled, TransferError
from portakv.graph.task import End, Ending, Mask, Task, Workers
from portakv.graph.trace import COUNTED, Counts, Figures, Ran, Trace
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import Condition, uninterrupted
from portakv.runtime.worker import EXIT_SECONDS, RateLimit
from portakv.tasks import Handle, Runtime, Wait
from portakv.tasks.runtime import Steps

T = TypeVar("T")

#: How soon a task is due.
Priority: TypeAlias = Literal["urgent", "normal", "background"]
#: How a task ends that did not run.
Unrun: TypeAlias = Literal["cancelled", "late", "dropped"]
#: Seconds after its submission at which a task of each priority is due.
SLACK = {"urgent": 0.0, "normal": 0.05, "background": 2.0}
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
#: The most seconds for which a thread sleeps.
LONGEST = 3600.0


class Queue(Workers):
    """A queue of tasks with ``width`` workers, which `Graph.queue` makes.

    Attributes:
        max_gbps: the most 10^9 bytes of tasks that start in a second; None: no limit.
        queued_bytes: of tasks that were submitted for it and have not ended.
        ran_bytes: of tasks that have run.
        running: the tasks that run, with their starts.
    """

    def __init__(
        self, graph: Graph, name: str, width: int, max_gbps: float | None, stall_seconds: float
    ):
        self.graph = graph
        self.name = name
        self.width = max(1, width)
        self.stall = stall_seconds
        self.max_gbps = max_gbps
        self.tier = name.partition(":")[0]
        self.change = Condition(graph.lock)
        self.queued_bytes = 0
        self.ran_bytes = 0
        self.running = dict[Task, float]()
        self._limit = None if max_gbps is None else RateLimit(max_gbps, graph.clock)
        self._next_start = 0.0  # of a task, by the limit
        self.threads = list[threading.Thread]()  # of the workers
        self._idle = 0  # workers that sleep, also those that were just woken
        # True while a worker that ended a task takes the next: to wake another costs more than a
        # task.
        self.taker = False
        # (due, number, task): urgent and normal ones, the background's, and those of these that
        # are `Task.alone`, so that none of them holds up another kind.
        self.heaps = [list[tuple[float, int, Task]]() for _ in range(3)]

    @property
    def oldest_wait(self) -> float:
        """Return the seconds that the oldest task has waited for a worker."""
        tasks = [task for heap in self.heaps for *_, task in heap]
        since = [task.schedule.since for task in tasks if task.state == "queued"]
        return self.graph.clock() - min(since) if since else 0.0

    @property
    def slow(self) -> bool:
        """Return True if a task has run longer than ``stall_seconds``; new background tasks are
        dropped."""
        now = self.graph.clock()
        return now - min(self.running.values(), default=now) > self.stall

    def push(self, task: Task, /) -> None:
        """Queue a task for the workers."""
        schedule = task.schedule
        task.state = "queued"
        schedule.since = self.graph.clock()
        kind = 1 + task.alone if schedule.background else 0
        heappush(self.heaps[kind], (schedule.due, schedule.number, task))
        if not self.taker:
            self.change.notify()
        free = self._idle + self.taker
        self.taker = False
        if len(self.threads) < self.width and sum(map(len, self.heaps)) > free:
            try:
                self._begin_worker()
            except RuntimeError as error:  # the system gives no more threads
                if not self.threads:
                    self.graph.end(task, None, "failed", error)

    def _begin_worker(self) -> None:
        terms = self.serve, f"portakv {self.name}", (len(self.threads) + 1,)
        thread = threading.Thread(None, *terms, daemon=True)
        thread.start()
        self.threads.append(thread)
        # Registered again, because memory must not go before a worker.
        atexit.register(self.graph.close)

    def next(self) -> Task | None:
        """Wait for a task and mark it as running; return None if the graph is closed."""
        with self.graph.lock:
            self.taker = False
            while not self.graph.closed.is_set():
                now = self.graph.sweep()
                kinds = 1
                # One worker is left for tasks that are not of the background.
                background = [task for task in self.running if task.schedule.background]
                if len(background) < max(1, self.width - 1):
                    kinds = 2 if any(task.alone for task in background) else 3
                heaps = [heap for heap in self.heaps[:kinds] if heap]
                start = self._next_start
                if start > now or not heaps:
                    self._idle += 1
                    self.change.wait(start - now if start > now else None)
                    self._idle -= 1
                elif (task := heappop(min(heaps))[2]).state == "queued":  # it was not cancelled
                    task.state = "running"
                    self.running[task] = now
                    if self._limit is not None:
                        self._limit.start_of(task.nbytes)
                        self._next_start = self._limit.start_of(0)
                        self.change.notify()  # another worker waits until then
                    return task
        return None

    def serve(self, worker: int) -> None:
        """Run tasks until the graph is closed."""
        graph = self.graph
        task = self.next()
        while task:
            error: BaseException | None = None
            landed: Mask | None = None
            try:
                landed = task.moved()
            except BaseException as caught:  # no caller stands above this thread
                clear_frames(caught.__traceback__)  # frames retain views
                error = caught
                landed = None
            with graph.lock:
                start = self.running.pop(task)
                self.ran_bytes += task.nbytes
                end = graph.clock()
                schedule = task.schedule
                what = schedule.number, task.name, task.blocks, task.nbytes, schedule.followed
                ran = Ran(self.name, worker, start, end, *what)
                graph.trace.add(self.tier, ran, start - schedule.since)
                task.trail = (schedule.number,)
                self.taker = not (schedule.background and any(self.heaps[1:]))
                graph.end(task, landed, "failed" if error else "landed", error)
                graph.settle()
                task = error = landed = None  # an idle worker retains nothing
                task = self.next()  # inside the lock: to take the lock twice costs more than a task


class Graph:
    """Queues and tasks under one ``lock``, which a caller may hold for a moment.

    ``clock`` never goes back. After an interrupt of a caller, all tasks are as before the call or
    as after the whole call: the main thread changes them in a helper (`run`). So methods that
    change them come in pairs, such as `cancel` and `_cancel`: the public half checks its arguments,
    and the private half does the work under the lock.

    Coroutines of its `runtime` run tasks one after the other, by
    ``landed = await graph.move(task, mask, before)``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, trace_events: int = 100_000):
        if not callable(clock):
            raise arguments.invalid("clock", "a function that returns seconds", clock)
        arguments.whole("trace_events", trace_events)
        self.clock = clock
        self.trace = Trace(trace_events)
        self.process = this_process()
        self.runtime = Runtime()  # of its coroutines, whose waits need no loop
        self.lock = self.runtime.lock
        self.closed = threading.Event()
        self.number = 0
        self.queues = dict[str, Queue]()
        self.counts = Counts()
        self.live = set[Task]()
        # The waits of coroutines whose ends have come.
        self._woken = deque[Wait]()
        # The times at which work is late that has not ended: when, number, end.
        self._timers = list[tuple[float, int, End]]()
        self._timed = 0
        self._settles = False
        self._sleepers = set[threading.Lock]()  # one locked lock for each thread in `pause`

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
        if self.process.forked:  # the lock may be held for ever
            raise _not_open("belongs to the process that this one was forked from")
        begin = partial(self._submit, tasks, priority, by)
        self.run(begin, undo=lambda _: [self.cancel(task) for task in tasks])

    def _submit(self, tasks: Sequence[Task], priority: Priority, by: float) -> None:
        """Start tasks, under the lock."""
        self.enter(tasks, priority, by)
        now = self.clock()
        for task in tasks:
            if by < np.inf:
                self.end_at(now + by, task)
            if not task.ended:
                task.left = np.ones(task.blocks, np.bool_)
                task.queue.push(task)
        self.sweep()

    def run(self, work: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """Return ``work()``, run under the lock where no interrupt reaches it.

        If the caller is interrupted, ``undo(result)`` reverts it (see `uninterrupted`). A thread
        that has the lock runs ``work`` itself. Coroutines go on that wait for what it ended.
        """

        def locked() -> T:
            with self.lock:
                try:
                    return work()
                finally:
                    self.settle()

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
        if self.closed.is_set():
            raise _not_open("is closed")
        now = self.clock()
        background = priority == "background"
        for task in tasks:
            schedule = task.schedule
            self.number += 1
            schedule.number = self.number
            schedule.due = now + min(by, SLACK["normal" if schedule.soon else priority])
            schedule.background = background
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
            task.schedule.followed = task.trail = (*trail,)
            if left.any():
                task.queue.push(task)
            else:
                self.end(task, left)
        if not task.ended:
            wait = Wait(here=True)
            task.waits.insert(0, wait)  # before others, which look at what follows the task
            await wait
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
        self.settle()
        await Wait(until=self.runtime.time() + YIELD)
        return time.perf_counter()

    def hasten(self, task: Task, due: float) -> None:
        """Let a task be due at a time, if that is sooner: somebody waits for it."""
        schedule = task.schedule
        if schedule.due > due and not task.ended and task.state != "running":
            schedule.due = due
            schedule.background = False
            if task.state == "queued":
                task.queue.push(task)

    def settle(self) -> None:
        """Go on with the coroutines that wait for what has ended."""
        if self._settles:
            return
        self._settles = True
        try:
            while self._woken:
                self._woken.popleft().wake()
        finally:
            self._settles = False

    def cancel(self, task: End, state: Unrun = "cancelled") -> bool:
        """Cancel a task that does not run, or the work before another end; return True if some
        blocks will not be moved."""
        arguments.instance("task", task, End)
        arguments.one_of("state", state, get_args(Unrun))
        if task.graph is not self or self.process.forked:
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
        """Cancel work as late at a time, by `sweep`; under the lock."""
        # Most timers are of work that ended in time.
        if len(self._timers) > 2 * len(self.live) + 100:
            self._timers = [x for x in self._timers if not x[2].ended]
            heapify(self._timers)
        self._timed += 1
        heappush(self._timers, (when, self._timed, end))
        if self._timers[0][2] is end:
            self.wake()

    def pause(self, end: End, until: float, now: float) -> None:
        """Sleep until an end, a time, or the time of the next timer; perhaps for less.

        Takes no lock of the graph, so an interrupt leaves no lock locked.
        """
        sleeper = threading.Lock()
        sleeper.acquire()
        self._sleepers.add(sleeper)
        end.watched = True
        if not end.ended:  # the thread that ends it from now on wakes this thread
            until = min(until, now + LONGEST, *(timer[0] for timer in self._timers[:1]))
            sleeper.acquire(timeout=max(0.0, until - now))
        self._sleepers.discard(sleeper)

    def wake(self) -> None:
        """Wake the threads in `pause`; under the lock."""
        for sleeper in tuple(self._sleepers):
            self._sleepers.discard(sleeper)
            sleeper.release()

    def sweep(self) -> float:
        """Cancel tasks that are late, and return the time. Workers and waiting callers call it."""
        now = self.clock()
        if self._expired(now):
            self.run(partial(self._sweep, now))
        return now

    def _expired(self, now: float) -> bool:
        """Return True if the time of the first timer has come, or its work has ended."""
        return any(timer[0] <= now or timer[2].ended for timer in self._timers[:1])

    def _sweep(self, now: float) -> None:
        """Cancel work that is late, under the lock."""
        while self._expired(now):
            self.cancel(heappop(self._timers)[2], "late")

    def end(
        self,
        end: End,
        landed: Mask | None,
        state: str = "landed",
        error: BaseException | None = None,
    ) -> None:
        """Record an end with the blocks that landed; None: no block. `settle` goes on with the
        coroutines that wait for it."""
        end.add_error(error)
        if landed is not None:
            end.landed = landed
        end.state = state
        end.ended = True
        end.cut = True
        end.stop = None  # it retains what a handle need not
        if isinstance(end, Task):
            self._forget(end)
        self._woken += end.waits
        end.waits.clear()
        if end.watched:
            self.wake()
        on_end = end.on_end
        end.on_end = None
        if on_end:
            on_end()

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
        if self.process.forked:  # its lock may be locked for ever
            return {}
        return self.run(self._statistics)

    def _statistics(self) -> Figures:
        """Return the figures, under the lock."""
        figures = self.trace.statistics() | self.counts.statistics()
        queues = [*self.queues.values()]
        for name, attribute in QUEUE_FIGURES.items():
            figures[name] = [{"queue": x.name, "value": getattr(x, attribute)} for x in queues]
        return figures

    def close(self, timeout: float = EXIT_SECONDS) -> bool:
        """Cancel tasks that do not run, and wait for running ones; return True if they ended in
        time."""
        timeout = arguments.seconds("timeout", timeout)
        if self.process.forked:
            return True
        until = time.monotonic() + timeout
        self.run(self._close)
        threads = [thread for queue in [*self.queues.values()] for thread in queue.threads]
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not self.live

    def _close(self) -> None:
        """Cancel tasks that do not run, and let idle workers end."""
        atexit.unregister(self.close)  # the interpreter's end waits once, if work hangs
        self.closed.set()
        for task in tuple(self.live):
            self._cancel(task, "cancelled")
        self.settle()
        for queue in self.queues.values():
            queue.change.notify_all()


def _not_open(why: str) -> TransferError:
    """Return the error for work on a graph whose workers do not run here."""
    return TransferError(f"Expected a graph that is open, got one that {why}. Make another.")
