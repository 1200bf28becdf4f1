# SPDX-License-Identifier: Apache-2.0
"""Record the tasks that ran on a graph's queues: a trace for people, and seconds for its
figures."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Mapping
from itertools import accumulate
from os import PathLike
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from portakv.arguments import invalid
from portakv.errors import PortaKVError

#: Samples of a figure: labels, and a "value".
Samples: TypeAlias = list[dict[str, str | float]]
#: Samples by the name of a figure.
Figures: TypeAlias = dict[str, Samples]
#: One entry of Chrome's trace format.
Event = dict[str, Any]
#: Bounds of the histogram of the seconds that tasks ran.
SECONDS = {"0.001": 0.001, "0.01": 0.01, "0.1": 0.1, "1": 1.0, "10": 10.0, "+Inf": np.inf}
BOUNDS = (*SECONDS.values(),)
#: Notes that a trace keeps.
NOTES = 256


class Ran(NamedTuple):
    """A task that ran, from ``start`` to ``end`` in seconds; ``followed``: numbers of other
    tasks."""

    queue: str
    worker: int
    start: float
    end: float
    number: int
    name: str
    blocks: int
    nbytes: int
    followed: tuple[int, ...]


class Spent:
    """The seconds of many tasks: their sum, and the tasks up to each bound and above the one before
    it.

    Attributes:
        waited: the seconds that the tasks waited for a worker.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._sum = 0.0
        self._ran = [0] * len(BOUNDS)

    def add(self, seconds: float) -> None:
        """Count a task. One thread at a time."""
        self._sum += seconds
        self._ran[bisect_left(BOUNDS, seconds)] += 1

    def samples(self, name: str, labels: Mapping[str, str]) -> Figures:
        """Return the series of a histogram."""
        ran = [*self._ran]
        buckets: Samples = [
            {**labels, "le": le, "value": many}
            for le, many in zip(SECONDS, accumulate(ran), strict=True)
        ]
        return {
            f"{name}_sum": [{**labels, "value": self._sum}],
            f"{name}_count": [{**labels, "value": sum(ran)}],
            f"{name}_bucket": buckets,
        }


def histograms(name: str, spent: Mapping[str, Spent]) -> Figures:
    """Return the seconds of work by its result, for a histogram."""
    figures = defaultdict[str, Samples](list)
    for result, seconds in [*spent.items()]:
        for series, samples in seconds.samples(name, {"result": result}).items():
            figures[series] += samples
    return figures


class Trace:
    """The last ``limit`` tasks that ran, the last notes, and the seconds of all tasks by tier and
    operation."""

    def __init__(self, limit: int) -> None:
        self.ran: deque[Ran] = deque(maxlen=limit)
        self.notes: deque[Event] = deque(maxlen=NOTES)
        self._seconds = defaultdict[tuple[str, str], Spent](Spent)

    def add(self, tier: str, task: Ran, waited: float = 0.0) -> None:
        """Record a task that ran, after it had ``waited`` so many seconds for a worker."""
        spent = self._seconds[tier, task.name]
        spent.add(task.end - task.start)
        spent.waited += waited
        self.ran.append(task)

    def note(self, name: str, at: float, details: dict[str, Any]) -> None:
        """Record a choice that was made at ``at`` seconds, with details that JSON takes."""
        place = {"tid": 0, "cat": "note", "ts": at * 1e6}
        self.notes.append({**place, "ph": "i", "s": "g", "name": name, "args": details})

    def statistics(self) -> Figures:
        """Return the seconds."""
        figures = defaultdict[str, Samples](list)
        for (tier, op), spent in self._seconds.items():
            labels = {"tier": tier, "op": op}
            for name, samples in spent.samples("tier_seconds", labels).items():
                figures[name] += samples
            figures["tier_wait_seconds_total"].append({**labels, "value": spent.waited})
        return {**figures}

    def events(self) -> list[Event]:
        """Return Chrome's events: a process for each queue, a thread for each worker, a flow from a
        task to each that followed it."""
        ran = tuple(self.ran)
        pids = {queue: pid for pid, queue in enumerate(dict.fromkeys(x.queue for x in ran))}
        events: list[Event] = [
            {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": queue}}
            for queue, pid in pids.items()
        ]
        ends = dict[int, Event]()
        for task in ran:
            place = {"pid": pids[task.queue], "tid": task.worker, "cat": "task"}
            start = {**place, "ts": task.start * 1e6}
            details = {"task": task.number, "blocks": task.blocks, "bytes": task.nbytes}
            took = (task.end - task.start) * 1e6
            events.append({**start, "ph": "X", "name": task.name, "dur": took, "args": details})
            for before in filter(ends.get, task.followed):
                flow = {"name": "after", "id": f"{before}-{task.number}"}
                events.append({**ends[before], **flow, "ph": "s"})
                events.append({**start, **flow, "ph": "f", "bp": "e"})
            ends[task.number] = {**place, "ts": task.end * 1e6}
        return events + [{**note, "pid": len(pids)} for note in tuple(self.notes)]

    def write(self, path: str | PathLike[str], failure: type[PortaKVError]) -> None:
        """Write the events into a file for ui.perfetto.dev.

        Raises:
            InvalidTerms: not a path.
            failure: the file cannot be written.
        """
        if not isinstance(path, str | PathLike) or not str(path):
            raise invalid("path", "a path of a file", path, "Pass a text or a path.")
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"traceEvents": self.events()}, file)
        except (OSError, ValueError) as error:
            raise failure(
                f"Expected path to be a file that can be written, got {path}: {error}. Pass "
                f"another path."
            ) from error
