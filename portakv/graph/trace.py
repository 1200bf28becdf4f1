# SPDX-License-Identifier: Apache-2.0
"""What ran when, for people: the last nodes of a graph, in a file that ui.perfetto.dev opens."""

from __future__ import annotations

import json
from collections import deque
from typing import Any


class Trace:
    """The last ``limit`` nodes that ran: link, worker, start and end in seconds, number, name,
    blocks, bytes, and the numbers of what it followed."""

    def __init__(self, limit: int) -> None:
        self.ran: deque[tuple[Any, ...]] = deque(maxlen=limit)

    def events(self) -> list[dict[str, Any]]:
        """Chrome's events: a process for each link, a thread for each worker, a flow from a node to
        each that followed it."""
        ran, events, ends = tuple(self.ran), list[Any](), dict[int, Any]()
        links = list(dict.fromkeys(node[0] for node in ran))
        for pid, link in enumerate(links):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": link}})
        for link, worker, start, end, number, name, blocks, nbytes, *followed in ran:
            here = {"pid": links.index(link), "tid": worker, "cat": "node", "ts": start * 1e6}
            told = {"node": number, "blocks": blocks, "bytes": nbytes}
            events.append(
                {**here, "ph": "X", "name": name, "dur": (end - start) * 1e6, "args": told}
            )
            for before in filter(ends.get, followed):
                flow = {"name": "after", "id": f"{before}-{number}"}
                events += {**ends[before], **flow}, {**here, **flow, "ph": "f", "bp": "e"}
            ends[number] = {**here, "ph": "s", "ts": end * 1e6}
        return events

    def write(self, path: Any) -> None:
        """Write them into a file."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": self.events()}, file)
