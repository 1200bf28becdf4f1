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

import numpy as np

from portakv.errors import HostMemoryError, SlotError
from portakv.host import _pages
from portakv.host.pool import stride as stride_of

FOLDER = Path("/dev/shm")
_PREFIX = "portakv-"
_MAGIC = 0x3130564B41545250  # changes with the layout of the file
_MEMBERS = 128
#: One attached process; ``pid`` 0: a free place. ``noticed``: when its lock was first found free.
RECORD = np.dtype([("pid", "i8"), ("space", "i8"), ("started", "i8"), ("noticed", "f8"),
                   ("name", "S32")])  # fmt: skip
HEADER = np.dtype([("magic", "i8"), ("block_bytes", "i8"), ("blocks", "i8"), ("stride", "i8"),
                   ("high_water", "i8")])  # fmt: skip
_SIZES = ("block_bytes", "blocks", "stride")
_MEMBERS_AT = 256
_OWNERS_AT = _MEMBERS_AT + _MEMBERS * RECORD.itemsize
_BLOCK_RECORD = 8 + 8 + 8 + 40  # owner, generation, since, label
_GRACE = 1.0  # seconds until a dead process of another container has let go of its devices
_PATIENCE = 30.0  # seconds to wait for a change of the tables, which takes microseconds

_open: weakref.WeakSet[FileLocks] = weakref.WeakSet()


class SharedFile:
    """One opening of the file, with a place among its members.

    Attributes:
        mapping: all of the file; header: `HEADER`, one record.
        owners: of each block, the place of its owner among the members, plus 1; 0: free.
        generations: how often it changed hands; since: when, by the monotonic clock; labels: what
            for.
        members: `RECORD`, one for each process that can be attached; me: the place of this one.
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
        joined = False
        while not joined:  # the last member may remove the file before it is locked here
            self.locks = FileLocks(_opened(self.path, wanted is not None))
            try:
                with self.locks.exclusive():
                    if self._named():
                        self._begin(name, wanted)
                        self._join(name, label)
                        joined = True
            finally:
                if not joined:
                    self.locks.close()

    @property
    def address(self) -> int:
        """Of the first block."""
        return _pages.address_of(self.mapping) + _data_at(self.blocks)

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return self.blocks * self.stride

    def check(self, index: int) -> None:
        """Raise `SlotError` if there is no such block."""
        if not isinstance(index, int) or not 0 <= index < self.blocks:
            raise SlotError(
                f"Block {index!r} was asked of a shared pool of {self.blocks}; ask for one of "
                f"0 .. {self.blocks - 1}."
            )

    def assign(self, index: int) -> None:
        """Make a block this process's. Inside ``locks.exclusive()``."""
        self.since[index] = time.monotonic()
        self.generations[index] += 1
        self.owners[index] = self.me + 1

    def reclaim(self) -> list[str]:
        """Free what members have that ended without leaving, if their devices write no more. Inside
        ``locks.exclusive()``."""
        found = []
        for place in np.flatnonzero(self.members["pid"]).tolist():
            if place != self.me and self._gone(place):
                theirs = np.flatnonzero(self.owners == place + 1)
                found.append(f"{self.describe(place)}: {theirs.size} blocks")
                self.owners[theirs] = 0
                self.members["pid"][place] = 0
        return found

    def describe(self, place: int) -> str:
        """Who has a place among the members, in words."""
        name = self.members["name"][place].decode(errors="replace")
        return f"{name or 'a process'} ({int(self.members['pid'][place])})"

    def leave(self, keep: bool) -> None:
        """Give back what this process has, and its place; the last removes the file."""
        if self.locks.fd < 0:
            return
        with suppress(HostMemoryError), self.locks.exclusive():
            self.owners[self.owners == self.me + 1] = 0
            self.reclaim()
            self.members["pid"][self.me] = 0
            if not keep and not self.members["pid"].any() and self._named():
                self.path.unlink(missing_ok=True)
        self.locks.close()
        # Tensors still hold the memory; nothing here does.
        del self.mapping, self.header, self.owners, self.generations, self.since, self.labels
        del self.members

    def _named(self) -> bool:
        """True while the name still leads to this file."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.locks.fd), os.stat(self.path))
        return False

    def _begin(self, name: str, wanted: tuple[int, int, int] | None) -> None:
        """Make the file, unless that was finished before, and map it."""
        raw = os.pread(self.locks.fd, HEADER.itemsize, 0).ljust(HEADER.itemsize, b"\0")
        found = np.frombuffer(raw, HEADER)
        here = tuple(int(found[field][0]) for field in _SIZES)
        fresh = found["magic"][0] == 0
        if fresh and wanted is None:
            self.path.unlink(missing_ok=True)
            raise _absent(name)
        if fresh and wanted is not None:
            self._reserve(wanted)
            here = wanted
        elif found["magic"][0] != _MAGIC:
            raise HostMemoryError(
                f"The shared pool {name!r} was made by another release of PortaKV; end what uses "
                f"it and remove {self.path}."
            )
        elif wanted is not None and wanted != here:
            raise HostMemoryError(
                f"The shared pool {name!r} was asked for with {wanted[1]} blocks of {wanted[0]} "
                f"bytes ({wanted[2]} apart), and it has {here[1]} of {here[0]} ({here[2]} apart); "
                f"ask for the same, or take another name."
            )
        self.block_bytes, self.blocks, self.stride = here
        self._map(fresh)

    def _reserve(self, wanted: tuple[int, int, int]) -> None:
        """Have the pages from the start: running out of them later would be a SIGBUS."""
        _, blocks, stride = wanted
        total = _data_at(blocks) + blocks * stride
        try:
            if total > _pages.available():
                raise OSError(errno.ENOMEM, "more than this process may have")
            os.ftruncate(self.locks.fd, 0)
            os.posix_fallocate(self.locks.fd, 0, total)
        except OSError as error:
            folder = os.statvfs(FOLDER)
            room = min(folder.f_bavail * folder.f_frsize, _pages.available())
            self.path.unlink(missing_ok=True)
            raise HostMemoryError(
                f"A shared pool of {total} bytes was asked for, and {FOLDER} has room "
                f"for {room} ({error.strerror}); make it smaller, or the machine's shared memory "
                f"larger (docker: --shm-size)."
            ) from None

    def _map(self, fresh: bool) -> None:
        total = _data_at(self.blocks) + self.nbytes
        # An opening of its own: mmap keeps a copy of the descriptor, which would keep the locks
        # alive in forked children.
        fd = os.open(f"/proc/self/fd/{self.locks.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            self.mapping = mmap.mmap(fd, total)
        finally:
            os.close(fd)
        count, at = self.blocks, _OWNERS_AT
        self.header = np.frombuffer(self.mapping, HEADER, 1)
        self.owners = np.frombuffer(self.mapping, np.int64, count, at)
        self.generations = np.frombuffer(self.mapping, np.int64, count, at + 8 * count)
        self.since = np.frombuffer(self.mapping, np.float64, count, at + 16 * count)
        self.labels = np.frombuffer(self.mapping, "S40", count, at + 24 * count)
        self.members = np.frombuffer(self.mapping, RECORD, _MEMBERS, _MEMBERS_AT)
        if fresh:
            _pages.touch(self.address // _pages.PAGE * _pages.PAGE, self.nbytes)
            for field in _SIZES:
                self.header[field][0] = getattr(self, field)
            self.header["magic"][0] = _MAGIC

    def _join(self, name: str, label: str) -> None:
        if not self._take_place(label):
            self.reclaim()
            if not self._take_place(label):
                raise HostMemoryError(
                    f"The shared pool {name!r} was opened by one process more than the {_MEMBERS} "
                    f"that it has room for; close it in some."
                )
        # Left by a predecessor that died in this place before it had it.
        self.owners[self.owners == self.me + 1] = 0

    def _take_place(self, label: str) -> bool:
        """Take a free place among the members; False if there is none."""
        for place in np.flatnonzero(self.members["pid"] == 0).tolist():
            if self.locks.take(1 + place):
                self.members["name"][place] = str(label).encode()[:32]
                self.members["noticed"][place] = 0.0
                self.members["started"][place] = _started(os.getpid()) or 0
                self.members["space"][place] = _space()
                self.members["pid"][place] = os.getpid()  # last: until then the place is free
                self.me = place
                return True
        return False

    def _gone(self, place: int) -> bool:
        if self.locks.taken(1 + place):
            return False
        record = self.members[place]
        if int(record["space"]) == _space():
            # The kernel closes a dying process's files one after the other: this lock may be free
            # while its device still writes. A process that is a zombie has closed them all.
            return _started(int(record["pid"])) != int(record["started"])
        if record["noticed"] == 0.0:
            self.members["noticed"][place] = time.monotonic()
        return bool(time.monotonic() - float(self.members["noticed"][place]) > _GRACE)


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


def _data_at(blocks: int) -> int:
    """Where the blocks begin, on a page."""
    return _pages.to_pages(_OWNERS_AT + blocks * _BLOCK_RECORD)


# --- locks ---------------------------------------------------------------------------------------


class FileLocks:
    """Locks on single bytes of an open file, for this opening of it."""

    def __init__(self, fd: int) -> None:
        self.fd, self._threads = fd, threading.Lock()
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
