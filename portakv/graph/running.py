# SPDX-License-Identifier: Apache-2.0
"""The tasks of a queue that run, and the pace at which tasks start."""

from __future__ import annotations

from collections.abc import Callable

from portakv.graph.task import Task
from portakv.runtime.worker import RateLimit


class Pace:
    """The time at which the next task of a queue may start, at most ``max_gbps`` 10^9 bytes a
    second."""

    def __init__(self, max_gbps: float | None, clock: Callable[[], float]) -> None:
        self.max_gbps = max_gbps
        self.next_start = 0.0
        self._limit = RateLimit(max_gbps, clock) if max_gbps else None

    def start(self, nbytes: int) -> None:
        """Note that a task of so many bytes starts."""
        if self._limit is not None:
            self._limit.start_of(nbytes)
            self.next_start = self._limit.start_of(0)


class Running:
    """The tasks of a queue that run, with their starts; ``background``: how many are of that
    priority; ``alone``: how many of these are `Task.alone`; ``ran_bytes``: the bytes of those that
    have run."""

    def __init__(self) -> None:
        self.background = 0
        self.alone = 0
        self.ran_bytes = 0
        self._starts = dict[Task, float]()

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, task: Task, now: float) -> None:
        """Note the start of a task."""
        self._starts[task] = now
        if task.schedule.background:
            self.background += 1
            self.alone += task.alone

    def remove(self, task: Task) -> float:
        """Note the end of a task, and return its start."""
        if task.schedule.background:
            self.background -= 1
            self.alone -= task.alone
        self.ran_bytes += task.nbytes
        return self._starts.pop(task)

    def longest(self, now: float) -> float:
        """Return the seconds for which a task has run; 0 if none runs."""
        return now - min(self._starts.values(), default=now)
