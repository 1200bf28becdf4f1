# SPDX-License-Identifier: Apache-2.0
"""Addresses that nobody would choose: tensors in an order that is no order, rows seen twice."""

from __future__ import annotations

from itertools import pairwise

import pytest

from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.by_hand import CHUNK, Shape, Workshop, dimension
from portakv_conformance.judge.judging import Judge, view_of

pytestmark = pytest.mark.area("corners")

DIRECTIONS = ("gather", "scatter")
SHAPE = Shape(layers=4)
_TRIES = 1000


@pytest.mark.parametrize(
    "layout", ["layer | kv block token head dim", "layer kv | block token head dim"]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tensors_in_no_order(judge: Judge, workshop: Workshop, direction: str, layout: str) -> None:
    """Where tensors lie in memory says nothing of which layer they are."""
    slots = workshop.shuffled(SHAPE.slots, 9, 1)
    for seed in range(workshop.seed, workshop.seed + _TRIES):
        case = workshop.move(direction, SHAPE, slots, layout=layout, place="scattered", seed=seed)
        if _in_no_order(case, direction):
            judge.copy(case)
            return
    pytest.fail(f"In {_TRIES} tries the allocator never placed tensors out of order.")


def _in_no_order(case: Case, direction: str) -> bool:
    """Neither rising nor falling, and no distance occurs twice in a row."""
    cache = case.src if direction == "gather" else case.dst
    at = view_of(cache).addresses.tolist()
    steps = [b - a for a, b in pairwise(at)]
    even = any(a == b for a, b in pairwise(steps))
    return min(steps) < 0 < max(steps) and steps[0] != max(steps) and not even


#: What a source shows in several places: an axis of a cache, or of a chunk.
_EXPANDED = {"gather": ("kv", "token", "head"), "scatter": ("kv", "layer")}


@pytest.mark.parametrize(
    ("direction", "axis"), [(way, axis) for way, axes in _EXPANDED.items() for axis in axes]
)
def test_a_source_that_is_expanded(judge: Judge, home: Workshop, direction: str, axis: str) -> None:
    """A source may show one row in several places, by a stride of 0; each place is a row."""
    slots = home.shuffled(SHAPE.slots, 9, 1)
    if direction == "gather":
        expand = dimension(home.paged, axis)
        chunk = home.chunk(SHAPE, 9, source=False)
        judge.copy(Case(home.cache(SHAPE, slots, expand=expand), chunk, 9))
    else:
        cache = home.cache(SHAPE, slots, source=False)
        judge.copy(Case(home.chunk(SHAPE, 9, expand=dimension(CHUNK, axis)), cache, 9))
