# SPDX-License-Identifier: Apache-2.0
"""`reference`: plain tensor indexing, short enough to trust at sight, on any torch device.

Each side of a nest becomes one strided tensor ``[units, loops..., run]`` for each entry of the
address table, its elements as wide as the plan's vector; the copy is then ``index_select``,
``index_copy_`` or ``copy_``. There is no loop over tokens. Ids must be clean: neither negative nor
past the end (the caller of a launch sees to it, because this backend claims neither).
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from math import gcd, prod
from typing import TYPE_CHECKING, Any

import torch

from portakv.backends.base import Backend, Capabilities, Decision, Launch
from portakv.plan.plan import CopyPlan, Nest, Side

if TYPE_CHECKING:
    from portakv.view.index import Index
    from portakv.view.view import KVView

# An opaque element for each vector width. Bytes are never indexed where a wider element fits:
# on a CPU index_copy_ on uint8 takes five times as long as on int64.
ELEMENTS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
# complex128 is torch's only 16-byte dtype; copying it moves bits, but not every vendor has it.
WIDE_DEVICES = ("cpu", "cuda")
_HOST = ("pageable", "pinned")


class Reference(Backend):
    """Pure tensor indexing; always available."""

    name = "reference"

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        return Decision(cls.name, True, "plain torch indexing runs on any torch device")

    def capabilities(self) -> Capabilities:
        host = self.device.type == "cpu"
        places = product(_HOST, _HOST) if host else [("device", "device")]
        return Capabilities(places=frozenset(places))

    def prepare(self, plan: CopyPlan) -> Launch:
        return _IndexingLaunch(plan, self.device)


class _IndexingLaunch:
    def __init__(self, plan: CopyPlan, device: torch.device) -> None:
        self.unit = plan.unit
        self.copies = [_NestCopy(nest, plan.unit, device) for nest in plan.nests]

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> None:
        with on_stream(stream), torch.no_grad():
            for copy in self.copies:
                copy(src, dst, src_index, dst_index, count // self.unit)


def on_stream(stream: torch.Stream | None) -> Any:
    """A context in which torch orders its work on ``stream``."""
    if stream is None:
        return nullcontext()
    return torch.get_device_module(stream.device).stream(stream)


class _NestCopy:
    """One nest as torch calls: at most one for each plane."""

    def __init__(self, nest: Nest, unit: int, device: torch.device) -> None:
        width = nest.vector if device.type in WIDE_DEVICES else min(nest.vector, 8)
        self.dtype = torch.complex128 if width == 16 else ELEMENTS[width]
        # A CPU is faster with a call for each plane than with strides over all of them.
        apart = device.type == "cpu"
        outer = [x for x in nest.loops if x.tabled or (apart and x.over_planes)]
        inner = [x for x in nest.loops if x not in outer]
        size = [x.extent for x in inner] + [nest.run // width]
        steps = list(product(*(range(x.extent) for x in outer)))
        src_moves = [_move(at, [(x.src_table, x.src_stride) for x in outer]) for at in steps]
        dst_moves = [_move(at, [(x.dst_table, x.dst_stride) for x in outer]) for at in steps]
        src_stride = [x.src_stride // width for x in inner] + [1]
        dst_stride = [x.dst_stride // width for x in inner] + [1]
        self.src = _SideRows(nest.src, unit, width, self.dtype, size, src_stride, src_moves)
        self.dst = _SideRows(nest.dst, unit, width, self.dtype, size, dst_stride, dst_moves)

    def __call__(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index, units: int
    ) -> None:
        # Torch refuses to index from a tensor into one that shares memory with it.
        within = src.overlaps(dst)
        s = self.src.rows(src_index, units, src.device)
        d = self.dst.rows(dst_index, units, dst.device)
        for src_entry, dst_entry, picked in _by_entry(s, d):
            sources = self.src.tensors(src, src_entry, s, units)
            targets = self.dst.tensors(dst, dst_entry, d, units)
            srows, drows = s.pick(picked, src.device), d.pick(picked, dst.device)
            for source, target in zip(sources, targets, strict=True):
                _copy(source, srows, target, drows, within)


def _move(at: tuple[int, ...], steps: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(i * t for i, (t, _) in zip(at, steps, strict=True)), sum(
        i * b for i, (_, b) in zip(at, steps, strict=True)
    )


def _copy(
    source: torch.Tensor,
    srows: torch.Tensor | None,
    target: torch.Tensor,
    drows: torch.Tensor | None,
    within: bool,
) -> None:
    if drows is None and srows is not None and not within:
        torch.index_select(source, 0, srows, out=target)
        return
    if srows is not None:
        picked = source.index_select(0, srows)
    else:
        picked = source.clone() if within else source
    if drows is None:
        target.copy_(picked)
    else:
        target.index_copy_(0, drows, picked)


class _Rows:
    """Rows of one side: ``ids`` is None where they follow each other from byte ``start`` on.

    ``entries`` is the table entry of each row, or None where all rows lie behind one address.
    """

    __slots__ = ("entries", "ids", "start")

    def __init__(
        self, ids: torch.Tensor | None, entries: torch.Tensor | None, start: int = 0
    ) -> None:
        self.ids, self.entries, self.start = ids, entries, start

    def pick(self, picked: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """The rows at some positions (None: all), or None where they follow each other."""
        if picked is None:
            return self.ids
        return picked.to(device) if self.ids is None else self.ids[picked.to(device)]


class _SideRows:
    """How the units of one side become rows of strided tensors.

    Units of split axes (block, then token) become one row number by the common divisor of their
    strides: the strided tensor overlaps itself, but only rows that are units are ever touched.
    """

    def __init__(
        self,
        side: Side,
        unit: int,
        width: int,
        dtype: torch.dtype,
        size: list[int],
        stride: list[int],
        moves: list[tuple[int, int]],
    ) -> None:
        self.side, self.unit, self.width, self.dtype = side, unit, width, dtype
        self.size, self.moves = size, moves
        self.grain = gcd(*(step.stride for step in side.units if not step.table)) or width
        self.stride = stride
        self.tabled = side.tabled
        self.flat = len(side.units) == 1 and not self.tabled
        self.plain = self.flat and self.grain == side.units[0].stride

    def rows(self, index: Index, units: int, device: torch.device) -> _Rows:
        """The rows that an index addresses."""
        if index.ids is None and self.flat:
            unit, rest = divmod(index.offset, self.unit)
            stride = self.side.units[0].stride
            return _Rows(None, None, unit * stride + rest * (stride // self.unit))
        # Without ids the numbers are known to the host: finding their entries needs no device.
        home = torch.device("cpu") if index.ids is None and self.tabled else device
        number = index.units(units * self.unit, self.unit, home)
        if self.plain:
            return _Rows(number, None)
        entry, row = self.side.locate(number, self.grain)
        return _Rows(row.to(device), entry)

    def tensors(self, view: KVView, entry: int, rows: _Rows, units: int) -> list[torch.Tensor]:
        """For each move, the strided tensor ``[rows, loops..., run]`` that begins at ``entry``."""
        if rows.ids is None:
            return self._strided(view, entry, rows.start, units, self.side.units[0].stride)
        view.check_memory()
        kept = view.kept.get((self, entry))
        if kept is None:
            last = self._last_row(view.slots)
            # One made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                kept = view.kept[self, entry] = self._strided(view, entry, 0, last + 1, self.grain)
        return kept

    def _strided(
        self, view: KVView, entry: int, start: int, rows: int, grain: int
    ) -> list[torch.Tensor]:
        side, size, stride = self.side, [rows, *self.size], [grain // self.width, *self.stride]
        return [
            view.strided(side.table + entry + t, side.offset + start + b, self.dtype, size, stride)
            for t, b in self.moves
        ]

    def _last_row(self, slots: int) -> int:
        bounded = self.side.units[1:]
        blocks = slots // self.unit // prod(step.extent for step in bounded)
        row = sum((x.extent - 1) * (x.stride // self.grain) for x in bounded if not x.table)
        first = self.side.units[0]
        return row + (0 if first.table else (blocks - 1) * (first.stride // self.grain))


def _by_entry(s: _Rows, d: _Rows) -> list[tuple[int, int, torch.Tensor | None]]:
    """Group positions by table entry on both sides: (src entry, dst entry, positions)."""
    if s.entries is None and d.entries is None:
        return [(0, 0, None)]
    first = torch.zeros(1, dtype=torch.int64, device="cpu")
    columns = [first if x.entries is None else x.entries.cpu() for x in (s, d)]
    pairs = torch.stack(torch.broadcast_tensors(*columns))
    found, group = pairs.unique(dim=1, return_inverse=True)
    return [
        (int(found[0, i]), int(found[1, i]), (group == i).nonzero()[:, 0])
        for i in range(found.shape[1])
    ]
