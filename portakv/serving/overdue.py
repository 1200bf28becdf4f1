# SPDX-License-Identifier: Apache-2.0
"""`Overdue`: items that have to end by a time, each of them once."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Overdue(Generic[T]):
    """Items with the times by which they have to end. The caller that removes an item ends it.

    Any thread may call. Items are hashable.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until = dict[T, float]()
        self._next = float("inf")  # no item is due before

    def add(self, item: T, until: float) -> None:
        """Add an item that has to end by a time of `time.monotonic`."""
        with self._lock:
            self._until[item] = until
            self._next = min(self._next, until)

    def remove(self, item: T) -> bool:
        """Remove an item; return whether it was there."""
        with self._lock:
            return self._until.pop(item, None) is not None

    def due(self, now: float) -> list[T]:
        """Return the items whose times have come; they stay until `remove`."""
        if now < self._next:
            return []
        with self._lock:
            self._next = min(self._until.values(), default=float("inf"))
            return [item for item, until in self._until.items() if until <= now]
