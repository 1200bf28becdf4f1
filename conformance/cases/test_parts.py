# SPDX-License-Identifier: Apache-2.0
"""Parts of caches: rows that move within one, and slices of views by layers, heads and kv."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from portakv import Index
from portakv_conformance.cases import BOTH, Bench, Shape, between, index_of, view_of
from portakv_conformance.draw.arrangement import Keywords

pytestmark = pytest.mark.area("corners")

#: Layouts of one cache, other than the base layout.
LAYOUTS = {
    "home": "",
    "nhd": "layer | kv block token head dim",
    "hnd": "layer | kv block head token dim",
    "packed": "layer | block head token (kv dim)",
    "pool": "block layer kv token head dim",
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_migration_within_one_cache(bench: Bench, layout: str) -> None:
    """Rows move inside one cache, by slots and by blocks, where both sides do not meet."""
    shape = Shape(blocks=8)
    slots = bench.shuffled(shape.slots, 20)
    blocks = bench.shuffled(shape.blocks, 6)
    bench.copy(bench.within(shape, slots[:10], slots[10:], layout=layout))
    bench.copy(bench.within(shape, blocks[:3], blocks[3:], layout=layout, step=4))


#: What is sliced of a view, and what is left of its shape then.
_SLICES: dict[str, tuple[Keywords, Keywords]] = {
    "one-layer": ({"layers": 2}, {"layers": 1}), "layers": ({"layers": slice(1, 3)}, {"layers": 2}),
    "one-head": ({"heads": 3}, {"heads": 1}), "heads": ({"heads": slice(1, 3)}, {"heads": 2}),
    "keys": ({"kv": 0}, {"widths": (32,)}), "values": ({"kv": 1}, {"widths": (32,)}),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["", LAYOUTS["pool"]], ids=["home", "pool"])
@BOTH
@pytest.mark.parametrize("what", _SLICES)
def test_slices(bench: Bench, what: str, direction: str, layout: str) -> None:
    """A slice of a view is those layers, heads or kv only: the others are not touched."""
    whole = Shape(layers=4, heads=4)
    (part, fewer) = _SLICES[what]
    shape = replace(whole, **fewer)
    source = direction == "gather"
    slots = bench.shuffled(whole.slots, 9, 1)
    side = bench.cache(whole, slots, source=source, layout=layout)
    chunk = bench.chunk(shape, 9, source=not source)
    kv = len(shape.widths)
    tensors = _sliced(side.tensors, side.layout, part)
    extents = {"layers": shape.layers, "kv": kv, "heads": shape.heads}
    extents = {**side.extents, **extents, "dim": side.extents["dim"][:kv]}
    sliced = replace(side, tensors=tensors, extents=extents, arrangement=None)
    cache = view_of(side).slice(**part)
    dense = view_of(chunk)
    arguments = (cache, dense, index_of(side), Index())
    if not source:
        arguments = (dense, cache, Index(), index_of(side))
    case = between(direction, sliced, chunk, 9)
    bench.judge.call(case, lambda: bench.subject.copy(*arguments, count=9), arguments=arguments)


def _sliced(tensors: Any, layout: str, part: Keywords) -> Any:
    """Return the same slice by plain indexing of lists and tensors, one axis in each position."""
    left, _, right = layout.rpartition("|")

    def span(axis: str) -> slice:
        at = part.get(axis, part.get(f"{axis}s", slice(None)))  # `layers` slices `layer`
        return at if isinstance(at, slice) else slice(at, at + 1)

    def of(level: Any, lists: list[str]) -> Any:
        if lists:
            return [of(item, lists[1:]) for item in level[span(lists[0])]]
        return level[tuple(span(name) for name in right.split())]

    return of(tensors, left.split())
