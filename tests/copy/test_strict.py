# SPDX-License-Identifier: Apache-2.0
"""With check="strict", and in slices, ids on a device are judged as those on the host, before
anything is moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.block_cases import BLOCKS, SIZE, layered, wanted
from support.guarded_memory import refused

from portakv import Index, SlotError, copy_blocks, copy_rows

#: Slices read the ids whatever the options are.
SLICED = [{"cancellable": True, "check": "usual"}, {"max_gbps": 1.0, "check": "usual"}]


def placed(ids: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=device)


@pytest.mark.parametrize("more", [{}, {"by_layer": True}, {"detached": True}, *SLICED], ids=str)
@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "words"),
    [
        ([0, 1, 2], [3, 4, 3], ["occurs 2 times", "destination"]),
        ([0, BLOCKS], [1, 2], ["source", f"{BLOCKS * SIZE} slots"]),
    ],
)
def test_what_is_refused(
    device: torch.device, src_ids: list[int], dst_ids: list[int], words: list[str], more: Any
) -> None:
    src = layered(device)
    dst = layered(device)
    ids = placed(src_ids, device), placed(dst_ids, device)
    with refused(SlotError, *words, watch=dst.tensors):
        copy_blocks(src.view, dst.view, *ids, **{"check": "strict"} | more)
    slots = [Index(one, SIZE) for one in ids]
    with refused(SlotError, *words, watch=dst.tensors):
        copy_rows(src.view, dst.view, *slots, check="strict")


def test_what_is_right_is_moved(device: torch.device) -> None:
    src = layered(device)
    dst = layered(device)
    # a block may be read twice
    src_ids = [5, -1, 7, 5]
    dst_ids = [1, 6, -2, 0]
    expected = wanted(src, dst, src_ids, dst_ids)
    ids = placed(src_ids, device), placed(dst_ids, device)
    copy_blocks(src.view, dst.view, *ids, check="strict").synchronize()
    assert torch.equal(dst.rows(), expected)
