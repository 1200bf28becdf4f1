# SPDX-License-Identifier: Apache-2.0
"""`Space` bounds the slots of all forms in a folder of a disk tier."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, Protocol
from weakref import WeakSet

import numpy as np

from portakv.errors import StoreError
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.storage.files import OPEN, form_in, lock, open_file, unusable
from portakv.storage.form import BlockForm
from portakv.storage.table import SEGMENTS, Records, Successions, cut_tail, empty, records_in

EXTENT = 64 << 20  # the most bytes by which a form grows or shrinks at a time
_NO_BOUND = (1 << 63) - 1
_warnings = RateLimitedLog(logging.getLogger(__name__))


class Reader(Protocol):
    """Slots that this store has open to read."""

    folder: Path

    @property
    def fd(self) -> int:
        """Return the descriptor of the file of slots; negative if it is closed."""

    def cut(self, nbytes: int) -> bool:
        """Give slots back, of so many bytes if there are some; return True if slots went."""


class Writer(Reader, Protocol):
    """Slots that this store has open to save. All of a folder have one lock."""

    def age(self) -> int:
        """Return for how many uses the block that goes next here was not used; 0 if none can go.
        Under the lock."""

    def age_anywhere(self) -> int:
        """Return the same for the block of the form that goes next in any folder."""

    def yield_share(self, nbytes: int) -> bool:
        """Give back so many bytes of slots or more, under the lock; return True if slots went."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of all slots."""

    @property
    def claim(self) -> int:
        """Return the descriptor that claims the folder; negative if it is closed."""


class _File(NamedTuple):
    """The file of slots of a form."""

    used_at: int  # when a store last opened it to save, in ns
    folder: Path
    nbytes: int


class Space:
    """The bound ``capacity``, in bytes, of all slots in ``folder``, which the caller has claimed.

    A form that grows requests space. If the bound or the file system leaves none, other forms give
    slots back from the end of their files. Closed forms go first, the one that was not opened to
    save for the longest time at the front; then ``readers``, the forms that this store has open to
    read. Empty slots at the end of a file go before slots with blocks. All successors of an evicted
    block go with it, also those in ``others``, the claimed folders of the same tier.

    ``writers`` are the forms that this store saves. One of them takes slots of another one only if
    the next block to go has not been used for longer there (`take_over`).
    """

    def __init__(self, folder: Path, capacity: int = _NO_BOUND) -> None:
        self.folder = folder
        self.capacity = capacity
        self.readers: WeakSet[Reader] = WeakSet()
        self.writers: WeakSet[Writer] = WeakSet()
        self.others: Sequence[Path] = ()
        self._trimmed = set[Path]()  # closed forms without empty slots at the end

    def whole(self) -> int:
        """Return the bytes that all forms can have: the bound, or the file system's size."""
        about = os.statvfs(self.folder)
        size = about.f_blocks * about.f_frsize
        return min(self.capacity, size) if size else self.capacity

    def make_fit(self, own: Path) -> None:
        """Make forms other than ``own`` give way while all exceed the bound, as after a change of
        it."""
        while (excess := self._allocated() - self.capacity) > 0:
            if not (self.yield_space(own, excess) or self._largest_yields(excess)):
                return

    def _largest_yields(self, nbytes: int) -> bool:
        """Make the largest of several ``writers`` give back an eighth, or ``nbytes`` if these are
        less; return True if it did."""
        present = [writer for writer in [*self.writers] if writer.fd >= 0]
        if len(present) < 2:
            return False
        largest = max(present, key=lambda writer: writer.nbytes)
        return largest.yield_share(min(nbytes, largest.nbytes // 8))

    def take_over(self, own: Writer, nbytes: int) -> bool:
        """Make another form that this store saves give back slots of ``nbytes`` or more, if its
        next block to go here has not been used for longer than that of ``own`` in any folder.
        Return True if one did.

        Ages that differ by less than an eighth count as equal, so that forms that are used alike
        do not take slots from each other in turns.
        """
        others = [other for other in [*self.writers] if other is not own and other.fd >= 0]
        if not others:
            return False
        ages = {other: other.age() for other in others}
        oldest = max(others, key=ages.__getitem__)
        return 8 * ages[oldest] > 9 * own.age_anywhere() and oldest.yield_share(nbytes)

    def allowance(self, own: Path, least: int, most: int) -> int:
        """Return the bytes that the form ``own`` may allocate, at most ``most``.

        Other forms give slots back if these are less than ``least``.
        """
        while True:
            free = min(self.capacity - self._allocated(), self.free())
            if free >= least:
                return min(free, most)
            if not self.yield_space(own, least - free):
                return 0

    def free(self) -> int:
        """Return the bytes that the file system has free for this user."""
        about = os.statvfs(self.folder)
        # A file system of no blocks has no limit.
        return about.f_bavail * about.f_frsize if about.f_blocks else _NO_BOUND

    def yield_space(self, own: Path, nbytes: int) -> bool:
        """Make another form than ``own`` give back slots of ``nbytes`` or more; return True if one
        did."""
        readers = {slots.folder: slots for slots in [*self.readers] if slots.fd >= 0}
        others = [file for file in self._files() if file.folder != own and file.nbytes]
        closed = [file for file in others if file.folder not in readers]
        for file in closed:
            if file.folder not in self._trimmed:
                self._trimmed.add(file.folder)
                if _cut_closed(file.folder, 0, self.others):
                    return True
        for file in closed:
            if _cut_closed(file.folder, _share(file, nbytes), self.others):
                return True
        return any(
            readers[file.folder].cut(_share(file, nbytes))
            for file in others
            if file.folder in readers
        )

    def _allocated(self) -> int:
        """Return the bytes of the slots of all forms."""
        return sum(file.nbytes for file in self._files())

    def _files(self) -> list[_File]:
        """Return the files of slots of all forms, the least recently used first."""
        return sorted(self._each_file())

    def _each_file(self) -> Iterator[_File]:
        """Yield the file of slots of each folder that has one."""
        for name in os.listdir(self.folder):
            place = self.folder / name
            # Not a folder of a form, of another user as lost+found, or removed meanwhile. Another
            # error is of the device: the save that needs space reports it.
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                about = os.lstat(place / "slots")
                yield _File(about.st_mtime_ns, place, about.st_size)


def _share(file: _File, nbytes: int) -> int:
    """Return the bytes that a form gives back when ``nbytes`` are missing.

    These are more than ``nbytes``, so that not every new block makes another form give slots back.
    """
    return max(nbytes, min(EXTENT, file.nbytes // 8))


class _Closed(NamedTuple):
    """The files of a form that no store has open, and its records."""

    slots: int
    table: int
    records: Records


def _open_closed(folder: Path, form: BlockForm, undo: ExitStack) -> _Closed | None:
    """Lock and open a form that no store has open; None if a store has it."""
    slots = lock(folder / "slots")
    if slots < 0:
        return None
    undo.callback(os.close, slots)
    table = open_file(folder / "table", OPEN)
    undo.callback(os.close, table)
    count = os.fstat(slots).st_size // form.image_bytes
    return _Closed(slots, table, records_in(folder, form, count))


def _cut_closed(folder: Path, nbytes: int, others: Sequence[Path]) -> bool:
    """Truncate slots of so many bytes or more at the end of a form that no store has open.

    0 bytes: only the empty slots there. All successors of the removed blocks go with them, also in
    the same form of ``others``. Returns True if slots went. A folder that cannot be read loses
    none, which is logged: its blocks take space that no store uses.
    """
    with ExitStack() as undo:
        try:
            form = form_in(folder)
            own = _open_closed(folder, form, undo) if form.name == folder.name else None
            if own is None:
                return False
            about = os.fstat(own.slots)
            size = form.image_bytes
            count = about.st_size // size
            keep = max(count - -(-nbytes // size), 0)
            if not nbytes:
                keep = _past_used(own.records, count)
            if keep >= count:
                return False
            files = [own, *_closed_in(others, form, undo)]
            for number, slot in Successions([file.records for file in files]).from_slot(keep):
                empty(files[number].table, files[number].records, slot)
            cut_tail(own.slots, own.table, own.records, keep, size)
            os.utime(own.slots, ns=(about.st_atime_ns, about.st_mtime_ns))  # no store has used it
            return True
        except FileNotFoundError:  # it was removed meanwhile
            return False
        except (OSError, StoreError) as error:
            why = error if isinstance(error, StoreError) else unusable(folder, error)
            text = "The blocks in %s give no space back. %s"
            _warnings.warning(f"kept {folder}", text, folder, why, lines=1)
            return False


def _closed_in(folders: Sequence[Path], form: BlockForm, undo: ExitStack) -> Iterator[_Closed]:
    """Yield the files of a form in each folder that has it and can be read."""
    for folder in folders:
        # The folder has no such form, or a damaged one. Its blocks stay without predecessors, as
        # after a kill, and go in their turn.
        with suppress(OSError, StoreError):
            if form_in(folder / form.name) == form:
                closed = _open_closed(folder / form.name, form, undo)
                if closed is not None:
                    yield closed


def _past_used(records: Records, count: int) -> int:
    """Return the number of the slot after the last slot with a block.

    Returns ``count`` if records are missing, because they may be lost.
    """
    used = np.flatnonzero(records[:, SEGMENTS])
    if len(records) < count or not len(used):
        return count
    return int(used[-1]) + 1
