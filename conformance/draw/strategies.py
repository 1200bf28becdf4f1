# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for whole copies: they draw structure, never bytes.

``cases`` draws token-exact copies between two caches or chunks, in layouts of a wide family and
memory of many kinds, ``migrations`` copies within one cache, ``page_cases`` whole opaque blocks.
Everything shrinks towards plain layouts, no padding, no holes, ids in order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations
from typing import Any

import torch
from hypothesis import strategies as st

from portakv_conformance.draw.arrangement import Arrangement, Case, Keywords, Side, side_of
from portakv_conformance.judge.grammar import read_layout

Draw = Any  # the callable that hypothesis hands to a composite strategy
_KINDS = (list, tuple, dict)
DTYPES = (
    torch.float16,
    torch.uint8,
    torch.int8,
    torch.bfloat16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.int64,
)
_FAR = 1 << 30  # a slot that no test cache has; stands between ids that are not contiguous
_PAGES = (
    "layer | block page",
    "block page",
    "block layer page",
    "layer block page",
    "block | layer page",
    "block | page",
    "layer block | page",
)


@dataclass(frozen=True)
class SharedRows:
    """The shape of rows that both sides of a copy share."""

    layers: int
    heads: int
    widths: tuple[int, ...]  # bytes, for each kv
    split: str = ""  # the axis that both may write as axis/N with axis%N


def rarely(draw: Draw) -> bool:
    """Return True once in eight draws."""
    return bool(draw(st.integers(0, 7)) == 7)


def pick(draw: Draw, among: Sequence[Any]) -> Any:
    """Draw one of a sequence, shrinking to its first."""
    return among[draw(st.integers(0, len(among) - 1))]


def _order(draw: Draw, n: int) -> list[int]:
    """Return a permutation from one drawn number; 0 is the identity."""
    code = draw(st.integers(0, math.factorial(n) - 1))
    left = list(range(n))
    order = []
    for place in range(n):
        digit, code = divmod(code, math.factorial(n - 1 - place))
        order.append(left.pop(digit))
    return order


@lru_cache(maxsize=64)
def _lefts(axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return every choice of one to three containers."""
    return [left for n in range(1, 4) for left in permutations(axes, n)]


def _draw_layout(
    draw: Draw, rows: SharedRows, paged: bool, n: int, containers: tuple[str, ...]
) -> str:
    """Draw a layout string; ``n`` is the N of the factored axis, 0 for none."""
    extents = {"layer": rows.layers, "kv": len(rows.widths), "head": rows.heads}
    gone = {axis for axis, n in extents.items() if n == 1 and draw(st.booleans())}
    gone |= set() if paged else {"block"}
    axes = [a for a in ("layer", "kv", "block", "token", "head", "dim") if a not in gone]
    allowed = tuple(a for a in axes if a in containers and not (n and a == rows.split))
    left = list(pick(draw, _lefts(allowed))) if allowed and draw(st.booleans()) else []
    right = [a for a in axes if a not in left]
    right = [right[place] for place in _order(draw, len(right))]
    merge = draw(st.integers(0, 63)) & draw(st.integers(0, 63))
    unequal = len(set(rows.widths)) > 1 and "kv" in right
    if n and rows.split in right and not unequal:
        right[right.index(rows.split)] = f"{rows.split}/{n}"
        right.insert(draw(st.integers(0, len(right))), f"{rows.split}%{n}")
    if unequal:  # kv stands left of dim, in one group with what lies between
        low, high = sorted((right.index("kv"), right.index("dim")))
        right[low] = "kv"
        right[high] = "dim"
        merge |= sum(1 << place for place in range(low, high))
    groups = _grouped(right, merge)
    if rarely(draw):
        groups.insert(draw(st.integers(0, len(groups))), "1")
    if not left:
        return " ".join(groups)
    outer = _grouped(left, draw(st.integers(0, 3)) if rarely(draw) else 0)
    return f"{' '.join(outer)} | {' '.join(groups)}"


def _grouped(factors: list[str], merge: int) -> list[str]:
    """Return groups of factors: bit n of ``merge`` puts factors n and n + 1 into one group."""
    groups: list[list[str]] = []
    for place, factor in enumerate(factors):
        if place == 0 or not merge >> (place - 1) & 1:
            groups.append([])
        groups[-1].append(factor)
    return [group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups]


def _declare(draw: Draw, layout: str, extents: Keywords, paged: bool) -> Keywords:
    """Return the extents that a caller declares: all that are needed, and others too."""
    dims = extents["dim"]
    one_number = len(set(dims)) == 1 and draw(st.booleans())
    every: dict[str, tuple[str, Any]] = {
        "layers": ("layer", extents["layer"]), "kv": ("kv", len(dims)),
        "block_size": ("token", extents["token"]), "heads": ("head", extents["head"]),
        "dim": ("dim", dims[0] if one_number else tuple(dims)),
    }  # fmt: skip
    if not paged:
        del every["block_size"]
    spare = draw(st.integers(0, 31))
    axes = read_layout(layout)
    groups = [list(map(str, group)) for group in axes.left + axes.right]
    solved = _solvable(groups, paged) if draw(st.booleans()) else set()
    return {
        keyword: extent
        for place, (keyword, (axis, extent)) in enumerate(every.items())
        if spare >> place & 1 or _must_declare(axis, groups, dims, solved)
    }


def _solvable(groups: list[list[str]], paged: bool) -> set[str]:
    """Return the one axis of each shared dimension that need not be declared."""
    counted = {"block"} if paged else {"token"}  # no extent of a view declares these
    shared = [g for g in groups if len(g) > 1 and not counted & {f.split("/")[0] for f in g}]
    unknown = [[f for f in g if f != "kv" and "%" not in f] for g in shared]
    return {axes[-1].split("/")[0] for axes in unknown if axes}


def _must_declare(
    axis: str, groups: list[list[str]], dims: tuple[int, ...], solved: set[str]
) -> bool:
    """Return True if the tensors, with a written kv taken as 2, do not determine the extent of an
    axis."""
    group = next((g for g in groups if axis in g or any(f.startswith(f"{axis}/") for f in g)), [])
    if axis == "kv":
        return bool(group) and len(dims) != 2
    if axis == "dim" and len(set(dims)) > 1:
        return True
    return axis not in solved and len([f for f in group if f != "kv" and "%" not in f]) > 1


def _draw_order(draw: Draw, place: str, n: int) -> list[int]:
    """Draw the order of ``n`` physical dimensions."""
    # In its plainest form a strided place is one tensor after another.
    order = [n - 1, *range(n - 1)] if place == "strided" else list(range(n))
    if draw(st.booleans()):
        order = [order[p] for p in _order(draw, n)]
    return order


def _arranged(
    draw: Draw,
    layout: str,
    dtype: torch.dtype,
    extents: Keywords,
    source: bool,
    options: Options,
) -> Arrangement:
    """Draw the memory of a layout's tensors: order, padding, offsets, allocations."""
    axes = read_layout(layout)
    groups = [list(map(str, group)) for group in axes.right]
    levels = len(axes.left)
    place = pick(draw, ("separate", "strided", "scattered")) if levels else "separate"
    n = len(groups) + (place == "strided")
    order = _draw_order(draw, place, n)
    pads = {}
    if draw(st.booleans()):
        pads[draw(st.integers(0, n - 1))] = pick(draw, (1, 2, 3, 4, 8, 16, 5))
    last = groups[-1]
    whole = len(set(extents.get("dim", ()))) <= 1 or "kv" not in last
    splits = (len(last) > 1 and whole) or last == ["page"]
    split_end = splits and draw(st.booleans())
    expandable = len(groups) - (1 if split_end else 0)
    expand = source and expandable > 0 and rarely(draw)
    kinds = tuple(pick(draw, _KINDS) for _ in range(levels))
    arrangement = Arrangement(
        layout,
        dtype,
        extents,
        kinds,
        place,
        tuple(order),
        pads,
        gap=2 if rarely(draw) else 1,
        expand=draw(st.integers(0, expandable - 1)) if expand else None,
        split_end=split_end,
        offset=pick(draw, (0, 1, 2, 3, 4, 8, 16, 9)),
        seed=draw(st.integers(0, 3)),
        storage=0 if source else 1000,
        poison=not source,
        device=options.device,
    )
    # What the options leave out is drawn all the same, so that the rest is as without them.
    if not options.expanded:
        arrangement = replace(arrangement, expand=None)
    if "page" in extents and not options.loose_pages:
        page = len(groups) - 1
        order = [*(n for n in arrangement.order if n != page), page]
        expanded = None if arrangement.expand == page else arrangement.expand
        arrangement = replace(arrangement, order=tuple(order), gap=1, expand=expanded)
    return arrangement


@dataclass(frozen=True)
class Options:
    """The options of ``cases``; every field is a keyword of it."""

    containers: tuple[str, ...] = ("layer", "kv", "block", "head")  # what may stand left of the bar
    factored: bool = True  # axis/N with axis%N
    holes: bool = True  # negative ids
    ragged: bool = True  # counts and offsets that are not a multiple of any block
    expanded: bool = True  # a source dimension of stride 0
    loose_pages: bool = True  # opaque pages whose bytes are not contiguous
    device: str = "cpu"
    ids_on: str = "cpu"


def _draw_rows(draw: Draw, options: Options) -> tuple[SharedRows, list[torch.dtype]]:
    """Draw extents and widths, and for each side a dtype whose size divides the widths."""
    layers = draw(st.integers(1, 3))
    heads = draw(st.integers(1, 3))
    kv = pick(draw, (2, 1, 3))
    first = pick(draw, DTYPES)
    dims = [draw(st.integers(1, 9))] * kv
    if kv > 1 and draw(st.integers(0, 3)) == 3:
        dims = dims[:1] + [draw(st.integers(1, 9)) for _ in dims[1:]]
    widths = tuple(first.itemsize * n for n in dims)
    second = pick(draw, [t for t in DTYPES if all(w % t.itemsize == 0 for w in widths)])
    split = pick(draw, ("dim", "head", "token", "layer")) if options.factored else ""
    return SharedRows(layers, heads, widths, split if rarely(draw) else ""), [first, second]


def _draw_splits(draw: Draw, rows: SharedRows, dtypes: list[torch.dtype]) -> list[int]:
    """Draw the N of the factored axis for each side, 0 for none; one N divides the other."""
    if not rows.split:
        return [0, 0]
    bytes_of = [d.itemsize if rows.split == "dim" else 1 for d in dtypes]
    length = {"layer": rows.layers, "head": rows.heads, "token": 4, "dim": math.gcd(*rows.widths)}
    whole = length[rows.split]
    # Elements may lie apart, so a cut within one of either side would have no common refinement.
    grain = max(d.itemsize for d in dtypes) if rows.split == "dim" else 1
    chain = [n for n in (2, 4, 3, 6, 8, 16) if whole % n == n % grain == 0] or [grain]
    coarse = pick(draw, chain)
    fine = pick(draw, [n for n in range(grain, coarse + 1) if coarse % n == n % grain == 0])
    cuts = pick(draw, ((coarse, 0), (0, coarse), (coarse, fine), (fine, coarse)))
    return [n // b if n % b == 0 and n > b else 0 for n, b in zip(cuts, bytes_of, strict=True)]


def _draw_side(
    draw: Draw, rows: SharedRows, dtype: torch.dtype, n: int, source: bool, options: Options
) -> Side:
    """Draw one side without its ids: a paged cache or a chunk, its layout and its memory.

    The side has the step of its index, 0 if it will have none.
    """
    paged = draw(st.booleans())
    grain = n if n and rows.split == "token" else 1
    size = pick(draw, (4, 2, 8, 1, 3, 5, 6, 7) if paged else (4, 1, 2, 3, *range(5, 25)))
    size = -(-size // grain) * grain
    blocks = pick(draw, (2, 3, 4, 5, 1)) if paged else 1
    extents = {
        "layer": rows.layers,
        "head": rows.heads,
        "token": size,
        "block": blocks,
        "kv": len(rows.widths),
        "dim": tuple(w // dtype.itemsize for w in rows.widths),
    }
    layout = _draw_layout(draw, rows, paged, n, options.containers)
    declared = _declare(draw, layout, extents, paged)
    arrangement = _arranged(draw, layout, dtype, extents, source, options)
    usual = [1, size, 2 * size, *(s for s in range(2, size) if size % s == 0), 3]
    steps = [s for s in (usual if paged else [0, 1, 2, 4]) if s <= size * blocks]
    return side_of(arrangement, step=pick(draw, [*steps, 0] if paged else steps), declared=declared)


def _draw_count(
    draw: Draw, sides: list[Side], options: Options, unit: int = 1
) -> tuple[list[int], int]:
    """Draw the offsets of both sides and the count of positions."""
    if not options.ragged and unit == 1:
        unit = math.gcd(*(n or 0 for s in sides for n in (s.step, s.block_size))) or 1
    most = [side.slots // max(side.step, 1) * max(side.step, 1) for side in sides]
    most[0] = 40 if sides[0].step else most[0]  # slots of a source may occur again
    offsets = [0, 0]
    if draw(st.booleans()):
        offsets = [draw(st.integers(0, min((m - 1) // unit, 5))) * unit for m in most]
    limit = min(m - o for m, o in zip(most, offsets, strict=True)) // unit
    if rarely(draw):
        return offsets, 0
    return offsets, (
        limit if draw(st.booleans()) else draw(st.integers(min(limit, 1), limit))
    ) * unit


def _with_ids(
    draw: Draw, side: Side, offset: int, count: int, unique: bool, options: Options
) -> Side:
    """Return a side with ids: in order, reversed or shuffled, perhaps with holes and spare ids."""
    if not side.step:
        return replace(side, step=1, offset=offset)
    units = side.slots // side.step
    needed = -(-(offset + count) // side.step)
    how = draw(st.integers(0, 2))
    rng = random.Random(draw(st.integers(0, 255)))
    if unique:
        needed = min(needed + draw(st.integers(0, 2)), units)
        ids = rng.sample(range(units), needed) if how == 2 else list(range(needed))
    else:
        ids = [rng.randrange(units) if how == 2 else n % units for n in range(needed)]
    if how == 1:
        ids.reverse()
    if options.holes and draw(st.booleans()):
        ids = [rng.choice((-1, -2, -100)) if rng.random() < 0.3 else n for n in ids]
    return replace(side, ids=_as_tensor(draw, ids, options.ids_on), offset=offset)


def _as_tensor(draw: Draw, ids: list[int], device: str) -> torch.Tensor:
    """Return ids as int64 or int32, contiguous or every other element of a longer tensor."""
    dtype = pick(draw, (torch.int64, torch.int32))
    if not rarely(draw):
        return torch.tensor(ids, dtype=dtype, device=device)
    wide = torch.full((2 * len(ids) + 3,), _FAR, dtype=dtype, device=device)
    between = wide[3::2]
    between.copy_(torch.tensor(ids, dtype=dtype))
    return between


@st.composite
def cases(draw: Draw, /, **options: Any) -> Case:
    """Draw a token-exact copy between two sides; keywords are those of ``Options``.

    No slot of the destination is drawn twice.
    """
    chosen = Options(**options)
    rows, dtypes = _draw_rows(draw, chosen)
    splits = _draw_splits(draw, rows, dtypes)
    sides = [_draw_side(draw, rows, dtypes[n], splits[n], n == 0, chosen) for n in range(2)]
    (first, second), count = _draw_count(draw, sides, chosen)
    src = _with_ids(draw, sides[0], first, count, False, chosen)
    return Case(src, _with_ids(draw, sides[1], second, count, True, chosen), count)


@st.composite
def migrations(draw: Draw, /, **options: Any) -> Case:
    """Draw a copy within one cache, between rows that do not meet; ids on both sides."""
    chosen = Options(**options)
    rows, dtypes = _draw_rows(draw, chosen)
    split = _draw_splits(draw, rows, dtypes)[0]
    side = _draw_side(draw, rows, dtypes[0], split, False, chosen)
    step = side.step if 0 < 2 * side.step <= side.slots else 1
    units = list(range(side.slots // step))
    random.Random(draw(st.integers(0, 255))).shuffle(units)
    moved = len(units) // 2 if draw(st.booleans()) else draw(st.integers(0, len(units) // 2))
    sides = []
    for half in (units[:moved], units[moved : 2 * moved]):
        by_slot = draw(st.booleans())
        slots = [unit * step + n for unit in half for n in range(step)]
        ids = _as_tensor(draw, slots if by_slot else half, chosen.ids_on)
        sides.append(replace(side, ids=ids, step=1 if by_slot else step))
    return Case(sides[0], sides[1], moved * step)


@st.composite
def page_cases(draw: Draw, /, **options: Any) -> Case:
    """Draw a copy of whole opaque blocks: equal block sizes, and steps of one block or no ids."""
    chosen = Options(**options)
    layers = draw(st.integers(1, 3))
    size = draw(st.integers(1, 8))
    first = pick(draw, DTYPES)
    width = first.itemsize * draw(st.integers(1, 40))
    second = pick(draw, [t for t in DTYPES if width % t.itemsize == 0])
    sides = []
    for n, dtype in enumerate((first, second)):
        layout = pick(draw, [p for p in _PAGES if layers == 1 or "layer" in p])
        blocks = draw(st.integers(1, 5))
        extents = {"layer": layers, "head": 1, "token": size, "block": blocks, "kv": 1}
        extents["page"] = (width // dtype.itemsize,)
        arrangement = _arranged(draw, layout, dtype, extents, n == 0, chosen)
        step = pick(draw, (size, 0))
        sides.append(side_of(arrangement, step=step, declared={"block_size": size}))
    (before, after), count = _draw_count(draw, sides, chosen, unit=size)
    src = _with_ids(draw, sides[0], before, count, False, chosen)
    return Case(src, _with_ids(draw, sides[1], after, count, True, chosen), count)


def all_cases(**options: object) -> st.SearchStrategy[Case]:
    """Return the strategy of ``cases``, ``migrations`` and ``page_cases`` together."""
    return st.one_of(cases(**options), migrations(**options), page_cases(**options))
