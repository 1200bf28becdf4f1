# SPDX-License-Identifier: Apache-2.0
"""Block transfers at a rate: when slices may start, and what a slow one still answers."""

from __future__ import annotations

import time

import pytest
import torch
from support.block_cases import until

from portakv import KVView, TransferCancelled, copy_blocks
from portakv.blocks.pump import Pace


class Watch:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_the_pace_of_slices() -> None:
    watch = Watch()
    pace = Pace(2.0, watch)  # 2 bytes in a nanosecond
    assert pace.left(pace.start_of(2_000_000)) == 0.0
    start = pace.start_of(2_000_000)
    assert pace.left(start) == pytest.approx(1e-3)
    watch.time += 1.5e-3  # it overslept
    assert pace.left(start) == 0.0
    assert pace.left(pace.start_of(4_000_000)) == pytest.approx(0.5e-3)
    watch.time += 0.5e-3
    assert pace.left(pace.start_of(2_000_000)) == pytest.approx(2e-3)


def test_who_was_late_may_not_make_up_for_all_of_it() -> None:
    watch = Watch()
    pace = Pace(1.0, watch)
    pace.start_of(1_000_000)
    watch.time += 1.0  # the link was busy for long
    pauses = [pace.left(pace.start_of(1_000_000)) for _ in range(3)]
    assert pauses == [0.0, 0.0, pytest.approx(1e-3)]


def test_over_many_slices_the_rate_is_kept_whatever_sleeps_too_long() -> None:
    watch, total = Watch(), 0
    pace = Pace(1.0, watch)
    for nth in range(1000):
        watch.time += pace.left(pace.start_of(100_000)) + (nth % 7) * 1e-5
        total += 100_000
    assert total / (watch.time - 100.0) / 1e9 == pytest.approx(1.0, rel=0.05)


def test_a_transfer_keeps_its_rate() -> None:
    """Never faster than asked, but for its last slice; a busy machine may make it slower."""
    src, dst = (torch.zeros(40, 2, 1 << 16, dtype=torch.uint8) for _ in range(2))
    src += torch.arange(40, dtype=torch.uint8)[:, None, None]
    ids = list(range(40))
    views = [KVView(x, "block token dim") for x in (src, dst)]
    transfer = copy_blocks(views[0], views[1], ids, ids, max_gbps=0.02)
    transfer.synchronize()
    found = transfer.statistics
    assert found.slices == 40
    assert found.seconds is not None
    assert found.seconds >= 39 / 40 * src.numel() / 0.02e9
    assert torch.equal(src, dst)


def test_a_rate_waits_without_holding_up_a_cancel() -> None:
    src, dst = (torch.zeros(8, 2, 1 << 16, dtype=torch.uint8) for _ in range(2))
    views = [KVView(x, "block token dim") for x in (src, dst)]
    transfer = copy_blocks(views[0], views[1], range(8), range(8), max_gbps=1e-6)
    until(lambda: transfer.statistics.blocks == 1)
    began = time.monotonic()
    assert transfer.cancel()
    with pytest.raises(TransferCancelled):
        transfer.synchronize()
    assert time.monotonic() - began < 5
