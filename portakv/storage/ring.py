# SPDX-License-Identifier: Apache-2.0
"""The engine `ring`: Linux's io_uring for block stores, by ctypes and numpy. It needs no memory
barrier: the kernel takes requests, and with DEFER_TASKRUN tells of their ends, inside a call of the
thread that owns the ring (without it only x86-64 is served, whose loads and stores are in order).
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

import numpy as np

from portakv.storage.engine import Request
from portakv.storage.threads import Threads, carry

SETUP, ENTER, REGISTER = 425, 426, 427  # the same on every architecture but alpha
# CLAMP with SUBMIT_ALL, SINGLE_ISSUER, DEFER_TASKRUN (Linux 6.1) and NO_SQARRAY (6.6); less; least
FLAGS = (0x13090, 0x3090, 0x10)
FEATURES = 0x103  # SINGLE_MMAP, NODROP, EXT_ARG: Linux 5.11
GETEVENTS_EXT_ARG, SQES_AT, DONTFORK = 9, 0x10000000, 10
READ, READ_FIXED = 22, 4  # one more is WRITE, WRITE_FIXED
INTERRUPTED, TRIES = (-errno.EINTR, -errno.EAGAIN), 8  # a request is made again so often
PASSING = (*INTERRUPTED, -errno.EBUSY, -errno.ETIME)  # of ENTER: call it again
WORD, LARGEST = 0xFFFFFFFF, 1 << 30  # bytes of a registered buffer, and of one move
_COLUMNS = "opcode u1, rest0 V3, fd i4, offset i8, address i8, nbytes u4, rest1 u4, key u8"
SQE = np.dtype([(*each.split(),) for each in f"{_COLUMNS}, buffer u2, rest2 V22".split(", ")])
CQE = np.dtype([("key", "u8"), ("result", "i4"), ("flags", "u4")])
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes, _libc.syscall.restype = [ctypes.c_long] * 7, ctypes.c_long
_libc.mmap.argtypes, _libc.mmap.restype = [ctypes.c_long] * 6, ctypes.c_long
_libc.madvise.argtypes, _libc.munmap.argtypes = [ctypes.c_long] * 3, [ctypes.c_long] * 2


def system_call(*numbers: int) -> int:
    """What the kernel returns, or a negative errno; without the interpreter's lock."""
    result: int = _libc.syscall(*numbers, *[0] * (7 - len(numbers)))
    return result if result >= 0 else -ctypes.get_errno()


class Batch:
    """The requests of one `run`: what is left of each, and how it ended."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.left = np.array(requests, np.int64).reshape(-1, 5)
        self.results: list[int] = self.left[:, 3].tolist()
        self.waiting = [index for index, nbytes in enumerate(self.results) if nbytes]
        self.under_way: dict[int, int] = {}  # and its bytes
        self.tries = [TRIES] * len(self.results)

    def ended(self, index: int, got: int) -> bool:
        """Note what the kernel told of a request; False if none was under way."""
        nbytes = self.under_way.pop(index, None)
        if nbytes is None or got == nbytes:
            return nbytes is not None
        again = got in INTERRUPTED and self.tries[index] > 0
        if got > 0 or again:  # a short one goes on from where it ended
            self.left[index] += np.array([0, 1, 1, -1, 0]) * max(got, 0)
            self.tries[index] -= again
            self.waiting.append(index)
        elif got != -errno.EINVAL:
            self.results[index] = got or -errno.ENODATA
        elif (got := carry(Request(*self.left[index].tolist()))) < 0:  # perhaps for its alignment
            self.results[index] = got
        return True


class OneRing:
    """The ring of one thread, until nobody refers to it; `OSError` if the kernel refuses it. One
    that is ``poisoned`` failed, or told of what nobody asked for, and is not to be used again."""

    def __init__(self, memory: Sequence[tuple[int, int]], entries: int) -> None:
        for flags in FLAGS:
            said = np.array([0, 0, flags, *[0] * 27], np.uint32)  # io_uring_params
            if (fd := system_call(SETUP, entries, said.ctypes.data)) != -errno.EINVAL:
                break
        if fd < 0:
            why = f"{os.strerror(-fd)}; see kernel.io_uring_disabled, and the container's profile"
            raise OSError(-fd, f"io_uring is refused: {why}")
        maps: list[tuple[int, int]] = []
        # Not at exit: a daemon thread may use it until the very end.
        weakref.finalize(self, _release, fd, maps, os.getpid()).atexit = False
        if ~int(said[5]) & FEATURES or (flags == FLAGS[2] and os.uname().machine != "x86_64"):
            raise OSError(errno.ENOSYS, "its io_uring is too old; Linux 6.1 has what is needed")
        self.fd, self.entries, ends = fd, int(said[0]), CQE.itemsize * int(said[1])
        sq, cq = said[10:20].tolist(), said[20:30].tolist()
        shared = _map(fd, max(sq[6] + 4 * self.entries, cq[5] + ends), 0, maps)
        self.words, self.cqes = shared.view(np.uint32), shared[cq[5] :][:ends].view(CQE)
        self.sqes = _map(fd, SQE.itemsize * self.entries, SQES_AT, maps).view(SQE)
        # Where four counters stand: taken by the kernel, put here; seen here, told by the kernel.
        self.taken, self.put, self.seen, self.told = (at // 4 for at in (*sq[:2], *cq[:2]))
        if flags != FLAGS[0]:
            self.words[sq[6] // 4 :][: self.entries] = np.arange(self.entries)
        self._second = np.array([0, 0, 0, 1, 0], np.int64)  # getevents_arg, timespec
        self._second[2] = self._second.ctypes.data + 24
        self.poisoned, self._generation = False, 0
        cuts = [(at, start + n) for start, n in memory for at in range(start, start + n, LARGEST)]
        vectors = np.array([(at, min(LARGEST, past - at)) for at, past in sorted(cuts)], np.int64)
        code = system_call(REGISTER, fd, 0, vectors.ctypes.data, len(cuts)) if cuts else 0
        vectors = np.array([(0, 0), *vectors[: len(cuts) if code >= 0 else 0]])  # the first: none
        self._starts, self._ends = vectors[:, 0], vectors.sum(axis=1)
        why = f"no buffers are registered ({os.strerror(-code)}), see ulimit -l; it costs CPU"
        self.notes = (why,) if code < 0 else ()

    def run(self, requests: Sequence[Request]) -> list[int]:
        """See `Engine`."""
        batch, stop, error = Batch(requests), 0, None
        self._generation = (self._generation + 1) & WORD
        while (batch.waiting and not stop) or self._count(self.seen, self.put):
            try:
                if stop:  # what the kernel has not taken yet it shall not take
                    self.words[self.put] = self.words[self.taken]
                else:
                    self._fill(batch)
                least = self._count(self.seen, self.put) // (2 if batch.waiting else 1)
                until, put = self._second.ctypes.data, self._count(self.taken, self.put)
                code = system_call(ENTER, self.fd, put, least, GETEVENTS_EXT_ARG, until, 24)
                if code < 0:
                    stop = stop if code in PASSING else code
                    time.sleep(0.001)  # short of memory, it may say so at once again
                seen, ends = int(self.words[self.seen]), self._count(self.seen, self.told)
                cqes = self.cqes[(seen + np.arange(ends)) % len(self.cqes)]
                for key, got in zip(cqes["key"].tolist(), cqes["result"].tolist(), strict=True):
                    self.poisoned |= not batch.ended(key - (self._generation << 32), got)
                self.words[self.seen] = (seen + ends) & WORD
            except BaseException as raised:  # Ctrl-C, for one: the kernel still writes to memory
                error, stop = raised, -errno.ECANCELED
        self.poisoned |= stop < 0
        if error is not None:
            raise error
        for index in (*batch.waiting, *batch.under_way):
            batch.results[index] = stop or -errno.EIO
        return batch.results

    def _count(self, first: int, past: int) -> int:
        return (int(self.words[past]) - int(self.words[first])) & WORD

    def _fill(self, batch: Batch) -> None:
        """Put as many requests as there is room for."""
        new = batch.waiting[: self.entries - self._count(self.seen, self.put)]
        fd, offset, address, nbytes, write = batch.left[new].T
        batch.under_way.update(zip(new, nbytes.tolist(), strict=True))
        nbytes = np.minimum(nbytes, LARGEST)
        buffer = np.searchsorted(self._starts, address, "right") - 1
        fixed = address + nbytes <= self._ends[buffer]
        put, sqes = int(self.words[self.put]), np.zeros(len(new), SQE)
        sqes["opcode"], sqes["fd"] = np.where(fixed, READ_FIXED, READ) + write, fd
        sqes["offset"], sqes["address"], sqes["nbytes"] = offset, address, nbytes
        sqes["buffer"] = np.where(fixed, buffer - 1, 0)
        sqes["key"] = np.array(new, np.uint64) + np.uint64(self._generation << 32)
        self.sqes[(put + np.arange(len(new))) % self.entries] = sqes
        self.words[self.put] = (put + len(new)) & WORD
        del batch.waiting[: len(new)]


class Ring(Threads):
    """A ring for each thread that asks; one that was poisoned is replaced."""

    name = "ring"

    def __init__(self, memory: Sequence[tuple[int, int]] = (), entries: int = 512) -> None:
        super().__init__()
        self._asked, self._local = (memory, entries), threading.local()
        self.notes = OneRing(memory, entries).notes

    def carry(self, requests: Sequence[Request]) -> list[int]:
        """By the ring of this thread, or as `Threads` if it gets none."""
        ring = getattr(self._local, "ring", None)
        if ring is None or ring.poisoned:
            try:
                ring = self._local.ring = OneRing(*self._asked)
            except OSError as error:
                self.notes = (f"a thread had no ring ({error.strerror})",)
                return super().carry(requests)
            self.notes = ring.notes or self.notes
        return ring.run(requests)

    def close(self) -> None:
        """See `Engine`. Each ring goes once its thread has left it."""
        super().close()
        self._local = threading.local()


def _map(fd: int, nbytes: int, offset: int, maps: list[tuple[int, int]]) -> np.ndarray:
    """Memory that the kernel shares, not mapped in a forked child; `_release` ends it."""
    flags, access = mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ | mmap.PROT_WRITE
    if (address := _libc.mmap(0, nbytes, access, flags, fd, offset)) == -1:
        raise OSError(ctypes.get_errno(), "the memory of io_uring could not be mapped")
    maps.append((address, nbytes))
    _libc.madvise(address, nbytes, DONTFORK)
    return np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address))


def _release(fd: int, maps: list[tuple[int, int]], pid: int) -> None:
    for address, nbytes in maps if os.getpid() == pid else ():  # a child may have others there
        _libc.munmap(address, nbytes)
    os.close(fd)
