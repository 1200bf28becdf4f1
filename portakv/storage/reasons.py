# SPDX-License-Identifier: Apache-2.0
"""Why blocks of a load or a save did not land: tiers report a reason for each block, and the
handle's error counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

#: The bytes came and are wrong, or the device has lost them.
DAMAGED = "damaged"
#: The tier did not answer, or failed.
UNREACHABLE = "unreachable"
#: The tier answered that it may not be read or written.
REFUSED = "refused"
#: The block was there when the call was planned, and is gone.
EVICTED = "evicted"
#: The tier does not have the block.
MISSING = "missing"
#: The deadline passed, or the call was cancelled, before the block came.
LATE = "late"
#: The tier had no room for the block that a save brought.
DROPPED = "dropped"


class Reason(NamedTuple):
    """Why a tier did not read or write a block: one of the words above; path or URL of the tier,
    with details if there are any."""

    kind: str
    where: str


#: Takes the key of a block and why it did not come, or was not written.
Report: TypeAlias = Callable[[bytes, Reason], object]


def ignore(_: bytes, __: Reason) -> None:
    """Report to no one."""


class Reasons:
    """The reasons of one transfer, by key; each tier that failed has one."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, list[Reason]] = {}

    def report(self, key: bytes, reason: Reason) -> None:
        """Note a reason. One worker at a time reports for a key."""
        reasons = self._by_key.setdefault(key, [])
        if reason not in reasons:
            reasons.append(reason)

    def of(self, key: bytes) -> list[Reason]:
        """Return the reasons for a block; none if no tier reported one."""
        return [*self._by_key.get(key, ())]


def count_reasons(keys: Iterable[bytes], sources: Sequence[Reasons]) -> Counter[Reason]:
    """Count the reasons of blocks that did not land. A tier that lacks a block explains nothing if
    another tier had it and failed."""
    counts: Counter[Reason] = Counter()
    for key in keys:
        reasons = dict.fromkeys(reason for source in sources for reason in source.of(key))
        failures = [reason for reason in reasons if reason.kind != MISSING]
        counts.update(failures or [*reasons][:1] or [Reason(MISSING, "no tier has it")])
    return counts


def sentence(counts: Counter[Reason]) -> str:
    """Return reasons as text, the most frequent first."""
    parts = [f"{count} {reason.kind} ({reason.where})" for reason, count in counts.most_common()]
    return ", ".join(parts)
