# SPDX-License-Identifier: Apache-2.0
"""One side of a copy and a whole copy as plain structures, and tensors built from a structure.

The strategies draw an ``Arrangement`` (how rows lie in memory) and an index; ``build`` makes
tensors of it between canaries. The seeds that are passed decide all randomness.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from portakv_conformance.judge.grammar import Group, read_layout
from portakv_conformance.judge.oracle import Expected, compare, expand, expected_copy
from portakv_conformance.judge.pattern import Guarded, guarded
from portakv_conformance.judge.rows import leaves

#: Keyword arguments, such as the fields of an `Arrangement` or declared extents.
Keywords: TypeAlias = "dict[str, Any]"


@dataclass
class Side:
    """One side of a copy: what a view is made from, its index, and the facts it was built to."""

    tensors: Any
    layout: str
    extents: Keywords
    ids: torch.Tensor | None  # this and the next two are those of an Index
    step: int
    offset: int
    guards: list[Guarded]
    layers: int
    heads: int
    widths: tuple[int, ...]  # bytes, for each kv
    block_size: int | None  # None for a chunk
    slots: int  # tokens that can be addressed
    opaque: bool = False
    arrangement: Arrangement | None = None  # two sides that have the same one share their tensors
    reinterpret: bool = False  # the other side is of another number type

    def at(self, count: int) -> np.ndarray:
        """Return the slot of each of ``count`` positions, int64; negative if it is skipped."""
        return expand(self.ids, self.step, self.offset, count)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print a short text: hypothesis would otherwise print every byte of every tensor."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        ids = None if self.ids is None else (self.ids.tolist(), str(self.ids.dtype)[6:])
        return (
            f"Side({self.layout!r}, {self.extents}, tensors={_sketch(self.tensors)}, "
            f"ids={ids}, step={self.step}, offset={self.offset})"
        )


@dataclass
class Case:
    """One copy: ``count`` positions from ``src`` to ``dst``."""

    src: Side
    dst: Side
    count: int

    def __post_init__(self) -> None:
        src, dst = (next(leaves(side.tensors)).dtype for side in (self.src, self.dst))
        self.src.reinterpret |= src != dst

    def expected(self) -> Expected:
        """Return the oracle's expectation of this copy; call it before copying."""
        src = self.src
        dst = self.dst
        return expected_copy(
            src.tensors,
            src.layout,
            src.extents,
            dst.tensors,
            dst.layout,
            dst.extents,
            src.at(self.count),
            dst.at(self.count),
        )

    def check(self, copy: Callable[[], object]) -> None:
        """Run ``copy`` (finished when it returns); AssertionError on the first wrong byte."""
        expected = self.expected()
        copy()
        verdict = compare(expected, self.dst.tensors, self.src.tensors)
        assert verdict is None, f"{verdict} The case was {self!r}."


def _sketch(tensors: Any) -> str:
    """Return containers as counts, a tensor as dtype, shape, strides and storage offset."""
    if isinstance(tensors, torch.Tensor):
        dtype = str(tensors.dtype)[6:]
        offset = tensors.storage_offset()
        return f"{dtype}{list(tensors.shape)} strides {list(tensors.stride())} offset {offset}"
    first = next(iter(tensors.values() if isinstance(tensors, dict) else tensors))
    return f"{type(tensors).__name__} of {len(tensors)}: {_sketch(first)}"


@dataclass
class Arrangement:
    """The arrangement of the tensors of one side in memory.

    All lengths are in elements of ``dtype``. ``place``: ``separate`` storages, ``strided`` in one
    storage at equal distances, ``scattered`` in one at irregular ones, with holes of multiples of
    ``grain``.
    """

    layout: str
    dtype: torch.dtype
    extents: Keywords  # of every axis: layer, kv, block, token, head; dim: one for each kv
    kinds: tuple[type, ...] = ()
    place: str = "separate"
    # The physical dimensions, outermost first: right groups; the last number: strided containers.
    order: tuple[int, ...] = ()
    pads: dict[int, int] = field(default_factory=dict)  # added to the stride of a physical place
    gap: int = 1  # the stride of the innermost
    grain: int = 1
    expand: int | None = None  # a dimension that has the stride ``every``
    every: int = 0  # or 1 for rows that lie one element apart and so share the others
    split_end: bool = False
    offset: int = 0
    seed: int = 0
    storage: int = 0
    poison: bool = False
    device: str = "cpu"


def side_of(
    to: Arrangement,
    ids: torch.Tensor | None = None,
    step: int = 1,
    offset: int = 0,
    declared: Keywords | None = None,
) -> Side:
    """Build one side; ``declared`` are its view's extents, by default all that can be declared."""
    axes = read_layout(to.layout)
    extents = to.extents
    opaque = axes.written("page")
    paged = axes.written("block")
    dims = tuple(extents["page" if opaque else "dim"])
    layers = extents["layer"]
    heads = extents["head"]
    size = extents["token"]
    if declared is None:
        declared = {"layers": layers, "kv": len(dims), "heads": heads}
        declared |= {} if opaque else {"dim": dims}
        declared |= {"block_size": size} if paged else {}
    tensors, guards = build(to)
    return Side(
        tensors,
        to.layout,
        declared,
        ids,
        step,
        offset,
        guards,
        layers,
        heads,
        tuple(n * to.dtype.itemsize for n in dims),
        size if paged else None,
        size * (extents["block"] if paged else 1),
        opaque,
        to,
    )


def _factor_size(to: Arrangement, group: Group, place: int, kv: int) -> int:
    factor = group[place]
    extent = to.extents[factor.axis]
    whole: int = extent[kv] if factor.axis in ("dim", "page") else extent
    return {"": whole, "/": whole // max(factor.n, 1), "%": factor.n}[factor.part]


def _group_size(to: Arrangement, group: Group, kv: int) -> int:
    """Return the length of a group, with unequal parts one after another."""
    axes = [str(factor) for factor in group]
    size = math.prod(_factor_size(to, group, place, kv) for place in range(len(group)))
    if {"kv", "dim"} <= set(axes) and axes.index("kv") < axes.index("dim"):
        widths: tuple[int, ...] = to.extents["dim"]
        return size // (len(widths) * widths[kv]) * sum(widths)
    return size


def _strides(to: Arrangement, sizes: list[int]) -> tuple[list[int], int]:
    """Return the strides of physical dimensions, and the number of elements that they span.

    The order, pads and gap of the arrangement decide them.
    """
    strides = [0] * len(sizes)
    reach = to.gap
    for place in reversed(range(len(sizes))):
        dimension = to.order[place]
        strides[dimension] = reach
        reach = reach * sizes[dimension] + to.pads.get(place, 0)
    return strides, reach


def build(to: Arrangement) -> tuple[Any, list[Guarded]]:
    """Return tensors in their containers, and the guarded storages under them."""
    axes = read_layout(to.layout)
    levels = [_group_size(to, group, 0) for group in axes.left]
    outer = [(f.axis, _factor_size(to, g, i, 0)) for g in axes.left for i, f in enumerate(g)]
    names = [axis for axis, _ in outer]
    sizes = [size for _, size in outer]
    kv_of = [0] * math.prod(sizes)  # the kv that each tensor of the containers belongs to
    if "kv" in names:
        kv_of = np.indices(sizes)[names.index("kv")].ravel().tolist()
    flat: dict[int, torch.Tensor] = {}
    guards: list[Guarded] = []
    # Only the tensors of one kv are sure to have one shape, so each kv is placed for itself.
    for kv in sorted(set(kv_of)):
        own = [number for number, each in enumerate(kv_of) if each == kv]
        flat.update(zip(own, _place(to, axes.right, len(own), kv, guards), strict=True))
    return _contain([flat[n] for n in range(len(flat))], levels, to.kinds), guards


def _place(
    to: Arrangement, right: tuple[Group, ...], count: int, kv: int, guards: list[Guarded]
) -> list[torch.Tensor]:
    """Return ``count`` tensors of one shape, in as many storages as ``to.place`` says."""
    sizes = [_group_size(to, group, kv) for group in right]
    separate = to.place == "separate"
    strided = to.place == "strided"
    strides, span = _strides(to, [*sizes, count] if strided else sizes)
    between = 0 if separate else strides.pop() if strided else span
    if to.expand is not None:
        strides[to.expand] = to.every
    size, stride = _trailing(to, right, sizes, strides, kv)
    starts = [to.offset + number * between for number in range(count)]
    elements = to.offset + span
    if to.place == "scattered":
        rng = random.Random(f"{to.seed} {kv}")  # as one list of all tensors it has no order either
        holes = [rng.randrange(9) * to.grain for _ in range(count)]
        starts = [start + sum(holes[: n + 1]) for n, start in enumerate(starts)]
        rng.shuffle(starts)
        elements = max(starts) + span
    how: Keywords = {"seed": to.seed, "poison": to.poison, "device": to.device}
    first = to.storage + len(guards)
    nbytes = elements * to.dtype.itemsize
    made = [guarded(nbytes, storage=first + n, **how) for n in range(count if separate else 1)]
    guards.extend(made)
    return [
        made[n % len(made)].tensor(to.dtype, size, stride, start) for n, start in enumerate(starts)
    ]


def _trailing(
    to: Arrangement, right: tuple[Group, ...], sizes: list[int], strides: list[int], kv: int
) -> tuple[list[int], list[int]]:
    """Show the last group as one dimension for each of its factors, when that was drawn."""
    if not to.split_end:
        return sizes, strides
    inner = [_factor_size(to, right[-1], place, kv) for place in range(len(right[-1]))]
    if len(inner) == 1:  # a page has no factors, so any two numbers do
        least = next((n for n in range(2, inner[0] + 1) if inner[0] % n == 0), 1)
        inner = [inner[0] // least, least]
    steps = [strides[-1] * math.prod(inner[place + 1 :]) for place in range(len(inner))]
    return sizes[:-1] + inner, strides[:-1] + steps


def _contain(flat: list[Any], levels: list[int], kinds: tuple[type, ...]) -> Any:
    for size, kind in zip(reversed(levels), reversed(kinds), strict=True):
        groups = [flat[n : n + size] for n in range(0, len(flat), size)]
        flat = [
            {f"model.{n}": item for n, item in enumerate(group)} if kind is dict else kind(group)
            for group in groups
        ]
    return flat[0]
