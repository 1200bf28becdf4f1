# SPDX-License-Identifier: Apache-2.0
"""Collect the reasons why blocks of a load or a save did not land.

Tiers report a reason for each block, and the handle's error counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from portakv.storage.work import Mask, Task

#: The bytes came and are wrong, or the device has lost them.
DAMAGED = "damaged"
#: The tier did not answer, or failed.
UNREACHABLE = "unreachable"
#: The tier answered that it may not be read or written.
REFUSED = "refused"
#: The block was there when the call was planned, or was saved by it, and is gone.
EVICTED = "evicted"
#: A caller deleted the block.
DELETED = "deleted"
#: The tier does not have the block.
MISSING = "missing"
#: The deadline passed before the block came.
LATE = "late"
#: The call was cancelled before the block came.
CANCELLED = "cancelled"
#: The tier had no room for the block that a save brought, or staging had none in time.
DROPPED = "dropped"
#: The block does not fit into packed slots, and the store has no raw form that keeps it.
OVERFLOWED = "not packed"
#: The block is compressed, and the package that decompresses it is not installed.
UNREADABLE = "not readable"
#: What moves the block raised an exception.
FAILED = "failed"


class Reason(NamedTuple):
    """A reason of a tier for a block that it did not read or write.

    ``kind`` is one of the words above; ``where`` is the path or URL of the tier, with details if
    there are any.
    """

    kind: str
    where: str


#: Takes the key of a block and why it did not come, or was not written.
Report: TypeAlias = Callable[[bytes, Reason], object]


def ignore(_: bytes, __: Reason) -> None:
    """Ignore a report."""


class Reasons:
    """The reasons that tiers reported for blocks of one transfer, by key."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, list[Reason]] = {}

    def report(self, key: bytes, reason: Reason) -> None:
        """Note a reason. One worker at a time reports for a key."""
        known = self._by_key.setdefault(key, [])
        if reason not in known:
            known.append(reason)

    def of(self, key: bytes) -> list[Reason]:
        """Return the reasons for a block; none if no tier reported one."""
        return self._by_key.get(key, [])


class Explanation:
    """The reasons for the blocks of a call that did not land, for the error of its handle.

    Attributes:
        sources: the reasons of each transfer that the call follows.
        tasks: the tasks that move blocks for the call, with the numbers of these among its blocks
            and among those of the task.
        located: the blocks that a tier had when the call was planned, bool ``[blocks]``; None for
            a save.
        kept_in: the tier of a save, which may evict blocks before the save ends.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = keys
        self.sources: list[Reasons] = []
        self.tasks: list[tuple[Task, Sequence[int], Sequence[int]]] = []
        self.located: Mask | None = None
        self.saved_in = ""

    def sentence(self, landed: Mask) -> str:
        """Return the reasons with their counts, the most frequent first; empty if none is known
        for the blocks that did not land."""
        unrun, untaken = self._by_tasks(landed)
        counts: Counter[Reason] = Counter()
        for number, key in enumerate(self._keys):
            if landed[number]:
                continue
            why = [*self._reasons(number, key), *unrun.get(number, ())]
            if not why and self.saved_in and number not in untaken:
                why = [Reason(EVICTED, self.saved_in)]
            counts.update(why)
        return ", ".join(
            f"{count} {reason.kind} ({reason.where})" for reason, count in counts.most_common()
        )

    def _by_tasks(self, landed: Mask) -> tuple[dict[int, dict[Reason, None]], set[int]]:
        """Return why tasks did not run for blocks that did not land, and the blocks whose task ran
        without success."""
        unrun: dict[int, dict[Reason, None]] = {}
        untaken = set[int]()
        for task, blocks, rows in self.tasks:
            pairs = zip(blocks, rows, strict=True)
            missing = [(block, row) for block, row in pairs if not landed[block]]
            if task.state != "landed":
                reason = Reason(task.state, task.queue.name)
                for block, _ in missing:
                    unrun.setdefault(block, {})[reason] = None
            else:
                untaken.update(block for block, row in missing if not task.landed[row])
        return unrun, untaken

    def _reasons(self, number: int, key: bytes) -> list[Reason]:
        """Return why a block did not land. That a tier lacks it explains nothing if another tier
        had it and failed."""
        if self.located is not None and not self.located[number]:
            return [Reason(MISSING, "no tier has it")]
        known = list(dict.fromkeys(reason for source in self.sources for reason in source.of(key)))
        failures = [reason for reason in known if reason.kind != MISSING]
        return failures or known[:1]
