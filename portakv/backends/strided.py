# SPDX-License-Identifier: Apache-2.0
"""Indexed copying by torch, for `reference`, for vendors' index ops and for rows of the host.

The rows of each side are the first dimension of strided tensors over its memory, so that a copy is
one call of torch for each table entry and plane: `index_select`, a scatter, or `copy_`. There is no
loop over tokens. Ids must be clean: neither negative nor past the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from math import gcd, prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from portakv.plan.plan import CopyPlan, Nest, Side

if TYPE_CHECKING:
    from portakv.view.form import Form
    from portakv.view.index import Index
    from portakv.view.view import KVView

#: An opaque element for each width in bytes; copying complex numbers moves bits.
ELEMENTS = {
    16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8
}  # fmt: skip
_HOST = torch.device("cpu")


def _index_select(
    source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    return torch.index_select(source, 0, rows, out=out)


def _index_copy(target: torch.Tensor, rows: torch.Tensor, source: torch.Tensor) -> None:
    target.index_copy_(0, rows, source)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


class Ops(NamedTuple):
    """How a device copies.

    Attributes:
        widest: bytes of the widest element that it copies bit by bit.
        by_plane: a call for each plane; else strides lead over all planes of one address.
        holes: it indexes tensors with holes, so that a row is a whole unit; else rows are pieces
            that all strides are multiples of, and the tensors have no holes. CANN's ops take one
            with holes through a contiguous copy of all of it (the flow in its header
            ``aclnn_index_select.h``): for a cache that costs its own size, and a scatter would put
            back old bytes over those that another stream has written meanwhile.
        evenly: ids on the host are looked at: those that rise evenly make a plain copy, which pays
            if torch gives plain copies to more threads.
        select: picks rows: (source, rows, out or None).
        put: writes rows: (target, rows, source).
        copy: copies all rows: (target, source).
    """

    widest: int = 8
    by_plane: bool = False
    holes: bool = True
    evenly: bool = False
    select: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] = (
        _index_select
    )
    put: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object] = _index_copy
    copy: Callable[[torch.Tensor, torch.Tensor], object] = _copy


class _Call(NamedTuple):
    """One copy: of what, which rows of it (None: all in their order), and to where."""

    source: torch.Tensor
    source_rows: torch.Tensor | None
    target: torch.Tensor
    target_rows: torch.Tensor | None

    def run(self, ops: Ops, within: bool) -> None:
        """Copy; ``within``: source and target share memory, which torch refuses to index in."""
        source, mine, target, theirs = self
        if theirs is None and mine is not None and not within:
            ops.select(source, mine, target)
            return
        if mine is not None:
            source = ops.select(source, mine, None)
        elif within:
            source = source.clone()
        if theirs is None:
            ops.copy(target, source)
        else:
            ops.put(target, theirs, source)


class StridedCopy:
    """One nest of a plan as torch calls.

    Args:
        nest: the loop nest.
        unit: tokens of a unit.
        ops: how the device copies.
    """

    def __init__(self, nest: Nest, unit: int, ops: Ops) -> None:
        self._ops, width = ops, min(nest.vector, ops.widest)
        outer = [x for x in nest.loops if x.tabled or (ops.by_plane and x.over_planes)]
        inner = [x for x in nest.loops if x not in outer]
        places = list(product(*(range(x.extent) for x in outer)))
        src_steps = [(x.src_table, x.src_stride) for x in outer]
        dst_steps = [(x.dst_table, x.dst_stride) for x in outer]
        src_loops = [(x.extent, x.src_stride) for x in inner]
        dst_loops = [(x.extent, x.dst_stride) for x in inner]
        row = 0 if ops.holes else _row(nest, [s for _, s in (*src_loops, *dst_loops)])
        shape = unit, nest.run, width, row, ops.evenly
        self._src = _Rows(nest.src, src_loops, *shape)
        self._dst = _Rows(nest.dst, dst_loops, *shape)
        self._moves = [(_moved(src_steps, at), _moved(dst_steps, at)) for at in places]

    def __call__(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index, units: int
    ) -> None:
        """Copy ``units`` units, ordered on the current stream of their device."""
        within = src.overlaps(dst)
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            for call in self.calls(src, dst, src_index, dst_index, units):
                call.run(self._ops, within)

    def calls(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index, units: int
    ) -> Iterator[_Call]:
        """The copies of ``units`` units; raises as `KVView.strided` does."""
        if not units:
            return
        mine = self._src.of(src_index, units, src.device)
        theirs = self._dst.of(dst_index, units, dst.device)
        for entries, picked in _by_entry(mine, theirs):
            source, read = self._src.tensors(src, entries[0], mine, picked)
            target, written = self._dst.tensors(dst, entries[1], theirs, picked)
            for from_move, to_move in self._moves:
                yield _Call(source(from_move), read, target(to_move), written)


def _row(nest: Nest, strides: Iterable[int]) -> int:
    """Bytes of the longest piece that all strides of both sides are multiples of."""
    units = [step.stride for side in (nest.src, nest.dst) for step in side.units]
    return gcd(nest.run, *strides, *units)


def _moved(steps: list[tuple[int, int]], at: tuple[int, ...]) -> tuple[int, int]:
    """Entries of the table and bytes that a place in loops is away from their beginning."""
    walked = list(zip(at, steps, strict=True))
    return sum(i * table for i, (table, _) in walked), sum(i * stride for i, (_, stride) in walked)


class _Picked(NamedTuple):
    """Some of a copy's units: ``number`` from ``first`` on, or (``at``) those at positions."""

    first: int
    number: int
    at: torch.Tensor | None = None


class _Found(NamedTuple):
    """Where the units of one side begin, counted in grains behind the address of ``entries`` (None:
    of the first). Without ``numbers`` they follow each other from byte ``start`` on."""

    units: int
    start: int
    numbers: torch.Tensor | None
    entries: torch.Tensor | None


class _Tensors(NamedTuple):
    """Over the rows of one side: what makes the tensor of a plane, and which rows of it (None:
    all)."""

    moved: Callable[[tuple[int, int]], torch.Tensor]
    rows: torch.Tensor | None


class _Rows:
    """How the units of one side become rows.

    ``row`` 0: a unit is a row ``[loops..., run]``, so that units of split axes (block, then token)
    have numbers by the common divisor of their strides; the tensor overlaps itself, but only rows
    that are units are ever touched. Else rows have ``row`` bytes, and a unit takes several, which
    the loops walk through.
    """

    def __init__(
        self, side: Side, loops: list[tuple[int, int]], unit: int, run: int, width: int, row: int,
        evenly: bool,
    ) -> None:  # fmt: skip
        self._evenly = evenly
        self._side, self._unit, self._dtype = side, unit, ELEMENTS[width]
        self._flat = len(side.units) == 1 and not side.tabled
        self._pitch = side.units[0].stride if self._flat else 0
        if row:
            walk = [(n, s // row) for n, s in (*loops, (run // row, row)) if n > 1]
            inner, self._grain, self._walk = [(row // width, 1)], row, walk
        else:
            inner, self._walk = [*((n, s // width) for n, s in loops), (run // width, 1)], []
            self._grain = gcd(*(step.stride for step in side.units)) or width
        self._width, self._size = width, [n for n, _ in inner]
        self._stride = [s for _, s in inner]
        self._reach = sum((n - 1) * s for n, s in self._walk)
        # Whether the rows of a unit follow each other, and the next unit behind them.
        packed, self._each = True, 1
        for extent, stride in reversed(self._walk):
            packed, self._each = packed and stride == self._each, self._each * extent
        self._dense = not row or (packed and self._pitch == self._each * row)

    def of(self, index: Index, units: int, device: torch.device) -> _Found:
        """Where the units lie that an index names."""
        if index.ids is None and self._flat:
            first, rest = divmod(index.offset, self._unit)
            start = first * self._pitch + rest * (self._pitch // self._unit)
            return _Found(units, start, None, None)
        # Without ids the host knows the numbers: finding their entries then needs no device.
        home = _HOST if index.ids is None and self._side.tabled else device
        number = index.units(units * self._unit, self._unit, home)
        entries, numbers = self._side.locate(number, self._grain)
        return _Found(units, 0, numbers.to(device), entries)

    def tensors(self, view: KVView, entry: int, found: _Found, picked: _Picked) -> _Tensors:
        """The tensor over picked units, all behind one entry of the table."""
        if found.numbers is None:
            return self._consecutive(view, entry, found, picked)
        numbers = found.numbers[picked.first : picked.first + picked.number]
        if picked.at is not None:
            numbers = found.numbers.index_select(0, picked.at.to(found.numbers.device))
        if self._evenly and not self._walk and (step := _step(numbers)):
            pitch, start = step * self._grain, int(numbers[0]) * self._grain
            return self._over(view, entry, start, pitch, picked.number, None)
        view.check_memory()
        return _Tensors(self._kept(view, entry), self._walked(numbers))

    def _consecutive(self, view: KVView, entry: int, found: _Found, picked: _Picked) -> _Tensors:
        """Units that follow each other; those at positions, where they are picked by them."""
        at, step = picked.at, self._pitch // self._grain
        if self._dense and at is None:
            start = found.start + picked.first * self._pitch
            pitch = self._grain if self._walk else self._pitch
            return self._over(view, entry, start, pitch, picked.number * self._each, None)
        if at is None:
            at = torch.arange(picked.first, picked.first + picked.number, device=view.device)
        at = at.to(view.device)
        if self._dense and not self._walk:
            return self._over(view, entry, found.start, self._pitch, found.units, at)
        rows = (found.units - 1) * step + self._reach + 1
        return self._over(view, entry, found.start, self._grain, rows, self._walked(at * step))

    def _walked(self, row: torch.Tensor) -> torch.Tensor:
        """All rows of units that begin at ``row``, one behind the other."""
        rows = row
        for extent, stride in self._walk:
            inner = torch.arange(extent, device=row.device) * stride
            rows = (rows[:, None] + inner).reshape(-1)
        return rows

    def _over(
        self, view: KVView, entry: int, start: int, pitch: int, rows: int,
        picked: torch.Tensor | None,
    ) -> _Tensors:  # fmt: skip
        size, stride = [rows, *self._size], [pitch // self._width, *self._stride]
        table, offset = self._side.table + entry, self._side.offset + start

        def make(move: tuple[int, int]) -> torch.Tensor:
            return view.strided(table + move[0], offset + move[1], self._dtype, size, stride)

        return _Tensors(make, picked)

    def _kept(self, view: KVView, entry: int) -> Callable[[tuple[int, int]], torch.Tensor]:
        """The tensors over all rows behind an entry; kept with the view."""
        bounded = self._side.units[1:]
        blocks = view.slots // self._unit // prod(step.extent for step in bounded)
        steps = [(blocks, self._side.units[0]), *((step.extent, step) for step in bounded)]
        last = sum((n - 1) * (x.stride // self._grain) for n, x in steps) + self._reach
        make = self._over(view, entry, 0, self._grain, max(last + 1, 0), None).moved

        def known(move: tuple[int, int]) -> torch.Tensor:
            key = (self, entry, move)
            tensor: torch.Tensor | None = view.derived.get(key)
            if tensor is None:
                tensor = view.derived[key] = make(move)
            return tensor

        return known


def _step(numbers: torch.Tensor) -> int:
    """What numbers on the host rise by each time; 0 if they do not rise evenly."""
    if numbers.numel() < 2:
        return 1
    step = int(numbers[1] - numbers[0])
    return step if step > 0 and bool((numbers.diff() == step).all()) else 0


def _by_entry(mine: _Found, theirs: _Found) -> Iterator[tuple[tuple[int, int], _Picked]]:
    """Group units by the table entries of both sides."""
    if mine.entries is None and theirs.entries is None:
        yield (0, 0), _Picked(0, mine.units)
        return
    zero = torch.zeros(1, dtype=torch.int64, device=_HOST)
    columns = [zero if x.entries is None else x.entries.to(_HOST) for x in (mine, theirs)]
    pairs = torch.stack(torch.broadcast_tensors(*columns))
    found, group = pairs.unique(dim=1, return_inverse=True)
    for i, (src, dst) in enumerate(found.T.tolist()):
        at = (group == i).nonzero()[:, 0]
        first, count = int(at[0]), at.numel()
        together = int(at[-1]) - first + 1 == count
        yield (src, dst), _Picked(first, count, None if together else at)


# Rows of the host


def _pick_here(source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return source[rows]
    return torch.ops.aten.index.Tensor_out(source, [rows], out=out)  # type: ignore[no-any-return]


def _put_here(target: torch.Tensor, rows: torch.Tensor, source: torch.Tensor) -> None:
    target.index_put_((rows,), source)


def _copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    # Plain copies are of bytes, which torch gives to most of its threads.
    target.view(torch.uint8).copy_(source.view(torch.uint8))


#: What torch gives to several of its threads. It has threads for the caller: others would be slower
#: to wake, and would share the cores with those.
_HERE = Ops(16, False, True, True, _pick_here, _put_here, _copy_bytes)


class HostRows:
    """Copies between rows of two forms on the host; they must not share memory.

    Args:
        src, dst: the forms.
        src_step, dst_step: as a `CopyPlan` has them.
        unit: what counts are multiples of.
    """

    def __init__(self, src: Form, dst: Form, src_step: int, dst_step: int, unit: int) -> None:
        widest = CopyPlan(src, dst, src_step, dst_step)
        self._narrow = CopyPlan(src, dst, src_step, dst_step, unit)
        self._wide = widest if widest.unit > unit and widest.unit % unit == 0 else None
        self._nests = {
            plan.unit: [StridedCopy(nest, plan.unit, _HERE) for nest in plan.nests]
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
        calls, start = list[_Call](), 0
        # A tensor made in inference mode could not be written outside of it, as in another thread.
        with torch.inference_mode(False), torch.no_grad():
            for unit, past in self._parts(src_index, dst_index, count):
                mine, theirs = src_index.shifted(start), dst_index.shifted(start)
                for nest in self._nests[unit]:
                    calls += nest.calls(src, dst, mine, theirs, (past - start) // unit)
                start = past
            # All of them are settled, so that nothing was touched if memory is refused.
            for call in calls:
                call.run(_HERE, False)

    def _parts(self, src_index: Index, dst_index: Index, count: int) -> list[tuple[int, int]]:
        """Head, whole units and tail: the unit of each, and up to which position."""
        wide, narrow = self._wide, self._narrow.unit
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
