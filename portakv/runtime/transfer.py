# SPDX-License-Identifier: Apache-2.0
"""Report the end of copies, to threads and to event loops.

Defines the handle that a caller waits on, the completions, events and status words that the handle
reads, and the list of copies in flight, which also holds copies whose handle was dropped.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from portakv import arguments
from portakv.core.call import WordBatches
from portakv.errors import HostMemoryError, PortaKVError, SlotError, TransferError, TransferTimeout
from portakv.runtime.devices import Process, capturing, this_process
from portakv.runtime.interrupts import LOOK, locked
from portakv.runtime.resources import require_linux

#: A weak reference to the `LateErrors` that report an error after the call returned.
Owner: TypeAlias = "weakref.ref[Any]"

#: Blocks of a transfer: bool ``[blocks]``.
Mask: TypeAlias = npt.NDArray[np.bool_]

#: Return the error of work that has ended, or None; never blocks.
Report: TypeAlias = Callable[[], PortaKVError | None]

# Protects the words and events of every completion. A late error may settle other completions.
_settling = threading.RLock()


class Pending(Protocol):
    """Work that is not ordered on the stream."""

    def done(self) -> bool:
        """Return True once the bytes have landed; never blocks."""

    def wait(self) -> object:
        """Block the host until the bytes have landed."""


@runtime_checkable
class Reporting(Protocol):
    """Work that reports its end."""

    def on_end(self, call: Callable[[], object], /) -> None:
        """Have a quick call made at the end, in any thread; immediately if it has come."""

    def off_end(self, call: Callable[[], object], /) -> None:
        """Take a call of `on_end` back."""


async def reported(work: Reporting) -> None:
    """Wait in the running event loop, whichever it is, for the end that some work reports."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    wake = partial(_wake, loop, future)
    work.on_end(wake)
    try:
        await future
    finally:
        work.off_end(wake)


def _wake(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    """End a future of a loop, from any thread. Nothing waits in a loop that is closed."""
    try:
        loop.call_soon_threadsafe(_end, future)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _end(future: asyncio.Future[None]) -> None:
    """End a future, unless it was cancelled."""
    if not future.done():
        future.set_result(None)


class PendingCalls(NamedTuple):
    """A `Pending` by two functions of other work."""

    done: Callable[[], bool]
    wait: Callable[[], object]


class StatusWord:
    """One pinned int64 of a transfer in flight: 0, or the position + 1 of a bad id.

    A launch writes it only on error. The host reads it without synchronising.

    Args:
        tensor: the word.
        free: takes the word once its work has ended; None: its owner has it again with the event.
    """

    __slots__ = ("address", "free", "tensor", "value")

    def __init__(self, tensor: torch.Tensor, free: deque[StatusWord] | None = None) -> None:
        self.tensor = tensor
        self.free = free
        self.address = tensor.data_ptr()
        # A memoryview of one item: reading it costs a third of reading the array.
        self.value: memoryview = tensor.numpy().data


_BATCH = WordBatches.SIZE  # words of one allocation
_CLEAR = bytes(8 * _BATCH)
#: Words return here only after everything that may write them has ended.
free_words: deque[StatusWord] = deque()
# Pinned memory, never freed: a launch may still write a word whose transfer was dropped.
word_batches = WordBatches()


def acquire_word() -> StatusWord:
    """Return a status word that holds 0."""
    try:
        return free_words.pop()
    except IndexError:
        with torch.inference_mode(False):  # torch may write it in any mode
            batch = torch.zeros(_BATCH, dtype=torch.int64, device="cpu").pin_memory()
            words = [StatusWord(batch[i : i + 1], free_words) for i in range(_BATCH)]
        word_batches.append(batch.numpy())
        free_words.extend(words[1:])
        return words[0]


def any_late_error() -> bool:
    """Return True if a transfer has failed after its call and no caller received the error, or if a
    status word does not hold 0."""
    if failed:
        return True
    for batch in word_batches:  # noqa: SIM110 - a hot path: a generator costs twice as much
        if batch.tobytes() != _CLEAR:
            return True
    return False


_EVENTS = 256  # cached for each device; the garbage collector frees the others


class EventPool:
    """Cache the free events of one device: creating and destroying costs more than recording.

    Attributes:
        release: caches an event that has ended and that no stream or host still waits for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free = deque[torch.Event](maxlen=_EVENTS)
        self.release = self._free.append

    def acquire(self) -> torch.Event:
        """Return an event that can be recorded."""
        try:
            return self._free.pop()
        except IndexError:
            return torch.Event(self._device)

    def recorded(self, stream: torch.Stream | None) -> torch.Event:
        """Record an event after all work on ``stream``; None: on this device's current stream."""
        event = self.acquire()
        if stream is None and torch.accelerator.current_device_index() != self._device.index:
            # Without a stream, torch would take the current device's.
            stream = torch.accelerator.current_stream(self._device.index)
        event.record(stream)
        return event


@cache
def event_pool(device: torch.device) -> EventPool:
    """Return the event pool of a device."""
    return EventPool(device)


class Event(Protocol):
    """An event after work of a device: of torch, or the `End` of a copy that the core made."""

    @property
    def device(self) -> torch.device: ...
    def query(self) -> bool: ...
    def wait(self, stream: torch.Stream) -> None: ...
    def synchronize(self) -> None: ...


class Pool(Protocol):
    """Takes an event back that has ended and that no stream or host still waits for."""

    def release(self, event: Any, /) -> None: ...


class Completion:
    """The end of one launch, or of several in a row.

    Each copy makes one: an attribute that is not set has the class's value.

    Args:
        event: recorded after the last launch.
        pendings: work that no stream orders.
        words: status words, each with the position that it counts from.
        error: the first error, once it is known.
        retained: memory that the work uses until the end.
        pool: takes the event back once it has ended.
    """

    event: Event | None = None
    pendings: Sequence[Pending] = ()
    words: Sequence[tuple[StatusWord, int]] = ()
    error: PortaKVError | None = None
    retained: object = None
    pool: Pool | None = None
    standing = False  # the launch was captured, and runs again with every replay
    owner: Owner | None = None  # reports the error if the handle does not
    settled = False  # the end was seen
    reported = False  # a caller received the error
    # Threads that block until the event, counted under `_settling`: no other work may get the event
    # then.
    blocked = 0
    late_error: Report | None = None  # returns an error of the work that has ended

    def __init__(
        self,
        event: Event | None = None,
        pendings: Sequence[Pending] = (),
        words: Sequence[tuple[StatusWord, int]] = (),
        error: PortaKVError | None = None,
        retained: object = None,
        pool: Pool | None = None,
    ) -> None:
        self.event = event
        self.pendings = pendings
        self.words = words
        self.error = error
        self.retained = retained
        self.pool = pool

    @classmethod
    def after(
        cls,
        device: torch.device,
        stream: torch.Stream | None,
        pendings: Sequence[Pending] = (),
        words: Sequence[tuple[StatusWord, int]] = (),
        error: PortaKVError | None = None,
        retained: object = None,
    ) -> Completion:
        """Return the end of the present work on a stream (None: on the device's current stream),
        and of other work. The host has no streams."""
        if device.type == "cpu":
            return cls(None, pendings, words, error, retained)
        pool = event_pool(device)
        return cls(pool.recorded(stream), pendings, words, error, retained, pool)

    def ended(self) -> bool:
        """Return True once all bytes have landed, or an error ended the work; never blocks or
        raises."""
        event = self.event
        if event is not None and not event.query():
            return False
        for pending in self.pendings:
            if not pending.done():
                return False
        self._settle()
        return True

    def wait(self, stream: torch.Stream | None) -> None:
        """Make a stream wait for the event; block the host for work that no stream orders."""
        for pending in self.pendings:
            pending.wait()
        event = self.event  # read only now: another thread may have released it meanwhile
        if event is not None:
            if stream is None:  # torch would take the current device, which may be a different one
                stream = torch.accelerator.current_stream(event.device)
            event.wait(stream)

    def synchronize(self) -> None:
        """Block the host until all bytes have landed."""
        for pending in self.pendings:
            pending.wait()
        with _settling:
            self.blocked += 1  # first, so that `_settle` sees it if this thread sees the event
        try:
            event = self.event  # as in `wait`
            if event is not None:
                event.synchronize()
        finally:
            with _settling:
                self.blocked -= 1
        self._settle()

    def take_error(self) -> PortaKVError | None:
        """Return an error that was not reported yet, once; never blocks."""
        # `_settle` reads the words before it removes them.
        if self.reported or (not self.words and self.error is None):
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
        if error is not None:
            with suppress(ValueError):  # it has no owner
                failed.remove(self)
        return error

    def _settle(self) -> None:
        self.retained = None
        if self.standing:
            return
        # Read and release under one lock: another thread's transfer may get the word next.
        with _settling:
            for word, start in self.words:
                if word.value[0]:
                    self._read(word, start)
                    word.value[0] = 0
                if word.free is not None:
                    word.free.append(word)
            self.words = ()
            # A thread that blocks until the event releases it afterwards.
            event = self.event
            if event is not None and not self.blocked:
                self.event = None
                if self.pool is not None:
                    self.pool.release(event)
            late_error = self.late_error
            if late_error is not None:
                self.late_error = None
                if self.error is None:
                    self.error = late_error()
                    if self.error is not None:
                        self._remember()
            self.settled = True

    def _read(self, word: StatusWord, start: int) -> None:
        position = word.value[0]
        if position and self.error is None:
            self.error = bad_slot(start + position - 1)
            self._remember()

    def _remember(self) -> None:
        """Retain the error for its owner. Without an owner, only the handle reports it."""
        if self.owner is not None and self.owner() is not None:
            failed.append(self)


@dataclass(frozen=True, slots=True)
class Statistics:
    """The progress of a transfer.

    Attributes:
        nbytes: bytes that have landed.
        blocks: blocks that have landed in all layers, counted by the source's ids, else by the
            destination's. With a slot mapping each token is a block; without ids the source's
            blocks count.
        blocks_requested: blocks to move. Skipped ids on the host do not count. Ids on a device are
            not read, so they all count.
        strategy: the strategy or backend that executed the copy, or its first piece.
        why: the reason for that choice, as a phrase.
        seconds: time by the host's clock from the call until its end was noticed. None before the
            end, and inside graph capture.
        slices: pieces that were issued so far.
        cancelled: True if it was cancelled, so that some blocks are not moved.
    """

    nbytes: int
    blocks: int
    blocks_requested: int
    strategy: str
    why: str
    seconds: float | None
    slices: int
    cancelled: bool

    @property
    def gbps(self) -> float | None:
        """The rate in 10^9 bytes a second; None if no time is known."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else None


#: `Transfer.carried` before anything was issued.
NOTHING = ("none", "nothing was issued")


class Transfer:
    """One or more launches. A transfer retains its views and ids until the end.

    A transfer with a bad device id moves all other rows; `done` and `synchronize` then raise. The
    handles of copies by blocks, of pulls and of stores are transfers that know more, and each may
    be awaited in any event loop.

    Attributes:
        completions: the end of each launch, or of several in a row.
        carried: the backend or strategy that executed the first launch, and the reason for the
            choice.
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
        """Combine several transfers into one handle, which reports the first error."""
        listed = arguments.items("transfers", transfers, "transfers")
        transfers = [arguments.instance("transfers", each, Transfer) for each in listed]
        if len(transfers) == 1:
            return transfers[0]
        return Transfer(
            [completion for transfer in transfers for completion in transfer.completions],
            [transfer._retained for transfer in transfers],
            transfers[0].carried if transfers else NOTHING,
        )

    @property
    def _captured(self) -> bool:
        """Return True if a launch was captured into a graph, whose replays the handle ignores."""
        for completion in self.completions:  # noqa: SIM110 - a generator is two more calls
            if completion.standing:
                return True
        return False

    @property
    def ordered(self) -> bool:
        """Return True if later work on the copy's stream runs after the whole copy.

        Streams then order all of the copy, or it ended with the call. Otherwise `synchronize` (or
        `wait`) blocks until the end: the copy used pageable memory, or is issued in slices.
        """
        return not any(x.pendings for x in self.completions)

    def done(self) -> bool:
        """Return True once all bytes have landed; never blocks.

        Raises:
            SlotError: the transfer ended, but a device id was past the end.
            TransferError: the transfer was captured into a graph and has no separate completion.
        """
        self._refuse_captured("done()")
        ended = [completion.ended() for completion in self.completions]  # all: each settles
        if not all(ended):
            return False
        self._finish()
        return True

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Make the current stream (or ``stream``) wait; block the host only for staged work.

        Raises:
            InvalidTerms: ``stream`` is not a stream of torch.
        """
        if stream is not None and not hasattr(stream, "stream_id"):
            do = "Pass None for the current one."
            raise arguments.invalid("stream", "a stream of torch", stream, do)
        for completion in self.completions:
            completion.wait(stream)

    def synchronize(self, timeout: float | None = None) -> None:
        """Block the host until all bytes have landed.

        Args:
            timeout: the most seconds to wait; None: without a limit.

        Raises:
            TransferTimeout: the transfer has not ended after ``timeout`` seconds, and goes on.
            InvalidTerms: ``timeout`` is not a number from 0 on.
            SlotError, TransferError: as `done` raises them.
        """
        self._refuse_captured("synchronize()")
        if timeout is not None:
            self._await_end(timeout)
        for completion in self.completions:
            completion.synchronize()
        self._finish()

    def __await__(self) -> Generator[Any, None, None]:
        """Wait in the running event loop, whose other work goes on, until all bytes have landed.

        Raises:
            SlotError, TransferError: as `synchronize` raises them.
        """
        self._refuse_captured("await")
        yield from self._see_ends().__await__()
        self.synchronize()

    async def _see_ends(self) -> None:
        """Wait for work that reports its end, then look now and then: events of a device tell no
        loop."""
        for pending in self._reporting():
            await reported(pending)
        began = time.monotonic()
        while [each for each in self.completions if not each.ended()]:  # each of them settles
            await asyncio.sleep(_pause(time.monotonic() - began))

    def cancel(self) -> bool:
        """Start nothing more of the transfer; return True if some rows will not be moved. Never
        blocks.

        Always False for a transfer of which all was issued by the call.
        """
        return False

    @property
    def layers(self) -> Sequence[Transfer]:
        """Return a transfer for each layer, which ends when the layer's bytes have landed; none if
        layers do not end by themselves."""
        return ()

    @property
    def released(self) -> Transfer | None:
        """Return the transfer after which nothing reads the caller's rows any more; None if that is
        the end of this one."""
        return None

    @property
    def landed(self) -> Mask:
        """Return which requested blocks have landed, bool ``[blocks_requested]``; never block or
        raise.

        The blocks are in the order of the call, without those that were skipped.
        """
        figures = self.statistics
        return np.arange(figures.blocks_requested) < figures.blocks

    @property
    def statistics(self) -> Statistics:
        """Return the progress so far; never block or raise.

        A transfer whose call moves no blocks counts neither bytes nor blocks nor seconds.
        """
        return Statistics(0, 0, 0, *self.carried, None, len(self.completions), False)

    def __repr__(self) -> str:
        """Return the known state without a query to a device, which graph capture forbids."""
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

    def _reporting(self) -> Iterator[Reporting]:
        """Return the work that reports its end and has not ended."""
        for completion in self.completions:
            for pending in completion.pendings:
                if isinstance(pending, Reporting) and not pending.done():
                    yield pending

    def _await_end(self, seconds: float) -> None:
        """Sleep until work has ended that reports its end, then poll, less and less often: torch
        waits without a limit.

        Polls alone would take the interpreter from helpers: 0.3 ms of a load of 2 MiB.
        """
        seconds = arguments.seconds("timeout", seconds, optional=True)
        limit = time.monotonic() + seconds
        for pending in self._reporting():
            _sleep(pending, limit)
        began = time.monotonic()
        while not all(completion.ended() for completion in self.completions):
            now = time.monotonic()
            left = limit - now
            if left <= 0:
                raise TransferTimeout(
                    f"The transfer timed out after {seconds:g} s, and goes on. Wait again, or call "
                    f"done()."
                )
            time.sleep(min(_pause(now - began), left))

    def _finish(self) -> None:
        self._retained = None
        errors = [completion.take_error() or completion.error for completion in self.completions]
        for error in errors:
            if error is not None:
                raise error

    def _refuse_captured(self, call: str) -> None:
        if self._captured:
            raise TransferError(
                f"Expected a transfer outside graph capture for {call}, got a captured one, which "
                f"has no separate completion. Synchronise the graph's replay instead."
            )


def _sleep(work: Reporting, until: float) -> None:
    """Sleep until the end that some work reports, or until a time of `time.monotonic`."""
    ended = locked()
    work.on_end(ended.release)
    try:
        while (left := until - time.monotonic()) > 0 and not ended.acquire(timeout=min(left, LOOK)):
            pass
    finally:
        work.off_end(ended.release)


def _pause(waited: float) -> float:
    """Return the seconds between two looks at an end, which is then seen at most 2 % late."""
    return min(max(20e-6, waited / 50), 1e-3)


def bad_slot(position: int, slot: int | None = None, slots: int | None = None) -> SlotError:
    """Return the error for a device id past the end of its view."""
    where = "" if slot is None else f", slot {slot} of a view of {slots},"
    return SlotError(
        f"Position {position} of a device index{where} is past the end of its view; that position "
        f"was not moved, all others were. Correct the index and repeat the call."
    )


#: Captured transfers whose status words are read; further graphs report no bad slot.
CAPTURED = 1024


class LateErrors:
    """Collect errors that transfers detect after their call returned, such as a bad device id.

    For callers that do not keep handles. A copy that receives this object raises the error of an
    earlier copy; `check` raises one at any time. Each error is raised once: by a copy, `check` or a
    handle.
    """

    __slots__ = ("__weakref__", "_captured", "owner")

    def __init__(self) -> None:
        self.owner: Owner = weakref.ref(self)
        self._captured: deque[Completion] = deque(maxlen=CAPTURED)

    def keep(self, transfer: Transfer) -> None:
        """Report the error of a transfer, unless its handle reports the error first."""
        for completion in transfer.completions:
            completion.owner = self.owner
            if completion.standing:
                self._captured.append(completion)
            elif completion.error is not None:
                failed.append(completion)

    def check(self, device: torch.device | None = None) -> None:
        """Raise an error that occurred since the last call and was not reported; never blocks.

        Does nothing while the current stream of ``device`` is being captured into a graph.

        Raises:
            PortaKVError: the error that the transfer's handle would have raised.
        """
        if not any_late_error() or (device is not None and capturing(device)):
            return
        errors = (completion.take_error() for completion in tuple(self._captured))
        error = next(filter(None, errors), None) or unreported_error(self.owner)
        if error is not None:
            raise error


# Completions in flight. Work that no stream orders, and status words, must outlive a handle that
# the caller dropped.
in_flight: deque[Completion] = deque()
UNCHECKED = 16  # the list is checked once for so many new completions, so that few calls pay for it
#: Completions whose error their owner has not reported yet.
failed: list[Completion] = []


def hold(completion: Completion, owner: Owner | None = None) -> None:
    """Retain a launch's completion until it has ended; ``owner`` reports its error."""
    completion.owner = owner
    in_flight.append(completion)
    if len(in_flight) % UNCHECKED == 0:
        # Two for each new completion, so that a long queue becomes shorter again.
        _retire(in_flight, 2 * UNCHECKED)


def _retire(queue: deque[Completion], most: int | None = None) -> None:
    """Release the oldest completions that have ended; ``most``: no more of them."""
    ended: list[Completion] = []
    try:
        for _ in range(len(queue) if most is None else most):
            try:
                oldest = queue.popleft()  # remove it first, so that no other thread checks it
            except IndexError:
                return
            if oldest.settled:
                continue
            # Most are copies of the core. One call tells that such a copy ended without an error.
            end: Any = oldest.event
            pool: Any = oldest.pool
            if end is not None and end is pool and end.ask(end.address) == 0:
                ended.append(oldest)
            elif not oldest.ended():
                queue.appendleft(oldest)
                return
    finally:
        if ended:
            _settle_copies(ended)


def _settle_copies(completions: Sequence[Completion]) -> None:
    """Settle copies of the core that have ended without an error."""
    with _settling:
        for completion in completions:
            end: Any = completion.event
            if end is None or completion.blocked:
                completion._settle()
                continue
            completion.event = completion.retained = None
            completion.words = ()
            completion.settled = True
            end.release(end)


def unreported_error(owner: Owner | None) -> PortaKVError | None:
    """Return an error of this owner's transfers that was not reported yet, once; never blocks."""
    unended = tuple(in_flight)
    for completion in unended:
        if completion.owner is owner or completion.owner is None:
            completion.ended()  # reads the error from its word, if no caller holds the transfer
    for completion in (*unended, *failed):
        if completion.owner is owner:
            error = completion.take_error()  # also of work that still runs
            if error is not None:
                return error
    for completion in tuple(failed):
        resolved = completion.reported or completion.error is None
        owner_of_error = completion.owner
        if resolved or owner_of_error is None or owner_of_error() is None:
            with suppress(ValueError):  # another thread has removed it
                failed.remove(completion)
    return None


# Copies in flight retain host memory and a peer's memory: no allocator orders it on a stream.
_holding_memory: deque[Completion] = deque()


def hold_memory(completion: Completion) -> None:
    """Retain a completion, and so the memory that it uses, until it has ended.

    Each fourth call also releases the oldest completions that have ended. If nothing else retains
    their pinned memory, it is freed there, which waits for all work of the device.
    """
    _holding_memory.append(completion)
    if len(_holding_memory) % 4 == 0:
        copies_holding_memory()


def retire() -> None:
    """Release the oldest copies that have ended, so that others can use what they used."""
    _retire(in_flight)
    copies_holding_memory()


def copies_holding_memory() -> int:
    """Release the oldest ended copies, and return how many copies still retain host memory."""
    _retire(_holding_memory)
    return len(_holding_memory)


# ------------------------------------------------------------------------------------------------
# A queue of what has ended, with a descriptor that an event loop can wait for.

T = TypeVar("T")

#: The most items that wait for a consumer.
LIMIT = 65536


class _Waiting(Generic[T]):
    """The items of one process, and the eventfd that it owns once a consumer asks for it.

    The descriptor lives as long as this object. A thread that adds an item refers to the object, so
    that it never writes to a number that another file has by now.

    At most one write comes between two reads of the descriptor. ``written`` is set before the write
    and cleared after the read, and each add looks at it after its item is there. So an add that
    writes nothing saw it set, before the consumer cleared it, and the consumer takes items only
    after that: it finds the item. Cleared before the read, the flag would stay set after the read
    of the write that set it, and later items would wake no one.
    """

    fd = -1  # there is none before `fileno`

    def __init__(self, limit: int) -> None:
        self.items: deque[T] = deque(maxlen=limit)
        self.written = False

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def fileno(self) -> int:
        """Return the descriptor, which is readable if items wait already."""
        if self.fd < 0:
            made = _eventfd()
            if vars(self).setdefault("fd", made) != made:  # another thread was first
                os.close(made)
        if self.items:  # they came before the descriptor; the add of a later one writes
            self.wake()
        return self.fd

    def wake(self) -> None:
        """Make the descriptor readable, if there is one."""
        if self.fd < 0 or self.written:
            return
        try:
            self.written = True
            os.eventfd_write(self.fd, 1)
        except BlockingIOError:  # the counter is full, so the descriptor is readable
            pass
        except BaseException:  # an interrupt, maybe before the write
            self.written = False
            raise

    def clear(self) -> None:
        """Make the descriptor not readable until the next `wake`."""
        if self.fd < 0:
            return
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:  # nothing has come
            pass
        finally:
            self.written = False


def _eventfd() -> int:
    """Return a new descriptor; raise `HostMemoryError` if none is free."""
    require_linux("a descriptor of finished transfers")
    try:
        return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    except OSError as error:
        raise HostMemoryError(
            f"Expected a descriptor to be free for an eventfd, got: {error}. Close files, or raise "
            f"the limit of open files."
        ) from None


class Finished(Generic[T]):
    """A bounded queue of what has ended, with one consumer. Any thread may add to it.

    Nothing is kept before `start`, which `take` and `fileno` call. The oldest item is dropped when
    ``limit`` items wait. No method blocks or needs a thread. A forked process starts
    with its own empty queue, and never reads the descriptor of its parent.

    Attributes:
        dropped: the number of items that were dropped because nothing took them.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.dropped = 0
        self._limit = limit
        self._closed = False
        #: At most one entry, except in a process that was forked after `start`.
        self._waiting = dict[Process, _Waiting[T]]()

    @property
    def started(self) -> bool:
        """Return True if items are kept."""
        return bool(self._waiting) and this_process() in self._waiting

    @property
    def is_idle(self) -> bool:
        """Return True if `take` would return nothing and change nothing.

        Never with a descriptor, which may be readable although no item waits.
        """
        waiting = self._waiting.get(this_process())
        return waiting is not None and not waiting.items and waiting.fd < 0

    def start(self) -> None:
        """Keep the items that are added from now on. Does nothing after `close`."""
        self._started()

    def add(self, item: T) -> None:
        """Keep an item for the consumer, and make the descriptor readable."""
        waiting = self._waiting.get(this_process()) if self._waiting else None
        if waiting is None:
            return
        try:
            if len(waiting.items) == self._limit:
                self.dropped += 1
            waiting.items.append(item)
        finally:  # also if the caller is interrupted, or the consumer would miss the item
            waiting.wake()

    def take(self) -> list[T]:
        """Return the items since the last call, the oldest first.

        The descriptor is not readable after that, until another item comes. It can become readable
        once more for an item that was taken while another thread added it, so a call after a wait
        can return nothing.
        """
        waiting = self._started()
        if waiting is None:
            return []
        # The descriptor first: an item that comes after that makes it readable again.
        waiting.clear()
        taken = list[T]()
        for _ in range(len(waiting.items)):
            with suppress(IndexError):  # another thread took it
                taken.append(waiting.items.popleft())
        return taken

    def fileno(self) -> int:
        """Return the descriptor, for ``select``, ``epoll`` or an event loop; -1 after `close`.

        It is readable while items wait. It belongs to this object: do not read or close it. The
        first call makes it: without one, no item costs a system call.

        Raises `HostMemoryError` without a free descriptor.
        """
        waiting = self._started()
        if waiting is None:
            return -1
        fd = waiting.fileno()
        return -1 if self._closed else fd

    def close(self) -> None:
        """Drop the items, keep none from now on, and release the descriptor."""
        self._closed = True
        if waiting := self._waiting.get(this_process()):
            waiting.written = False
            waiting.wake()  # who sleeps on the descriptor
        self._waiting.clear()

    def _started(self) -> _Waiting[T] | None:
        """Return the items of this process, kept from now on; None after `close`."""
        process = this_process()
        waiting = self._waiting.get(process)
        if waiting is not None or self._closed:
            return waiting
        for other in [*self._waiting]:  # the parent's
            if other.forked:
                self._waiting.pop(other, None)
        return self._waiting.setdefault(process, _Waiting(self._limit))
