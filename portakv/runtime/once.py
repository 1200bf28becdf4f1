# SPDX-License-Identifier: Apache-2.0
"""The lock of a process for what exists once: choices of backends, kernels, tables of costs.

A thread that needs such an object waits for the thread that makes it. They have one lock, since
making one object makes others: a choice tests kernels, and to load these reserves pinned memory.
With several locks two threads could wait for each other.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager

_lock: AbstractContextManager[bool]


def making() -> AbstractContextManager[bool]:
    """Return the lock as a context, which a thread that has it may enter again.

    Nothing takes it for a copy of forms that are known.
    """
    return _lock


def _renew() -> None:
    """Begin with a free lock: a forked process lacks the thread of its parent that may have it."""
    global _lock
    _lock = threading.RLock()


_renew()
os.register_at_fork(after_in_child=_renew)
