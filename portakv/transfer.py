# SPDX-License-Identifier: Apache-2.0
"""Transfers: the handle that a caller waits on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .backends.base import Pending
from .errors import PortaKVError, SlotError, TransferError
from .words import Word


class Completion:
    """How one launch or several end. Holds memory only where no stream orders the work."""

    __slots__ = ("_error", "_events", "_pendings", "_reported", "_words", "kept")

    def __init__(
        self,
        events: Sequence[torch.Event] = (),
        pendings: Sequence[Pending] = (),
        words: Sequence[Word] = (),
        error: PortaKVError | None = None,
        kept: Any = None,
    ) -> None:
        self._events, self._pendings, self._words = events, pendings, words
        self.kept = kept  # memory of work that no stream orders
        self._error = error
        self._reported = False

    @classmethod
    def join(cls, parts: Sequence[Completion]) -> Completion:
        """Several as one; the first error counts."""
        return cls(
            [event for part in parts for event in part._events],
            [pending for part in parts for pending in part._pendings],
            [word for part in parts for word in part._words],
            next((part._error for part in parts if part._error is not None), None),
            [part.kept for part in parts],
        )

    @property
    def may_fail(self) -> bool:
        """True where an error may show up, or already did, after the call returned."""
        return self._error is not None or bool(self._words)

    def ended(self) -> bool:
        """True once all bytes have landed, error or not; never blocks or raises."""
        if not all(event.query() for event in self._events):
            return False
        if not all(pending.done() for pending in self._pendings):
            return False
        self._settle()
        return True

    def wait(self, stream: torch.Stream | None) -> None:
        """Make a stream wait for events; block the host for what is not on a stream."""
        for pending in self._pendings:
            pending.wait()
        for event in self._events:
            event.wait(stream) if stream is not None else event.wait()

    def synchronize(self) -> None:
        """Block the host until all bytes have landed."""
        for pending in self._pendings:
            pending.wait()
        for event in self._events:
            event.synchronize()
        self._settle()

    def take_error(self) -> PortaKVError | None:
        """An error that nobody was told of yet, once; never blocks."""
        if self._reported:
            return None
        for word in self._words:
            self._read(word)
        self._reported = self._error is not None
        return self._error

    @property
    def error(self) -> PortaKVError | None:
        """The error, told or not."""
        return self._error

    def _settle(self) -> None:
        self.kept = None
        words, self._words = self._words, ()
        for word in words:
            self._read(word)
            word.release()

    def _read(self, word: Word) -> None:
        position = word.read()
        if position and self._error is None:
            self._error = bad_slot(position - 1)


_NOTHING: Completion = Completion()  # of a copy that had ended when the call returned


class Transfer:
    """One or more launches. Holds views and ids until the end.

    A transfer of device ids that met a bad one moved everything else; `done` and `synchronize`
    then raise.
    """

    __slots__ = ("_captured", "_kept", "completion")

    def __init__(
        self, completion: Completion = _NOTHING, kept: Any = None, captured: bool = False
    ) -> None:
        self.completion, self._kept, self._captured = completion, kept, captured

    @classmethod
    def join(cls, transfers: Sequence[Transfer]) -> Transfer:
        """Several transfers as one handle; the first error counts."""
        if len(transfers) == 1:
            return transfers[0]
        return cls(
            Completion.join([transfer.completion for transfer in transfers]),
            [transfer._kept for transfer in transfers],
            any(transfer._captured for transfer in transfers),
        )

    def done(self) -> bool:
        """True once all bytes have landed; never blocks.

        Raises:
            SlotError: it ended, but a device id was past the end.
            TransferError: it was captured into a graph and has no completion of its own.
        """
        self._refuse_captured("done()")
        if not self.completion.ended():
            return False
        self._finish()
        return True

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Make the current stream (or ``stream``) wait; blocks the host only for staged work."""
        self.completion.wait(stream)

    def synchronize(self) -> None:
        """Block the host until all bytes have landed; raises as `done` does."""
        self._refuse_captured("synchronize()")
        self.completion.synchronize()
        self._finish()

    def _finish(self) -> None:
        self._kept = None
        error = self.completion.take_error() or self.completion.error
        if error is not None:
            raise error

    def _refuse_captured(self, call: str) -> None:
        if self._captured:
            raise TransferError(
                f"{call} was asked of a transfer that was captured into a graph; it has no "
                f"completion of its own. Synchronise the graph's replay instead."
            )


def bad_slot(position: int, slot: int | None = None, slots: int | None = None) -> SlotError:
    """The error for a device id past the end of its view."""
    found = "" if slot is None else f", slot {slot} of a view of {slots},"
    return SlotError(
        f"Position {position} of a device index{found} is past the end of its view; that position "
        f"was not moved, all others were. Correct the index and repeat the call."
    )
