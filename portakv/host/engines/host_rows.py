# SPDX-License-Identifier: Apache-2.0
"""Rows inside the host: its own half of a copy through pinned memory.

The units of both sides become strided tensors, so that torch copies a whole slice in one call, by
as many threads as it may use (`torch.get_num_threads`). Only where ids scatter the rows there is
more to do: long stretches between them are calls of their own, and short ones one indexed call.
"""

from __future__ import annotations

from itertools import pairwise, product
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ...plan import CopyPlan, Nest, Side
from ...runs import Int64

if TYPE_CHECKING:
    from ...form import Form
    from ...index import Index
    from ...view import KVView

#: Bytes of a stretch of rows from which on it is a call of its own: each costs some 10 us. By one
#: thread, with blocks in random order between 16 MiB of pinned rows and a pool, the indexed call of
#: a whole slice moved 22 GB/s in runs of 256 KiB where calls of their own moved 12, and as much as
#: these (19 - 25 GB/s) from 2 MiB on; with vectors of 8 bytes it moves half of that.
LEAST_STRETCH = 2 << 20

#: Bytes of the widest element of a plain copy.
PLAIN = 8

_ELEMENTS = {
    16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8
}  # fmt: skip
_HERE = torch.device("cpu")


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
        start = 0
        with torch.no_grad():
            for units, past in self._ways(src_index, dst_index, count):
                if past > start:
                    mine, theirs = src_index.shifted(start), dst_index.shifted(start)
                    units.copy(src, dst, mine, theirs, past - start)
                start = past

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

    def copy(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index, count: int
    ) -> None:
        for nest in self._nests:
            nest.copy(src, dst, src_index, dst_index, count // self.unit)


class _NestRows:
    """One nest as strided tensors ``[units, loops..., run]``."""

    def __init__(self, nest: Nest, unit: int) -> None:
        self._unit_bytes = nest.unit_bytes
        outer = [loop for loop in nest.loops if loop.tabled]
        # Indexed calls are as fast as their elements are wide. Plain ones are not, and torch gives
        # each thread a number of elements, so that wide ones leave threads of small slices idle.
        self._indexed, self._plain = (
            (_SideRows(nest, nest.src, unit, width), _SideRows(nest, nest.dst, unit, width))
            for width in (nest.vector, min(nest.vector, PLAIN))
        )
        # Planes that are memory of their own: how far each lies in the tables, and in bytes.
        self._moves = [
            (
                _walked([(x.src_table, x.src_stride) for x in outer], at),
                _walked([(x.dst_table, x.dst_stride) for x in outer], at),
            )
            for at in product(*(range(x.extent) for x in outer))
        ]

    def copy(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index, units: int
    ) -> None:
        """Copy so many units."""
        from_rows, to_rows = self._plain
        mine, theirs = from_rows.places(src_index, units), to_rows.places(dst_index, units)
        each_call = units * self._unit_bytes // len(self._moves)
        for first, past in _ranges(mine, theirs, units, each_call):
            here, there = mine.part(first, past), theirs.part(first, past)
            plain = here.rows is None and there.rows is None
            from_rows, to_rows = self._plain if plain else self._indexed
            for from_move, to_move in self._moves:
                source = from_rows.tensor(src, here, past - first, from_move)
                target = to_rows.tensor(dst, there, past - first, to_move)
                _copy(source, here.rows, target, there.rows)


class _Stretch(NamedTuple):
    """Units of one table entry: from a byte on, ``pitch`` bytes apart; or the rows of that pitch
    that ``rows`` numbers, of which ``last`` is the largest."""

    entry: int
    start: int
    pitch: int
    rows: torch.Tensor | None = None
    last: int = 0


class _Places:
    """Where each unit of one side begins: ``offsets`` behind the address of ``entries``; both None
    where units follow each other at a pitch from ``start`` on.

    ``grain`` divides the distances between offsets.
    """

    def __init__(
        self, start: int, pitch: int, grain: int, offsets: Int64 | None, entries: Int64 | None
    ) -> None:
        self.start, self.pitch, self.grain = start, pitch, grain
        self.offsets, self.entries = offsets, entries

    def breaks(self) -> Int64:
        """Before which units the steady walk ends."""
        if self.offsets is None:
            return np.zeros(0, dtype=np.int64)
        broken = np.diff(self.offsets) != self.pitch
        if self.entries is not None:
            broken |= np.diff(self.entries) != 0
        return np.flatnonzero(broken) + 1

    def moves(self) -> Int64:
        """Before which units another table entry begins."""
        if self.entries is None:
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(np.diff(self.entries)) + 1

    def part(self, first: int, past: int) -> _Stretch:
        """The units from one on, all of one table entry."""
        if self.offsets is None:
            return _Stretch(0, self.start + first * self.pitch, self.pitch)
        entry = 0 if self.entries is None else int(self.entries[first])
        offsets = self.offsets[first:past]
        steps = np.diff(offsets)
        if not steps.size or (steps[0] > 0 and (steps == steps[0]).all()):
            pitch = int(steps[0]) if steps.size else self.pitch
            return _Stretch(entry, int(offsets[0]), pitch)
        lowest = int(offsets.min())
        rows = (offsets - lowest) // self.grain
        return _Stretch(entry, lowest, self.grain, torch.from_numpy(rows), int(rows.max()))


class _SideRows:
    """How the units of one side lie, and the strided tensors over them."""

    def __init__(self, nest: Nest, side: Side, unit: int, width: int) -> None:
        self._side, self._unit, self._width = side, unit, width
        self._dtype = _ELEMENTS[width]
        loops = [loop for loop in nest.loops if not loop.tabled]
        strides = [x.src_stride if side is nest.src else x.dst_stride for x in loops]
        self._size = [*(loop.extent for loop in loops), nest.run // width]
        self._stride = [*(stride // width for stride in strides), 1]
        self._tabled = any(step.table for step in side.units)
        self._pitch = side.units[-1].stride or width
        self._grain = gcd(*(step.stride for step in side.units if not step.table)) or width

    def places(self, index: Index, units: int) -> _Places:
        """Where the units lie that an index names."""
        if index.ids is None and len(self._side.units) == 1 and not self._tabled:
            first, rest = divmod(index.offset, self._unit)
            start = first * self._pitch + rest * (self._pitch // self._unit)
            return _Places(start, self._pitch, self._grain, None, None)
        number = index.units(units * self._unit, self._unit, _HERE).numpy()
        offsets, entries = np.zeros_like(number), np.zeros_like(number)
        for step in reversed(self._side.units):
            at = number % step.extent if step.extent else number
            number = number // step.extent if step.extent else number
            entries += at * step.table
            offsets += at * step.stride
        return _Places(0, self._pitch, self._grain, offsets, entries if self._tabled else None)

    def tensor(
        self, view: KVView, stretch: _Stretch, units: int, move: tuple[int, int]
    ) -> torch.Tensor:
        """The units of a stretch, or all rows that they are among."""
        held = units if stretch.rows is None else stretch.last + 1
        words, start = _words(view, self._side.table + stretch.entry + move[0], self._dtype)
        start += self._side.offset + stretch.start + move[1]
        size, stride = [held, *self._size], [stretch.pitch // self._width, *self._stride]
        return words.as_strided(size, stride, start // self._width)


def _words(view: KVView, entry: int, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """The storage behind a table entry, kept with its view, and at which byte of it the entry is:
    tensors over it are made in a quarter of the time that new ones take."""
    key = "words", entry, dtype
    words: torch.Tensor | None = view.kept.get(key)
    if words is None:
        # One made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            words = torch.empty(0, dtype=dtype)
            words.set_(view.owners[entry].untyped_storage(), 0, [0], [1])
        view.kept[key] = words
    return words, view.origins[entry] - words.untyped_storage().data_ptr()


def _walked(steps: list[tuple[int, int]], at: tuple[int, ...]) -> tuple[int, int]:
    """Table entries and bytes of a place in loops."""
    return (
        sum(i * table for i, (table, _) in zip(at, steps, strict=True)),
        sum(i * stride for i, (_, stride) in zip(at, steps, strict=True)),
    )


def _ranges(mine: _Places, theirs: _Places, units: int, nbytes: int) -> list[tuple[int, int]]:
    """The units of each call, where one call for all of them moves so many bytes."""
    if mine.offsets is None and theirs.offsets is None:
        return [(0, units)]
    cuts = np.union1d(mine.breaks(), theirs.breaks())
    if nbytes < LEAST_STRETCH * (cuts.size + 1):
        cuts = np.union1d(mine.moves(), theirs.moves())
    ends = [0, *cuts.tolist(), units]
    return list(pairwise(ends))


def _copy(
    source: torch.Tensor,
    srows: torch.Tensor | None,
    target: torch.Tensor,
    drows: torch.Tensor | None,
) -> None:
    if srows is None and drows is None:
        target.copy_(source)
    elif drows is None:
        torch.ops.aten.index.Tensor_out(source, [srows], out=target)
    else:
        target.index_put_((drows,), source if srows is None else source[srows])
