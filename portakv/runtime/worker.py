# SPDX-License-Identifier: Apache-2.0
"""Workers: threads that issue the slices of a transfer one behind the other. Few are in flight at a
time, so that a worker can keep a rate, and can be cancelled between two of them."""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from portakv.errors import PortaKVError, TransferCancelled, TransferError
from portakv.runtime.devices import this_process
from portakv.runtime.transfer import NOTHING, Completion, Transfer, failed

#: Slices in flight: while one crosses, the next waits behind it and a third is being issued.
WINDOW = 3
#: How long the end of the interpreter waits for slices in flight, in seconds.
EXIT_SECONDS = 10.0


class Slice(NamedTuple):
    """Positions ``first`` to ``first + tokens`` of one layer (None: of all), and their bytes."""

    layer: int | None
    first: int
    tokens: int
    nbytes: int


class RateLimit:
    """When the next slice may start, so that no more than ``gbps`` 10^9 bytes a second do."""

    def __init__(self, gbps: float, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds_per_byte = 1e-9 / gbps
        self._now = now
        self._due: float | None = None

    def start_of(self, nbytes: int) -> float:
        """When a slice of ``nbytes`` may start, which is then taken to start."""
        now = self._now()
        needs = nbytes * self._seconds_per_byte
        # A slice that is late may catch up by one: clocks oversleep. More would be a burst.
        start = now if self._due is None else max(self._due, now - needs)
        self._due = start + needs
        return start

    def left(self, start: float) -> float:
        """Seconds until then; 0 if it has passed."""
        return max(0.0, start - self._now())


class Worker:
    """Issues slices, in their order, from a thread of its own, as fast as they land or the limit
    allows; inside ``inside()``, which makes the transfer's device and stream the current ones.

    Attributes:
        issued, landed: slices that were issued so far, and that landed before any that failed.
        carried: what carried the first slice out, as `Transfer.carried`.
        cancelled: some slices are not moved because `cancel` was called.
        ended_at: since when no slice is in flight and none will be, by `time.perf_counter`.
        end: the end of all slices, which tells `LateErrors` of a failure; None once it did.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        issue: Callable[[Slice], Transfer],
        inside: Callable[[], AbstractContextManager[object]],
        limit: RateLimit | None = None,
    ) -> None:
        self.slices = slices
        self._limit = limit
        # both hold the views, and go at the end
        self._issue = issue
        self._inside = inside
        # In a child of the process the thread does not exist, and its lock may never be released.
        self._process = this_process()
        self._change = threading.Condition()
        self.cancelled = self._gap = False
        self._error: BaseException | None = None
        self._in_flight: deque[Transfer] = deque()
        self.issued = self.landed = 0
        self.carried = NOTHING
        self.ended_at: float | None = None
        self.end: SliceCompletion | None = None
        self._thread = threading.Thread(target=self._run, name="portakv worker", daemon=True)

    def start(self) -> None:
        """Start the thread; at the end of the interpreter it is stopped between slices."""
        running.add(self)
        # Handlers run last in, first out: memory must not be given back below a running worker.
        atexit.unregister(_stop_all)
        atexit.register(_stop_all)
        try:
            self._thread.start()
        except RuntimeError:
            running.discard(self)
            raise

    def cancel(self) -> bool:
        """Issue no further slice; False if none was left, or an error stopped it before."""
        if self._process.forked:
            return False
        with self._change:
            if self.issued == len(self.slices) or self._error is not None:
                return False
            self.cancelled = True
            self._change.notify_all()
            return True

    def has_landed(self, slices: int) -> bool:
        """True once the first ``slices`` landed, or never will; never blocks."""
        if self.ended_at is not None or self._process.forked:
            return True
        # With all of them the thread has let go of the views as well.
        return slices <= self.landed < len(self.slices)

    def wait(self, slices: int) -> None:
        """Block the host until `has_landed`."""
        if not self._process.forked:
            with self._change:
                self._change.wait_for(partial(self.has_landed, slices))

    def failure(self, slices: int) -> PortaKVError | None:
        """Why the first ``slices`` did not all land; None if they did, or may yet."""
        if self.landed >= slices:
            return None
        if self._process.forked:
            return TransferError(
                "A transfer was asked for its end in a process that was forked while it ran; it "
                "goes on in the parent. Ask there."
            )
        if self.ended_at is None:
            return None
        so_far = f"{self.landed} of {len(self.slices)} slices had landed"
        error = self._error
        if error is None:
            return TransferCancelled(
                f"The transfer was cancelled when {so_far}; the rest was not moved. Its statistics "
                f"say how many blocks were."
            )
        if isinstance(error, PortaKVError):
            return error
        why = f"{type(error).__name__}: {error}."
        found = TransferError(f"The transfer failed when {so_far}, with {why}")
        found.__cause__ = error
        return found

    def _run(self) -> None:
        try:
            with self._inside():
                try:
                    self._issue_all()
                except BaseException as error:
                    self._fail(error)
                while self._in_flight:
                    self._land()
        except BaseException as error:  # of the context: there is no caller above this thread
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
                if self.cancelled or self._error is not None:
                    return
                self.issued += 1
            issued = self._issue(piece)
            self._in_flight.append(issued)
            if self.carried is NOTHING:
                self.carried = issued.carried

    def _fail(self, error: BaseException) -> None:
        """Note the error, if it is the first; no slice is issued after it."""
        with self._change:
            self._error = self._error or error

    def _keep_rate(self, piece: Slice) -> None:
        """Wait until a slice may start, or none must."""
        limit = self._limit
        if limit is None:
            return
        start = limit.start_of(piece.nbytes)
        if limit.left(start):
            while self._in_flight:  # a caller that waits for a layer learns of it before the pause
                self._land()
            with self._change:
                self._change.wait_for(lambda: self.cancelled, limit.left(start))

    def _land(self) -> None:
        """Wait for the oldest slice."""
        try:
            self._in_flight.popleft().synchronize()
        except BaseException as error:
            self._gap = True
            self._fail(error)
        with self._change:
            self.landed += not self._gap
            self._change.notify_all()


class SliceCompletion(Completion):
    """The end of the first ``slices`` of a worker."""

    __slots__ = ("_slices", "_worker")

    def __init__(self, worker: Worker, slices: int, retained: object = None) -> None:
        end: Any = SimpleNamespace(
            done=partial(worker.has_landed, slices), wait=partial(worker.wait, slices)
        )
        super().__init__(pendings=(end,), retained=retained)
        self._worker = worker
        self._slices = slices

    def wait(self, stream: torch.Stream | None) -> None:
        """Block the host; raises if the bytes that a stream would wait for never came."""
        super().wait(stream)
        failure = self._worker.failure(self._slices)
        if failure is not None:
            raise failure

    def _settle(self) -> None:
        super()._settle()
        self.error = self.error or self._worker.failure(self._slices)

    def report(self) -> None:
        """Tell `LateErrors` of a failure, unless it is that a caller cancelled."""
        # Set before the owner is asked for, so that one that comes later finds it. Memory is left
        # to a caller that waits, which would find it half freed by this thread.
        self.error = self.error or self._worker.failure(self._slices)
        told = self.error is None or isinstance(self.error, TransferCancelled)
        if not told and self.owner is not None:
            self.retained = None
            failed.append(self)


running: set[Worker] = set()


def _stop_all() -> None:
    """Stop what still runs when the interpreter ends, which kills threads at any place."""
    workers = list(running)
    for worker in workers:
        worker.cancel()
    for worker in workers:
        worker._thread.join(EXIT_SECONDS)
