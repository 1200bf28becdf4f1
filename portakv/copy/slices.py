# SPDX-License-Identifier: Apache-2.0
"""Issue a copy in slices, so that it can be cancelled between two of them, or keep a rate."""

from __future__ import annotations

from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from time import perf_counter
from typing import NamedTuple

import torch

from portakv.errors import PortaKVError, TransferCancelled, TransferError
from portakv.runtime.transfer import NOTHING, Completion, Transfer, failed
from portakv.tasks import End, Handle, Rate, Wait, Work, runtime

#: Slices in flight: the first crosses the link, the second waits, and the third is being issued.
WINDOW = 3


class Slice(NamedTuple):
    """Positions ``first`` to ``first + tokens`` of one layer (None: of all layers)."""

    layer: int | None
    first: int
    tokens: int
    nbytes: int


class Slices:
    """A copy whose slices a coroutine issues in order, as fast as they land or a rate allows.

    A helper issues slices and waits for them. It returns at a pause of the rate, which the loop
    makes.

    Args:
        slices: all slices of the copy, of which there is one at least.
        issue: issues a slice, inside ``inside()``.
        inside: returns a context that makes the device and the stream of the copy current.
        gbps: at most so many 10^9 bytes start in a second; None: no limit.

    Raises `TransferError` if a rate needs the loop, for which the system gives no thread.

    Attributes:
        issued: slices that were issued.
        landed: slices that landed before the first failed slice.
        carried: what executed the first slice, as `Transfer.carried`.
        error: the first error.
        ended_at: since this time, by `time.perf_counter`, no slice is in flight and none will be
            issued.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        issue: Callable[[Slice], Transfer],
        inside: Callable[[], AbstractContextManager[object]],
        gbps: float | None = None,
    ) -> None:
        self.slices = slices
        self.issued = 0
        self.landed = 0
        self.carried = NOTHING
        self._cancelled = list[Slice]()
        self.error: BaseException | None = None
        self.ended_at: float | None = None
        self._gap = False  # a slice failed; slices that land after it are not counted
        self._left = deque(slices)  # whoever takes a slice issues or cancels it
        self._in_flight = deque[Transfer]()
        self._ends = deque[tuple[int, End[None]]]()  # of the first so many slices
        # Both retain the views, and are deleted at the end.
        self._issue = issue
        self._inside = inside
        self._runtime = runtime()
        self._rate = Rate(gbps, self._runtime.time)
        if gbps is not None:  # the loop makes pauses
            self._runtime.started(TransferError)
        self._steps = Handle(self._runtime, self._run(), locked=False)

    @property
    def cancelled(self) -> bool:
        """True if `cancel` was called before all slices were issued."""
        return bool(self._cancelled)

    def end_of(self, slices: int, retained: object = None) -> SliceCompletion:
        """Return the completion of the first so many slices. Call it before `start`, with more
        slices each time."""
        end = End[None](self._runtime)
        self._ends.append((slices, end))
        return SliceCompletion(end, retained)

    def start(self) -> None:
        """Begin to issue slices. The end of the interpreter stops that between two slices.

        Raises `TransferError` if the system gives no thread.
        """
        self._runtime.shut_at_exit.add(self)
        self._steps.begin_to_work(TransferError)

    def cancel(self) -> bool:
        """Issue no further slice; return False if none was left, or an error had stopped it."""
        if self._runtime.process.forked:
            return False
        with suppress(IndexError):  # none is left
            # One call, within which no interrupt comes.
            self._cancelled.extend(iter(self._left.pop, None))
        if self.cancelled and self._rate.left():  # end the pause
            self._steps.cancel()
        return self.cancelled and self.error is None

    shut = cancel

    async def _run(self) -> None:
        with suppress(CancelledError):  # no slice is left, and none is in flight
            while (until := await Work(self._advance)) is not None:
                await Wait(until=until)
        del self._issue, self._inside
        self.ended_at = perf_counter()
        self._settle(len(self.slices))

    def _advance(self) -> float | None:
        """Issue slices until a pause, and wait for them: a caller that waits for a layer must not
        wait for the pause as well. Return the time of the next slice; None after the last one."""
        until = None
        try:
            with self._inside():
                try:
                    until = self._issue_some()
                except BaseException as error:  # raised by a backend's launch
                    self._fail(error)
                while self._in_flight:
                    self._land()
        except BaseException as error:  # raised by the context manager
            self._fail(error)
        return until if self._left else None  # it may have failed, or was cancelled

    def _issue_some(self) -> float | None:
        """Issue slices until the rate has a pause, and return the end of the pause; None after the
        last slice."""
        while self._left:
            while len(self._in_flight) >= WINDOW:
                self._land()
            if self._rate.left():
                return self._rate.next
            try:
                piece = self._left.popleft()
            except IndexError:  # it was cancelled, or has failed
                break
            self._rate.start(piece.nbytes)
            self.issued += 1
            transfer = self._issue(piece)
            self._in_flight.append(transfer)
            if self.carried is NOTHING:
                self.carried = transfer.carried
        return None

    def _fail(self, error: BaseException) -> None:
        """Store the error unless an earlier one is stored; no slice is issued after it."""
        self.error = self.error or error
        self._left.clear()

    def _land(self) -> None:
        """Wait for the oldest slice."""
        try:
            self._in_flight.popleft().synchronize()
        except BaseException as error:  # the ends report it; a helper has no caller
            self._gap = True
            self._fail(error)
        self.landed += not self._gap
        # The end of all slices comes once the views are released.
        self._settle(min(self.landed, len(self.slices) - 1))

    def _settle(self, slices: int) -> None:
        """Settle the ends of up to so many slices, which have landed or never will."""
        while self._ends and self._ends[0][0] <= slices:
            past, end = self._ends.popleft()
            end.settle(None, self._failure() if past > self.landed else None)

    def _failure(self) -> PortaKVError:
        """Return why slices did not land."""
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


class SliceCompletion(Completion):
    """The completion of the first slices of a copy, by their end."""

    def __init__(self, end: End[None], retained: object = None) -> None:
        super().__init__(pendings=(end,), retained=retained)
        self._end = end

    def wait(self, stream: torch.Stream | None) -> None:
        """Block the host; raise if the bytes that a stream would wait for never came."""
        super().wait(stream)
        failure = self._failure()
        if failure is not None:
            raise failure

    def _settle(self) -> None:
        super()._settle()
        self.error = self.error or self._failure()

    def _failure(self) -> PortaKVError | None:
        """Return why the slices did not all land; None if they did."""
        end = self._end
        if not end.ended:
            return TransferError(
                "Expected the process that started the transfer, got a process that was forked "
                "while it ran. The transfer goes on in the parent. Query it there."
            )
        return end.error if isinstance(end.error, PortaKVError) else None

    def report_failure(self) -> None:
        """Report a failure to `LateErrors` at the end, except a cancellation by the caller."""
        self._end.on_end(self._report)

    def _report(self) -> None:
        # The error is set before the owner is read: an owner that is set later finds the error.
        # Without such a failure a waiting caller releases the memory: this thread would interfere.
        self.error = self.error or self._failure()
        expected = self.error is None or isinstance(self.error, TransferCancelled)
        if not expected and self.owner is not None:
            self.retained = None
            failed.append(self)
