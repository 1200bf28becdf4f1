# SPDX-License-Identifier: Apache-2.0
"""Waits of tests: for a condition, with one limit that only ends a hang."""

from __future__ import annotations

import os
import time
from typing import Any

_VARIABLE = "PORTAKV_TESTS_SLOWNESS"  # the factor, for the processes that a run of tests starts
_WORK = 300_000  # additions
_SECONDS = 0.02  # that they take on an idle core of 2020


def _slowness() -> float:
    """Return how many times as long as on an idle machine work takes here: measured once for a run
    of tests, or what the number of waiting processes says, if that is more."""
    if known := os.environ.get(_VARIABLE):
        return float(known)
    began = time.perf_counter()
    total = 0
    for number in range(_WORK):
        total += number
    measured = (time.perf_counter() - began) / _SECONDS
    cores = len(os.sched_getaffinity(0))
    factor = max(1.0, measured, os.getloadavg()[0] / cores)
    os.environ[_VARIABLE] = f"{factor:.1f}"
    return factor


#: Seconds after which a wait counts as a hang: 100 on an idle machine, at most 500. The limit of a
#: test in pyproject.toml is longer.
LIMIT = min(100.0 * _slowness(), 500.0)


def until(true: Any, seconds: float = LIMIT) -> bool:
    """Return whether a condition becomes true: as soon as it is, or False after ``seconds``."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
