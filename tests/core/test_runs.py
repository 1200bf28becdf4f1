# SPDX-License-Identifier: Apache-2.0
"""Runs and pieces of the core: drawn copies that the oracle judges, and words that no plan has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from math import gcd

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.core_cases import move, noise, sections
from support.crossing_cases import bytes_of_pieces, bytes_of_runs

from portakv import CopyPlan, Index, KVView, PortaKVError, SlotError
from portakv.core import runs as core
from portakv.host import pinned
from portakv.interconnect import link as folding
from portakv.interconnect.link import ALL, Pieces, RunCounter, pieces_of
from portakv.plan import Move
from portakv.plan.plan import side_words
from portakv_conformance.draw.arrangement import Case, Side
from portakv_conformance.draw.strategies import all_cases

_TIMES = settings().max_examples


def _view(side: Side) -> KVView:
    return KVView(side.tensors, side.layout, reinterpret=side.reinterpret, **side.extents)


def _move(case: Case) -> Move:
    src, dst = (_view(side) for side in (case.src, case.dst))
    src_index, dst_index = (
        Index(side.ids, side.step, side.offset) for side in (case.src, case.dst)
    )
    return Move(src, dst, src_index, dst_index, case.count)


def _rows(pieces: Pieces) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Return the source, destination and bytes of each row of pieces."""
    of_piece = np.repeat(np.arange(pieces.number), pieces.height)
    row = np.arange(of_piece.size) - np.repeat(
        np.cumsum(pieces.height) - pieces.height, pieces.height
    )
    src = pieces.src[of_piece] + row * pieces.src_pitch[of_piece]
    dst = pieces.dst[of_piece] + row * pieces.dst_pitch[of_piece]
    return [src, dst, pieces.width[of_piece]]


def _check(case: Case, below: int, merged: bool, limits: tuple[int, int, int]) -> None:
    """Carry a copy out by its pieces, and check its runs against them."""

    def carry() -> None:
        for plan, part in sections(_move(case)):
            runs = plan.runs(*part)
            pieces = pieces_of(plan, part, below, merged)
            assert pieces.number <= max(1, part.count) * plan.runs_per_unit
            assert np.array_equal(bytes_of_pieces(pieces), bytes_of_runs(runs))
            order = np.lexsort((runs.dst, runs.src))
            assert np.array_equal(order, np.arange(order.size))
            move(_rows(pieces))

    with pytest.MonkeyPatch.context() as patch:
        for name, limit in zip(("LARGE", "APART", "TALL"), limits, strict=True):
            patch.setattr(folding, name, limit)
        case.check(carry)


_BELOW = st.sampled_from([0, 8, 64, ALL])
_LIMITS = st.tuples(
    st.sampled_from([0, 16, 4096]), st.sampled_from([4, 64, 1 << 16]), st.sampled_from([2, 8, 32])
)


@given(all_cases(), _BELOW, st.booleans(), _LIMITS)
def test_pieces_are_the_copy(
    case: Case, below: int, merged: bool, limits: tuple[int, int, int]
) -> None:
    _check(case, below, merged, limits)


@pytest.mark.full
@settings(max_examples=100 * _TIMES)
@given(all_cases(), _BELOW, st.booleans(), _LIMITS)
def test_pieces_are_the_copy_at_length(
    case: Case, below: int, merged: bool, limits: tuple[int, int, int]
) -> None:
    _check(case, below, merged, limits)


# Many runs, which the core sorts by the digits of their addresses.


def _expected(src: KVView, dst: KVView, ids: Sequence[np.ndarray], row: int) -> list[list[int]]:
    """Return the runs of single rows of ``row`` bytes, before neighbours are merged."""
    pairs = [(int(a), int(b)) for a, b in zip(*ids, strict=True) if a >= 0 and b >= 0]
    runs: list[list[int]] = []
    for begin, end in sorted(pairs):
        start = src.origins[0] + begin * row
        target = dst.origins[0] + end * row
        last = runs[-1] if runs else [-1, -1, -1]
        if start == last[0] + last[2] and target == last[1] + last[2]:
            last[2] += row
        else:
            runs.append([start, target, row])
    return runs


@pytest.mark.parametrize("count", [1, 255, 256, 257, 3000])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["distinct", "repeated", "near", "every second"])
def test_many_rows_in_any_order(count: int, dtype: torch.dtype, kind: str) -> None:
    rng = np.random.default_rng([count, len(kind)])
    slots = 4 * count
    ids = [rng.permutation(slots)[:count] for _ in range(2)]
    if kind == "repeated":
        ids = [rng.integers(-1, max(1, count // 8), count) for _ in range(2)]
    if kind == "near":
        ids = [np.roll(np.arange(count), count // 3) + shift for shift in (0, 7)]
    views = [KVView(noise(slots + 8, 8, seed=seed), "token dim") for seed in range(2)]
    stride = 2 if kind == "every second" else 1  # ids that are not contiguous
    lists = [torch.from_numpy(np.repeat(each, stride)).to(dtype)[::stride] for each in ids]
    indices = [Index(each) for each in lists]
    plan = CopyPlan(views[0].form, views[1].form, 1, 1)
    runs = plan.runs(views[0], views[1], indices[0], indices[1], count)
    found = [list(row) for row in zip(*(column.tolist() for column in runs), strict=True)]
    assert found == _expected(views[0], views[1], ids, 16)


# Cases in which an earlier form of the core differed


def test_a_large_id_of_a_view_that_ends_inside_a_block() -> None:
    """35 slots are two blocks of 14 and a half one, which positions of its first slots may name."""
    src = KVView(noise(35, 8), "token dim")
    dst = KVView(noise(28, 8, seed=1), "token dim")
    plan = CopyPlan(src.form, dst.form, 14, 0)
    plan = CopyPlan(src.form, dst.form, 14, 0, gcd(plan.unit, 7))
    last = plan.runs(src, dst, Index([2], 14), Index(), 7)
    assert (last.src - src.origins[0]).tolist() == [28 * 16]
    for number in (2, 3, 2**31 - 1, 2**40, 2**62):
        with pytest.raises(SlotError, match=rf"\(of id {number}, 14 slots each\)"):
            plan.runs(src, dst, Index([number], 14), Index(), 14)


def test_runs_that_a_registration_cuts_may_become_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide runs of one line in several planes stay apart, unless a boundary leaves short ones."""
    planes = [torch.empty(6, 3 + gap, 9, dtype=torch.int64)[:, :2] for gap in (0, 1)]
    src, dst = (KVView(plane, "layer token dim") for plane in planes)
    plan = CopyPlan(src.form, dst.form)
    monkeypatch.setattr(folding, "APART", 64)
    monkeypatch.setattr(folding, "TALL", 2)
    monkeypatch.setattr(folding, "LEAST_HEIGHT", 2)
    whole = Move(src, dst, Index(), Index(), 2)
    assert pieces_of(plan, whole, 8).height.tolist() == [1] * 6
    cut = (src.origins[0] + 9,)
    monkeypatch.setattr(pinned, "boundaries", lambda: cut)
    assert sorted(pieces_of(plan, whole, 8).height.tolist()) == [1, 1, 5]


# Arguments


def _copied(count: int = 6) -> tuple[CopyPlan, Move]:
    views = [KVView(noise(3, 8, 8, seed=seed), "layer token dim") for seed in range(2)]
    plan = CopyPlan(views[0].form, views[1].form, 1, 1)
    ids = [Index([5, 0, 3, 1, 6, 2]), Index([0, 4, 2, 7, 1, 5])]
    return plan, Move(views[0], views[1], ids[0], ids[1], count)


@pytest.mark.parametrize("apart", [8, 1 << 16], ids=["wide rows", "narrow rows"])
@pytest.mark.parametrize("room", [0, 1, 17, 18, 1000, 20_000])
def test_a_buffer_of_any_size(room: int, apart: int) -> None:
    plan, part = _copied()
    src, dst, src_index, dst_index, count = part
    copy = *side_words(src, src_index), *side_words(dst, dst_index), count
    found = core.list_runs(plan.words.buffer_info()[0], copy, room)
    assert found is not None
    assert all(map(np.array_equal, found, plan.runs(*part)))
    request = *copy, 0, 8, 32, apart, 4096, 1 << 30, 0, 0, 0, 1, *[0] * 6
    pieces = core.list_pieces(plan.words.buffer_info()[0], request, room)
    assert pieces is not None
    assert len(pieces) == 3
    assert sorted(pieces[1].tolist()) == found[0].tolist()
    if room == 20_000:
        assert pieces[0].base is None  # a column does not retain so large a buffer


def test_numbers_past_64_bits_are_outside() -> None:
    src = KVView(noise(8, 8), "token dim")
    dst = KVView(noise(8, 8, seed=1), "token dim")
    plan = CopyPlan(src.form, dst.form)
    for offset in (2**62, 2**63 - 1, 2**64, 2**200):
        with pytest.raises(SlotError, match="which holds 8 tokens"):
            plan.runs(src, dst, Index(offset=offset), Index(), 4)
        with pytest.raises(SlotError, match="which holds 8 tokens"):
            pieces_of(plan, Move(src, dst, Index(), Index(offset=offset), 4))


def test_ids_that_changed_after_an_earlier_call() -> None:
    """No check is remembered, and the core reads no address that the ids do not have."""
    plan, part = _copied()
    plan.runs(*part)
    ids = part.src_index.ids
    assert ids is not None
    ids[2] = 10**9
    with pytest.raises(SlotError, match="inside the view's 8 slots, got slot 1000000000"):
        plan.runs(*part)


#: Places of words in a plan of one nest without tables: unit, nests, steps of the source's units,
#: and loops.
@pytest.mark.parametrize(
    ("at", "value"), [(0, 0), (1, -1), (4, -1), (4, 0), (12, -1), (14, -1), (16, 0), (16, -1)]
)
def test_words_that_describe_no_plan(at: int, value: int) -> None:
    plan, part = _copied()
    src, dst, src_index, dst_index, count = part
    copy = *side_words(src, src_index), *side_words(dst, dst_index), count
    words = plan.words[:]
    words[at] = value
    with pytest.raises(PortaKVError, match="Report this as a bug"):
        core.list_runs(words.buffer_info()[0], copy, 64)


def test_an_entry_past_the_table_is_no_address() -> None:
    layers = [noise(8, 8, seed=seed) for seed in range(3)]
    src = KVView(layers, "layer | token dim")
    dst = KVView(noise(3, 8, 8, seed=9), "layer token dim")
    plan = CopyPlan(src.form, dst.form)
    sides = side_words(src, Index()), side_words(dst, Index())
    short = sides[0][0], 2, *sides[0][2:]
    with pytest.raises(PortaKVError, match="Report this as a bug"):
        core.list_runs(plan.words.buffer_info()[0], (*short, *sides[1], 8), 64)


def test_one_call_of_the_core_whatever_the_runs() -> None:
    plan, part = _copied()
    rows = np.random.default_rng(5).permutation(4000)
    view = KVView(noise(4000, 8), "token dim")
    large = Move(view, view, Index(rows), Index(rows[::-1].copy()), 4000)
    number = []
    events: list[str] = []
    for each, move_ in ((plan, part), (CopyPlan(view.form, view.form, 1, 1), large)):
        pieces_of(each, move_)
        events.clear()
        sys.setprofile(lambda frame, event, argument: events.append(event))
        try:
            pieces_of(each, move_)
        finally:
            sys.setprofile(None)
        number.append(len(events))
    assert abs(number[0] - number[1]) < 20
    assert max(number) < 200


@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "groups"),
    [
        ([3, 4, 5], [7, 8, 9], 1),
        ([5, 4, 3], [9, 8, 7], 1),
        ([4, 3, 5], [8, 7, 9], 1),
        ([3, 4, 6], [7, 8, 10], 2),
        ([3, 4, 5], [7, 9, 8], 3),
        ([3], [9], 1),
        ([], [], 0),
    ],
)
def test_groups_of_neighbours(src_ids: list[int], dst_ids: list[int], groups: int) -> None:
    view = KVView(noise(16, 8), "token dim")
    counter = RunCounter(CopyPlan(view.form, view.form, 1, 1))
    for dtype in (torch.int32, torch.int64):
        both = [Index(torch.tensor(ids, dtype=dtype)) for ids in (src_ids, dst_ids)]
        assert counter.groups(both[0], both[1], len(src_ids)) == groups
    after = [a for a, b in pairwise(src_ids) if b != a + 1]
    dense = RunCounter(CopyPlan(view.form, view.form, 1, 1), dense=True)
    same = Index(src_ids)
    assert dense.groups(same, same, len(src_ids)) == (len(after) + 1 if src_ids else 0)
