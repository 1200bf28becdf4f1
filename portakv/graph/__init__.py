# SPDX-License-Identifier: Apache-2.0
"""Tasks with dependencies, priorities and deadlines, which the workers of queues execute.

The package uses no files, no networks and no block store.
"""

from typing import Any

from portakv.deprecation import warn_former
from portakv.graph.alarms import watch as watch
from portakv.graph.graph import SLACK as SLACK
from portakv.graph.graph import Graph
from portakv.graph.graph import Priority as Priority
from portakv.graph.graph import Queue as Queue
from portakv.graph.handle import Handle
from portakv.graph.handle import Missing as Missing
from portakv.graph.prometheus import Collector
from portakv.graph.task import Guard as Guard
from portakv.graph.task import Lease, Task
from portakv.graph.task import Mask as Mask
from portakv.graph.task import Outcome as Outcome
from portakv.graph.task import Workers as Workers

__all__ = ["Collector", "Graph", "Handle", "Lease", "Task"]


class _Node(Task):
    """A task from the arguments of its former class: ``link`` is its queue, ``given`` the eligible
    blocks."""

    def __init__(
        self,
        work: Any,
        blocks: int,
        *,
        link: Queue | None = None,
        given: Any = None,
        **terms: Any,
    ) -> None:
        super().__init__(work, blocks, queue=link, eligible=given, **terms)

    @property
    def link(self) -> object:
        """Return the queue."""
        return self.queue

    @property
    def given(self) -> object:
        """Return the eligible blocks."""
        return self.eligible


def __getattr__(name: str) -> object:
    """Return `Task` under its former name; raise `AttributeError` for any other name."""
    if name != "Node":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_former(
        "portakv.graph.Node", "Task, with queue= and eligible= in place of link= and given="
    )
    return _Node
