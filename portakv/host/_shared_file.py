# SPDX-License-Identifier: Apache-2.0
"""The file behind a shared pool: a header, its members, the owner of each block, then the blocks.

Each change that matters is one aligned store of 8 bytes, so a process that dies between two of them
leaves tables that mean something. The header's first word is written last.

Which processes are attached is told by locks that the kernel drops when one dies. They belong to an
open file description (``F_OFD_SETLK``), so neither a number of a process that is used again, nor
another container's numbering, nor a second opening in one process deceives them. Byte 0 is held
while the file's tables are changed; byte ``1 + i`` as long as member ``i`` lives.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from portakv.errors import HostMemoryError, SlotError
from portakv.host import _pages
from portakv.host.pool import stride as stride_of

FOLDER = Path("/dev/shm")
_PREFIX = "portakv-"
_MAGIC = 0x3130564B41545250  # changes with the layout of the file
_MEMBERS = 128
#: One attached process; ``pid`` 0: a free place. ``noticed``: when its lock was first found free.
_MEMBER = np.dtype([("pid", "i8"), ("space", "i8"), ("started", "i8"), ("noticed", "f8"),
                    ("name", "S32")])  # fmt: skip
_GRACE = 1.0  # seconds until a dead process of another container has let go of its devices
_PATIENCE = 30.0  # seconds to wait for a change of the tables, which takes microseconds

_open: weakref.WeakSet[SharedFile] = weakref.WeakSet()


#: What the file begins with: of each table its dtype and entries; None: one for each block.
_TABLES: dict[str, tuple[Any, int | None]] = {
    "magic": ("i8", 1),
    "sizes": ("i8", 3),  # bytes of a block, blocks, bytes from one to the next
    "high_water": ("i8", 1),
    "later": ("V216", 1),
    "members": (_MEMBER, _MEMBERS),
    "owners": ("i8", None),  # the owner's place among the members, plus 1; 0: free
    "generations": ("i8", None),  # how often it changed hands
    "since": ("f8", None),  # when, by the monotonic clock
    "labels": ("S40", None),  # what for
}


def _tables_bytes(blocks: int) -> int:
    """Bytes of all tables. No numpy type spans them: it counts its bytes in 32 bits."""
    counts = [(kind, blocks if count is None else count) for kind, count in _TABLES.values()]
    return sum(np.dtype(kind).itemsize * count for kind, count in counts)


class SharedFile:
    """One opening of the file, with a place among its members.

    Attributes:
        mapping: all of the file; tables: `_TABLES`, which it begins with, by their names.
        address, nbytes: of all blocks; block_bytes, blocks, stride: how they lie.
        me: the place of this process among the members; fd: the opening, whose locks hold.
    """

    def __init__(
        self, name: str, block_bytes: int | None, blocks: int | None, alignment: int, label: str
    ) -> None:
        """Open or make it, and join. Errors as `SharedPool`."""
        self.path, self.me, wanted = _path(name), -1, None
        if block_bytes is not None and blocks is not None:
            wanted = (block_bytes, blocks, stride_of(block_bytes, blocks, alignment))
        elif block_bytes is not None or blocks is not None:
            raise HostMemoryError(
                f"The shared pool {name!r} was asked for with {blocks} blocks of {block_bytes} "
                f"bytes; say both, to make it, or neither, to open it as it is."
            )
        self.fd, self._threads = -1, threading.Lock()
        _open.add(self)
        _watch_forks()
        while self.me < 0:  # the last member may remove the file before it is locked here
            self.fd = _opened(self.path, wanted is not None)
            try:
                with self.exclusive():
                    if self._named():
                        self._begin(name, wanted)
                        self._join(name, label)
            finally:
                if self.me < 0:
                    self.close()

    def take(self, byte: int) -> bool:
        """Lock a byte, or say at once that another opening of the file has it."""
        with suppress(BlockingIOError, PermissionError):  # EAGAIN, EACCES: two names of one answer
            self._call(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, byte)
            return True
        return False

    def give(self, byte: int) -> None:
        """Unlock a byte."""
        self._call(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)

    def taken(self, byte: int) -> bool:
        """True if another opening of the file has the byte locked."""
        return self._call(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK

    def _call(self, command: int, kind: int, byte: int) -> int:
        """Ask the kernel for a lock, or about one; the kind of lock that it answers."""
        flock = "hhqqi4x"  # of 64-bit Linux
        asked = struct.pack(flock, kind, os.SEEK_SET, byte, 1, 0)
        return int(struct.unpack(flock, fcntl.fcntl(self.fd, command, asked))[0])

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Inside, no other process or thread changes the tables; one that dies inside leaves the
        lock to the next. Raises `HostMemoryError` if one that lives does not let go of it."""
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

    def check(self, index: int) -> None:
        """Raise `SlotError` if there is no such block."""
        if not isinstance(index, int) or not 0 <= index < self.blocks:
            raise SlotError(
                f"Block {index!r} was asked of a shared pool of {self.blocks}; ask for one of "
                f"0 .. {self.blocks - 1}."
            )

    def assign(self, index: int) -> None:
        """Make a block this process's. Inside `exclusive`."""
        self.tables["since"][index] = time.monotonic()
        self.tables["generations"][index] += 1
        self.tables["owners"][index] = self.me + 1

    def reclaim(self) -> list[str]:
        """Free what members have that ended without leaving, if their devices write no more. Inside
        `exclusive`."""
        found = []
        pids = self.tables["members"]["pid"]
        for place in np.flatnonzero(pids).tolist():
            if place != self.me and self._gone(place):
                found.append(f"{self.describe(place)}: {self._free_all(place)} blocks")
                pids[place] = 0
        return found

    def describe(self, place: int) -> str:
        """Who has a place among the members, in words."""
        member = self.tables["members"][place]
        return f"{member['name'].decode(errors='replace') or 'a process'} ({member['pid']})"

    def leave(self, keep: bool) -> None:
        """Give back what this process has, and its place; the last removes the file."""
        if self.fd < 0:
            return
        with suppress(HostMemoryError), self.exclusive():
            self._free_all(self.me)
            self.reclaim()
            pids = self.tables["members"]["pid"]
            pids[self.me] = 0
            if not keep and not pids.any() and self._named():
                self.path.unlink(missing_ok=True)
        self.close()
        del self.mapping, self.tables  # tensors still hold the memory; nothing here does

    def _free_all(self, place: int) -> int:
        """Free the blocks of a member; how many they were."""
        theirs = np.flatnonzero(self.tables["owners"] == place + 1)
        self.tables["owners"][theirs] = 0
        return theirs.size

    def _named(self) -> bool:
        """True while the name still leads to this file."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.fd), os.stat(self.path))
        return False

    def _begin(self, name: str, wanted: tuple[int, int, int] | None) -> None:
        """Make the file, unless that was finished before, and map it."""
        magic, *found = struct.unpack("4q", os.pread(self.fd, 32, 0).ljust(32, b"\0"))
        sizes = wanted or tuple(found)
        if magic == 0 and wanted is None:
            self.path.unlink(missing_ok=True)
            raise _absent(name)
        if magic not in (0, _MAGIC):
            raise HostMemoryError(
                f"The shared pool {name!r} was made by another release of PortaKV; end what uses "
                f"it and remove {self.path}."
            )
        if magic and sizes != tuple(found):
            raise HostMemoryError(
                f"The shared pool {name!r} was asked for with {sizes[1]} blocks of {sizes[0]} "
                f"bytes ({sizes[2]} apart), and it has {found[1]} of {found[0]} ({found[2]} "
                f"apart); ask for the same, or take another name."
            )
        self.block_bytes, self.blocks, self.stride = sizes
        self.nbytes = self.blocks * self.stride
        first = _pages.to_pages(_tables_bytes(self.blocks))
        if magic == 0:
            self._reserve(first + self.nbytes)
        # An opening of its own: mmap keeps a copy of the descriptor, which would keep the locks
        # alive in forked children.
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            self.mapping = mmap.mmap(fd, first + self.nbytes)
        finally:
            os.close(fd)
        self.tables: dict[str, Any] = {}
        at = 0
        for table, (kind, count) in _TABLES.items():
            entries = self.blocks if count is None else count
            self.tables[table] = np.frombuffer(self.mapping, kind, entries, at)
            at += self.tables[table].nbytes
        self.address = _pages.address_of(self.mapping) + first
        if magic == 0:
            _pages.touch(self.address, self.nbytes)
            self.tables["sizes"][:] = sizes
            self.tables["magic"][0] = _MAGIC

    def _reserve(self, total: int) -> None:
        """Have the pages from the start: running out of them later would be a SIGBUS."""
        try:
            if total > _pages.available():
                raise OSError(errno.ENOMEM, "more than this process may have")
            os.ftruncate(self.fd, 0)
            os.posix_fallocate(self.fd, 0, total)
        except OSError as error:
            folder = os.statvfs(FOLDER)
            room = min(folder.f_bavail * folder.f_frsize, _pages.available())
            self.path.unlink(missing_ok=True)
            raise HostMemoryError(
                f"A shared pool of {total} bytes was asked for, and {FOLDER} has room "
                f"for {room} ({error.strerror}); make it smaller, or the machine's shared memory "
                f"larger (docker: --shm-size)."
            ) from None

    def _join(self, name: str, label: str) -> None:
        """Take a free place among the members, if need be a dead one's."""
        if not self._take_place(label) and not (self.reclaim() and self._take_place(label)):
            raise HostMemoryError(
                f"The shared pool {name!r} was opened by one process more than the {_MEMBERS} "
                f"that it has room for; close it in some."
            )
        # Left by a predecessor, such as a thread that acquired while another closed the pool.
        self._free_all(self.me)

    def _take_place(self, label: str) -> bool:
        members = self.tables["members"]
        for place in np.flatnonzero(members["pid"] == 0).tolist():
            if self.take(1 + place):
                members["name"][place] = str(label).encode()[:32]
                members["noticed"][place] = 0.0
                members["started"][place] = _started(os.getpid()) or 0
                members["space"][place] = _space()
                members["pid"][place] = os.getpid()  # last: until then the place is free
                self.me = place
                return True
        return False

    def _gone(self, place: int) -> bool:
        if self.taken(1 + place):
            return False
        member = self.tables["members"][place]
        if member["space"] == _space():
            # The kernel closes a dying process's files one after the other: this lock may be free
            # while its device still writes. A process that is a zombie has closed them all.
            return bool(_started(member["pid"]) != member["started"])
        if member["noticed"] == 0.0:
            member["noticed"] = time.monotonic()
        return bool(time.monotonic() - member["noticed"] > _GRACE)


def names() -> list[str]:
    """The shared pools of this machine, of every user."""
    return sorted(path.name[len(_PREFIX) :] for path in FOLDER.glob(f"{_PREFIX}*"))


def remove(name: str) -> None:
    """Remove a shared pool that was left behind; attached processes keep its memory until
    they close it.

    Raises:
        HostMemoryError: there is none, or it is another user's.
    """
    path = _path(name)
    os.close(_opened(path, False))
    path.unlink(missing_ok=True)


def _path(name: str) -> Path:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name):
        raise HostMemoryError(
            f"A shared pool was named {name!r}; expected 1 to 200 letters, digits, dots, dashes "
            f"and underscores."
        )
    return FOLDER / f"{_PREFIX}{name}"


def _opened(path: Path, make: bool) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
    try:
        fd = os.open(path, flags, 0o600)
    except FileNotFoundError:
        raise _absent(path.name[len(_PREFIX) :]) from None
    except OSError as error:
        raise HostMemoryError(
            f"The shared pool at {path} cannot be opened ({error.strerror}); take another name, "
            f"or run as the user whose it is."
        ) from None
    found = os.fstat(fd)
    if found.st_uid == os.geteuid() and stat.S_ISREG(found.st_mode) and not found.st_mode & 0o022:
        return fd
    os.close(fd)
    raise HostMemoryError(
        f"The shared pool at {path} belongs to somebody else, or others may write to it; take "
        f"another name, or run as the user whose it is."
    )


def _absent(name: str) -> HostMemoryError:
    return HostMemoryError(
        f"The shared pool {name!r} was asked for as it is, and there is none; say block_bytes and "
        f"blocks to make it."
    )


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
