# SPDX-License-Identifier: Apache-2.0
"""Ids on a device that are clean by promise: nothing waits for the device to look at them."""

from __future__ import annotations

import pytest
import torch
from support.block_cases import BLOCKS, SIZE, layered, wanted
from support.guarded_memory import refused
from support.read_back import ReadBack

from portakv import BlockTransfer, Index, KVView, SlotError, copy_rows
from portakv.host import pinned

SRC_IDS = [5, 1, 7]
DST_IDS = [1, 6, 0]


def indices(device: torch.device, trusted: bool, *lists: list[int]) -> list[Index]:
    return [Index(torch.tensor(ids, device=device), SIZE, trusted=trusted) for ids in lists]


@pytest.mark.parametrize("trusted", [True, False])
def test_the_host_waits_only_for_ids_without_a_promise(
    accelerator: torch.device, trusted: bool
) -> None:
    src = layered(accelerator)
    dst = layered(accelerator)
    ids = indices(accelerator, trusted, SRC_IDS, DST_IDS)
    copy_rows(src.view, dst.view, *indices(accelerator, True, [0], [0])).synchronize()  # prepared
    expected = wanted(src, dst, SRC_IDS, DST_IDS)
    with ReadBack() as read:
        transfer = copy_rows(src.view, dst.view, *ids)
    transfer.synchronize()
    assert torch.equal(dst.rows(), expected)
    # A kernel guards ids, so that it needs no promise.
    assert bool(read.seen) == (not trusted and accelerator.type != "cuda"), read.seen


@pytest.mark.gpu
@pytest.mark.parametrize("downward", [True, False])
def test_pools_with_wide_rows_on_the_host_are_not_waited_for(downward: bool) -> None:
    """A page-first pool, whose tokens are runs of 64 KiB, by ids that only the device has: 32 MiB,
    more than a kernel usually carries while a model runs."""
    device = torch.device("cuda", 0)
    slots = 512
    caches = [torch.randint(9, (slots, 8, 1024), dtype=torch.int16, device=device) for _ in "1234"]
    pool = pinned.empty((slots, 4, 8, 1024), torch.int16)
    pool.random_(9)
    before = pool.clone()
    layers = torch.stack(caches, 1).cpu()
    views = KVView(caches, "layer | token head dim"), KVView(pool, "token layer head dim")
    ids = [torch.randperm(slots), torch.randperm(slots)]
    src, dst = views if downward else views[::-1]

    def copy() -> BlockTransfer:
        return copy_rows(src, dst, *(Index(each.to(device), trusted=True) for each in ids))

    copy().synchronize()  # prepared
    with ReadBack() as read:
        transfer = copy()
    assert not read.seen
    transfer.synchronize()
    assert transfer.carried[0] == "zero_copy"
    expected, source = (before, layers) if downward else (layers, before)
    expected[ids[1]] = source[ids[0]]
    assert torch.equal(pool if downward else torch.stack(caches, 1).cpu(), expected)


def test_parts_of_a_list_keep_the_promise() -> None:
    index = Index([0, 1, 2], 2, 1, trusted=True)
    parts = [index.shifted(1), index.part(1, 2), index.to_host(), index]
    assert [each.trusted for each in parts] == [True] * 4
    assert not Index([0]).trusted


def test_a_promise_about_ids_on_the_host_changes_nothing() -> None:
    src = layered(torch.device("cpu"))
    dst = layered(torch.device("cpu"))
    with refused(SlotError, "source", watch=dst.tensors):
        copy_rows(src.view, dst.view, *[Index([BLOCKS], SIZE, trusted=True)] * 2)


def test_strict_looks_all_the_same(accelerator: torch.device) -> None:
    src = layered(accelerator)
    dst = layered(accelerator)
    ids = indices(accelerator, True, [0, BLOCKS], [1, 2])
    with refused(SlotError, "source", watch=dst.tensors):
        copy_rows(src.view, dst.view, *ids, check="strict")
