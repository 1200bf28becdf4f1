# SPDX-License-Identifier: Apache-2.0
"""`Occupancy` records which slots of a folder are free, pinned, or being written."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from portakv.storage.chains import UNKNOWN

#: Seconds in which a write of several ends, or blocks wait for none of them any more.
PATIENCE = 2.0


class Write(NamedTuple):
    """A block that is being written, and the mark that it follows."""

    key: bytes
    follows: int


NO_WRITE = Write(b"", UNKNOWN)


class Occupancy:
    """The slots that are free, pinned, or being written, and the number of losses.

    Attributes:
        free: slots without a block.
        pins: the number of pins of each pinned slot.
        writes: the blocks that are being written, by slot.
        late: slots of writes for which no block waits any more.
        written: notified when a write ends in any folder of the form.
        broken: the number of faulty slots, which are not used again.
        evicted: the number of evicted blocks.
    """

    def __init__(self, written: threading.Condition) -> None:
        self.free = deque[int]()
        self.pins: Counter[int] = Counter()
        self.writes = dict[int, Write]()
        self.late = set[int]()
        self.written = written
        self.broken = 0
        self.evicted = 0

    def past_free(self, count: int) -> int:
        """Return the number of the slot after the last slot, of ``count``, that is not free."""
        free = {*self.free}
        past = count
        while past - 1 in free:
            past -= 1
        return past

    def past_used(self) -> int:
        """Return the number of the slot after the last slot that is pinned or being written."""
        return max((slot + 1 for slot in (*self.pins, *self.writes)), default=0)

    def writes_after(self, key: bytes, call: Mapping[bytes, int], others: bool) -> bool:
        """Return True if blocks are being written, and are not late, that come after a block in its
        call; with ``others``, also if these belong to other calls."""
        past = len(call)
        place = call.get(key, past)
        other = past if others else -1
        writes = self.writes.items()
        return any(call.get(x.key, other) > place for slot, x in writes if slot not in self.late)

    def wait(self, folders: Sequence[Occupancy]) -> None:
        """Wait for the end of a write, under the lock. If none ends in time, all writes of the
        folders are late: else each of the next blocks would wait as long."""
        if not self.written.wait(PATIENCE):
            for each in folders:
                each.late.update(each.writes)

    def end_write(self, slot: int) -> Write:
        """Note that a slot is not being written any more, and return its write."""
        self.late.discard(slot)
        return self.writes.pop(slot, NO_WRITE)
