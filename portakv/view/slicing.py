# SPDX-License-Identifier: Apache-2.0
"""Slices of a view by layers, heads and kv: other origins and extents, the same memory.

The table and the origins are normalised, so that equal slices (each single layer, say) share one
form and with it one plan.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from operator import index
from typing import TypeVar

import numpy as np
import torch

from portakv.errors import LayoutError
from portakv.view.bound import Facts
from portakv.view.form import PART_AXES, Part, Step, Steps, locate, same_form

Range = slice | int | None
Entry = TypeVar("Entry")


def slice_facts(facts: Facts, *, layers: Range, heads: Range, kv: Range) -> Facts:
    """Facts of the sliced view; raises `LayoutError` for ranges that cannot be cut out."""
    form, origins, owners = facts.form, facts.origins, facts.owners
    kv_range = _range("kv", kv, form.kv)
    layer_range = _range("layers", layers, form.layers)
    head_range = _range("heads", heads, form.heads)
    if (len(kv_range), len(layer_range), len(head_range)) == (form.kv, form.layers, form.heads):
        return facts
    parts = [_cut(form.parts[k], "head", head_range) for k in kv_range]
    fewer_layers = len(layer_range) < form.layers
    alignment = _alignment(form.alignment, parts, fewer_layers)
    if fewer_layers and _drift_apart(parts):
        origins, owners = _repeat(origins, len(parts)), _repeat(owners, len(parts))
        parts = _with_own_entries(parts)
    parts = [_cut(part, "layer", layer_range) for part in parts]
    count = facts.slots // (form.block_size or 1)  # blocks, or a chunk's tokens
    kept, parts = _keep_entries(parts, len(origins), count)
    parts, shifts = _fold_origins(parts, count)
    dtypes = tuple(form.dtypes[k] for k in kv_range) if form.dtypes else ()
    sliced = replace(
        form,
        parts=tuple(parts),
        layers=len(layer_range),
        heads=len(head_range),
        widths=tuple(form.widths[k] for k in kv_range),
        alignment=alignment,
        dtypes=dtypes if any(dtypes) else (),
    )
    origins = tuple(origins[entry] + shifts.get(i, 0) for i, entry in enumerate(kept))
    left = tuple(owners[i] for i in kept)
    spans = _without(facts.spans, owners, left) if len(left) < len(owners) else facts.spans
    return facts._replace(form=same_form(sliced), origins=origins, owners=left, spans=spans)


def _without(
    spans: list[tuple[int, int]], owners: Sequence[torch.Tensor], left: Sequence[torch.Tensor]
) -> list[tuple[int, int]]:
    """The spans but for those in allocations that no tensor ``left`` lies in."""
    held = {owner.untyped_storage().data_ptr() for owner in left}
    storages = {storage.data_ptr(): storage for storage in (o.untyped_storage() for o in owners)}
    gone = [(at, at + storage.nbytes()) for at, storage in storages.items() if at not in held]
    gone.sort()
    starts = [start for start, _ in gone]
    found = []
    for first, past in spans:
        at = bisect_right(starts, first) - 1
        if at < 0 or first >= gone[at][1]:
            found.append((first, past))
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
    extent = int(np.prod([step.extent for step in steps], dtype=np.int64)) if steps else 1
    if len(wanted) == extent:
        return part
    table, offset = locate(part.table, part.offset, steps, wanted.start)
    kept: Steps = ()
    size = len(wanted)
    for at in range(len(steps) - 1, -1, -1):
        step = steps[at]
        if size <= step.extent:
            start = wanted.start // _below(steps, at) % step.extent
            whole = wanted.start % _below(steps, at) == 0 and start + size <= step.extent
            if not whole:
                break
            kept = (Step(size, step.table, step.stride), *kept) if size > 1 else kept
            return replace(part, table=table, offset=offset, **{axis: kept})
        if size % step.extent:
            break
        kept, size = (step, *kept), size // step.extent
    raise LayoutError(
        f"{axis} {wanted.start}..{wanted.stop} cuts through a factor of the {axis!r} axis; slice "
        f"at multiples of its factors."
    )


def _below(steps: Steps, at: int) -> int:
    return int(np.prod([step.extent for step in steps[at + 1 :]], dtype=np.int64))


def _keep_entries(parts: list[Part], entries: int, count: int) -> tuple[list[int], list[Part]]:
    """Drop table entries that no part reaches, and renumber the steps that walk through them."""
    reached = sorted({entry for part in parts for entry in _entries(part, count)})
    if len(reached) == entries:
        return reached, parts
    number = {entry: i for i, entry in enumerate(reached)}

    def renumber(steps: Steps) -> Steps:
        # A step of n entries now passes as many as are left of any n from the first on.
        reach = [reached[0] + step.table for step in steps]
        windows = [sum(entry < end for entry in reached) for end in reach]
        return tuple(replace(step, table=n) for step, n in zip(steps, windows, strict=True))

    return reached, [_rewalk(part, number[part.table], renumber) for part in parts]


def _rewalk(part: Part, table: int, change: Callable[[Steps], Steps]) -> Part:
    axes = (part.layer, part.block, part.token, part.head, part.dim)
    return Part(table, part.offset, *map(change, axes))


def _entries(part: Part, count: int) -> list[int]:
    """Table entries of one part; its unbounded axis has ``count`` positions."""
    walks = []
    for steps in map(part.axis, PART_AXES):
        for step in steps:
            extent = step.extent or count // prod(inner.extent or 1 for inner in steps)
            if step.table:
                walks.append([i * step.table for i in range(extent)])
    return [part.table + sum(combination) for combination in product(*walks)]


def _fold_origins(parts: list[Part], count: int) -> tuple[list[Part], dict[int, int]]:
    """Move byte offsets of the parts into the addresses where the parts share no entry."""
    by_entry: dict[int, list[int]] = {}
    for i, part in enumerate(parts):
        by_entry.setdefault(part.table, []).append(i)
    shifts: dict[int, int] = {}
    folded = list(parts)
    for members in by_entry.values():
        shift = parts[members[0]].offset
        for i in members:
            folded[i] = replace(parts[i], offset=parts[i].offset - shift)
        shifts.update(dict.fromkeys(_entries(parts[members[0]], count), shift))
    return folded, shifts


def _drift_apart(parts: Sequence[Part]) -> bool:
    """True where parts behind one address lie farther apart from layer to layer."""
    shared = len({part.table for part in parts}) < len(parts)
    return shared and len({part.layer for part in parts}) > 1


def _with_own_entries(parts: Sequence[Part]) -> list[Part]:
    """The parts, each with an entry of its own for every entry of the table before."""
    n = len(parts)

    def widened(steps: Steps) -> Steps:
        return tuple(replace(step, table=step.table * n) for step in steps)

    return [_rewalk(part, part.table * n + i, widened) for i, part in enumerate(parts)]


def _repeat(entries: tuple[Entry, ...], times: int) -> tuple[Entry, ...]:
    return tuple(entry for entry in entries for _ in range(times))


def _alignment(known: int, parts: Sequence[Part], fewer_layers: bool) -> int:
    """What the origins of such slices share at any layer, so that no layer has its own form."""
    bits = known
    for part in parts:
        bits |= part.offset
        for step in part.layer if fewer_layers else ():
            bits |= step.stride
    return min(16, bits & -bits)
