# SPDX-License-Identifier: Apache-2.0
"""Relations between copies that hold whatever the oracle says: round trips, permutations, parts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from portakv import Index, LayoutError, Unsupported
from portakv.view.view import check_writable
from portakv_conformance.cases import Bench, Case, Judge, Shape, Side, view_of
from portakv_conformance.draw.saved import blaming
from portakv_conformance.draw.strategies import cases
from portakv_conformance.judge.judging import changed
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.rows import Rows

pytestmark = pytest.mark.area("metamorphic")

Data = st.DataObject
# What is copied matters less here than that two ways of copying it agree.
_FEWER = settings(max_examples=max(settings().max_examples * 2 // 3, 1))


def drawn(judge: Judge, data: Data, **options: object) -> Case:
    """Draw a case on the judged device."""
    return data.draw(cases(device=str(judge.subject.device), **options))


def carry(judge: Judge, case: Case, backend: str = "") -> bool:
    """Copy with the judged backend, or another; False where it declines the plan."""
    if not backend:
        return judge.carried(lambda: judge.finish(judge.start(case)), case)
    try:
        judge.finish(judge.start(case, backend=backend))
    except Unsupported as error:
        judge.declined.append(str(error))
        return False
    return True


def agree(judge: Judge, wrong: str | None, how: str, case: Case) -> None:
    """Count a relation that holds; AssertionError where something is wrong."""
    assert wrong is None, f"{how}, {wrong}. The case was {case!r}."
    judge.examples += 1


def rows_at(side: Side, slots: np.ndarray) -> list[np.ndarray]:
    """Return the bytes of the rows at some slots, one array for each layer and kv."""
    rows = Rows(side.tensors, side.layout, side.extents)
    memory = Memory.snapshot(side.tensors)
    planes = product(range(rows.layers), range(rows.kv))
    return [memory.read(rows.row_addresses(kv, layer, slots)) for layer, kv in planes]


def distinct(slots: np.ndarray) -> bool:
    """Return True if no slot occurs twice, except for negative slots."""
    real = slots[slots >= 0]
    return len(np.unique(real)) == len(real)


@_FEWER
@given(st.data())
def test_scatter_after_gather_is_the_identity(judge: Judge, data: Data) -> None:
    """A copy and its reverse leave every byte of the source as it was."""
    there_and_back(judge, data, ("", ""), "After there and back")


def there_and_back(judge: Judge, data: Data, backends: tuple[str, str], how: str) -> None:
    """Copy a drawn case by one backend and back by another (empty: the judged one)."""
    case = drawn(judge, data, expanded=False)
    try:
        check_writable(view_of(case.src))
    except LayoutError:
        reject()
    assume(distinct(case.src.at(case.count)))
    before = Memory.snapshot(case.src.tensors)
    both = [*zip((case, Case(case.dst, case.src, case.count)), backends, strict=True)]
    with blaming(judge, *(each for each, backend in both if not backend)):
        if all(carry(judge, *pair) for pair in both):
            agree(judge, changed(before, case.src.tensors), how, case)


@_FEWER
@given(st.data(), st.integers(0, 255))
def test_permuting_positions_permutes_nothing(judge: Judge, data: Data, order: int) -> None:
    """Positions have no order: the same pairs of slots in another order are the same copy."""
    case = drawn(judge, data)
    turned = np.random.default_rng(order).permutation(case.count)
    src, dst = (
        replace(side, ids=torch.from_numpy(side.at(case.count)[turned]), step=1, offset=0)
        for side in (case.src, case.dst)
    )
    same_as(judge, case, [Case(src, dst, case.count)], "In another order of positions")


@_FEWER
@given(st.data(), st.integers(0, 40))
def test_parts_make_the_whole(judge: Judge, data: Data, cut: int) -> None:
    """A copy in two parts, by offsets, is the copy in one."""
    case = drawn(judge, data)
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
        before.restore(guard.whole for guard in case.dst.guards)
        if all(carry(judge, other) for other in others):
            agree(judge, changed(once, case.dst.tensors), how, case)


@pytest.mark.parametrize("reads", ["reference", "subject"])
@_FEWER
@given(data=st.data())
def test_one_backend_reads_what_another_wrote(judge: Judge, data: Data, reads: str) -> None:
    """Rows that one backend gathers and the other scatters are the rows that were there."""
    names = ("reference", "") if reads == "reference" else ("", "reference")
    there_and_back(judge, data, names, f"With {names} in turn")


@_FEWER
@given(st.data())
def test_a_chain_of_layouts(judge: Judge, data: Data) -> None:
    """Rows that go through a dense buffer arrive as those that go straight."""
    case = drawn(judge, data, holes=False)
    assume(distinct(case.dst.at(case.count)))
    wanted = rows_at(case.src, case.src.at(case.count))
    with blaming(judge, case):
        if not carry(judge, case):
            return
        fault = None
        landed = rows_at(case.dst, case.dst.at(case.count))
        for plane, (was, now) in enumerate(zip(wanted, landed, strict=True)):
            if fault is None and (wrong := np.argwhere(was != now)).size:
                where = f"the row at position {wrong[0, 0]} of plane {plane}"
                fault = f"{where} is not the one that was read"
        agree(judge, fault, "By the layouts alone", case)


def test_an_index_of_blocks_is_its_slots(bench: Bench) -> None:
    """A block table moves what the mapping of all its slots moves."""
    shape = Shape(blocks=9)
    for holes in (0, 2):
        tables = bench.some("gather", shape, 5, holes, step=shape.block_size)
        slots = Index(tables.src.ids, step=shape.block_size).slots(tables.count)
        bench.copy(tables)
        bench.copy(bench.gather(shape, torch.from_numpy(slots)))
