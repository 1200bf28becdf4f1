# SPDX-License-Identifier: Apache-2.0
"""Transfers: the handle that a caller waits on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .backends.base import Pending
from .errors import PortaKVError, SlotError, TransferError


class Transfer:
    """One or more launches. Holds views and ids until the end.

    A transfer of device ids that met a bad one moved everything else; `done` and `synchronize`
    then raise.
    """

    __slots__ = ("_captured", "_error", "_events", "_kept", "_pendings", "_reported", "_statuses")

    def __init__(
        self,
        events: Sequence[torch.Event] = (),
        pendings: Sequence[Pending] = (),
        status: torch.Tensor | None = None,
        error: PortaKVError | None = None,
        kept: Any = None,
        captured: bool = False,
    ) -> None:
        self._events, self._pendings = events, pendings
        self._statuses = [] if status is None else [status]
        self._error, self._kept = error, kept
        self._captured = captured
        self._reported = False

    @classmethod
    def join(cls, transfers: Sequence[Transfer]) -> Transfer:
        """Several transfers as one handle; the first error counts."""
        if len(transfers) == 1:
            return transfers[0]
        joined = cls(
            [event for t in transfers for event in t._events],
            [pending for t in transfers for pending in t._pendings],
            error=next((t._error for t in transfers if t._error is not None), None),
            kept=[t._kept for t in transfers],
            captured=any(t._captured for t in transfers),
        )
        joined._statuses = [status for t in transfers for status in t._statuses]
        return joined

    def done(self) -> bool:
        """True once all bytes have landed; never blocks.

        Raises:
            SlotError: it ended, but a device id was past the end.
            TransferError: it was captured into a graph and has no completion of its own.
        """
        self._refuse_captured("done()")
        if not self.ended:
            return False
        self._finish()
        return True

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Make the current stream (or ``stream``) wait; blocks the host only for staged work."""
        for pending in self._pendings:
            pending.wait()
        for event in self._events:
            event.wait(stream) if stream is not None else event.wait()

    def synchronize(self) -> None:
        """Block the host until all bytes have landed; raises as `done` does."""
        self._refuse_captured("synchronize()")
        for pending in self._pendings:
            pending.wait()
        for event in self._events:
            event.synchronize()
        self._finish()

    @property
    def ended(self) -> bool:
        """True once all bytes have landed, error or not; never blocks or raises."""
        return all(event.query() for event in self._events) and all(
            pending.done() for pending in self._pendings
        )

    @property
    def may_fail(self) -> bool:
        """True where an error may show up, or already did, after the call returned."""
        return self._error is not None or bool(self._statuses)

    @property
    def failed(self) -> PortaKVError | None:
        """An error that nobody was told of yet; never blocks."""
        if self._reported:
            return None
        if self._error is None:
            words = (int(status[0]) for status in self._statuses)
            position = next((word - 1 for word in words if word), None)
            if position is not None:
                self._error = bad_slot(position)
        return self._error

    def told(self) -> None:
        """Mark the error as reported."""
        self._reported = True

    def _finish(self) -> None:
        error = self.failed or self._error
        self._kept = None
        if error is not None:
            self.told()
            raise error

    def _refuse_captured(self, call: str) -> None:
        if self._captured:
            raise TransferError(
                f"{call} was asked of a transfer that was captured into a graph; it has no "
                f"completion of its own. Synchronise the graph's replay instead."
            )


def bad_slot(position: int, slot: int | None = None, slots: int | None = None) -> PortaKVError:
    """The error for a device id past the end of its view."""
    found = "" if slot is None else f", slot {slot} of a view of {slots},"
    return SlotError(
        f"Position {position} of a device index{found} is past the end of its view; that position "
        f"was not moved, all others were. Correct the index and repeat the call."
    )
