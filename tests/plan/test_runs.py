# SPDX-License-Identifier: Apache-2.0
"""Runs: a plan expanded on the host, against plain torch indexing."""

from __future__ import annotations

import pytest
import torch
from support.core_cases import HANDS, SLOTS, Hand, Mover, by_backend, by_runs, move, noise

from portakv import CopyPlan, Index, KVView, LayoutError, SlotError
from portakv.plan.runs import Runs


def plan_for(src: KVView, dst: KVView, mine: Index, theirs: Index, unit: int | None = None) -> Runs:
    return CopyPlan(src.form, dst.form, mine.plan_step, theirs.plan_step, unit).runs(
        src, dst, mine, theirs, SLOTS if mine.length is None else mine.length
    )


@pytest.mark.parametrize("src", HANDS, ids=lambda hand: hand.layout)
@pytest.mark.parametrize("dst", HANDS, ids=lambda hand: hand.layout)
def test_runs_between_any_two_layouts_are_what_plain_indexing_does(src: Hand, dst: Hand) -> None:
    source, target = src.make(1), dst.make(2)
    mine = torch.tensor([11, 0, -1, 6, 5, 7, 3])
    theirs = torch.tensor([2, 3, 8, -5, 0, 11, 7], dtype=torch.int32)
    expected = dst.rows(target).clone()
    moved = (mine >= 0) & (theirs >= 0)
    expected[:, :, theirs[moved].long()] = src.rows(source)[:, :, mine[moved]]
    move(plan_for(src.view(source), dst.view(target), Index(mine), Index(theirs)))
    assert torch.equal(dst.rows(target), expected)


@pytest.mark.parametrize("src", HANDS, ids=lambda hand: hand.layout)
@pytest.mark.parametrize("dst", HANDS, ids=lambda hand: hand.layout)
def test_runs_of_whole_blocks_and_of_everything(src: Hand, dst: Hand) -> None:
    """Block tables on the paged sides (in any order), consecutive slots on the others."""
    source, target = src.make(3), dst.make(4)
    order = {n: torch.arange(n).flip(0).roll(1) for n in (2, 3, 6, 12)}
    indices: list[Index] = []
    slots: list[torch.Tensor] = []
    for hand in (src, dst):
        blocks = order[SLOTS // hand.block] if hand.block else None
        index = Index(blocks, step=hand.block or 1)
        indices.append(index)
        slots.append(torch.from_numpy(index.slots(SLOTS)))
    expected = dst.rows(target).clone()
    expected[:, :, slots[1]] = src.rows(source)[:, :, slots[0]]
    first, second = src.view(source), dst.view(target)
    plan = CopyPlan(first.form, second.form, indices[0].plan_step, indices[1].plan_step)
    move(plan.runs(first, second, indices[0], indices[1], SLOTS))
    assert torch.equal(dst.rows(target), expected)


@pytest.mark.parametrize("carry", [by_runs, by_backend])
@pytest.mark.parametrize("extent", [1, 3])
@pytest.mark.parametrize("axis", range(6), ids=["layer", "kv", "block", "token", "head", "dim"])
def test_sources_whose_rows_share_addresses(axis: int, extent: int, carry: Mover) -> None:
    """An axis of stride 0, or of one element under an odd stride, read by ids and without."""
    shape = [2, 2, 3, 4, 2, 8]
    shape[axis] = 1 if extent == 1 else shape[axis]
    once = noise(*(1 if n == axis else size for n, size in enumerate(shape)))
    steps = [0 if n == axis else step for n, step in enumerate(once.stride())]
    steps[axis] = 0 if extent > 1 else 5
    shared = once.as_strided(shape, steps)
    tokens, kv = shape[2] * shape[3], shape[1]
    cache = KVView(shared, "layer kv block token head dim", kv=kv)
    rows = shared.flatten(2, 3)
    for ids in (None, [tokens - 1, 0, 2 % tokens, 0]):
        count = tokens if ids is None else len(ids)
        chunk = noise(kv, count, shape[0], *shape[4:], seed=1)
        theirs = None if ids is None else list(range(count))
        carry(cache, KVView(chunk, "kv token layer head dim", kv=kv), ids, theirs)
        wanted = rows if ids is None else rows[:, :, ids]
        assert torch.equal(chunk, wanted.permute(1, 2, 0, 3, 4))


def test_a_whole_contiguous_cache_is_one_run() -> None:
    src = KVView(noise(3, 2, 2, 4, 2, 8), "block layer kv token head dim")
    dst = KVView(noise(3, 2, 2, 4, 2, 8, seed=1), "block layer kv token head dim")
    runs = CopyPlan(src.form, dst.form).runs(src, dst, Index(), Index(), 12)
    assert [column.tolist() for column in runs] == [
        [src.tensors.data_ptr()], [dst.tensors.data_ptr()], [src.tensors.nbytes],
    ]  # fmt: skip
    assert all(column.dtype == "int64" for column in runs)


def test_neighbouring_blocks_become_one_run_also_where_the_list_is_out_of_order() -> None:
    src = KVView(noise(8, 4, 2, 8), "block token head dim")
    dst = KVView(noise(8, 4, 2, 8, seed=1), "block token head dim")
    page = 4 * 2 * 8 * 2
    plan = CopyPlan(src.form, dst.form, 4, 4)
    runs = plan.runs(src, dst, Index([5, 0, 1, 2], 4), Index([3, 4, 5, 6], 4), 16)
    first, second = src.tensors.data_ptr(), dst.tensors.data_ptr()
    assert runs.src.tolist() == [first, first + 5 * page]
    assert runs.dst.tolist() == [second + 4 * page, second + 3 * page]
    assert runs.nbytes.tolist() == [3 * page, page]


def test_runs_contiguous_on_one_side_only_are_not_merged() -> None:
    src = KVView(noise(4, 8), "token dim")
    dst = KVView(noise(8, 8, seed=1), "token dim")
    plan = CopyPlan(src.form, dst.form, 0, 1)
    runs = plan.runs(src, dst, Index(), Index([0, 2, 3, 5]), 4)
    assert runs.nbytes.tolist() == [16, 32, 16]


def test_negative_ids_on_either_side_are_left_out() -> None:
    src = KVView(noise(6, 8), "token dim")
    dst = KVView(noise(6, 8, seed=1), "token dim")
    plan = CopyPlan(src.form, dst.form, 1, 1)
    runs = plan.runs(src, dst, Index([0, -1, 2, 4]), Index([5, 4, -9, 0]), 4)
    first, second = src.tensors.data_ptr(), dst.tensors.data_ptr()
    assert runs.src.tolist() == [first, first + 4 * 16]
    assert runs.dst.tolist() == [second + 5 * 16, second]


@pytest.mark.parametrize("ids", [[], [-1, -2]], ids=["empty list", "padding only"])
def test_nothing_to_move_is_no_run(ids: list[int]) -> None:
    src, dst = (KVView(noise(6, 8), "token dim") for _ in range(2))
    runs = CopyPlan(src.form, dst.form, 1, 1).runs(src, dst, Index(ids), Index(ids), len(ids))
    assert [column.size for column in runs] == [0, 0, 0]


def test_one_source_row_may_go_to_several_places() -> None:
    src = KVView(noise(4, 8), "token dim")
    target = noise(6, 8, seed=1)
    dst = KVView(target, "token dim")
    plan = CopyPlan(src.form, dst.form, 1, 1)
    move(plan.runs(src, dst, Index([1, 1, 2, 1]), Index([0, 1, 2, 5]), 4))
    assert torch.equal(target[[0, 1, 2, 5]], src.tensors[[1, 1, 2, 1]])


def test_a_chunk_may_be_read_from_any_token_on_while_blocks_move_whole() -> None:
    """Only an aligned side has to begin at a multiple of the unit."""
    chunk, target = noise(11, 8), noise(3, 4, 8, seed=1)
    src, dst = KVView(chunk, "token dim"), KVView(target, "block token dim")
    plan = CopyPlan(src.form, dst.form, 0, 4)
    assert plan.unit == 4
    assert (plan.aligned("src"), plan.aligned("dst")) == (False, True)
    move(plan.runs(src, dst, Index(offset=3), Index([2, 0], 4), 8))
    assert torch.equal(target[[2, 0]].view(8, 8), chunk[3:])


def test_tokens_in_a_list_of_tensors_keep_whole_units() -> None:
    """A token's place is then in the table, where no byte offset leads to."""
    tokens = [noise(8, seed=i) for i in range(12)]
    src, dst = KVView(tokens, "token | dim"), KVView(noise(3, 4, 8, seed=99), "block token dim")
    plan = CopyPlan(src.form, dst.form, 0, 4)
    assert plan.aligned("src")
    with pytest.raises(SlotError, match="begins at token 2, no multiple of the plan's unit 4"):
        plan.runs(src, dst, Index(offset=2), Index([2, 0], 4), 8)
    single = CopyPlan(src.form, dst.form, 0, 4, unit=1)
    move(single.runs(src, dst, Index(offset=2), Index([2, 0], 4), 8))
    assert torch.equal(dst.tensors[[2, 0]].view(8, 8), torch.stack(tokens[2:10]))


class TestRefusals:
    def setup_method(self) -> None:
        self.src = KVView(noise(4, 4, 8), "block token dim")
        self.dst = KVView(noise(4, 4, 8, seed=1), "block token dim")
        self.plan = CopyPlan(self.src.form, self.dst.form, 4, 4)

    def runs(self, mine: Index, theirs: Index, count: int) -> Runs:
        return self.plan.runs(self.src, self.dst, mine, theirs, count)

    def test_a_count_that_is_no_multiple_of_the_unit(self) -> None:
        with pytest.raises(SlotError, match=r"6 tokens .* multiple of the plan's unit 4"):
            self.runs(Index([0, 1], 4), Index([0, 1], 4), 6)

    def test_an_offset_inside_a_unit(self) -> None:
        """It would read on into the block behind."""
        with pytest.raises(SlotError, match="source index begins at token 1"):
            self.runs(Index([0, 1], 4, offset=1), Index([0, 1], 4), 4)
        with pytest.raises(SlotError, match="destination index begins at token 3"):
            self.runs(Index([0, 1], 4), Index([0, 1], 4, offset=3), 4)

    def test_an_index_of_another_step(self) -> None:
        with pytest.raises(SlotError, match="step 1, no multiple of the plan's unit 4"):
            self.runs(Index([0, 1, 2, 3]), Index([0], 4), 4)

    def test_ids_with_a_plan_that_was_made_without(self) -> None:
        flat = [KVView(noise(16, 8, seed=i), "token dim") for i in range(2)]
        plan = CopyPlan(flat[0].form, flat[1].form, unit=4)
        with pytest.raises(SlotError, match="begins at token 2"):
            plan.runs(flat[0], flat[1], Index([0, 2], 4, offset=2), Index(), 4)

    @pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
    def test_a_slot_past_the_end(self, side: int) -> None:
        indices = [Index([0], 4), Index([0], 4)]
        indices[side] = Index([4], 4)
        told = r"slot 16 \(of id 4, 4 slots each\), but the view has 16 slots"
        with pytest.raises(SlotError, match=told):
            self.runs(indices[0], indices[1], 4)

    def test_a_range_past_the_list(self) -> None:
        with pytest.raises(SlotError, match="2 ids x 4 tokens"):
            self.runs(Index([0, 1], 4), Index([0, 1, 2], 4), 12)

    def test_a_range_past_a_view_without_ids(self) -> None:
        with pytest.raises(SlotError, match="holds 16 tokens"):
            self.runs(Index(offset=12), Index([0, 1], 4), 8)

    def test_a_view_of_another_form(self) -> None:
        """Its strides are not those that the plan was made for."""
        other = KVView(noise(4, 4, 16)[:, :, :8], "block token dim")
        with pytest.raises(LayoutError, match=r"source.* has another form than the plan"):
            self.plan.runs(other, self.dst, Index([0], 4), Index([0], 4), 4)
        with pytest.raises(LayoutError, match=r"destination.* has another form than the plan"):
            self.plan.runs(self.src, other, Index([0], 4), Index([0], 4), 4)
