# SPDX-License-Identifier: Apache-2.0
"""Runs as pieces: exactly their bytes, each once, in as few pieces as they allow; of small copies,
and of large ones, which are folded before they are multiplied out; and how many there are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from math import gcd
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.core_cases import noise, sections
from support.counted_shapes import ShapeCounter
from support.crossing_cases import (
    SHIFT,
    bytes_of_pieces,
    bytes_of_runs,
    drawn_runs,
    pieces_of_runs,
    runs_of,
)
from support.engine_cases import DOWNWARD, Case, cases, index_of, tensors_of, view_of
from support.guarded_memory import refused

from portakv import CopyPlan, Index, KVView, LayoutError, PortaKVError, SlotError
from portakv.host import pinned
from portakv.host._registration import PAGE
from portakv.host.memcpy import MAX_PITCH
from portakv.interconnect import link as folding
from portakv.interconnect.choose import Shape
from portakv.interconnect.link import (
    APART,
    FOLD_BELOW,
    LEAST_HEIGHT,
    TALL,
    Pieces,
    pieces_of,
)
from portakv.plan.plan import Move, Runs
from portakv_conformance.draw.arrangement import Case as DrawnCase
from portakv_conformance.draw.arrangement import Side
from portakv_conformance.draw.strategies import cases as drawn_cases

LAYERS = 12
BLOCKS = 40


def shapes(pieces: Pieces) -> list[tuple[int, int, int, int]]:
    columns = pieces.width, pieces.height, pieces.dst_pitch, pieces.src_pitch
    return list(zip(*(column.tolist() for column in columns), strict=True))


def judge(runs: Runs, pieces: Pieces, boundaries: Sequence[int] = ()) -> Pieces:
    """Check that pieces are exactly the bytes of the runs, and that none crosses a boundary."""
    assert np.array_equal(bytes_of_pieces(pieces), bytes_of_runs(runs))
    assert pieces.nbytes == runs.nbytes.sum()
    assert {column.dtype for column in pieces} == {np.dtype(np.int64)}
    assert {column.size for column in pieces} == {pieces.number}
    for start, pitch in ((pieces.src, pieces.src_pitch), (pieces.dst, pieces.dst_pitch)):
        assert ((pieces.width <= pitch) & ((pitch <= MAX_PITCH) | (pieces.height == 1))).all()
        past = start + (pieces.height - 1) * pitch + pieces.width
        for boundary in boundaries:
            assert not ((start < boundary) & (boundary < past)).any()
    return pieces


@given(drawn_runs())
def test_pieces_are_the_runs(runs: Runs) -> None:
    pieces = pieces_of_runs(runs)
    judge(runs, pieces)
    assert pieces.number <= runs.nbytes.size


@given(drawn_runs(), st.lists(st.integers(0, 400), max_size=6, unique=True))
def test_no_piece_reaches_over_a_seam(runs: Runs, boundaries: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shifted = tuple(SHIFT + boundary for boundary in sorted(boundaries))
        patch.setattr(pinned, "boundaries", lambda: shifted)
        judge(runs, pieces_of_runs(runs), boundaries)


@pytest.mark.parametrize("height", [*range(2 * LEAST_HEIGHT), 100])
def test_rows_at_a_pitch_are_one_piece_but_for_few(height: int) -> None:
    pieces = pieces_of_runs(runs_of(range(0, 64 * height, 64), range(0, 32 * height, 32), 16))
    few = height < LEAST_HEIGHT
    assert shapes(pieces) == ([(16, 1, 16, 16)] * height if few else [(16, height, 32, 64)])


def test_groups_of_rows_with_jumps_between() -> None:
    for groups, rows, expected in ((6, 9, (16, 9, 16, 64)), (9, 6, (16, 9, 96, 4096))):
        starts = [group * 4096 + row * 64 for group in range(groups) for row in range(rows)]
        runs = runs_of(starts, range(0, 54 * 16, 16), 16)
        assert shapes(pieces_of_runs(runs)) == [expected] * 6


@pytest.mark.parametrize("kv", [1, 2])
def test_scattered_blocks_fold_over_their_planes(kv: int) -> None:
    """Each block is a piece over all layers, in any order of blocks; K and V may lie anyhow."""
    blocks = np.random.default_rng(3).permutation(200)[:BLOCKS]
    where = np.arange(LAYERS) * 200 * 64
    src = np.concatenate([far + where[:, None] + blocks * 64 for far in (0, 9_999_936)[:kv]])
    dst = np.arange(kv * LAYERS * BLOCKS) * 64
    pieces = pieces_of_runs(runs_of(src.reshape(-1).tolist(), dst.tolist(), 64))
    assert pieces.number == kv * BLOCKS
    assert set(shapes(pieces)) == {(64, LAYERS, BLOCKS * 64, 200 * 64)}


def test_layers_at_irregular_distances_stay_apart() -> None:
    rng = np.random.default_rng(4)
    where = np.cumsum(rng.integers(300, 900, LAYERS)) * 64
    src = where[:, None] + np.sort(rng.permutation(200)[:BLOCKS]) * 64
    runs = runs_of(src.reshape(-1).tolist(), (rng.permutation(src.size) * 64).tolist(), 64)
    assert pieces_of_runs(runs).number == runs.nbytes.size


@pytest.mark.parametrize(
    ("src_step", "dst_step"),
    [(64, -64), (1, 64), (0, 64), (64, MAX_PITCH + 1), (MAX_PITCH + 1, 64)],
)
def test_what_no_copy_of_rows_takes(src_step: int, dst_step: int) -> None:
    """Destinations backwards, sources over each other, pitches beyond the driver's limit."""
    src, dst = (
        KVView.at(
            start,
            "token dim",
            shape=(8, 16),
            strides=(abs(step), 1),
            dtype=torch.uint8,
            device="cpu",
            pinned=True,
        )
        for start, step in ((1 << 20, src_step), (1 << 40, dst_step))
    )
    ids = range(8) if dst_step > 0 else range(8)[::-1]
    assert folded(Move(src, dst, Index(), Index(list(ids)), 8)).number == 8


def test_allocations_are_never_joined() -> None:
    """The rows of each of two tensors that touch are a piece; a run over both is cut."""
    memory = np.zeros((2, 32, 32), dtype=np.uint8)
    halves = [torch.frombuffer(half, dtype=torch.uint8).view(32, 32) for half in memory]
    first = halves[0].data_ptr()
    assert halves[1].untyped_storage().data_ptr() == first + 1024
    for width, expected in ((16, (16, 32, 16, 32)), (32, (1024, 1, 1024, 1024))):
        src = KVView([half[:, :width] for half in halves], "layer | token dim")
        dst = KVView(torch.zeros(2, 32, width, dtype=torch.uint8), "layer token dim")
        assert shapes(folded(Move(src, dst, Index(), Index(), 32))) == [expected] * 2
        whole = torch.frombuffer(memory, dtype=torch.uint8).view(2, 32, 32)
        joined = Move(KVView(whole[..., :width], "layer token dim"), dst, Index(), Index(), 32)
        assert folded(joined).number == 1


def test_memory_at_addresses_is_cut_where_each_tensor_ends() -> None:
    """Tensors that touch on both sides are not merged, since they may be separate allocations; no
    tensor is made of an address for that."""
    order = [3, 0, 1, 5, 4, 2]
    views = [
        KVView.at(
            [start + 96 * at for at in order],
            "block | token dim",
            shape=(4, 24),
            dtype=torch.uint8,
            device="cpu",
            pinned=True,
        )
        for start in (1 << 20, 1 << 22)
    ]
    src, dst = views
    pieces = pieces_of(CopyPlan(src.form, dst.form), Move(src, dst, Index(), Index(), 24))
    assert sorted(pieces.src.tolist()) == [(1 << 20) + 96 * at for at in range(6)]
    assert (pieces.width * pieces.height).tolist() == [96] * 6
    assert not any(view._owners for view in views)


@pytest.mark.parametrize("tokens", [4, 2, 1])
@pytest.mark.parametrize("source", ["at addresses", "of tensors"])
def test_units_at_addresses_are_pieces_of_their_own(
    tokens: int, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tensors take the short path; parts that begin in one tensor and end in the next take
    the long one. Half of the addresses follow each other on both sides, and the boundary of a
    registration lies in a tensor."""
    rng = np.random.default_rng(tokens)
    number = 60
    order = np.concatenate([rng.permutation(number // 2), np.arange(number // 2, number)])
    memory = torch.zeros(number, 4, 24, dtype=torch.uint8)
    views = [
        KVView.at(
            96 * order + start,
            "block | token dim",
            shape=(4, 24),
            dtype=torch.uint8,
            device="cpu",
            pinned=True,
        )
        for start in (1 << 20, 1 << 22)
    ]
    if source == "of tensors":
        views[0] = KVView(memory, "block token dim")
    at = views[0].addresses[0] + 96 * 7 + 40
    monkeypatch.setattr(pinned, "boundaries", lambda: (int(at),))
    named = rng.permutation(number)[:40]
    ids = Index(named, 4)
    if tokens < 4:
        ids = Index((4 * named[:, None] + np.arange(1, 1 + tokens)).reshape(-1))
    move = Move(views[0], views[1], ids, ids, ids.length or 0)
    plan = CopyPlan(views[0].form, views[1].form, ids.step, ids.step)
    pieces = pieces_of(plan, move)
    assert np.array_equal(bytes_of_pieces(pieces), bytes_of_runs(plan.runs(*move)))
    # The destination's addresses end a piece, and so does the boundary.
    for begins, pitch, boundaries in (
        (pieces.src, pieces.src_pitch, np.array([at])),
        (pieces.dst, pieces.dst_pitch, views[1].addresses),
    ):
        ends = begins + (pieces.height - 1) * pitch + pieces.width
        inside = (begins[:, None] < boundaries) & (boundaries < ends[:, None])
        assert not inside.any()


WIDE_LAYOUTS = ("layer | block (token dim)", "layer block (token dim)", "block layer (token dim)")


def wide_view(layout: str, start: int) -> KVView:
    """Return 3 layers of 8 blocks in one piece of memory, which nothing reads."""
    extents = {"layer": 3, "block": 8, "(token": APART}
    inside = layout.partition("|")[2] or layout
    shape = [extents[name] for name in inside.split() if name in extents]
    layers = range(3 if "|" in layout else 1)
    return KVView.at(
        [start + 8 * APART * layer for layer in layers],
        layout,
        shape=shape,
        dtype=torch.int8,
        device="cpu",
        pinned=True,
        block_size=1,
    )


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize(
    "ids",
    [
        ([4, 1, 6], [2, 0, 5]),
        ([4, 5, 0], [1, 2, 7]),
        ([7, 0, 3], [7, 0, 3]),  # the last block of a layer and the first of the next one
        (range(8), range(8)),
        ([3], [6]),
        ([], []),
    ],
    ids=["apart", "neighbours", "meeting", "all", "one", "none"],
)
@pytest.mark.parametrize("src_layout", WIDE_LAYOUTS)
@pytest.mark.parametrize("dst_layout", WIDE_LAYOUTS)
def test_wide_runs_stay_pieces(
    src_layout: str,
    dst_layout: str,
    ids: tuple[Sequence[int], Sequence[int]],
    cut: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neighbours in a plane are merged, and no piece crosses two registrations or allocations,
    although all layers lie in one piece of memory."""
    starts = (1 << 30, 1 << 32)
    views = [wide_view(*each) for each in zip((src_layout, dst_layout), starts, strict=True)]
    cuts = tuple(start + 5 * APART + 100 for start in starts) if cut else ()
    monkeypatch.setattr(pinned, "boundaries", lambda: cuts)
    src_ids, dst_ids = ids
    indices = Index(list(src_ids)), Index(list(dst_ids))
    move = Move(views[0], views[1], *indices, len(src_ids))
    plan = plan_of(move)
    pieces = judge(plan.runs(*move), pieces_of(plan, move, FOLD_BELOW), cuts)
    assert (pieces.height == 1).all()
    for view, start in zip(views, (pieces.src, pieces.dst), strict=True):
        edges = view.addresses if view.entries > 1 else ()
        for edge in edges:
            assert not ((start < edge) & (edge < start + pieces.width)).any()
    if not cut and ids[0] == [4, 5, 0] and src_layout == dst_layout == WIDE_LAYOUTS[0]:
        assert sorted(pieces.width.tolist()) == [APART] * 3 + [2 * APART] * 3


@pytest.mark.filterwarnings("ignore:Expected pinned host memory")
def test_seams_between_registrations() -> None:
    before = pinned.boundaries()
    with pinned.allocate(4 * PAGE, largest=2 * PAGE) as memory:
        cuts = tuple(memory.address + boundary for boundary in memory.boundaries)
        assert pinned.boundaries() == tuple(sorted((*before, *cuts)))
        src, dst = (
            KVView.at(
                start,
                "token dim",
                shape=(4, PAGE),
                dtype=torch.uint8,
                device="cpu",
                pinned=True,
            )
            for start in (memory.address, PAGE)
        )
        pieces = folded(Move(src, dst, Index(), Index(), 4), cuts)
        # Torch's own pinned memory, on a device that has such, is registered in one.
        assert pieces.number == 1 + len(cuts)
    del memory
    assert pinned.boundaries() == before


def test_nothing_is_done_run_by_run() -> None:
    src = np.random.default_rng(5).permutation(20_000)[:8000] * 64
    runs = runs_of(src.tolist(), range(0, 64 * src.size, 64), 64)
    calls: list[str] = []
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    try:
        pieces = pieces_of_runs(runs)
    finally:
        sys.setprofile(None)
    assert pieces.number == 8000
    assert 0 < len(calls) < 800


# Large copies

CASES = cases()
LAYER_FIRST = "layer | block token dim"
BLOCK_FIRST = "block layer token dim"
POOL_BY_LAYER = "layer block token dim"
RANDOM = [7, 31, 2, 19, 11, 28, 5, 36]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "LARGE", 0)


def plan_of(move: Move) -> CopyPlan:
    return CopyPlan(move.src.form, move.dst.form, *move.steps)


def folded(move: Move, boundaries: Sequence[int] = ()) -> Pieces:
    plan = plan_of(move)
    return judge(plan.runs(*move), pieces_of(plan, move), boundaries)


@DOWNWARD
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_byte_of_any_layout(case: Case, downward: bool) -> None:
    views = [
        view_of(tensors_of(case.device, 0, 1), case.device),
        view_of(tensors_of(case.host, case.count + case.offset, 2), case.host),
    ][:: 1 if downward else -1]
    ids = [index_of(case.ids), index_of(case.host_ids, case.offset)][:: 1 if downward else -1]
    for plan, part in sections(Move(views[0], views[1], ids[0], ids[1], case.count)):
        runs = plan.runs(*part)
        pieces = judge(runs, pieces_of(plan, part))
        # What the ends of planes share is merged or folded only if every run is looked at.
        best = pieces_of(plan, part, merged=True)
        assert pieces.number <= 2 * best.number + len(plan.nests)


@pytest.mark.usefixtures("always")
def test_a_list_over_blocks() -> None:
    blocks = [torch.zeros(3, 4, 8, dtype=torch.int16) for _ in range(9)]
    both = [[torch.zeros(4, 8, dtype=torch.int16) for _ in range(9)] for _ in range(3)]
    views = (
        KVView(blocks, "block | layer token dim"),
        KVView(both, "layer block | token dim"),
        pooled(POOL_BY_LAYER, blocks=9),
    )
    src_index = Index([3, 1, 8, 0], step=4)
    dst_index = Index([2, 3, 4, 7], step=4)
    for src, dst in permutations(views, 2):
        folded(Move(src, dst, src_index, dst_index, 16))


def pooled(layout: str, blocks: int = 40, layers: int = 3, size: int = 4) -> KVView:
    extents = {"layer": layers, "block": blocks, "token": size, "dim": 8}
    shape = [extents[name] for name in layout.replace("| ", "").split()]
    pool = torch.zeros(shape, dtype=torch.int16)
    return KVView([each.clone() for each in pool] if "|" in layout else pool, layout)


def copied(
    src: str, dst: str, src_ids: Sequence[int], dst_ids: Sequence[int], layers: int = 3
) -> Move:
    views = [pooled(layout, layers=layers) for layout in (src, dst)]
    ids = Index(list(src_ids), step=4), Index(list(dst_ids), step=4)
    return Move(views[0], views[1], *ids, 4 * len(src_ids))


NEAR = list(range(5, 15))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("src", "dst", "ids", "layers", "number", "height"),
    [
        *((LAYER_FIRST, POOL_BY_LAYER, NEAR, layers, layers, 1) for layers in (3, 12)),
        *((LAYER_FIRST, BLOCK_FIRST, NEAR, layers, layers, 10) for layers in (3, 12)),
        (POOL_BY_LAYER, BLOCK_FIRST, RANDOM, 12, 8, 12),  # the layers of a block
        (LAYER_FIRST, BLOCK_FIRST, RANDOM, 12, 8 * 12, 1),
    ],
)
def test_blocks_that_follow_each_other_are_merged_and_planes_at_one_distance_are_rows(
    src: str, dst: str, ids: list[int], layers: int, number: int, height: int
) -> None:
    pieces = folded(copied(src, dst, ids, ids if ids is NEAR else ids[::-1], layers))
    assert (pieces.number, set(pieces.height.tolist())) == (number, {height})


@pytest.mark.usefixtures("always")
def test_skipped_blocks_and_none_at_all() -> None:
    some = folded(copied(LAYER_FIRST, BLOCK_FIRST, [3, -1, 5, 9], [1, 2, -7, 4]))
    assert some.nbytes == 2 * 3 * 64
    for src_ids, dst_ids in (([-1, 4], [4, -1]), ([], [])):
        assert folded(copied(LAYER_FIRST, BLOCK_FIRST, src_ids, dst_ids)).number == 0


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("layout", [BLOCK_FIRST, POOL_BY_LAYER, LAYER_FIRST])
def test_slots_of_which_some_follow_each_other(layout: str) -> None:
    slots = Index([0, 1, 2, 5, 12, 13, 9, 30, 31])
    paged = pooled(layout)
    chunk = KVView(torch.zeros(3, 9, 8, dtype=torch.int16), "layer token dim")
    for move in (Move(paged, chunk, slots, Index(), 9), Move(chunk, paged, Index(), slots, 9)):
        pieces = folded(move)
        assert (pieces.number, pieces.nbytes) == (3 * 5, 3 * 9 * 16)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("layout", [LAYER_FIRST, POOL_BY_LAYER])
def test_no_piece_of_a_large_copy_reaches_over_a_seam(
    layout: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = range(4, 20)
    for src, dst in ((layout, BLOCK_FIRST), (layout, POOL_BY_LAYER), (POOL_BY_LAYER, layout)):
        move = copied(src, dst, ids, ids, 12)
        for offset in (0, 40 * 64, 5 * 40 * 64, 9 * 64, 3 * 40 * 64 + 6 * 64 + 24):
            boundary = move[:2][side].origins[0] + offset
            with monkeypatch.context() as patch:
                patch.setattr(pinned, "boundaries", lambda boundary=boundary: (boundary,))
                folded(move, [boundary])


@pytest.mark.parametrize("large", [0, 10**9])
def test_what_runs_refuse_is_refused(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "LARGE", large)
    move = copied(LAYER_FIRST, BLOCK_FIRST, RANDOM, RANDOM)
    wrong: list[tuple[type[PortaKVError], str, dict[str, Any]]] = [
        (LayoutError, "another form", {"src": pooled(POOL_BY_LAYER)}),
        (SlotError, "160 slots", {"src_index": Index([40] * 8, step=4)}),
        (SlotError, "begins at token 2", {"dst_index": Index(RANDOM, step=4, offset=2)}),
        (SlotError, "36 positions", {"count": 36}),
    ]
    for error, message, change in wrong:
        with refused(error, message, watch=move.dst.tensors):
            pieces_of(plan_of(move), move._replace(**change))


@pytest.mark.parametrize("large", [0, 10**9])
@pytest.mark.parametrize("layers", [12, TALL])
@pytest.mark.parametrize("below", [0, 64, 65, 10**9])
def test_rows_that_are_wide_are_copies_of_their_own(
    below: int, large: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "LARGE", large)
    move = copied(POOL_BY_LAYER, BLOCK_FIRST, RANDOM, RANDOM, layers)
    result = pieces_of(plan_of(move), move, below)
    whole = plan_of(move).runs(*move)
    width = int(whole.nbytes.max())
    assert (result.height > 1).any() == (width < below or layers >= TALL)
    judge(whole, result)


# Runs that are counted without expanding them, against `CopyPlan.runs` and the pieces

_TIMES = settings().max_examples


def _view(side: Side) -> KVView:
    return KVView(side.tensors, side.layout, **side.extents)


def counted(
    plan: CopyPlan, src_index: Index, dst_index: Index, count: int, below: int = folding.ALL
) -> Shape:
    counter = ShapeCounter(plan, fold_below=below)
    return counter.shape(counter.groups(src_index, dst_index, count), count)


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.full)])
def test_drawn_plans(times: int) -> None:
    """Never counted too low, and nearly always right: a bound alone might be of no use."""
    seen: list[bool] = []

    @settings(max_examples=times * _TIMES)
    @given(drawn_cases(ragged=False))
    def check(case: DrawnCase) -> None:
        src = _view(case.src)
        dst = _view(case.dst)
        src_index, dst_index = (
            Index(s.ids, step=s.step, offset=s.offset) for s in (case.src, case.dst)
        )
        steps = src_index.plan_step, dst_index.plan_step
        unit = CopyPlan(src.form, dst.form, *steps, reinterpret=True).unit
        unit = gcd(unit, case.count, src_index.offset, dst_index.offset)
        plan = CopyPlan(src.form, dst.form, *steps, unit, reinterpret=True)
        skipped = (src_index.slots(case.count) < 0) | (dst_index.slots(case.count) < 0)
        assume(case.count and not skipped.any())  # what is skipped, who launches has removed
        actual = counted(plan, src_index, dst_index, case.count)
        runs = plan.runs(src, dst, src_index, dst_index, case.count)
        assert actual.nbytes == int(runs.nbytes.sum())
        # Only `runs` merges parts of a plan that happen to meet.
        assert actual.runs >= runs.src.size
        assert 1 <= actual.pieces <= actual.runs
        seen.append(actual.runs == runs.src.size)

    check()
    assert len(seen) > times * _TIMES / 4
    assert sum(seen) > (0.9 if times > 1 else 0.75) * len(seen)  # few examples vary more


L = 16
N = 48
B = 16
H = 2
D = 32


def viewed(layout: str, *shape: int, **extents: Any) -> Callable[[], KVView]:
    def made() -> KVView:
        tensor = torch.empty(shape)
        return KVView([x.clone() for x in tensor] if "|" in layout else tensor, layout, **extents)

    return made


paged = viewed("layer kv block token head dim", L, 2, N, B, H, D)
by_block = viewed("block layer kv token head dim", N, L, 2, B, H, D)
listed = viewed("layer | kv block token head dim", L, 2, N, B, H, D)
hnd = viewed("layer kv block head token dim", L, 2, N, H, B, D)
chunk = viewed("kv layer token (head dim)", 2, L, N * B, H * D, heads=H)
VIEWS = {"paged": paged, "by block": by_block, "listed": listed, "hnd": hnd, "chunk": chunk}


def fewest(move: Move, below: int) -> int:
    """Return the pieces of a copy or of its reverse, whichever has fewer."""
    src, dst, src_index, dst_index, count = move
    both = move, Move(dst, src, dst_index, src_index, count)
    return min(pieces_of(plan_of(each), each, below, merged=True).number for each in both)


@pytest.mark.parametrize("order", ["random", "rising", "neighbours"])
@pytest.mark.parametrize("target", VIEWS)
@pytest.mark.parametrize("source", VIEWS)
def test_what_strategies_meet(source: str, target: str, order: str) -> None:
    """The layouts of the field: exactly as many runs, and about as many pieces as there will be
    where wider runs than so many bytes are folded only if they are many."""
    random = np.random.default_rng(5)
    src = VIEWS[source]()
    dst = VIEWS[target]()
    indices = []
    for view in (src, dst):
        ids = random.permutation(N)[:20]
        ids = np.sort(ids) if order == "rising" else np.arange(3, 23) if order[0] == "n" else ids
        indices.append(Index(ids, step=B) if view.block_size else Index())
    src_index, dst_index = indices
    move = Move(src, dst, src_index, dst_index, 20 * B)
    plan = plan_of(move)
    runs = plan.runs(*move)
    for below in (1, 1 << 10, 64 << 10, folding.ALL):
        actual = counted(plan, src_index, dst_index, 20 * B, below)
        # Planes of separate allocations may happen to touch each other.
        assert 0.9 * actual.runs <= runs.src.size <= actual.runs
        assert 0.5 <= actual.pieces / fewest(move, below) <= 2


def of_host(
    src: KVView, dst: KVView, src_index: Index, dst_index: Index, down: bool
) -> ShapeCounter:
    plan = CopyPlan(src.form, dst.form, src_index.plan_step, dst_index.plan_step)
    places = ("device", "pinned") if down else ("pinned", "device")
    plan.src, plan.dst = (replace(x.form, place=y) for x, y in zip((src, dst), places, strict=True))
    return cast(ShapeCounter, ShapeCounter.of_host(plan))


def test_the_host_side_alone() -> None:
    """Between rows in the order of the index and host memory, whatever the device's side is."""
    device = hnd()
    host = by_block()
    block = L * 2 * B * H * D * 4
    for ids, runs in (([7, 3, 5], 3), ([3, 4, 5], 1), ([5, 4, 3], 3), ([1, 2, 9, 10, 11, 0], 3)):
        index = Index(ids, step=B)
        counter = of_host(device, host, index, index, True)
        actual = counter.shape(counter.groups(index, index, len(ids) * B), len(ids) * B)
        assert (actual.nbytes, actual.runs, actual.pieces) == (len(ids) * block, runs, runs)
    # The whole plan moves head by head.
    plan = CopyPlan(device.form, host.form, B, B)
    assert counted(plan, Index([7], B), Index([3], B), B).runs == L * 2 * H * B
    # A chunk without ids: rows at one pitch, or all of it.
    counter = of_host(chunk(), paged(), Index(), Index([1], B), False)
    assert counter.groups(Index(), Index(), 20 * B) == 1
    actual = counter.shape(1, 20 * B)
    assert (actual.runs, actual.pieces) == (2 * L, 1)
    assert counter.shape(1, N * B).runs == 1


@pytest.mark.parametrize(
    ("offset", "count", "runs"), [(0, 4 * B, 4), (0, 4 * B - 1, 4 * 2 * L), (1, 2 * B, 3 * 2 * L)]
)
def test_whole_blocks_are_one_run_whatever_names_them(offset: int, count: int, runs: int) -> None:
    """Host blocks that are copied whole are one piece each, also by slots of the device; parts of
    blocks are runs of each plane."""
    slots = Index(np.random.default_rng(2).permutation(N * B)[: 4 * B])
    host_index = Index([7, 3, 5, 1], B, offset=offset)
    counter = of_host(paged(), by_block(), slots, host_index, True)
    assert counter.shape(counter.groups(host_index, host_index, count), count).runs == runs


def test_padding_between_blocks_keeps_neighbours_apart() -> None:
    memory = torch.empty(10, 5, 8)
    view = KVView(memory[:, :4], "block token dim")
    dense = KVView(torch.empty(40, 8), "token dim")
    plan = CopyPlan(view.form, dense.form, 4, 0)
    blocks = Index(list(range(1, 9)), 4)
    actual = counted(plan, blocks, Index(), 32)
    assert (actual.runs, actual.pieces) == (8, 1)
    move = Move(view, dense, blocks, Index(), 32)
    assert pieces_of(plan, move, merged=True).number == 1
    assert counted(plan, blocks, Index(), 32, below=4 * 32).pieces == 8  # too few for wide ones
    # The same slots by a slot mapping: no neighbours across the padding either.
    by_slot = CopyPlan(view.form, dense.form, 1, 0)
    assert counted(by_slot, Index(list(range(4, 36))), Index(), 32).runs == 8


@pytest.mark.parametrize("by_loop", [False, True], ids=["units", "a loop"])
@pytest.mark.parametrize("height", [LEAST_HEIGHT - 1, LEAST_HEIGHT, TALL - 1, TALL, 2 * TALL])
def test_few_wide_rows_stay_apart_and_many_fold(height: int, by_loop: bool) -> None:
    """The count is that of the pieces: narrow runs fold from 8 rows on, wide ones from 32."""
    count = 4 if by_loop else height
    shape = (4, height, 8) if by_loop else (height, 8)
    layout = "token head dim" if by_loop else "token dim"
    # Apart on both sides, by gaps that differ: nothing merges, and rows lie at one pitch.
    first, second = (torch.empty(*shape[:-1], 8 + gap)[..., :8] for gap in (1, 2))
    src = KVView(first, layout)
    dst = KVView(second, layout)
    plan = CopyPlan(src.form, dst.form, 0, 0)
    move = Move(src, dst, Index(), Index(), count)
    runs = plan.runs(*move)
    for below, least in ((33, LEAST_HEIGHT), (32, TALL)):
        actual = counted(plan, Index(), Index(), count, below)
        assert actual.runs == runs.src.size
        if not by_loop:
            assert actual.pieces == pieces_of(plan, move, below, merged=True).number
            assert actual.pieces == (1 if height >= least else height)
        elif height >= least:
            assert actual.pieces == 4
        else:
            assert actual.pieces == actual.runs
    never = counted(plan, Index(), Index(), count, 0)
    assert (never.runs, never.pieces) == (runs.src.size,) * 2


def test_ids_on_a_device_are_not_waited_for() -> None:
    """They are taken as scattered, until the host has them for another reason."""
    src = paged()
    dst = by_block()
    counter = ShapeCounter(CopyPlan(src.form, dst.form, B, B))
    src_index = Index(torch.tensor([1, 2, 3], dtype=torch.int32), B)
    dst_index = Index(torch.tensor([4, 5, 6]), B)
    src_index.on_host = False  # as an index on a device: no int64 array on the host is known
    assert counter.groups(src_index, dst_index, 3 * B) == 3
    assert src_index.known_ids() is None
    src_index.host_ids()
    assert counter.groups(src_index, dst_index, 3 * B) == 1


def test_long_lists_are_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    src = KVView(noise(64, 8), "token dim")
    dst = KVView(noise(64, 8, seed=1), "token dim")
    plan = CopyPlan(src.form, dst.form, 1, 1)
    order = np.random.default_rng(3).permutation(64)
    same = Index(order), Index(order)
    assert counted(plan, *same, 64).runs == 1
    monkeypatch.setattr(folding, "SORTED", 8)
    assert counted(plan, *same, 64).runs > 30
    falling = Index(np.arange(64)[::-1]), Index(np.arange(64)[::-1])
    assert counted(plan, *falling, 64).runs == 1
