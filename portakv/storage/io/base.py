# SPDX-License-Identifier: Apache-2.0
"""The I/O engine protocol: an engine moves bytes between open files and memory for a disk tier.

The disk tier calls an engine in this order:

- The constructor, once for each disk tier, with memory to register ((address, bytes) pairs) and the
  most requests under way at a time for each worker (`Disk(depth=)`). It raises `OSError` if the
  system does not allow what the engine needs; then the next engine is tried
  (`portakv.storage.io.choose`).
- `Engine.run`, by any number of workers together. It blocks until all of its requests have ended.
  The caller keeps the files open and the memory alive until then, and uses both again afterwards.
- `Engine.close`, once or more often. Calls of `run` under way may end early, with `-ECANCELED` for
  what had not begun. Every later `run` moves nothing.

An engine retries what the system asks to be retried (EINTR, EAGAIN, fewer bytes than requested).
Requests that O_DIRECT refuses for their alignment go through the page cache. It never raises for a
request that fails: the result says what went wrong. If the calling thread is interrupted, by Ctrl-C
for one, `run` first ends what is under way, so that no request uses the memory any more.

`portakv conform --contract io NAME` runs these promises over an engine. Registered memory and the
depth are provisional: they may change in 0.2.0.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

#: The most requests under way for a worker, unless `Disk(depth=)` says another number.
DEPTH = 512
#: Errors of a device or a filesystem that will not bring the bytes again.
LOST = {errno.EIO, errno.ENODATA, errno.EREMOTEIO, errno.EILSEQ, errno.EBADMSG, errno.EUCLEAN}


class Request(NamedTuple):
    """Bytes to move between an open file and memory.

    Attributes:
        fd: the descriptor of the file.
        offset: of the first byte in the file.
        address: of the first byte in memory.
        nbytes: the number of bytes.
        write: True from memory to the file.
    """

    fd: int
    offset: int
    address: int
    nbytes: int
    write: bool


#: Gets the number of a request and its result.
Ended: TypeAlias = Callable[[int, int], object]


class Engine(Protocol):
    """An I/O engine of a disk tier.

    Attributes:
        name: its name in messages and statistics.
    """

    name: str

    @property
    def notes(self) -> tuple[str, ...]:
        """Return sentences on what the engine does without on this system; a plain attribute
        will do."""
        ...

    def __init__(self, memory: Sequence[tuple[int, int]] = (), depth: int = DEPTH) -> None: ...

    def run(self, requests: Sequence[Request], ended: Ended | None = None) -> list[int]:
        """Carry out requests, in any order, and return the result of each.

        A result is the number of bytes, all of them moved, or a negative errno. An errno of `LOST`
        means that the bytes will not come (``-ENODATA``: the file ends before them), ``-ECANCELED``
        that the engine was closed, and any other one that they may come later.

        Args:
            ended: called once for each request, in any order, in the calling thread, while others
                are under way. It calls nothing of the engine. What it raises is raised again once
                all requests have ended.

        Raises:
            StoreError: in a process that was forked from the one that made the engine.
        """
        ...

    def close(self) -> None:
        """End the engine; see the order of calls."""
        ...
