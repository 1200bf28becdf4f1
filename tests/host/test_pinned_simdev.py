# SPDX-License-Identifier: Apache-2.0
"""Pinned memory of a device that is not CUDA's, through torch's own interface."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.own_process import own_process

from portakv.errors import Unsupported
from portakv.host import pinned
from portakv.host.pool import PinnedPool
from portakv.host.shared import SharedPool

pytestmark = own_process("npu", "pinned")


DEVICE = torch.device("privateuseone", 0)
ODD = 3 * 1024 * 1024 + 4096


def test_memory_is_pinned_and_lands_late_but_right() -> None:
    there = torch.arange(1000, dtype=torch.int64).to(DEVICE)
    with pinned.allocate(8000) as memory:
        assert memory.pinned
        assert memory.tensor.is_pinned()
        assert memory.nbytes == 8000 == memory.tensor.numel()
        assert "torch's allocator" in memory.notes[0]
        here = memory.view(torch.int64)
    here.fill_(-1)
    here.copy_(there, non_blocking=True)
    assert bool((here == -1).all())  # truly later, which only pinned memory allows
    torch.accelerator.synchronize(DEVICE)
    assert bool((here == torch.arange(1000)).all())


def test_tensors_outlive_what_they_came_from() -> None:
    tensor = pinned.empty((100, 3), torch.float32)
    assert tensor.is_pinned()
    assert tensor.shape == (100, 3)
    tensor.fill_(2)
    assert tensor.to(DEVICE).cpu().sum() == 600


def test_blocks_of_a_pool() -> None:
    with PinnedPool(4096, 4) as pool:
        assert pool.pinned
        blocks = pool.acquire_many(4)
        for number, block in enumerate(blocks):
            assert block.tensor.is_pinned()
            block.tensor.copy_(torch.full((4096,), number, dtype=torch.uint8, device=DEVICE), True)
        event = torch.Event(DEVICE)
        event.record()
        last = blocks.pop()
        last.release(after=event)
        assert pool.free == 0
        torch.accelerator.synchronize(DEVICE)
        assert pool.free == 1
        for number, block in enumerate(blocks):
            assert bool((block.tensor == number).all())
            block.release()


def test_what_torch_does_not_offer_is_said() -> None:
    assert pinned.why_not() is None
    with pytest.raises(Unsupported, match="numactl"):
        pinned.allocate(ODD, numa=0)
    with pinned.allocate(ODD, huge_pages="reserved") as memory:
        assert "not told of huge pages" in memory.notes[1]
        with pytest.raises(Unsupported, match="not registered"):
            memory.device_address()
    with pytest.warns(RuntimeWarning, match="registers no memory that exists"):
        held = pinned.register(torch.arange(50000))
    assert not held.pinned
    assert held.view(torch.int64).to(DEVICE).cpu().sum() == 50000 * 49999 // 2
    held.close()


def test_the_shared_pool_is_pageable_with_the_same_results() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pool = SharedPool("test-simdev", 4096, 2)
    with pool, pool.acquire() as block:
        assert not pool.pinned
        block.tensor.copy_(torch.full((4096,), 7, dtype=torch.uint8, device=DEVICE))
        assert bool((block.tensor == 7).all())
