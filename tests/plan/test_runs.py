# SPDX-License-Identifier: Apache-2.0
"""Runs: a plan expanded on the host, against plain torch indexing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.core_cases import Copier, by_backend, by_runs, move, noise

from portakv import CopyPlan, Index, KVView, PortaKVError, SlotError


@pytest.mark.parametrize("carry", [by_runs, by_backend])
@pytest.mark.parametrize("extent", [1, 3])
@pytest.mark.parametrize("axis", range(6), ids=["layer", "kv", "block", "token", "head", "dim"])
def test_sources_whose_rows_share_addresses(axis: int, extent: int, carry: Copier) -> None:
    """An axis of stride 0, or of one element under an odd stride, read by ids and without."""
    shape = [2, 2, 3, 4, 2, 8]
    shape[axis] = 1 if extent == 1 else shape[axis]
    once = noise(*(1 if n == axis else size for n, size in enumerate(shape)))
    steps = [0 if n == axis else step for n, step in enumerate(once.stride())]
    steps[axis] = 0 if extent > 1 else 5
    shared = once.as_strided(shape, steps)
    tokens = shape[2] * shape[3]
    kv = shape[1]
    cache = KVView(shared, "layer kv block token head dim", kv=kv)
    rows = shared.flatten(2, 3)
    for ids in (None, [tokens - 1, 0, 2 % tokens, 0]):
        count = tokens if ids is None else len(ids)
        chunk = noise(kv, count, shape[0], *shape[4:], seed=1)
        dst_ids = None if ids is None else list(range(count))
        carry(cache, KVView(chunk, "kv token layer head dim", kv=kv), ids, dst_ids)
        wanted = rows if ids is None else rows[:, :, ids]
        assert torch.equal(chunk, wanted.permute(1, 2, 0, 3, 4))


def test_neighbouring_blocks_become_one_run_also_where_the_list_is_out_of_order() -> None:
    src = KVView(noise(8, 4, 2, 8), "block token head dim")
    dst = KVView(noise(8, 4, 2, 8, seed=1), "block token head dim")
    page = 4 * 2 * 8 * 2
    plan = CopyPlan(src.form, dst.form, 4, 4)
    runs = plan.runs(src, dst, Index([5, 0, 1, 2], 4), Index([3, 4, 5, 6], 4), 16)
    first = src.tensors.data_ptr()
    second = dst.tensors.data_ptr()
    assert runs.src.tolist() == [first, first + 5 * page]
    assert runs.dst.tolist() == [second + 4 * page, second + 3 * page]
    assert runs.nbytes.tolist() == [3 * page, page]


@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "expected"),
    [
        (None, [0, 2, 3, 5], [(0, 0, 1), (1, 2, 2), (3, 5, 1)]),
        ([0, -1, 2, 4], [5, 4, -9, 0], [(0, 5, 1), (4, 0, 1)]),
        ([], [], []),
        ([-1, -2], [-1, -2], []),
        ([1, 1, 2, 1], [0, 1, 2, 5], [(1, 0, 1), (1, 1, 1), (1, 5, 1), (2, 2, 1)]),
    ],
    ids=["contiguous on one side", "negative ids", "no ids", "padding only", "one row often"],
)
def test_runs_of_single_rows(
    src_ids: list[int] | None, dst_ids: list[int], expected: list[tuple[int, int, int]]
) -> None:
    src, dst = (KVView(noise(6, 8, seed=i), "token dim") for i in range(2))
    first = Index(src_ids)
    second = Index(dst_ids)
    plan = CopyPlan(src.form, dst.form, *(index.plan_step for index in (first, second)))
    runs = plan.runs(src, dst, first, second, len(dst_ids))
    rows = [(runs.src - src.addresses) // 16, (runs.dst - dst.addresses) // 16, runs.nbytes // 16]
    assert list(zip(*(column.tolist() for column in rows), strict=True)) == expected
    assert all(column.dtype == "int64" for column in runs)


def test_a_chunk_may_be_read_from_any_token_on_while_blocks_move_whole() -> None:
    """Only an aligned side has to begin at a multiple of the unit."""
    chunk = noise(11, 8)
    target = noise(3, 4, 8, seed=1)
    src = KVView(chunk, "token dim")
    dst = KVView(target, "block token dim")
    plan = CopyPlan(src.form, dst.form, 0, 4)
    assert plan.unit == 4
    move(plan.runs(src, dst, Index(offset=3), Index([2, 0], 4), 8))
    assert torch.equal(target[[2, 0]].view(8, 8), chunk[3:])


def test_tokens_in_a_list_of_tensors_keep_whole_units() -> None:
    """A token's place is then in the table, where no byte offset leads to."""
    tokens = [noise(8, seed=i) for i in range(12)]
    src = KVView(tokens, "token | dim")
    dst = KVView(noise(3, 4, 8, seed=99), "block token dim")
    plan = CopyPlan(src.form, dst.form, 0, 4)
    assert plan.aligned("src")
    with pytest.raises(SlotError, match="unit 4, got one that begins at token 2"):
        plan.runs(src, dst, Index(offset=2), Index([2, 0], 4), 8)
    single = CopyPlan(src.form, dst.form, 0, 4, unit=1)
    move(single.runs(src, dst, Index(offset=2), Index([2, 0], 4), 8))
    assert torch.equal(dst.tensors[[2, 0]].view(8, 8), torch.stack(tokens[2:10]))


def test_tokens_behind_two_levels_of_lists() -> None:
    rows = [noise(8, seed=n) for n in range(12)]
    listed = [[rows[4 * i : 4 * i + 2], rows[4 * i + 2 : 4 * i + 4]] for i in range(3)]
    src = KVView(listed, "token/2 kv token%2 | dim")
    dst = KVView(noise(2, 3, 8, seed=99), "kv token dim")
    by_runs(src, dst, [5, 0, 3], None)
    wanted = [[listed[slot // 2][kv][slot % 2] for slot in (5, 0, 3)] for kv in range(2)]
    assert torch.equal(dst.tensors, torch.stack([torch.stack(one) for one in wanted]))


def table(*ids: int, offset: int = 0) -> Index:
    return Index(list(ids), 4, offset)


PAST = r"the view's 16 slots, got slot 16 \(of id 4, 4 slots each\)"
#: Source and destination index, count, part of the message; blocks of 4, a plan of whole blocks.
REFUSED: list[tuple[Any, Any, Any, str]] = [
    (table(0, 1), table(0, 1), 6, r"multiple of the plan\'s unit 4, got 6 tokens"),
    (table(0, 1), table(0, 1), -4, r"multiple of the plan\'s unit 4, got -4 tokens"),
    (table(0, 1), table(0, 1), 4.0, r"unit 4, got 4.0 tokens"),
    # Inside a unit it would read on into the next block.
    (
        table(0, 1, offset=1),
        table(0, 1),
        4,
        "source index that begins at a multiple",
    ),
    (table(0, 1), table(0, 1, offset=3), 4, "got one that begins at token 3"),
    (Index([0, 1, 2, 3]), table(0), 4, "multiple of the plan's unit 4, got step 1"),
    (table(4), table(0), 4, PAST),
    (table(0), table(4), 4, PAST),
    (table(0, 1), table(0, 1, 2), 12, "2 ids x 4 tokens"),
    (Index(offset=12), table(0, 1), 8, "holds 16 tokens"),
    (None, table(0), 4, r"Expected a KVView .* source .* a KVView and None.* Index\(\)"),
    (table(0), [0], 4, "an Index as the destination .* a KVView and a list"),
]


@pytest.mark.parametrize(("src_index", "dst_index", "count", "why"), REFUSED)
def test_runs_that_are_refused(src_index: Any, dst_index: Any, count: Any, why: str) -> None:
    src, dst = (KVView(noise(4, 4, 8, seed=i), "block token dim") for i in range(2))
    with pytest.raises(SlotError, match=why):
        CopyPlan(src.form, dst.form, 4, 4).runs(src, dst, src_index, dst_index, count)


def test_ids_with_a_plan_that_was_made_without() -> None:
    flat = KVView(noise(16, 8), "token dim")
    with pytest.raises(SlotError, match="begins at token 2"):
        CopyPlan(flat.form, flat.form, unit=4).runs(flat, flat, table(0, 2, offset=2), Index(), 4)


def test_a_view_of_another_form_or_none() -> None:
    """Its strides are not those that the plan was made for."""
    view = KVView(noise(4, 4, 8), "block token dim")
    other = noise(4, 4, 16)[:, :, :8]
    plan = CopyPlan(view.form, view.form, 4, 4)
    for wrong, message in (
        (KVView(other, "block token dim"), "has another form than the plan was made for"),
        (other, "of plan.runs, got a Tensor and an Index"),
    ):
        for at, side in enumerate(("source", "destination")):
            views: list[Any] = [wrong if n == at else view for n in range(2)]
            with pytest.raises(PortaKVError, match=f"{side}.* {message}"):
                plan.runs(views[0], views[1], table(0), table(0), 4)
