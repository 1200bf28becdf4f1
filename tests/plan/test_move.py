# SPDX-License-Identifier: Apache-2.0
"""Moves: one copy as a value, cut into parts, layers and sections; and where units lie."""

from __future__ import annotations

from typing import Any

import pytest
from support.core_cases import noise

from portakv import CopyPlan, Index, KVView, SlotError, Unsupported
from portakv.plan import Move
from portakv.plan.plan import check_disjoint


def cache(blocks: int = 4, size: int = 8) -> KVView:
    return KVView(noise(2, blocks, size, 16), "layer block token dim")


def padded(blocks: int = 4, size: int = 8) -> KVView:
    """Return blocks with a gap after each, so tokens do not lie at one stride."""
    memory = noise(2, blocks, size * 16 + 16)[:, :, :-16]
    return KVView(memory.unflatten(2, (size, 16)), "layer block token dim")


def chunk(tokens: int) -> KVView:
    return KVView(noise(2, tokens, 16), "layer token dim")


def sections(move: Move) -> list[tuple[int, ...]]:
    plan = CopyPlan(move.src.form, move.dst.form, *move.steps)
    return [tuple(section) for section in plan.split(move)]


def test_a_part_shares_the_ids_and_begins_where_it_is_told() -> None:
    whole = Move(cache(), chunk(16), Index([2, 0], step=8), Index(offset=1), 15)
    part = whole.part(5, 3)
    assert part.src_index.slots(part.count).tolist() == [21, 22, 23]
    assert part.dst_index.slots(part.count).tolist() == [6, 7, 8]
    assert part.src_index.ids is whole.src_index.ids
    assert whole.part(0, 15) is whole
    assert whole.part(0, 4)[:4] == whole[:4]


def test_layers_and_planes_are_views_that_are_made_once() -> None:
    whole = Move(cache(), chunk(16), Index([2, 0], step=8), Index(), 16)
    first = whole.layer(0)
    second = whole.layer(1)
    assert first.src.form == second.src.form
    assert first.src.layers == 1
    assert all(a is b for a, b in zip(whole.layer(1), second, strict=True))
    assert whole.planes(None, None) is whole
    assert whole.planes((0, 2), (0, 1)).src.form == whole.src.form


def table(*ids: int, offset: int = 0) -> Index:
    return Index(list(ids), 8, offset)


POOL = KVView(noise(2, 12, 16), "layer (block token) dim", block_size=1)


@pytest.mark.parametrize(
    ("views", "src_index", "dst_index", "count", "expected"),
    [
        ((cache(), chunk(32)), table(3, 1), Index(), 16, [(0, 16, 8)]),
        # A chunk may begin at any token.
        ((cache(), chunk(32)), table(3, 1), Index(offset=3), 16, [(0, 16, 8)]),
        ((cache(), chunk(32)), table(3, 1, offset=3), Index(), 13, [(0, 5, 1), (5, 8, 8)]),
        ((cache(), chunk(32)), table(3, 1, 2, offset=3), Index(), 14,
         [(0, 5, 1), (5, 8, 8), (13, 1, 1)]),
        ((cache(), chunk(32)), table(3, 1), Index(), 9, [(0, 8, 8), (8, 1, 1)]),
        ((cache(), chunk(32)), table(3, 1, offset=3), Index(), 4, [(0, 4, 1)]),
        # Sides that never meet go in smaller units.
        ((padded(), padded()), table(3, 1, offset=2), table(0, 2, offset=6), 10,
         [(0, 2, 1), (2, 8, 4)]),
        ((padded(), padded()), table(3, 1, offset=2), table(0, 2, offset=5), 10, [(0, 10, 1)]),
        # So does a pool that ends inside a unit.
        ((POOL, chunk(32)), table(0), Index(), 8, [(0, 8, 4)]),
    ],
)  # fmt: skip
def test_a_copy_is_split_into_head_body_and_tail(
    views: tuple[KVView, KVView], src_index: Index, dst_index: Index, count: int, expected: Any
) -> None:
    assert sections(Move(*views, src_index, dst_index, count)) == expected


def test_opaque_pages_are_not_split() -> None:
    pages = KVView(noise(4, 64), "block page", block_size=4)
    src_index = Index([2, 0], step=4)
    dst_index = Index([1, 3], step=4)
    assert sections(Move(pages, pages, src_index, dst_index, 8)) == [(0, 8, 4)]
    with pytest.raises(Unsupported, match="Moving 7 tokens of opaque pages of 4"):
        sections(Move(pages, pages, src_index, dst_index, 7))
    with pytest.raises(Unsupported, match="a page moves only whole"):
        sections(Move(pages, pages, src_index.shifted(1), dst_index.shifted(1), 4))


def test_a_slot_that_is_read_and_written_is_refused() -> None:
    view = cache()
    other = cache()
    flat = KVView(view.tensors.flatten(1, 2), "layer (block token) dim", block_size=4)
    for same in (view, flat):
        size = same.block_size or 1
        table = Index(list(range(16 // size)), step=size)
        with pytest.raises(SlotError, match="both source and destination"):
            check_disjoint(Move(view, same, Index([1, 2], step=8), table, 16))
        check_disjoint(Move(view, same, Index([2, 3], step=8), table, 16))
    check_disjoint(Move(view, other, Index([1, 2], step=8), Index([1, 2], step=8), 16))
