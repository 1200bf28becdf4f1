# SPDX-License-Identifier: Apache-2.0
"""What ran when, for people: the last nodes of a graph, in a file that ui.perfetto.dev opens."""

from __future__ import annotations

import json
from collections import deque
from typing import Any


class Trace:
    """The last nodes that ran, as (name, link, worker, start and end in seconds, {"node": number,
    "blocks", "bytes"}, numbers of what it followed)."""

    def __init__(self, limit: int) -> None:
        self.ran: deque[tuple[Any, ...]] = deque(maxlen=limit)

    def events(self) -> list[dict[str, Any]]:
        """Chrome's events: a process for each link, a thread for each worker, a flow from a node to
        each that followed it."""
        ran, events, ends = tuple(self.ran), list[Any](), dict[int, Any]()
        links = list(dict.fromkeys(node[1] for node in ran))
        for pid, link in enumerate(links):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": link}})
        for name, link, worker, start, end, told, followed in ran:
            here = {"pid": links.index(link), "tid": worker, "cat": "node", "ts": start * 1e6}
            done = {"ph": "X", "name": name, "dur": (end - start) * 1e6, "args": told}
            events.append({**here, **done})
            for before in filter(ends.get, followed):
                flow = {"name": "after", "id": f"{before}-{told['node']}"}
                events += {**ends[before], **flow}, {**here, **flow, "ph": "f", "bp": "e"}
            ends[told["node"]] = {**here, "ph": "s", "ts": end * 1e6}
        return events

    def write(self, path: Any) -> None:
        """Write them into a file."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": self.events()}, file)
