# SPDX-License-Identifier: Apache-2.0
"""`Calls`: a thread that makes calls for an engine, which waits for none of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from portakv.errors import StoreError
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.runtime.resources import start_thread

_log = RateLimitedLog(logging.getLogger(__name__))


class Calls:
    """Makes calls in their order, in a thread.

    ``name``: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._queue = SimpleQueue[Callable[[], object] | None]()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        start_thread(self._thread, StoreError)

    @property
    def closed(self) -> bool:
        """Return whether no more calls are added."""
        return self._closed

    def add(self, call: Callable[[], object]) -> bool:
        """Have a call made; return False after `close`."""
        with self._lock:
            if not self._closed:
                self._queue.put(call)
            return not self._closed

    def wait(self) -> None:
        """Wait until the calls that were added have been made."""
        made = threading.Event()
        if self.add(made.set):
            made.wait()
        else:
            self._thread.join()

    def close(self, timeout: float) -> None:
        """Make the calls that were added, and end the thread; wait at most so many seconds."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except Exception as error:  # the next calls must be made
                _log.warning("call", "A call about pages failed: %r. Report it.", error)
