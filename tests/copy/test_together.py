# SPDX-License-Identifier: Apache-2.0
"""`BlockTransfer.together`: several transfers as one handle, as the groups of one job are."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from support.block_cases import BLOCKS, METHODS, SIZE, SLICED, layered, wanted
from support.device_cases import current, delay, settle
from support.guarded_memory import refused
from support.waits import LIMIT

from portakv import (
    BlockTransfer,
    SlotError,
    Transfer,
    TransferCancelled,
    TransferError,
    copy_blocks,
)

SRC_IDS = [5, 0, 7]
DST_IDS = [1, 6, 0]
GROUPS = 3


@pytest.mark.parametrize("method", METHODS)
def test_bytes_blocks_and_the_end(device: torch.device, method: str) -> None:
    pairs = [(layered(device), layered(device)) for _ in range(GROUPS)]
    expected = [wanted(src, dst, SRC_IDS, DST_IDS) for src, dst in pairs]
    began = time.perf_counter()
    job = BlockTransfer.together(
        [copy_blocks(src.view, dst.view, SRC_IDS, DST_IDS, **METHODS[method]) for src, dst in pairs]
    )
    job.synchronize()
    assert job.done()
    took = time.perf_counter() - began
    assert all(
        torch.equal(dst.rows(), each) for (_, dst), each in zip(pairs, expected, strict=True)
    )
    statistics = job.statistics
    tokens = GROUPS * len(SRC_IDS) * SIZE
    assert statistics.nbytes == tokens * pairs[0][0].view.form.token_bytes
    assert (statistics.blocks, statistics.blocks_requested) == (GROUPS * len(SRC_IDS),) * 2
    assert statistics.slices >= GROUPS
    assert statistics.seconds is not None
    assert 0 < statistics.seconds <= took
    assert not statistics.cancelled
    assert statistics.strategy != "none"
    if "by_layer" in METHODS[method]:
        assert len(job.layers) == GROUPS * pairs[0][0].view.layers
        job.layers[-1].synchronize()
    else:
        with pytest.raises(TransferError, match="by_layer"):
            _ = job.layers


def test_the_time_is_that_from_the_first_call_to_the_last_end(accelerator: torch.device) -> None:
    src = layered(accelerator)
    dst = layered(accelerator)
    copy_blocks(src.view, dst.view, [0], [0]).synchronize()
    delay(current(accelerator))
    parts = [copy_blocks(src.view, dst.view, [n], [n]) for n in (1, 2)]
    job = BlockTransfer.together(parts)
    assert not job.done()
    assert job.statistics.seconds is None
    settle(accelerator)
    assert job.done()
    own = parts[1].statistics.seconds
    whole = job.statistics.seconds
    assert own is not None
    assert whole is not None
    assert whole > own


def test_an_error_of_any_of_them_is_told(accelerator: torch.device) -> None:
    src = layered(accelerator)
    dst = layered(accelerator)
    ids = [torch.tensor([n], device=accelerator) for n in (0, BLOCKS)]
    job = BlockTransfer.together([copy_blocks(src.view, dst.view, each, [1]) for each in ids])
    with refused(SlotError, "Position 0"):
        job.synchronize()


@pytest.mark.parametrize("method", SLICED)
def test_cancelling_asks_all_of_them(method: str) -> None:
    pairs = [(layered(), layered()) for _ in range(GROUPS)]
    options: dict[str, Any] = {**METHODS[method], "max_gbps": 1e-6}
    job = BlockTransfer.together(
        [copy_blocks(src.view, dst.view, SRC_IDS, DST_IDS, **options) for src, dst in pairs]
    )
    assert job.cancel()
    assert job.cancelled
    with pytest.raises(TransferCancelled):
        job.synchronize(timeout=LIMIT)


def test_none_and_one() -> None:
    src = layered()
    dst = layered()
    one = copy_blocks(src.view, dst.view, SRC_IDS, DST_IDS)
    assert BlockTransfer.together([one]) is one
    none = BlockTransfer.together([])
    none.synchronize()
    assert none.done()
    assert not none.cancel()
    assert (none.statistics.nbytes, none.statistics.seconds) == (0, 0.0)


def test_one_that_is_joined_already() -> None:
    pairs = [(layered(), layered()) for _ in range(GROUPS)]
    parts = [copy_blocks(src.view, dst.view, SRC_IDS, DST_IDS) for src, dst in pairs]
    job = BlockTransfer.together(
        [BlockTransfer.together(parts[:2]), BlockTransfer.together([]), parts[2]]
    )
    job.synchronize()
    statistics = job.statistics
    assert statistics.blocks == GROUPS * len(SRC_IDS)
    assert statistics.strategy == parts[0].statistics.strategy
    assert statistics.seconds is not None


def test_a_join_of_the_base_class_is_a_plain_transfer() -> None:
    """Its parts may be copies of any form, so it has no blocks to count."""
    src = layered(torch.device("cpu"))
    dst = layered(torch.device("cpu"))
    moved = [copy_blocks(src.view, dst.view, [n], [n]) for n in (1, 2)]
    joined = BlockTransfer.join(moved)
    assert type(joined) is Transfer
    joined.synchronize()
