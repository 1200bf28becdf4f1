# SPDX-License-Identifier: Apache-2.0
"""`Timers`: when tasks end that have not run by then, and the threads that wait for tasks."""

from __future__ import annotations

import threading
from collections.abc import Collection
from heapq import heapify, heappop, heappush
from typing import Literal, TypeAlias

from portakv.graph.task import Task

#: How a task ends that did not run.
Unrun: TypeAlias = Literal["cancelled", "late", "dropped"]
#: The most seconds for which a thread sleeps.
LONGEST = 3600.0


class Timers:
    """The times at which tasks end that have not run, and the threads that sleep until an end.

    Callers hold the graph's lock, except for `pause` and `expired`.
    """

    def __init__(self) -> None:
        self._timers = list[tuple[float, int, Unrun, Task]]()  # when, number, state at the end
        self._sleepers = set[threading.Lock]()  # one locked lock for each thread in `pause`

    def __len__(self) -> int:
        return len(self._timers)

    def add(self, when: float, task: Task, state: Unrun, live: Collection[Task]) -> None:
        """Add the time at which a task ends; ``live`` are the tasks that have not ended."""
        # Most timers are of tasks that ended in time.
        if len(self._timers) > 2 * len(live) + 100:
            self._timers = [x for x in self._timers if not x[3].outcome.ended]
            heapify(self._timers)
        heappush(self._timers, (when, task.schedule.number, state, task))
        if self._timers[0][3] is task:
            self.wake()

    def expired(self, now: float) -> bool:
        """Return True if `pop` has a task."""
        return any(timer[0] <= now or timer[3].outcome.ended for timer in self._timers[:1])

    def pop(self, now: float) -> tuple[Task, Unrun] | None:
        """Take the next task whose time has come, or that has ended, and its state at the end."""
        if not self.expired(now):
            return None
        _, _, state, task = heappop(self._timers)
        return task, state

    def pause(self, task: Task, until: float, now: float) -> None:
        """Sleep until the end of a task, a time, or the time of the next timer; perhaps for less.

        Takes no lock of the graph, so an interrupt leaves no lock locked.
        """
        sleeper = threading.Lock()
        sleeper.acquire()
        self._sleepers.add(sleeper)
        task.schedule.watched = True
        if not task.outcome.ended:  # the thread that ends it from now on wakes this thread
            until = min(until, now + LONGEST, *(timer[0] for timer in self._timers[:1]))
            sleeper.acquire(timeout=max(0.0, until - now))
        self._sleepers.discard(sleeper)

    def wake(self) -> None:
        """Wake the threads that sleep."""
        for sleeper in tuple(self._sleepers):
            self._sleepers.discard(sleeper)
            sleeper.release()
