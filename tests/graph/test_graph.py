# SPDX-License-Identifier: Apache-2.0
"""The transfer graph: what runs when, what lands, and that all of it ends."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portakv.errors import InvalidTerms, TransferCancelled, TransferError
from portakv.graph.graph import Graph, Lease, Node

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

    def __call__(self, node: Node, mask: Any) -> None:
        self.began.set()
        assert self.end.wait(WAIT)


def nothing(node: Node, mask: Any) -> None:
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
    """What occupies the one worker of link "one"."""
    held = Held()
    graph.submit([Node(held, 1, link=graph.link("one"))], priority="urgent")
    assert held.began.wait(WAIT)
    yield held
    held.end.set()


def test_a_block_that_does_not_land_goes_no_further(graph: Graph) -> None:
    seen = list[object]()
    link = graph.link("disk", 2)
    read = Node(lambda node, mask: [True, False, True], 3, link=link)
    maps = (read, [0, 1, 1], [2, 0, 1])  # its block 1 needs two
    leg = Node(lambda node, mask: seen.append(mask.tolist()), 3, link=link, after=[maps])
    graph.submit([read, leg], priority="urgent")
    assert leg.wait(WAIT)
    assert seen == [[True, False, True]]
    assert leg.landed.tolist() == [True, False, True]


@given(data=st.data())
def test_what_lands_is_what_a_topological_sort_says(data: st.DataObject) -> None:
    """Any nodes, with maps, rescues, failures and blocks that are not given, submitted in parts."""
    graph = Graph()
    plan = list[Any]()
    link = graph.link("any", 3)
    bits = st.integers(0, 7).map(lambda n: np.array([n & 1, n & 2, n & 4], bool))
    nodes = list[Node]()
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

        def work(node: Node, mask: Any, lands: Any = lands, kind: str = kind) -> Any:
            if kind == "raise":
                raise ValueError("as planned")
            return lands

        after = [
            nodes[one] if pairs is None else (nodes[one], *np.array(pairs, int).reshape(-1, 2).T)
            for one, pairs in zip(befores, maps, strict=True)
        ]
        gate = kind == "gate"
        terms: dict[str, Any] = {"link": None if gate else link, "rescue": rescue, "given": tried}
        nodes.append(Node(None if gate else work, 3, after=after, **terms))
    cut = data.draw(st.integers(0, len(nodes)))
    graph.submit(nodes[:cut], priority="background")
    graph.submit(nodes[cut:], priority="urgent")
    assert all(node.wait(WAIT) for node in nodes)
    assert graph.close(WAIT)
    landed: dict[int, Any] = {}
    for one in TopologicalSorter({n: x[0] for n, x in enumerate(plan)}).static_order():
        befores, maps, rescue, lands, tried, kind = plan[one]
        left = np.ones(3, bool) if tried is None else tried.copy()
        own = np.zeros(3, bool)
        if rescue:
            own = landed[befores[0]]
            left = left & ~landed[befores[0]]
        else:
            for before, pairs in zip(befores, maps, strict=True):
                for mine, theirs in [(i, i) for i in range(3)] if pairs is None else pairs:
                    left[mine] &= landed[before][theirs]
        result = 0 if kind == "raise" else 1 if kind == "gate" or lands is None else lands
        landed[one] = own | (left & np.array(result, bool))
    assert [node.landed.tolist() for node in nodes] == [
        landed[n].tolist() for n in range(len(nodes))
    ]


def test_blocks_that_do_not_fit_fail_their_node_alone(graph: Graph) -> None:
    link = graph.link("any")
    read = Node(lambda node, mask: [True, False], 2, link=link)
    others: list[Any] = [read, (read, [3], [1]), (read, [0], [2]), (read, [0, 1], [0, 1, 0])]
    nodes = [Node(nothing, 1 + bool(one is not read), link=link, after=[one]) for one in others]
    nodes += [Node(None, 2, given=[True] * 3), Node(None, 1, after=[read])]
    graph.submit([read, *nodes])
    assert all(node.wait(WAIT) for node in nodes)
    assert [(node.state, node.landed.any()) for node in nodes] == [("landed", False)] * 6
    assert all(isinstance(node.error, IndexError | ValueError) for node in nodes)
    after = Node(nothing, 1, link=link)
    graph.submit([after])
    assert after.wait(WAIT)


def test_a_link_keeps_its_terms(graph: Graph) -> None:
    link = graph.link("disk:a", width=3, max_gbps=2.0)
    assert graph.link("disk:a") is graph.link("disk:a", width=3, max_gbps=2.0) is link
    for terms in ({"width": 2}, {"max_gbps": 1.0}, {"stall_seconds": 3.0}, {"width": True}):
        with pytest.raises(InvalidTerms, match=f"Expected {next(iter(terms))} to be"):
            graph.link("disk:a", **terms)
    assert graph.link("disk:b").width == 1


def test_terms_that_are_none_are_refused_before_anything_begins(graph: Graph) -> None:
    good = Node(nothing, 1, link=graph.link("any"))
    known = Node(nothing, 1)
    other = Graph()
    graph.submit([known])
    other.submit([foreign := Node(None, 1)])
    for nodes, terms in (
        ([], {"priority": "hasty"}),
        ([], {"priority": None}),
        ([], {"deadline": "soon"}),
        ([], {"deadline": -1}),
        ([3], {}),
        ([known], {}),
        ([Node(None, 1, after=[Node(nothing, 1)])], {}),
        ([Node(None, 1, after=[foreign])], {}),
    ):
        with pytest.raises(InvalidTerms, match=f"Expected {next(iter(terms), 'nodes')}"):
            graph.submit([good, *nodes], **terms)
    assert not good.wait()
    assert not graph.cancel(good)
    graph.submit([good])
    assert good.wait(WAIT)
    assert good.link.queued_bytes == 0


def test_a_system_without_threads_fails_what_it_cannot_begin(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    plain = Node(nothing, 1, link=graph.link("any"))
    wide = graph.link("wide", 2)
    held = Held()
    graph.submit([Node(held, 1, link=wide)])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        queued = Node(nothing, 1, link=wide)
        graph.submit([plain, queued])
    assert plain.done()
    assert (plain.state, str(plain.error)) == ("failed", "can't start new thread")
    held.end.set()
    assert queued.wait(WAIT)
    again = Node(nothing, 1, link=plain.link)
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
    """A background node is overtaken by what is submitted within its slack, and by nothing else."""
    ran = list[str]()
    nodes = list[Node]()
    for name in submitted:
        priority, *terms = name.split()
        now[0] = float(terms[-1]) if "at" in terms else 0.0
        deadline = float(terms[-1]) if "by" in terms else None
        work = lambda node, mask: ran.append(node.name)  # noqa: E731
        nodes.append(Node(work, 1, link=graph.link("one"), name=name))
        named: Any = priority
        graph.submit(nodes[-1:], priority=named, deadline=deadline)
    assert graph.link("one").oldest_wait == now[0]
    plug.end.set()
    assert all(node.wait(WAIT) for node in nodes)
    assert ", ".join(ran) == order


@pytest.mark.parametrize("waits", ["for a worker", "for its lease", "for a node"])
def test_what_an_urgent_one_follows_is_as_urgent(graph: Graph, plug: Held, waits: str) -> None:
    """As a load joins the read of a prefetch."""
    ran = list[str]()
    one = graph.link("one")
    pool = Items(0)
    work = lambda node, mask: ran.append(node.name)  # noqa: E731
    leases = [Lease(pool, 1) if waits == "for its lease" else None for _ in range(3)]
    nodes = [Node(work, 1, link=one, name=name, lease=leases.pop()) for name in ("a", "b", "c")]
    behind = Node(work, 1, link=one, name="behind", after=nodes[-1:])
    graph.submit([*nodes, behind], priority="background")
    followed = behind if waits == "for a node" else nodes[-1]
    urgent = Node(None, 1, after=[followed])
    graph.submit([urgent], priority="urgent")
    pool.give([0])
    graph.grant(pool)
    plug.end.set()
    assert all(node.wait(WAIT) for node in (*nodes, behind, urgent))
    assert ran[0] == "c"
    assert ran.index("behind") == (1 if waits == "for a node" else 3)


@pytest.mark.parametrize(("width", "most"), [(1, 1), (2, 1), (4, 3)])
def test_background_leaves_a_worker_to_others(graph: Graph, width: int, most: int) -> None:
    link = graph.link("many", width)
    held = [Held() for _ in range(5)]
    nodes = [Node(work, 1, link=link) for work in held]
    graph.submit(nodes, priority="background")
    assert all(work.began.wait(WAIT) for work in held[:most])
    if width > 1:
        urgent = Node(nothing, 1, link=link)
        graph.submit([urgent], priority="urgent")
        assert urgent.wait(WAIT)
    assert [work.began.is_set() for work in held] == [n < most for n in range(5)]
    for work in held:
        work.end.set()
    assert all(node.wait(WAIT) for node in nodes)


@pytest.mark.parametrize("pool", [None, Items()], ids=["a worker", "a lease"])
def test_background_for_ever_and_urgent_for_ever_both_go_on(
    graph: Graph, now: list[float], pool: Items | None
) -> None:
    """Fault 51. Each node submits the next of its kind, and each takes a tenth of a second."""
    ran = Counter[str]()
    link = graph.link("one")

    def work(node: Node, mask: Any) -> None:
        now[0] += 0.1
        ran[node.name] += 1
        if ran.total() < 400:
            begin(node.name)

    def begin(*kinds: Any) -> None:
        for kind in kinds:
            lease = Lease(pool, 1, kind == "background") if pool else None
            graph.submit([Node(work, 1, link=link, lease=lease, name=kind)], priority=kind)

    with graph.lock:  # the first may not end before the others are there
        begin("background", "urgent", "urgent", "urgent")
    while graph.live:
        time.sleep(0.001)
    assert ran["background"] > 10
    assert ran["urgent"] > 200


def test_links_keep_a_pace() -> None:
    """Three pieces of 1 MB at 100 MB/s begin 10 ms apart, as the graph's clock and trace tell."""
    graph = Graph()
    link = graph.link("paced", 2, max_gbps=0.1)
    nodes = [Node(nothing, 1, link=link, nbytes=10**6) for _ in range(3)]
    graph.submit(nodes)
    assert all(node.wait(WAIT) for node in nodes)
    begun = sorted(ran.start for ran in graph.trace.ran)
    assert begun[2] - begun[0] >= 0.0199
    assert graph.close(WAIT)


def test_what_waits_for_its_pace_can_be_overtaken_and_cancelled(
    graph: Graph, now: list[float]
) -> None:
    """And the link is not slow for it."""
    link = graph.link("paced", 4, max_gbps=0.1, stall_seconds=0.05)
    nodes = [Node(nothing, 1, link=link, nbytes=10**7, name=name) for name in "abcd"]
    graph.submit(nodes, priority="normal")
    assert nodes[0].wait(WAIT)
    urgent = Node(nothing, 1, link=link, nbytes=10**7, name="urgent")
    graph.submit([urgent], priority="urgent")
    assert graph.cancel(nodes[1])
    now[0] = 0.09
    assert not link.slow
    for now[0], node in [(0.101, urgent), (0.202, nodes[2]), (0.303, nodes[3])]:
        assert node.wait(WAIT)
    began = {ran.name: ran.start for ran in graph.trace.ran}
    assert began == {"a": 0.0, "urgent": 0.101, "c": 0.202, "d": 0.303}


# --- leases ---------------------------------------------------------------------------------------


def test_a_lease_is_taken_once_and_goes_back_behind_the_last_node(graph: Graph) -> None:
    pool = Items(2)
    held = Held()
    told = list[Any]()
    link = graph.link("any", 2)
    lease = Lease(pool, 2, ended=lambda lease: told.append((lease.items, list(pool.free))))
    read = Node(nothing, 1, link=link, lease=lease)
    leg = Node(held, 1, link=link, after=[read], lease=lease)
    graph.submit([read, leg])
    assert held.began.wait(WAIT)
    other = Node(nothing, 1, link=link, lease=Lease(pool, 1))
    joined = Node(
        nothing, 1, link=link, after=[read], lease=lease
    )  # as a load joins another's read
    graph.submit([other, joined])
    assert joined.wait(WAIT)
    assert (other.state, pool.free) == ("room", [])
    held.end.set()
    assert other.wait(WAIT)
    assert told == [([1, 0], [])]
    assert sorted(pool.free) == [0, 1]


def test_what_a_lease_calls_may_raise(graph: Graph) -> None:
    """The node has the error, the items go back, and the worker goes on."""
    error = ValueError("a fault")
    pool = Items(1)
    link = graph.link("any")

    def raises(_: object) -> None:
        raise error

    node = Node(nothing, 1, link=link, lease=Lease(pool, 1, ended=raises))
    gate = Node(None, 1, after=[node])
    other = Node(nothing, 1, link=link, lease=Lease(pool, 1))
    graph.submit([node, gate, other])
    assert gate.wait(WAIT)
    assert gate.error is error
    assert other.wait(WAIT)
    assert (other.landed.all(), pool.free) == (True, [0])


def test_a_pool_that_raises_fails_the_nodes_that_wait_for_it(graph: Graph) -> None:
    error = ValueError("a fault")
    link = graph.link("any")
    held = Held()
    pool = Items(1)
    first = Node(held, 1, link=link, lease=Lease(pool, 1))
    second = Node(nothing, 1, link=link, lease=Lease(pool, 1))
    third = Node(nothing, 1, link=link)
    gate = Node(None, 1, after=[second])
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

    read = Node(nothing, 1, link=graph.link("any"))
    gate = Node(None, 1, after=[read], given=given)
    other = Node(nothing, 1, link=graph.link("any"), after=[read])
    graph.submit([read, gate, other])
    assert gate.wait(WAIT)
    assert gate.error is error
    assert not gate.landed.any()
    assert other.wait(WAIT)
    assert other.landed.all()


def test_all_nodes_of_a_lease_go_on_when_it_is_granted(graph: Graph) -> None:
    """Also those behind a node that waits for the end of this very lease."""
    pool = Items(1)
    link = graph.link("any", 2)
    held = Held()
    graph.submit([Node(held, 1, link=link, lease=Lease(pool, 1))])
    leases = [Lease(pool, 1), Lease(pool, 1)]
    nodes = [Node(nothing, 1, link=link, lease=leases[i]) for i in (0, 1, 0, 1)]
    graph.submit(nodes)
    held.end.set()
    assert all(node.wait(WAIT) for node in nodes)
    assert pool.free == [0]


def test_what_ended_is_forgotten(graph: Graph) -> None:
    """Nodes hold views, and a pool is all of a store's memory; a graph may outlive them."""
    pool = Items(1)
    node = Node(Held(), 1, link=graph.link("any"), lease=Lease(pool, 1))
    behind = Node(nothing, 1, after=[node], link=graph.link("any"), lease=node.lease)
    refs = [weakref.ref(x) for x in (pool, node.work, node, behind)]
    graph.submit([node, behind], deadline=99.0)
    node.work.end.set()
    assert behind.wait(WAIT)
    graph.sweep()
    del pool, node, behind
    until = time.monotonic() + WAIT
    while any(ref() for ref in refs) and time.monotonic() < until:
        gc.collect()
    assert [ref() for ref in refs] == [None] * 4


def test_leases_come_in_order_and_stores_do_not_starve(graph: Graph, now: list[float]) -> None:
    """A store that waits for loads lets no later load pass, and one that waits for stores does."""
    pool = Items(2)
    link = graph.link("any", 9)
    held = Held()
    first = Node(held, 1, link=link, lease=Lease(pool, 1))
    graph.submit([first], priority="urgent")
    assert held.began.wait(WAIT)
    large = Node(held, 1, link=link, lease=Lease(pool, 2, store=True))
    graph.submit([large], priority="background")
    now[0] = 3.0
    late = Node(nothing, 1, link=link, lease=Lease(pool, 1))
    graph.submit([late], priority="urgent")
    assert (large.state, late.state) == ("room", "room")
    held.end.set()
    assert late.wait(WAIT)
    assert large.wait(WAIT)
    assert pool.takes == [False, True, False]


def test_a_store_without_room_is_dropped_within_its_slack(graph: Graph, now: list[float]) -> None:
    pool = Items(0)
    link = graph.link("disk")
    gather = Node(nothing, 4, link=link, lease=Lease(pool, 1, store=True, until=2.0), name="gather")
    write = Node(nothing, 4, link=link, after=[gather])
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
    read = Node(held, 1, link=real.link("disk"))
    lease = Lease(pool, 1, store=True, until=(until := real.clock() + 0.2))
    behind = Node(nothing, 1, link=real.link("device"), after=[read], lease=lease)
    real.submit([read, behind])
    threading.Timer(0.05, held.end.set).start()
    assert behind.wait(WAIT)
    assert real.clock() - until < WAIT / 3
    assert behind.state == "dropped"
    assert real.close(WAIT)


def test_a_lease_that_went_back_is_taken_anew(graph: Graph) -> None:
    pool = Items(1)
    seen = list[Any]()
    link = graph.link("any")
    lease = Lease(pool, 1)
    for _ in range(2):
        node = Node(lambda node, mask: seen.append((lease.items, list(pool.free))), 1, link=link)
        node.lease = lease
        graph.submit([node])
        assert node.wait(WAIT)
        while graph.live or lease.users:
            time.sleep(0.001)
    assert seen == [([0], [])] * 2
    assert pool.free == [0]


def test_nothing_grows_with_what_ended(graph: Graph) -> None:
    """Not with times that are far away, nor with what is cancelled while it waits for rows."""
    pool = Items(0)
    link = graph.link("any")
    held = Held()
    graph.submit([Node(held, 1, link=link)], deadline=1e8)
    for _ in range(2000):
        waits = Node(nothing, 1, link=graph.link("other"), lease=Lease(pool, 1))
        gate = Node(None, 1, after=[waits])
        graph.submit([waits, gate], deadline=1e9)
        assert graph.cancel(gate)
        assert gate.done()
    held.end.set()
    heaps = [x for room in graph.rooms.values() for x in room[:2]]
    assert max(map(len, (graph.timers, graph.live, *heaps, *link.heaps))) < 300


def test_items_that_come_back_otherwise_are_granted_when_told(graph: Graph) -> None:
    pool = Items(0)
    node = Node(nothing, 1, link=graph.link("any"), lease=Lease(pool, 1))
    own = Lease(Items(), 0, ended=lambda lease: ended.append(lease.items))
    ended = list[Any]()
    own.items = [5]  # as a load has of what is kept
    none = Node(nothing, 1, link=graph.link("any"), lease=own)
    graph.submit([node, none])
    assert none.wait(WAIT)
    assert (ended, own.pool.free) == ([[5]], [0])
    assert node.state == "room"
    pool.give([7])
    graph.grant(pool)
    assert node.wait(WAIT)


def chains_at_random(steps: int, seed: int) -> None:
    """Loads and stores of one or two chunks over a pool of one item, with tiers that miss, fail and
    have others' deadlines and cancels; all of them end, and the item is free."""
    draw = random.Random(seed)
    graph = Graph(trace_events=100)
    pool = Items()
    gates = list[Node]()
    links = [graph.link(name, width) for name, width in (("disk", 2), ("remote", 3), ("device", 1))]

    def work(node: Node, mask: Any) -> Any:
        if draw.random() < 0.05:
            raise OSError("a fault")
        return mask & (draw.random() < 0.9)

    for _ in range(steps):
        nodes = list[Node]()
        store = draw.random() < 0.5
        for _ in range(draw.randint(1, 2)):
            until = graph.clock() + draw.choice([0.0, 0.01, 60.0])
            lease = Lease(pool, 1, store=store, until=until)
            rescue = not store
            terms: dict[str, Any] = {"lease": lease, "nbytes": 10}
            first = Node(work, 2, link=draw.choice(links), **terms)
            then = Node(work, 2, link=draw.choice(links), after=[first], rescue=rescue, **terms)
            nodes += [first, then, Node(work, 2, link=links[2], after=[then], **terms)]
        gates.append(Node(None, 2, after=nodes[2::3]))
        priority: Any = draw.choice(["urgent", "normal", "background"])
        deadline = draw.choice([None, None, 0.0, 0.001, 60.0])
        graph.submit([*nodes, gates[-1]], priority=priority, deadline=deadline)
        if draw.random() < 0.1:
            graph.cancel(draw.choice([*nodes, *gates[-20:]]))
    for gate in gates:
        assert gate.wait(WAIT), gate.state
    assert graph.close(WAIT)
    assert (pool.free, [link.queued_bytes for link in links]) == ([0], [0, 0, 0])
    assert not any(room[2] for room in graph.rooms.values())


@pytest.mark.parametrize("seed", range(2))
def test_a_staging_of_one_block_lets_all_loads_and_stores_end(seed: int) -> None:
    """Fault 50."""
    chains_at_random(500, seed)


@pytest.mark.slow
def test_a_staging_of_one_block_lets_all_of_100_000_end() -> None:
    """Fault 50."""
    chains_at_random(100_000, 50)


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["waiting", "room", "queued", "running", "landed", "failed"])
def test_cancel_in_every_state(graph: Graph, plug: Held, state: str) -> None:
    """Fault 52."""
    link = graph.link("any")
    ran = list[str]()
    held = Held()
    first = Node(held, 1, link=graph.link("other"))
    works: dict[str, Any] = {"running": held, "failed": lambda node, mask: [1, 2, 3]}
    node = Node(
        works.get(state, lambda node, mask: ran.append("ran")),
        1,
        link=graph.link("one") if state == "queued" else link,
        after=[first] if state == "waiting" else [],
        lease=Lease(Items(0), 1) if state == "room" else None,
    )
    gate = Node(None, 1, after=[node])
    graph.submit([first, node, gate] if state == "waiting" else [node, gate])
    if state == "running":
        assert held.began.wait(WAIT)
    elif state in ("landed", "failed"):
        assert gate.wait(WAIT)
    assert node.state == state
    begins_no_more = state in ("waiting", "room", "queued")
    assert graph.cancel(gate) == begins_no_more
    assert not graph.cancel(gate)
    held.end.set()
    assert gate.wait(WAIT)
    assert node.state == (
        "cancelled" if begins_no_more else "failed" if state == "failed" else "landed"
    )
    assert gate.landed.all() == (state in ("running", "landed"))
    assert isinstance(gate.error, TransferCancelled) == begins_no_more
    assert ran == (["ran"] if state == "landed" else [])


def test_what_was_late_says_so_if_another_is_cancelled(graph: Graph, plug: Held) -> None:
    """Neither may end what both wait for while the other waits; the last one does."""
    read = Node(nothing, 1, link=graph.link("one"))
    mine, theirs = (Node(None, 1, after=[read]) for _ in range(2))
    graph.submit([read, theirs])
    graph.submit([mine], deadline=0.0)
    assert graph.cancel(theirs)
    assert mine.wait(WAIT)
    assert "late" in str(mine.error)
    assert isinstance(theirs.error, TransferCancelled)


def test_what_others_follow_is_not_cancelled(graph: Graph, plug: Held) -> None:
    read = Node(nothing, 1, link=graph.link("one"))
    mine, theirs = (
        Node(None, 1, after=[Node(nothing, 1, link=graph.link("any"), after=[read])])
        for _ in range(2)
    )
    graph.submit([read, mine.after[0][0], theirs.after[0][0], mine, theirs])
    assert graph.cancel(mine)
    assert mine.wait(WAIT)
    plug.end.set()
    assert theirs.wait(WAIT)
    assert (mine.landed.all(), theirs.landed.all(), read.state) == (False, True, "landed")


def test_a_gate_is_not_cancelled_by_who_follows_it(graph: Graph, plug: Held) -> None:
    """As a second save of a key waits for the first one's handle."""
    node = Node(nothing, 1, link=graph.link("one"))
    first = Node(None, 1, after=[node])
    second = Node(None, 1, after=[first])
    graph.submit([node, first])
    graph.submit([second], deadline=0.0)
    assert not graph.cancel(second)
    plug.end.set()
    assert second.wait(WAIT)
    assert (node.state, first.landed.all(), first.error) == ("landed", True, None)


def test_a_deadline_in_the_past_begins_nothing(graph: Graph) -> None:
    """Fault 53."""
    ran = list[str]()
    node = Node(lambda node, mask: ran.append("ran"), 1, link=graph.link("disk"), name="read")
    gate = Node(None, 1, after=[node])
    graph.submit([node, gate], priority="urgent", deadline=0.0)
    assert (ran, node.state, gate.landed.tolist()) == ([], "late", [False])
    assert gate.done()
    assert graph.counts["disk", "read", "late"] == 1


def test_a_worker_begins_nothing_that_is_late(graph: Graph, plug: Held, now: list[float]) -> None:
    """Nobody waits for it, and its place in the queue comes."""
    ran = list[str]()
    late = Node(lambda node, mask: ran.append("late"), 1, link=graph.link("one"))
    good = Node(lambda node, mask: ran.append("good"), 1, link=graph.link("one"))
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
    disk = graph.link("disk", 2, stall_seconds=10.0)
    read = Node(held, 2, link=disk, lease=Lease(pool, 1))
    leg = Node(nothing, 2, link=graph.link("device"), after=[read])
    gate = Node(None, 2, after=[leg])
    graph.submit([read, leg, gate], priority="urgent", deadline=0.2)
    assert held.began.wait(WAIT)
    other = Node(nothing, 1, link=disk)
    graph.submit([other])
    assert other.wait(WAIT)
    assert not gate.wait(0.0)
    now[0] = 0.3
    assert gate.wait(0.0)
    assert (read.state, leg.state, gate.landed.any(), pool.free) == ("running", "late", False, [])
    assert not disk.slow
    now[0] = 11.0
    assert disk.slow
    store = Node(nothing, 1, link=disk, name="write")
    load = Node(nothing, 1, link=disk)
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

    def work(node: Node, mask: Any) -> None:
        raise error

    link = graph.link("disk")
    read = Node(work, 2, link=link, name="read")
    rescue = Node(lambda node, mask: [True, False], 2, link=link, after=[read], rescue=True)
    gate = Node(None, 2, after=[rescue])
    other = Node(nothing, 1, link=link)
    graph.submit([read, rescue, gate, other])
    assert gate.wait(WAIT)
    assert other.wait(WAIT)
    assert (read.state, gate.error is error, other.landed.all()) == ("failed", True, True)
    assert gate.landed.tolist() == [True, False]
    assert graph.counts["disk", "read", "failed"] == 2


@pytest.mark.parametrize("landed", [np.zeros(2, bool), "no mask", [True] * 3])
def test_work_that_returns_no_mask_of_its_blocks_lands_nothing(graph: Graph, landed: Any) -> None:
    node = Node(lambda node, mask: landed, 2, link=graph.link("any"))
    graph.submit([node])
    assert node.wait(WAIT)
    assert not node.landed.any()


def test_a_load_behind_a_store_that_is_under_way_waits_for_it(graph: Graph, plug: Held) -> None:
    """Fault 57, in the graph's sense."""
    seen = list[str]()
    add: Callable[[Node, Any], None] = lambda node, mask: seen.append(node.name)  # noqa: E731
    store = Node(add, 2, link=graph.link("one"), name="store")
    graph.submit([store], priority="background")
    load = Node(add, 1, link=graph.link("any"), after=[(store, [0], [1])], name="load")
    graph.submit([load], priority="urgent")
    assert load.state == "waiting"
    plug.end.set()
    assert load.wait(WAIT)
    behind = Node(add, 1, link=graph.link("any"), after=[(store, [0], [0])], name="behind")
    graph.submit([behind])
    assert behind.wait(WAIT)
    assert seen == ["store", "load", "behind"]


def test_a_chain_of_any_length_ends_at_once(graph: Graph) -> None:
    nodes = [Node(None, 1, given=[False])]
    for _ in range(5000):
        nodes.append(Node(nothing, 1, link=graph.link("any"), after=nodes[-1:]))
    graph.submit(nodes)
    assert nodes[-1].done()


def test_nothing_asks_a_clock_that_may_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 28."""

    def back() -> float:
        raise AssertionError("time.time() was asked")

    monkeypatch.setattr(time, "time", back)
    graph = Graph()
    assert graph.clock is time.monotonic
    nodes = [Node(nothing, 1, link=graph.link("any"), nbytes=9) for _ in range(9)]
    graph.submit(nodes, deadline=WAIT)
    assert all(node.wait(WAIT) for node in nodes)
    assert graph.close(WAIT)


def test_close_cancels_what_waits_and_waits_for_what_runs(now: list[float]) -> None:
    """Fault 15, in the graph's sense; a graph that is closed takes nothing more."""
    graph = Graph()
    held = Held()
    nodes = [Node(held, 1, link=graph.link("any")) for _ in range(3)]
    gate = Node(None, 1, after=nodes)
    graph.submit([*nodes, gate])
    assert held.began.wait(WAIT)
    assert not gate.wait(0.01)
    assert not graph.close(0.01)
    assert [node.state for node in nodes] == ["running", "cancelled", "cancelled"]
    held.end.set()
    assert graph.close(WAIT)
    assert gate.done()
    with pytest.raises(TransferError, match="got one that is closed"):
        graph.submit([Node(nothing, 1)])


def test_what_comes_while_a_graph_closes_is_refused() -> None:
    graph = Graph()
    told = list[BaseException]()
    node = Node(nothing, 1, link=graph.link("any"))
    graph.submit([node])
    assert node.wait(WAIT)

    def submit() -> None:
        try:
            graph.submit([Node(nothing, 1, link=node.link)])
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
    node, behind = (Node(held, 1, link=graph.link("any")) for _ in range(2))
    graph.submit([node, behind])
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
            graph.submit([Node(nothing, 1)])
        except TransferError:
            ended = node.wait() and graph.close() and not graph.cancel(behind)
            code = 0 if ended and graph.statistics() == {} else 2
        os._exit(code)
    free.set()
    assert os.waitpid(child, 0)[1] == 0
    held.end.set()
    assert behind.wait(WAIT)
    assert graph.close(WAIT)


@pytest.mark.parametrize(
    ("seconds", "left"), [(0.5, 0), pytest.param(99, 3, marks=pytest.mark.slow)]
)
def test_the_interpreter_ends_with_a_full_queue(seconds: float, left: int) -> None:
    """Fault 64. What runs may go on for 10 s, and the rest does not begin."""
    script = f"""
import atexit, time
from portakv.graph.graph import Graph, Node
link = Graph().link("any", 3)
atexit.register(lambda: print(link.queued_bytes))  # behind the graph's end
nodes = [Node(lambda node, mask: time.sleep({seconds}), 1, link=link, nbytes=1) for _ in range(999)]
link.graph.submit(nodes)
while len(link.running) < 3:
    time.sleep(0.001)
"""
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{left}\n", "")
