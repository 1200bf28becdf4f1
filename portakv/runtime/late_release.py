# SPDX-License-Identifier: Apache-2.0
"""Release memory late whose release waits for a device.

To unmap another process's device memory waits for all work of the device, and torch has the
interpreter's lock meanwhile. If that work waits for a word that a thread of this process has to
write, the process stands still until the wait's own limit (benchmarks/NOTES.md, section 77).
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from weakref import WeakSet

# The garbage collector calls `release` at any place, so nothing here has a lock.
_holders: WeakSet[object] = WeakSet()
_kept: deque[object] = deque()


def is_held() -> bool:
    """Return True while releases are to wait."""
    return bool(_holders)


def hold(holder: object) -> None:
    """Keep what is released from now on: work that waits for this process may be under way."""
    _holders.add(holder)


def free(holder: object) -> None:
    """End a `hold`; after the last one, drop what was kept."""
    _holders.discard(holder)
    _drop()


def release(memory: object) -> None:
    """Drop a reference to memory, as soon as nothing holds it."""
    _kept.append(memory)
    _drop()


def _drop() -> None:
    if not is_held():
        with suppress(IndexError):
            while True:
                _kept.popleft()
