# SPDX-License-Identifier: Apache-2.0
"""Copies of others while transfers follow each other: they get in between, and wait for no end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.block_cases import holds, large, numbered
from support.device_cases import DEVICE

from portakv import copy_blocks

pytestmark = pytest.mark.gpu

BLOCKS, MANY = 80, 12  # MiB of one transfer; transfers, 17 ms of a link of PCIe 5 in all
_TRIES = 5


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("detached", [True, False], ids=["detached", "ordered"])
@pytest.mark.parametrize("backwards", [False, True], ids=["a run", "many runs"])
@pytest.mark.parametrize("engine", ["staged", "descriptors"])
def test_a_small_copy_need_not_wait_for_the_last_transfer(
    engine: str, backwards: bool, detached: bool, downward: bool
) -> None:
    places = (DEVICE, "cpu") if downward else ("cpu", DEVICE)
    (full, src), (empty, dst) = (large(BLOCKS * MANY, 1, place) for place in places)
    numbers = numbered(full)[:, :, 0, 0].cpu()
    other, small = torch.cuda.Stream(DEVICE), 1 << 20  # what is less may travel by no copy engine
    there = torch.zeros(small, dtype=torch.uint8, device=DEVICE)
    here = torch.zeros(small, dtype=torch.uint8).pin_memory()
    torch.cuda.synchronize()
    asked: dict[str, Any] = {"backend": engine, "detached": detached}
    for _ in range(_TRIES):  # a host that is held up begins when all is over
        ids = torch.arange(BLOCKS * MANY).split(BLOCKS)
        ids = [part.flip(0) if backwards else part for part in ids]
        moves = [copy_blocks(src, dst, part, part, **asked) for part in ids]
        with torch.cuda.stream(other):
            if downward:
                here.copy_(there, non_blocking=True)
            else:
                there.copy_(here, non_blocking=True)
        other.synchronize()
        before_the_last = not moves[-1].done()
        for moved in moves:
            moved.synchronize()
        assert holds(empty, numbers)
        if before_the_last:
            return
        empty.zero_()
        torch.cuda.synchronize()
    pytest.fail("the small copy ended behind every transfer")


def test_a_stream_of_torchs_general_kind_takes_turns_too() -> None:
    (full, src), (empty, dst) = (large(BLOCKS * 4, 1, place) for place in (DEVICE, "cpu"))
    numbers = numbered(full)[:, :, 0, 0].cpu()
    stream = torch.Stream(DEVICE)
    for part in torch.arange(BLOCKS * 4).split(BLOCKS):
        copy_blocks(src, dst, part, part, backend="descriptors", stream=stream)
    stream.synchronize()  # behind the copies that went beside, too
    assert holds(empty, numbers)
