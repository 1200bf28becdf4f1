# SPDX-License-Identifier: Apache-2.0
"""Issue the slices of a transfer in order, from a worker thread.

Only a few slices are in flight at a time. A worker can therefore keep a rate, and a caller can
cancel the transfer between two slices.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch

from portakv.errors import PortaKVError, TransferCancelled, TransferError
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import Condition
from portakv.runtime.resources import start_thread
from portakv.runtime.transfer import NOTHING, Completion, PendingCalls, Transfer, failed

#: Slices in flight: the first crosses the link, the second waits, and the third is being issued.
WINDOW = 3
#: Seconds for which the end of the interpreter waits for slices in flight.
EXIT_SECONDS = 10.0


class Slice(NamedTuple):
    """Positions ``first`` to ``first + tokens`` of one layer (None: of all layers)."""

    layer: int | None
    first: int
    tokens: int
    nbytes: int


class RateLimit:
    """Compute the start of each slice, so that at most ``gbps`` 10^9 bytes a second start."""

    def __init__(self, gbps: float, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds_per_byte = 1e-9 / gbps
        self._now = now
        self._due: float | None = None

    def start_of(self, nbytes: int) -> float:
        """Return the time at which a slice of ``nbytes`` may start, and reserve that time."""
        now = self._now()
        needs = nbytes * self._seconds_per_byte
        # A late slice may catch up by one slice: clocks oversleep. More would be a burst.
        start = now if self._due is None else max(self._due, now - needs)
        self._due = start + needs
        return start

    def left(self, start: float) -> float:
        """Return the seconds until ``start``; 0 if it has passed."""
        return max(0.0, start - self._now())


class Worker:
    """Issue slices in order from a separate thread, as fast as they land or the limit allows.

    The thread runs inside ``inside()``, which makes the device and stream of the transfer current.

    Attributes:
        slices: all slices of the transfer.
        issued: slices that were issued.
        landed: slices that landed before the first failed slice.
        carried: what executed the first slice, as `Transfer.carried`.
        cancelled: `cancel` was called before all slices were issued.
        error: the first error.
        ended_at: since this time, by `time.perf_counter`, no slice is in flight and none will be
            issued.
        end: the completion of all slices, which reports a failure to `LateErrors`; None after that.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        issue: Callable[[Slice], Transfer],
        inside: Callable[[], AbstractContextManager[object]],
        limit: RateLimit | None = None,
    ) -> None:
        self.slices = slices
        self.issued = 0
        self.landed = 0
        self.carried = NOTHING
        self.cancelled = False
        self.error: BaseException | None = None
        self.ended_at: float | None = None
        self._gap = False  # a slice failed; slices that land after it are not counted
        self.end: SliceCompletion | None = None
        self._limit = limit
        # Both retain the views, and are deleted at the end.
        self._issue = issue
        self._inside = inside
        # In a forked child the thread does not exist, and its lock may never be released.
        self._process = this_process()
        self._change = Condition()
        self._in_flight: deque[Transfer] = deque()
        self._thread = threading.Thread(target=self._run, name="portakv worker", daemon=True)

    def start(self) -> None:
        """Start the thread. The end of the interpreter stops it between two slices."""
        running.add(self)
        # Handlers run last in, first out: memory must not be freed while a worker still uses it.
        atexit.unregister(_stop_all)
        atexit.register(_stop_all)
        try:
            start_thread(self._thread, TransferError)
        except TransferError:
            running.discard(self)
            raise

    def cancel(self) -> bool:
        """Issue no further slice; return False if none was left, or an error had stopped it."""
        if self._process.forked:
            return False
        with self._change:
            if self.issued == len(self.slices) or self.error is not None:
                return False
            self.cancelled = True
            self._change.notify_all()
            return True

    def has_landed(self, slices: int) -> bool:
        """Return True once the first ``slices`` landed, or never will; never blocks."""
        if self.ended_at is not None or self._process.forked:
            return True
        # For all slices the thread must have released the views as well.
        return slices <= self.landed < len(self.slices)

    def wait(self, slices: int) -> None:
        """Block the host until `has_landed`."""
        if not self._process.forked:
            with self._change:
                self._change.wait_for(partial(self.has_landed, slices))

    def failure(self, slices: int) -> PortaKVError | None:
        """Return why the first ``slices`` did not all land; None if they did, or still may."""
        if self.landed >= slices:
            return None
        if self._process.forked:
            return TransferError(
                "Expected the process that started the transfer, got a process that was forked "
                "while it ran. The transfer goes on in the parent. Query it there."
            )
        if self.ended_at is None:
            return None

        so_far = f"{self.landed} of {len(self.slices)} slices had landed"
        error = self.error
        if error is None:
            return TransferCancelled(
                f"The transfer was cancelled when {so_far}; the rest was not moved. Its statistics "
                f"report how many blocks were."
            )
        if isinstance(error, PortaKVError):
            return error
        why = f"{type(error).__name__}: {error}."
        failure = TransferError(f"The transfer failed when {so_far}, with {why}")
        failure.__cause__ = error
        return failure

    def _run(self) -> None:
        # This is the top of the thread: `failure` reports every exception, also an interrupt.
        try:
            with self._inside():
                try:
                    self._issue_all()
                except BaseException as error:  # raised by a backend's launch
                    self._fail(error)
                while self._in_flight:
                    self._land()
        except BaseException as error:  # raised by the context manager
            self._fail(error)

        del self._issue, self._inside
        with self._change:
            self.ended_at = time.perf_counter()
            self._change.notify_all()
        end = self.end
        self.end = None
        if end is not None:
            end.report()
        running.discard(self)

    def _issue_all(self) -> None:
        for piece in self.slices:
            while len(self._in_flight) >= WINDOW:
                self._land()
            self._keep_rate(piece)
            with self._change:
                if self._is_stopped():
                    return
                self.issued += 1
            transfer = self._issue(piece)
            self._in_flight.append(transfer)
            if self.carried is NOTHING:
                self.carried = transfer.carried

    def _is_stopped(self) -> bool:
        """Return True if no further slice is to be issued."""
        return self.cancelled or self.error is not None

    def _fail(self, error: BaseException) -> None:
        """Store the error unless an earlier one is stored; no slice is issued after it."""
        with self._change:
            self.error = self.error or error

    def _keep_rate(self, piece: Slice) -> None:
        """Wait until the slice may start, until the transfer is cancelled, or a slice failed."""
        limit = self._limit
        if limit is None:
            return
        start = limit.start_of(piece.nbytes)
        if limit.left(start):
            # Land first: a caller that waits for a layer must not wait for the pause as well.
            while self._in_flight:
                self._land()
            with self._change:
                self._change.wait_for(self._is_stopped, limit.left(start))

    def _land(self) -> None:
        """Wait for the oldest slice."""
        try:
            self._in_flight.popleft().synchronize()
        except BaseException as error:  # `failure` reports it; the thread has no caller
            self._gap = True
            self._fail(error)
        with self._change:
            self.landed += not self._gap
            self._change.notify_all()


class SliceCompletion(Completion):
    """The completion of the first ``slices`` of a worker."""

    def __init__(self, worker: Worker, slices: int, retained: object = None) -> None:
        landed = PendingCalls(partial(worker.has_landed, slices), partial(worker.wait, slices))
        super().__init__(pendings=(landed,), retained=retained)
        self._worker = worker
        self._slices = slices

    def wait(self, stream: torch.Stream | None) -> None:
        """Block the host; raise if the bytes that a stream would wait for never came."""
        super().wait(stream)
        failure = self._worker.failure(self._slices)
        if failure is not None:
            raise failure

    def _settle(self) -> None:
        super()._settle()
        self.error = self.error or self._worker.failure(self._slices)

    def report(self) -> None:
        """Report a failure to `LateErrors`, except a cancellation by the caller."""
        # The error is set before the owner is read: an owner that is set later finds the error.
        # Without such a failure a waiting caller releases the memory: this thread would interfere.
        self.error = self.error or self._worker.failure(self._slices)
        expected = self.error is None or isinstance(self.error, TransferCancelled)
        if not expected and self.owner is not None:
            self.retained = None
            failed.append(self)


running: set[Worker] = set()


def _stop_all() -> None:
    """Stop running workers when the interpreter ends, which kills threads at any point."""
    workers = list(running)
    for worker in workers:
        worker.cancel()
    for worker in workers:
        worker._thread.join(EXIT_SECONDS)
