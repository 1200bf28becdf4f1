# SPDX-License-Identifier: Apache-2.0
"""When a worker's slices may start; `tests/blocks/test_block_slices.py` judges the rest of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from portakv.runtime.worker import RateLimit


def test_when_slices_may_start() -> None:
    watch = SimpleNamespace(time=100.0)
    limit = RateLimit(2.0, lambda: watch.time)  # 2 bytes in a nanosecond
    assert limit.left(limit.start_of(2_000_000)) == 0.0
    start = limit.start_of(2_000_000)
    assert limit.left(start) == pytest.approx(1e-3)
    watch.time += 1.5e-3  # it overslept
    assert limit.left(start) == 0.0
    assert limit.left(limit.start_of(4_000_000)) == pytest.approx(0.5e-3)
    watch.time += 0.5e-3
    assert limit.left(limit.start_of(2_000_000)) == pytest.approx(2e-3)
    watch.time += 1.0  # the link was busy for long: not all of it may be made up for
    pauses = [limit.left(limit.start_of(2_000_000)) for _ in range(3)]
    assert pauses == [0.0, 0.0, pytest.approx(1e-3)]


def test_over_many_slices_the_rate_is_kept_whatever_sleeps_too_long() -> None:
    watch, total = SimpleNamespace(time=100.0), 0
    limit = RateLimit(1.0, lambda: watch.time)
    for nth in range(1000):
        watch.time += limit.left(limit.start_of(100_000)) + (nth % 7) * 1e-5
        total += 100_000
    assert total / (watch.time - 100.0) / 1e9 == pytest.approx(1.0, rel=0.05)
