# SPDX-License-Identifier: Apache-2.0
"""The thread of a channel, which waits for its sockets."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

import zmq

from portakv.errors import PeerError
from portakv.runtime import resources

_log = logging.getLogger(__name__)


class Loop:
    """A thread that calls a function when a socket has something to receive.

    Attributes:
        stopped: True from the call of `stop` on.

    Raises `PeerError` if the process has no descriptor left.
    """

    def __init__(self) -> None:
        resources.raise_limit_if_few()
        self.stopped = False
        self._poller = zmq.Poller()
        self._calls = dict[object, Callable[[], object]]()
        self._soon = deque[Callable[[], object]]()
        self._timers = list[tuple[float, Callable[[], object]]]()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="portakv channel", daemon=True)
        try:
            self._wake = os.eventfd(0)
        except OSError as error:
            raise PeerError(
                f"Expected a descriptor for a channel, but {resources.reason(error)}."
            ) from None
        self.watch(self._wake, self._run_soon)

    @property
    def runs_here(self) -> bool:
        """Return True in the thread itself."""
        return self._thread.ident == threading.get_ident()

    def start(self) -> None:
        """Start the thread. Raises `PeerError` if the system gives no more."""
        resources.start_thread(self._thread, PeerError)

    def watch(
        self, socket: zmq.Socket[bytes] | int, call: Callable[[], object], events: int = zmq.POLLIN
    ) -> None:
        """Call ``call`` in the thread each time something can be received, or at other events of
        ZeroMQ's poller.

        Runs in the thread, or before `start`.
        """
        self._calls[socket] = call
        self._poller.register(socket, events)

    def forget(self, socket: zmq.Socket[bytes] | int) -> None:
        """Watch a socket no longer, if it is watched. Runs in the thread."""
        if self._calls.pop(socket, None) is not None:
            self._poller.unregister(socket)

    def run_soon(self, call: Callable[[], object]) -> None:
        """Make a call in the thread. Any thread may ask for it.

        After `stop` the calling thread makes it.
        """
        with self._lock:  # the descriptor is closed under it
            if not self.stopped:
                self._soon.append(call)
                os.eventfd_write(self._wake, 1)
                return
        call()

    def run_later(self, seconds: float, call: Callable[[], object]) -> None:
        """Make a call in the thread after so many seconds. Runs in the thread, or before `start`.

        Does nothing after `stop`.
        """
        self._timers.append((monotonic() + seconds, call))

    def stop(self) -> bool:
        """End the thread, if it runs, and wait for that. Return False if it was stopped before."""
        with self._lock:
            if self.stopped:
                return False
            self.stopped = True
            os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._drain()  # what the thread has not run
        os.close(self._wake)
        return True

    def _run(self) -> None:
        while not self.stopped:
            for ready, _ in self._poller.poll(self._pause()):
                if ready in self._calls:  # else an earlier call of this round has ended its watch
                    self._make(self._calls[ready])
            now = monotonic()
            for timer in [each for each in self._timers if each[0] <= now]:
                self._timers.remove(timer)
                self._make(timer[1])

    def _pause(self) -> int | None:
        """Return the milliseconds until the next timer; None without one."""
        if not self._timers:
            return None
        return max(0, int(1e3 * (min(due for due, _ in self._timers) - monotonic())) + 1)

    def _make(self, call: Callable[[], object]) -> None:
        """Make a call, and log its error."""
        try:
            call()
        except Exception:  # one peer's message must not stop the others'
            _log.exception("A channel failed at a message, and goes on.")

    def _run_soon(self) -> None:
        """Make the calls that other threads requested."""
        os.eventfd_read(self._wake)
        self._drain()

    def _drain(self) -> None:
        """Make the calls, in their order."""
        while self._soon:
            self._make(self._soon.popleft())
