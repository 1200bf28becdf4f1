# SPDX-License-Identifier: Apache-2.0
"""Property tests: drawn structure, judged by the oracle byte by byte.

1,600 derandomised examples in an ordinary run, 10,000 in `.ci/full`; ``pytest --fuzz N`` draws N
fresh ones in each test.
"""

from __future__ import annotations

import ctypes
from math import gcd

import pytest
import torch
from hypothesis import assume, given, settings

from portakv import CopyPlan, Index, KVView, LayoutError, copy_rows
from portakv_conformance.draw.arrangement import Case, Side
from portakv_conformance.draw.strategies import all_cases, cases, migrations, page_cases

_TIMES = settings().max_examples


def _view(side: Side) -> KVView:
    return KVView(side.tensors, side.layout, reinterpret=side.reinterpret, **side.extents)


def _index(side: Side) -> Index:
    return Index(side.ids, step=side.step, offset=side.offset)


def _writable(view: KVView) -> bool:
    try:
        view.check_writable()
    except LayoutError:
        return False
    return True


def _check(case: Case) -> None:
    src, dst = _view(case.src), _view(case.dst)
    mine, theirs = _index(case.src), _index(case.dst)
    case.check(lambda: copy_rows(src, dst, mine, theirs, count=case.count).synchronize())


@settings(max_examples=6 * _TIMES)
@given(all_cases())
def test_a_copy_moves_the_addressed_rows_and_nothing_else(case: Case) -> None:
    _check(case)


@settings(max_examples=3 * _TIMES)
@given(migrations())
def test_rows_migrate_within_one_cache(case: Case) -> None:
    _check(case)


@settings(max_examples=3 * _TIMES)
@given(page_cases())
def test_opaque_pages_move_whole(case: Case) -> None:
    _check(case)


@settings(max_examples=3 * _TIMES)
@given(cases(ragged=False))
def test_runs_are_the_same_copy(case: Case) -> None:
    """`plan.runs` carried out by memmove is the copy that the oracle expects."""
    src, dst = _view(case.src), _view(case.dst)
    mine, theirs = _index(case.src), _index(case.dst)
    plan = CopyPlan(src.form, dst.form, mine.plan_step, theirs.plan_step)
    offsets = [x.offset for x in (mine, theirs)]
    unit = gcd(plan.unit, case.count, *offsets)
    plan = CopyPlan(src.form, dst.form, mine.plan_step, theirs.plan_step, unit)

    def move() -> None:
        runs = plan.runs(src, dst, mine, theirs, case.count)
        assert (runs.nbytes > 0).all()
        for source, target, nbytes in zip(*(column.tolist() for column in runs), strict=True):
            ctypes.memmove(target, source, nbytes)

    case.check(move)


@settings(max_examples=_TIMES)
@given(cases())
def test_gather_then_scatter_is_the_identity(case: Case) -> None:
    """What was copied and is copied back leaves the source as it was."""
    src, dst = _view(case.src), _view(case.dst)
    mine, theirs = _index(case.src), _index(case.dst)
    slots = case.src_slots()
    assume(len(set(slots[slots >= 0])) == (slots >= 0).sum() and _writable(src))
    copy_rows(src, dst, mine, theirs, count=case.count).synchronize()
    before = [owner.untyped_storage() for owner in src.owners]
    kept = [torch.empty(0, dtype=torch.uint8).set_(s).clone() for s in before]
    copy_rows(dst, src, theirs, mine, count=case.count).synchronize()
    for storage, old in zip(before, kept, strict=True):
        assert torch.equal(torch.empty(0, dtype=torch.uint8).set_(storage), old)


@pytest.mark.slow
@settings(max_examples=100 * _TIMES)
@given(all_cases())
def test_a_copy_at_length(case: Case) -> None:
    """The first test again, ten thousand times."""
    _check(case)
