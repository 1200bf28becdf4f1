# SPDX-License-Identifier: Apache-2.0
"""Transfers: the handle that a caller waits on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from portakv.errors import PortaKVError, SlotError, TransferError
from portakv.runtime.events import Pool
from portakv.runtime.words import Word

#: Completions that learnt of an error; `watch` tells their owners what nobody asked for.
failed: list[Completion] = []
_settling = threading.Lock()  # of the words and events of every completion


class Pending(Protocol):
    """Work that is not ordered on the stream."""

    def done(self) -> bool:
        """True once the bytes have landed; never blocks."""

    def wait(self) -> None:
        """Block the host until the bytes have landed."""


class Completion:
    """How one launch, or several in a row, end. Holds memory only where no stream orders it.

    Args:
        event: recorded behind the last launch; given back to its ``pool`` once it has ended.
        pendings: work that is not on a stream.
        words: a status word and the first position that it counts from, for each launch.
        error: an error that is known already.
        kept: memory of work that no stream orders.
        standing: it was captured, and happens again with every replay.

    Attributes:
        owner: a weak reference to who is told of an error that nobody asked for; or None.
    """

    __slots__ = (
        "_error",
        "_events",
        "_pendings",
        "_pool",
        "_reported",
        "_words",
        "kept",
        "owner",
        "standing",
    )

    def __init__(
        self,
        event: torch.Event | None = None,
        pendings: Sequence[Pending] = (),
        words: Sequence[tuple[Word, int]] = (),
        error: PortaKVError | None = None,
        kept: Any = None,
        pool: Pool | None = None,
        standing: bool = False,
    ) -> None:
        self._events = [] if event is None else [event]
        self._words = list(words)
        self._pendings = pendings
        self._pool = pool
        self._error = error
        self.kept = kept
        self.standing = standing
        self.owner: Any = None
        self._reported = False

    @property
    def untold(self) -> bool:
        """True where an error is known and nobody was told of it."""
        return self._error is not None and not self._reported

    @property
    def pending(self) -> bool:
        """True where no stream orders the work."""
        return bool(self._pendings)

    @property
    def error(self) -> PortaKVError | None:
        """The error, told or not."""
        return self._error

    def ended(self) -> bool:
        """True once all bytes have landed, error or not; never blocks or raises."""
        for event in self._events:
            if not event.query():
                return False
        for pending in self._pendings:
            if not pending.done():
                return False
        self._settle()
        return True

    def wait(self, stream: torch.Stream | None) -> None:
        """Make a stream wait for the event; block the host for what is not on a stream."""
        for pending in self._pendings:
            pending.wait()
        for event in self._events:
            # An event that is given no stream takes the current device's, which may be another.
            event.wait(stream or torch.accelerator.current_stream(event.device))

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
        with _settling:
            for word, start in self._words:
                self._read(word, start)
            error = self._error
            if self.standing:
                self._error = None
                for word, _ in self._words:
                    word.clear()
            else:
                self._reported = error is not None
        return error

    def _settle(self) -> None:
        self.kept = None
        if self.standing:
            return
        # Read, then given back, at once: another thread's transfer may get the word next.
        with _settling:
            for event in self._events:
                if self._pool is not None:
                    self._pool.release(event)
            for word, start in self._words:
                self._read(word, start)
                word.release()
            self._events, self._words = [], []

    def _read(self, word: Word, start: int) -> None:
        position = word.read()
        if position and self._error is None:
            self._error = bad_slot(start + position - 1)
            failed.append(self)


class Transfer:
    """One or more launches. Holds views and ids until the end.

    A transfer of device ids that met a bad one moved everything else; `done` and `synchronize`
    then raise.
    """

    __slots__ = ("_captured", "_kept", "completions")

    def __init__(
        self,
        completions: Sequence[Completion] = (),
        kept: Any = None,
        captured: bool = False,
    ) -> None:
        self.completions, self._kept, self._captured = completions, kept, captured

    @classmethod
    def join(cls, transfers: Sequence[Transfer]) -> Transfer:
        """Several transfers as one handle; the first error counts."""
        if len(transfers) == 1:
            return transfers[0]
        return cls(
            [completion for transfer in transfers for completion in transfer.completions],
            [transfer._kept for transfer in transfers],
            any(transfer._captured for transfer in transfers),
        )

    @property
    def ordered(self) -> bool:
        """True where a stream orders all of the work; False also where it ended with the call."""
        return bool(self.completions) and not any(x.pending for x in self.completions)

    def done(self) -> bool:
        """True once all bytes have landed; never blocks.

        Raises:
            SlotError: it ended, but a device id was past the end.
            TransferError: it was captured into a graph and has no completion of its own.
        """
        self._refuse_captured("done()")
        ended = [completion.ended() for completion in self.completions]  # ask all: each settles
        if not all(ended):
            return False
        self._finish()
        return True

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Make the current stream (or ``stream``) wait; blocks the host only for staged work."""
        for completion in self.completions:
            completion.wait(stream)

    def synchronize(self) -> None:
        """Block the host until all bytes have landed; raises as `done` does."""
        self._refuse_captured("synchronize()")
        for completion in self.completions:
            completion.synchronize()
        self._finish()

    def _finish(self) -> None:
        self._kept = None
        errors = [completion.take_error() or completion.error for completion in self.completions]
        for error in errors:
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
