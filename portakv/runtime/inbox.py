# SPDX-License-Identifier: Apache-2.0
"""Objects that threads put in, and that a thread waits for with a limit.

`queue.SimpleQueue.get` with a timeout may wait for ever before Python 3.13: if the queue is empty,
and no thread had waited for the last object, it computes the time that is left. If the system has
stopped the thread for longer than the timeout meanwhile, that time is negative, which means no
limit. A thread that looks at devices, or renews leases, at short intervals must not use it.
"""

from __future__ import annotations

import threading
from collections import deque
from queue import Empty
from time import monotonic
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """A queue without a limit, oldest first. Any thread may call it.

    `put` takes no lock that a waiting thread holds. No interrupt cuts it in two: the object is in
    the queue or is not, and a thread that misses the wake finds the object at its next call.
    """

    def __init__(self) -> None:
        self._items = deque[T]()
        self._wake = threading.Lock()  # released if there may be something
        self._wake.acquire()

    def put(self, item: T) -> None:
        """Add an object, and wake a thread."""
        self._items.append(item)
        self._release()

    def get_nowait(self) -> T:
        """Return the oldest object; raise `queue.Empty` if there is none."""
        try:
            return self._items.popleft()
        except IndexError:
            raise Empty from None

    def get(self, timeout: float | None = None) -> T:
        """Return the oldest object, after at most ``timeout`` seconds; raise `queue.Empty` if there
        is none by then. None: without a limit."""
        until = 0.0 if timeout is None else monotonic() + timeout
        while True:
            try:
                item = self._items.popleft()
            except IndexError:
                left = -1.0 if timeout is None else until - monotonic()
                if timeout is not None and left <= 0:
                    raise Empty from None
                self._wake.acquire(timeout=left)
                continue
            if self._items:  # two objects may have woken one thread
                self._release()
            return item

    def _release(self) -> None:
        """Wake a thread, unless the next thread that waits is to wake anyway."""
        try:
            self._wake.release()
        except RuntimeError:  # it is released
            return
