# SPDX-License-Identifier: Apache-2.0
"""Background tasks of which a queue runs one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.migrate_channels import until

from portakv.graph import Graph, Task

WAIT = 30.0  # seconds; nothing here takes as long


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
    graph.submit(tasks, priority="background")
    urgent = [Task(nothing, 1, queue=queue) for _ in range(8)]
    for task in urgent:
        task.alone = alone  # says nothing of an urgent task
    if not alone:
        assert until(lambda: len(going) == 3, WAIT)
    else:
        assert until(lambda: len(going) == 1, WAIT)
        graph.submit(urgent, priority="urgent")
        assert all(task.wait(WAIT) for task in urgent)
        assert len(going) == 1, "the other workers took what was urgent, and nothing else"
    end.set()
    assert all(task.wait(WAIT) for task in tasks)
    assert len(going) == 3
