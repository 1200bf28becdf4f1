# SPDX-License-Identifier: Apache-2.0
"""The engine `threads`: preadv and pwritev for block stores, if the system refuses `ring`."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from fcntl import F_GETFL, fcntl

from portakv.errors import StoreError
from portakv.runtime.devices import this_process
from portakv.storage.engine import Request


def carry(request: Request) -> int:
    """What `Engine.run` returns for one request. What O_DIRECT refuses for its alignment goes by
    the page cache instead, through another descriptor of the same file."""
    memory = memoryview((ctypes.c_ubyte * request.nbytes).from_address(request.address))
    move, fd, moved = os.pwritev if request.write else os.preadv, request.fd, 0
    try:
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
    except OSError as error:
        return -(error.errno or errno.EIO)
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

    def run(self, requests: Sequence[Request]) -> list[int]:
        """See `Engine`. Raises `StoreError` in a process forked from the one that made it."""
        if self._process.forked:
            raise StoreError(
                f"I/O engine {self.name!r} was used in a forked process; open it there."
            )
        return [-errno.ECANCELED] * len(requests) if self._closed else self.carry(requests)

    def carry(self, requests: Sequence[Request]) -> list[int]:
        """By the threads, all to their end."""
        ends = [self._pool.submit(carry, each) for each in requests]
        try:
            return [end.result() for end in ends]
        except BaseException:  # Ctrl-C, for one: no thread may still use the caller's memory
            wait([end for end in ends if not end.cancel()])
            raise

    def close(self) -> None:
        """See `Engine`."""
        self._closed = True
        self._pool.shutdown(wait=False)
