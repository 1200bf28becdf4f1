# SPDX-License-Identifier: Apache-2.0
"""Assumed costs: what the engines are taken to cost on a device that was never measured.

Each is a fixed time, a time for each run and a rate. They describe one H200 behind PCIe 5 x16 and
stand for every device until `portakv calibrate` has measured it; what is compared is engines with
each other, so that a slower link changes little.
"""

from __future__ import annotations

from typing import NamedTuple

D2H, H2D = DIRECTIONS = ("d2h", "h2d")


class Cost(NamedTuple):
    """Seconds of a copy: ``fixed + runs * per_run + bytes / rate``."""

    fixed: float
    per_run: float
    rate: float

    def seconds(self, run_bytes: int, runs: int) -> float:
        """Seconds for so many runs."""
        return self.fixed + runs * self.per_run + run_bytes * runs / self.rate


#: By engine and direction. Measured on an H200: pinned memcpy 55.3 GB/s; 23.5 GB/s in batched
#: copies of 32 KiB and 41 in such of 128 KiB, which is 0.8 us for each beside its bytes; a kernel
#: with 8 thread blocks 52.7 GB/s down and 51.2 up, whatever its rows; a copy engine behind a gather
#: 0.97 of memcpy at 33 MB and 0.987 at 168; `ring` 24 - 28 GB/s with dense rows and 16 cores. What
#: is no measurement: the other fixed times, and what a run costs `ring`.
COSTS: dict[tuple[str, str], Cost] = {
    ("staged", D2H): Cost(31e-6, 0.8e-6, 55.0e9),
    ("staged", H2D): Cost(31e-6, 0.8e-6, 55.0e9),
    ("descriptors", D2H): Cost(22e-6, 0.8e-6, 55.2e9),
    ("descriptors", H2D): Cost(22e-6, 0.8e-6, 55.2e9),
    ("direct", D2H): Cost(12e-6, 0.0, 52.7e9),
    ("direct", H2D): Cost(12e-6, 0.0, 51.2e9),
    ("ring", D2H): Cost(60e-6, 0.1e-6, 25.0e9),
    ("ring", H2D): Cost(60e-6, 0.1e-6, 24.0e9),
}


#: Times what a run costs where the device's torch copies it: a call of Python for each, not an
#: entry of a list. A guess, from 10 - 30 us for a call of torch on one core.
CALLS = 25.0


class Assumed:
    """Costs by `COSTS`.

    Args:
        why: why nothing better is known, as a sentence.
        by_torch: runs cross the link by calls of torch, not by the driver's lists.
    """

    measured = False

    def __init__(self, why: str, by_torch: bool = False) -> None:
        self.origin = f"assumed, from figures of an H200: {why}"
        self._calls = CALLS if by_torch else 1.0

    def seconds(self, engine: str, direction: str, run_bytes: int, runs: int) -> float | None:
        """Seconds that an engine takes; None where nothing is known of it."""
        cost = COSTS.get((engine, direction))
        if cost is None:
            return None
        if engine != "ring":  # the host copies what `ring` moves, run by run
            cost = cost._replace(per_run=cost.per_run * self._calls)
        return cost.seconds(run_bytes, runs)
