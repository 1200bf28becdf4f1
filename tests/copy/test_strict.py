# SPDX-License-Identifier: Apache-2.0
"""With check="strict" ids on a device are judged as those on the host, before anything is moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.block_cases import BLOCKS, SIZE, layered, wanted
from support.guarded_memory import refused

from portakv import SlotError, copy_blocks, copy_rows
from portakv.errors import InvalidTerms


def placed(ids: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=device)


@pytest.mark.parametrize("options", [{}, {"by_layer": True}, {"detached": True}], ids=str)
def test_destinations_that_occur_twice(device: torch.device, options: dict[str, Any]) -> None:
    src, dst = layered(device), layered(device)
    mine, theirs = placed([0, 1, 2], device), placed([3, 4, 3], device)
    with refused(SlotError, "occurs 2 times", "destination", watch=dst.tensors):
        copy_blocks(src.view, dst.view, mine, theirs, check="strict", **options)
    with refused(SlotError, "occurs 2 times", watch=dst.tensors):
        copy_rows(src.view, dst.view, mine, theirs, check="strict")


def test_slots_past_the_end(device: torch.device) -> None:
    src, dst = layered(device), layered(device)
    with refused(SlotError, "source", f"{BLOCKS * SIZE} slots", watch=dst.tensors):
        mine, theirs = placed([0, BLOCKS], device), placed([1, 2], device)
        copy_blocks(src.view, dst.view, mine, theirs, check="strict")


def test_what_is_right_is_moved(device: torch.device) -> None:
    src, dst = layered(device), layered(device)
    mine, theirs = [5, -1, 7, 5], [1, 6, -2, 0]  # a block may be read twice
    expected = wanted(src, dst, mine, theirs)
    ids = placed(mine, device), placed(theirs, device)
    copy_blocks(src.view, dst.view, *ids, check="strict").synchronize()
    assert torch.equal(dst.rows(), expected)


def test_another_word_is_refused() -> None:
    src, dst = layered(), layered()
    with refused(InvalidTerms, "check='loose'", "'usual' or 'strict'", watch=dst.tensors):
        copy_rows(src.view, dst.view, [0], [1], check="loose")
