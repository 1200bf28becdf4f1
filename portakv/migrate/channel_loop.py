# SPDX-License-Identifier: Apache-2.0
"""The thread of a channel, which waits for its sockets."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable

import zmq

_log = logging.getLogger(__name__)


class Loop:
    """A thread that calls a function when a socket has something to receive.

    Attributes:
        stopped: True from the call of `stop` on.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._poller = zmq.Poller()
        self._calls = dict[object, Callable[[], object]]()
        self._soon = deque[Callable[[], object]]()
        self._lock = threading.Lock()
        self._wake = os.eventfd(0)
        self._thread = threading.Thread(target=self._run, name="portakv channel", daemon=True)
        self.watch(self._wake, self._run_soon)

    @property
    def runs_here(self) -> bool:
        """Return True in the thread itself."""
        return self._thread.ident == threading.get_ident()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def watch(self, socket: zmq.Socket[bytes] | int, call: Callable[[], object]) -> None:
        """Call ``call`` in the thread each time something can be received.

        Runs in the thread, or before `start`.
        """
        self._calls[socket] = call
        self._poller.register(socket, zmq.POLLIN)

    def forget(self, socket: zmq.Socket[bytes]) -> None:
        """Watch a socket no longer. Runs in the thread."""
        self._poller.unregister(socket)
        del self._calls[socket]

    def run_soon(self, call: Callable[[], object]) -> None:
        """Make a call in the thread. Any thread may ask for it; does nothing after `stop`."""
        with self._lock:  # the descriptor is closed under it
            if not self.stopped:
                self._soon.append(call)
                os.eventfd_write(self._wake, 1)

    def stop(self) -> bool:
        """End the thread, if it runs, and wait for that. Return False if it was stopped before."""
        with self._lock:
            if self.stopped:
                return False
            self.stopped = True
            os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self._wake)
        return True

    def _run(self) -> None:
        while not self.stopped:
            for ready, _ in self._poller.poll():
                try:
                    self._calls[ready]()
                except Exception:  # one peer's message must not stop the others'
                    _log.exception("A channel failed at a message, and goes on.")

    def _run_soon(self) -> None:
        """Make the calls that other threads requested."""
        os.eventfd_read(self._wake)
        while self._soon:
            self._soon.popleft()()
