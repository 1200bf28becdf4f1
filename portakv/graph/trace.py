# SPDX-License-Identifier: Apache-2.0
"""What ran when, for people: the last nodes of a graph, as a file that ui.perfetto.dev opens."""

from __future__ import annotations

import json
from collections import deque
from typing import Any


class Trace:
    """The last ``limit`` nodes that ran: on which link and worker, from when to when."""

    def __init__(self, limit: int) -> None:
        self._ran: deque[Any] = deque(maxlen=limit)

    def add(self, node: Any, link: str, worker: int, start: float, end: float) -> None:
        """Remember a node, before it forgets what it followed."""
        after = [before.number for before, *_ in node.after]
        told = {"node": node.number, "blocks": node.blocks, "bytes": node.nbytes}
        self._ran.append((node.name, link, worker, start * 1e6, end * 1e6, told, after))

    def events(self) -> list[dict[str, Any]]:
        """Chrome's events: a process for each link, a thread for each worker, flows from a node to
        those that followed it; times in microseconds."""
        ran, events, ends = tuple(self._ran), list[dict[str, Any]](), dict[int, dict[str, Any]]()
        pids = {link: pid for pid, link in enumerate(sorted({x[1] for x in ran}))}
        for link, pid in pids.items():
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": link}})
        for name, link, worker, start, end, told, after in ran:
            place = {"pid": pids[link], "tid": worker, "cat": "portakv"}
            events.append(
                {**place, "ph": "X", "name": name, "ts": start, "dur": end - start, "args": told}
            )
            for number in [number for number in after if number in ends]:
                flow = {"name": "after", "id": f"{number}-{told['node']}"}
                events += (
                    {**ends[number], **flow},
                    {**place, **flow, "ph": "f", "bp": "e", "ts": start},
                )
            ends[told["node"]] = {**place, "ph": "s", "ts": end}
        return events

    def write(self, path: Any) -> None:
        """Write them into a file."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": self.events(), "displayTimeUnit": "ms"}, file)
