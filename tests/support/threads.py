# SPDX-License-Identifier: Apache-2.0
"""Concurrent work of several threads, for tests of the state that they share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def run_threads(work: Callable[[Any], object], names: Sequence[Any]) -> None:
    """Run ``work`` for each name in a thread, switching often; the first exception counts."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(work, names))
    finally:
        sys.setswitchinterval(interval)
