# SPDX-License-Identifier: Apache-2.0
"""Relations between copies that hold whatever the oracle says: round trips, permutations, parts,
and one backend reading what another has written."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from portakv import Index, LayoutError, Unsupported, copy_rows
from portakv_conformance.draw.arrangement import Case, Side
from portakv_conformance.draw.by_hand import Shape, Workshop
from portakv_conformance.draw.saved import blaming
from portakv_conformance.draw.strategies import cases
from portakv_conformance.judge.judging import Judge, asked_of, changed, view_of
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.rows import locate
from portakv_conformance.judge.subject import Subject

pytestmark = pytest.mark.area("metamorphic")

# What is copied matters less here than that two ways of copying it agree.
_FEWER = settings(max_examples=max(settings().max_examples * 2 // 3, 1))


def drawn(subject: Subject, data: st.DataObject, **options: Any) -> Case:
    """A case on the judged device."""
    return data.draw(cases(device=str(subject.device), **options))


def carry(judge: Judge, case: Case, backend: str = "") -> bool:
    """Copy with the judged backend, or another; False where it declines the plan."""
    asked = asked_of(case)
    if not backend:
        copy = partial(judge.subject.copy, *asked, count=case.count)
        return judge.carried(lambda: judge.finish(copy()), asked)
    try:
        judge.finish(copy_rows(*asked, count=case.count, backend=backend))
    except Unsupported as error:
        judge.declined.append(str(error))
        return False
    return True


def writable(side: Side) -> bool:
    """Whether the view of a side may be a destination."""
    try:
        view_of(side).check_writable()
    except LayoutError:
        return False
    return True


def rows_at(side: Side, slots: np.ndarray) -> list[np.ndarray]:
    """The bytes of the rows at some slots, one array for each layer and kv."""
    rows, memory = locate(side.tensors, side.layout, side.extents), Memory.snapshot(side.tensors)
    return [
        memory.read(rows.row_addresses(kv, layer, slots))
        for layer in range(rows.layers)
        for kv in range(rows.kv)
    ]


def distinct(slots: np.ndarray) -> bool:
    """Whether no slot occurs twice, holes apart."""
    real = slots[slots >= 0]
    return len(np.unique(real)) == len(real)


@_FEWER
@given(st.data())
def test_scatter_after_gather_is_the_identity(judge: Judge, data: st.DataObject) -> None:
    """What was copied and is copied back leaves every byte of the source as it was."""
    case = drawn(judge.subject, data, expanded=False)
    there_and_back(judge, case, ("", ""), "After there and back")


def there_and_back(judge: Judge, case: Case, backends: tuple[str, str], how: str) -> None:
    """Copy a case by one backend and back by another (empty: the judged one): the source is as it
    was."""
    assume(distinct(case.src_slots()) and writable(case.src))
    before = Memory.snapshot(case.src.tensors)
    both = (case, Case(case.dst, case.src, case.count))
    mine = [each for each, backend in zip(both, backends, strict=True) if not backend]
    with blaming(judge, *mine):
        if all(carry(judge, *pair) for pair in zip(both, backends, strict=True)):
            wrong = changed(before, case.src.tensors)
            assert wrong is None, f"{how}, {wrong}. The case was {case!r}."
            judge.examples += 1


@_FEWER
@given(st.data(), st.integers(0, 255))
def test_permuting_positions_permutes_nothing(
    subject: Subject, judge: Judge, data: st.DataObject, order: int
) -> None:
    """Positions have no order: the same pairs of slots in another order are the same copy."""
    case = drawn(subject, data)
    turned = np.random.default_rng(order).permutation(case.count)
    src, dst = (
        replace(side, ids=torch.from_numpy(slots[turned]), step=1, offset=0)
        for side, slots in ((case.src, case.src_slots()), (case.dst, case.dst_slots()))
    )
    same_as(judge, case, [Case(src, dst, case.count)], "In another order of positions")


@_FEWER
@given(st.data(), st.integers(0, 40))
def test_parts_make_the_whole(judge: Judge, data: st.DataObject, cut: int) -> None:
    """A copy in two parts, by offsets, is the copy in one."""
    case = drawn(judge.subject, data)
    cut = min(cut, case.count)
    src, dst = (replace(side, offset=side.offset + cut) for side in (case.src, case.dst))
    parts = [Case(src, dst, case.count - cut), Case(case.src, case.dst, cut)]
    same_as(judge, case, parts, f"In two parts cut at {cut}")


def same_as(judge: Judge, case: Case, others: list[Case], how: str) -> None:
    """Judge that other copies between the same tensors do together what one does."""
    before = Memory.snapshot(case.dst.tensors)
    with blaming(judge, case, *others):
        if not carry(judge, case):
            return
        once = Memory.snapshot(case.dst.tensors)
        by_base = {region.base: region.content for region in before.regions}
        for guard in case.dst.guards:
            guard.whole.copy_(torch.from_numpy(by_base[guard.whole.data_ptr()]))
        if all(carry(judge, other) for other in others):
            wrong = changed(once, case.dst.tensors)
            assert wrong is None, f"{how}, {wrong}. The case was {case!r}."
            judge.examples += 1


@pytest.mark.parametrize("reads", ["reference", "subject"])
@_FEWER
@given(data=st.data())
def test_one_backend_reads_what_another_wrote(
    subject: Subject, judge: Judge, data: st.DataObject, reads: str
) -> None:
    """Rows that one backend gathers and the other scatters are the rows that were there."""
    names = ("reference", "") if reads == "reference" else ("", "reference")
    case = drawn(subject, data, expanded=False)
    there_and_back(judge, case, names, f"With {names} in turn")


@_FEWER
@given(st.data())
def test_a_chain_of_layouts(subject: Subject, judge: Judge, data: st.DataObject) -> None:
    """Rows that go through a dense buffer arrive as those that go straight."""
    case = drawn(subject, data, holes=False)
    assume(distinct(case.dst_slots()))
    wanted = rows_at(case.src, case.src_slots())
    with blaming(judge, case):
        if not carry(judge, case):
            return
        landed = rows_at(case.dst, case.dst_slots())
        for plane, (was, now) in enumerate(zip(wanted, landed, strict=True)):
            wrong = np.argwhere(was != now)
            assert not wrong.size, (
                f"Plane {plane}: the row at position {int(wrong[0, 0])} is not the one that was "
                f"read. The case was {case!r}."
            )
        judge.examples += 1


def test_an_index_of_blocks_is_its_slots(judge: Judge, home: Workshop) -> None:
    """A block table moves what the mapping of all its slots moves."""
    shape = Shape(blocks=9)
    for holes in (0, 2):
        blocks = home.shuffled(shape.blocks, 5, holes)
        tables = home.gather(shape, blocks, step=shape.block_size)
        slots = Index(blocks, step=shape.block_size).slots(tables.count)
        judge.copy(tables)
        judge.copy(home.gather(shape, torch.from_numpy(slots)))
