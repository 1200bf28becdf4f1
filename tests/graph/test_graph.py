# SPDX-License-Identifier: Apache-2.0
"""The transfer graph: what runs when, what lands, and that all of it ends."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.landed_model import expected_landed

from portakv.errors import InvalidTerms, TransferCancelled, TransferError
from portakv.graph import Graph, Lease, Task

WAIT = 30.0  # seconds, for what takes none


class Items:
    """A pool of a few items, which knows who has them."""

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


class Held:
    """Work that begins, and goes on until it is released."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.end = threading.Event()

    def __call__(self, task: Task, mask: Any) -> None:
        self.began.set()
        assert self.end.wait(WAIT)


def nothing(task: Task, mask: Any) -> None:
    """Work that is done at once."""


@pytest.fixture
def now() -> list[float]:
    """The time that the graph's clock shows."""
    return [0.0]


@pytest.fixture
def graph(now: list[float]) -> Iterator[Graph]:
    """A graph whose clock stands still until a test sets it."""
    graph = Graph(clock=lambda: now[0])
    yield graph
    assert graph.close(WAIT)


@pytest.fixture
def plug(graph: Graph) -> Iterator[Held]:
    """What occupies the one worker of queue "one"."""
    held = Held()
    graph.submit([Task(held, 1, queue=graph.queue("one"))], priority="urgent")
    assert held.began.wait(WAIT)
    yield held
    held.end.set()


def test_a_block_that_does_not_land_goes_no_further(graph: Graph) -> None:
    seen = list[object]()
    queue = graph.queue("disk", 2)
    read = Task(lambda task, mask: [True, False, True], 3, queue=queue)
    maps = (read, [0, 1, 1], [2, 0, 1])  # its block 1 needs two
    leg = Task(lambda task, mask: seen.append(mask.tolist()), 3, queue=queue, after=[maps])
    graph.submit([read, leg], priority="urgent")
    assert leg.wait(WAIT)
    assert seen == [[True, False, True]]
    assert leg.landed.tolist() == [True, False, True]


@given(data=st.data())
def test_what_lands_is_what_a_topological_sort_says(data: st.DataObject) -> None:
    """Any tasks, with maps, rescues, failures and blocks that are not given, submitted in parts."""
    graph = Graph()
    plan = list[Any]()
    queue = graph.queue("any", 3)
    bits = st.integers(0, 7).map(lambda n: np.array([n & 1, n & 2, n & 4], bool))
    tasks = list[Task]()
    for number in range(data.draw(st.integers(1, 8))):
        befores = data.draw(st.lists(st.integers(0, number - 1), max_size=3)) if number else []
        rescue = len(befores) == 1 and data.draw(st.booleans())
        pairs = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=4)
        maps = [None if rescue else data.draw(st.none() | pairs) for _ in befores]
        lands = data.draw(st.none() | bits)
        tried = data.draw(st.none() | bits)
        kind = (
            data.draw(st.sampled_from(["work", "work", "gate", "raise"])) if not rescue else "work"
        )
        plan.append((befores, maps, rescue, lands, tried, kind))

        def work(task: Task, mask: Any, lands: Any = lands, kind: str = kind) -> Any:
            if kind == "raise":
                raise ValueError("as planned")
            return lands

        after = [
            tasks[one] if pairs is None else (tasks[one], *np.array(pairs, int).reshape(-1, 2).T)
            for one, pairs in zip(befores, maps, strict=True)
        ]
        gate = kind == "gate"
        terms: dict[str, Any] = {"queue": None if gate else queue, "eligible": tried}
        tasks.append(Task(None if gate else work, 3, after=after, rescue=rescue, **terms))
    cut = data.draw(st.integers(0, len(tasks)))
    graph.submit(tasks[:cut], priority="background")
    graph.submit(tasks[cut:], priority="urgent")
    assert all(task.wait(WAIT) for task in tasks)
    assert graph.close(WAIT)
    landed = expected_landed(plan)
    assert [task.landed.tolist() for task in tasks] == [
        landed[n].tolist() for n in range(len(tasks))
    ]


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
    held = Held()
    graph.submit([Task(held, 1, queue=wide)])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        queued = Task(nothing, 1, queue=wide)
        graph.submit([plain, queued])
    assert plain.done()
    assert (plain.state, str(plain.error)) == ("failed", "can't start new thread")
    held.end.set()
    assert queued.wait(WAIT)
    again = Task(nothing, 1, queue=plain.queue)
    graph.submit([again])
    assert again.wait(WAIT)


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("submitted", "order"),
    [
        (
            ["background", "normal 1", "normal 2", "urgent"],
            "urgent, normal 1, normal 2, background",
        ),
        (["normal", "background by 0.04"], "background by 0.04, normal"),
        (
            ["background", "urgent at 1.9", "urgent at 2.1"],
            "urgent at 1.9, background, urgent at 2.1",
        ),
        (["urgent 1", "urgent 2 by 9"], "urgent 1, urgent 2 by 9"),
    ],
)
def test_due_times_are_priority_ageing_and_deadline_in_one(
    graph: Graph, plug: Held, now: list[float], submitted: list[str], order: str
) -> None:
    """A background task is overtaken by what is submitted within its slack, and by nothing else."""
    ran = list[str]()
    tasks = list[Task]()
    for name in submitted:
        priority, *terms = name.split()
        now[0] = float(terms[-1]) if "at" in terms else 0.0
        deadline = float(terms[-1]) if "by" in terms else None
        work = lambda task, mask: ran.append(task.name)  # noqa: E731
        tasks.append(Task(work, 1, queue=graph.queue("one"), name=name))
        named: Any = priority
        graph.submit(tasks[-1:], priority=named, deadline=deadline)
    assert graph.queue("one").oldest_wait == now[0]
    plug.end.set()
    assert all(task.wait(WAIT) for task in tasks)
    assert ", ".join(ran) == order


@pytest.mark.parametrize("waits", ["for a worker", "for its lease", "for a node"])
def test_what_an_urgent_one_follows_is_as_urgent(graph: Graph, plug: Held, waits: str) -> None:
    """As a load joins the read of a prefetch."""
    ran = list[str]()
    one = graph.queue("one")
    pool = Items(0)
    work = lambda task, mask: ran.append(task.name)  # noqa: E731
    leases = [Lease(pool, 1) if waits == "for its lease" else None for _ in range(3)]
    tasks = [Task(work, 1, queue=one, name=name, lease=leases.pop()) for name in ("a", "b", "c")]
    behind = Task(work, 1, queue=one, name="behind", after=tasks[-1:])
    graph.submit([*tasks, behind], priority="background")
    followed = behind if waits == "for a node" else tasks[-1]
    urgent = Task(None, 1, after=[followed])
    graph.submit([urgent], priority="urgent")
    pool.give([0])
    graph.grant(pool)
    plug.end.set()
    assert all(task.wait(WAIT) for task in (*tasks, behind, urgent))
    assert ran[0] == "c"
    assert ran.index("behind") == (1 if waits == "for a node" else 3)


@pytest.mark.parametrize(("width", "most"), [(1, 1), (2, 1), (4, 3)])
def test_background_leaves_a_worker_to_others(graph: Graph, width: int, most: int) -> None:
    queue = graph.queue("many", width)
    held = [Held() for _ in range(5)]
    tasks = [Task(work, 1, queue=queue) for work in held]
    graph.submit(tasks, priority="background")
    assert all(work.began.wait(WAIT) for work in held[:most])
    if width > 1:
        urgent = Task(nothing, 1, queue=queue)
        graph.submit([urgent], priority="urgent")
        assert urgent.wait(WAIT)
    assert [work.began.is_set() for work in held] == [n < most for n in range(5)]
    for work in held:
        work.end.set()
    assert all(task.wait(WAIT) for task in tasks)


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
    """Three pieces of 1 MB at 100 MB/s begin 10 ms apart, as the graph's clock and trace tell."""
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
    """And the queue is not slow for it."""
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
    held = Held()
    told = list[Any]()
    queue = graph.queue("any", 2)
    lease = Lease(pool, 2, ended=lambda lease: told.append((lease.items, list(pool.free))))
    read = Task(nothing, 1, queue=queue, lease=lease)
    leg = Task(held, 1, queue=queue, after=[read], lease=lease)
    graph.submit([read, leg])
    assert held.began.wait(WAIT)
    other = Task(nothing, 1, queue=queue, lease=Lease(pool, 1))
    joined = Task(
        nothing, 1, queue=queue, after=[read], lease=lease
    )  # as a load joins another's read
    graph.submit([other, joined])
    assert joined.wait(WAIT)
    assert (other.state, pool.free) == ("leasing", [])
    held.end.set()
    assert other.wait(WAIT)
    assert told == [([1, 0], [])]
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
    held = Held()
    pool = Items(1)
    first = Task(held, 1, queue=queue, lease=Lease(pool, 1))
    second = Task(nothing, 1, queue=queue, lease=Lease(pool, 1))
    third = Task(nothing, 1, queue=queue)
    gate = Task(None, 1, after=[second])
    graph.submit([first, second, gate])
    assert held.began.wait(WAIT)

    def raises(count: int, store: bool) -> list[int] | None:
        raise error

    pool.take = raises  # type: ignore[method-assign]
    held.end.set()  # the worker of `first` asks the pool for `second`
    assert gate.wait(WAIT)
    assert (second.state, gate.error) == ("failed", error)
    graph.submit([third])
    assert third.wait(WAIT)
    assert third.landed.all()


def test_blocks_that_cannot_be_told_are_not_given(graph: Graph) -> None:
    error = KeyError("a fault")

    def given() -> Any:
        raise error

    read = Task(nothing, 1, queue=graph.queue("any"))
    gate = Task(None, 1, after=[read], eligible=given)
    other = Task(nothing, 1, queue=graph.queue("any"), after=[read])
    graph.submit([read, gate, other])
    assert gate.wait(WAIT)
    assert gate.error is error
    assert not gate.landed.any()
    assert other.wait(WAIT)
    assert other.landed.all()


def test_all_nodes_of_a_lease_go_on_when_it_is_granted(graph: Graph) -> None:
    """Also those behind a task that waits for the end of this very lease."""
    pool = Items(1)
    queue = graph.queue("any", 2)
    held = Held()
    graph.submit([Task(held, 1, queue=queue, lease=Lease(pool, 1))])
    leases = [Lease(pool, 1), Lease(pool, 1)]
    tasks = [Task(nothing, 1, queue=queue, lease=leases[i]) for i in (0, 1, 0, 1)]
    graph.submit(tasks)
    held.end.set()
    assert all(task.wait(WAIT) for task in tasks)
    assert pool.free == [0]


def test_what_ended_is_forgotten(graph: Graph) -> None:
    """Tasks hold views, and a pool is all of a store's memory; a graph may outlive them."""
    pool = Items(1)
    task = Task(held := Held(), 1, queue=graph.queue("any"), lease=Lease(pool, 1))
    behind = Task(nothing, 1, after=[task], queue=graph.queue("any"), lease=task.lease)
    refs = [weakref.ref(x) for x in (pool, held, task, behind)]
    graph.submit([task, behind], deadline=99.0)
    held.end.set()
    assert behind.wait(WAIT)
    graph.sweep()
    del pool, held, task, behind
    until = time.monotonic() + WAIT
    while any(ref() for ref in refs) and time.monotonic() < until:
        gc.collect()
    assert [ref() for ref in refs] == [None] * 4


def test_leases_come_in_order_and_stores_do_not_starve(graph: Graph, now: list[float]) -> None:
    """A store that waits for loads lets no later load pass, and one that waits for stores does."""
    pool = Items(2)
    queue = graph.queue("any", 9)
    held = Held()
    first = Task(held, 1, queue=queue, lease=Lease(pool, 1))
    graph.submit([first], priority="urgent")
    assert held.began.wait(WAIT)
    large = Task(held, 1, queue=queue, lease=Lease(pool, 2, store=True))
    graph.submit([large], priority="background")
    now[0] = 3.0
    late = Task(nothing, 1, queue=queue, lease=Lease(pool, 1))
    graph.submit([late], priority="urgent")
    assert (large.state, late.state) == ("leasing", "leasing")
    held.end.set()
    assert late.wait(WAIT)
    assert large.wait(WAIT)
    assert pool.takes == [False, True, False]


def test_a_store_without_room_is_dropped_within_its_slack(graph: Graph, now: list[float]) -> None:
    pool = Items(0)
    queue = graph.queue("disk")
    gather = Task(
        nothing, 4, queue=queue, lease=Lease(pool, 1, store=True, until=2.0), name="gather"
    )
    write = Task(nothing, 4, queue=queue, after=[gather])
    graph.submit([gather, write], priority="background")
    assert not write.done()
    now[0] = 2.0
    assert write.done()
    assert (gather.state, write.state, str(write.error)) == ("dropped", "landed", str(gather.error))
    assert graph.counts["disk", "gather", "dropped"] == 4


def test_who_waits_learns_of_a_time_that_was_set_since(graph: Graph) -> None:
    """Nobody else looks at the clock: a lease is asked for while somebody waits."""
    real = Graph()
    held = Held()
    pool = Items(0)
    read = Task(held, 1, queue=real.queue("disk"))
    lease = Lease(pool, 1, store=True, until=(until := real.clock() + 0.2))
    behind = Task(nothing, 1, queue=real.queue("device"), after=[read], lease=lease)
    real.submit([read, behind])
    threading.Timer(0.05, held.end.set).start()
    assert behind.wait(WAIT)
    assert real.clock() - until < WAIT / 3
    assert behind.state == "dropped"
    assert real.close(WAIT)


def test_a_lease_that_went_back_is_taken_anew(graph: Graph) -> None:
    pool = Items(1)
    seen = list[Any]()
    queue = graph.queue("any")
    lease = Lease(pool, 1)
    for _ in range(2):
        task = Task(lambda task, mask: seen.append((lease.items, list(pool.free))), 1, queue=queue)
        task.lease = lease
        graph.submit([task])
        assert task.wait(WAIT)
        while graph.live or lease.users:
            time.sleep(0.001)
    assert seen == [([0], [])] * 2
    assert pool.free == [0]


def test_nothing_grows_with_what_ended(graph: Graph) -> None:
    """Not with times that are far away, nor with what is cancelled while it waits for rows."""
    pool = Items(0)
    queue = graph.queue("any")
    held = Held()
    graph.submit([Task(held, 1, queue=queue)], deadline=1e8)
    for _ in range(2000):
        waits = Task(nothing, 1, queue=graph.queue("other"), lease=Lease(pool, 1))
        gate = Task(None, 1, after=[waits])
        graph.submit([waits, gate], deadline=1e9)
        assert graph.cancel(gate)
        assert gate.done()
    held.end.set()
    heaps = [x for room in graph.waiting.values() for x in (room.loads, room.saves)]
    assert max(map(len, (graph.timers, graph.live, *heaps, *queue.heaps))) < 300


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
    """Loads and stores of one or two chunks over a pool of one item, with tiers that miss, fail and
    have others' deadlines and cancels; all of them end, and the item is free."""
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
    assert not any(room.granted_saves for room in graph.waiting.values())


@pytest.mark.parametrize("seed", range(2))
def test_a_staging_of_one_block_lets_all_loads_and_stores_end(seed: int) -> None:
    """Fault 50."""
    chains_at_random(500, seed)


@pytest.mark.slow
def test_a_staging_of_one_block_lets_all_of_100_000_end() -> None:
    """Fault 50."""
    chains_at_random(100_000, 50)


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["waiting", "leasing", "queued", "running", "landed", "failed"])
def test_cancel_in_every_state(graph: Graph, plug: Held, state: str) -> None:
    """Fault 52."""
    queue = graph.queue("any")
    ran = list[str]()
    held = Held()
    first = Task(held, 1, queue=graph.queue("other"))
    works: dict[str, Any] = {"running": held, "failed": lambda task, mask: [1, 2, 3]}
    task = Task(
        works.get(state, lambda task, mask: ran.append("ran")),
        1,
        queue=graph.queue("one") if state == "queued" else queue,
        after=[first] if state == "waiting" else [],
        lease=Lease(Items(0), 1) if state == "leasing" else None,
    )
    gate = Task(None, 1, after=[task])
    graph.submit([first, task, gate] if state == "waiting" else [task, gate])
    if state == "running":
        assert held.began.wait(WAIT)
    elif state in ("landed", "failed"):
        assert gate.wait(WAIT)
    assert task.state == state
    begins_no_more = state in ("waiting", "leasing", "queued")
    assert graph.cancel(gate) == begins_no_more
    assert not graph.cancel(gate)
    held.end.set()
    assert gate.wait(WAIT)
    assert task.state == (
        "cancelled" if begins_no_more else "failed" if state == "failed" else "landed"
    )
    assert gate.landed.all() == (state in ("running", "landed"))
    assert isinstance(gate.error, TransferCancelled) == begins_no_more
    assert ran == (["ran"] if state == "landed" else [])


def test_what_was_late_says_so_if_another_is_cancelled(graph: Graph, plug: Held) -> None:
    """Neither may end what both wait for while the other waits; the last one does."""
    read = Task(nothing, 1, queue=graph.queue("one"))
    mine, theirs = (Task(None, 1, after=[read]) for _ in range(2))
    graph.submit([read, theirs])
    graph.submit([mine], deadline=0.0)
    assert graph.cancel(theirs)
    assert mine.wait(WAIT)
    assert "late" in str(mine.error)
    assert isinstance(theirs.error, TransferCancelled)


def test_what_others_follow_is_not_cancelled(graph: Graph, plug: Held) -> None:
    read = Task(nothing, 1, queue=graph.queue("one"))
    mine, theirs = (
        Task(None, 1, after=[Task(nothing, 1, queue=graph.queue("any"), after=[read])])
        for _ in range(2)
    )
    graph.submit([read, mine.after[0][0], theirs.after[0][0], mine, theirs])
    assert graph.cancel(mine)
    assert mine.wait(WAIT)
    plug.end.set()
    assert theirs.wait(WAIT)
    assert (*mine.landed, *theirs.landed, read.state) == (False, True, "landed")


def test_a_gate_is_not_cancelled_by_who_follows_it(graph: Graph, plug: Held) -> None:
    """As a second save of a key waits for the first one's handle."""
    task = Task(nothing, 1, queue=graph.queue("one"))
    first = Task(None, 1, after=[task])
    second = Task(None, 1, after=[first])
    graph.submit([task, first])
    graph.submit([second], deadline=0.0)
    assert not graph.cancel(second)
    plug.end.set()
    assert second.wait(WAIT)
    assert (task.state, bool(first.landed.all()), first.error) == ("landed", True, None)


def test_a_deadline_in_the_past_begins_nothing(graph: Graph) -> None:
    """Fault 53."""
    ran = list[str]()
    task = Task(lambda task, mask: ran.append("ran"), 1, queue=graph.queue("disk"), name="read")
    gate = Task(None, 1, after=[task])
    graph.submit([task, gate], priority="urgent", deadline=0.0)
    assert (ran, task.state, gate.landed.tolist()) == ([], "late", [False])
    assert gate.done()
    assert graph.counts["disk", "read", "late"] == 1


def test_a_worker_begins_nothing_that_is_late(graph: Graph, plug: Held, now: list[float]) -> None:
    """Nobody waits for it, and its place in the queue comes."""
    ran = list[str]()
    late = Task(lambda task, mask: ran.append("late"), 1, queue=graph.queue("one"))
    good = Task(lambda task, mask: ran.append("good"), 1, queue=graph.queue("one"))
    graph.submit([late], deadline=1.0)
    graph.submit([good])
    now[0] = 2.0
    plug.end.set()
    assert good.wait(WAIT)
    assert (ran, late.state) == (["good"], "late")


def test_a_stalled_disk_holds_up_nobody_else(graph: Graph, now: list[float]) -> None:
    """Fault 26. Its rows stay out until it has let go of them."""
    held = Held()
    pool = Items()
    disk = graph.queue("disk", 2, stall_seconds=10.0)
    read = Task(held, 2, queue=disk, lease=Lease(pool, 1))
    leg = Task(nothing, 2, queue=graph.queue("device"), after=[read])
    gate = Task(None, 2, after=[leg])
    graph.submit([read, leg, gate], priority="urgent", deadline=0.2)
    assert held.began.wait(WAIT)
    other = Task(nothing, 1, queue=disk)
    graph.submit([other])
    assert other.wait(WAIT)
    assert not gate.wait(0.0)
    now[0] = 0.3
    assert gate.wait(0.0)
    assert (read.state, leg.state, sum(gate.landed), pool.free) == ("running", "late", 0, [])
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
    held.end.set()
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
    assert graph.counts["disk", "read", "failed"] == 2


@pytest.mark.parametrize("landed", [np.zeros(2, bool), "no mask", [True] * 3])
def test_work_that_returns_no_mask_of_its_blocks_lands_nothing(graph: Graph, landed: Any) -> None:
    task = Task(lambda task, mask: landed, 2, queue=graph.queue("any"))
    graph.submit([task])
    assert task.wait(WAIT)
    assert not task.landed.any()


def test_a_load_behind_a_store_that_is_under_way_waits_for_it(graph: Graph, plug: Held) -> None:
    """Fault 57, in the graph's sense."""
    seen = list[str]()
    add: Callable[[Task, Any], None] = lambda task, mask: seen.append(task.name)  # noqa: E731
    store = Task(add, 2, queue=graph.queue("one"), name="store")
    graph.submit([store], priority="background")
    load = Task(add, 1, queue=graph.queue("any"), after=[(store, [0], [1])], name="load")
    graph.submit([load], priority="urgent")
    assert load.state == "waiting"
    plug.end.set()
    assert load.wait(WAIT)
    behind = Task(add, 1, queue=graph.queue("any"), after=[(store, [0], [0])], name="behind")
    graph.submit([behind])
    assert behind.wait(WAIT)
    assert seen == ["store", "load", "behind"]


def test_a_chain_of_any_length_ends_at_once(graph: Graph) -> None:
    tasks = [Task(None, 1, eligible=[False])]
    for _ in range(5000):
        tasks.append(Task(nothing, 1, queue=graph.queue("any"), after=tasks[-1:]))
    graph.submit(tasks)
    assert tasks[-1].done()


def test_nothing_asks_a_clock_that_may_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 28."""

    def back() -> float:
        raise AssertionError("time.time() was asked")

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
    held = Held()
    tasks = [Task(held, 1, queue=graph.queue("any")) for _ in range(3)]
    gate = Task(None, 1, after=tasks)
    graph.submit([*tasks, gate])
    assert held.began.wait(WAIT)
    assert not gate.wait(0.01)
    assert not graph.close(0.01)
    assert [task.state for task in tasks] == ["running", "cancelled", "cancelled"]
    held.end.set()
    assert graph.close(WAIT)
    assert gate.done()
    with pytest.raises(TransferError, match="got one that is closed"):
        graph.submit([Task(nothing, 1)])


def test_what_comes_while_a_graph_closes_is_refused() -> None:
    graph = Graph()
    told = list[BaseException]()
    task = Task(nothing, 1, queue=graph.queue("any"))
    graph.submit([task])
    assert task.wait(WAIT)

    def submit() -> None:
        try:
            graph.submit([Task(nothing, 1, queue=task.queue)])
        except TransferError as error:
            told.append(error)

    with graph.lock:
        late = threading.Thread(target=submit)
        late.start()
        time.sleep(0.05)  # it waits for the lock
        graph.close(0.0)
    late.join(WAIT)
    assert len(told) == 1
    assert graph.close(WAIT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused() -> None:
    """Fault 13, in the graph's sense. It ends at once, though the parent's queue is full."""
    graph = Graph()
    held = Held()
    task, behind = (Task(held, 1, queue=graph.queue("any")) for _ in range(2))
    graph.submit([task, behind])
    assert held.began.wait(WAIT)
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
            ended = task.wait() and graph.close() and not graph.cancel(behind)
            code = 0 if ended and graph.statistics() == {} else 2
        os._exit(code)
    free.set()
    assert os.waitpid(child, 0)[1] == 0
    held.end.set()
    assert behind.wait(WAIT)
    assert graph.close(WAIT)
