# SPDX-License-Identifier: Apache-2.0
"""The table of a folder's slots: one sealed record for each slot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from portakv.storage.chains import mark_of
from portakv.storage.files import open_file
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


def records_in(folder: Path, form: BlockForm, count: int) -> Records:
    """Return the records of the first ``count`` slots of a folder's table, or fewer, as u64
    ``[slots, words]``; they may be damaged."""
    words = 32 if len(form.segments) <= 24 else 64
    try:
        fd = open_file(folder / "table")
    except FileNotFoundError:
        return np.zeros((0, words), "<u8")
    with os.fdopen(fd, "rb") as file:
        found = np.fromfile(file, "<u8", count * words)
    return found[: len(found) // words * words].reshape(-1, words)


def write_record(table: int, records: Records, slot: int) -> bool:
    """Seal the record of a slot and write it to the file ``table``; return whether that could be
    done."""
    record = records[slot]
    record[-1] = checksum(record[:-1], slot)
    try:
        written = os.pwrite(table, record.data, slot * record.nbytes)
    except OSError:
        return False
    return bool(written == record.nbytes)


def cut_tail(
    slots: int,
    table: int,
    records: Records,
    gone: Sequence[int],
    keep: int,
    image_bytes: int,
) -> None:
    """Cut the files of slots and records behind the first ``keep`` slots, once the records of
    ``gone`` are empty, which `with_successors` returned. A kill at any step leaves no block without
    the one that it follows."""
    for slot in gone:
        records[slot] = 0
        write_record(table, records, slot)
    os.ftruncate(slots, keep * image_bytes)
    os.ftruncate(table, min(keep, len(records)) * records.shape[1] * 8)


def with_successors(records: Records, keep: int) -> list[int]:
    """Return the slots from ``keep`` on that have blocks, and those of all blocks that follow from
    these. Each block comes before the one that it follows."""
    used = np.flatnonzero(records[:, SEGMENTS]).tolist()
    text = records[:, :GENERATION].tobytes()
    marks = {slot: mark_of(text[slot * 32 : slot * 32 + 32]) for slot in used}
    following: dict[int, list[int]] = {}
    for slot in used:
        following.setdefault(int(records[slot, FOLLOWS]), []).append(slot)

    found = _reach([slot for slot in used if slot >= keep], marks, following)
    found_marks = {marks[slot] for slot in found}
    first = [slot for slot in found if int(records[slot, FOLLOWS]) not in found_marks]
    # Blocks of a circle, which only damage or a caller's mistake makes, come from no first one.
    in_order = dict.fromkeys([*_reach(first, marks, following), *found])
    return [*in_order][::-1]


def _reach(first: list[int], marks: dict[int, int], following: dict[int, list[int]]) -> list[int]:
    """Return slots and those of all blocks that follow from them, each after its predecessor if
    none of the first ones follows from another one."""
    found = dict[int, None]()
    pending = first[:]
    while pending:
        slot = pending.pop()
        if slot not in found:
            found[slot] = None
            pending += following.get(marks[slot], ())
    return [*found]
