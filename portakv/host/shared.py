# SPDX-License-Identifier: Apache-2.0
"""A pool of pinned blocks that processes share by name, in a file of POSIX shared memory.

Each process registers the memory again, as a registration is not inherited. A block belongs to a
member, which is one opening of the file. A member that dies, at whatever moment, leaves tables that
the next can use: each change that matters is one aligned store of 8 bytes.

Which members live is told by locks that the kernel drops when a process dies. They belong to an
open file description (``F_OFD_SETLK``), so neither a number of a process that is used again, nor
another container's numbering, nor a second opening in one process deceives them. Byte 0 is held
while the file's tables are changed; byte ``1 + i`` as long as member ``i`` lives.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import mmap
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import HostMemoryError, PoolExhausted, SlotError
from portakv.host import _pages, _registration, pinned
from portakv.host.pool import Block, Pool, ending, stride

__all__ = ["PoolExhausted", "SharedPool", "names", "remove"]

_FOLDER = Path("/dev/shm")
_PREFIX = "portakv-"
_MAGIC = 0x3130564B41545250  # changes with the layout of the file
_MEMBERS = 128
GRACE = 1.0  # seconds until a dead process of another container has let go of its devices
PATIENCE = 30.0  # seconds to wait for a change of the tables, which takes microseconds

#: A member; ``pid`` 0: a free place. ``noticed``: when its lock was first found free.
_MEMBER = [("pid", "i8"), ("space", "i8"), ("started", "i8"), ("noticed", "f8"), ("name", "S32")]
#: What the file begins with. ``magic`` is written last; ``sizes``: bytes of a block, blocks, bytes
#: from one to the next.
_HEAD = np.dtype(
    [
        ("magic", "i8"),
        ("sizes", "i8", 3),
        ("high_water", "i8"),
        ("later", "V216"),
        ("members", _MEMBER, _MEMBERS),
    ]
)
#: Then columns with an entry for each block: its member plus 1, or 0 if it is free; how often it
#: changed hands; when, by the monotonic clock; what for. Then, on a page, the blocks.
_COLUMNS = [("owner", "i8"), ("generation", "i8"), ("since", "f8"), ("label", "S40")]

_open: WeakSet[SharedPool] = WeakSet()


class SharedPool(Pool):
    """Blocks of one size, shared by name. A context manager; `close` may be called again.

    The first process that names it makes it, the last that closes it removes it. Use it in the
    process that opened it; a forked one opens its own. Closing gives the blocks of this process
    back, once its devices touch them no more.

    Args:
        name: letters, digits, dots, dashes and underscores.
        block_bytes, blocks: how large; None: as it is, which must then exist.
        alignment: in bytes, of each block; label: what other processes call this one.
        keep: leave it behind when the last process has closed it; see `remove`.
        fallback: pageable memory (``pinned`` is False), and one warning, if it cannot be pinned.

    Raises:
        HostMemoryError: it is another size, another user's, too large for the machine's shared
            memory, or not there; or too many processes are attached.
    """

    _fd = _me = -1

    def __init__(
        self,
        name: str,
        block_bytes: int | None = None,
        blocks: int | None = None,
        *,
        alignment: int = 64,
        label: str = "",
        keep: bool = False,
        fallback: bool = True,
    ) -> None:
        super().__init__(f"The shared pool {name!r}", "open it there by its name")
        self.name = name
        self._keep = keep
        wanted = None
        if block_bytes is not None and blocks is not None:
            wanted = [block_bytes, blocks, stride(block_bytes, blocks, alignment)]
        elif block_bytes is not None or blocks is not None:
            raise HostMemoryError(
                f"{self._name} was asked for with {blocks} blocks of {block_bytes} bytes; say "
                f"both, to make it, or neither, to open it as it is."
            )
        _open.add(self)
        _watch()
        while self._me < 0:
            self._fd, self._path = _opened(name, wanted is not None)
            try:
                with self._exclusive():
                    if self._begin(wanted):
                        self._join(str(label).encode(errors="replace")[:32])
            finally:
                if self._me < 0:
                    self._unlock()
        try:
            self._memory = pinned.register_address(
                self._address,
                self.blocks * self._stride,
                held=self._mapping,
                unit=self._stride,
                fallback=fallback,
            )
        except BaseException:
            self._leave()
            raise
        self.limit = self.blocks
        self.pinned = self._memory.pinned

    @property
    def high_water(self) -> int:
        """Most blocks that were out at once, in all processes."""
        self._refuse()
        return int(self._head["high_water"])

    def release(self, block: Block, after: Any = None) -> None:
        """Give a block back that this process has. First the host waits for the end of the work
        ``after`` (``synchronize()``).

        Raises:
            HostMemoryError: released before, another pool's, or adopted by another process.
        """
        self._refuse()
        self._check(block)
        if after is not None:
            ending(after, "synchronize")()
        with self._exclusive():
            self._check(block)  # again: another thread may have released it meanwhile
            block.drop()
            if self._table["generation"][block.index] != block.generation:
                raise HostMemoryError(
                    f"Block {block.index} of {self.name!r} was released here after another process "
                    f"adopted it; a block is released by the process that adopted it."
                )
            self._table["owner"][block.index] = 0
            self._changed.notify_all()

    def adopt(self, index: int, generation: int | None = None) -> Block:
        """Take over a block that another process acquired, and told this one its index and its
        generation. From then on it is this process's to release, and outlives the other.

        Raises:
            SlotError: no such block.
            HostMemoryError: it is free, or changed hands since it had that generation.
        """
        self.bytes_of(index)
        if generation is not None:
            generation = _pages.whole("generation", generation, do="pass the block's own")
        with self._exclusive():
            now = self._table["generation"][index]
            if self._table["owner"][index] == 0 or generation not in (None, now):
                raise HostMemoryError(
                    f"Block {index} of {self.name!r} was asked to be adopted, and no process has "
                    f"it, or another one by now; adopt it before the process that acquired it "
                    f"releases it or dies."
                )
            if mine := self._held.get(index):
                mine.drop()
            return self._assign(index)

    def bytes_of(self, index: int) -> torch.Tensor:
        """The bytes of any block, uint8 ``[block_bytes]``; `SlotError` if there is no such one."""
        self._refuse()
        if type(index) is not int or not 0 <= index < self.blocks:
            raise SlotError(
                f"Block {index!r} was asked of a shared pool of {self.blocks}; ask for one of "
                f"0 .. {self.blocks - 1}."
            )
        start = index * self._stride
        return self._memory.tensor[start : start + self.block_bytes]

    def reclaim(self) -> list[str]:
        """Take back the blocks of processes that died; names each, and how many."""
        with self._exclusive():
            return self._reclaim()

    def leaks(self) -> list[str]:
        """Every block that is out: its index, the process, what for and since when."""
        self._refuse()
        return self._lines(np.flatnonzero(self._table["owner"]))

    # --- the table of blocks

    def _take(self, count: int, owner: str, grow: bool) -> list[Block] | None:
        with self._exclusive():
            while len(free := self._find()) < count:
                if not self._reclaim():
                    return None
            used = self.blocks - len(free) + count
            self._head["high_water"] = max(self._head["high_water"], used)
            self._table["label"][free[:count]] = str(owner).encode(errors="replace")[:40]
            return [self._assign(index) for index in free[:count].tolist()]

    def _assign(self, index: int) -> Block:
        """Make a block this process's, by what is written last."""
        generation = int(self._table["generation"][index]) + 1
        self._table["since"][index] = time.monotonic()
        self._table["generation"][index] = generation
        self._table["owner"][index] = self._me + 1
        block = Block(self, index, self.block_bytes, generation, self.bytes_of(index))
        self._held[index] = block
        return block

    def _out_to(self) -> list[str]:
        places, counts = np.unique(self._table["owner"], return_counts=True)
        members = zip(places.tolist(), counts.tolist(), strict=True)
        return [f"{self._described(place - 1)}: {n}" for place, n in members if place]

    def _lines(self, blocks: Any) -> list[str]:
        table = self._table
        now = time.monotonic()
        return [
            f"block {index}: {self._described(table['owner'][index] - 1)}, for "
            f"{table['label'][index].decode(errors='replace') or 'nothing named'}, "
            f"{now - table['since'][index]:.1f} s"
            for index in blocks
        ]

    def _find(self, place: int = -1) -> npt.NDArray[np.intp]:
        """The blocks of a member, or those that are free."""
        return np.flatnonzero(self._table["owner"] == place + 1)

    # --- members

    def _join(self, label: bytes) -> None:
        """Take a free place among the members, if need be a dead one's."""
        members = self._members
        if members["pid"].all():
            self._reclaim()
        for place in np.flatnonzero(members["pid"] == 0).tolist():
            if self._lock(1 + place):
                self._clear(place)  # blocks that a predecessor left
                began = started(os.getpid()) or 0
                members[place] = 0, process_space(), began, 0.0, label
                members["pid"][place] = os.getpid()  # last: until then the place is free
                self._me = place
                return
        raise HostMemoryError(
            f"{self._name} was opened by one process more than the {_MEMBERS} that it has room "
            f"for; close it in some."
        )

    def _reclaim(self) -> list[str]:
        """Free what members have that ended without leaving, if their devices write no more."""
        places = np.flatnonzero(self._members["pid"]).tolist()
        dead = [place for place in places if place != self._me and self._gone(place)]
        return [f"{self._described(place)}: {self._clear(place)} blocks" for place in dead]

    def _gone(self, place: int) -> bool:
        if not self._lock(1 + place):
            return False
        self._lock(1 + place, fcntl.F_UNLCK)
        member = self._members[place]
        if member["space"] == process_space():
            # The kernel closes a dying process's files one after the other: this lock may be free
            # while its device still writes. A process that is a zombie has closed them all.
            return bool(started(member["pid"]) != member["started"])
        if member["noticed"] == 0.0:
            member["noticed"] = time.monotonic()
        return bool(time.monotonic() - member["noticed"] > GRACE)

    def _clear(self, place: int) -> int:
        """Free a member's blocks and then its place; how many blocks they were."""
        theirs = self._find(place)
        self._table["owner"][theirs] = 0
        self._members["pid"][place] = 0
        return len(theirs)

    def _described(self, place: int) -> str:
        member = self._members[place]
        return f"{member['name'].decode(errors='replace') or 'a process'} ({member['pid']})"

    def _end(self) -> list[str]:
        left = self._lines(self._find(self._me))
        if left:
            _registration.quiesce()  # others may write these blocks as soon as they are free
        for block in self._held.values():
            block.drop()
        self._leave()
        self._memory.close()
        return left

    def _leave(self) -> None:
        """Give back what this process has, and its place; the last removes the file."""
        with suppress(HostMemoryError), self._exclusive():
            self._clear(self._me)
            self._reclaim()
            kept = self._keep or self._members["pid"].any()
            if not kept and os.fstat(self._fd).st_nlink:
                self._path.unlink(missing_ok=True)
        self._unlock()
        del self._mapping, self._head, self._members, self._table  # tensors still hold the memory

    def __del__(self) -> None:
        if self._fd >= 0:
            self.close()

    # --- the file

    def _lock(self, byte: int, kind: int = fcntl.F_WRLCK) -> bool:
        """Lock a byte, or with ``F_UNLCK`` unlock it; False if another opening has it."""
        asked = struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)  # flock of 64-bit Linux
        with suppress(BlockingIOError, PermissionError):  # EAGAIN, EACCES: two names of one answer
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, asked)
            return True
        return False

    def _unlock(self) -> None:
        """Drop every lock. Again, or in a forked process: nothing, as they are its parent's."""
        fd = self._fd
        self._fd = -1
        if fd >= 0:
            os.close(fd)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Inside, no other process or thread changes the tables; one that dies inside leaves the
        lock to the next. Raises `HostMemoryError` if one that lives does not let go of it."""
        self._refuse()
        with self._changed:
            self._refuse()
            until = time.monotonic() + PATIENCE
            pause = 20e-6
            while not self._lock(0):
                if time.monotonic() > until:
                    raise HostMemoryError(
                        f"A shared pool was used, and another process has held its tables for "
                        f"{PATIENCE:g} s; it may be stopped. Continue it, or end it."
                    )
                time.sleep(pause)
                pause = min(2 * pause, 1e-3)
            try:
                yield
            finally:
                self._lock(0, fcntl.F_UNLCK)

    def _begin(self, wanted: list[int] | None) -> bool:
        """Map the file, and make it unless that was finished before. False: it was removed before
        it was locked; or is not to be made, and now is."""
        if os.fstat(self._fd).st_nlink == 0:
            return False
        magic, *found = struct.unpack("4q", os.pread(self._fd, 32, 0).ljust(32, b"\0"))
        sizes = wanted or found
        if magic not in (0, _MAGIC):
            raise HostMemoryError(
                f"{self._name} was made by another release of PortaKV; end what uses it and remove "
                f"{self._path}."
            )
        if magic and sizes != found:
            raise HostMemoryError(
                f"{self._name} was asked for with {sizes[1]} blocks of {sizes[0]} bytes "
                f"({sizes[2]} apart), and it has {found[1]} of {found[0]} ({found[2]} apart); ask "
                f"for the same, or take another name."
            )
        if not magic and wanted is None:
            self._path.unlink(missing_ok=True)
            return False
        self.block_bytes, self.blocks, self._stride = sizes
        first = _pages.to_pages(_HEAD.itemsize + self.blocks * np.dtype(_COLUMNS).itemsize)
        total = first + self.blocks * self._stride
        if not magic:
            self._reserve(total)
        # An opening of its own: mmap keeps a copy of the descriptor, which would keep the locks
        # alive in forked children.
        with open(f"/proc/self/fd/{self._fd}", "r+b") as file:
            self._mapping = mmap.mmap(file.fileno(), total)
        self._head: Any = np.frombuffer(self._mapping, _HEAD, 1)[0]
        self._members = self._head["members"]
        self._table: dict[str, Any] = {}
        at = _HEAD.itemsize
        for column, kind in _COLUMNS:
            self._table[column] = np.frombuffer(self._mapping, kind, self.blocks, at)
            at += self._table[column].nbytes
        self._address = _pages.address_of(self._mapping) + first
        if not magic:
            _pages.touch(self._address, total - first)
            self._head["sizes"] = sizes
            self._head["magic"] = _MAGIC
        return True

    def _reserve(self, total: int) -> None:
        """Have the pages from the start: running out of them later would be a SIGBUS."""
        try:
            if total > _pages.available():
                raise OSError(errno.ENOMEM, "more than this process may have")
            os.ftruncate(self._fd, 0)
            os.posix_fallocate(self._fd, 0, total)
        except OSError as error:
            folder = os.statvfs(_FOLDER)
            room = min(folder.f_bavail * folder.f_frsize, _pages.available())
            self._path.unlink(missing_ok=True)
            raise HostMemoryError(
                f"A shared pool of {total} bytes was asked for, and {_FOLDER} has room for {room} "
                f"({error.strerror}); make it smaller, or the machine's shared memory larger "
                f"(docker: --shm-size)."
            ) from None


def unnamed(nbytes: int) -> mmap.mmap:
    """Shared memory without a name, its pages there, all zero; nothing is left of it if no process
    has it. Others open its descriptor. Raises `HostMemoryError` if there is no room."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        if nbytes > _pages.available():
            raise OSError(errno.ENOMEM, "more than this process may have")
        with open(os.memfd_create(_PREFIX, flags), "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            # If it could become shorter, that would be a SIGBUS for all who have it mapped.
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise HostMemoryError(
            f"Shared memory of {nbytes} bytes was asked for, and the machine does not give it "
            f"({error.strerror}); ask for less, or raise its limit (cgroup)."
        ) from None


def names() -> list[str]:
    """The shared pools of this machine, of every user."""
    return sorted(path.name.removeprefix(_PREFIX) for path in _FOLDER.glob(f"{_PREFIX}*"))


def remove(name: str) -> None:
    """Remove a shared pool that was left behind; attached processes keep its memory until
    they close it. Raises `HostMemoryError` if there is none, or it is another user's."""
    fd, path = _opened(name, False)
    os.close(fd)
    path.unlink(missing_ok=True)


def _opened(name: str, make: bool) -> tuple[int, Path]:
    """The file of that name, of this user, perhaps made just now: an opening, and its path."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name):
        raise HostMemoryError(
            f"A shared pool was named {name!r}; expected 1 to 200 letters, digits, dots, dashes "
            f"and underscores."
        )
    path = _FOLDER / f"{_PREFIX}{name}"
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
    try:
        fd = os.open(path, flags, 0o600)
        found = os.fstat(fd)
        mine = found.st_uid == os.geteuid() and stat.S_ISREG(found.st_mode)
        if mine and not found.st_mode & 0o022:
            return fd, path
        os.close(fd)
        why = "belongs to another user, or others may write to it"
    except FileNotFoundError:
        raise HostMemoryError(
            f"The shared pool {name!r} was asked for as it is, and there is none; say block_bytes "
            f"and blocks to make it."
        ) from None
    except OSError as error:
        why = f"cannot be opened ({error.strerror})"
    raise HostMemoryError(
        f"The shared pool at {path} {why}; take another name, or run as the user whose it is."
    )


def process_space() -> int:
    """Whose numbering of processes this is: containers have their own."""
    with suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def started(pid: int) -> int | None:
    """When a process began, which tells it from a later one of its number; None: it is over."""
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()  # from the state on
        return None if fields[0] in "ZX" else int(fields[19])
    return None


@cache
def _watch() -> None:
    """A forked child must not keep its parent's locks alive; an exit leaves every pool."""

    def end(call: Callable[[SharedPool], None]) -> None:
        with ExitStack() as each:  # one that fails keeps none of the others
            for pool in list(_open):
                each.callback(call, pool)

    os.register_at_fork(after_in_child=partial(end, SharedPool._unlock))
    atexit.register(end, SharedPool.__del__)  # some may never have opened
