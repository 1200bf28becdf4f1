# SPDX-License-Identifier: Apache-2.0
"""What ran on the queues of a graph: a trace for people, and seconds for its figures."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict, deque
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

#: Bounds of the histogram of the seconds that tasks ran.
SECONDS = {"0.001": 0.001, "0.01": 0.01, "0.1": 0.1, "1": 1.0, "10": 10.0, "+Inf": np.inf}
BOUNDS = (*SECONDS.values(),)


class Ran(NamedTuple):
    """A task that ran, from ``start`` to ``end`` in seconds; ``followed`` are numbers of others."""

    queue: str
    worker: int
    start: float
    end: float
    number: int
    name: str
    blocks: int
    nbytes: int
    followed: tuple[int, ...]


class Trace:
    """The last ``limit`` tasks that ran, and by tier and op the seconds of all."""

    def __init__(self, limit: int) -> None:
        self.ran: deque[Ran] = deque(maxlen=limit)
        # Their sum, and how many tasks ran up to each bound and above the one before it.
        self._seconds = defaultdict[Any, list[Any]](lambda: [0.0, *[0] * len(BOUNDS)])

    def add(self, tier: str, task: Ran) -> None:
        """Note a task that ran."""
        seconds = task.end - task.start
        spent = self._seconds[tier, task.name]
        spent[0] += seconds
        spent[1 + bisect_left(BOUNDS, seconds)] += 1
        self.ran.append(task)

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """The seconds, as `Graph.statistics` has its figures."""
        found = defaultdict[str, list[dict[str, Any]]](list)
        for (tier, op), (seconds, *ran) in self._seconds.items():
            what = {"tier": tier, "op": op}
            found["tier_seconds_sum"].append({**what, "value": seconds})
            found["tier_seconds_count"].append({**what, "value": sum(ran)})
            for le, many in zip(SECONDS, accumulate(ran), strict=True):
                found["tier_seconds_bucket"].append({**what, "le": le, "value": many})
        return {**found}

    def events(self) -> list[dict[str, Any]]:
        """Return Chrome's events: a process for each queue, a thread for each worker, a flow from a
        task to each that followed it."""
        ran = tuple(self.ran)
        events = list[dict[str, Any]]()
        ends = dict[int, dict[str, Any]]()
        queues = list(dict.fromkeys(task.queue for task in ran))
        for pid, queue in enumerate(queues):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": queue}})
        for task in ran:
            place = {"pid": queues.index(task.queue), "tid": task.worker, "cat": "node"}
            start = {**place, "ts": task.start * 1e6}
            told = {"node": task.number, "blocks": task.blocks, "bytes": task.nbytes}
            took = (task.end - task.start) * 1e6
            events.append({**start, "ph": "X", "name": task.name, "dur": took, "args": told})
            for before in filter(ends.get, task.followed):
                flow = {"name": "after", "id": f"{before}-{task.number}"}
                events.append({**ends[before], **flow, "ph": "s"})
                events.append({**start, **flow, "ph": "f", "bp": "e"})
            ends[task.number] = {**place, "ts": task.end * 1e6}
        return events

    def write(self, path: Any) -> None:
        """Write them into a file, which ui.perfetto.dev opens."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": self.events()}, file)
