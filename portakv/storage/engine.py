# SPDX-License-Identifier: Apache-2.0
"""How a disk tier reads and writes: requests, and which engine carries them out here."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from portakv.backends.base import Decision
from portakv.errors import InvalidTerms, StoreError

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


def choose(
    memory: Sequence[tuple[int, int]] = (), name: str | None = None, entries: int = 512
) -> tuple[Engine, list[Decision]]:
    """The first engine that runs here, or the one that ``PORTAKV_IO`` or else ``name`` forces, and
    what each that was asked said. ``memory`` (address, bytes) is registered with the kernel."""
    asked, said = os.environ.get("PORTAKV_IO") or name, list[Decision]()
    if asked not in (None, "ring", "threads"):
        raise InvalidTerms(f"I/O engine {asked!r} was asked for; expected ring or threads.")
    for each in (asked,) if asked else ("ring", "threads"):
        try:
            from portakv.storage.ring import Ring  # which may need a descriptor
            from portakv.storage.threads import Threads

            engine = Ring(memory, entries) if each == "ring" else Threads()
        except OSError as error:
            said.append(Decision(each, False, str(error.strerror)))
        else:
            said.append(Decision(each, True, "; ".join(engine.notes) or "it has all that it uses"))
            return engine, said
    raise StoreError(
        f"I/O engine {asked or 'ring or threads'!r} was asked for, and found was "
        f"{' and '.join(map(str, said))}. Mend that, or take threads."
    )
