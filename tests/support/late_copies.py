# SPDX-License-Identifier: Apache-2.0
"""Copies of a worker side that begin some steps late, as on a busy machine."""

from __future__ import annotations

import importlib
import threading
import time
from typing import Any

LATE = 12  # steps by which a copy is late
STALL = 1.0  # seconds without a step, after which it begins


def read_late(worker_side: Any) -> None:
    """Let each copy of a save or load that a worker makes begin some steps late.

    A copy that a step makes itself, or waits for, is not late. ``worker_side``: of this process.
    """
    steps = [0]
    last = [time.monotonic()]  # step
    stopping = threading.Event()
    stop = worker_side.stop
    save = worker_side.save

    def stop_saves(plan: Any) -> None:
        stopping.set()
        stop(plan)
        stopping.clear()

    def count_step(plan: Any) -> None:
        steps[0] += 1
        last[0] = time.monotonic()
        save(plan)

    worker_side.stop = stop_saves
    worker_side.save = count_step
    rows: Any = importlib.import_module("portakv.storage.memory")
    copy_rows = rows.copy_rows
    copy_long_runs = rows.copy_long_runs
    waited = threading.local()  # a copy that `copy_long_runs` leaves to `copy_rows`

    def wait() -> None:
        first = steps[0]
        in_step = threading.current_thread() is threading.main_thread()
        while not (in_step or stopping.is_set() or steps[0] >= first + LATE):
            if time.monotonic() > last[0] + STALL:
                break
            time.sleep(1e-3)

    def long_runs(*args: Any) -> bool:
        wait()
        copied: bool = copy_long_runs(*args)
        waited.before = not copied
        return copied

    def late(*args: Any, **terms: Any) -> Any:
        if not getattr(waited, "before", False):
            wait()
        waited.before = False
        return copy_rows(*args, **terms)

    rows.copy_long_runs = long_runs
    rows.copy_rows = late
