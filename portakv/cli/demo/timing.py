# SPDX-License-Identifier: Apache-2.0
"""Times of copies, in rounds that take turns with a baseline.

On a busy machine a number means little by itself; two numbers of one round can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

ROUNDS = 9
#: Copies between two events on a device: the host's part of the first then hides no longer.
REPEATS = 10

Work = Callable[[], object]


def interleaved(
    device: torch.device, baseline: Work, works: Sequence[Work]
) -> tuple[float, list[tuple[float, float]]]:
    """Time everything once a round, `ROUNDS` times, after one round that does not count.

    Returns:
        The baseline's median seconds; and for each work its median seconds, and the median over
        rounds of the baseline's time by its own.
    """
    rounds = [[seconds(device, work) for work in (baseline, *works)] for _ in range(ROUNDS + 1)][1:]
    plain = [times[0] for times in rounds]
    found = []
    for at in range(1, len(works) + 1):
        own = [times[at] for times in rounds]
        ratio = median(p / t for p, t in zip(plain, own, strict=True))
        found.append((median(own), ratio))
    return median(plain), found


def seconds(device: torch.device, work: Work) -> float:
    """Seconds that one run takes; on a device, by its own clock and as a mean of `REPEATS`."""
    if device.type == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(REPEATS):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / REPEATS
