# SPDX-License-Identifier: Apache-2.0
"""Destinations that are named several times: the last position wins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.read_back import ReadBack

from portakv import Index, KVView, SlotError, copy_rows


def expected(ids: list[int]) -> list[int]:
    """Keep the last of equal ids; written without the library."""
    return [each if each not in ids[at + 1 :] else -1 for at, each in enumerate(ids)]


LISTS = [[], [3], [0, 0, 0, 7], [5, 2, 5, -1, 2, -1, 9], [4, 3, 2, 1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ids", LISTS, ids=str)
def test_the_last_of_equal_ids_stays(
    ids: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    index = Index(torch.tensor(ids, dtype=dtype).to(device), 2, min(len(ids), 1))
    unique = index.without_repeats()
    assert unique.host_ids().tolist() == expected(ids)
    assert (unique.step, unique.offset) == (index.step, index.offset)
    assert index.host_ids().tolist() == ids


def test_of_a_long_list_too(device: torch.device) -> None:
    drawn = np.random.default_rng(0).integers(-1, 300, 900)
    unique = Index(torch.from_numpy(drawn).to(device)).without_repeats()
    assert unique.host_ids().tolist() == expected(drawn.tolist())


def test_a_copy_writes_what_the_last_position_says(device: torch.device) -> None:
    src = torch.arange(6, dtype=torch.float32).reshape(6, 1).to(device)
    dst = torch.full((4, 1), -1.0, device=device)
    views = KVView(src, "token dim"), KVView(dst, "token dim")
    ids = [0, 2, 0, 3, 2, 0]
    with pytest.raises(SlotError):
        copy_rows(*views, None, ids)
    copy_rows(*views, None, Index(ids).without_repeats()).synchronize()
    assert dst[:, 0].tolist() == [5, -1, 4, 3]
    there = Index(torch.tensor(ids).to(device)).without_repeats()
    dst.fill_(-1)
    copy_rows(*views, None, there).synchronize()
    assert dst[:, 0].tolist() == [5, -1, 4, 3]


def test_blocks_that_are_named_again(device: torch.device) -> None:
    src = torch.arange(8, dtype=torch.float32).reshape(8, 1).to(device)
    dst = torch.full((4, 2, 1), -1.0, device=device)
    views = KVView(src, "token dim"), KVView(dst, "block token dim")
    copy_rows(*views, None, Index([1, 1, 0, 1], 2).without_repeats()).synchronize()
    assert dst[..., 0].tolist() == [[4, 5], [6, 7], [-1, -1], [-1, -1]]


@pytest.mark.parametrize("on_host", [True, False], ids=["host ids", "device ids"])
def test_ids_behind_the_count_are_not_kept(device: torch.device, on_host: bool) -> None:
    src = torch.arange(6, dtype=torch.float32).reshape(6, 1).to(device)
    dst = torch.full((4, 2, 1), -1.0, device=device)
    views = KVView(src, "token dim"), KVView(dst, "block token dim")
    index = Index(torch.tensor([2, 1, 0, 1]).to("cpu" if on_host else device), 2, 1)
    unique = index.without_repeats(4)
    copy_rows(*views, None, unique, count=4).synchronize()
    assert dst[..., 0].tolist() == [[3, -1], [1, 2], [-1, 0], [-1, -1]]
    assert index.without_repeats(7).host_ids().tolist() == [2, -1, 0, 1]
    for refused in (-1, 1.5):
        with pytest.raises(SlotError, match="count="):
            index.without_repeats(refused)  # type: ignore[arg-type]


def test_without_ids_and_without_repeats_nothing_is_made() -> None:
    for index in (Index(), Index([3, 1])):
        assert index.without_repeats() is index


def test_the_host_does_not_wait_and_a_promise_ends(accelerator: torch.device) -> None:
    index = Index(torch.tensor([3, 1, 3]).to(accelerator), trusted=True)
    with ReadBack() as waited:
        unique = index.without_repeats()
    assert not waited.seen
    assert index.trusted
    assert not unique.trusted
