# SPDX-License-Identifier: Apache-2.0
"""Loops over two sides at once: common refinement of axes, merging, vector width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from portakv.errors import Unsupported
from portakv.view.form import Step, Steps

VECTOR_WIDTHS = (16, 8, 4, 2, 1)  # bytes


@dataclass(frozen=True, slots=True)
class Loop:
    """``extent`` steps that both sides take together, through tables and through memory."""

    name: str
    extent: int
    src_table: int
    src_stride: int
    dst_table: int
    dst_stride: int

    @property
    def tabled(self) -> bool:
        """True where a side looks its address up for each step."""
        return bool(self.src_table or self.dst_table)

    def __str__(self) -> str:
        src = _walk(self.src_table, self.src_stride)
        dst = _walk(self.dst_table, self.dst_stride)
        return f"for {self.name} in range({self.extent}): src += {src}; dst += {dst}"


def _walk(table: int, stride: int) -> str:
    moves = [f"table[{table}]"] * bool(table) + [f"{stride} B"] * bool(stride or not table)
    return " + ".join(moves)


def refine(name: str, src: Steps, dst: Steps) -> list[Loop]:
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
                f"Copying axis {name!r} between factors {[x.extent for x in src]} and "
                f"{[x.extent for x in dst]}",
                "they have no common refinement; go through a view whose factors divide both",
            )
        loops.append(Loop(name, inner, s.table, s.stride, d.table, d.stride))
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
        name = f"{outer.name} {inner.name}" if outer.name != inner.name else inner.name
        extent = outer.extent * inner.extent
        steps = (inner.src_table, inner.src_stride, inner.dst_table, inner.dst_stride)
        left.insert(0, Loop(name, extent, *steps))
    return merged[::-1]


def _continues(outer: Loop, inner: Loop) -> bool:
    n = inner.extent
    return (
        outer.src_stride == n * inner.src_stride
        and outer.dst_stride == n * inner.dst_stride
        and outer.src_table == n * inner.src_table
        and outer.dst_table == n * inner.dst_table
    )


def split_run(loops: Sequence[Loop]) -> tuple[tuple[Loop, ...], int]:
    """Take the contiguous run out of merged loops; 1 byte where there is none."""
    rest, run = [], 1
    for loop in loops:
        if (loop.src_stride, loop.dst_stride) == (1, 1) and not loop.tabled:
            run = loop.extent
        else:
            rest.append(loop)
    return tuple(rest), run


def widest_vector(numbers: Iterable[int]) -> int:
    """The widest vector, in bytes, that divides every number."""
    bits = 0
    for number in numbers:
        bits |= number
    return next(width for width in VECTOR_WIDTHS if bits % width == 0)
