# SPDX-License-Identifier: Apache-2.0
"""Test errors, limits and threads of the transfer graph; `test_model.py` tests its states."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import pytest

from portakv.errors import InvalidTerms, TransferCancelled, TransferError
from portakv.graph import Graph, Lease, Task

WAIT = 30.0  # seconds, for what takes none


class Items:
    """A pool of a few items, which records the calls that take them."""

    def __init__(self, count: int = 1) -> None:
        self.free = list(range(count))
        self.count = count
        self.takes = list[bool]()

    def take(self, count: int, store: bool) -> list[int] | None:
        if count > len(self.free):
            return None
        self.takes.append(store)
        return [self.free.pop() for _ in range(count)]

    def give(self, items: list[int]) -> None:
        assert not set(items) & set(self.free)
        self.free += items


class Blocked:
    """Work that starts, and runs until a test ends it."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.end = threading.Event()

    def __call__(self, task: Task, mask: Any) -> None:
        self.began.set()
        assert self.end.wait(WAIT)


def blocks_of(graph: Graph, result: str) -> int:
    """Return the blocks of reads from the disk that ended so."""
    graph.counts.sum_up()
    return graph.counts.blocks["disk", "read", result]


def nothing(task: Task, mask: Any) -> None:
    """Do no work."""


@pytest.fixture
def now() -> list[float]:
    """Return the time that the graph's clock shows."""
    return [0.0]


@pytest.fixture
def graph(now: list[float]) -> Iterator[Graph]:
    """Return a graph whose clock stands still until a test sets it."""
    graph = Graph(clock=lambda: now[0])
    yield graph
    assert graph.close(WAIT)


@pytest.fixture
def busy(graph: Graph) -> Iterator[Blocked]:
    """Occupy the one worker of queue "one"."""
    work = Blocked()
    graph.submit([Task(work, 1, queue=graph.queue("one"))], priority="urgent")
    assert work.began.wait(WAIT)
    yield work
    work.end.set()


def test_blocks_that_do_not_fit_fail_their_node_alone(graph: Graph) -> None:
    queue = graph.queue("any")
    read = Task(lambda task, mask: [True, False], 2, queue=queue)
    others: list[Any] = [read, (read, [3], [1]), (read, [0], [2]), (read, [0, 1], [0, 1, 0])]
    tasks = [Task(nothing, 1 + bool(one is not read), queue=queue, after=[one]) for one in others]
    tasks += [Task(None, 2, eligible=[True] * 3), Task(None, 1, after=[read])]
    graph.submit([read, *tasks])
    assert all(task.wait(WAIT) for task in tasks)
    assert [(task.state, *task.landed[task.landed]) for task in tasks] == [("landed",)] * 6
    assert all(isinstance(task.error, IndexError | ValueError) for task in tasks)
    after = Task(nothing, 1, queue=queue)
    graph.submit([after])
    assert after.wait(WAIT)


def test_a_link_keeps_its_terms(graph: Graph) -> None:
    queue = graph.queue("disk:a", width=3, max_gbps=2.0)
    assert graph.queue("disk:a") is graph.queue("disk:a", width=3, max_gbps=2.0) is queue
    for terms in ({"width": 2}, {"max_gbps": 1.0}, {"stall_seconds": 3.0}, {"width": True}):
        with pytest.raises(InvalidTerms, match=f"Expected {next(iter(terms))} to be"):
            graph.queue("disk:a", **terms)
    assert graph.queue("disk:b").width == 1


def test_terms_that_are_none_are_refused_before_anything_begins(graph: Graph) -> None:
    good = Task(nothing, 1, queue=graph.queue("any"))
    known = Task(nothing, 1)
    other = Graph()
    graph.submit([known])
    other.submit([foreign := Task(None, 1)])
    for tasks, terms in (
        ([], {"priority": "hasty"}),
        ([], {"priority": None}),
        ([], {"deadline": "soon"}),
        ([], {"deadline": -1}),
        ([3], {}),
        ([known], {}),
        ([Task(None, 1, after=[Task(nothing, 1)])], {}),
        ([Task(None, 1, after=[foreign])], {}),
    ):
        with pytest.raises(InvalidTerms, match=f"Expected {next(iter(terms), 'tasks')}"):
            graph.submit([good, *tasks], **terms)
    assert not good.wait()
    assert not graph.cancel(good)
    graph.submit([good])
    assert good.wait(WAIT)
    assert [x.queued_bytes for x in graph.queues.values()] == [0] * len(graph.queues)


def test_a_system_without_threads_fails_what_it_cannot_begin(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    plain = Task(nothing, 1, queue=graph.queue("any"))
    wide = graph.queue("wide", 2)
    work = Blocked()
    graph.submit([Task(work, 1, queue=wide)])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        queued = Task(nothing, 1, queue=wide)
        graph.submit([plain, queued])
    assert plain.done()
    assert (plain.state, str(plain.error)) == ("failed", "can't start new thread")
    work.end.set()
    assert queued.wait(WAIT)
    again = Task(nothing, 1, queue=plain.queue)
    graph.submit([again])
    assert again.wait(WAIT)


# --- order ----------------------------------------------------------------------------------------


def test_what_an_urgent_one_follows_is_as_urgent(graph: Graph, busy: Blocked) -> None:
    """A load hastens the read of a prefetch that waits for its lease."""
    ran = list[str]()
    queue = graph.queue("one")
    pool = Items(0)
    work = lambda task, mask: ran.append(task.name)  # noqa: E731
    tasks = [Task(work, 1, queue=queue, name=name, lease=Lease(pool, 1)) for name in "abc"]
    graph.submit(tasks, priority="background")
    urgent = Task(None, 1, after=tasks[-1:])
    graph.submit([urgent], priority="urgent")
    pool.give([0])
    graph.grant(pool)
    busy.end.set()
    assert all(task.wait(WAIT) for task in (*tasks, urgent))
    assert ran[0] == "c"


@pytest.mark.parametrize("pool", [None, Items()], ids=["a worker", "a lease"])
def test_background_for_ever_and_urgent_for_ever_both_go_on(
    graph: Graph, now: list[float], pool: Items | None
) -> None:
    """Fault 51. Each task submits the next of its kind, and each takes a tenth of a second."""
    ran = Counter[str]()
    queue = graph.queue("one")

    def work(task: Task, mask: Any) -> None:
        now[0] += 0.1
        ran[task.name] += 1
        if ran.total() < 400:
            begin(task.name)

    def begin(*kinds: Any) -> None:
        for kind in kinds:
            lease = Lease(pool, 1, kind == "background") if pool else None
            graph.submit([Task(work, 1, queue=queue, lease=lease, name=kind)], priority=kind)

    with graph.lock:  # the first may not end before the others are there
        begin("background", "urgent", "urgent", "urgent")
    while graph.live:
        time.sleep(0.001)
    assert ran["background"] > 10
    assert ran["urgent"] > 200


def test_links_keep_a_pace() -> None:
    """Three pieces of 1 MB at 100 MB/s start 10 ms apart, by the graph's clock and trace."""
    graph = Graph()
    queue = graph.queue("paced", 2, max_gbps=0.1)
    tasks = [Task(nothing, 1, queue=queue, nbytes=10**6) for _ in range(3)]
    graph.submit(tasks)
    assert all(task.wait(WAIT) for task in tasks)
    begun = sorted(ran.start for ran in graph.trace.ran)
    assert begun[2] - begun[0] >= 0.0199
    assert graph.close(WAIT)


def test_what_waits_for_its_pace_can_be_overtaken_and_cancelled(
    graph: Graph, now: list[float]
) -> None:
    """The queue is not slow meanwhile."""
    queue = graph.queue("paced", 4, max_gbps=0.1, stall_seconds=0.05)
    tasks = [Task(nothing, 1, queue=queue, nbytes=10**7, name=name) for name in "abcd"]
    graph.submit(tasks, priority="normal")
    assert tasks[0].wait(WAIT)
    urgent = Task(nothing, 1, queue=queue, nbytes=10**7, name="urgent")
    graph.submit([urgent], priority="urgent")
    assert graph.cancel(tasks[1])
    now[0] = 0.09
    assert not queue.slow
    for now[0], task in [(0.101, urgent), (0.202, tasks[2]), (0.303, tasks[3])]:
        assert task.wait(WAIT)
    began = {ran.name: ran.start for ran in graph.trace.ran}
    assert began == {"a": 0.0, "urgent": 0.101, "c": 0.202, "d": 0.303}


# --- leases ---------------------------------------------------------------------------------------


def test_a_lease_is_taken_once_and_goes_back_behind_the_last_node(graph: Graph) -> None:
    pool = Items(2)
    work = Blocked()
    reported = list[Any]()
    queue = graph.queue("any", 2)
    lease = Lease(pool, 2, ended=lambda lease: reported.append((lease.items, list(pool.free))))
    read = Task(nothing, 1, queue=queue, lease=lease)
    copy = Task(work, 1, queue=queue, after=[read], lease=lease)
    graph.submit([read, copy])
    assert work.began.wait(WAIT)
    other = Task(nothing, 1, queue=queue, lease=Lease(pool, 1))
    joined = Task(
        nothing, 1, queue=queue, after=[read], lease=lease
    )  # as a load joins another's read
    graph.submit([other, joined])
    assert joined.wait(WAIT)
    assert (other.state, pool.free) == ("leasing", [])
    work.end.set()
    assert other.wait(WAIT)
    assert reported == [([1, 0], [])]
    assert sorted(pool.free) == [0, 1]


def test_what_a_lease_calls_may_raise(graph: Graph) -> None:
    """The task has the error, the items go back, and the worker goes on."""
    error = ValueError("a fault")
    pool = Items(1)
    queue = graph.queue("any")

    def raises(_: object) -> None:
        raise error

    task = Task(nothing, 1, queue=queue, lease=Lease(pool, 1, ended=raises))
    gate = Task(None, 1, after=[task])
    other = Task(nothing, 1, queue=queue, lease=Lease(pool, 1))
    graph.submit([task, gate, other])
    assert gate.wait(WAIT)
    assert gate.error is error
    assert other.wait(WAIT)
    assert (bool(other.landed.all()), pool.free) == (True, [0])


def test_a_pool_that_raises_fails_the_nodes_that_wait_for_it(graph: Graph) -> None:
    error = ValueError("a fault")
    queue = graph.queue("any")
    work = Blocked()
    pool = Items(1)
    first = Task(work, 1, queue=queue, lease=Lease(pool, 1))
    second = Task(nothing, 1, queue=queue, lease=Lease(pool, 1))
    third = Task(nothing, 1, queue=queue)
    gate = Task(None, 1, after=[second])
    graph.submit([first, second, gate])
    assert work.began.wait(WAIT)

    def raises(count: int, store: bool) -> list[int] | None:
        raise error

    pool.take = raises  # type: ignore[method-assign]
    work.end.set()  # the worker of `first` calls the pool for `second`
    assert gate.wait(WAIT)
    assert (second.state, gate.error) == ("failed", error)
    graph.submit([third])
    assert third.wait(WAIT)
    assert third.landed.all()


def test_blocks_that_cannot_be_told_are_not_given(graph: Graph) -> None:
    error = KeyError("a fault")

    def unknown() -> Any:
        raise error

    read = Task(nothing, 1, queue=graph.queue("any"))
    gate = Task(None, 1, after=[read], eligible=unknown)
    other = Task(nothing, 1, queue=graph.queue("any"), after=[read])
    graph.submit([read, gate, other])
    assert gate.wait(WAIT)
    assert gate.error is error
    assert not gate.landed.any()
    assert other.wait(WAIT)
    assert other.landed.all()


def test_what_ended_is_forgotten(graph: Graph) -> None:
    """Tasks hold views, and a pool is all of a store's memory; a graph may outlive them."""
    pool = Items(1)
    task = Task(work := Blocked(), 1, queue=graph.queue("any"), lease=Lease(pool, 1))
    follower = Task(nothing, 1, after=[task], queue=graph.queue("any"), lease=task.lease)
    refs = [weakref.ref(x) for x in (pool, work, task, follower)]
    graph.submit([task, follower], deadline=99.0)
    work.end.set()
    assert follower.wait(WAIT)
    graph.sweep()
    del pool, work, task, follower
    until = time.monotonic() + WAIT
    while any(ref() for ref in refs) and time.monotonic() < until:
        gc.collect()
    assert [ref() for ref in refs] == [None] * 4


def test_barriers_of_one_task_end_in_the_order_in_which_they_were_submitted(graph: Graph) -> None:
    """Whoever sees the end of a load, which is submitted last, sees the ends of its layers."""
    work = Blocked()
    read = Task(work, 1, queue=graph.queue("disk"))
    barriers = [Task(None, 1, after=[read]) for _ in range(4)]
    ends = list[int]()
    for number, barrier in enumerate(barriers):
        barrier.on_end = partial(ends.append, number)
    graph.submit([read, *barriers])
    work.end.set()
    assert all(barrier.wait(WAIT) for barrier in barriers)
    with graph.lock:  # all of them end under it
        assert ends == [0, 1, 2, 3]


def test_who_waits_learns_of_a_time_that_was_set_since(graph: Graph) -> None:
    """No other thread looks at the clock when the lease is requested."""
    real = Graph()
    work = Blocked()
    pool = Items(0)
    read = Task(work, 1, queue=real.queue("disk"))
    lease = Lease(pool, 1, store=True, until=(until := real.clock() + 0.2))
    follower = Task(nothing, 1, queue=real.queue("device"), after=[read], lease=lease)
    real.submit([read, follower])
    threading.Timer(0.05, work.end.set).start()
    assert follower.wait(WAIT)
    assert real.clock() - until < WAIT / 3
    assert follower.state == "dropped"
    assert real.close(WAIT)


def test_leases_come_in_order_and_stores_do_not_starve(graph: Graph, now: list[float]) -> None:
    """A store that waits for loads lets no later load pass; one that waits for stores does."""
    pool = Items(2)
    queue = graph.queue("any", 9)
    work = Blocked()
    first = Task(work, 1, queue=queue, lease=Lease(pool, 1))
    graph.submit([first], priority="urgent")
    assert work.began.wait(WAIT)
    large = Task(work, 1, queue=queue, lease=Lease(pool, 2, store=True))
    graph.submit([large], priority="background")
    now[0] = 3.0
    late = Task(nothing, 1, queue=queue, lease=Lease(pool, 1))
    graph.submit([late], priority="urgent")
    assert (large.state, late.state) == ("leasing", "leasing")
    work.end.set()
    assert late.wait(WAIT)
    assert large.wait(WAIT)
    assert pool.takes == [False, True, False]


def test_nothing_grows_with_what_ended(graph: Graph) -> None:
    """Neither distant deadlines nor tasks that were cancelled without rows accumulate."""
    pool = Items(0)
    queue = graph.queue("any")
    work = Blocked()
    graph.submit([Task(work, 1, queue=queue)], deadline=1e8)
    for _ in range(2000):
        waits = Task(nothing, 1, queue=graph.queue("other"), lease=Lease(pool, 1))
        gate = Task(None, 1, after=[waits])
        graph.submit([waits, gate], deadline=1e9)
        assert graph.cancel(gate)
        assert gate.done()
    work.end.set()
    heaps = [x for waiting in graph.waiting.values() for x in (waiting.loads, waiting.saves)]
    sizes = [len(graph.timers), len(graph.live), *map(len, heaps), *map(len, queue.heaps)]
    assert max(sizes) < 300


def test_items_that_come_back_otherwise_are_granted_when_told(graph: Graph) -> None:
    pool = Items(0)
    task = Task(nothing, 1, queue=graph.queue("any"), lease=Lease(pool, 1))
    own = Lease(Items(), 0, ended=lambda lease: ended.append(lease.items))
    ended = list[Any]()
    own.items = [5]  # as a load has of what is kept
    none = Task(nothing, 1, queue=graph.queue("any"), lease=own)
    graph.submit([task, none])
    assert none.wait(WAIT)
    assert (ended, cast(Any, own.pool).free) == ([[5]], [0])
    assert task.state == "leasing"
    pool.give([7])
    graph.grant(pool)
    assert task.wait(WAIT)


def chains_at_random(steps: int, seed: int) -> None:
    """Submit loads and stores of one or two chunks over a pool of one item.

    Tiers miss and fail, deadlines pass, tasks are cancelled. All tasks end; the item is free.
    """
    draw = random.Random(seed)
    graph = Graph(trace_events=100)
    pool = Items()
    gates = list[Task]()
    queues = [
        graph.queue(name, width) for name, width in (("disk", 2), ("remote", 3), ("device", 1))
    ]

    def work(task: Task, mask: Any) -> Any:
        if draw.random() < 0.05:
            raise OSError("a fault")
        return mask & (draw.random() < 0.9)

    for _ in range(steps):
        tasks = list[Task]()
        store = draw.random() < 0.5
        for _ in range(draw.randint(1, 2)):
            until = graph.clock() + draw.choice([0.0, 0.01, 60.0])
            lease = Lease(pool, 1, store=store, until=until)
            rescue = not store
            terms: dict[str, Any] = {"lease": lease, "nbytes": 10}
            first = Task(work, 2, queue=draw.choice(queues), **terms)
            then = Task(work, 2, queue=draw.choice(queues), after=[first], rescue=rescue, **terms)
            tasks += [first, then, Task(work, 2, queue=queues[2], after=[then], **terms)]
        gates.append(Task(None, 2, after=tasks[2::3]))
        priority: Any = draw.choice(["urgent", "normal", "background"])
        deadline = draw.choice([None, None, 0.0, 0.001, 60.0])
        graph.submit([*tasks, gates[-1]], priority=priority, deadline=deadline)
        if draw.random() < 0.1:
            graph.cancel(draw.choice([*tasks, *gates[-20:]]))
    for gate in gates:
        assert gate.wait(WAIT), gate.state
    assert graph.close(WAIT)
    assert (pool.free, [queue.queued_bytes for queue in queues]) == ([0], [0, 0, 0])
    assert not any(waiting.granted_saves for waiting in graph.waiting.values())


@pytest.mark.parametrize("seed", range(2))
def test_a_staging_of_one_block_lets_all_loads_and_stores_end(seed: int) -> None:
    """Fault 50."""
    chains_at_random(500, seed)


@pytest.mark.slow
def test_a_staging_of_one_block_lets_all_of_100_000_end() -> None:
    """Fault 50."""
    chains_at_random(100_000, 50)


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("busy")
def test_what_was_late_says_so_if_another_is_cancelled(graph: Graph) -> None:
    """Neither may end the task that both follow while the other waits; the last one does."""
    read = Task(nothing, 1, queue=graph.queue("one"))
    late = Task(None, 1, after=[read])
    cancelled = Task(None, 1, after=[read])
    graph.submit([read, cancelled])
    graph.submit([late], deadline=0.0)
    assert graph.cancel(cancelled)
    assert late.wait(WAIT)
    assert "late" in str(late.error)
    assert isinstance(cancelled.error, TransferCancelled)


def test_a_deadline_in_the_past_begins_nothing(graph: Graph) -> None:
    """Fault 53."""
    ran = list[str]()
    task = Task(lambda task, mask: ran.append("ran"), 1, queue=graph.queue("disk"), name="read")
    gate = Task(None, 1, after=[task])
    graph.submit([task, gate], priority="urgent", deadline=0.0)
    assert (ran, task.state, gate.landed.tolist()) == ([], "late", [False])
    assert gate.done()
    assert blocks_of(graph, "late") == 1


def test_a_worker_begins_nothing_that_is_late(
    graph: Graph, busy: Blocked, now: list[float]
) -> None:
    """No caller waits for the task, and its turn comes."""
    ran = list[str]()
    late = Task(lambda task, mask: ran.append("late"), 1, queue=graph.queue("one"))
    good = Task(lambda task, mask: ran.append("good"), 1, queue=graph.queue("one"))
    graph.submit([late], deadline=1.0)
    graph.submit([good])
    now[0] = 2.0
    busy.end.set()
    assert good.wait(WAIT)
    assert (ran, late.state) == (["good"], "late")


def test_a_stalled_disk_holds_up_nobody_else(graph: Graph, now: list[float]) -> None:
    """Fault 26. Its rows stay in use until it has released them."""
    work = Blocked()
    pool = Items()
    disk = graph.queue("disk", 2, stall_seconds=10.0)
    read = Task(work, 2, queue=disk, lease=Lease(pool, 1))
    copy = Task(nothing, 2, queue=graph.queue("device"), after=[read])
    gate = Task(None, 2, after=[copy])
    graph.submit([read, copy, gate], priority="urgent", deadline=0.2)
    assert work.began.wait(WAIT)
    other = Task(nothing, 1, queue=disk)
    graph.submit([other])
    assert other.wait(WAIT)
    assert not gate.wait(0.0)
    now[0] = 0.3
    assert gate.wait(0.0)
    assert (read.state, copy.state, sum(gate.landed), pool.free) == ("running", "late", 0, [])
    assert not disk.slow
    now[0] = 11.0
    assert disk.slow
    store = Task(nothing, 1, queue=disk, name="write")
    load = Task(nothing, 1, queue=disk)
    graph.submit([store], priority="background")
    graph.submit([load], priority="urgent")
    assert store.done()
    assert load.wait(WAIT)
    assert (store.state, load.state) == ("dropped", "landed")
    work.end.set()
    assert read.wait(WAIT)
    assert (disk.slow, pool.free) == (False, [0])


@pytest.mark.parametrize("error", [OSError("EIO"), KeyboardInterrupt(), SystemExit(), ValueError()])
def test_work_that_raises_fails_its_node_alone(graph: Graph, error: BaseException) -> None:
    """Fault 54."""

    def work(task: Task, mask: Any) -> None:
        raise error

    queue = graph.queue("disk")
    read = Task(work, 2, queue=queue, name="read")
    rescue = Task(lambda task, mask: [True, False], 2, queue=queue, after=[read], rescue=True)
    gate = Task(None, 2, after=[rescue])
    other = Task(nothing, 1, queue=queue)
    graph.submit([read, rescue, gate, other])
    assert gate.wait(WAIT)
    assert other.wait(WAIT)
    assert (read.state, gate.error is error, *other.landed) == ("failed", True, True)
    assert gate.landed.tolist() == [True, False]
    assert blocks_of(graph, "failed") == 2


def test_a_chain_of_any_length_ends_at_once(graph: Graph) -> None:
    tasks = [Task(None, 1, eligible=[False])]
    for _ in range(5000):
        tasks.append(Task(nothing, 1, queue=graph.queue("any"), after=tasks[-1:]))
    graph.submit(tasks)
    assert tasks[-1].done()


def test_nothing_asks_a_clock_that_may_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 28."""

    def back() -> float:
        raise AssertionError("time.time() was called")

    monkeypatch.setattr(time, "time", back)
    graph = Graph()
    assert graph.clock is time.monotonic
    tasks = [Task(nothing, 1, queue=graph.queue("any"), nbytes=9) for _ in range(9)]
    graph.submit(tasks, deadline=WAIT)
    assert all(task.wait(WAIT) for task in tasks)
    assert graph.close(WAIT)


def test_close_cancels_what_waits_and_waits_for_what_runs(now: list[float]) -> None:
    """Fault 15, in the graph's sense; a graph that is closed takes nothing more."""
    graph = Graph()
    work = Blocked()
    tasks = [Task(work, 1, queue=graph.queue("any")) for _ in range(3)]
    gate = Task(None, 1, after=tasks)
    graph.submit([*tasks, gate])
    assert work.began.wait(WAIT)
    assert not gate.wait(0.01)
    assert not graph.close(0.01)
    assert [task.state for task in tasks] == ["running", "cancelled", "cancelled"]
    work.end.set()
    assert graph.close(WAIT)
    assert gate.done()
    with pytest.raises(TransferError, match="got one that is closed"):
        graph.submit([Task(nothing, 1)])


def test_what_comes_while_a_graph_closes_is_refused() -> None:
    graph = Graph()
    reported = list[BaseException]()
    task = Task(nothing, 1, queue=graph.queue("any"))
    graph.submit([task])
    assert task.wait(WAIT)

    def submit() -> None:
        try:
            graph.submit([Task(nothing, 1, queue=task.queue)])
        except TransferError as error:
            reported.append(error)

    with graph.lock:
        late = threading.Thread(target=submit)
        late.start()
        time.sleep(0.05)  # the thread waits for the lock
        graph.close(0.0)
    late.join(WAIT)
    assert len(reported) == 1
    assert graph.close(WAIT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused() -> None:
    """Fault 13, in the graph's sense. The child does not wait for the parent's full queue."""
    graph = Graph()
    work = Blocked()
    task, follower = (Task(work, 1, queue=graph.queue("any")) for _ in range(2))
    graph.submit([task, follower])
    assert work.began.wait(WAIT)
    locked = threading.Event()
    free = threading.Event()

    def lock() -> None:
        with graph.lock:
            locked.set()
            free.wait(WAIT)

    threading.Thread(target=lock).start()
    assert locked.wait(WAIT)
    child = os.fork()
    if child == 0:
        signal.alarm(5)  # ends it if it waits for the lock
        code = 1
        try:
            graph.submit([Task(nothing, 1)])
        except TransferError:
            ended = task.wait() and graph.close() and not graph.cancel(follower)
            code = 0 if ended and graph.statistics() == {} else 2
        os._exit(code)
    free.set()
    assert os.waitpid(child, 0)[1] == 0
    work.end.set()
    assert follower.wait(WAIT)
    assert graph.close(WAIT)
