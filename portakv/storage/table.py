# SPDX-License-Identifier: Apache-2.0
"""The table of a folder's slots: one sealed record for each slot."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from portakv.runtime import linux
from portakv.storage.chains import mark_of
from portakv.storage.files import PAGE, cause_of, file_system_of, open_file
from portakv.storage.form import BlockForm
from portakv.storage.image import checksum

#: Words of a record in u64: key (4), generation, mark of the predecessor, segments, a checksum of
#: each, zeros, and the seal, which is seeded with the slot: it holds for no other. Sealed zeros are
#: no block. In place of the mark older releases wrote the bytes of the payload, which nothing has
#: ever read: they stand for an unknown predecessor.
GENERATION = 4
FOLLOWS = 5
SEGMENTS = 6
SUMS = 7

Records = npt.NDArray[np.uint64]

#: Errors of a file system, or of a sandbox, without fallocate.
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM)
_ZEROS = 1 << 20  # bytes that are written at a time


def records_in(folder: Path, form: BlockForm, count: int) -> Records:
    """Return the records of the first ``count`` slots of a folder's table, or fewer, as u64
    ``[slots, words]``; they may be damaged."""
    words = 32 if len(form.segments) <= 24 else 64
    try:
        fd = open_file(folder / "table")
    except FileNotFoundError:
        return np.zeros((0, words), "<u8")
    with os.fdopen(fd, "rb") as file:
        numbers = np.fromfile(file, "<u8", count * words)
    return numbers[: len(numbers) // words * words].reshape(-1, words)


def write_record(table: int, records: Records, slot: int) -> None:
    """Seal the record of a slot and write it to the file ``table``. Raise `OSError` if it cannot be
    written whole."""
    record = records[slot]
    record[-1] = checksum(record[:-1], slot)
    written = os.pwrite(table, record.data, slot * record.nbytes)
    if written != record.nbytes:
        raise OSError(errno.EIO, "the write was cut short")


def cut_tail(slots: int, table: int, records: Records, keep: int, image_bytes: int) -> None:
    """Truncate the files of slots and records after the first ``keep`` slots, whose records are
    empty."""
    os.ftruncate(slots, keep * image_bytes)
    os.ftruncate(table, min(keep, len(records)) * records.shape[1] * 8)


def extend(sizes: Mapping[int, int]) -> bool:
    """Make open files so large, in real space; or leave all as they were.

    Returns False if the file system cannot allocate space without writing it.
    """
    before = {fd: os.fstat(fd).st_size for fd in sizes}
    allocates = True
    try:
        for fd, nbytes in sizes.items():
            if nbytes > before[fd]:
                allocates &= _allocate(fd, before[fd], nbytes - before[fd])
    except OSError:
        for fd, nbytes in before.items():
            os.ftruncate(fd, nbytes)
        raise
    return allocates


def no_space_in(folder: Path) -> str:
    """Return why a new file in a folder gets no space, as half a sentence; empty if it does.

    Leaves no file behind.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            extend({file.fileno(): PAGE})
    except OSError as error:
        return f"{cause_of(error)} ({file_system_of(folder)})"
    return ""


def _allocate(fd: int, offset: int, nbytes: int) -> bool:
    """Extend a file by zeros in real space; return False if they had to be written."""
    try:
        linux.fallocate(fd, offset, nbytes)
        return True
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
    _write_zeros(fd, offset, nbytes)
    return False


def _write_zeros(fd: int, offset: int, nbytes: int) -> None:
    """Write zeros to a file, by another descriptor: that of the file may bypass the page cache."""
    plain = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        zeros = bytes(min(nbytes, _ZEROS))
        at = offset
        while at < offset + nbytes:
            at += os.pwrite(plain, zeros[: offset + nbytes - at], at)
        os.fdatasync(plain)  # some file systems find space only now
    finally:
        os.close(plain)


def empty(table: int, records: Records, slot: int) -> None:
    """Write an empty record into a slot."""
    records[slot] = 0
    write_record(table, records, slot)


class Place(NamedTuple):
    """A slot in one of several tables."""

    table: int
    slot: int


class Successions:
    """The blocks in the tables of all folders of a form, and which block follows which."""

    def __init__(self, tables: Sequence[Records]) -> None:
        self._marks = dict[Place, int]()
        self._follows = dict[Place, int]()
        self._by_mark = dict[int, Place]()
        self._following = dict[int, list[Place]]()
        for number, records in enumerate(tables):
            text = records[:, :GENERATION].tobytes()
            for slot in np.flatnonzero(records[:, SEGMENTS]).tolist():
                place = Place(number, slot)
                mark = mark_of(text[slot * 32 : slot * 32 + 32])
                follows = int(records[slot, FOLLOWS])
                self._marks[place] = mark
                self._follows[place] = follows
                self._by_mark[mark] = place
                self._following.setdefault(follows, []).append(place)

    def before(self, mark: int) -> list[Place]:
        """Return the places of the block of a mark, of its predecessor, and so on up to the first
        block."""
        chain = dict[Place, None]()
        place = self._by_mark.get(mark)
        while place is not None and place not in chain:
            chain[place] = None
            place = self._by_mark.get(self._follows[place])
        return [*chain]

    def from_slot(self, keep: int) -> list[Place]:
        """Return the blocks of the first table from a slot on, and all of their successors in any
        table.

        Each block comes before its predecessor: a kill during their removal in this order leaves no
        block without its predecessor.
        """
        tail = [place for place in self._marks if place.table == 0 and place.slot >= keep]
        reached = self._reach(tail)
        marks = {self._marks[place] for place in reached}
        first = [place for place in reached if self._follows[place] not in marks]
        # Blocks of a circle, which only damage or a caller's mistake makes, have no first block.
        in_order = dict.fromkeys([*self._reach(first), *reached])
        return [*in_order][::-1]

    def _reach(self, first: list[Place]) -> list[Place]:
        """Return places and the places of all successors of their blocks.

        Each comes after its predecessor if none of the given blocks follows another of them.
        """
        reached = dict[Place, None]()
        pending = first[:]
        while pending:
            place = pending.pop()
            if place not in reached:
                reached[place] = None
                pending += self._following.get(self._marks[place], ())
        return [*reached]
