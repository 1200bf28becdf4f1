# SPDX-License-Identifier: Apache-2.0
"""Lists of ids as callers pass them: any dtype, place and stride, any step, on either side."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from portakv_conformance.cases import Bench, Case, Shape, Side, Subject
from portakv_conformance.draw.by_hand import Ids
from portakv_conformance.judge.judging import across

pytestmark = pytest.mark.area("corners")

SHAPE = Shape(blocks=9)
POOL = "block layer kv token head dim"
HND = "layer kv | block head token dim"
DTYPES = {"int32": torch.int32, "int64": torch.int64}


def id_devices(subject: Subject) -> list[torch.device]:
    """Return the devices that may hold ids: the host, and the judged device."""
    return list({torch.device("cpu"): None, subject.device: None})


def elsewhere(bench: Bench, layout: str, ids: Ids, **how: Any) -> Side:
    """Return a destination in another layout than the base layout, if the backend copies to it."""
    accepted = across(bench.subject, bench.paged, layout)
    return bench.cache(SHAPE, ids, layout=accepted, source=False, **how)


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_that_are_not_contiguous(bench: Bench, direction: str, dtype: str, stride: int) -> None:
    """A strided list of ids is read by its stride; what stands between its ids is not read."""
    for place in id_devices(bench.subject):
        slots = torch.tensor(bench.shuffled(SHAPE.slots, 11, 2), dtype=DTYPES[dtype])
        wide = torch.full((stride * 11 + 1,), SHAPE.slots + 7, dtype=DTYPES[dtype]).to(place)
        spread = wide[1::stride][:11]
        spread.copy_(slots)
        bench.copy(bench.move(direction, SHAPE, spread))


@pytest.mark.parametrize(("own", "remote"), list(product(DTYPES, DTYPES)))
def test_each_side_has_its_own_dtype(bench: Bench, own: str, remote: str) -> None:
    """Ids of the two sides may be of different dtypes, and lie in different places."""
    for place, other in product(id_devices(bench.subject), id_devices(bench.subject)):
        src = torch.tensor(bench.shuffled(SHAPE.slots, 10, 1), dtype=DTYPES[own])
        dst = torch.tensor(bench.shuffled(SHAPE.slots, 10)[::-1], dtype=DTYPES[remote])
        source = bench.cache(SHAPE, src.to(place))
        target = elsewhere(bench, POOL, dst.to(other))
        bench.copy(Case(source, target, 10))


@pytest.mark.parametrize("step", [1, 2, 4, 8, 12, 36])
def test_steps(bench: Bench, direction: str, step: int) -> None:
    """An id may stand for any number of tokens: part of a block, a block, or several blocks."""
    units = SHAPE.slots // step
    ids = torch.tensor(bench.shuffled(units, max(1, units // 2), 1 if units > 2 else 0))
    for listed in (ids, ids.int()):
        bench.copy(bench.move(direction, SHAPE, listed, step=step))


@pytest.mark.parametrize(("own", "other"), [(1, 4), (4, 1), (2, 4), (4, 12), (12, 4), (3, 4)])
def test_steps_of_both_sides(bench: Bench, own: int, other: int) -> None:
    """The two sides count their ids in different units; a slot mapping is not a block table."""
    src, dst = (bench.shuffled(36 // step, 24 // step) for step in (own, other))
    target = elsewhere(bench, HND, dst, step=other)
    bench.copy(Case(bench.cache(SHAPE, src, step=own), target, 24))


@pytest.mark.parametrize("offsets", [(0, 1), (1, 0), (3, 5), (4, 8), (2, 2), (5, 4)])
@pytest.mark.parametrize("steps", [(1, 1), (4, 4), (4, 1), (0, 4), (4, 0), (0, 1)])
def test_offsets_of_both_sides(bench: Bench, steps: list[int], offsets: list[int]) -> None:
    """Each side begins at its own offset, in the middle of a block too."""
    count = 17
    src, dst = (
        bench.shuffled(36 // step, -(-(count + offset) // step)) if step else None
        for step, offset in zip(steps, offsets, strict=True)
    )
    source = bench.cache(SHAPE, src, step=max(steps[0], 1), offset=offsets[0])
    target = elsewhere(bench, HND, dst, step=max(steps[1], 1), offset=offsets[1])
    bench.copy(Case(source, target, count))


@pytest.mark.parametrize("holes", [1, 5, 10])
def test_holes_on_both_sides(bench: Bench, holes: int) -> None:
    """A position is skipped where either side's id is negative."""
    other = bench.other(1)
    src = bench.cache(SHAPE, bench.shuffled(SHAPE.slots, 20, holes))
    dst = elsewhere(bench, POOL, other.shuffled(SHAPE.slots, 20, holes))
    bench.copy(Case(src, dst, 20))
    src = bench.cache(SHAPE, bench.shuffled(9, 6, holes // 2), step=4)
    dst = replace(dst, ids=torch.tensor(other.shuffled(SHAPE.slots, 24, holes)))
    bench.copy(Case(src, dst, 24))


def test_a_list_in_order_backwards_and_with_runs(bench: Bench, direction: str) -> None:
    """Neighbouring ids may be moved together, but only where they are neighbours on both sides."""
    n = SHAPE.slots
    for slots in (
        list(range(n)),
        list(range(n))[::-1],
        [*range(8, 16), *range(8), *range(20, n)],
        [n - 1, *range(n - 1)],
        [*range(5, 9), -1, *range(10, 14)],
        [0, 1, 2, 3, 8, 9, 10, 11],
    ):
        bench.copy(bench.move(direction, SHAPE, slots))


@pytest.mark.parametrize("step", [1, 4])
def test_a_slot_that_is_read_many_times(bench: Bench, step: int) -> None:
    """A source id may occur any number of times."""
    bench.copy(bench.gather(SHAPE, [3, 3, 0, 3, -1, 8, 8, 3], step=step))
