# SPDX-License-Identifier: Apache-2.0
"""Draw forms for the core: whatever layouts can describe, and steps that no layout has.

A form is made from random factors of its axes in a random order of memory, with gaps, tables and
kv of their own. The forms of one `Rows` hold the same bytes, so a plan between them is possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from portakv.view.form import PART_AXES, Form, KVRows, Step, Steps

BLOCK_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
WIDTHS = (1, 2, 3, 6, 12, 16, 33, 64, 96, 128)
#: Blocks, or tokens of a chunk, that a form without other bounds has room for.
ROOM = 64


@dataclass(frozen=True)
class Rows:
    """The rows that the forms of both sides hold.

    Attributes:
        widths: bytes for each kv.
        page: tokens of an opaque page, 0 for rows that are no pages.
    """

    layers: int
    heads: int
    widths: tuple[int, ...]
    page: int


@dataclass(frozen=True)
class Place:
    """One factor of an axis in memory; ``extent`` 0 is unbounded."""

    axis: str
    extent: int


def draw_rows(random: Random) -> Rows:
    """Draw rows; one of ten are opaque pages."""
    kv = random.choice((1, 2, 2, 2, 3))
    width = random.choice(WIDTHS)
    widths = (width,) * kv
    if random.random() < 0.2:
        widths = tuple(random.choice((width, 2 * width, 16, 6)) for _ in range(kv))
    page = random.choice((1, 2, 4, 8, 16)) if random.random() < 0.1 else 0
    layers = random.choice((1, 1, 2, 3, 4, 6))
    return Rows(layers, random.choice((1, 1, 2, 4, 6)), widths, page)


def draw_form(random: Random, rows: Rows) -> Form:
    """Draw a form of these rows."""
    chunk = not rows.page and random.random() < 0.3
    block_size = rows.page or (0 if chunk else random.choice(BLOCK_SIZES))
    kv = len(rows.widths)
    tokens = 1 if rows.page or chunk else block_size
    tables = random.choice((0.0, 0.0, 0.7, 1.0))
    base = random.choice((0, 0, 0, 16, 100, 3))

    parts = []
    if len(set(rows.widths)) == 1 and random.random() < 0.85:
        # All kv have the same steps, and usually equal distances.
        places = _draw_places(random, rows, rows.widths[0], tokens, chunk, kv)
        axes, step = _axes(random, places, tables)
        bend = random.choice((0, 0, 0, 8))
        for k in range(kv):
            offset = base + k * step.stride + bend * k * k
            parts.append(KVRows(k * step.table, offset, **axes))
    else:
        for k, width in enumerate(rows.widths):
            places = _draw_places(random, rows, width, tokens, chunk, 1)
            axes, _ = _axes(random, places, tables)
            parts.append(KVRows(k * random.choice((0, 1, 7)), base, **axes))
            base += random.choice((0, 1 << 16))
    alignment = random.choice((16, 16, 16, 8, 4, 2, 1))
    opaque = rows.page > 0
    return Form(
        tuple(parts), rows.layers, rows.heads, rows.widths, block_size, opaque, alignment, "device"
    )


def draw_step(random: Random, form: Form) -> int:
    """Draw the tokens for each id of a side: usually those of its blocks."""
    if random.random() < 0.35:
        return 0
    if form.block_size and random.random() < 0.6:
        return form.block_size
    return random.choice((1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 96))


def _draw_places(
    random: Random, rows: Rows, width: int, tokens: int, chunk: bool, kv: int
) -> list[Place]:
    """Draw the factors of all axes in their order in memory, outermost first."""
    extents = {"layer": rows.layers, "token": tokens, "head": rows.heads, "dim": width}
    places = [
        Place(axis, factor)
        for axis, extent in extents.items()
        for factor in _draw_factors(random, extent)
    ]
    places.append(Place("token" if chunk else "block", 0))
    if chunk:
        places = [place for place in places if place.axis != "token" or not place.extent]
    if kv > 1:
        places.append(Place("kv", kv))
    if random.random() < 0.4:
        random.shuffle(places)
    else:
        # As in a layout: an axis lies together, and the bytes of a row are the innermost.
        rank = {axis: random.random() for axis in ("kv", *PART_AXES)}
        rank["dim"] = 2
        places.sort(key=lambda place: rank[place.axis])
    return places


def _draw_factors(random: Random, extent: int) -> list[int]:
    factors: list[int] = []
    while extent > 1 and len(factors) < 2 and random.random() < 0.35:
        factor = random.choice([n for n in range(2, extent + 1) if extent % n == 0])
        factors.append(factor)
        extent //= factor
    # A last factor of 1 stands for a dimension that no layout leaves in its steps.
    if extent > 1 or random.random() < 0.1:
        factors.append(extent)
    return factors


def _axes(random: Random, places: Sequence[Place], tables: float) -> tuple[dict[str, Steps], Step]:
    """Return the steps of each axis, and the step from one kv to the next.

    ``tables``: the probability that containers hold axes.
    """
    tabled: set[str] = set()
    if random.random() < tables:
        tabled = {axis for axis in ("layer", "kv", "block") if random.random() < 0.6}
        tabled |= {axis for axis in ("head", "token") if random.random() < 0.07}

    steps: dict[str, list[Step]] = {axis: [] for axis in ("kv", *PART_AXES)}
    stride = 1
    entries = 1
    for place in reversed(places):
        extent = place.extent or ROOM
        if place.axis in tabled:
            step = Step(place.extent, entries, 0)
            entries *= extent
        else:
            if random.random() < 0.07:
                stride += random.choice((1, 2, 4, 8, 16, 3))
            step = Step(place.extent, 0, stride)
            stride *= extent
        steps[place.axis].insert(0, step)

    kv = steps.pop("kv")
    merged = random.random() < 0.9
    axes = {axis: _merged(each) if merged else tuple(each) for axis, each in steps.items()}
    return axes, kv[0] if kv else Step(1, 0, 0)


def _merged(steps: Sequence[Step]) -> Steps:
    """Join neighbours that form one step, and drop steps of extent 1."""
    merged: list[Step] = []
    for step in steps:
        walk = step.extent * step.table, step.extent * step.stride
        if merged and (merged[-1].table, merged[-1].stride) == walk:
            merged[-1] = replace(step, extent=merged[-1].extent * step.extent)
        elif step.extent != 1:
            merged.append(step)
    return tuple(merged)
