# SPDX-License-Identifier: Apache-2.0
"""Indices that are used again: judged once, for views of the same form and size only."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from support.block_cases import BLOCKS, DST, SIZE, SRC, block_first, layered, wanted
from support.guarded_memory import refused

from portakv import Index, SlotError, copy_blocks, copy_rows


def by_block(ids: Any) -> Index:
    return Index(ids, step=SIZE)


def checks(*indices: Any) -> list[int]:
    """How many ranges of each list of ids were judged."""
    return [len(index._store.checked) for index in indices if isinstance(index, Index)]


def move(mine: Any, theirs: Any, blocks: int = BLOCKS) -> None:
    """Copy between other memory than before."""
    src, dst = layered(), block_first(blocks=blocks)
    expected = wanted(src, dst, SRC, DST)
    copy_blocks(src.view, dst.view, mine, theirs).synchronize()
    assert torch.equal(dst.rows(), expected)


@pytest.mark.parametrize("kept", ["both", "src", "dst"])
def test_a_kept_index_is_judged_once(kept: str) -> None:
    mine: Any = SRC if kept == "dst" else by_block(SRC)
    theirs: Any = DST if kept == "src" else by_block(DST)
    for _ in range(3):
        move(mine, theirs)
    move(mine, by_block(DST))
    move(by_block(SRC), theirs)
    assert set(checks(mine, theirs)) == {1}
    if kept == "both":
        move(mine, theirs, blocks=BLOCKS + 1)
        move(mine, theirs)
        assert checks(mine, theirs) == [1, 2]


def test_what_was_settled_holds_for_no_smaller_view() -> None:
    mine, theirs = by_block(SRC), by_block(DST)
    move(mine, theirs)
    src, small = layered(), block_first(blocks=6)
    with refused(SlotError, "slot 24", "24 slots", watch=small.tensors):
        copy_blocks(src.view, small.view, mine, theirs)
    few = layered(blocks=7)
    with refused(SlotError, "source", "28 slots", watch=small.tensors):
        copy_blocks(few.view, block_first(blocks=9).view, mine, theirs)


def test_ids_of_a_source_that_may_not_be_a_destination() -> None:
    """The same indices the other way round, or beside no ids, are judged anew."""
    twice, theirs = by_block([5, 5, 7]), by_block([1, 6, 0])
    src, dst = layered(), layered()
    copy_blocks(src.view, dst.view, twice, theirs).synchronize()
    for _ in range(2):
        with refused(SlotError, "occurs 2 times", watch=dst.tensors):
            copy_blocks(src.view, dst.view, theirs, twice)
    assert checks(twice) == [1]  # what was refused is refused again
    for none in (None, Index()):
        copy_rows(src.view, dst.view, twice, none).synchronize()
    with refused(SlotError, "occurs 2 times", watch=dst.tensors):
        copy_rows(src.view, dst.view, Index(), twice)


def test_indices_do_not_hold_each_other_or_any_view() -> None:
    mine, theirs = by_block(SRC), by_block(DST)
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
