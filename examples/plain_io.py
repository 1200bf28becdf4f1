# SPDX-License-Identifier: Apache-2.0
"""The smallest I/O engine: it carries out one request after the other, in the calling thread.

`PORTAKV_IO=portakv_examples.plain_io:Plain` chooses it, and
`portakv conform --contract io portakv_examples.plain_io:Plain` judges it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence

from portakv.ext import Request


class Plain:
    """Plain calls of the system."""

    name = "plain"
    notes = ("requests are carried out one after the other",)

    def __init__(self, memory: Sequence[tuple[int, int]] = (), depth: int = 512) -> None:
        """Make the engine, which needs neither the memory nor the depth."""
        self._closed = False

    def run(
        self, requests: Sequence[Request], ended: Callable[[int, int], object] | None = None
    ) -> list[int]:
        """Carry out requests, and return the bytes or the negative errno of each."""
        results = []
        for number, request in enumerate(requests):
            results.append(-errno.ECANCELED if self._closed else carry(request))
            if ended is not None:
                ended(number, results[-1])
        return results

    def close(self) -> None:
        """Move nothing any more."""
        self._closed = True


def carry(request: Request) -> int:
    """Carry out one request; what O_DIRECT refuses for its alignment goes by the page cache."""
    move = os.pwritev if request.write else os.preadv
    memory = memoryview((ctypes.c_ubyte * request.nbytes).from_address(request.address))
    fd = request.fd
    moved = 0
    try:
        while moved < request.nbytes:
            try:
                count = move(fd, [memory[moved:]], request.offset + moved)
            except OSError as error:
                if error.errno != errno.EINVAL or fd != request.fd:
                    raise
                mode = os.O_RDWR if request.write else os.O_RDONLY
                fd = os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC)
                continue
            if not count:
                return -errno.ENODATA
            moved += count
    except OSError as error:
        return -(error.errno or errno.EIO)
    finally:
        if fd != request.fd:
            os.close(fd)
    return moved
