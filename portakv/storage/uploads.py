# SPDX-License-Identifier: Apache-2.0
"""`Uploads`: the rows of saves that wait for a remote tier, and that other saves may need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial

from portakv.graph import Graph, Task
from portakv.storage.rows import Rows


class Uploads:
    """The writes of the saves of one form to remote tiers, except of saves that wait for rows.

    Callers hold the graph's lock.

    Attributes:
        rows: how many hold a block until it is written.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._tasks = dict[Task, int]()  # with their rows, in order

    def begin(self, task: Task, rows: int) -> None:
        """Note a task that writes rows, until its end."""
        self.rows += rows
        self._tasks[task] = rows
        task.on_end = partial(self._end, task)

    def _end(self, task: Task) -> None:
        self.rows -= self._tasks.pop(task)

    def waiting(self) -> list[Task]:
        """Return the tasks that no worker has begun, and whose rows nothing else needs."""
        queued = [task for task in self._tasks if task.state == "queued"]
        uses = Counter(task.lease for task in queued)  # several if there are several remote tiers
        return [x for x in queued if x.lease is not None and x.lease.users == uses[x.lease]]

    def make_way(self, every: Iterable[Uploads], rows: Rows, graph: Graph, count: int) -> int:
        """Drop uploads that wait for a slow tier if a save needs their rows, the latest first.

        They keep half of the rows that saves may have. So a remote tier that is slower than saves
        costs no block of a nearer tier. The order is that of all forms together, since an engine
        may need a block of all its groups of layers. Call it under the graph's lock.

        Args:
            every: the uploads of all forms that share the rows, this one among them.
            count: the rows that the save needs.

        Returns:
            How many rows were given back.
        """
        every = [*every]
        half = (rows.most + rows.host) // 2
        first = sum(each.rows for each in every)
        left = first
        if left <= half or not rows.lacks(count):
            return 0
        waiting = [task for each in every for task in each.waiting()]
        for task in sorted(waiting, key=lambda task: task.schedule.number, reverse=True):
            if left <= half or not rows.lacks(count):
                break
            graph.cancel(task, "dropped")
            left = sum(each.rows for each in every)
        return first - left
