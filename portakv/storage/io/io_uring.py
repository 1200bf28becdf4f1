# SPDX-License-Identifier: Apache-2.0
"""The I/O engine `ring`: Linux's io_uring for block stores, by ctypes and numpy.

It needs no memory barrier: the kernel takes requests, and with DEFER_TASKRUN reports their ends,
inside a call of the thread that owns the ring. Without that flag only x86-64 is served, whose loads
and stores are in order.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
import weakref
from collections.abc import Sequence
from functools import partial

import numpy as np

from portakv.storage.io.base import Ended, Request
from portakv.storage.io.threads import Threads, carry, to_the_end

# the same on every architecture but alpha
SETUP = 425
ENTER = 426
REGISTER = 427
FLAGS = (0x3090, 0x10)  # CLAMP with SUBMIT_ALL, SINGLE_ISSUER, DEFER_TASKRUN (Linux 6.1); alone
FEATURES = 0x3  # SINGLE_MMAP, NODROP: Linux 5.5
GETEVENTS = 1
SQES_AT = 0x10000000
# the next number is WRITE, WRITE_FIXED
READ = 22
READ_FIXED = 4
AGAIN = (-errno.EINTR, -errno.EAGAIN, -errno.EINVAL)  # by a plain call; EINVAL: not aligned
PASSING = (-errno.EINTR, -errno.EAGAIN, -errno.EBUSY)  # of ENTER: call it again
# the most bytes of a registered buffer and of one request
WORD = 0xFFFFFFFF
LARGEST = 1 << 30
_COLUMNS = "opcode u1, rest0 V3, fd i4, offset i8, address i8, nbytes u4, rest1 u4, key u8"
SQE = np.dtype([(*each.split(),) for each in f"{_COLUMNS}, buffer u2, rest2 V22".split(", ")])
CQE = np.dtype([("key", "u8"), ("result", "i4"), ("flags", "u4")])
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = [ctypes.c_long] * 7
_libc.syscall.restype = ctypes.c_long


def system_call(*numbers: int) -> int:
    """Return the kernel's result, or a negative errno; releases the interpreter's lock."""
    result: int = _libc.syscall(*numbers, *[0] * (7 - len(numbers)))
    return result if result >= 0 else -ctypes.get_errno()


class OneRing:
    """The ring of one thread, closed when its last reference goes.

    Raises `OSError` if the kernel refuses it. A ``poisoned`` ring failed, or reported a request
    that it did not have, and must not be used again.
    """

    def __init__(self, memory: Sequence[tuple[int, int]], entries: int) -> None:
        for flags in FLAGS:
            answers = np.array([0, 0, flags, *[0] * 27], np.uint32)  # io_uring_params
            if (fd := system_call(SETUP, entries, answers.ctypes.data)) != -errno.EINVAL:
                break
        if fd < 0:
            why = f"{os.strerror(-fd)}; see kernel.io_uring_disabled, and the container's profile"
            raise OSError(-fd, f"the kernel rejects io_uring: {why}")
        # Not at exit: a daemon thread may use it until the very end.
        weakref.finalize(self, os.close, fd).atexit = False
        if ~int(answers[5]) & FEATURES or (flags == FLAGS[1] and os.uname().machine != "x86_64"):
            raise OSError(errno.ENOSYS, "its io_uring is too old; Linux 6.1 is needed")
        self.fd = fd
        self.entries = int(answers[0])
        ends = CQE.itemsize * int(answers[1])
        sq = answers[10:20].tolist()
        cq = answers[20:30].tolist()
        map_ = partial(mmap.mmap, fd, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        shared = np.frombuffer(map_(max(sq[6] + 4 * self.entries, cq[5] + ends)), np.uint8)
        self.words = shared.view(np.uint32)
        self.cqes = shared[cq[5] :][:ends].view(CQE)
        self.sqes = np.frombuffer(map_(SQE.itemsize * self.entries, offset=SQES_AT), SQE)
        # Places of four counters: taken by the kernel, put here; seen here, reported by the kernel.
        self.taken, self.put, self.seen, self.reported = (at // 4 for at in (*sq[:2], *cq[:2]))
        self.words[sq[6] // 4 :][: self.entries] = np.arange(self.entries)
        self.poisoned = False
        self._generation = 0
        cuts = [(at, start + n) for start, n in memory for at in range(start, start + n, LARGEST)]
        buffers = [(0, 0), *((at, min(LARGEST, past - at)) for at, past in sorted(cuts))]
        vectors = np.array(buffers, np.int64)  # the first: none
        code = system_call(REGISTER, fd, 0, vectors[1:].ctypes.data, len(cuts)) if cuts else 0
        vectors = vectors[: 1 if code < 0 else None]
        self._starts = vectors[:, 0]
        self._ends = vectors.sum(axis=1)
        why = f"no buffers are registered ({os.strerror(-code)}), see ulimit -l; it costs CPU"
        self.notes = (why,) if code < 0 else ()

    def run(self, requests: Sequence[Request], tell: Ended | None = None) -> list[int]:
        """See `Engine`. Requests that the kernel never ended are not reported."""
        requested = np.array(requests, np.int64).reshape(-1, 5)
        begun = 0
        stop = 0
        results: list[int | None] = [None] * len(requests)
        self._generation = (self._generation + 1) % LARGEST  # fits a key

        def go(stopped: bool) -> None:
            nonlocal begun, stop
            stop = -errno.ECANCELED * stopped
            while (begun < len(requested) and not stop) or self._count(self.seen, self.put):
                if stop:  # the kernel must not take the requests that it has not taken yet
                    self.words[self.put] = self.words[self.taken]
                elif begun < len(requested):
                    begun += self._fill(requested[begun:], begun)
                # Wait for all requests, for half if more follow, or for one to report.
                least = self._count(self.seen, self.put) // (1 + (begun < len(requested)))
                least = min(least, 1) if tell else least
                put = self._count(self.taken, self.put)
                if (code := system_call(ENTER, self.fd, put, least, GETEVENTS)) < 0:
                    stop = stop if code in PASSING else code
                    time.sleep(0.001)  # short of memory, the kernel may report so again immediately
                seen = int(self.words[self.seen])
                ends = self._count(self.seen, self.reported)
                cqes = self.cqes[(seen + np.arange(ends)) % len(self.cqes)]
                new = list[tuple[int, int]]()
                for key, got in zip(cqes["key"].tolist(), cqes["result"].tolist(), strict=True):
                    index = key - (self._generation << 32)
                    if not 0 <= index < len(results) or results[index] is not None:
                        self.poisoned = True
                    else:
                        again = got in AGAIN or 0 <= got < requests[index].nbytes
                        results[index] = got = carry(requests[index]) if again else got
                        new.append((index, got))
                # Before the calls below, which may take long.
                self.words[self.seen] = (seen + ends) & WORD
                if tell and not stopped:
                    for each in new:
                        tell(*each)

        to_the_end(go)
        self.poisoned |= stop < 0
        return [stop or -errno.ECANCELED if got is None else got for got in results]

    def _count(self, first: int, past: int) -> int:
        return (int(self.words[past]) - int(self.words[first])) & WORD

    def _fill(self, requested_rows: np.ndarray, first: int) -> int:
        """Put requests into the free entries, the first with that number; return their number."""
        new = requested_rows[: self.entries - self._count(self.seen, self.put)]
        fd, offset, address, nbytes, write = new.T
        buffer = np.searchsorted(self._starts, address, "right") - 1
        fixed = address + nbytes <= self._ends[buffer]
        sqes = np.zeros(len(new), SQE)
        sqes["opcode"] = np.where(fixed, READ_FIXED, READ) + write
        sqes["fd"] = fd
        sqes["offset"] = offset
        sqes["address"] = address
        sqes["nbytes"] = np.minimum(nbytes, LARGEST)
        sqes["buffer"] = np.where(fixed, buffer - 1, 0)
        sqes["key"] = np.arange(first, first + len(new)) + (self._generation << 32)
        put = int(self.words[self.put])
        self.sqes[(put + np.arange(len(new))) % self.entries] = sqes
        self.words[self.put] = (put + len(new)) & WORD
        return len(new)


class Ring(Threads):
    """A ring for each thread that makes requests; a poisoned ring is replaced."""

    name = "ring"

    def __init__(self, memory: Sequence[tuple[int, int]] = (), entries: int = 512) -> None:
        super().__init__()
        self._requested = (memory, entries)
        self._local = threading.local()
        self._local.ring = one = OneRing(memory, entries)
        self.notes = one.notes

    def carry(self, requests: Sequence[Request], tell: Ended | None) -> list[int]:
        """Execute requests by the ring of this thread, or as `Threads` if it gets none."""
        ring = getattr(self._local, "ring", None)
        if ring is None or ring.poisoned:
            try:
                ring = self._local.ring = OneRing(*self._requested)
            except OSError as error:
                self.notes = (f"a thread had no ring ({error.strerror})",)
                return super().carry(requests, tell)
            self.notes = ring.notes or self.notes
        return ring.run(requests, tell)

    def close(self) -> None:
        """See `Engine`. Each ring goes once its thread has left it."""
        super().close()
        self._local = threading.local()
