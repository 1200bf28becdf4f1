# SPDX-License-Identifier: Apache-2.0
"""Drawn structure, and every kind of preset as source and destination, judged by the oracle.

1,000 derandomised examples in an ordinary run, 20,000 in `.ci/full`; ``pytest --fuzz N`` draws N
fresh ones in each test. Of the pairs of presets an ordinary run makes a third, `.ci/full` all.
Where both can hold the rows the copy is exact and canaries stay whole; where they cannot, the right
error is raised and not one byte has changed. Whether a pair can is decided by `presets_cases.meet`
from the engines' shapes, without asking the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from support.core_cases import move, sections
from support.guarded_memory import untouched
from support.presets_cases import KINDS, meet, side

from portakv import Index, KVView, LayoutError, Unsupported, copy_rows
from portakv.plan import Move
from portakv.view.view import check_writable
from portakv_conformance.draw.arrangement import Case, Side
from portakv_conformance.draw.strategies import all_cases, cases, migrations, page_cases

_TIMES = settings().max_examples


def _move(case: Case) -> Move:
    sides = case.src, case.dst
    src, dst = (KVView(x.tensors, x.layout, reinterpret=x.reinterpret, **x.extents) for x in sides)
    src_index, dst_index = (Index(x.ids, x.step, x.offset) for x in sides)
    return Move(src, dst, src_index, dst_index, case.count)


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
    """Copy rows and copy them back; the source is unchanged."""
    src, dst, src_index, dst_index, count = _move(case)
    slots = case.src.at(case.count)
    assume(len(set(slots[slots >= 0])) == (slots >= 0).sum())
    try:
        check_writable(src)
    except LayoutError:
        assume(False)
    copy_rows(src, dst, src_index, dst_index, count=count).synchronize()
    with untouched(case.src.tensors):
        copy_rows(dst, src, dst_index, src_index, count=count).synchronize()


@pytest.mark.slow
@settings(max_examples=100 * _TIMES)
@given(all_cases())
def test_a_copy_at_length(case: Case) -> None:
    """Both ways again, ten thousand times."""
    _check(case)
    _check_runs(case)


# Presets


def _index(side: Side, step: int, seed: int) -> torch.Tensor:
    """Half of the ids, shuffled, every fourth a hole."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randperm(side.slots // step, generator=random)[: side.slots // step // 2]
    ids[3::4] = -1
    return ids


def _views(names: tuple[str, str], case: Case) -> Iterator[KVView]:
    for name, own in zip(names, (case.src, case.dst), strict=True):
        yield KVView(own.tensors, name, reinterpret=case.src.reinterpret, **own.extents)


@pytest.mark.parametrize("third", [0, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 2))])
@pytest.mark.parametrize("source", KINDS)
def test_every_destination(source: str, third: int) -> None:
    first = KINDS.index(source)
    copied = 0
    for at, destination in enumerate(KINDS):
        if (first + at) % 3 != third and at != first:
            continue
        common = meet(source, destination)
        names = (source, destination)
        sides = side(source, common), side(destination, common, source=False)
        if common is None:
            _refuses(names, Case(*sides, 1))
        else:
            _copies(names, *sides)
            copied += 1
    assert copied, f"{source} could be copied to nothing"


def _copies(names: tuple[str, str], src: Side, dst: Side) -> None:
    step = src.block_size or 1 if src.opaque else 1
    src_ids = _index(src, step, 0)
    dst_ids = _index(dst, step, 1)
    sides = replace(src, ids=src_ids, step=step), replace(dst, ids=dst_ids, step=step)
    case = Case(*sides, len(src_ids) * step)
    first, second = _views(names, case)
    indices = Index(src_ids, step), Index(dst_ids, step)
    case.check(lambda: copy_rows(first, second, *indices).synchronize())


def _refuses(names: tuple[str, str], case: Case) -> None:
    opaque = case.src.opaque, case.dst.opaque
    step = case.src.block_size or 1 if all(opaque) else 1
    # Where extents differ as well, a plan between a page and rows may say that first.
    expected = (LayoutError, Unsupported) if opaque[0] != opaque[1] else LayoutError
    first, second = _views(names, case)
    with untouched(case.src.tensors, case.dst.tensors), pytest.raises(expected):
        copy_rows(first, second, Index([0], step=step), Index([0], step=step))
