# SPDX-License-Identifier: Apache-2.0
"""I/O engines whose calls of the system a test plays, and io_uring's queues as a test sees them.

A request of an engine here is a call of `os.preadv` or `os.pwritev`, which a test may replace.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from portakv.core.io import System
from portakv.storage.io.base import DEPTH, Request
from portakv.storage.io.choose import Ring, Threads

SETUP = 425
ENTER = 426
REGISTER = 427
WORD = 0xFFFFFFFF
READ = 22
READ_FIXED = 4
SQES_AT = 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = [ctypes.c_long] * 7
_libc.syscall.restype = ctypes.c_long


def system_call(*numbers: int) -> int:
    """Return the kernel's result, or a negative errno."""
    result: int = _libc.syscall(*numbers, *[0] * (7 - len(numbers)))
    return result if result >= 0 else -ctypes.get_errno()


def carry(request: Request) -> int:
    """Carry out a request by one call, and return its result as an engine does."""
    if request.nbytes < 0:
        return -errno.ECANCELED
    moved = move(request.fd, request.address, request.nbytes, request.offset, request.write)
    return moved if moved or not request.nbytes else -errno.ENODATA


def move(fd: int, address: int, nbytes: int, offset: int, write: int) -> int:
    """Move bytes by Python's functions as they are now."""
    memory = memoryview((ctypes.c_ubyte * nbytes).from_address(address))
    try:
        return (os.pwritev if write else os.preadv)(fd, [memory], offset)
    except OSError as error:
        return -(error.errno or errno.EIO)


class Kernel:
    """The calls of one engine; a test replaces ``call``, which answers those of io_uring.

    Attributes:
        call: gets the number of the call and its arguments.
        admit: 0, or the negative errno for which the system starts no thread.
        queues: of the last ring that was made.
        rings: how many were made.
    """

    def __init__(self, call: Callable[..., int] = system_call, admit: int = 0) -> None:
        self.call = call
        self.queues: Queues
        self.rings = 0
        self.system = System(
            System.SETUP(self._setup),
            System.ENTER(lambda *terms: self.call(ENTER, *terms)),
            System.ENROLL(lambda *terms: self.call(REGISTER, *terms)),
            System.MOVE(move),
            System.ADMIT(lambda: admit),
        )

    def forget(self) -> None:
        """Close the descriptors by which this side sees the queues."""
        self.__dict__.pop("queues", None)

    def _setup(self, entries: int, parameters: int) -> int:
        fd = self.call(SETUP, entries, parameters)
        if fd >= 0:
            self.rings += 1
            words = (ctypes.c_uint32 * 30).from_address(parameters)
            if words[5] & 1:
                self.queues = Queues(fd, words)
        return fd


class Queues:
    """The queues that a ring shares with the kernel.

    Attributes:
        sqes: the entries of the submission queue.
        cqes: the entries of the completion queue.
    """

    def __init__(self, fd: int, parameters: Any) -> None:
        places = {
            "taken": parameters[10],
            "put": parameters[11],
            "seen": parameters[20],
            "reported": parameters[21],
        }
        self._places = {name: place // 4 for name, place in places.items()}
        columns = "opcode u1, rest0 V3, fd i4, offset i8, address i8, nbytes u4, rest1 u4, key u8"
        fields = f"{columns}, buffer u2, rest2 V22".split(", ")
        kind = np.dtype([(*each.split(),) for each in fields])
        end = np.dtype([("key", "u8"), ("result", "i4"), ("flags", "u4")])
        first = parameters[25]
        ends = end.itemsize * parameters[1]
        map_ = partial(mmap.mmap, fd, flags=mmap.MAP_SHARED)
        shared = np.frombuffer(map_(max(first + ends, parameters[16] + 4 * parameters[0])), "u1")
        self._words = shared.view("u4")
        self.cqes = shared[first : first + ends].view(end)
        self.sqes = np.frombuffer(map_(kind.itemsize * parameters[0], offset=SQES_AT), kind)

    def count(self, first: str, past: str) -> int:
        """Return the difference of two counters, given their names."""
        places = self._places
        return (int(self._words[places[past]]) - int(self._words[places[first]])) & WORD

    def in_flight(self) -> int:
        """Return the number of requests that were put and whose ends were not seen."""
        return self.count("seen", "put")

    def numbers(self, entries: Any) -> Any:
        """Return the place of each entry among the flights of the ring: of a first batch, the
        number of its request."""
        return entries["key"] & WORD


class PlayedThreads(Threads):
    """The engine `threads` by calls of Python's functions."""

    def __init__(
        self, memory: Sequence[tuple[int, int]] = (), depth: int = DEPTH, admit: int = 0
    ) -> None:
        self.kernel = Kernel(admit=admit)
        super().__init__(memory, depth, self.kernel.system)


class PlayedRing(Ring):
    """The engine `ring`, of which a test plays the kernel."""

    def __init__(
        self,
        memory: Sequence[tuple[int, int]] = (),
        depth: int = DEPTH,
        call: Callable[..., int] = system_call,
        admit: int = 0,
    ) -> None:
        self.kernel = Kernel(call, admit)
        super().__init__(memory, depth, self.kernel.system)
