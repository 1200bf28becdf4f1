# SPDX-License-Identifier: Apache-2.0
"""Background tasks of which a queue runs one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from support.graph_ends import submit
from support.waits import until

from portakv.storage.work import Graph, Task

WAIT = 30.0  # seconds; nothing here takes as long
WIDTH = 4  # places; three of them are for tasks of the background


@pytest.fixture
def graph() -> Iterator[Graph]:
    graph = Graph()
    yield graph
    assert graph.close(WAIT)


def nothing(task: Task, mask: Any) -> None:
    """Move nothing."""


@pytest.mark.parametrize("alone", [True, False])
def test_background_tasks_that_run_alone_leave_the_other_workers_free(
    graph: Graph, alone: bool
) -> None:
    """False is the control."""
    queue = graph.queue("wide", 4)
    going = set[int]()
    end = threading.Event()

    def work(task: Task, mask: Any) -> None:
        going.add(task.number)
        assert end.wait(WAIT)

    tasks = [Task(work, 1, queue=queue) for _ in range(3)]
    for task in tasks:
        task.alone = alone
    submit(graph, tasks, priority="background")
    urgent = [Task(nothing, 1, queue=queue) for _ in range(8)]
    for task in urgent:
        task.alone = alone  # says nothing of an urgent task
    if not alone:
        assert until(lambda: len(going) == 3, WAIT)
    else:
        assert until(lambda: len(going) == 1, WAIT)
        submit(graph, urgent, priority="urgent")
        assert all(task.wait(WAIT) for task in urgent)
        assert len(going) == 1, "the other workers took what was urgent, and nothing else"
    end.set()
    assert all(task.wait(WAIT) for task in tasks)
    assert len(going) == 3


class Held:
    """Tasks of a queue. A task that was made `held` runs until `end`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.queue = graph.queue("wide", WIDTH)
        self.going = set[str]()
        self.end = dict[str, threading.Event]()

    def submit(self, name: str, alone: bool = False, after: Task | None = None) -> Task:
        """Submit a background task that is held."""
        end = self.end[name] = threading.Event()

        def work(task: Task, mask: Any) -> None:
            self.going.add(name)
            assert end.wait(2 * WAIT)  # longer than a test waits for another task

        task = Task(work, 1, queue=self.queue, name=name)
        task.alone = alone

        async def follow(before: Task) -> None:
            await task.move((await before).landed)

        def begin(before: Task) -> None:
            self.graph.enter([task], "background")
            self.graph.runtime.start(follow(before))

        if after is not None:
            self.graph.runtime.change(partial(begin, after))
        else:
            submit(self.graph, [task], priority="background")
        return task

    def runs(self, *names: str) -> bool:
        """Return True once all of these tasks have begun."""
        return until(lambda: self.going >= {*names}, WAIT)


@pytest.fixture
def held(graph: Graph) -> Iterator[Held]:
    held = Held(graph)
    yield held
    for end in held.end.values():
        end.set()


def test_a_task_that_waits_to_run_alone_holds_up_no_other_kind(held: Held) -> None:
    held.submit("first", alone=True)
    assert held.runs("first")
    second = held.submit("second", alone=True)
    held.submit("other")
    held.submit("another")
    assert held.runs("other", "another")
    assert second.state == "queued"
    held.end["first"].set()
    assert held.runs("second")


def test_the_end_of_a_task_that_ran_alone_starts_both_kinds(held: Held) -> None:
    """The helper that ends it takes its follower, and another takes the one that was due first."""
    first = held.submit("first", alone=True)
    assert held.runs("first")
    held.submit("second", alone=True)
    held.submit("follower", after=first)
    held.end["first"].set()
    assert held.runs("second", "follower")


def test_tasks_of_both_kinds_are_taken_in_their_order(held: Held) -> None:
    for name in "abc":
        held.submit(name)
    assert held.runs(*"abc")  # no more of the background run together
    order = [held.submit(str(number), alone=number in (1, 2)) for number in range(4)]
    for name, task in zip("abc", order, strict=False):
        held.end[name].set()
        if task.name != "2":
            assert held.runs(task.name)
    assert held.runs("3"), "the worker that ended c took it, as 1 runs alone"
    assert order[2].state == "queued"
    held.end["1"].set()
    assert held.runs("2")


@pytest.mark.parametrize("how", ["cancelled", "urgent"])
def test_a_former_entry_of_a_task_holds_up_nothing(held: Held, graph: Graph, how: str) -> None:
    held.submit("first", alone=True)
    assert held.runs("first")
    second = held.submit("second", alone=True)
    third = held.submit("third", alone=True)
    if how == "cancelled":
        assert second.cancel()
    else:
        graph.runtime.change(lambda: second.hasten(0.0))
        assert held.runs("second")
    held.submit("other")
    assert held.runs("other")
    assert third.state == "queued"
    held.end["first"].set()
    assert held.runs("third")
