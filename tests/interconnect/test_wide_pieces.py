# SPDX-License-Identifier: Apache-2.0
"""The pieces of wide runs at one stride: every page once, and neighbours merged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from portakv import Index, KVView
from portakv.errors import SlotError
from portakv.interconnect.link import APART, FOLD_BELOW, pieces_of
from portakv.plan.plan import CopyPlan, Move

PAGE = APART
BLOCKS = 128


def pages(gap: int = 0) -> KVView:
    memory = torch.empty(BLOCKS, PAGE + gap, dtype=torch.uint8, device="cpu")
    return KVView([memory[:, :PAGE]], "layer | block (token dim)", block_size=1)


def described(src_ids: Sequence[int], dst_ids: Sequence[int], gap: int = 0) -> list[list[int]]:
    """Return the pieces as [source page, destination page, pages], in their order; each begins and
    ends with a page."""
    src = pages(gap)
    dst = pages()
    plan = CopyPlan(src.form, dst.form, 1, 1)
    move = Move(src, dst, Index(src_ids), Index(dst_ids), len(src_ids))
    made = pieces_of(plan, move, FOLD_BELOW)
    assert made.nbytes == len(src_ids) * PAGE
    assert (made.height == 1).all()
    found = []
    for at, start, width in zip(made.dst, made.src, made.width, strict=True):
        numbers = [
            divmod(int(start) - src.origins[0], PAGE + gap),
            divmod(int(at) - dst.origins[0], PAGE),
            divmod(int(width), PAGE),
        ]
        assert not any(rest for _, rest in numbers)
        found.append([number for number, _ in numbers])
    return found


@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "expected"),
    [
        ([7, 2, 5], [1, 9, 4], [[2, 9, 1], [5, 4, 1], [7, 1, 1]]),  # nothing meets
        ([7, 2], [9, 4], [[2, 4, 1], [7, 9, 1]]),  # moved by one distance, and apart
        ([5, 1, 4, 0], [7, 3, 6, 2], [[0, 2, 2], [4, 6, 2]]),  # meet once they are sorted
        ([3, 4], [8, 6], [[3, 8, 1], [4, 6, 1]]),  # meet on one side alone
        ([6], [6], [[6, 6, 1]]),
        ([], [], []),
    ],
    ids=["apart", "one distance", "unsorted", "one side", "one", "none"],
)
def test_neighbours_among_a_few_pages_are_one_piece(
    src_ids: list[int], dst_ids: list[int], expected: list[list[int]]
) -> None:
    assert sorted(described(src_ids, dst_ids)) == expected


def test_pages_with_gaps_are_separate_pieces() -> None:
    expected = [[4, 6, 1], [5, 7, 1]]
    assert described([4, 5], [6, 7], gap=64) == expected


@pytest.mark.parametrize("count", [16, 65], ids=["few", "many"])
def test_few_and_many_pages_have_the_same_pieces(count: int) -> None:
    """The first two and no others meet."""
    drawn = np.random.default_rng(count)
    src_ids = [0, 1, *(3 + drawn.permutation(BLOCKS - 3))[: count - 2].tolist()]
    targets = {0: 5, 1: 6}
    free = set(range(BLOCKS)) - {5, 6}
    for src in src_ids[2:]:
        meets = {targets.get(src - 1, -9) + 1, targets.get(src + 1, -9) - 1}
        targets[src] = min(free - meets)
        free.remove(targets[src])
    found = described(src_ids, [targets[src] for src in src_ids])
    expected = [[0, 5, 2], *[[src, targets[src], 1] for src in src_ids[2:]]]
    assert sorted(found) == sorted(expected)


def test_negative_ids_are_left_out() -> None:
    """Ids that are read back from a device may be negative."""
    src = pages()
    dst = pages()
    plan = CopyPlan(src.form, dst.form, 1, 1)
    made = pieces_of(plan, Move(src, dst, Index([3, -1, 8]), Index([1, 2, -1]), 3), FOLD_BELOW)
    assert (made.src - src.origins[0]).tolist() == [3 * PAGE]
    assert (made.dst - dst.origins[0]).tolist() == [PAGE]
    with pytest.raises(SlotError, match="slot 128"):
        pieces_of(plan, Move(src, dst, Index([BLOCKS]), Index([1]), 1), FOLD_BELOW)
