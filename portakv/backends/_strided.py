# SPDX-License-Identifier: Apache-2.0
"""Any nest as whole rows: on each side a contiguous matrix over memory, and numbers of its rows.

A row is the longest piece that all strides of both sides are multiples of, so that neither matrix
ever has holes. CANN's index ops take a tensor with holes through a contiguous copy of all of it
(the flow in its header ``aclnn_index_select.h``: Contiguous, GatherV2, ViewCopy). For a cache that
costs its own size, and a scatter would put back old bytes over those that another stream has
written meanwhile. So holes are stepped over by numbers of rows instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import gcd, prod
from typing import TYPE_CHECKING

import torch

from portakv.plan.plan import Nest, Side

if TYPE_CHECKING:
    from portakv.view.index import Index
    from portakv.view.view import KVView

#: An opaque element for each width in bytes; there is none of 16 that CANN moves bit by bit.
ELEMENTS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
#: Writes rows of a matrix: (matrix, numbers, rows).
Scatter = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
#: Entries of both address tables, and the positions (None: all) whose units lie behind them.
_Pair = tuple[int, int, "torch.Tensor | None"]


class RowCopy:
    """One nest of a plan, copied by row numbers; a call of an op for each plane."""

    def __init__(self, nest: Nest, unit: int) -> None:
        width = min(nest.vector, 8)
        # A call for each plane: rows of one plane follow each other in a chunk.
        outer = [x for x in nest.loops if x.tabled or x.over_planes]
        inner = [x for x in nest.loops if x not in outer]
        strides = [s for x in inner for s in (x.src_stride, x.dst_stride)]
        strides += [x.stride for side in (nest.src, nest.dst) for x in side.units if not x.table]
        row = gcd(nest.run, *strides)
        steps = list(product(*(range(x.extent) for x in outer)))
        src = [(x.src_table, x.src_stride) for x in outer]
        dst = [(x.dst_table, x.dst_stride) for x in outer]
        pieces = [(nest.run // row, row, row)]
        walk = [(x.extent, x.src_stride, x.dst_stride) for x in inner] + pieces
        walk = [step for step in walk if step[0] > 1]
        self.src = _RowSide(nest.src, unit, row, width, [(n, s) for n, s, _ in walk],
                            [_move(at, src) for at in steps])  # fmt: skip
        self.dst = _RowSide(nest.dst, unit, row, width, [(n, d) for n, _, d in walk],
                            [_move(at, dst) for at in steps])  # fmt: skip

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        units: int,
        scatter: Scatter,
    ) -> None:
        """Copy ``units`` units; ``scatter`` writes rows where they do not follow each other."""
        # Torch refuses to index from a tensor into one that shares memory with it.
        within = src.overlaps(dst)
        apart = self.src.tabled or self.dst.tabled
        s = self.src.rows(src_index, units, src.device, apart)
        d = self.dst.rows(dst_index, units, dst.device, apart)
        for src_entry, dst_entry, picked in _by_entry(s, d):
            sources = self.src.matrices(src, src_entry, s)
            targets = self.dst.matrices(dst, dst_entry, d)
            srows, drows = s.picked(picked), d.picked(picked)
            for source, target in zip(sources, targets, strict=True):
                _copy(source, srows, target, drows, within, scatter)


def _move(at: tuple[int, ...], steps: list[tuple[int, int]]) -> tuple[int, int]:
    """Entries of the table and bytes that some steps of the outer loops move."""
    moved = list(zip(at, steps, strict=True))
    return sum(i * table for i, (table, _) in moved), sum(i * stride for i, (_, stride) in moved)


def _copy(
    source: torch.Tensor,
    srows: torch.Tensor | None,
    target: torch.Tensor,
    drows: torch.Tensor | None,
    within: bool,
    scatter: Scatter,
) -> None:
    if drows is None and srows is not None and not within:
        torch.index_select(source, 0, srows, out=target)
        return
    if srows is not None:
        source = source.index_select(0, srows)
    elif within:
        source = source.clone()
    if drows is None:
        target.copy_(source)
    else:
        scatter(target, drows, source)


class _Rows:
    """Row numbers of one side, ``[units, rows of a unit]``; None where all follow each other.

    ``entries`` is the table entry of each unit, or None where all lie behind one address; the
    matrix begins at byte ``start`` and has ``extent`` rows.
    """

    __slots__ = ("entries", "extent", "numbers", "start")

    def __init__(
        self,
        numbers: torch.Tensor | None,
        entries: torch.Tensor | None = None,
        start: int = 0,
        extent: int | None = None,
    ) -> None:
        self.numbers, self.entries, self.start, self.extent = numbers, entries, start, extent

    def picked(self, units: torch.Tensor | None) -> torch.Tensor | None:
        """The numbers of some units (None: of all), one behind the other."""
        if self.numbers is None or units is None:
            return None if self.numbers is None else self.numbers.reshape(-1)
        return self.numbers.index_select(0, units.to(self.numbers.device)).reshape(-1)


class _RowSide:
    """How the units of one side become rows of a matrix."""

    def __init__(
        self,
        side: Side,
        unit: int,
        row: int,
        width: int,
        walk: list[tuple[int, int]],
        moves: list[tuple[int, int]],
    ) -> None:
        self.side, self.unit, self.row, self.moves = side, unit, row, moves
        self.dtype, self.columns = ELEMENTS[width], row // width
        self.walk = [(extent, stride // row) for extent, stride in walk]
        self.tabled = side.tabled
        self.flat = len(side.units) == 1 and not self.tabled
        self.reach = sum((extent - 1) * stride for extent, stride in self.walk)
        # Whether the rows of a unit follow each other, and the next unit behind them.
        expected, follow = 1, self.flat
        for extent, stride in reversed(self.walk):
            follow, expected = follow and stride == expected, expected * extent
        self.dense = follow and side.units[0].stride == expected * row

    def rows(self, index: Index, units: int, device: torch.device, apart: bool) -> _Rows:
        """The rows that an index addresses; ``apart``: as numbers, whether or not in a row."""
        if index.ids is None and self.flat:
            unit, rest = divmod(index.offset, self.unit)
            stride = self.side.units[0].stride
            start = unit * stride + rest * (stride // self.unit)
            extent = (units - 1) * (stride // self.row) + self.reach + 1
            if self.dense and not apart:
                return _Rows(None, None, start, extent)
            at = torch.arange(units, device=device) * (stride // self.row)
            return _Rows(self._walked(at), None, start, extent)
        # Without ids the host knows the numbers: finding their entries then needs no device.
        home = torch.device("cpu") if index.ids is None and self.tabled else device
        number = index.units(units * self.unit, self.unit, home)
        entry, row = self.side.locate(number, self.row)
        return _Rows(self._walked(row.to(device)), entry)

    def _walked(self, row: torch.Tensor) -> torch.Tensor:
        """All rows of units that begin at ``row``, ``[units, rows of a unit]``."""
        rows = row[:, None]
        for extent, stride in self.walk:
            inner = torch.arange(extent, device=row.device) * stride
            rows = (rows[:, :, None] + inner).reshape(len(row), -1)
        return rows

    def matrices(self, view: KVView, entry: int, rows: _Rows) -> list[torch.Tensor]:
        """For each plane its matrix ``[rows, columns]``, contiguous, from ``entry`` on."""
        if rows.extent is not None:
            return self._matrices(view, entry, rows.start, rows.extent)
        view.check_memory()
        kept: list[torch.Tensor] | None = view.kept.get((self, entry))
        if kept is None:
            # One made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                kept = self._matrices(view, entry, 0, self._last_row(view.slots) + 1)
            view.kept[self, entry] = kept
        return kept

    def _matrices(self, view: KVView, entry: int, start: int, rows: int) -> list[torch.Tensor]:
        table, offset = self.side.table + entry, self.side.offset + start
        size, stride = [rows, self.columns], [self.columns, 1]
        return [view.strided(table + t, offset + b, self.dtype, size, stride)
                for t, b in self.moves]  # fmt: skip

    def _last_row(self, slots: int) -> int:
        bounded = self.side.units[1:]
        blocks = slots // self.unit // prod(step.extent for step in bounded)
        first = self.side.units[0]
        steps = [(step.extent, step) for step in bounded] + [(blocks, first)]
        rows = sum((n - 1) * (x.stride // self.row) for n, x in steps if not x.table)
        return rows + self.reach


def _by_entry(s: _Rows, d: _Rows) -> Iterator[_Pair]:
    """Group units by table entry on both sides: (entry, entry, units)."""
    if s.entries is None and d.entries is None:
        yield 0, 0, None
        return
    zero = torch.zeros(1, dtype=torch.int64)
    columns = [zero if x.entries is None else x.entries.cpu() for x in (s, d)]
    pairs = torch.stack(torch.broadcast_tensors(*columns))
    found, group = pairs.unique(dim=1, return_inverse=True)
    for i, (src, dst) in enumerate(found.T.tolist()):
        yield src, dst, (group == i).nonzero()[:, 0]
