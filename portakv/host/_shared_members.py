# SPDX-License-Identifier: Apache-2.0
"""Which processes are attached to a file, told by locks that the kernel drops when one dies.

Locks belong to an open file description (``F_OFD_SETLK``), so neither a number of a process that is
used again, nor another container's numbering, nor a second opening in one process deceives them.
Byte 0 is held while the file's tables are changed; byte ``1 + i`` as long as member ``i`` lives.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import numpy as np
import numpy.typing as npt

from portakv.errors import HostMemoryError

#: One attached process; ``pid`` 0: a free place. ``noticed``: when its lock was first found free.
RECORD = np.dtype([("pid", "i8"), ("space", "i8"), ("started", "i8"), ("noticed", "f8"),
                   ("name", "S32")])  # fmt: skip
_GRACE = 1.0  # seconds until a dead process of another container has let go of its devices
_PATIENCE = 30.0  # seconds to wait for a change of the tables, which takes microseconds

_open: weakref.WeakSet[FileLocks] = weakref.WeakSet()


class FileLocks:
    """Locks on single bytes of an open file, for this opening of it."""

    def __init__(self, fd: int) -> None:
        self.fd, self._process, self._threads = fd, os.getpid(), threading.Lock()
        _open.add(self)
        _watch_forks()

    def take(self, byte: int) -> bool:
        """Lock a byte, or say at once that another opening of the file has it."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK, byte))
        except (BlockingIOError, PermissionError):  # EAGAIN, EACCES: two names of one answer
            return False
        return True

    def give(self, byte: int) -> None:
        """Unlock a byte."""
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_UNLCK, byte))

    def taken(self, byte: int) -> bool:
        """True if another opening of the file has the byte locked."""
        answer = fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, byte))
        return bool(struct.unpack(_LAYOUT, answer)[0] != fcntl.F_UNLCK)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Inside, no other process or thread changes the tables.

        A process that dies inside leaves the lock to the next. Raises `HostMemoryError` if one
        that lives does not let go of it.
        """
        with self._threads:
            until, pause = time.monotonic() + _PATIENCE, 20e-6
            while not self.take(0):
                if time.monotonic() > until:
                    raise HostMemoryError(
                        f"A shared pool was used, and another process has held its tables for "
                        f"{_PATIENCE:g} s; it may be stopped. Continue it, or end it."
                    )
                time.sleep(pause)
                pause = min(2 * pause, 1e-3)
            try:
                yield
            finally:
                self.give(0)

    def close(self) -> None:
        """Drop every lock. Again, or in a forked process: nothing, as they are its parent's."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Members:
    """The attached processes, in a table of `RECORD` that all of them see; ``me``: this one's."""

    def __init__(self, locks: FileLocks, table: npt.NDArray[np.void]) -> None:
        self._locks, self._table = locks, table
        self.me = -1

    def join(self, name: str) -> bool:
        """Take a free place; False if there is none. Inside `FileLocks.exclusive`."""
        for place in np.flatnonzero(self._table["pid"] == 0).tolist():
            if self._locks.take(1 + place):
                self._table["name"][place] = str(name).encode()[:32]
                self._table["noticed"][place] = 0.0
                self._table["started"][place] = _started(os.getpid()) or 0
                self._table["space"][place] = _space()
                self._table["pid"][place] = os.getpid()  # last: until then the place is free
                self.me = place
                return True
        return False

    def leave(self) -> None:
        """Give the place back. Inside `FileLocks.exclusive`."""
        if self.me >= 0:
            self._table["pid"][self.me] = 0
            self._locks.give(1 + self.me)
            self.me = -1

    def attached(self) -> list[int]:
        """The places of all processes that joined and did not leave, dead or alive."""
        return [int(place) for place in np.flatnonzero(self._table["pid"])]

    def dead(self) -> list[int]:
        """The places of processes that ended without leaving, if their devices write no more."""
        return [place for place in self.attached() if place != self.me and self._gone(place)]

    def bury(self, place: int) -> None:
        """Make the place of a dead process free. Inside `FileLocks.exclusive`."""
        self._table["pid"][place] = 0

    def describe(self, place: int) -> str:
        """Who has a place, in words."""
        name = self._table["name"][place].decode(errors="replace")
        return f"{name or 'a process'} ({int(self._table['pid'][place])})"

    def _gone(self, place: int) -> bool:
        if self._locks.taken(1 + place):
            return False
        record = self._table[place]
        if int(record["space"]) == _space():
            # The kernel closes a dying process's files one after the other: this lock may be free
            # while its device still writes. A process that is a zombie has closed them all.
            return _started(int(record["pid"])) != int(record["started"])
        if record["noticed"] == 0.0:
            self._table["noticed"][place] = time.monotonic()
        return bool(time.monotonic() - float(self._table["noticed"][place]) > _GRACE)


_LAYOUT = "hhqqi4x"  # struct flock of 64-bit Linux


def _lock(kind: int, byte: int) -> bytes:
    return struct.pack(_LAYOUT, kind, os.SEEK_SET, byte, 1, 0)


def _space() -> int:
    """Whose numbering of processes this is: containers have their own."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _started(pid: int) -> int | None:
    """When a process began, which tells it from a later one of its number; None: it is over."""
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()  # from the state on
        return None if fields[0] in "ZX" else int(fields[19])
    return None


@cache
def _watch_forks() -> None:
    """A child must not keep its parent's locks alive."""

    def close_all() -> None:
        for each in list(_open):
            each.close()

    os.register_at_fork(after_in_child=close_all)
