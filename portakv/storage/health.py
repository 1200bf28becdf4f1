# SPDX-License-Identifier: Apache-2.0
"""`Health` says whether a folder of slots gets space, and whether its files are in their places."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.storage.files import Descriptors, astray, cause_of, file_system_of
from portakv.storage.space import EXTENT, Space

_WRITTEN = 4 << 20  # the most bytes of new slots that are written while others wait for the lock
_ADVICE = {
    errno.ENOSPC: "Free space there, or lower the capacity.",
    errno.EDQUOT: "Raise the quota, or lower the capacity.",
    errno.EFBIG: "Raise the limit, or lower the capacity.",
}
_warnings = RateLimitedLog(logging.getLogger(__name__))


class Shortage(NamedTuple):
    """Why a folder has fewer slots than its capacity allows.

    Attributes:
        errno: the error of the file system when slots were added last.
        free: the bytes that were free in it then.
        missing: the slots that the folder lacked then.
        slot_bytes: the bytes of a slot.
        why: the folder, its slots and the file system, without a period.
    """

    errno: int
    free: int
    missing: int
    slot_bytes: int
    why: str

    @property
    def sentence(self) -> str:
        """Return why, and what to do."""
        return f"{self.why}. {_ADVICE.get(self.errno, 'Use a folder of another file system.')}"


class Health:
    """What keeps a folder of slots from storing blocks. Each change is logged once.

    Attributes:
        configured: the slots of the capacity, for which the file system may be too small.
        growth: the most bytes of slots that are added at a time.
        lost: why a later start would not find the files of the blocks, at the last `look`; empty if
            it would.
        shortage: why the file system gave no more slots at the last attempt; None if it did, or if
            none are missing.
        table_fault: why the last record could not be written; empty if it was.
        free_bytes: of the file system, by `measure`; None if that is not known.
        notes: sentences for `explain` that stay true.
    """

    def __init__(self, folder: Path, space: Space) -> None:
        self._folder = folder
        self._space = space
        self.configured = 0
        self.growth = EXTENT
        self.lost = ""
        self.shortage: Shortage | None = None
        self.table_fault = ""
        self.free_bytes: int | None = None
        self.notes = list[str]()

    def look(self, files: Descriptors) -> str:
        """Return why a later start would not find open files; empty if it would.

        Files may be removed, moved, or hidden by another file system while the store has them open.
        Their blocks can be loaded until the store is closed; new ones would be lost.
        """
        if files.slots < 0 or files.table < 0:
            return ""
        lost = ""
        for name, fd in (("slots", files.slots), ("table", files.table)):
            try:
                why = astray(self._folder / name, fd)
            except OSError:  # the store was closed meanwhile
                return ""
            if why:
                lost = f"{self._folder / name} {why}"
        if bool(lost) != bool(self.lost):
            text = "The files of %s are in their place again, and blocks are stored there."
            if lost:
                text = "%s, while a store has it open. Nothing is stored there any more, and the "
                text += "stored blocks end with this process. Restore the folder, or restart."
            topic = f"{'lost' if lost else 'back'} {self._folder}"
            _warnings.warning(topic, text, lost or self._folder, lines=1)
        self.lost = lost
        return lost

    def measure(self) -> None:
        """Note how many bytes are free in the file system."""
        try:
            self.free_bytes = self._space.free()
        except OSError:  # the folder is gone, which `look` reports
            self.free_bytes = None

    def fall_short(self, error: OSError | None, count: int, slot_bytes: int) -> None:
        """Note that the file system gives no slots after the first ``count`` ones.

        ``error``: of the file system; None: it has no space.
        """
        if error is None:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        before = self.shortage
        if before is not None and before.errno == error.errno:
            return  # blocks that are dropped for one reason are counted together
        self.shortage = self._shortage_by(error, count, slot_bytes)
        topic = f"full {self._folder.parent}"
        _warnings.warning(topic, "%s", self.shortage.sentence, lines=1)

    def _shortage_by(self, error: OSError, count: int, slot_bytes: int) -> Shortage:
        folder = self._folder.parent
        free = self._space.free()
        self.free_bytes = free
        why = (
            f"{folder} has {count} of the {self.configured} slots of its capacity, as its file "
            f"system ({file_system_of(folder)}, {free} bytes free) gives no more: {cause_of(error)}"
        )
        return Shortage(error.errno or 0, free, self.configured - count, slot_bytes, why)

    @property
    def missing(self) -> int:
        """Return how many slots of the capacity the file system had no space for at the last
        attempt; 0 if it had some, or has some now by `measure`."""
        shortage = self.shortage
        if shortage is None:
            return 0
        free = self.free_bytes
        freed = free is not None and free >= shortage.free + shortage.slot_bytes
        return 0 if freed and shortage.errno == errno.ENOSPC else shortage.missing

    def note_written(self) -> None:
        """Note that the file system allocates no space in advance: fewer slots come at a time."""
        if self.growth == _WRITTEN:
            return
        self.growth = _WRITTEN
        folder = self._folder.parent
        self.notes.append(
            f"{folder} lies on {file_system_of(folder)}, which allocates no space in advance: each "
            f"new slot is written twice."
        )

    def note_record(self, error: OSError | None) -> None:
        """Note that a record could not be written, or that it was."""
        self.table_fault = ""
        if error is not None:
            table = self._folder / "table"
            self.table_fault = f"{table} cannot be written: {cause_of(error)}"
            _warnings.warning(f"table {table}", "%s", self.table_fault, lines=1)

    def close(self, descriptors: Sequence[int], sync: bool) -> None:
        """Close files, with ``sync`` after all is on the device; log why it may not be."""
        for act in (os.fdatasync, os.close) if sync else (os.close,):
            for fd in descriptors:
                try:
                    act(fd)
                except OSError as error:  # the other files are closed, too
                    text = "The last blocks in %s may be lost, as its files cannot be closed: %s."
                    topic = f"close {self._folder}"
                    _warnings.warning(topic, text, self._folder, cause_of(error), lines=1)

    def reasons(self) -> set[str]:
        """Return why no block is stored for now; all of it is logged."""
        short = set[str]() if self.shortage is None else {self.shortage.why}
        return short | {each for each in (self.lost, self.table_fault) if each}

    def sentences(self) -> list[str]:
        """Return sentences for `explain`, as it is after `look` and `measure`."""
        if self.lost:
            return [*self.notes, f"{self.lost}: nothing is stored there any more."]
        if self.missing and self.shortage is not None:
            return [*self.notes, self.shortage.sentence]
        return [*self.notes]
