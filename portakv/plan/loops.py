# SPDX-License-Identifier: Apache-2.0
"""Loop nests over two sides at once: common refinement of axes, merging, vector width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import Unsupported
from portakv.view.form import Step, Steps

_PLANES = frozenset({"layer", "kv"})
Numbers = TypeVar("Numbers", torch.Tensor, npt.NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class Loop:
    """``extent`` steps that both sides take together, through tables and through memory.

    ``axes`` are the axes that were merged into the loop, outermost first.
    """

    axes: tuple[str, ...]
    extent: int
    src_table: int
    src_stride: int
    dst_table: int
    dst_stride: int

    @property
    def name(self) -> str:
        """The axes as text."""
        return " ".join(self.axes)

    @property
    def tabled(self) -> bool:
        """True if a side looks its address up for each step."""
        return bool(self.src_table or self.dst_table)

    @property
    def over_planes(self) -> bool:
        """True if each step goes to another plane, and so never inside a token's row."""
        return _PLANES.issuperset(self.axes)

    def __str__(self) -> str:
        src = _walk(self.src_table, self.src_stride)
        dst = _walk(self.dst_table, self.dst_stride)
        return f"for {self.name} in range({self.extent}): src += {src}; dst += {dst}"


@dataclass(frozen=True, slots=True)
class Side:
    """Where the units of one side lie.

    Attributes:
        table, offset: origin: entry of the address table, and bytes behind its address.
        units: the steps that the number of a unit walks through, outermost (unbounded) first:
            ``n % extent`` from the innermost on, as in positional notation.
    """

    table: int
    offset: int
    units: Steps

    @property
    def tabled(self) -> bool:
        """True if a unit's number decides which entry of the table it lies behind."""
        return any(step.table for step in self.units)

    def locate(self, numbers: Numbers, grain: int = 1) -> tuple[Numbers | None, Numbers]:
        """Where units lie, by their numbers (an int64 array, or a tensor on any device).

        Returns:
            The entries of the address table behind ``table`` (None: all lie behind one address),
            and the distances behind ``offset`` in multiples of ``grain`` bytes, which divides the
            strides of the units.
        """
        entries = places = None
        rest = numbers
        for step in reversed(self.units):
            digit = rest % step.extent if step.extent else rest
            rest = rest // step.extent if step.extent else rest
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
    def unit_bytes(self) -> int:
        """Bytes that one unit moves in this nest."""
        return prod(loop.extent for loop in self.loops) * self.run


def _walk(table: int, stride: int) -> str:
    moves = [f"table[{table}]"] * bool(table) + [f"{stride} B"] * bool(stride or not table)
    return " + ".join(moves)


def refine(axis: str, src: Steps, dst: Steps) -> list[Loop]:
    """Split one axis into the coarsest factors common to both sides, outermost first.

    Raises:
        Unsupported: the factors have no common refinement.
    """
    left, right = list(src), list(dst)
    loops = []
    while left or right:
        # A side without steps left has extent 1 there, and so has the other.
        s, d = left.pop(), right.pop()
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


def merge(loops: Iterable[Loop]) -> list[Loop]:
    """Merge loops that are contiguous on both sides, whatever their order; sort outermost first."""
    left = [loop for loop in loops if loop.extent > 1]
    left.sort(key=lambda x: (x.tabled, abs(x.dst_stride), abs(x.src_stride)))
    merged: list[Loop] = []
    while left:
        inner = left.pop(0)
        outer = next((loop for loop in left if _continues(loop, inner)), None)
        if outer is None:
            merged.append(inner)
            continue
        left.remove(outer)
        axes = inner.axes if outer.axes == inner.axes else outer.axes + inner.axes
        extent = outer.extent * inner.extent
        steps = (inner.src_table, inner.src_stride, inner.dst_table, inner.dst_stride)
        left.insert(0, Loop(axes, extent, *steps))
    return merged[::-1]


def _continues(outer: Loop, inner: Loop) -> bool:
    walks = [(x.src_table, x.src_stride, x.dst_table, x.dst_stride) for x in (outer, inner)]
    return walks[0] == tuple(inner.extent * step for step in walks[1])


def split_run(loops: Sequence[Loop]) -> tuple[tuple[Loop, ...], int]:
    """Take the contiguous run out of merged loops; 1 byte if there is none."""
    rest, run = [], 1
    for loop in loops:
        if (loop.src_stride, loop.dst_stride) == (1, 1) and not loop.tabled:
            run = loop.extent
        else:
            rest.append(loop)
    return tuple(rest), run


def widest_vector(numbers: Iterable[int]) -> int:
    """The widest vector of up to 16 bytes that divides every number."""
    bits = 16
    for number in numbers:
        bits |= number
    return bits & -bits
