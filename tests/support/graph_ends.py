# SPDX-License-Identifier: Apache-2.0
"""Ends of several tasks of a transfer graph, as calls of a block store have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    end = End(graph.runtime, blocks, name)

    def stop(state: str, error: Exception) -> bool:
        stopped = [task.stop(state, error) for task in tasks]
        return any(stopped)

    end.stop_work = stop
    parts = [Ending(task, range(blocks), range(blocks)) for task in tasks]
    graph.runtime.change(lambda: graph.runtime.start(end.come_after(parts, eligible)))
    return end


def submit(
    graph: Graph,
    tasks: Sequence[Task],
    priority: Priority = "normal",
    deadline: float | None = None,
) -> None:
    """Start tasks together; ``deadline``: seconds after which those that do not run are late."""

    async def run(task: Task) -> None:
        await task.move(~task.landed)

    def begin() -> None:
        graph.enter(tasks, priority)
        if deadline is not None:
            for task in tasks:
                task.cancel_at(graph.clock() + deadline)
                task.due = min(task.due, graph.clock() + deadline)
        for task in tasks:
            graph.runtime.start(run(task))

    graph.check_open()
    graph.runtime.change(begin, undo=lambda _: [task.cancel() for task in tasks])


def run_in_turn(graph: Graph, tasks: Sequence[Task]) -> None:
    """Run tasks one after the other, each for the blocks that the one before it landed."""

    async def run() -> None:
        left = ~tasks[0].landed
        for number, task in enumerate(tasks):
            left = await task.move(left, *tasks[:number][-1:])

    def begin() -> None:
        graph.enter(tasks, "normal")
        graph.runtime.start(run())

    graph.runtime.change(begin)


def end_of_handle(handle: Handle) -> End:
    """Return the end of all work of a handle that has some."""
    end: End = handle._ends[-1]
    return end
