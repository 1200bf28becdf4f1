# SPDX-License-Identifier: Apache-2.0
"""What ran on the links of a graph: a trace for people, and seconds for its figures."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict, deque
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

#: Bounds of the histogram of the seconds that nodes ran.
SECONDS = {"0.001": 0.001, "0.01": 0.01, "0.1": 0.1, "1": 1.0, "10": 10.0, "+Inf": np.inf}
BOUNDS = (*SECONDS.values(),)


class Ran(NamedTuple):
    """A node that ran, from ``start`` to ``end`` in seconds; ``followed`` are numbers of others."""

    link: str
    worker: int
    start: float
    end: float
    number: int
    name: str
    blocks: int
    nbytes: int
    followed: tuple[int, ...]


class Trace:
    """The last ``limit`` nodes that ran, and by tier and op the seconds of all."""

    def __init__(self, limit: int) -> None:
        self.ran: deque[Ran] = deque(maxlen=limit)
        # Their sum, and how many nodes ran up to each bound and above the one before it.
        self._seconds = defaultdict[Any, list[Any]](lambda: [0.0, *[0] * len(BOUNDS)])

    def add(self, tier: str, node: Ran) -> None:
        """Note a node that ran."""
        seconds = node.end - node.start
        spent = self._seconds[tier, node.name]
        spent[0] += seconds
        spent[1 + bisect_left(BOUNDS, seconds)] += 1
        self.ran.append(node)

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
        """Chrome's events: a process for each link, a thread for each worker, a flow from a node to
        each that followed it."""
        ran = tuple(self.ran)
        events = list[dict[str, Any]]()
        ends = dict[int, dict[str, Any]]()
        links = list(dict.fromkeys(node.link for node in ran))
        for pid, link in enumerate(links):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": link}})
        for node in ran:
            place = {"pid": links.index(node.link), "tid": node.worker, "cat": "node"}
            start = {**place, "ts": node.start * 1e6}
            told = {"node": node.number, "blocks": node.blocks, "bytes": node.nbytes}
            took = (node.end - node.start) * 1e6
            events.append({**start, "ph": "X", "name": node.name, "dur": took, "args": told})
            for before in filter(ends.get, node.followed):
                flow = {"name": "after", "id": f"{before}-{node.number}"}
                events.append({**ends[before], **flow, "ph": "s"})
                events.append({**start, **flow, "ph": "f", "bp": "e"})
            ends[node.number] = {**place, "ts": node.end * 1e6}
        return events

    def write(self, path: Any) -> None:
        """Write them into a file, which ui.perfetto.dev opens."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": self.events()}, file)
