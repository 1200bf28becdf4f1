# SPDX-License-Identifier: Apache-2.0
"""Assumed costs: what the engines are taken to cost on a device that was never measured.

Seconds of the device, with what the host does first hidden, and seconds that a call keeps the host.
They describe one H200 behind PCIe 5 x16 and stand for every device until `portakv calibrate` has
measured it; what is compared is engines with each other, so that a slower link changes little.
"""

from __future__ import annotations

from typing import NamedTuple

from portakv.engines.slices import LARGEST

D2H, H2D = DIRECTIONS = ("d2h", "h2d")


class Cost(NamedTuple):
    """Seconds of the device for a copy: a fixed time, and for each run what its bytes take, but at
    least ``per_run``."""

    fixed: float
    per_run: float
    rate: float

    def seconds(self, run_bytes: int, runs: int) -> float:
        """Seconds for so many runs."""
        return self.fixed + runs * max(self.per_run, run_bytes / self.rate)


class HostCost(NamedTuple):
    """Seconds that a call keeps the host: ``fixed + runs * per_run + slices * per_slice``."""

    fixed: float
    per_run: float = 0.0
    per_slice: float = 0.0

    def seconds(self, run_bytes: int, runs: int) -> float:
        """Seconds for so many runs."""
        slices = -(-run_bytes * runs // LARGEST)
        return self.fixed + runs * self.per_run + slices * self.per_slice


#: By engine and direction. Measured on an H200: pinned memcpy 55.3 GB/s; an entry of a batch 0.12
#: us at 4 KiB (0.61 of memcpy), and from 32 KiB on no more than its bytes (0.98 - 1.0); a kernel
#: with 8 thread blocks 0.92 - 0.95 of memcpy, whatever its rows; what a gather or a scatter, a copy
#: and a kernel add to their bytes; `ring` 35 - 42 GB/s with 256 MB and 16 cores. What is no
#: measurement: the fixed time of `ring`, and what a run costs it.
COSTS: dict[tuple[str, str], Cost] = {
    ("staged", D2H): Cost(18e-6, 0.12e-6, 55.0e9),
    ("staged", H2D): Cost(18e-6, 0.12e-6, 55.0e9),
    ("descriptors", D2H): Cost(12e-6, 0.12e-6, 55.2e9),
    ("descriptors", H2D): Cost(12e-6, 0.12e-6, 55.2e9),
    ("direct", D2H): Cost(10e-6, 0.0, 52.4e9),
    ("direct", H2D): Cost(10e-6, 0.0, 51.2e9),
    ("ring", D2H): Cost(60e-6, 0.1e-6, 36.0e9),
    ("ring", H2D): Cost(60e-6, 0.1e-6, 36.0e9),
}

#: By engine, measured beside them. `ring` is not here: it keeps the host as long as the copy takes.
HOST_COSTS: dict[str, HostCost] = {
    "staged": HostCost(45e-6, 0.45e-6, 30e-6),
    "descriptors": HostCost(40e-6, 0.45e-6),
    "direct": HostCost(65e-6),
}

#: Seconds that a run takes of the device and of the host where the device's torch copies it: a call
#: of Python for each, not an entry of a list. A guess, from 10 - 30 us for a call on one core.
CALL = 20e-6
_BY_COPIES = ("staged", "descriptors")  # whose runs are copies on the link


class Assumed:
    """Costs by `COSTS`.

    Args:
        why: why nothing better is known, as a sentence.
        by_torch: runs cross the link by calls of torch, not by the driver's lists.
    """

    measured = False

    def __init__(self, why: str, by_torch: bool = False) -> None:
        self.origin = f"assumed, from figures of an H200: {why}"
        self._called = _BY_COPIES if by_torch else ()

    def seconds(self, engine: str, direction: str, run_bytes: int, runs: int) -> float | None:
        """Seconds that the device takes; None where nothing is known of an engine."""
        cost = COSTS.get((engine, direction))
        if cost is None:
            return None
        if engine in self._called:
            cost = cost._replace(per_run=CALL)
        return cost.seconds(run_bytes, runs)

    def host_seconds(self, engine: str, direction: str, run_bytes: int, runs: int) -> float | None:
        """Seconds that a call keeps the host; None where nothing is known of an engine."""
        cost = HOST_COSTS.get(engine)
        if cost is None:
            return self.seconds(engine, direction, run_bytes, runs)
        if engine in self._called:
            cost = cost._replace(per_run=CALL)
        return cost.seconds(run_bytes, runs)
