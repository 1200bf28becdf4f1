# SPDX-License-Identifier: Apache-2.0
"""Strategies, first half: layout strings of a wide family and how their tensors lie in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import torch
from hypothesis import strategies as st

from portakv_conformance.draw.arrangement import Arrangement
from portakv_conformance.judge.grammar import read_layout

Draw = Any  # the callable that hypothesis hands to a composite strategy
_KINDS = (list, tuple, dict)


@dataclass(frozen=True)
class SharedRows:
    """What both sides of a copy have in common."""

    layers: int
    heads: int
    widths: tuple[int, ...]  # bytes, for each kv
    split: str = ""  # the axis that both may write as axis/N with axis%N


def rarely(draw: Draw) -> bool:
    """True once in eight draws."""
    return bool(draw(st.integers(0, 7)) == 7)


def pick(draw: Draw, among: Sequence[Any]) -> Any:
    """One of a sequence, shrinking to its first."""
    return among[draw(st.integers(0, len(among) - 1))]


def _order(draw: Draw, n: int) -> list[int]:
    """A permutation from one drawn number, 0 being the identity."""
    code, left, order = draw(st.integers(0, math.factorial(n) - 1)), list(range(n)), []
    for place in range(n):
        digit, code = divmod(code, math.factorial(n - 1 - place))
        order.append(left.pop(digit))
    return order


@lru_cache(maxsize=64)
def _lefts(axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Every choice of one to three containers."""
    return [left for n in range(1, 4) for left in permutations(axes, n)]


def draw_layout(
    draw: Draw, rows: SharedRows, paged: bool, n: int, containers: tuple[str, ...]
) -> str:
    """A layout string; ``n`` is the N of the factored axis, 0 for none."""
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
        right[low], right[high] = "kv", "dim"
        merge |= sum(1 << place for place in range(low, high))
    groups = _grouped(right, merge)
    if rarely(draw):
        groups.insert(draw(st.integers(0, len(groups))), "1")
    if not left:
        return " ".join(groups)
    bars = _grouped(left, draw(st.integers(0, 3)) if rarely(draw) else 0)
    return f"{' '.join(bars)} | {' '.join(groups)}"


def _grouped(factors: list[str], merge: int) -> list[str]:
    """Bit n of ``merge`` puts factors n and n + 1 into one group."""
    groups: list[list[str]] = []
    for place, factor in enumerate(factors):
        if place == 0 or not merge >> (place - 1) & 1:
            groups.append([])
        groups[-1].append(factor)
    return [group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups]


def declare(draw: Draw, layout: str, extents: dict[str, Any], paged: bool) -> dict[str, Any]:
    """The extents a caller declares: all that are needed, and some that are not."""
    dims = extents["dim"]
    one_number = len(set(dims)) == 1 and draw(st.booleans())
    every: dict[str, tuple[str, Any]] = {
        "layers": ("layer", extents["layer"]), "kv": ("kv", len(dims)),
        "block_size": ("token", extents["token"]), "heads": ("head", extents["head"]),
        "dim": ("dim", dims[0] if one_number else tuple(dims)),
    }  # fmt: skip
    if not paged:
        del every["block_size"]
    spare, axes = draw(st.integers(0, 31)), read_layout(layout)
    groups = [list(map(str, group)) for group in axes.left + axes.right]
    solved = _solvable(groups, paged) if draw(st.booleans()) else set()
    return {
        keyword: extent
        for place, (keyword, (axis, extent)) in enumerate(every.items())
        if spare >> place & 1 or _must_declare(axis, groups, dims, solved)
    }


def _solvable(groups: list[list[str]], paged: bool) -> set[str]:
    """The one axis of each shared dimension that need not be declared."""
    counted = {"block"} if paged else {"token"}  # no extent of a view declares these
    shared = [g for g in groups if len(g) > 1 and not counted & {f.split("/")[0] for f in g}]
    unknown = [[f for f in g if f != "kv" and "%" not in f] for g in shared]
    return {axes[-1].split("/")[0] for axes in unknown if axes}


def _must_declare(
    axis: str, groups: list[list[str]], dims: tuple[int, ...], solved: set[str]
) -> bool:
    """Whether the tensors, with a written kv taken as 2, would not tell the extent of an axis."""
    home = next((g for g in groups if axis in g or any(f.startswith(f"{axis}/") for f in g)), [])
    if axis == "kv":
        return bool(home) and len(dims) != 2
    if axis == "dim" and len(set(dims)) > 1:
        return True
    return axis not in solved and len([f for f in home if f != "kv" and "%" not in f]) > 1


def arrange(
    draw: Draw, layout: str, dtype: torch.dtype, extents: dict[str, Any], source: bool, device: str
) -> Arrangement:
    """How the tensors of a layout lie in memory: order, padding, offsets, allocations."""
    axes = read_layout(layout)
    groups, levels = [list(map(str, group)) for group in axes.right], len(axes.left)
    place = pick(draw, ("separate", "strided", "scattered")) if levels else "separate"
    n = len(groups) + (place == "strided")
    # In its plainest form a strided place is one tensor after another.
    order = [n - 1, *range(n - 1)] if place == "strided" else list(range(n))
    if draw(st.booleans()):
        order = [order[p] for p in _order(draw, n)]
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
    return Arrangement(
        layout, dtype, extents, kinds, place, tuple(order), pads, gap=2 if rarely(draw) else 1,
        expand=draw(st.integers(0, expandable - 1)) if expand else None, split_end=split_end,
        offset=pick(draw, (0, 1, 2, 3, 4, 8, 16, 9)), seed=draw(st.integers(0, 3)),
        storage=0 if source else 1000, poison=not source, device=device,
    )  # fmt: skip
