# SPDX-License-Identifier: Apache-2.0
"""Transfers get rows in the order in which they are due, all or none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.graph_ends import end_of_handle
from support.seeded_loop import SetLoop
from support.storage_cases import FakeTier, counts_of, key_of, small_form
from support.waits import LIMIT

from portakv import KVView, TransferError
from portakv.storage import BlockStore
from portakv.storage.memory import Held, RowQueue, Rows
from portakv.storage.work import Graph, Task
from portakv.tasks import Priority

FORM = small_form()


class Transfer(Held):
    """A transfer that takes a number of rows."""

    def __init__(self, case: Case, count: int, store: bool) -> None:
        self.case = case
        self.count = count
        self.store = store

    def take(self) -> list[int] | None:
        if self.case.error is not None:
            raise self.case.error
        if self.count > len(self.case.free):
            return None
        self.case.takes.append(self.store)
        return [self.case.free.pop() for _ in range(self.count)]


class Case:
    """A queue of a few rows, of a graph whose clock stands still until a test sets it."""

    def __init__(self, rows: int) -> None:
        self.clock = SetLoop()
        self.free = [*range(rows)]
        self.takes = list[bool]()
        self.error: Exception | None = None
        self.graph = Graph(runtime=self.clock.runtime)
        memory: Any = self
        self.queue = RowQueue(self.graph, memory)

    def give(self, items: list[int]) -> None:
        """Take rows back, as `Rows.give` does."""
        assert not {*items} & {*self.free}
        self.free += items

    def request(self, count: int, store: bool = False, priority: Priority = "urgent") -> Task:
        """Return the task of a transfer that waits for rows."""
        task = self.queue.request(Transfer(self, count, store))

        def begin() -> None:
            self.graph.enter([task], priority)
            self.queue.push(task)

        self.graph.runtime.change(begin)
        return task

    def end(self, task: Task) -> None:
        """End a transfer."""
        self.graph.runtime.change(lambda: self.queue.give(task.uses))


@pytest.fixture
def cases() -> Iterator[Any]:
    made = list[Case]()

    def make(rows: int) -> Case:
        made.append(Case(rows))
        return made[-1]

    yield make
    for case in made:
        assert case.graph.close(LIMIT)
        case.clock.end()


def test_rows_come_in_order_and_saves_do_not_starve(cases: Any) -> None:
    """A save that waits for loads lets no later load pass; one that waits for saves does."""
    case = cases(2)
    first = case.request(1)
    assert first.ended
    large = case.request(2, store=True, priority="background")
    case.clock.set(3.0)
    late = case.request(1)
    assert (large.state, late.state) == ("queued", "queued")
    case.end(first)
    assert (large.state, late.state) == ("landed", "queued")
    other = case.request(2, store=True, priority="background")
    case.end(large)
    assert (late.state, other.state) == ("landed", "queued")
    case.end(late)
    assert other.ended
    waits = case.request(2, store=True, priority="background")
    case.clock.set(9.0)
    passes = case.request(0)
    assert (waits.state, passes.state) == ("queued", "landed")
    assert case.takes == [False, True, False, True, False]


def test_who_is_cancelled_or_hastened_changes_the_order(cases: Any) -> None:
    case = cases(1)
    first = case.request(1)
    gone, second, third = (case.request(1, priority="background") for _ in range(3))
    assert gone.cancel()
    case.graph.runtime.change(lambda: third.hasten(0.0))
    case.end(first)
    assert (gone.state, second.state, third.state) == ("cancelled", "queued", "landed")
    case.end(third)
    assert second.ended
    assert not case.free


def test_rows_that_cannot_be_taken_fail_one_transfer(cases: Any) -> None:
    case = cases(1)
    first = case.request(1)
    second = case.request(1)
    case.error = ValueError("a fault")
    case.end(first)
    assert (second.state, second.error) == ("failed", case.error)
    case.error = None
    assert case.request(1).state == "landed"


def test_rows_are_taken_at_once_unless_others_wait(cases: Any) -> None:
    case = cases(2)
    queue = case.queue
    now = Transfer(case, 1, store=False)
    assert queue.take(now)
    assert not queue.take(Transfer(case, 2, store=False))
    waits = case.request(2)
    assert not queue.take(Transfer(case, 1, store=False))
    case.graph.runtime.change(lambda: queue.give(now))
    assert waits.ended


def calls_at_random(steps: int, seed: int) -> None:
    """Save and load over staging of one block, with a tier that fails, deadlines and cancels."""
    draw = random.Random(seed)
    tier = FakeTier()
    view = KVView(torch.zeros(8, 4, 2, 4, 2, 32).half(), "block layer kv token head dim")
    keys = [key_of(number) for number in range(8)]
    terms: Any = {"staging": 2 * FORM.image_bytes, "tiers": [tier], "full": "wait"}
    with BlockStore(FORM, host=draw.choice([0, 2]) * FORM.image_bytes, **terms) as store:
        handles = []
        for _ in range(steps):
            first = draw.randrange(8)
            some = range(first, min(8, first + draw.randint(1, 3)))
            names = [keys[i] for i in some]
            times: Any = {
                "priority": draw.choice(["urgent", "normal", "background"]),
                "deadline": draw.choice([None, None, 0.0, 0.001, 60.0]),
            }
            if draw.random() < 0.5:
                full: Any = draw.choice(["drop", "wait"])
                handles.append(store.save(view, some, names, full=full, **times))
            else:
                by_layer = draw.random() < 0.3
                handles.append(store.load(view, some, names, by_layer=by_layer, **times))
            if draw.random() < 0.1:
                draw.choice(handles[-20:]).cancel()
            if draw.random() < 0.1:
                tier.blocks.clear()
            tier.faults[draw.choice(keys)] = [draw.choice(["flip", "error"])]
        for handle in handles:
            try:
                handle.synchronize(LIMIT)
            except TransferError:
                assert end_of_handle(handle).ended
    rows: Rows = store.rows
    assert counts_of(rows)["lent"] == 0
    assert not store.graph.live
    assert not any(queue.queued_bytes for queue in store.graph.queues.values())
    shared = store._shared
    assert not shared.begun
    assert not shared.in_transit


@pytest.mark.parametrize("seed", range(4))
def test_staging_of_one_block_lets_all_calls_end(seed: int) -> None:
    """Fault 50."""
    calls_at_random(300, seed)


@pytest.mark.slow
def test_staging_of_one_block_lets_all_of_many_calls_end() -> None:
    """Fault 50."""
    calls_at_random(20_000, 50)
