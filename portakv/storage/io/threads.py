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
from fcntl import F_GETFL, fcntl
from functools import partial
from queue import SimpleQueue

from portakv.errors import StoreError
from portakv.runtime.devices import this_process
from portakv.storage.io.base import Ended, Request


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
    move = os.pwritev if request.write else os.preadv
    fd = request.fd
    moved = 0
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
        return -(getattr(error, "errno", None) or errno.ECANCELED)
    finally:
        if fd != request.fd:
            os.close(fd)
    return moved


def serve(tasks: SimpleQueue[Callable[[], None] | None]) -> None:
    """What a thread does until its engine is closed, or gone."""
    while task := tasks.get():
        task()
        task = None  # an idle thread holds nothing
    tasks.put(None)  # for the others


class Threads:
    """Eight threads that carry one request each at a time, begun by the first; no end of the
    interpreter waits for them."""

    name = "threads"
    notes: tuple[str, ...] = ()

    def __init__(self, memory: Sequence[tuple[int, int]] = (), entries: int = 0) -> None:
        """Make the engine; it needs neither ``memory`` nor ``entries``."""
        self._process = this_process()
        self._closed = False
        self._tasks = SimpleQueue[Callable[[], None] | None]()
        self._begun = 0
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, self._tasks.put, None)
        self._end.atexit = False

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
        """By the threads, or the caller's if the system gives none; what was not begun when the
        engine closed is cancelled, and may not be told."""
        if not self._begin():
            return [-errno.ECANCELED if self._closed else carry(each) for each in requests]
        ends = [Future[int]() for _ in requests]
        done = SimpleQueue[int]()

        def work(number: int, request: Request) -> None:
            if self._closed:
                ends[number].cancel()
            if ends[number].set_running_or_notify_cancel():
                ends[number].set_result(carry(request))
            done.put(number)

        def go(stopped: bool) -> None:
            for each in () if stopped else enumerate(requests):
                self._tasks.put(partial(work, *each))
            # Once it is closed, nobody may come for what was put since.
            begun = [end for end in ends if not ((stopped or self._closed) and end.cancel())]
            for _ in begun if tell and not stopped else ():
                if tell and not ends[number := done.get()].cancelled():
                    tell(number, ends[number].result())
            for end in begun:  # `wait` of all, if it is broken, may keep their locks
                with suppress(CancelledError):
                    end.result()

        to_the_end(go)
        return [-errno.ECANCELED if end.cancelled() else end.result() for end in ends]

    def _begin(self) -> int:
        """Begin the threads that there are not yet; how many there are."""
        with self._lock, suppress(RuntimeError):  # the system gives no more, or none at its end
            while self._begun < 8:
                terms = serve, f"portakv io {self._begun}", (self._tasks,)
                threading.Thread(None, *terms, daemon=True).start()
                self._begun += 1
        return self._begun

    def close(self) -> None:
        """See `Engine`."""
        self._closed = True
        self._end()
