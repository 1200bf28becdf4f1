# SPDX-License-Identifier: Apache-2.0
"""Loop nests over two sides together: common refinement of axes, merging, vector width."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import Unsupported
from portakv.view.form import Step, Steps
from portakv.view.form import widest_vector as widest_vector

_PLANES = frozenset({"layer", "kv"})
Numbers = TypeVar("Numbers", torch.Tensor, npt.NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class Loop:
    """``extent`` steps that both sides take together, through tables and through memory.

    Attributes:
        axes: the axes that were merged into the loop, outermost first.
    """

    axes: tuple[str, ...]
    extent: int
    src_table: int
    src_stride: int
    dst_table: int
    dst_stride: int

    @property
    def name(self) -> str:
        """Return the axes as text."""
        return " ".join(self.axes)

    @property
    def tabled(self) -> bool:
        """Return True if a side looks its address up for each step."""
        return bool(self.src_table or self.dst_table)

    @property
    def over_planes(self) -> bool:
        """Return True if each step leads to another plane, and so never inside a token's row."""
        return _PLANES.issuperset(self.axes)

    def __str__(self) -> str:
        src = _walk(self.src_table, self.src_stride)
        dst = _walk(self.dst_table, self.dst_stride)
        return f"for {self.name} in range({self.extent}): src += {src}; dst += {dst}"


@dataclass(frozen=True, slots=True)
class Side:
    """The location of the units of one side.

    Attributes:
        table, offset: the origin: an entry of the address table, and bytes after its address.
        units: the steps that the number of a unit walks through, outermost (unbounded) first: ``n %
            extent`` from the innermost on, as in positional notation.
    """

    table: int
    offset: int
    units: Steps

    @property
    def tabled(self) -> bool:
        """Return True if a unit's number selects the table entry of its address."""
        return any(step.table for step in self.units)

    def text(self, number: str) -> str:
        """Format the location of the unit of a number for a reader."""
        walks: list[str] = []
        below = 1
        for at in reversed(self.units):
            place = number if below == 1 else f"{number} // {below}"
            place = f"{place} % {at.extent}" if at.extent else place
            walk = f"table[{place} * {at.table}]" if at.table else f"{place} * {at.stride} B"
            walks.insert(0, walk)
            below *= at.extent or 1
        base = f"table[{self.table}]" + (f" + {self.offset} B" if self.offset else "")
        return " + ".join([base, *walks])

    def locate(self, numbers: Numbers, grain: int = 1) -> tuple[Numbers | None, Numbers]:
        """Locate units by their numbers (an int64 array, or a tensor on any device).

        Returns:
            The entries of the address table relative to ``table``, None if all units use one
                address; and the distances from ``offset`` in multiples of ``grain`` bytes, which
                divides the strides of the units.
        """
        entries = places = None
        rest = numbers
        for step in reversed(self.units):
            rest, digit = (rest // step.extent, rest % step.extent) if step.extent else (rest, rest)
            if step.table:
                entries = digit * step.table + (0 if entries is None else entries)
            if step.stride:
                factor = step.stride // grain
                place = digit if factor == 1 else digit * factor
                places = place if places is None else places + place
        return entries, numbers * 0 if places is None else places


@dataclass(frozen=True, slots=True)
class Nest:
    """One loop nest. ``vector`` is the widest access in bytes that everything in it allows."""

    src: Side
    dst: Side
    loops: tuple[Loop, ...]
    run: int
    vector: int

    @property
    def sides(self) -> tuple[Side, Side]:
        """Return the source and the destination."""
        return self.src, self.dst

    @property
    def unit_bytes(self) -> int:
        """Return the bytes that one unit moves in this nest."""
        return prod(loop.extent for loop in self.loops) * self.run

    @property
    def src_tabled(self) -> bool:
        """Return True if the source looks addresses up in its table."""
        return self.src.tabled or any(loop.src_table for loop in self.loops)

    @property
    def dst_tabled(self) -> bool:
        """Return True if the destination looks addresses up in its table."""
        return self.dst.tabled or any(loop.dst_table for loop in self.loops)


def _walk(table: int, stride: int) -> str:
    moves = []
    if table:
        moves.append(f"table[{table}]")
    if stride or not table:
        moves.append(f"{stride} B")
    return " + ".join(moves)


def refine(axis: str, src: Steps, dst: Steps) -> list[Loop]:
    """Split one axis into the coarsest factors common to both sides, outermost first.

    Raises:
        Unsupported: the factors have no common refinement.
    """
    left = list(src)
    right = list(dst)
    loops = []
    while left or right:
        # A side without remaining steps has extent 1, and so has the other side.
        s = left.pop()
        d = right.pop()
        inner, outer = sorted((s.extent, d.extent))
        if outer % inner:
            raise Unsupported(
                f"Copying axis {axis!r} between factors {[x.extent for x in src]} and "
                f"{[x.extent for x in dst]}",
                "they have no common refinement; go through a view whose factors divide both",
            )
        loops.append(Loop((axis,), inner, s.table, s.stride, d.table, d.stride))
        for side, step in ((left, s), (right, d)):
            if step.extent > inner:
                rest = step.extent // inner
                side.append(Step(rest, step.table * inner, step.stride * inner))
    return [loop for loop in reversed(loops) if loop.extent > 1]


def merge_loops(loops: Iterable[Loop]) -> list[Loop]:
    """Merge loops that are contiguous on both sides, whatever their order; sort outermost first."""
    left = sorted(loops, key=lambda x: (x.tabled, abs(x.dst_stride), abs(x.src_stride)))
    merged: list[Loop] = []
    while left:
        inner = left.pop(0)
        next_steps = tuple(inner.extent * step for step in _steps(inner))
        outer = next((loop for loop in left if _steps(loop) == next_steps), None)
        if outer is None:
            merged.append(inner)
            continue
        left.remove(outer)
        axes = inner.axes if outer.axes == inner.axes else outer.axes + inner.axes
        extent = outer.extent * inner.extent
        left.insert(0, Loop(axes, extent, *_steps(inner)))
    return merged[::-1]


def _steps(loop: Loop) -> tuple[int, int, int, int]:
    return loop.src_table, loop.src_stride, loop.dst_table, loop.dst_stride


def close(nest: Nest) -> Nest:
    """Return a nest with its loops merged, its run taken out of them, and its vector."""
    loops = []
    run = 1
    for loop in merge_loops(nest.loops):
        if (loop.src_stride, loop.dst_stride) == (1, 1) and not loop.tabled:
            run = loop.extent
        else:
            loops.append(loop)
    numbers = [nest.vector, run, nest.src.offset, nest.dst.offset]
    numbers += [stride for loop in loops for stride in (loop.src_stride, loop.dst_stride)]
    numbers += [step.stride for step in nest.src.units + nest.dst.units]
    return replace(nest, loops=tuple(loops), run=run, vector=widest_vector(numbers))
