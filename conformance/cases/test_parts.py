# SPDX-License-Identifier: Apache-2.0
"""Parts of caches: rows that move within one, and slices of views by layers, heads and kv."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from portakv_conformance.judging import Judge, index_of, view_of
from portakv_conformance.shapes import Shape, Workshop
from portakv_conformance.sides import Case

from portakv import Index

pytestmark = pytest.mark.area("corners")

DIRECTIONS = ("gather", "scatter")
LAYOUTS = (
    "layer | kv block token head dim",
    "layer | kv block head token dim",
    "layer | block head token (kv dim)",
    "block layer kv token head dim",
)


def test_migration_within_one_cache(judge: Judge, workshop: Workshop) -> None:
    """Rows move inside one cache, by slots and by blocks, where both sides do not meet."""
    for layout in LAYOUTS:
        shape = Shape(blocks=8)
        slots = workshop.shuffled(shape.slots, 20)
        cache = workshop.cache(shape, slots[:10], layout=layout)
        judge.copy(Case(cache, replace(cache, ids=torch.tensor(slots[10:])), 10))
        blocks = workshop.shuffled(shape.blocks, 6)
        cache = workshop.cache(shape, blocks[:3], layout=layout, step=4)
        judge.copy(Case(cache, replace(cache, ids=torch.tensor(blocks[3:])), 12))


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3]], ids=["layers", "pool"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("what", ["one-layer", "layers", "one-head", "heads", "keys", "values"])
def test_slices(judge: Judge, workshop: Workshop, what: str, direction: str, layout: str) -> None:
    """A slice of a view is those layers, heads or kv only, also of a pool that all layers share:
    the others are not touched."""
    whole = Shape(layers=4, heads=4)
    every: dict[str, dict[str, Any]] = {
        "one-layer": {"layers": 2},
        "layers": {"layers": slice(1, 3)},
        "one-head": {"heads": 3},
        "heads": {"heads": slice(1, 3)},
        "keys": {"kv": 0},
        "values": {"kv": 1},
    }
    part = every[what]
    layers, heads = what in ("one-layer", "layers"), what in ("one-head", "heads")
    fewer = {"one-layer": 1, "layers": 2, "one-head": 1, "heads": 2}.get(what, 0)
    shape = replace(
        whole,
        layers=fewer if layers else 4,
        heads=fewer if heads else 4,
        widths=whole.widths if layers or heads else (32,),
    )
    source = direction == "gather"
    slots = workshop.shuffled(whole.slots, 9, 1)
    side = workshop.cache(whole, slots, source=source, layout=layout)
    chunk = workshop.chunk(shape, 9, source=not source)
    told = replace(side, tensors=_sliced(side.tensors, part), arrangement=None)
    told.extents = {**side.extents, "layers": shape.layers, "kv": len(shape.widths)}
    told.extents.update(heads=shape.heads, dim=side.extents["dim"][: len(shape.widths)])
    case = Case(told, chunk, 9) if source else Case(chunk, told, 9)
    views, ids = (view_of(side).slice(**part), view_of(chunk)), (index_of(side), Index())
    asked = (*views, *ids) if source else (*views[::-1], *ids[::-1])

    def carry() -> None:
        judge.finish(judge.subject.copy(*asked, count=9))

    judge.judge(case, carry, lambda: judge.why_declined(*asked))


def _sliced(tensors: Any, part: dict[str, Any]) -> Any:
    """The same slice by plain indexing of a list of ``[kv, block, token, head, dim]`` tensors, or
    of one tensor ``[block, layer, kv, token, head, dim]``."""

    def span(name: str) -> slice:
        at = part.get(name, slice(None))
        return at if isinstance(at, slice) else slice(at, at + 1)

    if isinstance(tensors, torch.Tensor):
        return tensors[:, span("layers"), span("kv"), :, span("heads")]
    chosen = tensors[span("layers")]
    return [t[span("kv"), :, :, span("heads")] for t in chosen]
