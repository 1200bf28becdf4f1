# SPDX-License-Identifier: Apache-2.0
"""The engine `threads`: preadv and pwritev for block stores, if the system refuses `ring`."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from fcntl import F_GETFL, fcntl

from portakv.errors import StoreError
from portakv.runtime.devices import this_process
from portakv.storage.engine import Ended, Request


def to_the_end(go: Callable[[bool], None]) -> None:
    """Call ``go(False)``. If Ctrl-C, for one, breaks it, ``go(True)`` ends what is under way before
    that is raised: nobody may still use the memory of a caller who goes on."""
    try:
        go(False)
    except BaseException:
        while True:
            with suppress(BaseException):
                go(True)
                break
        raise


def carry(request: Request) -> int:
    """What `Engine.run` returns for one request. What O_DIRECT refuses for its alignment goes by
    the page cache instead, through another descriptor of the same file."""
    move, fd, moved = os.pwritev if request.write else os.preadv, request.fd, 0
    try:
        memory = memoryview((ctypes.c_ubyte * request.nbytes).from_address(request.address))
        while moved < request.nbytes:
            try:
                got = move(fd, [memory[moved:]], request.offset + moved)
            except OSError as error:
                mode = fcntl(fd, F_GETFL)
                if error.errno != errno.EINVAL or not mode & os.O_DIRECT:
                    raise
                fd = os.open(f"/proc/self/fd/{fd}", mode & os.O_ACCMODE | os.O_CLOEXEC)
                continue
            if not got:
                return -errno.ENODATA
            moved += got
    except Exception as error:
        return -(getattr(error, "errno", None) or errno.EIO)
    finally:
        if fd != request.fd:
            os.close(fd)
    return moved


class Threads:
    """Eight threads that carry one request each at a time."""

    name = "threads"
    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._process, self._closed = this_process(), False
        self._pool = ThreadPoolExecutor(8, "portakv io")

    def run(self, requests: Sequence[Request], ended: Ended | None = None) -> list[int]:
        """See `Engine`. Raises `StoreError` in a process forked from the one that made it."""
        if self._process.forked:
            raise StoreError(
                f"I/O engine {self.name!r} was used in a forked process; open it there."
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
        """By the threads; what was not begun when the engine closed is cancelled, and not told."""
        ends = {Future[int](): number for number in range(len(requests))}

        def work(end: Future[int], request: Request) -> None:
            if end.set_running_or_notify_cancel():
                end.set_result(carry(request))

        def go(stopped: bool) -> None:
            full = False
            try:
                for each in () if stopped else zip(ends, requests, strict=True):
                    self._pool.submit(work, *each)
            except RuntimeError:  # closed, at the interpreter's end, or no thread to be had
                full = True
            begun = [end for end in ends if not ((stopped or full) and end.cancel())]
            if tell and not stopped:
                for end in as_completed(begun):
                    tell(ends[end], end.result())
            wait(begun)

        to_the_end(go)
        return [-errno.ECANCELED if end.cancelled() else end.result() for end in ends]

    def close(self) -> None:
        """See `Engine`."""
        self._closed = True
        self._pool.shutdown(wait=False)
