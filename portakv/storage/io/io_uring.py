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

from portakv.runtime import resources
from portakv.storage.io.base import DEPTH, Ended, Request
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
#: Bytes of a small request, and seconds in which more of them end after the first ones.
SMALL = 64 << 10
GATHERED = 5e-5
_COLUMNS = "opcode u1, rest0 V3, fd i4, offset i8, address i8, nbytes u4, rest1 u4, key u8"
#: The used fields of io_uring_params: sizes and flags, then offsets into the shared memory.
PARAMS = np.dtype(
    {
        "names": [
            "sq_entries",
            "cq_entries",
            "flags",
            "features",
            "sq_head",
            "sq_tail",
            "sq_array",
            "cq_head",
            "cq_tail",
            "cqes",
        ],
        "formats": ["u4"] * 10,
        "offsets": [0, 4, 8, 20, 40, 44, 64, 80, 84, 100],
        "itemsize": 120,
    }
)
SQE = np.dtype([(*each.split(),) for each in f"{_COLUMNS}, buffer u2, rest2 V22".split(", ")])
CQE = np.dtype([("key", "u8"), ("result", "i4"), ("flags", "u4")])
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = [ctypes.c_long] * 7
_libc.syscall.restype = ctypes.c_long


def system_call(*numbers: int) -> int:
    """Return the kernel's result, or a negative errno; releases the interpreter's lock."""
    result: int = _libc.syscall(*numbers, *[0] * (7 - len(numbers)))
    return result if result >= 0 else -ctypes.get_errno()


class _Queues:
    """The submission queue and the completion queue, which a ring shares with the kernel.

    Attributes:
        entries: the most requests that the submission queue holds.
        sqes: the entries of the submission queue.
        cqes: the entries of the completion queue.
        words: the shared memory, where the four counters below are.
        taken: the place of the counter of requests that the kernel has taken.
        put: the place of the counter of requests that this side has put.
        seen: the place of the counter of ends that this side has seen.
        reported: the place of the counter of ends that the kernel has reported.
    """

    def __init__(self, fd: int, params: np.void) -> None:
        self.entries = int(params["sq_entries"])
        ends = CQE.itemsize * int(params["cq_entries"])
        order = int(params["sq_array"])
        first_end = int(params["cqes"])
        map_ = partial(mmap.mmap, fd, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        shared = np.frombuffer(map_(max(order + 4 * self.entries, first_end + ends)), np.uint8)
        self.words = shared.view(np.uint32)
        self.cqes = shared[first_end:][:ends].view(CQE)
        self.sqes = np.frombuffer(map_(SQE.itemsize * self.entries, offset=SQES_AT), SQE)
        self.taken = int(params["sq_head"]) // 4
        self.put = int(params["sq_tail"]) // 4
        self.seen = int(params["cq_head"]) // 4
        self.reported = int(params["cq_tail"]) // 4
        # The kernel takes the entries in their order.
        self.words[order // 4 :][: self.entries] = np.arange(self.entries)

    def count(self, first: int, past: int) -> int:
        """Return the difference of two counters, given their places."""
        return (int(self.words[past]) - int(self.words[first])) & WORD

    def in_flight(self) -> int:
        """Return the number of requests that were put and whose ends were not seen."""
        return self.count(self.seen, self.put)

    def take_back(self) -> None:
        """Take back the requests that the kernel has not taken."""
        self.words[self.put] = self.words[self.taken]


class _Buffers:
    """The memory that a ring has registered with the kernel, in address order.

    The first buffer has no bytes, so that each address is after the start of a buffer.
    """

    def __init__(self, fd: int, memory: Sequence[tuple[int, int]]) -> None:
        cuts = [(at, start + n) for start, n in memory for at in range(start, start + n, LARGEST)]
        buffers = [(0, 0), *((at, min(LARGEST, past - at)) for at, past in sorted(cuts))]
        vectors = np.array(buffers, np.int64)
        code = system_call(REGISTER, fd, 0, vectors[1:].ctypes.data, len(cuts)) if cuts else 0
        self.notes: tuple[str, ...] = ()
        if code < 0:
            vectors = vectors[:1]
            why = _refusal(-code)
            self.notes = (f"no buffers are registered ({why}); it costs CPU",)
        self._starts = vectors[:, 0]
        self._ends = vectors.sum(axis=1)

    def find(self, address: np.ndarray, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which requests lie in one buffer, and the kernel's number of that buffer."""
        buffer = np.searchsorted(self._starts, address, "right") - 1
        fixed = address + nbytes <= self._ends[buffer]
        return fixed, np.where(fixed, buffer - 1, 0)


class _Batch:
    """The requests of one call, and their results."""

    def __init__(self, requests: Sequence[Request], generation: int) -> None:
        self.requests = requests
        self.rows = np.array(requests, np.int64).reshape(-1, 5)
        # Small requests that end within a moment are reported together, as each wait for the next
        # one costs the interpreter.
        self.small = len(requests) > 1 and int(self.rows[:, 3].sum()) < SMALL * len(requests)
        self.first_key = generation << 32  # the key of a request is this and its number
        self.begun = 0  # requests that were put
        self.code = 0  # the negative errno for which no further request begins
        self.results: list[int | None] = [None] * len(requests)

    def follows(self) -> bool:
        """Return True if requests are left that were not put."""
        return self.begun < len(self.rows)

    def ended(self) -> list[int]:
        """Return the result of each request; also of a request that never ended."""
        missing = self.code or -errno.ECANCELED
        return [missing if result is None else result for result in self.results]


def _refusal(number: int) -> str:
    """Return why the kernel refuses a ring or its buffers, with what to look at."""
    text = os.strerror(number)
    if number == errno.ENOMEM:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        allowed = "any number of" if soft == resource.RLIM_INFINITY else str(soft)
        return f"{text}; see ulimit -l, which allows {allowed} bytes, and the memory of the cgroup"
    if number in resources.NONE_FREE:
        return f"{text}; {resources.reason(OSError(number, text))}"
    if number in (errno.EPERM, errno.EACCES):
        return f"{text}; see kernel.io_uring_disabled, and the container's profile"
    if number == errno.ENOSYS:
        return f"{text}; the kernel has no io_uring, or the container's profile hides it"
    return text


def _set_up(entries: int) -> tuple[int, int, np.void]:
    """Return the descriptor of a new ring, its flags, and the parameters that the kernel chose."""
    for flags in FLAGS:
        params = np.zeros(1, PARAMS)
        params["flags"] = flags
        fd = system_call(SETUP, entries, params.ctypes.data)
        if fd != -errno.EINVAL:
            break
    if fd < 0:
        raise OSError(-fd, f"the kernel rejects io_uring: {_refusal(-fd)}")
    return fd, flags, params[0]


class OneRing:
    """The ring of one thread, closed when its last reference goes.

    Raises `OSError` if the kernel refuses it. A ``poisoned`` ring failed, or reported a request
    that it did not have, and must not be used again.
    """

    def __init__(self, memory: Sequence[tuple[int, int]], depth: int) -> None:
        fd, flags, params = _set_up(depth)
        # Not at exit: a daemon thread may use it until the very end.
        weakref.finalize(self, os.close, fd).atexit = False
        unordered = flags == FLAGS[1] and os.uname().machine != "x86_64"
        if ~int(params["features"]) & FEATURES or unordered:
            raise OSError(errno.ENOSYS, "its io_uring is too old; Linux 6.1 is needed")
        self.fd = fd
        self.queues = _Queues(fd, params)
        # The kernel rounds the entries up to a power of two, or down to its limit.
        self._depth = min(depth, self.queues.entries)
        self.poisoned = False
        self._generation = 0
        self._buffers = _Buffers(fd, memory)
        self.notes = self._buffers.notes

    def run(self, requests: Sequence[Request], tell: Ended | None = None) -> list[int]:
        """Carry out requests as `Engine.run`, but report none that the kernel never ended."""
        self._generation = (self._generation + 1) % LARGEST  # fits a key
        batch = _Batch(requests, self._generation)
        to_the_end(partial(self._execute, batch, tell))
        self.poisoned |= batch.code < 0
        return batch.ended()

    def _execute(self, batch: _Batch, tell: Ended | None, stopped: bool) -> None:
        """Put the requests of a batch, and wait for the ends of all requests in flight.

        If ``stopped``, put no request and report none.
        """
        queues = self.queues
        batch.code = -errno.ECANCELED if stopped else 0
        while (batch.follows() and not batch.code) or queues.in_flight():
            if batch.code:  # the kernel must not take the requests that it has not taken yet
                queues.take_back()
            elif batch.follows():
                batch.begun += self._put(batch)
            elif tell and batch.small:
                time.sleep(GATHERED)
            # Wait for all requests, for half if more follow, or for one to report.
            in_flight = queues.in_flight()
            least = (in_flight + 1) // 2 if batch.follows() else in_flight
            self._enter(batch, min(least, 1) if tell else least)
            new = self._note_ends(batch)
            if tell and not stopped:
                _report(new, tell)

    def _put(self, batch: _Batch) -> int:
        """Put the next requests that the depth admits; return their number."""
        queues = self.queues
        first = batch.begun
        new = batch.rows[first : first + self._depth - queues.in_flight()]
        fd, offset, address, nbytes, write = new.T
        fixed, buffer = self._buffers.find(address, nbytes)
        sqes = np.zeros(len(new), SQE)
        sqes["opcode"] = np.where(fixed, READ_FIXED, READ) + write
        sqes["fd"] = fd
        sqes["offset"] = offset
        sqes["address"] = address
        sqes["nbytes"] = np.minimum(nbytes, LARGEST)
        sqes["buffer"] = buffer
        sqes["key"] = np.arange(first, first + len(new)) + batch.first_key
        put = int(queues.words[queues.put])
        queues.sqes[(put + np.arange(len(new))) % queues.entries] = sqes
        queues.words[queues.put] = (put + len(new)) & WORD
        return len(new)

    def _enter(self, batch: _Batch, least: int) -> None:
        """Have the kernel take all requests that were put, and wait for at least so many ends."""
        put = self.queues.count(self.queues.taken, self.queues.put)
        code = system_call(ENTER, self.fd, put, least, GETEVENTS)
        if code < 0:
            if code not in PASSING:
                batch.code = code
            time.sleep(0.001)  # short of memory, the kernel may report so again immediately

    def _note_ends(self, batch: _Batch) -> list[tuple[int, int]]:
        """Note the ends that the kernel has reported; return the new numbers with their results."""
        queues = self.queues
        seen = int(queues.words[queues.seen])
        ends = queues.count(queues.seen, queues.reported)
        cqes = queues.cqes[(seen + np.arange(ends)) % len(queues.cqes)]
        requests = batch.requests
        results = batch.results
        new = list[tuple[int, int]]()
        for key, result in zip(cqes["key"].tolist(), cqes["result"].tolist(), strict=True):
            number = key - batch.first_key
            if not 0 <= number < len(results) or results[number] is not None:
                self.poisoned = True
                continue
            if result in AGAIN or 0 <= result < requests[number].nbytes:
                result = carry(requests[number])
            results[number] = result
            new.append((number, result))
        # Before the reports to the caller, which may take long.
        queues.words[queues.seen] = (seen + ends) & WORD
        return new


def _report(new: Sequence[tuple[int, int]], tell: Ended) -> None:
    """Report the results of requests, by their numbers."""
    for number, result in new:
        tell(number, result)


class Ring(Threads):
    """A ring for each thread that makes requests; a poisoned ring is replaced."""

    name = "ring"

    def __init__(self, memory: Sequence[tuple[int, int]] = (), depth: int = DEPTH) -> None:
        super().__init__(memory, depth)
        self._requested = (memory, depth)
        self._local = threading.local()
        self._local.ring = one = OneRing(memory, depth)
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
        """End the engine as `Engine.close`; each ring goes once its thread has left it."""
        super().close()
        self._local = threading.local()
