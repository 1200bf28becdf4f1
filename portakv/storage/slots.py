# SPDX-License-Identifier: Apache-2.0
"""Slots: one folder of a disk tier. Blocks of one form lie in the slots of one file, and a sealed
record of each in another, written in an order that a kill at any place leaves right."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

import numpy as np

from portakv.errors import StoreBusy, StoreError
from portakv.runtime.bounded import Bounded
from portakv.storage.engine import Engine, Request
from portakv.storage.form import BlockForm
from portakv.storage.image import checksum, header

PAGE, BATCH = 4096, 256  # bytes of a header; how many of them are read at once
OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
#: A record in u64: key (4), generation, bytes of payload, segments, a checksum of each, zeros, and
#: the seal, which is seeded with the slot, so that it holds for no other.
GENERATION, SUMS = 4, 7


class Entry(NamedTuple):
    """What the index knows of a block: where it lies, and what its image must be."""

    slot: int
    generation: int
    checksums: tuple[int, ...]


class Slots:
    """The blocks of ``form`` in ``folder``, in ``room`` for so many bytes (None: as large as it is,
    and not made). ``admit="second"``: a key is taken the second time it is offered.

    Raises `StoreBusy` if another process has the folder, `StoreError` if it cannot be used.
    Attributes: ``count``, ``broken``, ``evicted`` slots; ``generation``, the highest found; ``fd``
    of the blocks, ``direct`` if it goes past the page cache; ``notes``, sentences for `explain`.
    """

    def __init__(
        self, folder: Path, form: BlockForm, room: int | None, engine: Engine, admit: str = "always"
    ) -> None:
        self.folder, self.form, self._second = folder, form, admit == "second"
        self._size = 256 if len(form.segments) <= 24 else 512  # of a record
        self.fd, self._table, self.direct, self.notes = -1, -1, True, list[str]()
        self.generation = self.broken = self.evicted = 0
        self._change = threading.Lock()
        self._index: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first
        self._pins: Counter[int] = Counter()
        self._free: deque[int] = deque()
        try:
            records, known = self._open(room)
            self._records = np.zeros((self.count, self._size // 8), "<u8")
            self._recover(engine, records, known)
        except BaseException as error:
            self.close(sync=False)
            if not isinstance(error, OSError):
                raise
            raise StoreError(
                f"The store's folder {folder} was asked for with {room} bytes, and this was found: "
                f"{error.strerror}. Expected a folder of this user, no link, that can be written "
                f"and has the room; correct the path or the capacity."
            ) from error
        self._free = deque(sorted({*range(self.count)}.difference(self._index.values())))
        self._offered: Bounded[bytes, None] = Bounded("keys offered once", self.count)
        _watch_forks()
        _opened.add(self)

    def _open(self, room: int | None) -> tuple[int, int]:
        """Open, lock and size the files; returns how many records and slots there were."""
        size, told = self.form.image_bytes, self.folder / "form.json"
        if room is not None:
            os.makedirs(self.folder, 0o700, exist_ok=True)
        if self.folder.is_symlink() or self.folder.stat().st_uid != os.geteuid():
            raise PermissionError(1, "it is a link, or another user's")
        found = BlockForm.from_json(told.read_text(errors="replace")) if told.exists() else None
        if found not in (None, self.form) or (found is None and (self.folder / "table").exists()):
            raise StoreError(
                f"{self.folder} was asked for blocks of {self.form}, and its form.json says "
                f"{found or 'nothing'}; restore that, or remove all by `portakv store wipe`."
            )
        self.fd = os.open(self.folder / "slots", OPEN, 0o600)
        self._lock()
        known = os.fstat(self.fd).st_size // size
        self.count = known if room is None else room // size
        if not self.count:
            raise OSError(22, f"a block takes {size}, so that none fits")
        if found is None:
            new = self.folder / "form.json.new"
            new.write_text(self.form.json())
            new.replace(told)
        self._table = os.open(self.folder / "table", OPEN, 0o600)
        records = os.fstat(self._table).st_size // self._size
        _allocate(self._table, self.count * self._size)
        _allocate(self.fd, self.count * size)
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, os.O_DIRECT)
            os.preadv(self.fd, [mmap.mmap(-1, PAGE)], PAGE)
        except OSError as error:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, 0)
            self.direct = False
            self.notes.append(f"{self.folder} refuses O_DIRECT ({error.strerror}): it is buffered.")
        return min(records, self.count), min(known, self.count)

    def _lock(self) -> None:
        """Lock the very file of the I/O: what a killed process began holds it till it landed."""
        holder = self.folder / "form.json.lock"
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = holder.read_text() if holder.exists() else "?"
            raise StoreBusy(
                f"The store's folder {self.folder} was asked for, and process {who} has it open; "
                f"one may. Close it there, or give this process a folder of its own."
            ) from None
        with suppress(OSError):  # on a full disk, too, a store can be opened
            holder.write_text(str(os.getpid()))

    def _recover(self, engine: Engine, records: int, known: int) -> None:
        """Enter what sealed records tell; a slot with a bad record is asked for its header."""
        words = np.fromfile(self.folder / "table", "<u8", records * self._size // 8)
        words = self._records[:records] = words.reshape(records, self._size // 8)
        used, seals = np.flatnonzero(words.any(1)).tolist(), words[:, -1].tolist()
        good = [slot for slot in used if checksum(words[slot, :-1], slot) == seals[slot]]
        keys = [words[slot, :GENERATION].tobytes() for slot in good]
        found = list(zip(words[good, GENERATION].tolist(), good, keys, strict=True))
        # A table of zeros is a new one, or was lost.
        torn = [*{*used}.difference(good), *range(records, known)] if used else range(known)
        pages = np.frombuffer(mmap.mmap(-1, BATCH * PAGE), np.uint8).reshape(BATCH, PAGE)
        for first in range(0, len(torn), BATCH):
            part = list(zip(torn[first : first + BATCH], pages, strict=False))
            asks = [Request(self.fd, self.offset(i), p.ctypes.data, PAGE, False) for i, p in part]
            for (slot, page), moved in zip(part, engine.run(asks), strict=True):
                told = header(page, self.form) if moved == PAGE else "it cannot be read"
                if not isinstance(told, str):
                    self._put(slot, told.key, told.generation, told.checksums)
                    found.append((told.generation, slot, told.key))
        # A prefix outlives its suffix, which was written first or has the higher slot.
        for self.generation, slot, key in sorted(found, key=lambda x: (x[0], -x[1])):
            self._forget(key)
            self._index[key] = slot

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def keys(self) -> list[bytes]:
        """Of all blocks, the least recently used first."""
        return list(self._index)

    def offset(self, slot: int) -> int:
        """Where a slot begins in the file."""
        return slot * self.form.image_bytes

    def touch(self, keys: Sequence[bytes]) -> None:
        """Note that a prefix was used, the last block first, so that it outlives its suffix."""
        with self._change:
            for key in reversed(keys):
                if key in self._index:
                    self._index.move_to_end(key)

    def pin(self, key: bytes) -> Entry | None:
        """Where a block lies, which stays there until `unpin`; None if it is not there."""
        with self._change:
            slot = self._index.get(key)
            if slot is None:
                return None
            self._pins[slot] += 1
            generation, _, many, *sums = self._records[slot, GENERATION:].tolist()
            return Entry(slot, generation, tuple(sums[:many]))

    def unpin(self, entry: Entry, good: bool = True) -> None:
        """Let go of a pin. A block that is no ``good`` is forgotten; its slot is free when the last
        pin goes."""
        slot, held = entry.slot, self._records[entry.slot, :GENERATION].tobytes()
        with self._change:
            if not good and self._index.get(held) == slot:
                del self._index[held]
        if not good:
            self._put(slot)
        with self._change:
            self._pins[slot] -= 1
            if not self._pins[slot]:
                del self._pins[slot]
                if self._index.get(held) != slot:
                    self._free.append(slot)

    def take(self, key: bytes) -> int | None:
        """A slot for a block, its record zeroed; None if all others are pinned, the key is not
        admitted yet, or the table cannot be written."""
        with self._change:
            if self._second and self._offered.pop(key, self) is self:
                self._offered[key] = None
                return None
            idle = (one for one, slot in self._index.items() if slot not in self._pins)
            if not self._free and (victim := next(idle, None)) is not None:
                self._forget(victim)
                self.evicted += 1
            if not self._free:
                return None
            slot = self._free.popleft()
        if self._put(slot):
            return slot
        self.give(slot)
        return None

    def seal(self, slot: int, key: bytes, generation: int, checksums: Sequence[int]) -> bool:
        """Enter a block whose image was written; False if its record cannot be."""
        if not self.direct:
            size = self.form.image_bytes
            os.posix_fadvise(self.fd, slot * size, size, os.POSIX_FADV_DONTNEED)
        written = self._put(slot, key, generation, checksums)
        with self._change:
            if written:
                self._forget(key)
                self._index[key] = slot
            else:
                self._free.append(slot)
        return written

    def give(self, slot: int, broken: bool = False) -> None:
        """Give a taken slot back; a broken one is not used again."""
        with self._change:
            self.broken += broken
            if not broken:
                self._free.append(slot)

    def close(self, sync: bool = True) -> None:
        """Put all on the device, and let go of the folder."""
        for act in (os.fdatasync, os.close) if sync else (os.close,):
            for fd in (self.fd, self._table):
                with suppress(OSError, ValueError):  # ValueError: it was closed before
                    act(fd)
        self.fd = self._table = -1

    def _put(self, slot: int, key: bytes = b"", number: int = 0, sums: Sequence[int] = ()) -> bool:
        """Write a record of a generation ``number``, or zeros; False if it cannot be written."""
        record = self._records[slot]
        record[:] = 0
        if key:
            record[:GENERATION] = np.frombuffer(key, "<u8")
            record[GENERATION:SUMS] = number, self.form.payload_bytes, len(sums)
            record[SUMS : SUMS + len(sums)] = np.array(sums, "<u8")
            record[-1] = checksum(record[:-1], slot)
        try:
            return os.pwrite(self._table, record.data, slot * self._size) == self._size
        except OSError:
            return False

    def _forget(self, key: bytes) -> None:
        slot = self._index.pop(key, None)
        if slot is not None and slot not in self._pins:
            self._free.append(slot)


def _allocate(fd: int, nbytes: int) -> None:
    """Make a file so large, in real space; or leave it as it was."""
    before, disk = os.fstat(fd), os.fstatvfs(fd)
    if nbytes - 512 * before.st_blocks > disk.f_bavail * disk.f_frsize:
        raise OSError(28, f"{disk.f_bavail * disk.f_frsize} bytes are free")
    try:
        os.posix_fallocate(fd, 0, nbytes)
        os.ftruncate(fd, nbytes)
    except OSError:
        os.ftruncate(fd, before.st_size)
        raise


_opened: WeakSet[Slots] = WeakSet()


@cache
def _watch_forks() -> None:
    """A child's copies of the files would hold the parent's lock: the child closes them."""
    os.register_at_fork(after_in_child=lambda: [*map(partial(Slots.close, sync=False), _opened)])
