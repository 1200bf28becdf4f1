# SPDX-License-Identifier: Apache-2.0
"""Pumps: transfers in slices, which a thread issues one behind the other.

Few slices are under way at a time, so that a pump can keep a rate, and stop between two of them.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from portakv.errors import PortaKVError, TransferCancelled, TransferError
from portakv.runtime.clocks import Clock
from portakv.runtime.transfer import Completion, Transfer

#: Slices under way: while one crosses, the next waits behind it and a third is being issued.
WINDOW = 3
#: How long the end of the interpreter waits for slices under way, in seconds.
EXIT_SECONDS = 10.0


class Slice(NamedTuple):
    """Positions ``first`` to ``first + tokens`` of one layer (None: of all), and their bytes."""

    layer: int | None
    first: int
    tokens: int
    nbytes: int


class Pace:
    """When the next slice may start, so that no more than ``gbps`` 10^9 bytes a second do."""

    def __init__(self, gbps: float, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds_per_byte, self._now = 1e-9 / gbps, now
        self._due: float | None = None

    def start_of(self, nbytes: int) -> float:
        """When a slice of ``nbytes`` may start, which is then taken to start."""
        now, needs = self._now(), nbytes * self._seconds_per_byte
        # Who came late may catch up by one slice: clocks oversleep. More would be a burst.
        start = now if self._due is None else max(self._due, now - needs)
        self._due = start + needs
        return start

    def left(self, start: float) -> float:
        """Seconds until then; 0 where it has passed."""
        return max(0.0, start - self._now())


class Pump:
    """Issues slices from a thread of its own.

    Args:
        slices: what to issue, in this order.
        issue: issues one of them. Called in the thread, inside ``inside()``.
        inside: makes the device and stream of the transfer the thread's current ones.
        clock: what times it.
        pace: None: as fast as they land.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        issue: Callable[[Slice], Transfer],
        inside: Callable[[], AbstractContextManager[Any]],
        clock: Clock,
        pace: Pace | None = None,
    ) -> None:
        self._slices, self._clock, self._pace = slices, clock, pace
        # Both hold the views, and are let go at the end.
        self._issue: Callable[[Slice], Transfer] | None = issue
        self._inside: Callable[[], AbstractContextManager[Any]] | None = inside
        self._process = os.getpid()
        self._change = threading.Condition()
        self._cancelled = self._ended = self._gap = False
        self._error: BaseException | None = None
        self.issued = self.landed = 0
        self._thread = threading.Thread(target=self._run, name="portakv pump", daemon=True)

    def start(self) -> None:
        """Start the thread; at the end of the interpreter it is stopped between slices."""
        _running.add(self)
        # Handlers run last in, first out: memory must not be given back below a running pump.
        atexit.unregister(_stop_all)
        atexit.register(_stop_all)
        try:
            self._thread.start()
        except RuntimeError:
            _running.discard(self)
            raise

    @property
    def cancelled(self) -> bool:
        """True where some slices are not moved because `cancel` was called."""
        return self._cancelled

    @property
    def ended(self) -> bool:
        """True once no slice is under way and none will be."""
        return self._ended

    def cancel(self) -> bool:
        """Issue no further slice; False where none was left, or an error stopped it before."""
        if self._elsewhere():
            return False
        with self._change:
            if self.issued == len(self._slices) or self._error is not None:
                return False
            self._cancelled = True
            self._change.notify_all()
            return True

    def has_landed(self, slices: int) -> bool:
        """True once the first ``slices`` landed, or never will; never blocks."""
        if self._ended or self._elsewhere():
            return True
        # With all of them the thread has let go of the views as well.
        return self.landed >= slices and slices < len(self._slices)

    def wait(self, slices: int) -> None:
        """Block the host until `has_landed`."""
        if self._elsewhere():
            return
        with self._change:
            self._change.wait_for(lambda: self.has_landed(slices))

    def failure(self, slices: int) -> PortaKVError | None:
        """Why the first ``slices`` did not all land; None where they did, or may yet."""
        if self.landed >= slices:
            return None
        if self._elsewhere():
            return TransferError(
                "A transfer was asked for its end in a process that was forked while it ran; it "
                "goes on in the parent. Ask there."
            )
        if not self._ended:
            return None
        so_far = f"{self.landed} of {len(self._slices)} slices had landed"
        if self._error is None:
            return TransferCancelled(
                f"The transfer was cancelled when {so_far}; the rest was not moved. Its statistics "
                f"say how many blocks were."
            )
        if isinstance(self._error, PortaKVError):
            return self._error
        failed = TransferError(
            f"The transfer failed when {so_far}, with {type(self._error).__name__}: {self._error}."
        )
        failed.__cause__ = self._error
        return failed

    def join(self, seconds: float) -> None:
        """Wait for the thread."""
        self._thread.join(seconds)

    def _elsewhere(self) -> bool:
        """True in a child of the process, where the thread does not exist and its lock may be
        held for ever."""
        return os.getpid() != self._process

    def _run(self) -> None:
        flying: deque[Transfer] = deque()
        error: BaseException | None = None
        try:
            assert self._inside is not None
            with self._inside():
                error = self._pump(flying)
        except BaseException as found:  # of the context: nobody is above this thread
            error = error or found
        self._issue = self._inside = None
        flying.clear()
        with self._change:
            self._error, self._ended = error, True
            self._change.notify_all()
        _running.discard(self)

    def _pump(self, flying: deque[Transfer]) -> BaseException | None:
        """Issue and land everything; returns the first error."""
        error: BaseException | None = None
        ordered = True
        try:
            for piece in self._slices:
                while len(flying) >= WINDOW:
                    self._land(flying)
                self._keep_pace(piece, flying)
                if not self._claim():
                    break
                assert self._issue is not None
                flying.append(self._issue(piece))
                ordered = ordered and flying[-1].ordered
            self._clock.issued(ordered)
        except BaseException as found:
            error = found
            with self._change:
                self._error = found
        while flying:
            try:
                self._land(flying)
            except BaseException as found:
                error = error or found
        self._clock.landed()
        return error

    def _keep_pace(self, piece: Slice, flying: deque[Transfer]) -> None:
        """Wait until a slice may start, or none must."""
        if self._pace is None:
            return
        start = self._pace.start_of(piece.nbytes)
        if self._pace.left(start):
            while flying:  # who waits for a layer learns of it before the pause, not behind it
                self._land(flying)
            with self._change:
                self._change.wait_for(lambda: self._cancelled, self._pace.left(start))

    def _claim(self) -> bool:
        """Take the next slice; False where it must not start."""
        with self._change:
            if self._cancelled:
                return False
            self.issued += 1
            return True

    def _land(self, flying: deque[Transfer]) -> None:
        """Wait for the oldest slice."""
        try:
            flying.popleft().synchronize()
        except BaseException:
            self._gap = True
            raise
        with self._change:
            self.landed += not self._gap
            self._change.notify_all()


class Landing(Completion):
    """The end of the first ``slices`` of a pump."""

    __slots__ = ("_pump", "_slices")

    def __init__(self, pump: Pump, slices: int, kept: Any = None) -> None:
        super().__init__(None, (_Until(pump, slices),), kept=kept)
        self._pump, self._slices = pump, slices

    def wait(self, stream: torch.Stream | None) -> None:
        """Block the host; raises where the bytes that a stream would wait for never came."""
        super().wait(stream)
        failure = self._pump.failure(self._slices)
        if failure is not None:
            raise failure

    def _settle(self) -> None:
        super()._settle()
        if self._error is None:
            self._error = self._pump.failure(self._slices)


class _Until:
    """A `Pending` that ends when the first slices of a pump have landed."""

    def __init__(self, pump: Pump, slices: int) -> None:
        self._pump, self._slices = pump, slices

    def done(self) -> bool:
        return self._pump.has_landed(self._slices)

    def wait(self) -> None:
        self._pump.wait(self._slices)


_running: set[Pump] = set()


def _stop_all() -> None:
    """Stop what still runs when the interpreter ends, which kills threads at any place."""
    pumps = list(_running)
    for pump in pumps:
        pump.cancel()
    for pump in pumps:
        pump.join(EXIT_SECONDS)
