# SPDX-License-Identifier: Apache-2.0
"""The runs of a copy, counted without expanding it, against `CopyPlan.runs` and `to_2d_copies`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import gcd

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from support.core_cases import noise

from portakv import CopyPlan, Index, KVView
from portakv.engines import pieces as shapes
from portakv.engines.pieces import ALL, LEAST_HEIGHT, TALL, RunCounter, Shape, to_2d_copies
from portakv.plan.runs import Runs
from portakv_conformance.draw.arrangement import Case, Side
from portakv_conformance.draw.strategies import cases

_TIMES = settings().max_examples


def _view(side: Side) -> KVView:
    return KVView(side.tensors, side.layout, **side.extents)


def counted(plan: CopyPlan, mine: Index, theirs: Index, count: int, below: int = ALL) -> Shape:
    counter = RunCounter(plan, fold_below=below)
    return counter.shape(counter.groups(mine, theirs, count), count)


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.full)])
def test_drawn_plans(times: int) -> None:
    """Never counted too low, and nearly always right: a bound alone might be of no use."""
    seen: list[bool] = []

    @settings(max_examples=times * _TIMES)
    @given(cases(ragged=False))
    def check(case: Case) -> None:
        src, dst = _view(case.src), _view(case.dst)
        mine, theirs = (Index(s.ids, step=s.step, offset=s.offset) for s in (case.src, case.dst))
        steps = mine.plan_step, theirs.plan_step
        unit = CopyPlan(src.form, dst.form, *steps, reinterpret=True).unit
        unit = gcd(unit, case.count, mine.offset, theirs.offset)
        plan = CopyPlan(src.form, dst.form, *steps, unit, reinterpret=True)
        skipped = (mine.slots(case.count) < 0) | (theirs.slots(case.count) < 0)
        assume(case.count and not skipped.any())  # what is skipped, who launches has removed
        found = counted(plan, mine, theirs, case.count)
        runs = plan.runs(src, dst, mine, theirs, case.count)
        assert found.nbytes == int(runs.nbytes.sum())
        # Parts of a plan that happen to meet are merged by nobody but `runs`.
        assert found.runs >= runs.src.size
        assert 1 <= found.pieces <= found.runs
        seen.append(found.runs == runs.src.size)

    check()
    assert len(seen) > times * _TIMES / 4
    assert sum(seen) > 0.9 * len(seen)


L, N, B, H, D = 16, 48, 16, 2, 32


def viewed(layout: str, *shape: int, **extents: int) -> Callable[[], KVView]:
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


def folded(runs: Runs, src: KVView, dst: KVView, below: int) -> int:
    """Pieces that runs fold into, in the order of the source or of the destination."""
    order = np.argsort(runs.dst)
    turned = Runs(runs.dst[order], runs.src[order], runs.nbytes[order])
    return min(
        to_2d_copies(runs, src, dst, below).number, to_2d_copies(turned, dst, src, below).number
    )


@pytest.mark.parametrize("order", ["random", "rising", "neighbours"])
@pytest.mark.parametrize("target", VIEWS)
@pytest.mark.parametrize("source", VIEWS)
def test_what_engines_meet(source: str, target: str, order: str) -> None:
    """The layouts of the field: exactly as many runs, and about as many pieces as there will be
    where wider runs than so many bytes are folded only if they are many."""
    random = np.random.default_rng(5)
    src, dst = VIEWS[source](), VIEWS[target]()
    indices = []
    for view in (src, dst):
        ids = random.permutation(N)[:20]
        ids = np.sort(ids) if order == "rising" else np.arange(3, 23) if order[0] == "n" else ids
        indices.append(Index(ids, step=B) if view.block_size else Index())
    mine, theirs = indices
    plan = CopyPlan(src.form, dst.form, mine.plan_step, theirs.plan_step)
    runs = plan.runs(src, dst, mine, theirs, 20 * B)
    for below in (1, 1 << 10, 64 << 10, ALL):
        found = counted(plan, mine, theirs, 20 * B, below)
        # Planes of separate allocations may happen to touch each other.
        assert 0.9 * found.runs <= runs.src.size <= found.runs
        assert 0.5 <= found.pieces / folded(runs, src, dst, below) <= 2


def of_host(src: KVView, dst: KVView, mine: Index, theirs: Index, down: bool) -> RunCounter:
    """The counter of the host's side of a copy."""
    plan = CopyPlan(src.form, dst.form, mine.plan_step, theirs.plan_step)
    places = ("device", "pinned") if down else ("pinned", "device")
    plan.src, plan.dst = (replace(x.form, place=y) for x, y in zip((src, dst), places, strict=True))
    return RunCounter.of_host(plan)


def test_the_host_side_alone() -> None:
    """Between rows in the order of the index and host memory, whatever the device's side is."""
    device, host, block = hnd(), by_block(), L * 2 * B * H * D * 4
    for ids, runs in (([7, 3, 5], 3), ([3, 4, 5], 1), ([5, 4, 3], 3), ([1, 2, 9, 10, 11, 0], 3)):
        index = Index(ids, step=B)
        counter = of_host(device, host, index, index, True)
        found = counter.shape(counter.groups(index, index, len(ids) * B), len(ids) * B)
        assert (found.nbytes, found.runs, found.pieces) == (len(ids) * block, runs, runs)
    # The whole plan moves head by head.
    plan = CopyPlan(device.form, host.form, B, B)
    assert counted(plan, Index([7], B), Index([3], B), B).runs == L * 2 * H * B
    # A chunk without ids: rows at one pitch, or all of it.
    counter = of_host(chunk(), paged(), Index(), Index([1], B), False)
    assert counter.groups(Index(), Index(), 20 * B) == 1
    found = counter.shape(1, 20 * B)
    assert (found.runs, found.pieces) == (2 * L, 1)
    assert counter.shape(1, N * B).runs == 1


@pytest.mark.parametrize(
    ("offset", "count", "runs"), [(0, 4 * B, 4), (0, 4 * B - 1, 4 * 2 * L), (1, 2 * B, 3 * 2 * L)]
)
def test_whole_blocks_are_one_run_however_they_are_named(
    offset: int, count: int, runs: int
) -> None:
    """By slots on the device, host blocks that are taken whole lie in one piece all the same; parts
    of blocks are runs of each plane."""
    slots = Index(np.random.default_rng(2).permutation(N * B)[: 4 * B])
    theirs = Index([7, 3, 5, 1], B, offset=offset)
    counter = of_host(paged(), by_block(), slots, theirs, True)
    assert counter.shape(counter.groups(theirs, theirs, count), count).runs == runs


def test_padding_between_blocks_keeps_neighbours_apart() -> None:
    room = torch.empty(10, 5, 8)
    view = KVView(room[:, :4], "block token dim")
    dense = KVView(torch.empty(40, 8), "token dim")
    plan = CopyPlan(view.form, dense.form, 4, 0)
    blocks = Index(list(range(1, 9)), 4)
    found = counted(plan, blocks, Index(), 32)
    assert (found.runs, found.pieces) == (8, 1)
    assert to_2d_copies(plan.runs(view, dense, blocks, Index(), 32)).number == 1
    assert counted(plan, blocks, Index(), 32, below=4 * 32).pieces == 8  # too few for wide ones
    # The same slots by a slot mapping: no neighbours across the padding either.
    by_slot = CopyPlan(view.form, dense.form, 1, 0)
    assert counted(by_slot, Index(list(range(4, 36))), Index(), 32).runs == 8


@pytest.mark.parametrize("by_loop", [False, True], ids=["units", "a loop"])
@pytest.mark.parametrize("height", [LEAST_HEIGHT - 1, LEAST_HEIGHT, TALL - 1, TALL, 2 * TALL])
def test_few_wide_rows_stay_apart_and_many_fold(height: int, by_loop: bool) -> None:
    """As many as `to_2d_copies` makes: of narrow runs from 8 rows on, of wide ones from 32."""
    count = 4 if by_loop else height
    shape = (4, height, 8) if by_loop else (height, 8)
    layout = "token head dim" if by_loop else "token dim"
    # Apart on both sides, by gaps that differ: nothing merges, and rows lie at one pitch.
    first, second = (torch.empty(*shape[:-1], 8 + gap)[..., :8] for gap in (1, 2))
    src, dst = KVView(first, layout), KVView(second, layout)
    plan = CopyPlan(src.form, dst.form, 0, 0)
    runs = plan.runs(src, dst, Index(), Index(), count)
    for below, least in ((33, LEAST_HEIGHT), (32, TALL)):
        found = counted(plan, Index(), Index(), count, below)
        assert found.runs == runs.src.size
        if not by_loop:
            assert found.pieces == to_2d_copies(runs, src, dst, below).number
            assert found.pieces == (1 if height >= least else height)
        elif height >= least:
            assert found.pieces == 4
        else:
            assert found.pieces == found.runs
    never = counted(plan, Index(), Index(), count, 0)
    assert (never.runs, never.pieces) == (runs.src.size,) * 2


def test_ids_on_a_device_are_not_waited_for() -> None:
    """They are taken as scattered, until the host has them for another reason."""
    src, dst = paged(), by_block()
    counter = RunCounter(CopyPlan(src.form, dst.form, B, B))
    mine, theirs = Index([1, 2, 3], B), Index([4, 5, 6], B)
    mine.on_host = False  # as an index whose ids are on a device
    assert counter.groups(mine, theirs, 3 * B) == 3
    assert mine.known_ids() is None
    mine.host_ids()
    assert counter.groups(mine, theirs, 3 * B) == 1


def test_long_lists_are_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    src = KVView(noise(64, 8), "token dim")
    dst = KVView(noise(64, 8, seed=1), "token dim")
    plan = CopyPlan(src.form, dst.form, 1, 1)
    order = np.random.default_rng(3).permutation(64)
    same = Index(order), Index(order)
    assert counted(plan, *same, 64).runs == 1
    monkeypatch.setattr(shapes, "_SORTED", 8)
    assert counted(plan, *same, 64).runs > 30
    falling = Index(np.arange(64)[::-1]), Index(np.arange(64)[::-1])
    assert counted(plan, *falling, 64).runs == 1
