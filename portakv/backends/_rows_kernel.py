# SPDX-License-Identifier: Apache-2.0
"""The row kernel's text and arguments for a plan, whatever compiles and launches it.

What a model fixes becomes template parameters of ``native/cuda/rows.cuh``; what a request changes
becomes the argument ``Copy``, packed here as that file declares it.
"""

from __future__ import annotations

import struct
from functools import cache
from importlib.resources import files
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ..errors import Unsupported
from ..loops import Loop
from ..plan import CopyPlan, Nest, Side

if TYPE_CHECKING:
    from ..index import Index
    from ..view import KVView

NAME = "portakv_rows"
MAX_UNITS, MAX_OUTER, MAX_INNER = 3, 4, 6  # array lengths in `Side`
MAX_PLANES = 65535  # blocks along y
# Addresses that travel in the arguments: with both sides below the classic limit of 4 KiB.
MAX_ENTRIES = 192
_SIDE = struct.Struct("<6q")
_TAIL = struct.Struct("<4Iq")
_SIDE_BYTES = _SIDE.size + 16 * MAX_UNITS + 16 * MAX_OUTER + 8 * MAX_INNER
# Vectors of one launch are counted in 32 bits; a larger copy is split.
_MAX_VECTORS = 2**31


# The ring of bulk copies: tiles of at most this many bytes, this many in flight for each block.
_TILE, _STAGES = 4096, 8
_LEAST_PIECE = 512  # bytes; below, a bulk copy costs more than it moves


@cache
def kernel_text(*names: str) -> str:
    """The texts of the kernel family, as they travel in the wheel, as one."""
    folder = files("portakv_native.cuda")
    texts = [folder.joinpath(name).read_text() for name in names]
    return "\n".join(text.replace('#include "rows.cuh"\n', "") for text in texts)


class RowsKernel:
    """One nest: its instance of the kernel and how its arguments are packed.

    Args:
        nest: the loop nest.
        plan: the plan that it belongs to.

    Attributes:
        row: vectors of one unit in one plane.
        planes: blocks along y.

    Raises:
        Unsupported: more loops than the kernel's arguments hold.
    """

    def __init__(self, nest: Nest, plan: CopyPlan) -> None:
        self.unit, self.vector = plan.unit, nest.vector
        outer, inner = split_loops(nest.loops)
        self.row = prod(x.extent for x in inner) * (nest.run // nest.vector)
        self.planes = prod(x.extent for x in outer)
        if (
            len(outer) > MAX_OUTER
            or len(inner) > MAX_INNER
            or max(len(nest.src.units), len(nest.dst.units)) > MAX_UNITS
            or self.planes > MAX_PLANES
            or self.row >= _MAX_VECTORS
        ):
            raise Unsupported(
                f"A nest of {len(nest.loops)} loops over {self.planes} planes",
                f"the kernel takes {MAX_OUTER} loops over planes, {MAX_INNER} inside a unit and "
                f"{MAX_PLANES} planes; use backend 'reference'",
            )
        self.src = _SideArguments(nest.src, plan.unit, plan.src_step)
        self.dst = _SideArguments(nest.dst, plan.unit, plan.dst_step)
        self.src.find_table([(x.extent, x.src_table) for x in outer])
        self.dst.find_table([(x.extent, x.dst_table) for x in outer])
        self.table_at = 2 * _SIDE_BYTES + _TAIL.size
        self.nbytes = self.table_at + 8 * (max(1, self.src.entries) + max(1, self.dst.entries))
        self.run = nest.run
        self.outer, self.inner = [[x.extent for x in loops] for loops in (outer, inner)]
        self._fixed = self._pack_fixed(outer, inner)

    def _pack_fixed(self, outer: list[Loop], inner: list[Loop]) -> bytes:
        src = self.src.pack_fixed(
            [(x.src_table, x.src_stride) for x in outer], [x.src_stride for x in inner]
        )
        dst = self.dst.pack_fixed(
            [(x.dst_table, x.dst_stride) for x in outer], [x.dst_stride for x in inner]
        )
        return src + dst + bytes(self.nbytes - 2 * _SIDE_BYTES)

    def _instance(self, texts: tuple[str, ...], call: str) -> str:
        types = [
            f"typedef {_extents(self.inner)} Inner;",
            f"typedef {_extents(self.outer)} Outer;",
            f"typedef {self.src.shape()} Src;",
            f"typedef {self.dst.shape()} Dst;",
        ]
        return "\n".join(
            [
                kernel_text(*texts),
                "using namespace portakv;",
                *types,
                f'extern "C" __global__ void {NAME}(const PORTAKV_CONSTANT CopyOf<Src, Dst> copy) {{',
                f"    {call}, Inner, Outer, Src, Dst>(copy);",
                "}\n",
            ]
        )

    @property
    def source(self) -> str:
        """The vector kernel's whole text; nests of one shape have one text."""
        return self._instance(("rows.cuh",), f"copy_rows<{self.vector}, {self.run // self.vector}")

    @property
    def bulk(self) -> BulkShape | None:
        """How the ring of bulk copies moves this nest; None where its pieces are too small."""
        piece = next(
            (d for d in range(min(_TILE, self.run), 0, -1) if self.run % d == 0 and d % 16 == 0), 0
        )
        if self.vector < 16 or piece < _LEAST_PIECE:
            return None
        per_tile = _TILE // piece
        call = f"copy_rows_bulk<{piece}, {self.run // piece}, {per_tile}, {_STAGES}"
        source = self._instance(("rows.cuh", "bulk.cuh"), call)
        return BulkShape(source, self.row * self.vector // piece * self.planes, per_tile)

    def fresh_arguments(self) -> bytearray:
        """A buffer for the argument with everything in it that does not change."""
        return bytearray(self._fixed)

    def pack(
        self,
        buffer: bytearray,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        status: int,
        ahead: int,
    ) -> None:
        """Put a request's addresses and counts into the argument; `pack_span` completes it."""
        _SIDE.pack_into(buffer, 0, *self.src.request(src, src_index))
        _SIDE.pack_into(buffer, _SIDE_BYTES, *self.dst.request(dst, dst_index))
        _TAIL.pack_into(buffer, 2 * _SIDE_BYTES, 0, 0, self.unit, ahead, status)
        at = self.table_at
        for side, view in ((self.src, src), (self.dst, dst)):
            if side.entries:
                first = side.side.table
                buffer[at : at + 8 * side.entries] = view.addresses[
                    first : first + side.entries
                ].tobytes()
            at += 8 * max(1, side.entries)

    def spans(self, units: int) -> list[tuple[int, int]]:
        """(first unit, units) of each launch."""
        most = max(1, (_MAX_VECTORS - 1) // self.row)
        return [(start, min(most, units - start)) for start in range(0, units, most)]

    def pack_span(self, buffer: bytearray, start: int, units: int) -> None:
        """Which units this launch moves."""
        struct.pack_into("<2I", buffer, 2 * _SIDE_BYTES, units, start)


def _extents(numbers: list[int]) -> str:
    return f"Extents<{', '.join(map(str, numbers))}>"


class BulkShape(NamedTuple):
    """The ring's whole text, pieces of one unit in all planes, and pieces of a tile."""

    source: str
    pieces: int
    per_tile: int


class _SideArguments:
    def __init__(self, side: Side, unit: int, step: int) -> None:
        self.side, self.unit, self.ids = side, unit, step > 0
        self.per_id = step // unit if self.ids else 1
        self.flat = len(side.units) == 1 and not side.units[0].table
        self.kind, self.entries = "NONE", 0

    def find_table(self, planes: list[tuple[int, int]]) -> None:
        """Where the addresses of the planes come from."""
        entries = 1 + sum((extent - 1) * step for extent, step in planes)
        if any(x.table for x in self.side.units) or entries > MAX_ENTRIES:
            self.kind = "UNITS"
        elif entries > 1:
            self.kind, self.entries = "PLANES", entries

    def shape(self) -> str:
        bounded = _extents([x.extent for x in self.side.units[1:]])
        ids = str(self.ids).lower()
        return f"SideShape<{ids}, {self.per_id}, {self.kind}, {self.entries}, {bounded}>"

    def pack_fixed(self, outer: list[tuple[int, int]], inner: list[int]) -> bytes:
        units = [(x.table, x.stride) for x in self.side.units]
        steps = units + [(0, 0)] * (MAX_UNITS - len(units))
        steps += outer + [(0, 0)] * (MAX_OUTER - len(outer))
        flat = [number for step in steps for number in step]
        flat += inner + [0] * (MAX_INNER - len(inner))
        return bytes(_SIDE.size) + struct.pack(f"<{len(flat)}q", *flat)

    def request(self, view: KVView, index: Index) -> tuple[int, int, int, int, int, int]:
        """base, table, ids, whether they are int64, first, limit."""
        side, unit = self.side, self.unit
        if self.kind == "UNITS":
            table, base = view.table.data_ptr() + 8 * side.table, side.offset
        elif self.kind == "PLANES":
            table, base = 0, side.offset
        else:
            table, base = 0, int(view.addresses[side.table]) + side.offset
        limit = view.slots // unit
        if self.ids:
            ids = index.on(view.device)
            wide = ids.dtype.itemsize == 8
            return base, table, ids.data_ptr(), wide, index.offset // unit, limit
        if self.flat:
            # Without ids a flat side may start anywhere, also between two units.
            first, rest = divmod(index.offset, unit)
            stride = side.units[0].stride
            return base + first * stride + rest * (stride // unit), table, 0, 0, 0, limit
        return base, table, 0, 0, index.offset // unit, limit


def split_loops(loops: tuple[Loop, ...]) -> tuple[list[Loop], list[Loop]]:
    """Loops over planes, which blocks walk along y, and loops inside a unit of a plane."""
    outer = [x for x in loops if x.tabled or set(x.name.split()) <= {"layer", "kv"}]
    return outer, [x for x in loops if x not in outer]
