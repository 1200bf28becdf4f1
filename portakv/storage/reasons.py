# SPDX-License-Identifier: Apache-2.0
"""The reasons that tiers report for blocks of a load or a save that did not land.

The error of a handle counts them; see `portakv.storage.calls.Explanation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

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
