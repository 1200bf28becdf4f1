# SPDX-License-Identifier: Apache-2.0
"""Release memory late whose release waits for a device.

To unmap another process's device memory waits for all work of the device, and torch has the
interpreter's lock meanwhile. If that work waits for a word that a thread of this process has to
write, the process stands still until the wait's own limit (benchmarks/notes/engines.md). To
unregister host memory waits for the device, too.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

# The garbage collector calls `release` at any place, so nothing here has a lock.
_holders = dict[int, weakref.ref[object]]()
_waiting: deque[Callable[[], object]] = deque()


def is_held() -> bool:
    """Return True while releases have to wait."""
    return any(holder() is not None for holder in [*_holders.values()])


def hold(holder: object) -> None:
    """Have releases wait from now on: work that waits for this process may be under way.

    Ends with `free`, or with the life of the holder.
    """
    _holders[id(holder)] = weakref.ref(holder, _run)


def free(holder: object) -> None:
    """End a `hold`; after the last one, make the releases that waited."""
    _holders.pop(id(holder), None)
    _run()


def release(act: Callable[[], object]) -> None:
    """Make a release, which must not raise, as soon as nothing holds it."""
    _waiting.append(act)
    _run()


def _run(_: object = None) -> None:
    with suppress(IndexError):
        while not is_held():  # each time: another thread may begin to hold
            _waiting.popleft()()
