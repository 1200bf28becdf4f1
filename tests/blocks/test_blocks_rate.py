# SPDX-License-Identifier: Apache-2.0
"""Block transfers at a rate, and what a slow one still answers."""

from __future__ import annotations

import time

import pytest
import torch
from support.block_cases import until

from portakv import KVView, TransferCancelled, copy_blocks


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
