# SPDX-License-Identifier: Apache-2.0
"""Rows inside the host: its own half of a copy through pinned memory.

The units of both sides become strided arrays, which numpy copies without the interpreter's lock:
by `memmove` where both sides are dense. They are cut into shares, which a crew of threads takes.
Where ids scatter the rows, long stretches between them are arrays of their own, and short ones
indexed tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import partial
from itertools import pairwise, product
from math import gcd, prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ...plan import CopyPlan, Nest, Side
from ...runs import Int64
from ._crew import Batch, Call

if TYPE_CHECKING:
    from ...form import Form
    from ...index import Index
    from ...view import KVView

#: Bytes of a stretch of rows from which on it is an array of its own, which costs the caller 4 us.
#: With blocks of 256 KiB in random order two threads of an AMD EPYC moved 12 - 19 GB/s so, and 9 by
#: indexed calls.
LEAST_STRETCH = 256 << 10

#: Bytes of a share, which a thread copies in one call. With less, the calls of eight threads wait
#: for each other in Python: dense rows of 256 MB moved at 14 GB/s in shares of 256 KiB, 19 of 512
#: KiB, 24 of 1 MiB, 33 of 2 MiB, and 21 of 4 MiB, which leave threads idle (16 cores, H200).
SHARE = 2 << 20

#: Elements up to which torch leaves an indexed call in one thread (`at::internal::GRAIN_SIZE`):
#: more would have each thread of the crew start threads of its own.
GRAIN = 32768

_Bytes = npt.NDArray[np.uint8]
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

    def batch(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index, count: int
    ) -> Batch:
        """The copy of ``count`` positions, to be started; ids must be on the host, and clean.

        Raises:
            LayoutError: the memory behind a view was freed or replaced.
        """
        src.check_memory()
        dst.check_memory()
        calls, start = list[Call](), 0
        for units, past in self._ways(src_index, dst_index, count):
            if past > start:
                mine, theirs = src_index.shifted(start), dst_index.shifted(start)
                calls += units.calls(src, dst, mine, theirs, past - start)
            start = past
        return Batch(calls)

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
    ) -> Iterator[Call]:
        """Copies that make up that of ``count`` positions, of a share each."""
        for nest in self._nests:
            yield from nest.calls(src, dst, mine, theirs, count // self.unit)


class _NestRows:
    """One nest as strided arrays ``[units, loops..., run]``."""

    def __init__(self, nest: Nest, unit: int) -> None:
        self._unit_bytes = nest.unit_bytes
        outer = [loop for loop in nest.loops if loop.tabled]
        self._sides = _SideRows(nest, nest.src, unit), _SideRows(nest, nest.dst, unit)
        self._whole = not outer and _dense(*self._sides)
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
    ) -> Iterator[Call]:
        """Copies of so many units."""
        from_rows, to_rows = self._sides
        mine, theirs = from_rows.places(src_index, units), to_rows.places(dst_index, units)
        each_call = units * self._unit_bytes // len(self._moves)
        for first, past in _ranges(mine, theirs, units, each_call):
            here, there = mine.part(first, past), theirs.part(first, past)
            plain = here.rows is None and there.rows is None
            steady = past - first == 1 or here.pitch == there.pitch == self._unit_bytes
            for from_move, to_move in self._moves:
                if plain and steady and self._whole:
                    nbytes = (past - first) * self._unit_bytes
                    source_at = from_rows.address(src, here, nbytes)
                    yield from _moves(to_rows.address(dst, there, nbytes), source_at, nbytes)
                elif plain:
                    source = from_rows.array(src, here, past - first, from_move)
                    target = to_rows.array(dst, there, past - first, to_move)
                    yield from _shares(target, source)
                else:
                    read = from_rows.tensor(src, here, past - first, from_move)
                    written = to_rows.tensor(dst, there, past - first, to_move)
                    yield from _indexed(read, here.rows, written, there.rows, past - first)


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
        if past - first == 1:
            return _Stretch(entry, int(self.offsets[first]), self.pitch)
        offsets = self.offsets[first:past]
        steps = np.diff(offsets)
        if steps[0] > 0 and (steps == steps[0]).all():
            return _Stretch(entry, int(offsets[0]), int(steps[0]))
        lowest = int(offsets.min())
        rows = (offsets - lowest) // self.grain
        return _Stretch(entry, lowest, self.grain, torch.from_numpy(rows), int(rows.max()))


class _SideRows:
    """How the units of one side lie, and the strided arrays and tensors over them."""

    def __init__(self, nest: Nest, side: Side, unit: int) -> None:
        # Plain copies are of bytes; indexed ones are as fast as their elements are wide.
        self._side, self._unit, self._width = side, unit, nest.vector
        width = nest.vector
        loops = [loop for loop in nest.loops if not loop.tabled]
        strides = [x.src_stride if side is nest.src else x.dst_stride for x in loops]
        self.size, self.stride = [*(loop.extent for loop in loops), nest.run], [*strides, 1]
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

    def address(self, view: KVView, stretch: _Stretch, nbytes: int) -> int:
        """Where the units of a stretch begin, which lie one behind the other."""
        memory, start = _memory(view, self._side.table + stretch.entry)
        start += self._side.offset + stretch.start
        if start < 0 or start + nbytes > memory.nbytes:
            raise view.replaced()
        return view.origins[self._side.table + stretch.entry] + self._side.offset + stretch.start

    def array(self, view: KVView, stretch: _Stretch, units: int, move: tuple[int, int]) -> _Bytes:
        """The units of a stretch, byte by byte."""
        memory, start = _memory(view, self._side.table + stretch.entry + move[0])
        start += self._side.offset + stretch.start + move[1]
        size, stride = (units, *self.size), (stretch.pitch, *self.stride)
        try:
            rows: _Bytes = np.ndarray(size, np.uint8, memory, start, stride)
            return rows
        except (TypeError, ValueError):  # the storage ends before the rows do
            raise view.replaced() from None

    def tensor(
        self, view: KVView, stretch: _Stretch, units: int, move: tuple[int, int]
    ) -> torch.Tensor:
        """The units of a stretch, or all rows that they are among, in their widest elements."""
        held, width = units if stretch.rows is None else stretch.last + 1, self._width
        *size, run = held, *self.size
        *stride, _ = (step // width for step in (stretch.pitch, *self.stride))
        offset = self._side.offset + stretch.start + move[1]
        # One made in inference mode could not be written outside of it, as in another thread.
        with torch.inference_mode(False):
            return view.strided(
                self._side.table + stretch.entry + move[0], offset, _ELEMENTS[width],
                [*size, run // width], [*stride, 1],
            )  # fmt: skip


def _memory(view: KVView, entry: int) -> tuple[memoryview, int]:
    """The bytes of the storage behind a table entry, kept with its view, and at which of them the
    entry is. They hold no memory: the view does."""
    key, storage = ("memory", entry), view.owners[entry].untyped_storage()
    place = storage.data_ptr(), storage.nbytes()
    known = view.kept.get(key)
    if known is None or known[0] != place:
        # By address: `Tensor.numpy` would keep the caller from resizing the storage ever after.
        memory = memoryview((ctypes.c_uint8 * place[1]).from_address(place[0]))
        known = view.kept[key] = place, memory
    return known[1], view.origins[entry] - place[0]


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


def _dense(one: _SideRows, other: _SideRows) -> bool:
    """Whether a unit's bytes lie together, and in one order on both sides."""
    if one.stride != other.stride:
        return False
    reached = 1
    for stride, size in sorted(zip(one.stride, one.size, strict=True)):
        if size > 1 and stride != reached:
            return False
        reached *= size
    return True


def _moves(target: int, source: int, nbytes: int) -> Iterator[Call]:
    """Plain copies of a share each, between addresses; they let other threads run."""
    for at in range(0, nbytes, SHARE):
        yield partial(ctypes.memmove, target + at, source + at, min(SHARE, nbytes - at))


def _shares(target: _Bytes, source: _Bytes) -> Iterator[Call]:
    """Plain copies of a share each, cut along the widest strides."""
    if target.size <= SHARE:
        return iter((partial(np.copyto, target, source),))
    axes = sorted(range(target.ndim), key=lambda axis: -target.strides[axis])
    return _cut(target.transpose(axes), source.transpose(axes))


def _cut(target: _Bytes, source: _Bytes) -> Iterator[Call]:
    parts, length = -(-target.size // SHARE), len(target)
    if parts <= 1:
        yield partial(np.copyto, target, source)
    elif parts > length:
        for into, out_of in zip(target, source, strict=True):
            yield from _cut(into, out_of)
    else:
        step = -(-length // parts)
        for at in range(0, length, step):
            yield partial(np.copyto, target[at : at + step], source[at : at + step])


def _indexed(
    source: torch.Tensor,
    srows: torch.Tensor | None,
    target: torch.Tensor,
    drows: torch.Tensor | None,
    units: int,
) -> Iterator[Call]:
    """Indexed copies of so many units, each of as many as one thread copies."""
    step = max(1, GRAIN // prod(target.shape[1:]))
    for at in range(0, units, step):
        part = slice(at, at + step)
        read = source[part] if srows is None else source
        written = target[part] if drows is None else target
        rows = (None if x is None else x[part] for x in (srows, drows))
        yield partial(_copy, read, written, *rows)


def _copy(
    source: torch.Tensor,
    target: torch.Tensor,
    srows: torch.Tensor | None,
    drows: torch.Tensor | None,
) -> None:
    if drows is None:
        torch.ops.aten.index.Tensor_out(source, [srows], out=target)
    else:
        target.index_put_((drows,), source if srows is None else source[srows])
