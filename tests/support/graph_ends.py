# SPDX-License-Identifier: Apache-2.0
"""Ends of several tasks of a transfer graph, as calls of a block store have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from portakv.storage.work import End, Ending, Graph, Handle, Task
from portakv.tasks import Priority


def end_of(
    graph: Graph,
    tasks: Sequence[Task],
    blocks: int = 1,
    name: str = "",
    eligible: Callable[[], Any] | None = None,
) -> End:
    """Return the end of tasks that move the same blocks. To cancel it cancels them."""
    end = End(graph, blocks, name)

    def stop(state: str, error: Exception) -> bool:
        stopped = [graph.stop(task, state, error) for task in tasks]
        return any(stopped)

    end.stop = stop
    parts = [Ending(task, range(blocks), range(blocks)) for task in tasks]
    graph.run(partial(graph.start, graph.finish(end, parts, eligible)))
    return end


def submit(
    graph: Graph,
    tasks: Sequence[Task],
    priority: Priority = "normal",
    deadline: float | None = None,
) -> None:
    """Start tasks together; ``deadline``: seconds after which those that do not run are late."""

    async def run(task: Task) -> None:
        await graph.move(task, ~task.landed)

    def begin() -> None:
        graph.enter(tasks, priority)
        if deadline is not None:
            for task in tasks:
                graph.end_at(graph.clock() + deadline, task)
                task.due = min(task.due, graph.clock() + deadline)
        for task in tasks:
            graph.start(run(task))

    graph.check_open()
    graph.run(begin, undo=lambda _: [graph.cancel(task) for task in tasks])


def run_in_turn(graph: Graph, tasks: Sequence[Task]) -> None:
    """Run tasks one after the other, each for the blocks that the one before it landed."""

    async def run() -> None:
        left = ~tasks[0].landed
        for number, task in enumerate(tasks):
            left = await graph.move(task, left, *tasks[:number][-1:])

    def begin() -> None:
        graph.enter(tasks, "normal")
        graph.start(run())

    graph.run(begin)


def end_of_handle(handle: Handle) -> End:
    """Return the end of all work of a handle that has some."""
    end: End = handle._ends[-1]
    return end
