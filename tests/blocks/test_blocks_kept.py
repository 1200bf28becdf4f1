# SPDX-License-Identifier: Apache-2.0
"""Indices that are used again: judged once, for views of the same form and size only."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from support.block_cases import BLOCKS, SIZE, block_first, layered, wanted
from support.guarded_memory import refused, same

from portakv import Index, SlotError, copy_blocks, copy_rows

SRC, DST = [5, 0, 7, 2, 3], [1, 6, 0, 4, 2]


def checks(*indices: Index) -> list[int]:
    """How many ranges of each list of ids were judged."""
    return [len(index._store.checked) for index in indices]


def move(mine: Any, theirs: Any, blocks: int = BLOCKS) -> None:
    src, dst = layered(), block_first(blocks=blocks)
    expected = wanted(src, dst, SRC, DST)
    copy_blocks(src.view, dst.view, mine, theirs).synchronize()
    assert torch.equal(dst.rows(), expected)


def test_a_kept_index_is_judged_once() -> None:
    mine, theirs = Index(SRC, step=SIZE), Index(DST, step=SIZE)
    for _ in range(3):
        move(mine, theirs)  # other memory each time
    assert checks(mine, theirs) == [1, 1]
    move(mine, theirs, blocks=BLOCKS + 1)
    assert checks(mine, theirs) == [1, 2]
    move(mine, Index(DST, step=SIZE))
    move(Index(SRC, step=SIZE), theirs)
    move(mine, theirs)
    assert checks(mine, theirs) == [1, 2]


@pytest.mark.parametrize("kept", ["src", "dst"])
def test_beside_a_list_of_one_call(kept: str) -> None:
    mine: Any = Index(SRC, step=SIZE) if kept == "src" else SRC
    theirs: Any = Index(DST, step=SIZE) if kept == "dst" else DST
    for _ in range(3):
        move(mine, theirs)
    assert checks(*(x for x in (mine, theirs) if isinstance(x, Index))) == [1]


def test_what_was_settled_holds_for_no_smaller_view() -> None:
    mine, theirs = Index(SRC, step=SIZE), Index(DST, step=SIZE)
    move(mine, theirs)
    src, small = layered(), block_first(blocks=6)
    with refused(SlotError, "slot 24", "24 slots", watch=small.tensors):
        copy_blocks(src.view, small.view, mine, theirs)
    few = layered(blocks=7)
    with refused(SlotError, "source", "28 slots", watch=small.tensors):
        copy_blocks(few.view, block_first(blocks=9).view, mine, theirs)


def test_ids_of_a_source_that_may_not_be_a_destination() -> None:
    """The same two indices the other way round are judged anew."""
    twice, theirs = Index([5, 5, 7], step=SIZE), Index([1, 6, 0], step=SIZE)
    src, dst = layered(), layered()
    copy_blocks(src.view, dst.view, twice, theirs).synchronize()
    for _ in range(2):
        with refused(SlotError, "occurs 2 times", watch=dst.tensors):
            copy_blocks(src.view, dst.view, theirs, twice)
    assert checks(twice) == [1]  # what was refused is refused again


def test_ids_that_were_a_source_s_beside_consecutive_rows() -> None:
    """The same index beside no ids, now as a source and then as a destination."""
    twice = Index([5, 5, 7], step=SIZE)
    src, dst = layered(), layered()
    copy_rows(src.view, dst.view, twice, None).synchronize()
    copy_rows(src.view, dst.view, twice, Index()).synchronize()
    with refused(SlotError, "occurs 2 times", watch=dst.tensors):
        copy_rows(src.view, dst.view, Index(), twice)


def test_inside_one_cache_the_rows_are_compared_each_time() -> None:
    mine, theirs = Index([1, 2], step=SIZE), Index([2, 3], step=SIZE)
    src, dst = layered(), layered()
    copy_blocks(src.view, dst.view, mine, theirs).synchronize()
    for _ in range(2):
        with refused(SlotError, "both source and destination", watch=src.tensors):
            copy_blocks(src.view, src.view, mine, theirs)


def test_other_counts_and_offsets() -> None:
    src, dst = layered(), layered()
    index = Index(SRC, step=SIZE)
    for count in (8, 12, 8):
        copy_rows(src.view, dst.view, index, Index(DST, step=SIZE), count=count).synchronize()
    other = Index(DST, step=SIZE)
    for offset in (0, 4, 0, 4):
        dst.tensors[0].zero_()
        copy_rows(src.view, dst.view, index.shifted(offset), other, count=4).synchronize()
        at = SRC[offset // 4]
        assert same(dst.tensors[0][:, DST[0]], src.tensors[0][:, at])
    assert checks(index, other) == [4, 1]  # (0, 8), (0, 12), (0, 4), (4, 4): each once


def test_consecutive_rows_beside_a_kept_index() -> None:
    """The end without ids may begin elsewhere each time."""
    src, dst = layered(), block_first()
    index = Index(SRC[:2], step=SIZE)
    for first in (0, 8, 0, 8):
        dst.tensors.zero_()
        copy_rows(src.view, dst.view, index, Index(offset=first)).synchronize()
        for at, block in enumerate(SRC[:2]):
            assert same(dst.tensors[first // 4 + at, 1], src.tensors[1][:, block])
    assert checks(index) == [1]


def test_indices_do_not_hold_each_other_or_any_view() -> None:
    mine, theirs = Index(SRC, step=SIZE), Index(DST, step=SIZE)
    src, dst = layered(), layered()
    copy_blocks(src.view, dst.view, mine, theirs).synchronize()
    assert theirs.ids is not None
    gone = [weakref.ref(x) for x in (src.tensors[0], dst.tensors[0], theirs.ids)]
    gc.disable()
    try:
        del src, dst, theirs
        assert [ref() is None for ref in gone] == [True] * 3
    finally:
        gc.enable()
