# SPDX-License-Identifier: Apache-2.0
"""How a disk tier reads and writes: requests, and what carries them out."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

#: What a device or a filesystem says of bytes that it will not bring again.
LOST = {errno.EIO, errno.ENODATA, errno.EREMOTEIO, errno.EILSEQ, errno.EBADMSG, errno.EUCLEAN}


class Request(NamedTuple):
    """Bytes between an open file and memory, which the caller keeps until `Engine.run` returns."""

    fd: int
    offset: int
    address: int
    nbytes: int
    write: bool


#: Is told the number of a request and its result.
Ended: TypeAlias = Callable[[int, int], object]


class Engine(Protocol):
    """Carries requests out for any number of threads. ``run`` returns when all have ended: the
    bytes of each, all moved, or a negative errno: of `LOST` (``-ENODATA``: the file ends before)
    the bytes will not come, of others they may; after ``close`` it is ``-ECANCELED``. ``ended`` is
    told once of each, in any order, in the thread that called ``run``, while others are under way;
    it asks nothing of the engine, and what it raises is raised once all have ended. ``notes`` tell
    what it does without."""

    name: str
    notes: tuple[str, ...]

    def run(self, requests: Sequence[Request], ended: Ended | None = None) -> list[int]: ...
    def close(self) -> None: ...
