# SPDX-License-Identifier: Apache-2.0
"""Slices of a view by layers, heads and kv: other origins and extents, the same memory.

The table and the origins are normalised, so that equal slices (each single layer, say) share one
form and with it one plan.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from operator import index
from typing import TYPE_CHECKING

import torch

from portakv.errors import LayoutError
from portakv.view.bound import Rows, Spans
from portakv.view.form import PART_AXES, Part, Step, Steps, locate, same_form, widest_vector

if TYPE_CHECKING:
    from portakv.view.view import KVView

Range = slice | int | None


def sliced(view: KVView, *, layers: Range, heads: Range, kv: Range) -> Rows:
    """The rows of a slice; raises `LayoutError` for ranges that cannot be cut out."""
    form, origins, owners, spans = view.form, view.origins, view.owners, view.spans
    kv_range = _range("kv", kv, form.kv)
    layer_range = _range("layers", layers, form.layers)
    head_range = _range("heads", heads, form.heads)
    if (len(kv_range), len(layer_range), len(head_range)) == (form.kv, form.layers, form.heads):
        return form, origins, owners, spans
    parts = [_cut(form.parts[k], "head", head_range) for k in kv_range]
    fewer_layers = len(layer_range) < form.layers
    # What the origins of such slices share at any layer, so that no layer has its own form.
    strides = [step.stride for part in parts if fewer_layers for step in part.layer]
    alignment = widest_vector([form.alignment, *strides, *(part.offset for part in parts)])
    # Parts behind one address that drift apart from layer to layer get entries of their own:
    # entry e of the i-th of n parts has number e * n + i. Otherwise they share it, and n is 1.
    shared = len({part.table for part in parts}) < len(parts)
    drift = fewer_layers and shared and len({part.layer for part in parts}) > 1
    n = len(parts) if drift else 1
    parts = [_cut(part, "layer", layer_range) for part in parts]
    starts = [part.table * n + i % n for i, part in enumerate(parts)]
    count = view.slots // (form.block_size or 1)  # blocks, or a chunk's tokens
    # Byte offsets move from the parts into the addresses; those of one entry share the first's.
    first = {start: part.offset for start, part in reversed([*zip(starts, parts, strict=True)])}
    shifts: dict[int, int] = {}
    for start, part in zip(starts, parts, strict=True):
        shifts.update((start + n * walk, first[start]) for walk in _entries(part, count))
    reached = sorted(shifts)

    def window(table: int) -> int:
        # A step of so many entries now passes as many as are left of any such from the first on.
        return bisect_left(reached, reached[0] + n * table)

    dtypes = tuple(form.dtypes[k] for k in kv_range) if form.dtypes else ()
    form = replace(
        form,
        parts=tuple(
            Part(bisect_left(reached, start), part.offset - first[start], **_rewalk(part, window))
            for start, part in zip(starts, parts, strict=True)
        ),
        layers=len(layer_range),
        heads=len(head_range),
        widths=tuple(form.widths[k] for k in kv_range),
        alignment=alignment,
        dtypes=dtypes if any(dtypes) else (),
    )
    origins = tuple(origins[number // n] + shifts[number] for number in reached)
    left = tuple(owners[number // n] for number in reached)
    if len(left) < n * len(owners):
        spans = _within(spans, left)
    return same_form(form), origins, left, spans


def _rewalk(part: Part, change: Callable[[int], int]) -> dict[str, Steps]:
    """The steps of each axis, with the entries that one passes changed."""
    return {
        name: tuple(replace(step, table=change(step.table)) for step in part.axis(name))
        for name in PART_AXES
    }


def _entries(part: Part, count: int) -> list[int]:
    """Table entries of one part behind its origin; its unbounded axis has ``count`` positions."""
    walks = []
    for steps in map(part.axis, PART_AXES):
        for step in steps:
            extent = step.extent or count // prod(inner.extent or 1 for inner in steps)
            if step.table:
                walks.append([i * step.table for i in range(extent)])
    return [sum(combination) for combination in product(*walks)]


def _within(spans: Spans, owners: Sequence[torch.Tensor]) -> Spans:
    """The parts of sorted, disjoint spans that lie in the storages of some of their tensors."""
    storages = (owner.untyped_storage() for owner in owners)
    ends = [past for _, past in spans]
    found = []
    for start, end in sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}):
        at = bisect_right(ends, start)
        while at < len(spans) and spans[at][0] < end:
            found.append((max(spans[at][0], start), min(spans[at][1], end)))
            at += 1
    return found


def _range(name: str, asked: Range, extent: int) -> range:
    if asked is None:
        return range(extent)
    try:
        if isinstance(asked, slice):
            found = range(extent)[asked]
        else:
            at = index(asked)
            found = range(at, at + 1) if 0 <= at < extent else range(0)
    except (TypeError, ValueError):
        raise LayoutError(
            f"{name}={asked!r} was asked; expected an integer or a slice of integers."
        ) from None
    if len(found) < 1 or found.step != 1:
        raise LayoutError(
            f"{name}={asked} asks for {list(found)} of {extent}; ask for a range of at least one "
            f"with step 1."
        )
    return found


def _cut(part: Part, axis: str, wanted: range) -> Part:
    """Keep ``wanted`` positions of one axis."""
    steps = part.axis(axis)
    size, below = len(wanted), 1
    if size == prod(step.extent for step in steps):
        return part
    table, offset = locate(part.table, part.offset, steps, wanted.start)
    kept: Steps = ()
    for step in reversed(steps):
        if size <= step.extent:
            if wanted.start % below or wanted.start // below % step.extent + size > step.extent:
                break
            kept = (Step(size, step.table, step.stride), *kept) if size > 1 else kept
            return replace(part, table=table, offset=offset, **{axis: kept})
        if size % step.extent:
            break
        kept, size, below = (step, *kept), size // step.extent, below * step.extent
    raise LayoutError(
        f"{axis} {wanted.start}..{wanted.stop} cuts through a factor of the {axis!r} axis; slice "
        f"at multiples of its factors."
    )
