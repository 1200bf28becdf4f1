# SPDX-License-Identifier: Apache-2.0
"""Voluntary switches of threads: a thread sleeps, and is woken later. Linux counts them."""

from __future__ import annotations

import time
from resource import RUSAGE_SELF, RUSAGE_THREAD, getrusage

#: Seconds between two looks for whether other threads are at rest, and the most looks.
LOOK = 0.01
LOOKS = 100


def own_switches() -> int:
    """Return the voluntary switches of the calling thread."""
    return getrusage(RUSAGE_THREAD).ru_nvcsw


def other_switches() -> int:
    """Return the voluntary switches of all threads of this process but the calling one."""
    return getrusage(RUSAGE_SELF).ru_nvcsw - own_switches()


def rest() -> None:
    """Wait until no other thread of this process has woken for a moment."""
    before = -1
    for _ in range(LOOKS):
        now = other_switches()
        if now == before:
            return
        before = now
        time.sleep(LOOK)
