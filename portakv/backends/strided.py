# SPDX-License-Identifier: Apache-2.0
"""Indexed copying by torch, for `reference`, for vendors' index ops and for rows of the host.

The rows of each side are the first dimension of strided tensors over its memory. A copy is then one
call of torch for each table entry and plane: `index_select`, a scatter, or `copy_`. There is no
loop over tokens. Ids must be clean: neither negative nor past the end.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain, groupby, product
from math import gcd, prod
from operator import itemgetter, mul
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from portakv.backends.base import MoveLaunch
from portakv.plan.plan import CopyPlan, Move, Nest, Side
from portakv.view.bound import BoundLayout
from portakv.view.form import Form, form_of
from portakv.view.index import Index
from portakv.view.view import KVView

#: An opaque element for each width in bytes; copying complex numbers moves bits.
ELEMENTS = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_HOST = torch.device("cpu")
#: For each plane the tensor over its rows; then the numbers of the rows, in order (None: all rows).
_Tensors = list[torch.Tensor]
_Picked = torch.Tensor | None
#: The extent and the stride of each dimension of a tensor, in elements.
_Steps = list[tuple[int, int]]
#: Planes at regular distances: the bytes before the first, and the dimensions that count planes.
_Grid = tuple[int, _Steps]
#: A tensor over planes, and the number of its first dimensions that count planes.
_Grids = tuple[torch.Tensor, int]
#: A view, or the chunk of one call.
_Source: TypeAlias = "KVView | ChunkRows"
Planes = tuple[_Tensors, _Picked, _Tensors, _Picked]


_WHOLE = "whole"  # of an entry of a view, for one side of a nest


class Ops(NamedTuple):
    """The torch calls that copy on a device.

    Attributes:
        widest: bytes of the widest element that it copies bit by bit.
        by_plane: one call for each plane; else strides lead over all planes of one address.
        holes: it indexes tensors with holes, so that a row is a whole unit. Else rows are pieces
            that all strides are multiples of, and the tensors have no holes. CANN's ops take a
            tensor with holes through a contiguous copy of all of it (the flow in its header
            ``aclnn_index_select.h``): for a cache that costs its own size, and a scatter would
            restore old bytes over those that another stream wrote meanwhile.
        evenly: ids on the host are inspected: evenly rising ids make a plain copy, which pays if
            torch gives plain copies to more threads. Units of several addresses are always
            inspected.
        select: picks rows: (source, 0, rows) and perhaps ``out``.
        put: writes rows: (target, 0, rows, source).
        copy: copies all rows: (target, source).
        nested: `select` and `put` take numbers of rows in any shape. Rows of the other side which
            lie in loops then need neither numbers nor a separate call.
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


class ChunkRows:
    """The rows of a chunk for one call, as torch calls read those of a view.

    Args:
        bound: the layout of the chunk.
        chunk: its tensor.
        described: what `portakv_view_read_tensors` of ``core.h`` returns of the chunk.
    """

    raw = False
    temporary = True

    def __init__(self, bound: BoundLayout, chunk: torch.Tensor, described: tuple[Any, ...]) -> None:
        form, self._origins, _, _, self.slots, _ = described
        self.form: Form = form_of(form) if isinstance(form, bytes) else form
        self.device = chunk.device
        self.derived: dict[Hashable, Any] = {}
        self._bound = bound
        self._chunk = chunk
        self._described = described

    def strided(
        self,
        entry: int,
        offset: int,
        dtype: torch.dtype,
        size: Sequence[int],
        stride: Sequence[int],
    ) -> torch.Tensor:
        """Return a tensor over rows, as `KVView.strided` does."""
        storage = self._chunk.untyped_storage()
        start = self._origins[entry] + offset - storage.data_ptr()
        empty = torch.empty(0, dtype=dtype, device=self.device)
        return empty.set_(storage, start // dtype.itemsize, size, stride)

    @property
    def view(self) -> KVView:
        """Return the chunk as a view."""
        _, origins, owners, spans, slots, grad = self._described
        facts = (self.form, origins, owners, spans), slots, self.device, grad
        return KVView.through(self._bound, self._chunk, facts=facts)


class Units(NamedTuple):
    """The units of one side of a copy.

    Attributes:
        rows: a view, or a chunk.
        numbers: the number of each unit, int64 on the device of the view; None: consecutive units.
        offset: tokens before the first of consecutive units.
    """

    rows: _Source
    numbers: torch.Tensor | None
    offset: int

    @classmethod
    def of(cls, view: KVView, index: Index, count: int, unit: int) -> Units:
        """Return the units that an index names for ``count`` tokens."""
        if index.ids is None:
            return cls(view, None, index.offset)
        return cls(view, index.units(count, unit, view.device), 0)


class StridedCopy:
    """One nest of a plan, whose units are ``unit`` tokens, as torch calls.

    ``lasting``: views retain the tensors that this copy makes of them, for later calls.
    """

    def __init__(self, nest: Nest, unit: int, ops: Ops, lasting: bool = True) -> None:
        self._unit = unit
        self._ops = ops
        self._src = _Rows(nest, "src", unit, ops, lasting)
        self._dst = _Rows(nest, "dst", unit, ops, lasting)

    def __call__(self, move: Move) -> None:
        """Copy whole units, ordered on the current stream of their device."""
        within = move.src.overlaps(move.dst)
        for planes in self.planes(move):
            _run(self._ops, within, *planes)

    def copy(self, src: Units, dst: Units, units: int) -> None:
        """Copy so many units between views that share no memory, ordered as a call."""
        for planes in self._planes(src, dst, units):
            _run(self._ops, False, *planes)

    def planes(self, move: Move) -> Iterator[Planes]:
        """Yield the planes to copy and their rows; raises as `KVView.strided` does."""
        src, dst, src_index, dst_index, count = move
        unit = self._unit
        if count < unit:
            return
        src_units = Units.of(src, src_index, count, unit)
        dst_units = Units.of(dst, dst_index, count, unit)
        yield from self._planes(src_units, dst_units, count // unit)

    def _planes(self, src: Units, dst: Units, units: int) -> Iterator[Planes]:
        """Yield the planes of so many units as `planes` does."""
        if self._ops.nested and (nested := self._nested(src, dst, units)):
            yield nested
            return
        start, number, entries = self._src.find(src, units)
        to_start, to_number, to_entries = self._dst.find(dst, units)
        for (entry, to_entry), at in _by_entry(entries, to_entries, units):
            yield (
                *self._src.tensors(src.rows, entry, start, number, at),
                *self._dst.tensors(dst.rows, to_entry, to_start, to_number, at),
            )

    def _nested(self, src: Units, dst: Units, units: int) -> Planes | None:
        """Return the planes as `planes` does, if one side has ids and the other's units lie in
        loops."""
        gather = dst.numbers is None
        sides = (self._src, src), (self._dst, dst)
        (rows, listed), (other, even) = sides if gather else sides[::-1]
        if listed.numbers is None or even.numbers is not None or rows.tabled:
            return None
        loops = other.loops(even.offset, units)
        if loops is None:
            return None
        start, number, _ = rows.find(listed, units)
        indexed_planes, picked = rows.tensors(listed.rows, 0, start, number, slice(0, units))
        assert picked is not None  # this side has ids, and its device does not inspect them
        picked = picked.view([extent for extent, _ in loops[1]])
        loop_planes = other.over(even.rows, 0, *loops)
        return (
            (indexed_planes, picked, loop_planes, None)
            if gather
            else (loop_planes, None, indexed_planes, picked)
        )


class StridedLaunch(MoveLaunch):
    """A plan as torch calls, which the library also calls by numbers of units."""

    tables = False, False

    def __init__(self, plan: CopyPlan, ops: Ops) -> None:
        self._copies = [StridedCopy(nest, plan.unit, ops) for nest in plan.nests]

    def carry(self, move: Move, status: torch.Tensor | None) -> None:
        for copy in self._copies:
            copy(move)

    def copy(self, src: Units, dst: Units, units: int) -> None:
        """Copy so many units between views that share no memory, on the current stream."""
        for copy in self._copies:
            copy.copy(src, dst, units)


class Copies:
    """Copies of rows by torch, one after another. The views retain nothing of them.

    Args:
        move: one of the copies; all have its forms and steps.
    """

    def __init__(self, move: Move, ops: Ops) -> None:
        self._ends = move.src.form, move.dst.form, *move.steps
        self._plan = CopyPlan(*self._ends)
        self._ops = ops
        self._by_unit: dict[int, list[StridedCopy]] = {}

    def of(self, move: Move) -> Iterator[tuple[StridedCopy, Move]]:
        """Yield copies that make a copy together, each with its part: the body in the largest
        units, head and tail by token."""
        for first, tokens, unit in self._plan.split(move):
            made = self._by_unit.get(unit)
            if made is None:
                plan = self._plan if unit == self._plan.unit else CopyPlan(*self._ends, unit)
                made = [StridedCopy(nest, unit, self._ops, lasting=False) for nest in plan.nests]
                self._by_unit[unit] = made
            part = move.part(first, tokens)
            for copy in made:
                yield copy, part


def _run(
    ops: Ops, within: bool, sources: _Tensors, read: _Picked, targets: _Tensors, written: _Picked
) -> None:
    """Copy rows of each plane; ``within``: both sides share memory, in which torch cannot index."""
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


def _grids(moves: list[int], width: int) -> list[_Grid]:
    """Return planes at distances in bytes as one grid; if they form none, each plane as a separate
    grid. Strides are in elements of a width."""
    number = len(moves)
    first = moves[0]
    for each in (n for n in range(1, number + 1) if number % n == 0):
        far = moves[each] - first if each < number else 0
        near = moves[1] - first if each > 1 else 0
        rows = number // each
        made = [first + row * far + at * near for row in range(rows) for at in range(each)]
        if made == moves and min(near, far) >= 0:
            steps = (each, near), (rows, far)
            return [(first, [(extent, step // width) for extent, step in steps if extent > 1])]
    return [(move, []) for move in moves]


class _Rows:
    """The rows that the units of one side become.

    With ``Ops.holes`` a unit is a row ``[loops..., run]``. Units of split axes (block, then token)
    then have numbers by the common divisor of their strides. The tensor overlaps itself, but only
    rows that are units are ever touched. Without holes, rows are the longest piece that all strides
    of both sides are multiples of, and a unit takes several rows, which the loops walk through.
    """

    def __init__(self, nest: Nest, name: str, unit: int, ops: Ops, lasting: bool) -> None:
        outer = [x for x in nest.loops if x.tabled or (ops.by_plane and x.over_planes)]
        inner = [x for x in nest.loops if x not in outer]
        side: Side = getattr(nest, name)
        width = min(nest.vector, ops.widest)
        loops = [(x.extent, getattr(x, f"{name}_stride")) for x in inner]
        self._side = side
        self._unit = unit
        self._width = width
        self._lasting = lasting
        self._dtype = ELEMENTS[width]
        self._flat = len(side.units) == 1 and not side.tabled
        self._pitch = side.units[0].stride if self._flat else 0
        # The extents and strides of a row, in elements; the loops from a unit's first row to its
        # other rows, in rows; and the bytes that numbers of rows are counted in.
        self._walk: _Steps = []
        if ops.holes:
            self._row = [*((extent, stride // width) for extent, stride in loops)]
            self._row.append((nest.run // width, 1))
            self._grain = gcd(*(step.stride for step in side.units)) or width
        else:
            self._grain = row = gcd(
                nest.run,
                *(step.stride for each in nest.sides for step in each.units),
                *(stride for x in inner for stride in (x.src_stride, x.dst_stride)),
            )
            self._row = [(row // width, 1)]
            self._walk = [(n, s // row) for n, s in (*loops, (nest.run // row, row)) if n > 1]
        extents = [extent for extent, _ in self._walk]
        # The rows of a unit, and the distance from the first to the last, in grains.
        self._each = prod(extents)
        self._reach = sum((extent - 1) * stride for extent, stride in self._walk)
        follow = all(
            stride == prod(extents[depth + 1 :]) for depth, (_, stride) in enumerate(self._walk)
        )
        # True if the rows of a unit follow each other, and the next unit follows them.
        self._dense = ops.holes or (follow and self._pitch == self._each * self._grain)
        # From a row of consecutive units to the next in bytes, and from a unit to the next in rows.
        self._near = self._pitch if ops.holes else self._grain
        self._apart = 1 if ops.holes else self._pitch // self._grain
        # Each of several addresses has few units, often in order.
        self._evenly = (ops.evenly or side.tabled) and not self._walk
        places = product(*(range(x.extent) for x in outer))
        tables = [getattr(x, f"{name}_table") for x in outer]
        strides = [getattr(x, f"{name}_stride") for x in outer]
        moves = [(sum(map(mul, at, tables)), sum(map(mul, at, strides))) for at in places]
        #: For each entry of the table in turn the grids of its planes.
        self._planes = [
            (table, _grids([move for _, move in group], width))
            for table, group in groupby(moves, itemgetter(0))
        ]

    @property
    def tabled(self) -> bool:
        """True if a unit's number decides which entry of the table its address comes from."""
        return self._side.tabled

    def find(self, side: Units, units: int) -> tuple[int, torch.Tensor | None, torch.Tensor | None]:
        """Locate so many units.

        Returns (byte of the first unit, None, None) if the units follow each other. Otherwise
        returns 0, the numbers of the units in grains from the address of their entries, and the
        entries (None: the first entry).
        """
        numbers = side.numbers
        if numbers is None:
            first, rest = divmod(side.offset, self._unit)
            if self._flat:
                return first * self._pitch + rest * (self._pitch // self._unit), None, None
            # The host locates the entries of consecutive units without a device.
            place = _HOST if self._side.tabled else side.rows.device
            numbers = torch.arange(first, first + units, dtype=torch.int64, device=place)
        elif self._flat:
            factor = self._pitch // self._grain
            return 0, numbers if factor == 1 else numbers * factor, None
        entries, numbers = self._side.locate(numbers, self._grain)
        return 0, numbers.to(side.rows.device), entries

    def loops(self, offset: int, units: int) -> tuple[int, list[tuple[int, int]]] | None:
        """Return so many consecutive units from token ``offset`` on, as loops.

        Returns the byte that the first unit begins at, and the extent and pitch in bytes of each
        loop. None if they begin or end inside a loop.
        """
        first, *bounded = self._side.units
        inner = prod(step.extent for step in bounded)
        begin, rest = divmod(offset, self._unit * inner)
        if rest or units % inner or not bounded or self.tabled:
            return None
        sizes = [(units // inner, first.stride), *((x.extent, x.stride) for x in bounded)]
        return begin * first.stride, sizes

    def tensors(
        self,
        view: _Source,
        entry: int,
        start: int,
        numbers: _Picked,
        at: slice | torch.Tensor,
    ) -> tuple[_Tensors, _Picked]:
        """Return for each plane the tensor over rows of an entry, and the rows of the units ``at``
        (None: all)."""
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
        made = self._tensors_of(view)
        key = (self, entry)
        known: _Tensors | None = made.get(key)
        if known is None:
            known = made[key] = _unbound(self._whole(view, entry))
        return known, self._walked(numbers) if self._walk else numbers

    def _tensors_of(self, view: _Source) -> dict[Hashable, Any]:
        """Return the tensors that a view keeps; none if it keeps none of this copy."""
        return view.derived if self._lasting else {}

    def _whole(self, view: _Source, entry: int) -> list[_Grids]:
        """Return tensors over all rows of an entry."""
        made = self._tensors_of(view)
        key = (self, entry, _WHOLE)
        known: list[_Grids] | None = made.get(key)
        if known is None:
            # A tensor made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                loops = [(self._rows_of(view), self._grain)]
                known = made[key] = self._over(view, entry, 0, loops)
        return known

    def _consecutive(
        self, view: _Source, entry: int, start: int, at: slice | torch.Tensor
    ) -> tuple[_Tensors, _Picked]:
        """Return the tensors and rows of units that follow each other from byte ``start`` on."""
        if isinstance(at, slice):
            if self._dense:
                start = start + at.start * self._pitch
                rows = (at.stop - at.start) * self._each
                return self._part(view, entry, start, rows), None
            at = torch.arange(at.start, at.stop)
        at = at * self._apart
        rows = int(at[-1]) + self._reach + 1
        at = at.to(view.device)
        return self.over(view, entry, start, [(rows, self._near)]), self._walked(at)

    def _part(self, view: _Source, entry: int, start: int, rows: int) -> _Tensors:
        """Return the tensors over so many rows that follow each other from byte ``start`` on."""
        whole: list[_Grids] | None = None
        if self._lasting and self._near == self._grain and start % self._near == 0:
            whole = view.derived.get((self, entry, _WHOLE))
            # How many rows lie at raw addresses may not be known. No later call uses a chunk.
            if whole is None and not (view.raw or view.temporary):
                whole = self._whole(view, entry)
        if whole is None:
            return self.over(view, entry, start, [(rows, self._near)])
        first = start // self._near
        return _unbound([(tensor.narrow(n, first, rows), n) for tensor, n in whole])

    def _walked(self, rows: torch.Tensor) -> torch.Tensor:
        """Return all rows of units that begin at ``rows``, unit after unit."""
        for extent, stride in self._walk:
            inner = torch.arange(extent, device=rows.device) * stride
            rows = (rows[:, None] + inner).reshape(-1)
        return rows

    def over(
        self, view: _Source, entry: int, start: int, loops: Sequence[tuple[int, int]]
    ) -> _Tensors:
        """Return for each plane the tensor over rows from byte ``start`` on.

        ``loops`` are the loops around the rows: their extents, and the bytes between their steps.
        """
        return _unbound(self._over(view, entry, start, loops))

    def _over(
        self, view: _Source, entry: int, start: int, loops: Sequence[tuple[int, int]]
    ) -> list[_Grids]:
        """Return the same as one tensor for each grid."""
        rows = [*((extent, pitch // self._width) for extent, pitch in loops), *self._row]
        entry = self._side.table + entry
        start = self._side.offset + start
        made = []
        for table, grids in self._planes:
            for first, planes in grids:
                shape = zip(*planes, *rows, strict=True)
                tensor = view.strided(entry + table, start + first, self._dtype, *shape)
                made.append((tensor, len(planes)))
        return made

    def _rows_of(self, view: _Source) -> int:
        """Return the number of rows of a view in one entry."""
        first, *bounded = self._side.units
        blocks = view.slots // self._unit // prod(step.extent for step in bounded)
        steps = [(blocks, first), *((step.extent, step) for step in bounded)]
        last: int = sum((n - 1) * (x.stride // self._grain) for n, x in steps) + self._reach
        return max(last + 1, 0)


def _unbound(grids: Sequence[_Grids]) -> _Tensors:
    """Return the tensor of each plane of tensors that have so many dimensions of planes."""
    planes: _Tensors = []
    for tensor, dimensions in grids:
        if dimensions == 0:
            planes.append(tensor)
        elif dimensions == 1:
            planes += tensor.unbind()
        else:
            # Few calls for many planes: one for each costs three times as much.
            columns = [each.unbind() for each in tensor.unbind()]
            planes += chain.from_iterable(zip(*columns, strict=True))
    return planes


def _rise(numbers: torch.Tensor) -> tuple[int, int]:
    """Return the first of some numbers on the host, and their even rise; 0 if it is not even."""
    values = numbers.numpy()
    if values.size < 2:
        return int(values[0]), 1
    first = int(values[0])
    step = int(values[1] - values[0])
    # Most lists without order end here.
    if (
        step < 1
        or values[-1] - first != step * (values.size - 1)
        or (np.diff(values) != step).any()
    ):
        return first, 0
    return first, step


def _by_entry(
    src_entries: torch.Tensor | None, dst_entries: torch.Tensor | None, units: int
) -> Iterator[tuple[tuple[int, int], slice | torch.Tensor]]:
    """Yield each pair of table entries of both sides, and the positions of its units."""
    if src_entries is None and dst_entries is None:
        yield (0, 0), slice(0, units)
        return
    # numpy needs fewer calls than torch, and each costs less.
    zero = np.zeros(units, dtype=np.int64)
    pairs = np.stack(
        [zero if x is None else x.to(_HOST).numpy() for x in (src_entries, dst_entries)]
    )
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


# --- rows of the host -----------------------------------------------------------------------------


def pick_in_any_shape(
    source: torch.Tensor, _: int, rows: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Call `torch.Tensor.index` with row numbers of any shape; ``out`` may have holes."""
    if out is None:
        return source[rows]
    return torch.ops.aten.index.Tensor_out(source, [rows], out=out)  # type: ignore[no-any-return]


def put_in_any_shape(
    target: torch.Tensor, _: int, rows: torch.Tensor, source: torch.Tensor
) -> None:
    """Call `Tensor.index_put_` with row numbers of any shape."""
    target.index_put_((rows,), source)


def _copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    # Torch gives copies of bytes to most of its threads.
    target.view(torch.uint8).copy_(source.view(torch.uint8))


#: Calls that torch divides among its threads. Threads of the library would be slower to wake, and
#: would share the cores with torch's.
HOST_OPS = Ops(16, False, True, True, pick_in_any_shape, put_in_any_shape, _copy_bytes)


def calls_on_host(copies: Copies, move: Move) -> list[Planes]:
    """Return the calls, for `copy_on_host`, that copy rows of the host between views that share no
    memory; ids must be on the host, and clean.

    ``copies``: of the same forms and steps, by `HOST_OPS`.

    Raises:
        LayoutError: the memory of a view was freed or replaced.
    """
    move.src.check_memory()
    move.dst.check_memory()
    return [call for copy, part in copies.of(move) for call in copy.planes(part)]


def copy_on_host(calls: Sequence[Planes]) -> None:
    """Copy rows on the host, ready when it returns."""
    for call in calls:
        _run(HOST_OPS, False, *call)
