# SPDX-License-Identifier: Apache-2.0
"""Loop nests over two sides together, read from the words of the plans that the core makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from portakv.core.plan import NO_FACTOR, NO_MEMORY, NO_REFINEMENT, Refused
from portakv.errors import LayoutError, Unsupported
from portakv.view.form import Form, Step, Steps

#: The axes of loops, in the order of the digits that name them in words, from 1 on.
AXES = ("layer", "block", "token", "head", "dim", "kv")
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
class TwoSides:
    """The location of the units of two sides, and the loops of a unit, which both take together."""

    src: Side
    dst: Side
    loops: tuple[Loop, ...]

    @property
    def sides(self) -> tuple[Side, Side]:
        """Return the source and the destination."""
        return self.src, self.dst

    @property
    def src_tabled(self) -> bool:
        """Return True if the source looks addresses up in its table."""
        return self.src.tabled or any(loop.src_table for loop in self.loops)

    @property
    def dst_tabled(self) -> bool:
        """Return True if the destination looks addresses up in its table."""
        return self.dst.tabled or any(loop.dst_table for loop in self.loops)


@dataclass(frozen=True, slots=True)
class Nest(TwoSides):
    """One loop nest. ``vector`` is the widest access in bytes that everything in it allows."""

    run: int
    vector: int

    @property
    def unit_bytes(self) -> int:
        """Return the bytes that one unit moves in this nest."""
        return prod(loop.extent for loop in self.loops) * self.run


def _walk(table: int, stride: int) -> str:
    moves = []
    if table:
        moves.append(f"table[{table}]")
    if stride or not table:
        moves.append(f"{stride} B")
    return " + ".join(moves)


def lines_of(nests: Iterable[TwoSides], work: Callable[[Any], str]) -> list[str]:
    """Return the lines of nests for a reader; ``work`` says what is done inside their loops."""
    lines = []
    for nest in nests:
        src = nest.src.text("s")
        dst = nest.dst.text("d")
        lines.append(f"for s, d in units: src = {src}; dst = {dst}")
        for depth, line in enumerate([*map(str, nest.loops), work(nest)], 1):
            lines.append("  " * depth + line)
    return lines


def check_extents(form: Form, other: Form, name: str, like: str) -> None:
    """Raise `LayoutError` unless a form, called ``name``, has the extents of the one it must be
    ``like``."""
    for axis in ("kv", "layers", "heads"):
        extent = getattr(other, axis)
        got = getattr(form, axis)
        if extent != got:
            raise LayoutError(
                f"Expected {name} with {axis.rstrip('s')!r} extent {extent} like the {like}, got "
                f"extent {got}. Declare them alike, or slice one view."
            )


class WordReader:
    """Reads the records of a plan from its words, whose order `native/core/plan.h` lists."""

    def __init__(self, words: Sequence[int]) -> None:
        self._words = iter(words)

    def word(self) -> int:
        """Return the next word."""
        return next(self._words)

    def steps(self) -> Steps:
        """Return steps: a count, then the steps."""
        word = self.word
        return tuple([Step(word(), word(), word()) for _ in range(word())])

    def side(self) -> Side:
        """Return one side."""
        return Side(self.word(), self.word(), self.steps())

    def loops(self) -> tuple[Loop, ...]:
        """Return loops: a count, then the loops."""
        word = self.word
        return tuple(
            [
                Loop(axes_named(word()), word(), word(), word(), word(), word())
                for _ in range(word())
            ]
        )

    def nest(self) -> Nest:
        """Return one nest."""
        return Nest(self.side(), self.side(), self.loops(), self.word(), self.word())


def nests_of(words: Sequence[int]) -> tuple[Nest, ...]:
    """Return the nests of a plan's words."""
    reader = WordReader(words)
    reader.word()  # the unit
    return tuple([reader.nest() for _ in range(reader.word())])


def axes_named(digits: int) -> tuple[str, ...]:
    """Return the axes that the base-8 digits of a loop name, outermost first."""
    names = []
    while digits:
        names.append(AXES[digits % 8 - 1])
        digits //= 8
    return tuple(names[::-1])


def refusal_of(refused: Refused) -> Exception:
    """Return the error for two sides that the core cannot loop over together."""
    code = refused.code
    values = refused.values
    if code == NO_FACTOR:
        unit = values[0]
        extent = values[1]
        return Unsupported(
            f"Moving {unit} tokens together through blocks of {extent}",
            "they have no common factor; use a smaller unit",
        )
    if code == NO_REFINEMENT:
        axis = AXES[values[0] - 1]
        count = values[1]
        extents = values[3 : 3 + count + values[2]].tolist()
        return Unsupported(
            f"Copying axis {axis!r} between factors {extents[:count]} and {extents[count:]}",
            "they have no common refinement; go through a view whose factors divide both",
        )
    if code == NO_MEMORY:
        return MemoryError("The core has no memory for a plan.")
    return LayoutError(
        "Expected forms whose steps reach every position of their axes and whose strides fit in "
        "64 bits, got others. Pass the forms of two views."
    )
