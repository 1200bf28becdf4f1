# SPDX-License-Identifier: Apache-2.0
"""Connect a reader to owners in workers that do nothing else.

A handshake lasts as long as a request when its owner is stopped. So it occupies no worker that
copies rows or begins pulls, and no thread of a caller.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import monotonic

from portakv.errors import PortaKVError, TransferError
from portakv.graph import Graph, Task
from portakv.migrate.connections import ANY, Connections
from portakv.migrate.questions import OwnerKey
from portakv.runtime.resources import reason

#: Handshakes together. Each owner that is stopped occupies a worker until its handshake times out.
WIDTH = 16


@dataclass(frozen=True)
class Attempt:
    """A handshake with an owner: the task that makes it, and when it began."""

    task: Task
    began: float

    @property
    def error(self) -> PortaKVError | None:
        """Return why the handshake failed; None if it has not ended, or connected the owner."""
        error = self.task.error
        if error is None or isinstance(error, PortaKVError):
            return error
        why = reason(error) if isinstance(error, OSError) else repr(error)
        return TransferError(f"The handshake failed: {why}.")


class Connector:
    """Makes the handshakes of one reader, one for each owner at a time. Any thread may call it.

    Args:
        on_end: called at the end of each handshake; it must be quick and take no lock.
    """

    def __init__(self, graph: Graph, owners: Connections, on_end: Callable[[], object]) -> None:
        self._graph = graph
        self._owners = owners
        self._on_end = on_end
        self._queue = graph.queue("connect", width=WIDTH)
        self._lock = threading.Lock()
        self._attempts = dict[OwnerKey, Attempt]()

    def has(self, owner: OwnerKey) -> bool:
        """Return True if an owner is connected; with the epoch `ANY`, whoever has the address."""
        address, epoch = owner
        if epoch == ANY:
            return self._owners.has(address)
        return self._owners.knows(address, epoch)

    def begin(self, owner: OwnerKey) -> Attempt:
        """Return the handshake with an owner that is under way; begin one if there is none.

        An address that is not connected at all needs one handshake, whatever the epoch. Raises
        `TransferError` if the graph is closed.
        """
        address, epoch = owner
        if not self._owners.has(address):
            epoch = ANY
        with self._lock:
            attempt = self._attempts.get((address, epoch))
            if attempt is not None and not attempt.task.ended:
                return attempt
            connect = partial(self._owners.prepare, address, epoch)
            task = Task(lambda *_: connect(), 1, queue=self._queue, name="connect")
            task.on_end = self._on_end
            attempt = Attempt(task, monotonic())
            self._graph.submit([task], priority="urgent")
            # Only those under way are kept; an interrupt before this line costs a handshake more.
            under_way = {k: v for k, v in self._attempts.items() if not v.task.ended}
            self._attempts = {**under_way, (address, epoch): attempt}
            return attempt
