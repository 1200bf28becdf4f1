# SPDX-License-Identifier: Apache-2.0
"""Call the core to move bytes between open files and memory, by its own threads.

`native/core/core.h` is the contract: batches of requests go in, and ends come out. The thread that
calls `Files.run` waits for them.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain
from types import SimpleNamespace
from typing import NamedTuple

from portakv.core.library import function

#: The result of a read whose bytes have another checksum.
WRONG = -4096
#: The code of `OSError` for a kernel whose io_uring lacks what a ring uses.
OLD = 4097
_DONE = -1

#: Gets the number of a request and its result.
Ended = Callable[[int, int], object]


class Check(NamedTuple):
    """The bytes that a read brings: the checksums of pieces of memory.

    Attributes:
        base: an address.
        pieces: for each piece its offset from the base and its length, as int64.
        seed: of the checksums.
        expected: the checksums, as uint64.
    """

    base: int
    pieces: bytes
    seed: int
    expected: bytes


class System(ctypes.Structure):
    """The calls of the system that an engine makes, for tests: each returns a negative errno."""

    _number = ctypes.c_uint32
    SETUP = ctypes.CFUNCTYPE(ctypes.c_int64, _number, ctypes.c_void_p)
    ENTER = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int, _number, _number, _number)
    ENROLL = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int, _number, ctypes.c_void_p, _number)
    MOVE = ctypes.CFUNCTYPE(
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int,
    )
    ADMIT = ctypes.CFUNCTYPE(ctypes.c_int64)
    _fields_ = (
        ("setup", SETUP),
        ("enter", ENTER),
        ("enroll", ENROLL),
        ("move", MOVE),
        ("admit", ADMIT),
    )


class State(ctypes.Structure):
    """What an engine does without, and what it has made; see `portakv_io_state`."""

    _fields_ = (
        ("registered", ctypes.c_int64),
        ("refused", ctypes.c_int64),
        ("rings", ctypes.c_int64),
        ("movers", ctypes.c_int64),
    )


class _Terms(ctypes.Structure):
    _fields_ = (
        ("ring", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("memory", ctypes.c_char_p),
        ("parts", ctypes.c_int64),
        ("system", ctypes.POINTER(System)),
    )


@cache
def _functions() -> SimpleNamespace:
    """Return the functions, which wait."""
    pointer = ctypes.c_void_p
    number = ctypes.c_int64
    flag = ctypes.c_int
    words = ctypes.c_char_p
    begun = pointer, pointer, words, words, number, flag
    os.register_at_fork(after_in_child=_forget)
    return SimpleNamespace(
        open=function("io_open", pointer, pointer, pointer, waits=True),
        look=function("io_look", None, pointer, pointer, waits=True),
        begin=function("io_begin", flag, *begun, waits=True),
        wait=function("io_wait", number, pointer, pointer, number, number, waits=True),
        cancel=function("io_cancel", None, pointer, pointer, waits=True),
        release=function("io_release", None, pointer, waits=True),
        close=function("io_close", None, pointer, waits=True),
        free=function("io_free", None, pointer, waits=True),
        forked=function("io_forked", None, pointer, waits=True),
    )


#: The engines of this process, whose descriptors a forked child closes.
_opened = weakref.WeakSet["Files"]()


def _forget() -> None:
    """Close what this child has of its parent's engines; their threads are not here."""
    for files in [*_opened]:
        _functions().forked(files.handle)
        files.end.detach()
    _opened.clear()


class _Handle(ctypes.c_void_p):
    """A pointer to a batch of the core, which is released with it."""

    def __del__(self) -> None:
        if self:
            _functions().release(self)


class Batch:
    """Requests that were passed to an engine, until the last of them has ended.

    An interrupt may come after any step: the core writes ``handle`` before a request begins.
    """

    def __init__(self, files: Files, requests: Sequence[Sequence[int]], checks: Sequence[Check]):
        """Prepare requests: descriptor, offset, address, bytes, and 1 to write."""
        self.handle = _Handle()
        self._files = files
        self._count = len(requests)
        self._words = array("q", chain.from_iterable(requests)).tobytes()
        self._checked = checks  # the core reads their pieces
        self._expected = b"".join([check.expected for check in checks])
        self._ends = (ctypes.c_int64 * (2 * self._count))()

    def begin(self, each: bool = False) -> None:
        """Begin all requests. ``each``: report each end immediately, and not all together."""
        checks = _words_of(self._checked, self._expected) if self._checked else None
        terms = (self._words, checks, self._count, each)
        code = _functions().begin(self._files.handle, ctypes.byref(self.handle), *terms)
        if code:
            raise MemoryError("The core has no memory for requests of files.")

    def wait(self, milliseconds: int = -1) -> list[tuple[int, int]] | None:
        """Wait for ends, and return the number and the result of each new one; None: all ends have
        been reported. The list is empty after this time, and after a signal.
        """
        ends = self._ends
        count = _functions().wait(self.handle, ends, self._count, milliseconds)
        if count == _DONE:
            return None
        return [(ends[2 * i], ends[2 * i + 1]) for i in range(count)]

    def cancel(self) -> None:
        """End the requests that have not begun."""
        if self.handle:
            _functions().cancel(self._files.handle, self.handle)


def _words_of(checks: Sequence[Check], expected: bytes) -> bytes:
    """Return the words of checks. ``expected``: the checksums of all of them, one after the other;
    these bytes and the pieces stay where they are."""
    words = array("q")
    at = _address_of(expected)
    pieces = b""
    pieces_at = 0
    for check in checks:
        if check.pieces is not pieces:  # mostly those of the check before
            pieces = check.pieces
            pieces_at = _address_of(pieces)
        seed = check.seed if check.seed < 1 << 63 else check.seed - (1 << 64)  # as a signed number
        words.extend((check.base, pieces_at, len(pieces) // 16, seed, at))
        at += len(check.expected)
    return words.tobytes()


def _address_of(data: bytes) -> int:
    """Return the address of the first byte of an object, which has to stay alive."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


class Files:
    """An engine of the core, which ends with its last reference."""

    def __init__(
        self,
        ring: bool,
        depth: int,
        memory: Sequence[tuple[int, int]] = (),
        system: System | None = None,
    ) -> None:
        """Start an engine.

        Args:
            ring: use io_uring, and plain calls for what it cannot do; else plain calls alone.
            depth: the most requests of a batch under way.
            memory: (address, bytes) to register with the kernel.
            system: replaces the system's calls.

        Raises `OSError` if the system does not allow it, with the errno `OLD` for an old kernel.
        """
        functions = _functions()
        self._system = system  # the core calls its functions
        words = array("q", chain.from_iterable(memory)).tobytes()
        terms = _Terms(ring, depth, words, len(memory), ctypes.pointer(system) if system else None)
        code = ctypes.c_int64()
        self.handle = functions.open(ctypes.byref(terms), ctypes.byref(code))
        if self.handle is None:
            raise OSError(-code.value, os.strerror(-code.value))
        self.end = weakref.finalize(self, functions.free, self.handle)
        self.end.atexit = False  # a daemon thread may use it until the very end
        _opened.add(self)

    def state(self) -> State:
        """Return what the engine does without."""
        state = State()
        _functions().look(self.handle, ctypes.byref(state))
        return state

    def run(
        self,
        requests: Sequence[Sequence[int]],
        ended: Ended | None = None,
        checks: Sequence[Check] = (),
    ) -> list[int]:
        """Carry out requests, and return the result of each: bytes, a negative errno, or `WRONG`.

        Args:
            requests: for each descriptor, offset, address, bytes, and 1 to write.
            ended: called in this thread for each end. What it raises is raised again once all
                requests have ended.
            checks: of each request; empty: none are checked.
        """
        batch = Batch(self, requests, checks)
        results = [0] * len(requests)

        def go(stopped: bool) -> None:
            if stopped:
                batch.cancel()
            else:
                batch.begin(each=ended is not None)
            while batch.handle:
                ends = batch.wait()
                if ends is None:
                    break
                for number, result in ends:
                    results[number] = result
                    if ended is not None and not stopped:
                        ended(number, result)

        if requests:
            to_the_end(go)
        return results

    def close(self) -> None:
        """End the engine's threads, and cancel what has not begun; more than once does nothing."""
        _functions().close(self.handle)


def to_the_end(go: Callable[[bool], None]) -> None:
    """Call ``go(False)``; after an interrupt call ``go(True)`` and raise it again.

    ``go(True)`` ends the requests in flight: none may use the memory of a caller that continues.
    """
    try:
        go(False)
    except BaseException:  # mostly an interrupt
        while True:
            with suppress(BaseException):  # another interrupt does not end the requests either
                go(True)
                break
        raise
