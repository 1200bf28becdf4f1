# SPDX-License-Identifier: Apache-2.0
"""Transfers: the handle that a caller waits on, the completions, events and status words behind it,
and what is in flight although no caller may hold it."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv import arguments
from portakv.errors import PortaKVError, SlotError, TransferError, TransferTimeout
from portakv.runtime.devices import capturing

#: A weak reference to the `LateErrors` that report an error for which no caller asked.
Owner: TypeAlias = "weakref.ref[Any]"

_settling = threading.Lock()  # of the words and events of every completion


class Pending(Protocol):
    """Work that is not ordered on the stream."""

    def done(self) -> bool:
        """True once the bytes have landed; never blocks."""

    def wait(self) -> None:
        """Block the host until the bytes have landed."""


class StatusWord:
    """One pinned int64 for a transfer in flight: 0, or the position + 1 of a bad id. A launch
    writes it only on error; the host reads it without synchronising."""

    __slots__ = ("address", "tensor", "value")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.address = tensor.data_ptr()
        values: Any = tensor.numpy()
        self.value = memoryview(values)  # its one item; a third of the cost of asking the array


_BATCH = 64  # words allocated at once
_CLEAR = bytes(8 * _BATCH)
#: Given back only after everything that may write them has ended.
free_words: deque[StatusWord] = deque()
# Pinned memory, never freed: a launch may still write a word whose transfer was dropped.
word_batches: list[npt.NDArray[np.int64]] = []


def acquire_word() -> StatusWord:
    """A status word that holds 0."""
    try:
        return free_words.pop()
    except IndexError:
        with torch.inference_mode(False):  # a launch may write it by torch, in any mode
            batch = torch.zeros(_BATCH, dtype=torch.int64, device="cpu").pin_memory()
            words = [StatusWord(batch[i : i + 1]) for i in range(_BATCH)]
        word_batches.append(batch.numpy())
        free_words.extend(words[1:])
        return words[0]


def any_word_set() -> bool:
    """True if any status word in use does not hold 0; reads them all at once."""
    for batch in word_batches:  # noqa: SIM110 - every transfer asks; a generator costs twice as much
        if batch.tobytes() != _CLEAR:
            return True
    return False


_EVENTS = 256  # for each device; more are left to the garbage collector


class EventPool:
    """The free events of one device: making and destroying one costs more than recording it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free = list[torch.Event]()

    def acquire(self) -> torch.Event:
        """An event, ready to be recorded."""
        try:
            return self._free.pop()
        except IndexError:
            return torch.Event(self._device)

    def recorded(self, stream: torch.Stream | None) -> torch.Event:
        """An event behind everything on ``stream``; None: the current stream of this device."""
        event = self.acquire()
        if stream is None and torch.accelerator.current_device_index() != self._device.index:
            # Given no stream it would take the current device's.
            stream = torch.accelerator.current_stream(self._device.index)
        event.record(stream)
        return event

    def release(self, event: torch.Event) -> None:
        """Give an event back that has ended and for which no stream or host waits any more."""
        if len(self._free) < _EVENTS:
            self._free.append(event)


@cache
def event_pool(device: torch.device) -> EventPool:
    """The events of a device."""
    return EventPool(device)


@dataclass(slots=True, eq=False)
class Completion:
    """How one launch, or several in a row, end."""

    event: torch.Event | None = None  # recorded behind the last launch
    pendings: Sequence[Pending] = ()  # work that no stream orders
    words: Sequence[tuple[StatusWord, int]] = ()  # with the first position that each counts from
    error: PortaKVError | None = None  # what went wrong, if that is known already
    retained: object = None  # memory of pendings
    pool: EventPool | None = None  # to which the event is given back once it has ended
    standing: bool = False  # it was captured, and happens again with every replay
    owner: Owner | None = None  # what reports an error for which no caller asked
    settled: bool = False  # the end was seen
    reported: bool = False  # a caller was told of the error

    def ended(self) -> bool:
        """True once all bytes have landed, error or not; never blocks or raises."""
        event = self.event
        if event is not None and not event.query():
            return False
        for pending in self.pendings:
            if not pending.done():
                return False
        self._settle()
        return True

    def wait(self, stream: torch.Stream | None) -> None:
        """Make a stream wait for the event; block the host for what is not on a stream."""
        for pending in self.pendings:
            pending.wait()
        event = self.event  # not before: another thread may have given it back by now
        if event is not None:
            if stream is None:  # the event would take the current device's, which may be another
                stream = torch.accelerator.current_stream(event.device)
            event.wait(stream)

    def synchronize(self) -> None:
        """Block the host until all bytes have landed."""
        for pending in self.pendings:
            pending.wait()
        event = self.event  # as in `wait`
        if event is not None:
            event.synchronize()
        self._settle()

    def take_error(self) -> PortaKVError | None:
        """An error that was not reported yet, once; never blocks."""
        if self.reported:
            return None
        with _settling:
            for word, start in self.words:
                self._read(word, start)
            error = self.error
            if self.standing:
                self.error = None
                for word, _ in self.words:
                    word.value[0] = 0
            else:
                self.reported = error is not None
        return error

    def _settle(self) -> None:
        self.retained = None
        if self.standing:
            return
        # Read, then given back, at once: another thread's transfer may get the word next.
        with _settling:
            if self.event is not None and self.pool is not None:
                self.pool.release(self.event)
            for word, start in self.words:
                self._read(word, start)
                word.value[0] = 0
                free_words.append(word)
            self.event = None
            self.words = ()
            self.settled = True

    def _read(self, word: StatusWord, start: int) -> None:
        position = word.value[0]
        if position and self.error is None:
            self.error = bad_slot(start + position - 1)
            failed.append(self)


#: What `Transfer.carried` is before anything was issued.
NOTHING = ("none", "nothing was issued")


class Transfer:
    """One or more launches. Holds views and ids until the end.

    A transfer of device ids that met a bad one moved everything else; `done` and `synchronize`
    then raise.

    Attributes:
        completions: how each launch, or several in a row, end.
        carried: the backend or engine that carried the first launch out, and why that one.
    """

    __slots__ = ("_retained", "carried", "completions")

    def __init__(
        self,
        completions: Sequence[Completion] = (),
        retained: object = None,
        carried: tuple[str, str] = NOTHING,
    ) -> None:
        self.completions = completions
        self._retained = retained
        self.carried = carried

    @classmethod
    def join(cls, transfers: Sequence[Transfer]) -> Transfer:
        """Several transfers as one handle; the first error counts."""
        given = arguments.items("transfers", transfers, "transfers")
        transfers = [arguments.instance("transfers", each, Transfer) for each in given]
        if len(transfers) == 1:
            return transfers[0]
        return Transfer(
            [completion for transfer in transfers for completion in transfer.completions],
            [transfer._retained for transfer in transfers],
            transfers[0].carried if transfers else NOTHING,
        )

    @property
    def _captured(self) -> bool:
        """True if a launch was captured into a graph, whose replays it has no part in."""
        return any(completion.standing for completion in self.completions)

    @property
    def ordered(self) -> bool:
        """True if what follows on the copy's stream finds it done: streams order all of it, or it
        ended with the call. Otherwise `synchronize` (or `wait`) blocks until then: pageable memory
        was copied, or the transfer is issued in slices."""
        return not any(x.pendings for x in self.completions)

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
        """Make the current stream (or ``stream``) wait; blocks the host only for staged work.
        Raises `InvalidTerms` for a stream that is not one of torch's."""
        if stream is not None and not hasattr(stream, "stream_id"):
            do = "Pass None for the current one."
            raise arguments.invalid("stream", "a stream of torch", stream, do)
        for completion in self.completions:
            completion.wait(stream)

    def synchronize(self, timeout: float | None = None) -> None:
        """Block the host until all bytes have landed.

        Args:
            timeout: the most seconds to wait; None: for as long as it takes.

        Raises:
            TransferTimeout: it has not ended after ``timeout`` seconds, and goes on.
            InvalidTerms: ``timeout`` is no number from 0 on.
            SlotError, TransferError: as `done` does.
        """
        self._refuse_captured("synchronize()")
        if timeout is not None:
            self._await_end(timeout)
        for completion in self.completions:
            completion.synchronize()
        self._finish()

    def __repr__(self) -> str:
        """What is known of it without asking a device, which inside graph capture must not be."""
        errors = [type(c.error).__name__ for c in self.completions if c.error]
        state = "not seen to have ended"
        if self._captured:
            state = "captured into a graph"
        elif errors:
            state = f"failed with {errors[0]}"
        elif all(completion.settled for completion in self.completions):
            state = "ended"
        by = "" if self.carried is NOTHING else f" by {self.carried[0]}"
        return f"<{type(self).__name__}{by}, {state}>"

    def _await_end(self, seconds: float) -> None:
        """Ask for the end until it is seen, less and less often: torch waits without a limit."""
        seconds = arguments.seconds("timeout", seconds, optional=True)
        limit = time.monotonic() + seconds
        pause = 20e-6
        while not all(completion.ended() for completion in self.completions):
            left = limit - time.monotonic()
            if left <= 0:
                raise TransferTimeout(
                    f"The end of a transfer was waited for, and after {seconds:g} s it has not "
                    f"ended; it goes on. Wait again, or ask done()."
                )
            time.sleep(min(pause, left))
            pause = min(1.1 * pause, 1e-3)  # the end is seen late by a tenth

    def _finish(self) -> None:
        self._retained = None
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


#: Captured transfers whose status words are read; a graph beyond these tells of no bad slot.
CAPTURED = 1024


class LateErrors:
    """What transfers find after their call returned, such as a bad id on a device, for callers that
    keep no handles. Given to copies, it has each raise what an earlier one found; `check` asks at
    any time. An error is raised once, by whichever asks first, a handle among them.
    """

    __slots__ = ("__weakref__", "_captured", "owner")

    def __init__(self) -> None:
        self.owner: Owner = weakref.ref(self)
        self._captured: deque[Completion] = deque(maxlen=CAPTURED)

    def keep(self, transfer: Transfer) -> None:
        """Report what becomes of a transfer, unless its handle does."""
        for completion in transfer.completions:
            completion.owner = self.owner
            if completion.standing:
                self._captured.append(completion)
            elif completion.error is not None:
                failed.append(completion)

    def check(self, device: torch.device | None = None) -> None:
        """Raise an error that was found since and not reported yet; never blocks. While the current
        stream of ``device`` is captured into a graph it asks nothing.

        Raises:
            PortaKVError: what a transfer's handle would have raised.
        """
        if not (failed or any_word_set()) or (device is not None and capturing(device)):
            return
        errors = (completion.take_error() for completion in tuple(self._captured))
        error = next(filter(None, errors), None) or unreported_error(self.owner)
        if error is not None:
            raise error


# What is in flight. Work that no stream orders, and status words, must outlive a handle that the
# caller dropped.
in_flight: deque[Completion] = deque()
UNCHECKED = 16  # looked through only if there are more, so that a call seldom pays for it
#: Completions with an error, until their owner reports it.
failed: list[Completion] = []


def hold(completion: Completion, owner: Owner | None = None) -> None:
    """Hold a launch's completion until it has ended; ``owner`` as it has one."""
    completion.owner = owner
    in_flight.append(completion)
    # Two for each new one, so that a long queue becomes shorter again.
    for _ in range(2):
        if len(in_flight) <= UNCHECKED or not _retire(in_flight):
            return


def _retire(flying: deque[Completion]) -> bool:
    """Let the oldest completion go; False if it has not ended."""
    try:
        oldest = flying.popleft()  # taken at once, so that no other thread looks at it
    except IndexError:
        return False
    if not oldest.ended():
        flying.appendleft(oldest)
        return False
    return True


def unreported_error(owner: Owner | None) -> PortaKVError | None:
    """An error of this owner's transfers that was not reported yet, once; never blocks."""
    flying = tuple(in_flight)
    for completion in flying:
        if completion.owner is owner or completion.owner is None:
            completion.ended()  # takes an error out of its word, if no caller holds the transfer
    for completion in (*flying, *failed):
        if completion.owner is owner:
            error = completion.take_error()  # also of work that goes on
            if error is not None:
                return error
    for completion in tuple(failed):
        told = completion.reported or completion.error is None
        keeper = completion.owner
        if told or keeper is None or keeper() is None:
            with suppress(ValueError):  # another thread was faster
                failed.remove(completion)
    return None


# Host memory, and a peer's, is held by what is in flight, since no allocator orders it on a stream.
_holding_memory: deque[Completion] = deque()


def hold_memory(completion: Completion, retire: bool = True) -> None:
    """Hold a completion, and so the memory that it keeps, until it has ended; with ``retire``
    let go of the oldest ones that have. False if this may run inside another thread's graph
    capture, which a question to an event would end."""
    _holding_memory.append(completion)
    if retire:
        copies_holding_memory()


def copies_holding_memory() -> int:
    """How many copies in flight hold host memory, after letting go of the oldest that ended."""
    while _retire(_holding_memory):
        pass
    return len(_holding_memory)
