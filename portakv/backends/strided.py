# SPDX-License-Identifier: Apache-2.0
"""Indexed copying by torch, for `reference`, for vendors' index ops and for rows of the host.

The rows of each side are the first dimension of strided tensors over its memory, so that a copy is
one call of torch for each table entry and plane: `index_select`, a scatter, or `copy_`. There is no
loop over tokens. Ids must be clean: neither negative nor past the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby, product
from math import gcd, prod
from operator import itemgetter, mul
from typing import NamedTuple

import numpy as np
import torch

from portakv.plan.plan import CopyPlan, Move, Nest
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

#: An opaque element for each width in bytes; copying complex numbers moves bits.
ELEMENTS = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_HOST = torch.device("cpu")
#: For each plane the tensor over its rows; then which of them, in which order (None: all).
_Tensors = list[torch.Tensor]
_Picked = torch.Tensor | None
_Planes = tuple[_Tensors, _Picked, _Tensors, _Picked]


class Ops(NamedTuple):
    """How a device copies.

    Attributes:
        widest: bytes of the widest element that it copies bit by bit.
        by_plane: a call for each plane; else strides lead over all planes of one address.
        holes: it indexes tensors with holes, so that a row is a whole unit; else rows are pieces
            that all strides are multiples of, and the tensors have no holes. CANN's ops take one
            with holes through a contiguous copy of all of it (the flow in its header
            ``aclnn_index_select.h``): for a cache that costs its own size, and a scatter would put
            back old bytes over those that another stream has written in between.
        evenly: ids on the host are looked at: those that rise evenly make a plain copy, which pays
            if torch gives plain copies to more threads. Units behind several addresses always are.
        select: picks rows: (source, 0, rows) and perhaps ``out``.
        put: writes rows: (target, 0, rows, source).
        copy: copies all rows: (target, source).
        nested: `select` and `put` take numbers of rows in any shape, so that rows of the other side
            which lie in loops need neither numbers nor a call of their own.
    """

    widest: int = 8
    by_plane: bool = False
    holes: bool = True
    evenly: bool = False
    select: Callable[..., torch.Tensor] = torch.index_select
    put: Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor], object] = (
        torch.Tensor.index_copy_
    )
    copy: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_
    nested: bool = False


class StridedCopy:
    """One nest of a plan, whose units are ``unit`` tokens, as torch calls."""

    def __init__(self, nest: Nest, unit: int, ops: Ops) -> None:
        self._unit = unit
        self._ops = ops
        self._src = _Rows(nest, "src", unit, ops)
        self._dst = _Rows(nest, "dst", unit, ops)

    def __call__(self, move: Move) -> None:
        """Copy whole units, ordered on the current stream of their device."""
        within = move.src.overlaps(move.dst)
        for planes in self.planes(move):
            _run(self._ops, within, *planes)

    def planes(self, move: Move) -> Iterator[_Planes]:
        """What is copied, of which planes; raises as `KVView.strided` does."""
        src, dst, src_index, dst_index, count = move
        units = count // self._unit
        if not units:
            return
        if self._ops.nested and (nested := self._nested(move, units)):
            yield nested
            return
        start, number, entries = self._src.find(src_index, units, src.device)
        to_start, to_number, to_entries = self._dst.find(dst_index, units, dst.device)
        for (entry, to_entry), at in _by_entry(entries, to_entries, units):
            yield (
                *self._src.tensors(src, entry, start, number, at),
                *self._dst.tensors(dst, to_entry, to_start, to_number, at),
            )

    def _nested(self, move: Move, units: int) -> _Planes | None:
        """As `planes`, if one side has ids and the units of the other lie in loops."""
        gather = move.dst_index.ids is None
        sides = (self._src, move.src, move.src_index), (self._dst, move.dst, move.dst_index)
        (rows, view, index), (other, even, positions) = sides if gather else sides[::-1]
        if index.ids is None or positions.ids is not None or rows.tabled:
            return None
        loops = other.loops(positions, units)
        if loops is None:
            return None
        start, number, _ = rows.find(index, units, view.device)
        there, picked = rows.tensors(view, 0, start, number, slice(0, units))
        assert picked is not None  # it has ids, which such a device does not look at
        picked = picked.view([extent for extent, _ in loops[1]])
        here = other.over(even, 0, *loops)
        return (there, picked, here, None) if gather else (here, None, there, picked)


def _run(
    ops: Ops, within: bool, sources: _Tensors, read: _Picked, targets: _Tensors, written: _Picked
) -> None:
    """Copy rows of each plane; ``within``: they share memory, which torch refuses to index in."""
    for source, target in zip(sources, targets, strict=True):
        if written is None and read is not None and not within:
            ops.select(source, 0, read, out=target)
            continue
        if read is not None:
            source = ops.select(source, 0, read)
        elif within:
            source = source.clone()
        if written is None:
            ops.copy(target, source)
        else:
            ops.put(target, 0, written, source)


class _Grid(NamedTuple):
    """Rows of ``each`` planes ``near`` bytes apart; the rows begin ``far`` bytes apart."""

    first: int
    rows: int
    far: int
    each: int
    near: int


def _grids(moves: list[int]) -> list[_Grid]:
    """Distances of planes as one grid; if they are none, each by itself."""
    number = len(moves)
    first = moves[0]
    for each in (n for n in range(1, number + 1) if number % n == 0):
        far = moves[each] - first if each < number else 0
        near = moves[1] - first if each > 1 else 0
        rows = number // each
        made = [first + row * far + at * near for row in range(rows) for at in range(each)]
        if made == moves and min(near, far) >= 0:
            return [_Grid(first, rows, far, each, near)]
    return [_Grid(move, 1, 0, 1, 0) for move in moves]


class _Rows:
    """How the units of one side become rows.

    With ``Ops.holes`` a unit is a row ``[loops..., run]``, so that units of split axes (block, then
    token) have numbers by the common divisor of their strides; the tensor overlaps itself, but only
    rows that are units are ever touched. Else rows are the longest piece that all strides of both
    sides are multiples of, and a unit takes several, which the loops walk through.
    """

    def __init__(self, nest: Nest, name: str, unit: int, ops: Ops) -> None:
        outer = [x for x in nest.loops if x.tabled or (ops.by_plane and x.over_planes)]
        inner = [x for x in nest.loops if x not in outer]
        side = getattr(nest, name)
        width = min(nest.vector, ops.widest)
        loops = [(x.extent, getattr(x, f"{name}_stride")) for x in inner]
        self._side = side
        self._unit = unit
        self._width = width
        self._dtype = ELEMENTS[width]
        self.tabled = side.tabled
        self._flat = len(side.units) == 1 and not side.tabled
        self._pitch = side.units[0].stride if self._flat else 0
        if ops.holes:
            sizes = [*((n, s // width) for n, s in loops), (nest.run // width, 1)]
            self._walk = []
            self._grain = gcd(*(step.stride for step in side.units)) or width
        else:
            row = gcd(
                nest.run,
                *(step.stride for side in (nest.src, nest.dst) for step in side.units),
                *(stride for x in inner for stride in (x.src_stride, x.dst_stride)),
            )
            self._walk = [(n, s // row) for n, s in (*loops, (nest.run // row, row)) if n > 1]
            sizes = [(row // width, 1)]
            self._grain = row
        self._size = [n for n, _ in sizes]
        self._stride = [s for _, s in sizes]
        self._reach = sum((n - 1) * s for n, s in self._walk)
        # Whether the rows of a unit follow each other, and the next unit behind them.
        packed = True
        self._each = 1
        for extent, stride in reversed(self._walk):
            packed = packed and stride == self._each
            self._each = self._each * extent
        self._dense = ops.holes or (packed and self._pitch == self._each * self._grain)
        # From a row of consecutive units to the next in bytes, and from a unit to the next in rows.
        self._near = self._pitch if ops.holes else self._grain
        self._apart = 1 if ops.holes else self._pitch // self._grain
        # Few units lie behind each of several addresses, often in their order.
        self._evenly = (ops.evenly or side.tabled) and not self._walk
        places = product(*(range(x.extent) for x in outer))
        tables = [getattr(x, f"{name}_table") for x in outer]
        strides = [getattr(x, f"{name}_stride") for x in outer]
        moves = [(sum(map(mul, at, tables)), sum(map(mul, at, strides))) for at in places]
        #: For each entry of the table in turn, how far its planes lie behind the address.
        self._planes = [
            (table, _grids([move for _, move in group]))
            for table, group in groupby(moves, itemgetter(0))
        ]

    def find(
        self, index: Index, units: int, device: torch.device
    ) -> tuple[int, torch.Tensor | None, torch.Tensor | None]:
        """The units that an index names: the byte that the first one begins at, if they follow each
        other; else their numbers, in grains, behind the address of their entries (None: of the
        first)."""
        if index.ids is None and self._flat:
            first, rest = divmod(index.offset, self._unit)
            return first * self._pitch + rest * (self._pitch // self._unit), None, None
        # Without ids the host knows the numbers: finding their entries then needs no device.
        home = _HOST if index.ids is None and self._side.tabled else device
        number = index.units(units * self._unit, self._unit, home)
        entries, numbers = self._side.locate(number, self._grain)
        return 0, numbers.to(device), entries

    def loops(self, index: Index, units: int) -> tuple[int, list[tuple[int, int]]] | None:
        """Units that an index without ids names as loops: the byte that the first one begins at,
        the extent of each loop and its pitch in bytes. None if they begin or end amid one."""
        first, *bounded = self._side.units
        inner = prod(step.extent for step in bounded)
        begin, rest = divmod(index.offset, self._unit * inner)
        if rest or units % inner or not bounded or self.tabled:
            return None
        sizes = [(units // inner, first.stride), *((x.extent, x.stride) for x in bounded)]
        return begin * first.stride, sizes

    def tensors(
        self, view: KVView, entry: int, start: int, numbers: _Picked, at: slice | torch.Tensor
    ) -> tuple[_Tensors, _Picked]:
        """For each plane the tensor over rows behind an entry, and which rows of it the units at
        some positions are (None: all)."""
        if numbers is None:
            return self._consecutive(view, entry, start, at)
        if not isinstance(at, slice):
            numbers = numbers[at.to(numbers.device)]
        elif at.stop - at.start < numbers.numel():
            numbers = numbers[at]
        if self._evenly and numbers.is_cpu:
            first, step = _rise(numbers)
            if step:
                start = first * self._grain
                pitch = step * self._grain
                return self.over(view, entry, start, [(numbers.numel(), pitch)]), None
        key = (self, entry)
        known: _Tensors | None = view.derived.get(key)
        if known is None:
            # A tensor made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                rows = self._rows_of(view)
                known = view.derived[key] = self.over(view, entry, 0, [(rows, self._grain)])
        return known, self._walked(numbers) if self._walk else numbers

    def _consecutive(
        self, view: KVView, entry: int, start: int, at: slice | torch.Tensor
    ) -> tuple[_Tensors, _Picked]:
        """Units that follow each other from byte ``start`` on."""
        if isinstance(at, slice):
            if self._dense:
                start = start + at.start * self._pitch
                rows = (at.stop - at.start) * self._each
                return self.over(view, entry, start, [(rows, self._near)]), None
            at = torch.arange(at.start, at.stop)
        at = at * self._apart
        rows = int(at[-1]) + self._reach + 1
        at = at.to(view.device)
        return self.over(view, entry, start, [(rows, self._near)]), self._walked(at)

    def _walked(self, rows: torch.Tensor) -> torch.Tensor:
        """All rows of units that begin at ``rows``, one behind the other."""
        for extent, stride in self._walk:
            inner = torch.arange(extent, device=rows.device) * stride
            rows = (rows[:, None] + inner).reshape(-1)
        return rows

    def over(
        self, view: KVView, entry: int, start: int, loops: Sequence[tuple[int, int]]
    ) -> _Tensors:
        """For each plane the tensor over rows from byte ``start`` on; of each loop round them its
        extent, and how many bytes apart its steps are."""
        size = [*(extent for extent, _ in loops), *self._size]
        stride = [*(pitch // self._width for _, pitch in loops), *self._stride]
        entry = self._side.table + entry
        start = self._side.offset + start
        made = []
        for table, grids in self._planes:
            for grid in grids:
                at = entry + table
                first = start + grid.first
                if grid.rows == grid.each == 1:
                    made.append(view.strided(at, first, self._dtype, size, stride))
                    continue
                steps = [grid.near // self._width, grid.far // self._width, *stride]
                if grid.each == 1:
                    sizes = [grid.rows, *size]
                    made += view.strided(at, first, self._dtype, sizes, steps[1:]).unbind()
                    continue
                sizes = [grid.each, grid.rows, *size]
                planes = view.strided(at, first, self._dtype, sizes, steps).unbind()
                # Few calls for many planes: one for each costs three times as much.
                made += chain.from_iterable(zip(*(x.unbind() for x in planes), strict=True))
        return made

    def _rows_of(self, view: KVView) -> int:
        """All rows of a view behind one entry."""
        first, *bounded = self._side.units
        blocks = view.slots // self._unit // prod(step.extent for step in bounded)
        steps = [(blocks, first), *((step.extent, step) for step in bounded)]
        last: int = sum((n - 1) * (x.stride // self._grain) for n, x in steps) + self._reach
        return max(last + 1, 0)


def _rise(numbers: torch.Tensor) -> tuple[int, int]:
    """The first of numbers on the host, and what they rise by each time; 0 if not evenly."""
    found = numbers.numpy()
    if found.size < 2:
        return int(found[0]), 1
    first = int(found[0])
    step = int(found[1] - found[0])
    # Most lists that are in no order end here.
    if step < 1 or found[-1] - first != step * (found.size - 1) or (np.diff(found) != step).any():
        return first, 0
    return first, step


def _by_entry(
    mine: torch.Tensor | None, theirs: torch.Tensor | None, units: int
) -> Iterator[tuple[tuple[int, int], slice | torch.Tensor]]:
    """Units by the table entries of both sides, and the positions of each pair of entries."""
    if mine is None and theirs is None:
        yield (0, 0), slice(0, units)
        return
    # By numpy: torch would take more calls, each of which costs more.
    zero = np.zeros(units, dtype=np.int64)
    pairs = np.stack([zero if x is None else x.to(_HOST).numpy() for x in (mine, theirs)])
    order = np.lexsort(pairs[::-1])
    ends = np.flatnonzero((np.diff(pairs[:, order]) != 0).any(axis=0)) + 1
    for at in np.split(order, ends):
        first = int(at[0])
        last = int(at[-1])
        dense = last + 1 - first == at.size
        yield (
            tuple(pairs[:, first].tolist()),
            slice(first, last + 1) if dense else torch.from_numpy(at),
        )


# Rows of the host


def _pick_here(
    source: torch.Tensor, _: int, rows: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    if out is None:
        return source[rows]
    return torch.ops.aten.index.Tensor_out(source, [rows], out=out)  # type: ignore[no-any-return]


def _put_here(target: torch.Tensor, _: int, rows: torch.Tensor, source: torch.Tensor) -> None:
    target.index_put_((rows,), source)


def _copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    # Plain copies are of bytes, which torch gives to most of its threads.
    target.view(torch.uint8).copy_(source.view(torch.uint8))


#: What torch gives to several of its threads. Threads of the library's own would be slower to wake,
#: and would share the cores with torch's.
HOST_OPS = Ops(16, False, True, True, _pick_here, _put_here, _copy_bytes)


class HostRows:
    """Copies between rows of two forms on the host, which must not share memory; steps as a
    `CopyPlan` has them, and counts are multiples of ``unit``."""

    def __init__(self, src: Form, dst: Form, src_step: int, dst_step: int, unit: int) -> None:
        widest = CopyPlan(src, dst, src_step, dst_step)
        self._narrow = CopyPlan(src, dst, src_step, dst_step, unit)
        self._wide = widest if widest.unit > unit and widest.unit % unit == 0 else None
        self._nests = {
            plan.unit: [StridedCopy(nest, plan.unit, HOST_OPS) for nest in plan.nests]
            for plan in (self._narrow, self._wide or self._narrow)
        }

    def copy(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index, count: int
    ) -> None:
        """Copy ``count`` positions; ids must be on the host, and clean.

        Raises:
            LayoutError: the memory behind a view was freed or replaced.
        """
        src.check_memory()
        dst.check_memory()
        calls = list[_Planes]()
        start = 0
        move = Move(src, dst, src_index, dst_index, count)
        for unit, past in self._parts(src_index, dst_index, count):
            for nest in self._nests[unit]:
                calls += nest.planes(move.part(start, past - start))
            start = past
        # Every call is worked out before the first, so that nothing is written if one is refused.
        for call in calls:
            _run(HOST_OPS, False, *call)

    def _parts(self, src_index: Index, dst_index: Index, count: int) -> list[tuple[int, int]]:
        """Head, whole units and tail: the unit of each, and up to which position."""
        wide = self._wide
        narrow = self._narrow.unit
        if wide is None:
            return [(narrow, count)]
        sides = ("src", src_index), ("dst", dst_index)
        heads = {
            -index.offset % wide.unit
            for side, index in sides
            if index.ids is not None or wide.aligned(side)
        }
        if len(heads) > 1:  # the two sides never begin a unit at once
            return [(narrow, count)]
        head = min(heads.pop() if heads else 0, count)
        whole = (count - head) // wide.unit * wide.unit
        return [(narrow, head), (wide.unit, head + whole), (narrow, count)]
