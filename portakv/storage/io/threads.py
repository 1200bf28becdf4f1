# SPDX-License-Identifier: Apache-2.0
"""The engine `threads`: preadv and pwritev for block stores, if the system refuses `ring`."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue

from portakv.errors import StoreError
from portakv.runtime.devices import this_process
from portakv.runtime.linux import fcntl
from portakv.storage.io.base import DEPTH, Ended, Request

#: More threads only wait for the interpreter's lock.
MOST_THREADS = 8


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


def carry(request: Request) -> int:
    """Execute one request, and return its result as `Engine.run` does.

    A request that O_DIRECT refuses for its alignment goes through the page cache, by another
    descriptor of the same file.
    """
    move = os.pwritev if request.write else os.preadv
    fd = request.fd
    moved = 0
    try:
        memory = memoryview((ctypes.c_ubyte * request.nbytes).from_address(request.address))
        while moved < request.nbytes:
            try:
                got = move(fd, [memory[moved:]], request.offset + moved)
            except OSError as error:
                mode = fcntl.fcntl(fd, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not mode & os.O_DIRECT:
                    raise
                fd = os.open(f"/proc/self/fd/{fd}", mode & os.O_ACCMODE | os.O_CLOEXEC)
                continue
            if not got:
                return -errno.ENODATA
            moved += got
    except Exception as error:  # also a buffer that is gone: a request reports a number only
        return -(getattr(error, "errno", None) or errno.ECANCELED)
    finally:
        if fd != request.fd:
            os.close(fd)
    return moved


def serve(tasks: SimpleQueue[Callable[[], None] | None]) -> None:
    """Run tasks until the I/O engine is closed or gone."""
    while task := tasks.get():
        task()
        task = None  # an idle thread holds nothing
    tasks.put(None)  # for the other threads


class _Batch:
    """The requests of one call, and the ends of these requests."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.ends = [Future[int]() for _ in requests]
        # The numbers of the requests that a thread is done with, also of cancelled requests.
        self.done = SimpleQueue[int]()

    def report(self, count: int, tell: Ended) -> None:
        """Wait until ``count`` requests are done, and report each that was not cancelled."""
        for _ in range(count):
            number = self.done.get()
            end = self.ends[number]
            if not end.cancelled():
                tell(number, end.result())

    def results(self) -> list[int]:
        """Return the result of each request; all have ended."""
        return [-errno.ECANCELED if end.cancelled() else end.result() for end in self.ends]


class Threads:
    """Eight threads, or ``depth`` if it is less, that each execute one request at a time.

    All workers share the threads. The first request starts them. The end of the interpreter does
    not wait for them.
    """

    name = "threads"
    notes: tuple[str, ...] = ()

    def __init__(self, memory: Sequence[tuple[int, int]] = (), depth: int = DEPTH) -> None:
        """Make the engine; it needs no ``memory``."""
        self._process = this_process()
        self._closed = False
        self._tasks = SimpleQueue[Callable[[], None] | None]()
        self._begun = 0
        self._most = min(depth, MOST_THREADS)
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, self._tasks.put, None)
        self._end.atexit = False

    def run(self, requests: Sequence[Request], ended: Ended | None = None) -> list[int]:
        """Carry out requests as `Engine.run`; raise `StoreError` in a forked process."""
        if self._process.forked:
            raise StoreError(
                f"Expected the process that made the I/O engine {self.name!r}, got a forked "
                f"process. Make another there."
            )
        untold = set(range(len(requests) if ended else 0))

        def tell(number: int, result: int) -> None:
            untold.remove(number)
            if ended:
                ended(number, result)

        closed = [-errno.ECANCELED] * len(requests)
        results = closed if self._closed else self.carry(requests, tell if ended else None)
        for number in [*untold]:
            tell(number, results[number])
        return results

    def carry(self, requests: Sequence[Request], tell: Ended | None) -> list[int]:
        """Execute requests by the threads, or in the caller's thread if the system provides none.

        Requests that had not started when the engine closed are cancelled, and may not be reported.
        """
        if not self._begin():
            return [-errno.ECANCELED if self._closed else carry(each) for each in requests]
        batch = _Batch(requests)
        to_the_end(partial(self._execute, batch, tell))
        return batch.results()

    def _execute(self, batch: _Batch, tell: Ended | None, stopped: bool) -> None:
        """Have the threads execute a batch, and wait for its end.

        If ``stopped``, put no request, and cancel the requests that no thread has begun.
        """
        if not stopped:
            for number in range(len(batch.requests)):
                self._tasks.put(partial(self._work, batch, number))

        begun = list[Future[int]]()
        for end in batch.ends:
            # After the close no thread may take the requests that were put since.
            cancelled = (stopped or self._closed) and end.cancel()
            if not cancelled:
                begun.append(end)

        if tell and not stopped:
            batch.report(len(begun), tell)
        for end in begun:  # `wait` of all, if it is broken, may keep their locks
            with suppress(CancelledError):
                end.result()

    def _work(self, batch: _Batch, number: int) -> None:
        """Execute one request of a batch, unless it was cancelled or the engine is closed."""
        end = batch.ends[number]
        if self._closed:
            end.cancel()
        if end.set_running_or_notify_cancel():
            end.set_result(carry(batch.requests[number]))
        batch.done.put(number)

    def _begin(self) -> int:
        """Start the missing threads; return the number of threads."""
        # The system provides no more threads, or none at its end.
        with self._lock, suppress(RuntimeError):
            while self._begun < self._most:
                terms = serve, f"portakv io {self._begun}", (self._tasks,)
                threading.Thread(None, *terms, daemon=True).start()
                self._begun += 1
        return self._begun

    def close(self) -> None:
        """End the engine as `Engine.close`."""
        self._closed = True
        self._end()
