# SPDX-License-Identifier: Apache-2.0
"""Unusual addresses: tensors in no order, caches that share tensors, rows that are seen twice."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from portakv import BackendUnavailable, Unsupported
from portakv.registry.registry import STRATEGIES
from portakv_conformance.cases import CHUNK, PAGED, Bench, Case, Judge, Shape, full, view_of
from portakv_conformance.draw import by_hand
from portakv_conformance.draw.arrangement import Keywords

pytestmark = pytest.mark.area("corners")

SHAPE = Shape(layers=4)
_TRIES = 1000


@pytest.mark.parametrize(
    "layout", ["layer | kv block token head dim", "layer kv | block token head dim"]
)
def test_tensors_in_no_order(workshop: Bench, direction: str, layout: str) -> None:
    """The order of tensors in memory does not have to be the order of layers."""
    slots = workshop.shuffled(SHAPE.slots, 9, 1)
    for seed in range(workshop.seed, workshop.seed + _TRIES):
        case = workshop.move(direction, SHAPE, slots, layout=layout, place="scattered", seed=seed)
        if _in_no_order(case, direction):
            workshop.copy(case)
            return
    pytest.fail(f"In {_TRIES} tries the allocator never placed tensors out of order.")


def _in_no_order(case: Case, direction: str) -> bool:
    """Return True if ids neither rise nor fall, and no distance occurs twice in a row."""
    at = view_of(case.src if direction == "gather" else case.dst).addresses.tolist()
    steps = [b - a for a, b in pairwise(at)]
    even = any(a == b for a, b in pairwise(steps))
    return min(steps) < 0 < max(steps) and steps[0] != max(steps) and not even


@pytest.mark.parametrize(("direction", "axis"), [  # of a cache, or of a chunk
    ("gather", "kv"), ("gather", "token"), ("gather", "head"), ("scatter", "kv"),
    ("scatter", "layer"),
])  # fmt: skip
def test_a_source_that_is_expanded(bench: Bench, direction: str, axis: str) -> None:
    """A source may show one row in several places, by a stride of 0; each place is a row."""
    how: Keywords = {"expand": by_hand.dimension(bench.paged, axis)}
    if direction == "scatter":
        how = {"chunk": {"expand": by_hand.dimension(CHUNK, axis)}}
    bench.copy(bench.move(direction, SHAPE, bench.shuffled(SHAPE.slots, 9, 1), **how))


def test_caches_that_share_tensors(workshop: Bench, direction: str) -> None:
    """A cache is all of its tensors in their order, not the first or the last of them."""
    source = direction == "gather"
    slots = workshop.shuffled(SHAPE.slots, 9, 1)
    how: Keywords = {"layout": PAGED, "source": source}
    one, two = (workshop.cache(SHAPE, slots, storage=number, **how) for number in (0, 100))
    first, *_, last = one.tensors
    sets = (
        one.tensors,
        [first, *two.tensors[1:]],
        [*two.tensors[:-1], last],
        [first, one.tensors[2], one.tensors[1], last],
        [*two.tensors[:2], *one.tensors[2:]],
        one.tensors,
    )
    guards = [*one.guards, *two.guards]
    for number, tensors in enumerate(sets):
        cache = replace(one, tensors=list(tensors), guards=guards, arrangement=None)
        chunk = workshop.chunk(SHAPE, 9, source=not source, storage=2000 + number)
        workshop.copy(by_hand.between(direction, cache, chunk, 9))


#: What lies on the host, and its dimension with a stride of 0 or of 1 element.
_SEEN_TWICE = [
    *[(CHUNK, axis) for axis in ("kv", "layer", "token")],
    *[(PAGED, axis) for axis in ("kv", "token", "head")],
    ("token dim", "token"),  # as `row.expand(tokens, dim)` is
    ("block token dim", "token"),
]


@pytest.mark.needs("accelerator")
@pytest.mark.parametrize("every", [0, 1], ids=["stride-0", "stride-1"])
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize(
    "engine", ["subject", "automatic", *(pytest.param(engine, marks=full) for engine in STRATEGIES)]
)
def test_host_sources_that_are_expanded(
    bench: Bench, engine: str, pinned: bool, every: int
) -> None:
    """Host memory whose rows share bytes is copied to the device row by row, by every engine."""
    host = replace(bench, device="cpu")
    for layout, axis in _SEEN_TWICE:
        latent = "layer" not in layout
        shape = Shape(layers=1, heads=1, widths=(64,)) if latent else Shape(widths=(64, 64))
        slots = bench.shuffled(shape.slots, 9, 1)
        how: Any = {"layout": layout, "expand": by_hand.dimension(layout, axis), "every": every}
        if "block" in layout:
            src = host.cache(shape, slots, **how)
            dst = bench.chunk(shape, 9, layout="token dim" if latent else CHUNK, source=False)
        else:
            src = host.chunk(shape, 9, **how)
            cache = "block token dim" if latent else bench.paged
            dst = bench.cache(shape, slots, layout=cache, source=False)
        case = Case(by_hand.on_host(src, pinned), dst, 9)
        if engine == "subject":
            bench.copy(case)
        else:
            _by_engine(bench.judge, case, None if engine == "automatic" else engine)


def _by_engine(judge: Judge, case: Case, engine: str | None) -> None:
    """Judge a copy by one of the library's engines, which may be for other devices or places."""

    def carry() -> None:
        try:
            judge.finish(judge.start(case, backend=engine))
        except BackendUnavailable as error:
            raise Unsupported(f"This copy by {engine!r}", str(error)) from error

    why = engine and f"The engine {engine!r} takes no copy of this kind."
    judge.judge(case, carry, lambda: why)
