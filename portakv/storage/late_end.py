# SPDX-License-Identifier: Apache-2.0
"""The end of a copy that outlives its transfer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from portakv.graph import Graph, Lease, Task


def end_later(graph: Graph, lease: Lease, end: Callable[[], object]) -> bool:
    """Have a worker call ``end``, which waits for a copy into the rows of a lease.

    The lease ends once more after that. Without workers, call ``end`` here and return False.
    """

    def wait(*_: object) -> None:
        with suppress(Exception):  # of the device; the rows go back anyway
            end()

    if graph.closed.is_set():  # no worker is left
        wait()
        return False
    task = Task(wait, 1, queue=graph.queue("ends"), lease=lease, name="end")
    graph.submit([task], priority="urgent")
    return True
