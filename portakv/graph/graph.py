# SPDX-License-Identifier: Apache-2.0
"""The transfer graph: tasks of blocking work with dependencies, priorities and deadlines.

Workers of queues execute the tasks, for block stores and for other code that moves blocks.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heapify, heappop, heappush
from traceback import clear_frames
from typing import Literal, TypeAlias, TypeVar, cast, get_args
from weakref import WeakKeyDictionary

import numpy as np

from portakv import arguments
from portakv.errors import InvalidTerms, TransferCancelled, TransferError
from portakv.graph.task import Lease, Mask, Pool, Task, Workers, check_pool
from portakv.graph.trace import COUNTED, Counts, Figures, Ran, Trace
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import Condition, uninterrupted
from portakv.runtime.worker import EXIT_SECONDS, RateLimit

T = TypeVar("T")

#: How soon a task is due.
Priority: TypeAlias = Literal["urgent", "normal", "background"]
#: How a task ends that did not run.
Unrun: TypeAlias = Literal["cancelled", "late", "dropped"]
#: Seconds after its submission at which a task of each priority is due.
SLACK = {"urgent": 0.0, "normal": 0.05, "background": 2.0}
#: Seconds between two steps of `Graph.run_steps`, in which a thread wakes that sleeps on the lock.
YIELD = 2e-4
#: Seconds of `Graph.run_steps` after which other threads get the lock: its steps run together
#: until then, since a thread that sleeps may wait 5 ms for the interpreter.
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


@dataclass
class _Waiting:
    """The leases that wait for one pool, by due time, and the granted leases of saves."""

    loads: list[tuple[float, int, Lease]] = field(default_factory=list)
    saves: list[tuple[float, int, Lease]] = field(default_factory=list)
    granted_saves: int = 0

    def may_pass(self, lease: Lease) -> bool:
        """Return True if others pass a lease that waits: not if it is a save that waits for
        loads."""
        return bool(self.granted_saves) or not lease.store


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
        task.outcome.state = "queued"
        schedule.since = self.graph.clock()
        kind = 1 + task.alone if schedule.background else 0
        heappush(self.heaps[kind], (schedule.due, schedule.number, task))
        if not self.taker:
            self.change.notify()
        self.taker = False
        if len(self.threads) < self.width:
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
                    self.change.wait(start - now if start > now else None)
                elif (task := heappop(min(heaps))[2]).state == "queued":  # it was not cancelled
                    task.outcome.state = "running"
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
            landed: Mask | None = task.outcome.left
            try:
                landed = _moved(task)
            except BaseException as caught:  # no caller stands above this thread
                clear_frames(caught.__traceback__)  # frames retain views
                error = caught
                landed = None
            with graph.lock:
                start = self.running.pop(task)
                self.ran_bytes += task.nbytes
                end = graph.clock()
                schedule = task.schedule
                what = schedule.number, task.name, task.blocks, task.nbytes, (*task.ran_before(),)
                ran = Ran(self.name, worker, start, end, *what)
                graph.trace.add(self.tier, ran, start - schedule.since)
                self.taker = not (schedule.background and any(self.heaps[1:]))
                graph.end(task, landed, "failed" if error else "landed", error)
                graph.settle()
                task = error = landed = None  # an idle worker retains nothing
                task = self.next()  # inside the lock: to take the lock twice costs more than a task


def _moved(task: Task) -> Mask:
    """Run the work of a task, and return the blocks that landed."""
    if task.work is None:
        raise InvalidTerms("Expected work for a task with a queue, got None. Pass a function.")
    left = task.outcome.left
    landed = task.work(task, left.copy())
    if landed is None:
        return left
    return left & np.asarray(landed, np.bool_).reshape(task.blocks)


class Graph:
    """Queues and tasks under one ``lock``, which a caller may hold for a moment.

    ``clock`` never goes back. After an interrupt of a caller, tasks and leases are as before the
    call or as after the whole call: the main thread changes them in a helper (`run`). So methods
    that change them come in pairs, such as `cancel` and `_cancel`: the public half checks its
    arguments, and the private half does the work under the lock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, trace_events: int = 100_000):
        if not callable(clock):
            raise arguments.invalid("clock", "a function that returns seconds", clock)
        arguments.whole("trace_events", trace_events)
        self.clock = clock
        self.trace = Trace(trace_events)
        self.process = this_process()
        self.lock = threading.RLock()
        self.closed = threading.Event()
        self.number = 0
        self.queues = dict[str, Queue]()
        self.counts = Counts()
        self.live = set[Task]()
        self.todo = list[Task]()
        # The times at which tasks end that have not run: when, number, state at the end, task.
        self.timers = list[tuple[float, int, Unrun, Task]]()
        self._sleepers = set[threading.Lock]()  # one locked lock for each thread in `pause`
        self.waiting = WeakKeyDictionary[Pool, _Waiting]()

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
        """Start tasks together, each after the tasks that it follows.

        ``deadline`` seconds from now, tasks that no other task follows are cancelled. If the caller
        is interrupted, the tasks are cancelled.

        Raises `InvalidTerms` for a wrong priority or deadline, for a task that was submitted
        before, and for a task that follows one that never was; `TransferError` after `close` or in
        a forked process.
        """
        tasks = arguments.items("tasks", tasks, "tasks")
        for task in tasks:
            if type(task) is not Task:
                arguments.instance("tasks", task, Task, "Pass a list of tasks.")
        arguments.one_of("priority", priority, SLACK)
        by = np.inf
        if deadline is not None:
            by = arguments.seconds("deadline", deadline)
        new = {*tasks}
        after = {each[0] for task in tasks for each in task.after} - new
        if any(task.schedule.graph for task in tasks):
            raise InvalidTerms(
                "Expected tasks that are new, got one that was submitted before. Make another."
            )
        if not all(task.schedule.graph is self for task in after):
            raise InvalidTerms(
                "Expected tasks that follow tasks of this graph, got another. Submit the followed "
                "task first, or in the same call."
            )
        if self.process.forked:  # the lock may be held for ever
            raise _not_open("belongs to the process that this one was forked from")
        begin = partial(self._begin, tasks, priority, by)
        self.run(begin, undo=lambda _: [self.cancel(task) for task in tasks])

    def run(self, work: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """Return ``work()``, run under the lock where no interrupt reaches it.

        If the caller is interrupted, ``undo(result)`` reverts it (see `uninterrupted`). A thread
        that has the lock runs ``work`` itself.
        """
        if self.lock._is_owned():  # type: ignore[attr-defined]  # as `threading.Condition` asks it
            return work()

        def locked() -> T:
            with self.lock:
                return work()

        return uninterrupted(locked, undo)

    def run_steps(
        self, steps: Generator[None, None, T], undo: Callable[[T], object] | None = None
    ) -> T:
        """Return what ``steps`` returns, as `run` does, with each step under the lock.

        Where it yields, other threads may take the lock if it was held for `HOLD` seconds, so that
        long work delays no urgent task.
        """

        def step() -> tuple[bool, T | None]:
            try:
                next(steps)
            except StopIteration as end:
                return True, end.value
            return False, None

        def all_steps() -> T:
            while True:
                with self.lock:
                    until = time.perf_counter() + HOLD
                    ended, result = step()
                    while not ended and time.perf_counter() < until:
                        ended, result = step()
                if ended:
                    return cast(T, result)
                time.sleep(YIELD)  # a thread that waits for the lock gets it only meanwhile

        if self.lock._is_owned():  # type: ignore[attr-defined]  # as in `run`
            return all_steps()
        return uninterrupted(all_steps, undo)

    def _begin(self, tasks: Sequence[Task], priority: str, by: float) -> None:
        """Register new tasks, and start those that follow none. After an error no task is left."""
        if self.closed.is_set():
            raise _not_open("is closed")
        now = self.clock()
        due = now + min(by, SLACK[priority])
        background = priority == "background"
        try:
            for task in tasks:
                self._enter(task, due, background)
            for task in tasks:
                if by < np.inf and not task.schedule.followers:
                    self.end_at(now + by, task, "late")
                if task.schedule.background and task.queue and task.queue.slow:
                    self.cancel(task, "dropped")
            ready = [x for x in tasks if not x.schedule.waits and x.outcome.state == "waiting"]
            self.todo += ready[::-1]  # the first task is settled first
            self.settle()
            self.sweep()
        except BaseException as error:  # raised by a pool, or an interrupt
            for task in tasks:
                if task in self.live and task.state != "running":
                    self.end(task, None, "failed", error)
            self.settle()
            raise

    def _enter(self, task: Task, due: float, background: bool) -> None:
        """Register a new task. Tasks of other transfers that it waits for become as urgent."""
        self.number += 1
        schedule = task.schedule
        schedule.graph = self
        schedule.number = self.number
        if schedule.soon:
            due = min(due, self.clock() + SLACK["normal"])
        schedule.due = due
        schedule.background = background
        task.outcome.state = "waiting"
        self.live.add(task)
        if task.queue:
            task.queue.queued_bytes += task.nbytes
        if task.lease:
            task.lease.users += 1
        before = [x for x, *_ in task.after if not x.outcome.ended]
        schedule.waits = len(before)
        for one in before:
            one.schedule.followers.append(task)
        while before:
            one = before.pop()
            outcome = one.outcome
            if one.schedule.due > due and not outcome.ended and outcome.state != "running":
                one.schedule.due = due
                one.schedule.background = False
                before += [x for x, *_ in one.after]
                if outcome.state in ("leasing", "queued"):
                    self.place(one)

    def cancel(self, task: Task, state: Unrun = "cancelled") -> bool:
        """Cancel a task that does not run, and the tasks before it that no other task follows.

        A barrier ends after the running tasks. Returns True if some blocks will not be moved.
        """
        arguments.instance("task", task, Task)
        arguments.one_of("state", state, get_args(Unrun))
        why = {"late": ": increase the deadline", "dropped": ": staging was full or the queue slow"}
        kind = TransferCancelled if state == "cancelled" else TransferError
        error = kind(f"Some blocks had not started and are {state}{why.get(state, '')}.")
        if task.schedule.graph is not self or self.process.forked:
            return False
        return self.run(partial(self._cancel, task, state, error))

    def _cancel(self, task: Task, state: str, error: TransferError) -> bool:
        """Cancel a task and the tasks that only it follows on, under the lock."""
        tasks = [task]
        cancelled = False
        while tasks:
            task = tasks.pop()
            outcome = task.outcome
            if outcome.cut or outcome.state == "running":
                continue
            outcome.cut = True
            if state == "late":
                outcome.add_error(error)
            before = [x for x, *_ in task.after if x.queue]
            tasks += [x for x in before if all(y.outcome.cut for y in x.schedule.followers)]
            if task.queue:
                cancelled = True
                self.end(task, None, state, error)
        self.settle()
        return cancelled

    def end_at(self, when: float, task: Task, state: Unrun) -> None:
        """Cancel a task at a time, by `sweep`; under the lock."""
        # Most timers are of tasks that ended in time.
        if len(self.timers) > 2 * len(self.live) + 100:
            self.timers = [x for x in self.timers if not x[3].outcome.ended]
            heapify(self.timers)
        heappush(self.timers, (when, task.schedule.number, state, task))
        if self.timers[0][3] is task:
            self.wake()

    def pause(self, task: Task, until: float, now: float) -> None:
        """Sleep until the end of a task, a time, or the time of the next timer; perhaps for less.

        Takes no lock of the graph, so an interrupt leaves no lock locked.
        """
        sleeper = threading.Lock()
        sleeper.acquire()
        self._sleepers.add(sleeper)
        task.schedule.watched = True
        if not task.outcome.ended:  # the thread that ends it from now on wakes this thread
            until = min(until, now + LONGEST, *(timer[0] for timer in self.timers[:1]))
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
        """Return True if the time of the first timer has come, or its task has ended."""
        return any(timer[0] <= now or timer[3].outcome.ended for timer in self.timers[:1])

    def _sweep(self, now: float) -> None:
        """Cancel tasks that are late, under the lock."""
        while self._expired(now):
            *_, state, task = heappop(self.timers)
            waits = task.state == "leasing" and task.lease and task.lease.until is not None
            if state == "late" or waits:
                self.cancel(task, state)

    def settle(self) -> None:
        """Continue the tasks whose dependencies have all ended."""
        while self.todo:
            task = self.todo.pop()
            outcome = task.outcome
            left = self._left(task)
            outcome.left = left
            if task.queue and left.any():
                self.place(task)
            else:
                if task.schedule.followers:
                    task.schedule.trail = task.ran_before()
                if not (task.queue or outcome.error or left.all()):
                    short = [x.queue for x, *_ in task.after if x.queue and x.outcome.is_short]
                    outcome.short = short[0].name if short else ""
                self.end(task, left, "landed")

    def _left(self, task: Task) -> Mask:
        """Return the blocks that a task may move, by the tasks that it follows: bool
        ``[blocks]``."""
        outcome = task.outcome
        left = ~outcome.landed
        try:
            eligible = task.eligible() if callable(task.eligible) else task.eligible
            if eligible is not None:
                left[:] = eligible
        except Exception as error:  # raised by the maker's function
            outcome.add_error(error)
            left[:] = False
            return left
        try:
            for before, blocks, its_blocks in task.after:
                outcome.add_error(before.error)
                landed = before.landed
                if task.rescue:
                    left &= ~landed
                    outcome.landed = landed
                elif blocks is None:
                    left &= landed
                else:
                    left[np.asarray(blocks, int)[~landed[its_blocks]]] = False
        except (IndexError, ValueError) as error:  # not blocks of both
            outcome.error = error
            left[:] = False
        return left

    def place(self, task: Task) -> None:
        """Queue a task for its lease, or for its queue."""
        lease = task.lease
        if not lease or lease.items is not None or not lease.count:
            self._start(task)
            return
        if lease.until is not None:
            self.end_at(lease.until, task, "dropped")
        task.outcome.state = "leasing"
        waiting = self.waiting.setdefault(lease.pool, _Waiting())
        lease.tasks.append(task)
        heap = waiting.saves if lease.store else waiting.loads
        heappush(heap, (task.schedule.due, task.schedule.number, lease))
        self.grant(lease.pool)

    def _start(self, task: Task, failure: Exception | None = None) -> None:
        """Queue a task for the workers of its queue, or end it with a failure."""
        if failure:
            self.end(task, None, "failed", failure)
        elif task.queue:
            task.queue.push(task)

    def grant(self, pool: Pool) -> None:
        """Grant leases in order. Call it when items of a pool became free other than by a lease.

        Loads pass a save that waits for other saves, but not a save that waits for loads.
        """
        check_pool(pool)
        self.run(partial(self._grant, pool))

    def _grant(self, pool: Pool) -> None:
        """Give the items of a pool to the leases that wait for them, under the lock."""
        waiting = self.waiting.get(pool)
        if waiting is None:
            return
        heaps = [waiting.loads, waiting.saves]
        while heaps := [heap for heap in heaps if heap]:
            heap = min(heaps)
            lease = heap[0][2]
            tasks = [task for task in lease.tasks if task.state == "leasing"]
            failure: Exception | None = None
            if tasks and lease.items is None:
                failure = self._fill(lease)
                if lease.items is None and failure is None:
                    passed = waiting.may_pass(lease)
                    heaps = [other for other in heaps if other is not heap and passed]
                    continue
                waiting.granted_saves += lease.store and failure is None
            heappop(heap)
            lease.tasks.clear()
            for task in tasks:  # together: no task may wait for one that waits for this lease
                self._start(task, failure)

    def take(self, lease: Lease) -> bool:
        """Grant a lease that no task has yet, if its pool has the items and no lease waits for it.

        Call it under the lock. The items go back with the last task of the lease.
        """
        waiting = self.waiting.setdefault(lease.pool, _Waiting())
        if waiting.loads or waiting.saves or not lease.count or self._fill(lease):
            return False
        if lease.items is None:
            return False
        waiting.granted_saves += lease.store
        return True

    @staticmethod
    def _fill(lease: Lease) -> Exception | None:
        """Take the items of a lease if the pool has them; return the pool's error."""
        try:
            lease.items = lease.take()
        except Exception as error:  # any error of the pool ends the tasks of the lease
            return error
        return None

    def end(
        self, task: Task, landed: Mask | None, state: str, error: BaseException | None = None
    ) -> None:
        """Record the end of a task, and release the tasks that wait for it."""
        outcome = task.outcome
        outcome.end(state, landed, error)
        self.live.discard(task)
        if task.queue:
            task.queue.queued_bytes -= task.nbytes
            if state != "landed":
                self.count(task.queue.tier, task.name, state, task.blocks)
        ready = list[Task]()
        schedule = task.schedule
        for follower in schedule.followers:
            follower.schedule.waits -= 1
            if not follower.schedule.waits and not follower.outcome.ended:
                ready.append(follower)
        # The first is settled first: the end of a load comes after the ends of its layers.
        self.todo += ready[::-1]
        lease = task.lease
        task.lease = None
        task.work = None
        task.after = ()
        schedule.followers = []
        if schedule.watched:
            self.wake()
        on_end = task.on_end
        task.on_end = None
        if on_end:
            on_end()
        if lease:
            self._release(lease, task)

    def _release(self, lease: Lease, task: Task) -> None:
        """Record the end of a task of a lease; return the items after the last task."""
        lease.users -= 1
        if lease.users:
            return
        try:
            if lease.ended:
                lease.ended(lease)
        except Exception as error:  # raised by the maker: the items go back anyway
            task.outcome.add_error(error)
        if not lease.users:  # `ended` began no further task of the lease
            self.give(lease)

    def give(self, lease: Lease) -> None:
        """Return the items of a lease without tasks to its pool, under the lock."""
        if lease.count and lease.items is not None:
            lease.pool.give(lease.items)
            lease.items = None
            self.waiting[lease.pool].granted_saves -= lease.store
        self.grant(lease.pool)

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
            self.cancel(task)
        for queue in self.queues.values():
            queue.change.notify_all()


def _not_open(why: str) -> TransferError:
    """Return the error for work on a graph whose workers do not run here."""
    return TransferError(f"Expected a graph that is open, got one that {why}. Make another.")
