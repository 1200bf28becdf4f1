# SPDX-License-Identifier: Apache-2.0
"""Pieces of large copies, which are folded before they are multiplied out: the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.crossing_cases import bytes_of_pieces, bytes_of_runs
from support.engine_cases import Case, cases, index_of, tensors_of, view_of
from support.guarded_memory import refused

from portakv import CopyPlan, Index, KVView, LayoutError, PortaKVError, SlotError
from portakv.engines import pieces as folding
from portakv.engines.pieces import TALL, Pieces, pieces_of, to_2d_copies
from portakv.host import pinned
from portakv.host.memcpy import MAX_PITCH
from portakv.plan.move import Move

CASES = cases()
LAYER_FIRST, BLOCK_FIRST = "layer | block token dim", "block layer token dim"
POOL_BY_LAYER = "layer block token dim"
Copied = tuple[CopyPlan, KVView, KVView, Index, Index, int]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small copies as if they were large."""
    monkeypatch.setattr(folding, "LARGE", 0)


def judge(copied: Copied) -> Pieces:
    pieces = pieces_of(copied[0], Move(*copied[1:]))
    assert bytes_of_pieces(pieces) == bytes_of_runs(copied[0].runs(*copied[1:]))
    assert {column.size for column in pieces} == {pieces.number}
    assert {column.dtype for column in pieces} == {np.dtype(np.int64)}
    for pitch in (pieces.dst_pitch, pieces.src_pitch):
        assert ((pieces.width <= pitch) & ((pitch <= MAX_PITCH) | (pieces.height == 1))).all()
    return pieces


def drawn(case: Case, downward: bool) -> Copied:
    views = [
        view_of(tensors_of(case.device, 0, 1), case.device),
        view_of(tensors_of(case.host, case.count + case.offset, 2), case.host),
    ]
    indices = [index_of(case.ids), index_of(case.host_ids, case.offset)]
    if not downward:
        views, indices = views[::-1], indices[::-1]
    forms, steps = (views[0].form, views[1].form), (indices[0].plan_step, indices[1].plan_step)
    plan = CopyPlan(*forms, *steps)
    count = case.count // plan.unit * plan.unit
    if any(index.offset % plan.unit for index in indices):
        plan, count = CopyPlan(*forms, *steps, unit=1), case.count
    return plan, views[0], views[1], indices[0], indices[1], count


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_byte_of_any_layout(case: Case, downward: bool) -> None:
    copied = drawn(case, downward)
    plan, src, dst, *_ = copied
    pieces = judge(copied)
    # What the ends of planes share is merged or folded only by who looks at every run.
    best = to_2d_copies(plan.runs(*copied[1:]), src, dst)
    assert pieces.number <= 2 * best.number + len(plan.nests)


@pytest.mark.usefixtures("always")
def test_a_list_over_blocks() -> None:
    """Of either side each block has an address of its own."""
    blocks = [torch.zeros(3, 4, 8, dtype=torch.int16) for _ in range(9)]
    listed, pool = KVView(blocks, "block | layer token dim"), pooled(POOL_BY_LAYER, blocks=9)
    mine, theirs = Index([3, 1, 8, 0], step=4), Index([2, 3, 4, 7], step=4)
    for src, dst in ((listed, pool), (pool, listed)):
        judge((CopyPlan(src.form, dst.form, 4, 4), src, dst, mine, theirs, 16))
    both = [[torch.zeros(4, 8, dtype=torch.int16) for _ in range(9)] for _ in range(3)]
    tabled = KVView(both, "layer block | token dim")
    for src, dst in ((tabled, pool), (pool, tabled), (tabled, listed), (listed, tabled)):
        judge((CopyPlan(src.form, dst.form, 4, 4), src, dst, mine, theirs, 16))


def pooled(layout: str, blocks: int, layers: int = 3, size: int = 4) -> KVView:
    extents = {"layer": layers, "block": blocks, "token": size, "dim": 8}
    if "|" in layout:
        rest = [extents[name] for name in layout.rpartition("|")[2].split()]
        return KVView([torch.zeros(*rest, dtype=torch.int16) for _ in range(layers)], layout)
    return KVView(
        torch.zeros(*(extents[name] for name in layout.split()), dtype=torch.int16), layout
    )


def copied(
    src: str, dst: str, mine: Sequence[int], theirs: Sequence[int], **extents: int
) -> Copied:
    views = [pooled(layout, **{"blocks": 40, **extents}) for layout in (src, dst)]
    plan = CopyPlan(views[0].form, views[1].form, 4, 4)
    indices = Index(list(mine), step=4), Index(list(theirs), step=4)
    return plan, views[0], views[1], *indices, 4 * len(mine)


RANDOM = [7, 31, 2, 19, 11, 28, 5, 36]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("layers", [3, 12])
def test_blocks_that_follow_each_other_are_merged_or_folded(layers: int) -> None:
    ids = range(5, 15)
    by_layer = judge(copied(LAYER_FIRST, POOL_BY_LAYER, ids, ids, layers=layers))
    assert (by_layer.number, set(by_layer.height.tolist())) == (layers, {1})
    across = judge(copied(LAYER_FIRST, BLOCK_FIRST, ids, ids, layers=layers))
    assert (across.number, set(across.height.tolist())) == (layers, {10})


@pytest.mark.usefixtures("always")
def test_planes_at_one_distance_are_rows() -> None:
    """Random blocks: the rows of a piece are the layers of a block."""
    pieces = judge(copied(POOL_BY_LAYER, BLOCK_FIRST, RANDOM, RANDOM[::-1], layers=12))
    assert (pieces.number, set(pieces.height.tolist())) == (8, {12})
    apart = judge(copied(LAYER_FIRST, BLOCK_FIRST, RANDOM, RANDOM[::-1], layers=12))
    assert apart.number == 8 * 12


@pytest.mark.usefixtures("always")
def test_skipped_blocks_and_none_at_all() -> None:
    some = judge(copied(LAYER_FIRST, BLOCK_FIRST, [3, -1, 5, 9], [1, 2, -7, 4]))
    assert some.nbytes == 2 * 3 * 64
    assert judge(copied(LAYER_FIRST, BLOCK_FIRST, [-1, 4], [4, -1])).number == 0
    assert judge(copied(LAYER_FIRST, BLOCK_FIRST, [], [])).number == 0


@pytest.mark.usefixtures("always")
def test_slots_of_which_some_follow_each_other() -> None:
    """Lines of several lengths, in planes that lie between them, and around them."""
    slots = [0, 1, 2, 5, 12, 13, 9, 30, 31]
    for layout in (BLOCK_FIRST, POOL_BY_LAYER, LAYER_FIRST):
        paged = pooled(layout, blocks=40)
        chunk = KVView(torch.zeros(3, 9, 8, dtype=torch.int16), "layer token dim")
        for src, dst in ((paged, chunk), (chunk, paged)):
            sides = Index(slots), Index()
            mine, theirs = sides if src is paged else sides[::-1]
            plan = CopyPlan(src.form, dst.form, mine.plan_step, theirs.plan_step)
            pieces = judge((plan, src, dst, mine, theirs, 9))
            assert (pieces.number, pieces.nbytes) == (3 * 5, 3 * 9 * 16)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("layout", [LAYER_FIRST, POOL_BY_LAYER])
def test_no_piece_reaches_over_a_seam(
    layout: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seams between layers, and inside of a layer's blocks."""
    ids = range(4, 20)
    for src, dst in ((layout, BLOCK_FIRST), (layout, POOL_BY_LAYER), (POOL_BY_LAYER, layout)):
        plan, *views, mine, theirs, count = copied(src, dst, ids, ids, layers=12)
        for behind in (0, 40 * 64, 5 * 40 * 64, 9 * 64, 3 * 40 * 64 + 6 * 64 + 24):
            seam = views[side].origins[0] + behind
            with monkeypatch.context() as patch:
                patch.setattr(pinned, "seams", lambda seam=seam: (seam,))
                pieces = judge((plan, views[0], views[1], mine, theirs, count))
            start, pitch = ((pieces.src, pieces.src_pitch), (pieces.dst, pieces.dst_pitch))[side]
            past = start + (pieces.height - 1) * pitch + pieces.width
            assert not ((start < seam) & (seam < past)).any()


def test_only_large_copies_are_folded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = folding._fold_factors

    def noted(*arguments: Any) -> Pieces:
        seen.append(len(arguments[3].nbytes))
        return real(*arguments)

    monkeypatch.setattr(folding, "_fold_factors", noted)
    judge(copied(LAYER_FIRST, BLOCK_FIRST, RANDOM, RANDOM))
    assert seen == []
    monkeypatch.setattr(folding, "LARGE", 24)
    judge(copied(LAYER_FIRST, BLOCK_FIRST, RANDOM, RANDOM))
    assert seen == [8]


@pytest.mark.parametrize("count", [0, 10**9])
def test_what_runs_refuse_is_refused(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "LARGE", count)

    def bad(error: type[PortaKVError], change: Callable[[list[Any]], None], *told: str) -> None:
        rest: list[Any] = list(copied(LAYER_FIRST, BLOCK_FIRST, RANDOM, RANDOM))
        change(rest)
        with refused(error, *told, watch=rest[2].tensors):
            pieces_of(rest[0], Move(*rest[1:]))

    def other(rest: list[Any]) -> None:
        rest[1] = pooled(POOL_BY_LAYER, blocks=40)

    def past(rest: list[Any]) -> None:
        rest[3] = Index([40] * 8, step=4)

    def half(rest: list[Any]) -> None:
        rest[4] = Index(RANDOM, step=4, offset=2)

    def longer(rest: list[Any]) -> None:
        rest[5] = 36

    bad(LayoutError, other, "another form")
    bad(SlotError, past, "160 slots")
    bad(SlotError, half, "begins at token 2")
    bad(SlotError, longer, "36 positions")


@pytest.mark.parametrize("large", [0, 10**9])
@pytest.mark.parametrize("layers", [12, TALL])
@pytest.mark.parametrize("below", [0, 64, 65, 10**9])
def test_rows_that_are_wide_are_copies_of_their_own(
    below: int, large: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However rows are folded: all at once, or planes and lines apart."""
    monkeypatch.setattr(folding, "LARGE", large)
    plan, src, dst, mine, theirs, count = copied(
        POOL_BY_LAYER, BLOCK_FIRST, RANDOM, RANDOM, layers=layers
    )
    folded = pieces_of(plan, Move(src, dst, mine, theirs, count), below)
    whole = plan.runs(src, dst, mine, theirs, count)
    width = int(whole.nbytes.max())
    many = layers >= TALL
    assert (folded.height > 1).any() == (width < below or many)
    assert bytes_of_pieces(folded) == bytes_of_pieces(to_2d_copies(whole))
