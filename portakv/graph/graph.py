# SPDX-License-Identifier: Apache-2.0
"""The transfer graph: tasks of blocking work with dependencies, priorities and deadlines, carried
out by the workers of queues, for block stores and for whoever else moves blocks."""

from __future__ import annotations

import atexit
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from heapq import heapify, heappop, heappush
from traceback import clear_frames
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args
from weakref import WeakKeyDictionary

import numpy as np

from portakv import arguments
from portakv.errors import InvalidTerms, TransferCancelled, TransferError
from portakv.graph.trace import Ran, Trace
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.worker import EXIT_SECONDS, RateLimit

T = TypeVar("T")

#: How soon a task is due.
Priority: TypeAlias = Literal["urgent", "normal", "background"]
#: How a task ends that did not run.
Unrun: TypeAlias = Literal["cancelled", "late", "dropped"]
#: Seconds after its submission at which a task of each priority is due.
SLACK = {"urgent": 0.0, "normal": 0.05, "background": 2.0}


@dataclass(eq=False)
class Lease:
    """What a chain of tasks takes from a pool before its first task starts: all or none. It goes
    back when the last task that names it has ended. Under the graph's lock: ``pool.take(count,
    store)`` returns items or None; ``ended(lease)`` comes before ``pool.give(items)``. After
    ``until``, by the graph's clock, tasks that still wait for it end as dropped."""

    pool: Any
    count: int  # 0: it takes none, and its items are the maker's
    store: bool = False
    until: float | None = None
    ended: Callable[[Any], object] | None = None
    items: Any = None  # while it is granted
    users: int = 0  # tasks that name it and did not end
    tasks: list[Task] = field(default_factory=list, init=False)  # that wait for it

    def __post_init__(self) -> None:
        arguments.whole("count", self.count)
        if self.count:
            _check_pool(self.pool)
        arguments.flag("store", self.store)
        if self.until is not None:
            arguments.number("until", self.until, what="a time of the graph's clock")
        if self.ended is not None and not callable(self.ended):
            raise arguments.invalid("ended", "a function or None", self.ended)


def _check_pool(pool: Any) -> None:
    """Raise `InvalidTerms` for what gives and takes no items."""
    if not callable(getattr(pool, "take", None)) or not callable(getattr(pool, "give", None)):
        raise arguments.invalid("pool", "an object with take() and give()", pool)


@dataclass(eq=False, repr=False)
class Task:
    """Blocking work for some blocks. ``work(task, mask)`` moves those of a mask (bool ``[blocks]``)
    and returns which landed; None: all of them. Without a queue it is a gate, which ends when all
    that it follows have. ``after`` holds tasks, or (task, mine, theirs): block mine[i] needs block
    theirs[i] of that one. A rescue moves what did not land in the one task that it follows.
    ``given``: which blocks may be tried at all, or a function that returns them, which is called
    under the graph's lock once all that the task follows has ended; ``name``: what it does.

    ``state``: new, waiting, room (for its lease), queued, running; then landed (it ran, or no block
    was left for it), failed, cancelled, late or dropped. ``error``: the first exception of it or of
    what it follows."""

    work: Any
    blocks: int
    _: KW_ONLY
    queue: Any = None
    nbytes: int = 0
    after: Sequence[Any] = ()
    rescue: bool = False
    lease: Lease | None = None
    given: Any = None
    name: str = ""

    state = "new"
    ended = False
    cut = False
    watched = False
    background = False
    number = 0
    waits = 0
    due = 0.0
    since = 0.0
    graph = error = left = cast(Any, None)
    trail: Any = ()  # of one that never ran: numbers of what ran before it, for the trace
    short = ""  # of a gate: the queue of the first that did not move all it could, without an error

    def __post_init__(self) -> None:
        if self.work is not None and not callable(self.work):
            raise arguments.invalid("work", "a function or None", self.work)
        arguments.whole("blocks", self.blocks, most=1 << 31)
        arguments.whole("nbytes", self.nbytes)
        arguments.flag("rescue", self.rescue)
        arguments.text("name", self.name, least=0)
        if self.queue is not None:
            arguments.instance("queue", self.queue, Queue, "Take it from Graph.queue(name).")
        if self.lease is not None:
            arguments.instance("lease", self.lease, Lease)
        self.after = [x if isinstance(x, tuple) else (x, None, None) for x in self._after()]
        self.followers = list[Task]()
        self.landed: Any = np.zeros(self.blocks, np.bool_)  # which blocks landed, once it ended

    def _after(self) -> list[Any]:
        """Return what ``after`` holds; raise `InvalidTerms` for what is no task."""
        found = arguments.items("after", self.after, "tasks")
        for each in found:
            task = each[0] if isinstance(each, tuple) and len(each) == 3 else each
            if not isinstance(task, Task):
                raise arguments.invalid("after", "tasks, or tuples (task, mine, theirs)", task)
        return found

    def ran_before(self) -> set[int]:
        """Numbers of what it follows, through tasks that never ran."""
        return {number for x, *_ in self.after for number in x.trail or (x.number,)}

    def done(self) -> bool:
        """True once it ended; never blocks."""
        return self.wait(0.0)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it ended, at most ``timeout`` seconds; True if it did."""
        seconds = arguments.seconds("timeout", timeout, optional=True)
        if (graph := self.graph) is None:  # it was not submitted
            return False
        if self.ended or graph.process.forked:  # a child has no thread to wait for
            return True
        until = graph.clock() + seconds
        while (now := graph.sweep()) < until and not self.ended:
            graph.pause(self, until, now)
        return self.ended


class Queue:
    """A pair of places with ``width`` workers, made by `Graph.queue`. ``queued_bytes`` are those of
    tasks that were submitted for it and have not ended."""

    def __init__(self, graph: Graph, name: str, width: int, max_gbps: Any, stall_seconds: float):
        self.graph = graph
        self.name = name
        self.width = max(1, width)
        self.stall = stall_seconds
        self.max_gbps = max_gbps
        self.limit = RateLimit(max_gbps, graph.clock) if max_gbps else None
        self.pace = 0.0
        self.tier = name.partition(":")[0]
        self.change = threading.Condition(graph.lock)
        self.queued_bytes = self.background = self.workers = 0
        # A worker has ended a task and takes the next: waking another one costs more than a task.
        self.taker = False
        # (due, number, task), and those of the background; since when what runs does.
        self.heaps = (list[Any](), list[Any]())
        self.running = dict[Task, float]()

    @property
    def oldest_wait(self) -> float:
        """Seconds for which a task that could run has waited for a worker."""
        since = [x[2].since for heap in self.heaps for x in heap if x[2].state == "queued"]
        return self.graph.clock() - min(since) if since else 0.0

    @property
    def slow(self) -> bool:
        """A task has run for longer than ``stall_seconds``; new background tasks are dropped."""
        now = self.graph.clock()
        return now - min(self.running.values(), default=now) > self.stall

    def push(self, task: Task) -> None:
        """Have a worker run a task in its turn."""
        task.state = "queued"
        task.since = self.graph.clock()
        heappush(self.heaps[task.background], (task.due, task.number, task))
        if not self.taker:
            self.change.notify()
        self.taker = False
        if self.workers < self.width:
            try:
                self._begin_worker()
            except RuntimeError as error:  # the system gives no more threads
                if not self.workers:
                    self.graph.end(task, False, "failed", error)

    def _begin_worker(self) -> None:
        terms = self.serve, f"portakv {self.name}", (self.workers + 1,)
        thread = threading.Thread(None, *terms, daemon=True)
        thread.start()
        self.graph.threads.append(thread)
        self.workers += 1
        atexit.register(self.graph.close)  # once more, as memory must not go before a worker

    def next(self) -> Task | None:
        """Wait for a task, which runs from now on; None if the graph is closed."""
        with self.graph.lock:
            self.taker = False
            while not self.graph.closed.is_set():
                now = self.graph.sweep()
                free = self.background < max(1, self.width - 1)  # a worker for the background
                heaps = [heap for heap in (self.heaps if free else self.heaps[:1]) if heap]
                if self.pace > now or not heaps:
                    self.change.wait(self.pace - now if self.pace > now else None)
                elif (task := heappop(min(heaps))[2]).state == "queued":  # it was not cancelled
                    task.state = "running"
                    self.running[task] = now
                    self.background += task.background
                    if self.limit:
                        self.limit.start_of(task.nbytes)
                        self.pace = self.limit.start_of(0)
                        self.change.notify()  # another worker waits until then
                    return cast(Task, task)
        return None

    def serve(self, worker: int) -> None:
        """What a worker does until the graph is closed."""
        graph = self.graph
        task = self.next()
        while task:
            error = None
            landed = task.left
            try:
                if (told := task.work(task, landed.copy())) is not None:
                    landed = landed & np.asarray(told, np.bool_).reshape(task.blocks)
            except BaseException as caught:  # no caller stands above this thread
                clear_frames(caught.__traceback__)  # which hold views
                error = caught
                landed = False
            with graph.lock:
                start = self.running.pop(task)
                end = graph.clock()
                self.background -= task.background
                what = task.number, task.name, task.blocks, task.nbytes, (*task.ran_before(),)
                graph.trace.add(self.tier, Ran(self.name, worker, start, end, *what))
                self.taker = not (task.background and self.heaps[1])
                graph.end(task, landed, "failed" if error else "landed", error)
                graph.settle()
                task = error = landed = None  # an idle worker holds nothing
                task = self.next()  # within the lock: to take it twice costs more than a task


class Graph:
    """Queues and tasks under one ``lock``, which a caller may hold for a moment as well; ``clock``
    never goes back. An interrupt of a caller leaves tasks and leases as they were before the call,
    or as the whole call leaves them: the main thread changes them in a helper (`run`)."""

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
        self.sleepers = set[threading.Lock]()  # a held lock of each thread in `pause`
        self.queues = dict[str, Queue]()
        self.counts = Counter[tuple[str, str, str]]()  # blocks by tier, op and result
        self.nbytes = Counter[tuple[str, str]]()
        self.threads = list[threading.Thread]()
        self.live = set[Task]()
        self.todo = list[Task]()
        self.timers = list[Any]()  # (when, number, the state to end in, task)
        # By pool, which another may hold: loads that wait, stores that do, leases of stores.
        self.rooms = WeakKeyDictionary[Any, Any]()

    def queue(
        self,
        name: str,
        width: int | None = None,
        max_gbps: float | None = None,
        stall_seconds: float | None = None,
    ) -> Queue:
        """Return the queue of that name, made if there is none; what stands before ":" is its tier.

        Args:
            width: workers; None: those that it has, or 1.
            max_gbps: the most 10^9 bytes in a second; None: as it has, or no limit.
            stall_seconds: `Queue.slow` after so long; None: as it has, or 10.

        Raises:
            InvalidTerms: no such terms, or other ones than the queue of that name has.
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
        asked = {"width": width, "max_gbps": max_gbps, "stall_seconds": stall_seconds}
        has = {"width": queue.width, "max_gbps": queue.max_gbps, "stall_seconds": queue.stall}
        for term, value in asked.items():
            if value is not None and value != has[term]:
                do = f"The queue {name!r} has it; pass the same, or None."
                raise arguments.invalid(term, str(has[term]), value, do)
        return queue

    def link(self, name: str, *terms: Any, **named: Any) -> Queue:
        """Return `queue` of that name: the former name of the method, which goes in 0.2.0."""
        warnings.warn(
            "Graph.link is now Graph.queue. The former name ships in 0.1.0 and goes in 0.2.0.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.queue(name, *terms, **named)

    def submit(
        self, tasks: Sequence[Task], *, priority: Priority = "normal", deadline: float | None = None
    ) -> None:
        """Begin tasks, all at once, each behind those that it follows. ``deadline`` seconds from
        now those that nobody follows are cancelled. Raises `InvalidTerms` for a priority or a
        deadline that is none, and for a task that was submitted before or follows one that never
        was; `TransferError` after `close`, or in a forked process. If the caller is interrupted,
        the tasks are cancelled."""
        tasks = arguments.items("tasks", tasks, "tasks")
        for task in tasks:
            arguments.instance("tasks", task, Task, "Pass a list of tasks.")
        arguments.one_of("priority", priority, SLACK)
        by = np.inf
        if deadline is not None:
            by = arguments.seconds("deadline", deadline)
        new = {*tasks}
        after = {x for task in tasks for x, *_ in task.after} - new
        if any(task.graph for task in new):
            raise InvalidTerms(
                "Expected tasks that are new, got one that was submitted before. Make another."
            )
        if not all(task.graph is self for task in after):
            raise InvalidTerms(
                "Expected tasks that follow nodes of this graph, got one that follows another. "
                "Submit that one first, or in the same call."
            )
        if self.process.forked:  # the lock may be held for ever
            raise _not_open("belongs to the process that this one was forked from")
        begin = partial(self._begin, tasks, priority, by)
        self.run(begin, undo=lambda _: [self.cancel(task) for task in tasks])

    def run(self, work: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """Return ``work()``, run under the lock where no interrupt reaches it; if the caller is
        interrupted, ``undo(result)`` takes it back (see `uninterrupted`). A thread that has the
        lock runs it itself."""
        if self.lock._is_owned():  # type: ignore[attr-defined]  # as `threading.Condition` asks it
            return work()

        def locked() -> T:
            with self.lock:
                return work()

        return uninterrupted(locked, undo)

    def _begin(self, tasks: Sequence[Task], priority: str, by: float) -> None:
        """Enter new tasks and begin those that follow nothing. No task is left if that fails."""
        if self.closed.is_set():
            raise _not_open("is closed")
        now = self.clock()
        try:
            for task in tasks:
                task.background = priority == "background"
                task.due = now + min(by, SLACK[priority])
                self._enter(task)
            for task in tasks:
                if by < np.inf and not task.followers:
                    self.end_at(now + by, task, "late")
                if task.background and task.queue and task.queue.slow:
                    self.cancel(task, "dropped")
            ready = [task for task in tasks if not task.waits and task.state == "waiting"]
            self.todo += ready[::-1]  # the first one is settled first
            self.settle()
            self.sweep()
        except BaseException as error:  # of a pool
            for task in tasks:
                if task in self.live and task.state != "running":
                    self.end(task, False, "failed", error)
            self.settle()
            raise

    def _enter(self, task: Task) -> None:
        """Note what a new task waits for. What another transfer began becomes as urgent."""
        self.number += 1
        task.graph = self
        task.state = "waiting"
        task.number = self.number
        self.live.add(task)
        if task.queue:
            task.queue.queued_bytes += task.nbytes
        if task.lease:
            task.lease.users += 1
        before = [x for x, *_ in task.after if not x.ended]
        task.waits = len(before)
        for one in before:
            one.followers.append(task)
        while before:
            one = before.pop()
            if one.due > task.due and not one.ended and one.state != "running":
                one.due = task.due
                one.background = False
                before += [x for x, *_ in one.after]
                if one.state in ("room", "queued"):
                    self.place(one)

    def cancel(self, task: Task, state: Unrun = "cancelled") -> bool:
        """End a task that does not run and, in turn, what it follows if nobody else does and it is
        no gate; a gate ends behind what runs. True if some blocks will not be moved."""
        arguments.instance("task", task, Task)
        arguments.one_of("state", state, get_args(Unrun))
        why = {"late": ": give more time", "dropped": ": staging had no room or the queue was slow"}
        kind = TransferCancelled if state == "cancelled" else TransferError
        error = kind(f"Some blocks had not begun and are {state}{why.get(state, '')}.")
        if task.graph is not self or self.process.forked:
            return False
        found: bool = self.run(partial(self._cancel, task, state, error))
        return found

    def _cancel(self, task: Task, state: str, error: TransferError) -> bool:
        """Do what `cancel` promises, under the lock."""
        tasks = [task]
        found = False
        while tasks:
            task = tasks.pop()
            if task.cut or task.state == "running":
                continue
            task.cut = True
            if state == "late":
                task.error = task.error or error
            before = [x for x, *_ in task.after if x.queue]
            tasks += [x for x in before if all(y.cut for y in x.followers)]
            if task.queue:
                found = True
                self.end(task, False, state, error)
        self.settle()
        return found

    def end_at(self, when: float, task: Task, state: str) -> None:
        """Have `sweep` cancel a task at a time."""
        if len(self.timers) > 2 * len(self.live) + 100:  # most are of tasks that ended in time
            self.timers = [x for x in self.timers if not x[3].ended]
            heapify(self.timers)
        heappush(self.timers, (when, task.number, state, task))
        if self.timers[0][3] is task:
            self.wake()

    def pause(self, task: Task, until: float, now: float) -> None:
        """Wait for the end of a task, for a timer, or until a time; perhaps for less. It takes no
        lock of the graph, so that an interrupt leaves none."""
        sleeper = threading.Lock()
        sleeper.acquire()
        self.sleepers.add(sleeper)
        task.watched = True
        if not task.ended:  # whoever ends it from now on wakes this thread
            until = min(until, now + 3600, *(timer[0] for timer in self.timers[:1]))
            sleeper.acquire(timeout=max(0.0, until - now))
        self.sleepers.discard(sleeper)

    def wake(self) -> None:
        """Have threads in `pause` look again; under the lock."""
        for sleeper in tuple(self.sleepers):
            self.sleepers.discard(sleeper)
            sleeper.release()

    def sweep(self) -> float:
        """Cancel what is too late, and return the time; called by whoever works or waits."""
        now = self.clock()
        if any(timer[0] <= now or timer[3].ended for timer in self.timers[:1]):
            self.run(partial(self._sweep, now))
        return now

    def _sweep(self, now: float) -> None:
        """Cancel what is too late, under the lock."""
        while self.timers and (self.timers[0][0] <= now or self.timers[0][3].ended):
            _, _, state, task = heappop(self.timers)
            if state == "late" or (task.state == "room" and task.lease.until is not None):
                self.cancel(task, state)

    def settle(self) -> None:
        """Go on with tasks for which all that they follow has ended."""
        while self.todo:
            task = self.todo.pop()
            task.left = left = self._left(task)
            if task.queue and left.any():
                self.place(task)
            else:
                if task.followers:
                    task.trail = task.ran_before()
                if not (task.queue or task.error or left.all()):
                    moved = [x for x, *_ in task.after if x.queue and (x.left > x.landed).any()]
                    task.short = moved[0].queue.name if moved else ""
                self.end(task, left, "landed")

    def _left(self, task: Task) -> Any:
        """The blocks that a task may move, by what it follows: bool ``[blocks]``."""
        left = ~task.landed
        try:
            given = task.given() if callable(task.given) else task.given
            if given is not None:
                left[:] = given
        except Exception as error:  # of the maker's function
            task.error = task.error or error
            left[:] = False
            return left
        try:
            for before, mine, theirs in task.after:
                task.error = task.error or before.error
                if task.rescue:
                    left &= ~before.landed
                    task.landed = before.landed
                elif mine is None:
                    left &= before.landed
                else:
                    left[np.asarray(mine, int)[~before.landed[theirs]]] = False
        except (IndexError, ValueError) as error:  # these are no blocks of both
            task.error = error
            left[:] = False
        return left

    def place(self, task: Task) -> None:
        """Queue a task for its lease, or its queue."""
        lease = task.lease
        if not lease or lease.items is not None or not lease.count:
            task.queue.push(task)
            return
        if lease.until is not None:
            self.end_at(lease.until, task, "dropped")
        task.state = "room"
        room = self.rooms.setdefault(lease.pool, [[], [], 0])
        lease.tasks.append(task)
        heappush(room[lease.store], (task.due, task.number, lease))
        self.grant(lease.pool)

    def grant(self, pool: Any) -> None:
        """Grant leases, in order; to be called if items of a pool came free but not from a lease.
        Loads pass a store that waits for other stores, but none that waits for loads."""
        _check_pool(pool)
        self.run(partial(self._grant, pool))

    def _grant(self, pool: Any) -> None:
        """Do what `grant` promises, under the lock."""
        room = self.rooms.get(pool, [])
        heaps = room[:2]
        while heaps := [heap for heap in heaps if heap]:
            heap = min(heaps)
            lease = heap[0][2]
            tasks = [task for task in lease.tasks if task.state == "room"]
            if tasks and lease.items is None:
                try:
                    lease.items = pool.take(lease.count, lease.store)
                except Exception as error:  # of the pool
                    heappop(heap)
                    lease.tasks.clear()
                    for task in tasks:
                        self.end(task, False, "failed", error)
                    continue
                if lease.items is None:
                    heaps = [x for x in heaps if x is not heap and (room[2] or not lease.store)]
                    continue
                room[2] += lease.store
            heappop(heap)
            lease.tasks.clear()
            for task in tasks:  # together: none may wait for a task that waits for this lease
                task.queue.push(task)

    def end(self, task: Task, landed: Any, state: str, error: Any = None) -> None:
        """Note how a task ended, and what does not wait for it any more."""
        task.error = task.error or error
        task.landed = task.landed | landed
        task.state = state
        task.ended = task.cut = True
        self.live.discard(task)
        if task.queue:
            task.queue.queued_bytes -= task.nbytes
            if state != "landed":
                self.count(task.queue.tier, task.name, state, task.blocks)
        for follower in task.followers:
            follower.waits -= 1
            if not follower.waits and not follower.ended:
                self.todo.append(follower)
        lease = task.lease
        task.lease = None
        task.work = None
        task.after = ()
        task.followers = []
        if task.watched:
            self.wake()
        if lease:
            lease.users -= 1
            if not lease.users:
                try:
                    if lease.ended:
                        lease.ended(lease)
                except Exception as error:  # of the maker: the items go back all the same
                    task.error = task.error or error
                if lease.count and lease.items is not None:
                    lease.pool.give(lease.items)
                    lease.items = None
                    self.rooms[lease.pool][2] -= lease.store
                self.grant(lease.pool)

    def count(self, tier: str, op: str, result: str, blocks: int = 1, nbytes: int = 0) -> None:
        """Add to what `statistics` tells."""
        self.run(partial(self._count, tier, op, result, blocks, nbytes))

    def _count(self, tier: str, op: str, result: str, blocks: int, nbytes: int) -> None:
        """Add to the figures, under the lock."""
        self.counts[tier, op, result] += blocks
        self.nbytes[tier, op] += nbytes

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Figures by the names that they have in Prometheus, but for "portakv_": of each a list of
        its labels and "value". `Collector` takes any others beside them."""
        if self.process.forked:  # its lock may be held for ever
            return {}
        return self.run(self._statistics)

    def _statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Return the figures, under the lock."""
        found = self.trace.statistics()
        found["tier_blocks_total"] = [
            {"tier": tier, "op": op, "result": result, "value": blocks}
            for (tier, op, result), blocks in self.counts.items()
        ]
        found["tier_bytes_total"] = [
            {"tier": tier, "op": op, "value": n} for (tier, op), n in self.nbytes.items()
        ]
        queues = [*self.queues.values()]
        found["link_queue_bytes"] = [{"link": x.name, "value": x.queued_bytes} for x in queues]
        found["link_oldest_seconds"] = [{"link": x.name, "value": x.oldest_wait} for x in queues]
        found["link_slow"] = [{"link": x.name, "value": x.slow} for x in queues]
        return found

    def close(self, timeout: float = EXIT_SECONDS) -> bool:
        """Cancel what does not run and wait for what does; True if it ended in time."""
        timeout = arguments.seconds("timeout", timeout)
        if self.process.forked:
            return True
        until = time.monotonic() + timeout
        self.run(self._close)
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not self.live

    def _close(self) -> None:
        """Cancel what does not run, and have idle workers end."""
        atexit.unregister(self.close)  # one wait at the end of the interpreter, if work hangs
        self.closed.set()
        for task in tuple(self.live):
            self.cancel(task)
        for queue in self.queues.values():
            queue.change.notify_all()


def _not_open(why: str) -> TransferError:
    """Return the error for work that is given to a graph whose workers do not run here."""
    return TransferError(f"Expected a graph that is open, got one that {why}. Make another.")
