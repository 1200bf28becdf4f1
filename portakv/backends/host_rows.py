# SPDX-License-Identifier: Apache-2.0
"""Rows inside the host: its own half of a copy through pinned memory.

The units of both sides become strided tensors, which torch copies in one call, indexed where ids
scatter the rows. It has threads for the caller: others would be slower to wake, and would share the
cores with those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise, product
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from portakv.plan.plan import CopyPlan, Nest, Side
from portakv.plan.runs import Int64

if TYPE_CHECKING:
    from portakv.view.form import Form
    from portakv.view.index import Index
    from portakv.view.view import KVView

_ELEMENTS = {
    16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8
}  # fmt: skip
_HERE = torch.device("cpu")


class _Call(NamedTuple):
    """One copy: of what, which rows of it (None: all in their order), and to where."""

    source: torch.Tensor
    source_rows: torch.Tensor | None
    target: torch.Tensor
    target_rows: torch.Tensor | None


class HostRows:
    """Copies between rows of two forms on the host; they must not share memory.

    Args:
        src, dst: the forms.
        src_step, dst_step: as a `CopyPlan` has them.
        unit: what counts are multiples of.
    """

    def __init__(self, src: Form, dst: Form, src_step: int, dst_step: int, unit: int) -> None:
        widest = CopyPlan(src, dst, src_step, dst_step)
        self._narrow = _Units(CopyPlan(src, dst, src_step, dst_step, unit))
        self._wide: _Units | None = None
        if widest.unit > unit and widest.unit % unit == 0:
            self._wide = _Units(widest)

    def copy(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index, count: int
    ) -> None:
        """Copy ``count`` positions; ids must be on the host, and clean.

        Raises:
            LayoutError: the memory behind a view was freed or replaced.
        """
        src.check_memory()
        dst.check_memory()
        calls, start = list[_Call](), 0
        # A tensor made in inference mode could not be written outside of it, as in another thread.
        with torch.inference_mode(False):
            for units, past in self._ways(src_index, dst_index, count):
                if past > start:
                    mine, theirs = src_index.shifted(start), dst_index.shifted(start)
                    calls += units.calls(src, dst, mine, theirs, past - start)
                start = past
            # All of them are settled, so that nothing was touched where memory is refused.
            for call in calls:
                _copy(*call)

    def _ways(self, src_index: Index, dst_index: Index, count: int) -> list[tuple[_Units, int]]:
        """Head, whole units and tail: by which units, and up to which position."""
        wide, narrow = self._wide, self._narrow
        if wide is None:
            return [(narrow, count)]
        heads = wide.heads(src_index, dst_index)
        if len(heads) > 1:  # the two sides never begin a unit at once
            return [(narrow, count)]
        head = min(heads.pop() if heads else 0, count)
        whole = (count - head) // wide.unit * wide.unit
        return [(narrow, head), (wide, head + whole), (narrow, count)]


class _Units:
    """The copies of one plan, by its units."""

    def __init__(self, plan: CopyPlan) -> None:
        self.unit, self._plan = plan.unit, plan
        self._nests = [_NestRows(nest, plan.unit) for nest in plan.nests]

    def heads(self, src_index: Index, dst_index: Index) -> set[int]:
        """After how many positions a unit begins, of each side to which that matters."""
        sides = ("src", src_index), ("dst", dst_index)
        return {
            -index.offset % self.unit
            for side, index in sides
            if index.ids is not None or self._plan.aligned(side)
        }

    def calls(
        self, src: KVView, dst: KVView, mine: Index, theirs: Index, count: int
    ) -> Iterator[_Call]:
        """Copies that make up that of ``count`` positions."""
        for nest in self._nests:
            yield from nest.calls(src, dst, mine, theirs, count // self.unit)


class _NestRows:
    """One nest as strided tensors ``[units, loops..., run]``."""

    def __init__(self, nest: Nest, unit: int) -> None:
        self._width = nest.vector
        outer = [loop for loop in nest.loops if loop.tabled]
        self._sides = _SideRows(nest, nest.src, unit), _SideRows(nest, nest.dst, unit)
        # Planes that are memory of their own: how far each lies in the tables, and in bytes.
        self._moves = [
            (
                _walked([(x.src_table, x.src_stride) for x in outer], at),
                _walked([(x.dst_table, x.dst_stride) for x in outer], at),
            )
            for at in product(*(range(x.extent) for x in outer))
        ]

    def calls(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index, units: int
    ) -> Iterator[_Call]:
        """Copies of so many units."""
        from_rows, to_rows = self._sides
        mine, theirs = from_rows.places(src_index, units), to_rows.places(dst_index, units)
        for first, past in _ranges(mine, theirs, units):
            here, there = mine.part(first, past), theirs.part(first, past)
            # Plain copies are of bytes, which torch gives to most threads; indexed ones are as fast
            # as their elements are wide.
            width = 1 if here.rows is None and there.rows is None else self._width
            read, written = from_rows.laid(here, width), to_rows.laid(there, width)
            for from_move, to_move in self._moves:
                source, target = read.tensor(src, from_move), written.tensor(dst, to_move)
                yield _Call(source, here.rows, target, there.rows)


class _Stretch(NamedTuple):
    """Units of one table entry: ``number`` from a byte on, ``pitch`` bytes apart; or those of them
    that ``rows`` names."""

    entry: int
    start: int
    pitch: int
    number: int
    rows: torch.Tensor | None = None


class _Places(NamedTuple):
    """Where each unit of one side begins: ``offsets`` behind the address of ``entries`` (None: of
    the first); both None where units follow each other at a pitch from ``start`` on.

    ``grain`` divides the distances between offsets.
    """

    start: int
    pitch: int
    grain: int
    offsets: Int64 | None = None
    entries: Int64 | None = None

    def part(self, first: int, past: int) -> _Stretch:
        """The units from one on, all of one table entry."""
        if self.offsets is None:
            return _Stretch(0, self.start + first * self.pitch, self.pitch, past - first)
        entry = 0 if self.entries is None else int(self.entries[first])
        offsets = self.offsets[first:past]
        begin, pitch = int(offsets[0]), int(offsets[1] - offsets[0]) if past - first > 1 else 1
        if pitch > 0 and (offsets == np.arange(begin, begin + pitch * offsets.size, pitch)).all():
            return _Stretch(entry, begin, pitch, past - first)
        lowest = int(offsets.min())
        rows = (offsets - lowest) // self.grain
        return _Stretch(entry, lowest, self.grain, int(rows.max()) + 1, torch.from_numpy(rows))


class _Laid(NamedTuple):
    """How a strided tensor lies, in table entry ``entry`` and ``offset`` bytes behind its
    address."""

    entry: int
    offset: int
    dtype: torch.dtype
    size: list[int]
    stride: list[int]

    def tensor(self, view: KVView, move: tuple[int, int]) -> torch.Tensor:
        """It, so many table entries and bytes further on; raises as `KVView.strided` does."""
        entry, offset = self.entry + move[0], self.offset + move[1]
        return view.strided(entry, offset, self.dtype, self.size, self.stride)


class _SideRows:
    """How the units of one side lie, and the strided tensors over them."""

    def __init__(self, nest: Nest, side: Side, unit: int) -> None:
        self._side, self._unit, width = side, unit, nest.vector
        loops = [loop for loop in nest.loops if not loop.tabled]
        strides = [x.src_stride if side is nest.src else x.dst_stride for x in loops]
        self.size, self.stride = [*(loop.extent for loop in loops), nest.run], [*strides, 1]
        self._tabled = side.tabled
        self._pitch = side.units[-1].stride or width
        self._grain = gcd(*(step.stride for step in side.units if not step.table)) or width

    def places(self, index: Index, units: int) -> _Places:
        """Where the units lie that an index names."""
        if index.ids is None and len(self._side.units) == 1 and not self._tabled:
            first, rest = divmod(index.offset, self._unit)
            start = first * self._pitch + rest * (self._pitch // self._unit)
            return _Places(start, self._pitch, self._grain, None, None)
        number = index.units(units * self._unit, self._unit, _HERE).numpy()
        entries, offsets = self._side.locate(number)
        return _Places(0, self._pitch, self._grain, offsets, entries)

    def laid(self, stretch: _Stretch, width: int) -> _Laid:
        """The units of a stretch, and all that lie among them, in elements of ``width``."""
        *size, run = stretch.number, *self.size
        *stride, _ = (step // width for step in (stretch.pitch, *self.stride))
        return _Laid(
            self._side.table + stretch.entry, self._side.offset + stretch.start, _ELEMENTS[width],
            [*size, run // width], [*stride, 1],
        )  # fmt: skip


def _walked(steps: list[tuple[int, int]], at: tuple[int, ...]) -> tuple[int, int]:
    """Table entries and bytes of a place in loops."""
    return (
        sum(i * table for i, (table, _) in zip(at, steps, strict=True)),
        sum(i * stride for i, (_, stride) in zip(at, steps, strict=True)),
    )


def _ranges(mine: _Places, theirs: _Places, units: int) -> Iterable[tuple[int, int]]:
    """The units of each call: neither side moves to another table entry among them."""
    moves = [np.diff(x.entries) != 0 for x in (mine, theirs) if x.entries is not None]
    if not moves:
        return [(0, units)]
    cuts = np.flatnonzero(np.logical_or.reduce(moves)) + 1
    return pairwise([0, *cuts.tolist(), units])


def _copy(
    source: torch.Tensor,
    srows: torch.Tensor | None,
    target: torch.Tensor,
    drows: torch.Tensor | None,
) -> None:
    if drows is not None:
        target.index_put_((drows,), source if srows is None else source[srows])
    elif srows is not None:
        torch.ops.aten.index.Tensor_out(source, [srows], out=target)
    else:
        target.copy_(source)
