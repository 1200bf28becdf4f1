# SPDX-License-Identifier: Apache-2.0
"""A pool of pinned blocks that processes share by name, in a file of POSIX shared memory.

Each process registers the memory again, as a registration is not inherited. A block belongs to a
member, which is one opening of the file. A member that dies at any moment leaves tables that the
next can use: each change that matters is one aligned store of 8 bytes.

Locks show which members live; the kernel drops them when a process dies. They belong to an open
file description (``F_OFD_SETLK``), so they are correct also with a process number that is used
again, another container's numbering, or a second opening in one process. A process has byte 0
locked while it changes the file's tables, and byte ``1 + i`` while member ``i`` lives.
"""

from __future__ import annotations

import atexit
import errno
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

from portakv.arguments import flag
from portakv.errors import HostMemoryError, PoolExhausted, SlotError
from portakv.host import _pages, _registration, pinned
from portakv.host.pool import Block, Pool, ending, stride
from portakv.runtime import resources
from portakv.runtime.linux import fcntl, require_linux
from portakv.runtime.resources import reason

__all__ = ["PoolExhausted", "SharedPool", "names", "remove"]

_FOLDER = Path("/dev/shm")
_PREFIX = "portakv-"
_MAGIC = 0x3130564B41545250  # changes with the layout of the file
_MEMBERS = 128
GRACE = 1.0  # seconds until a dead process of another container has released its devices
PATIENCE = 30.0  # seconds to wait for a change of the tables, which takes microseconds

#: A member; ``pid`` 0: a free place. ``noticed``: when its lock was first free.
_MEMBER = [("pid", "i8"), ("space", "i8"), ("started", "i8"), ("noticed", "f8"), ("name", "S32")]
#: The head of the file. ``magic`` is written last; ``sizes``: bytes of a block, blocks, bytes from
#: one to the next.
_HEAD = np.dtype(
    [
        ("magic", "i8"),
        ("sizes", "i8", 3),
        ("high_water", "i8"),
        ("later", "V216"),
        ("members", _MEMBER, _MEMBERS),
    ]
)
#: After the head, columns with an entry for each block: its member plus 1, or 0 if it is free; the
#: number of its acquisitions; the time, by the monotonic clock; its purpose. After these, on a
#: page, the blocks.
_COLUMNS = [("owner", "i8"), ("generation", "i8"), ("since", "f8"), ("label", "S40")]

_open: WeakSet[SharedPool] = WeakSet()


class SharedPool(Pool):
    """Blocks of one size, shared by name. A context manager; `close` may be called again.

    The first process that names it creates it, the last that closes it removes it. Use it in the
    process that opened it; a forked process opens its own. Closing releases the blocks of this
    process, after its devices stop using them.

    Args:
        name: letters, digits, dots, dashes and underscores.
        block_bytes, blocks: the size; None: the size of the existing pool.
        alignment: in bytes, of each block.
        label: the name of this process for other processes.
        keep: leave it after the last process has closed it; see `remove`.
        fallback: pageable memory (``pinned`` is False), and one warning, if it cannot be pinned.

    Raises:
        HostMemoryError: it has another size, is another user's, too large for the machine's shared
            memory, or does not exist; or too many processes are attached.
    """

    _fd = -1
    _me = -1

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
        require_linux("a shared pool")
        flag("keep", keep)
        flag("fallback", fallback)
        super().__init__(f"the shared pool {name!r}", "open it there by its name")
        self.name = name
        self._keep = keep
        wanted = None
        if block_bytes is not None and blocks is not None:
            wanted = [block_bytes, blocks, stride(block_bytes, blocks, alignment)]
        elif block_bytes is not None or blocks is not None:
            raise HostMemoryError(
                f"Expected both blocks and block_bytes of {self._name}, or neither, got {blocks} "
                f"blocks of {block_bytes} bytes. Pass both to create it, none to open it."
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
                owner=self._mapping,
                unit=self._stride,
                fallback=fallback,
            )
        except BaseException:  # also an interrupt: the place must become free
            self._leave()
            raise
        self.limit = self.blocks
        self.pinned = self._memory.pinned

    @property
    def high_water(self) -> int:
        """Return the most blocks in use at a time, in all processes."""
        self._refuse()
        return int(self._head["high_water"])

    def release(self, block: Block, after: object = None) -> None:
        """Release a block of this process. First the host waits for the end of the work ``after``
        (``synchronize()``).

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
                    f"Expected a block of this process, got block {block.index} of {self.name!r}, "
                    f"which another process adopted. Release it in that process."
                )
            self._table["owner"][block.index] = 0
            self._changed.notify_all()

    def adopt(self, index: int, generation: int | None = None) -> Block:
        """Take over a block that another process acquired, by the index and the generation that it
        sent.

        From then on this process releases the block, and the block outlives the other process.

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
                    f"Expected block {index} of {self.name!r} to be in use with that generation, "
                    f"got a block that is free or changed hands. Adopt it before the process that "
                    f"acquired it releases it or dies."
                )
            own = self._handles.get(index)
            if own is not None:
                own.drop()
            return self._assign(index)

    def bytes_of(self, index: int) -> torch.Tensor:
        """Return the bytes of any block, uint8 ``[block_bytes]``; raise `SlotError` if it does not
        exist."""
        self._refuse()
        if type(index) is not int or not 0 <= index < self.blocks:
            raise SlotError(
                f"Expected a block of a shared pool, 0 .. {self.blocks - 1}, got {index!r}. "
                "Pass one of these."
            )
        start = index * self._stride
        return self._memory.tensor[start : start + self.block_bytes]

    def reclaim(self) -> list[str]:
        """Free the blocks of processes that died; return the name of each, and the number of its
        blocks."""
        with self._exclusive():
            return self._reclaim()

    def leaks(self) -> list[str]:
        """Return every block in use: its index, the process, its purpose and its age."""
        self._refuse()
        return self._lines(np.flatnonzero(self._table["owner"]))

    # --- the table of blocks

    def _largest(self) -> int:
        return self.block_bytes

    def _most(self, nbytes: int) -> int:
        if nbytes != self.block_bytes:
            raise HostMemoryError(
                f"Expected blocks of {self.block_bytes} bytes from {self._name}, whose blocks have "
                f"one size, got a request for {nbytes}. Take a PinnedPool, or make this one with "
                f"larger blocks."
            )
        return self.limit

    def _take(self, count: int, nbytes: int, owner: str, grow: bool) -> list[Block] | None:
        with self._exclusive():
            while len(free := self._find()) < count:
                if not self._reclaim():
                    return None
            used = self.blocks - len(free) + count
            self._head["high_water"] = max(self._head["high_water"], used)
            self._table["label"][free[:count]] = str(owner).encode(errors="replace")[:40]
            return [self._assign(index) for index in free[:count].tolist()]

    def _assign(self, index: int) -> Block:
        """Make a block this process's; the last store is the owner."""
        generation = int(self._table["generation"][index]) + 1
        self._table["since"][index] = time.monotonic()
        self._table["generation"][index] = generation
        self._table["owner"][index] = self._me + 1
        block = Block(self, index, self.block_bytes, generation, self.bytes_of(index))
        self._handles[index] = block
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
            f"{table['label'][index].decode(errors='replace') or 'an unnamed purpose'}, "
            f"{now - table['since'][index]:.1f} s"
            for index in blocks
        ]

    def _find(self, place: int = -1) -> npt.NDArray[np.intp]:
        """Return the blocks of a member, or the free blocks."""
        return np.flatnonzero(self._table["owner"] == place + 1)

    # --- members

    def _join(self, label: bytes) -> None:
        """Take a free place among the members, if necessary a dead member's."""
        members = self._members
        if members["pid"].all():
            self._reclaim()
        for place in np.flatnonzero(members["pid"] == 0).tolist():
            if self._lock(1 + place):
                self._clear(place)  # blocks that a dead member left
                began = started(os.getpid()) or 0
                members[place] = 0, process_space(), began, 0.0, label
                members["pid"][place] = os.getpid()  # last: until then the place is free
                self._me = place
                return
        raise HostMemoryError(
            f"Expected at most {_MEMBERS} processes in {self._name}, got one more. Close it in "
            "some."
        )

    def _reclaim(self) -> list[str]:
        """Free the blocks of members that died, if their devices write no more."""
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
            # while its device still writes. A zombie has closed all files.
            try:
                return bool(started(member["pid"]) != member["started"])
            except HostMemoryError:  # not known now: its blocks stay until a later look
                return False
        if member["noticed"] == 0.0:
            member["noticed"] = time.monotonic()
        return bool(time.monotonic() - member["noticed"] > GRACE)

    def _clear(self, place: int) -> int:
        """Free a member's blocks and then its place; return the number of blocks."""
        blocks = self._find(place)
        self._table["owner"][blocks] = 0
        self._members["pid"][place] = 0
        return len(blocks)

    def _described(self, place: int) -> str:
        member = self._members[place]
        return f"{member['name'].decode(errors='replace') or 'a process'} ({member['pid']})"

    def _end(self) -> list[str]:
        left = self._lines(self._find(self._me))
        if left:
            # Other processes may write these blocks as soon as they are free.
            _registration.quiesce()
        for block in self._handles.values():
            block.drop()
        self._leave()
        self._memory.close()
        return left

    def _leave(self) -> None:
        """Free the blocks and the place of this process; the last process removes the file."""
        # HostMemoryError: another process has the lock for too long; the next one frees the place.
        with suppress(HostMemoryError), self._exclusive():
            self._clear(self._me)
            self._reclaim()
            stays = self._keep or self._members["pid"].any()
            if not stays and os.fstat(self._fd).st_nlink:
                self._path.unlink(missing_ok=True)
        self._unlock()
        del self._mapping, self._head, self._members, self._table  # tensors still retain the memory

    def __del__(self) -> None:
        if self._fd >= 0:
            self.close()

    # --- the file

    def _lock(self, byte: int, kind: int | None = None) -> bool:
        """Lock a byte, or with ``F_UNLCK`` unlock it; return False if another opening has it."""
        kind = fcntl.F_WRLCK if kind is None else kind
        request = struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)  # flock of 64-bit Linux
        with suppress(BlockingIOError, PermissionError):  # EAGAIN, EACCES: the same answer
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, request)
            return True
        return False

    def _unlock(self) -> None:
        """Drop every lock. In a forked process, or when called again, it does nothing."""
        fd = self._fd
        self._fd = -1
        if fd >= 0:
            os.close(fd)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Exclude other processes and threads from the tables inside the context.

        A process that dies inside leaves the lock to the next. Raises `HostMemoryError` if a living
        process does not release it.
        """
        self._refuse()
        with self._changed:
            self._refuse()
            until = time.monotonic() + PATIENCE
            pause = 20e-6
            while not self._lock(0):
                if time.monotonic() > until:
                    raise HostMemoryError(
                        f"Expected the tables of a shared pool within {PATIENCE:g} s, got none: "
                        f"another process has them locked, and may be stopped. Continue it, or end "
                        f"it."
                    )
                time.sleep(pause)
                pause = min(2 * pause, 1e-3)
            try:
                yield
            finally:
                self._lock(0, fcntl.F_UNLCK)

    def _begin(self, wanted: list[int] | None) -> bool:
        """Map the file, and create its contents unless that was finished before.

        Returns False if the file was removed before it was locked; or if it must not be created
        here, and is removed now.
        """
        if os.fstat(self._fd).st_nlink == 0:
            return False
        magic, *stored = struct.unpack("4q", os.pread(self._fd, 32, 0).ljust(32, b"\0"))
        sizes = wanted or stored
        if magic not in (0, _MAGIC):
            raise HostMemoryError(
                f"Expected {self._name} of this release of PortaKV, got another release's. End the "
                f"processes that use it and remove {self._path}."
            )
        if magic and sizes != stored:
            raise HostMemoryError(
                f"Expected {stored[1]} blocks of {stored[0]} bytes ({stored[2]} apart), as "
                f"{self._name} has, got {sizes[1]} of {sizes[0]} ({sizes[2]} apart). Pass the "
                "same, or take another name."
            )
        if not magic and wanted is None:
            self._path.unlink(missing_ok=True)
            return False
        self.block_bytes, self.blocks, self._stride = sizes
        first = _pages.to_pages(_HEAD.itemsize + self.blocks * np.dtype(_COLUMNS).itemsize)
        total = first + self.blocks * self._stride
        if not magic:
            self._reserve(total)
        # A separate opening: mmap duplicates the descriptor, which would keep the locks alive in
        # forked children.
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
        """Allocate the pages now: running out of them later would be a SIGBUS."""
        try:
            if total > _pages.available():
                raise OSError(errno.ENOMEM, "more than this process may have")
            os.ftruncate(self._fd, 0)
            os.posix_fallocate(self._fd, 0, total)
        except OSError as error:
            free = min(_free_bytes(), _pages.available())
            self._path.unlink(missing_ok=True)
            raise HostMemoryError(
                f"Expected {total} bytes for a shared pool, got {free} in {_FOLDER} "
                f"({error.strerror}). Make it smaller, or the machine's shared memory larger "
                f"(docker: --shm-size)."
            ) from None


def unnamed(nbytes: int) -> mmap.mmap:
    """Return shared memory without a name, with allocated pages, all zero.

    It vanishes with its last process. Other processes open its descriptor. Raises `HostMemoryError`
    if there is no space.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        if nbytes > _pages.available():
            raise OSError(errno.ENOMEM, "more than this process may have")
        with open(os.memfd_create(_PREFIX, flags), "r+b") as file:
            os.ftruncate(file.fileno(), nbytes)
            _pages.use_huge_pages(file.fileno(), nbytes)
            os.posix_fallocate(file.fileno(), 0, nbytes)
            # If it could become shorter, that would be a SIGBUS for all processes that map it.
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        if error.errno in resources.NONE_FREE:
            why = resources.reason(error)
            raise HostMemoryError(f"Expected a descriptor for shared memory, but {why}.") from None
        raise HostMemoryError(
            f"Expected {nbytes} bytes of shared memory, got none ({error.strerror}). Request less, "
            f"or raise the machine's limit (cgroup)."
        ) from None


def names() -> list[str]:
    """Return the shared pools of this machine, of every user."""
    return sorted(path.name.removeprefix(_PREFIX) for path in _FOLDER.glob(f"{_PREFIX}*"))


def remove(name: str) -> None:
    """Remove a shared pool that was left over; attached processes keep its memory until they close
    it.

    Raises:
        HostMemoryError: the pool does not exist, or is another user's.
    """
    fd, path = _opened(name, False)
    os.close(fd)
    path.unlink(missing_ok=True)


def _free_bytes() -> int:
    """Return the bytes that are free in the folder of shared pools."""
    folder = os.statvfs(_FOLDER)
    return folder.f_bavail * folder.f_frsize


def _opened(name: str, make: bool) -> tuple[int, Path]:
    """Open the file of that name, of this user, perhaps created now; return the descriptor and the
    path."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name):
        raise HostMemoryError(
            f"Expected a pool name of 1 to 200 letters, digits, dots, dashes and underscores, got "
            f"{name!r}. Pass such a name."
        )
    path = _FOLDER / f"{_PREFIX}{name}"
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
    try:
        fd = os.open(path, flags, 0o600)
        status = os.fstat(fd)
        own = status.st_uid == os.geteuid() and stat.S_ISREG(status.st_mode)
        if own and not status.st_mode & 0o022:
            return fd, path
        os.close(fd)
        why = "belongs to another user, or others may write to it"
    except FileNotFoundError:
        if make:
            raise HostMemoryError(
                f"Expected a folder {_FOLDER} for a shared pool, got none. Mount a tmpfs there "
                f"(docker: --ipc, --shm-size)."
            ) from None
        raise HostMemoryError(
            f"Expected an existing shared pool {name!r}, got none. Pass block_bytes and blocks to "
            f"create it."
        ) from None
    except OSError as error:
        if error.errno in resources.NONE_FREE:
            why = resources.reason(error)
            raise HostMemoryError(f"Expected to open {path}, but {why}.") from None
        if error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise HostMemoryError(
                f"Expected room for a shared pool in {_FOLDER}, got {_free_bytes()} free bytes "
                f"({error.strerror}). Mount it writable, or larger (docker: --shm-size)."
            ) from None
        why = f"cannot be opened ({error.strerror})"
    raise HostMemoryError(
        f"Expected a shared pool of this user at {path}, got a file that {why}. Take another name, "
        f"or run as its owner."
    )


def process_space() -> int:
    """Return the namespace of process numbers: each container has a separate one."""
    with suppress(OSError):  # no /proc
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def started(pid: int) -> int | None:
    """Return the start time of a process, which distinguishes it from a later one of its number;
    None: it ended.

    Raises `HostMemoryError` if the system does not say, as without a free descriptor: a process
    that lives must not count as ended.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # the name of a process may be no text
            fields = file.read().rpartition(b")")[2].split()  # from the state on
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError as error:
        raise HostMemoryError(
            f"Expected to read the state of process {pid}, got an error: {reason(error)}."
        ) from None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@cache
def _watch() -> None:
    """Unlock in a forked child, which must not keep its parent's locks alive; leave every pool at
    exit."""

    def end(call: Callable[[SharedPool], None]) -> None:
        with ExitStack() as each:  # a failure stops none of the others
            for pool in list(_open):
                each.callback(call, pool)

    os.register_at_fork(after_in_child=partial(end, SharedPool._unlock))
    atexit.register(end, SharedPool.__del__)  # some may never have opened
