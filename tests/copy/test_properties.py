# SPDX-License-Identifier: Apache-2.0
"""Property tests: drawn structure, judged by the oracle byte by byte.

1,000 derandomised examples in an ordinary run, 20,000 in `.ci/full`; ``pytest --fuzz N`` draws N
fresh ones in each test.
"""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from support.core_cases import move, sections
from support.guarded_memory import untouched

from portakv import Index, KVView, LayoutError, copy_rows
from portakv.plan import Move
from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.strategies import all_cases, cases, migrations, page_cases

_TIMES = settings().max_examples


def _move(case: Case) -> Move:
    sides = case.src, case.dst
    src, dst = (KVView(x.tensors, x.layout, reinterpret=x.reinterpret, **x.extents) for x in sides)
    mine, theirs = (Index(x.ids, x.step, x.offset) for x in sides)
    return Move(src, dst, mine, theirs, case.count)


def _check(case: Case) -> None:
    whole = _move(case)
    case.check(lambda: copy_rows(*whole[:4], count=whole.count).synchronize())


def _check_runs(case: Case) -> None:
    """`plan.runs` carried out by memmove is the copy that the oracle expects."""

    def carry() -> None:
        for plan, part in sections(_move(case)):
            runs = plan.runs(*part)
            assert (runs.nbytes > 0).all()
            move(runs)

    case.check(carry)


@settings(max_examples=5 * _TIMES)
@given(all_cases())
def test_a_copy_moves_the_addressed_rows_and_nothing_else(case: Case) -> None:
    _check(case)


@given(migrations())
def test_rows_migrate_within_one_cache(case: Case) -> None:
    _check(case)


@given(page_cases())
def test_opaque_pages_move_whole(case: Case) -> None:
    _check(case)


@settings(max_examples=2 * _TIMES)
@given(cases())
def test_runs_are_the_same_copy(case: Case) -> None:
    _check_runs(case)


@given(cases())
def test_gather_then_scatter_is_the_identity(case: Case) -> None:
    """What was copied and is copied back leaves the source as it was."""
    src, dst, mine, theirs, count = _move(case)
    slots = case.src_slots()
    assume(len(set(slots[slots >= 0])) == (slots >= 0).sum())
    try:
        src.check_writable()
    except LayoutError:
        assume(False)
    copy_rows(src, dst, mine, theirs, count=count).synchronize()
    with untouched(case.src.tensors):
        copy_rows(dst, src, theirs, mine, count=count).synchronize()


@pytest.mark.slow
@settings(max_examples=100 * _TIMES)
@given(all_cases())
def test_a_copy_at_length(case: Case) -> None:
    """Both ways again, ten thousand times."""
    _check(case)
    _check_runs(case)
