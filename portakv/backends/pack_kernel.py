# SPDX-License-Identifier: Apache-2.0
"""The text and arguments of the kernels that pack and unpack, for a plan.

Values that a model fixes become template parameters of ``native/cuda/pack.cuh``. Values that a
request changes become the argument ``PackOf``, packed here as that file declares it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from typing import cast

from portakv.backends._sides import SideArguments
from portakv.backends.rows_kernel import MAX_ENTRIES, extents, kernel_text
from portakv.plan.loops import Loop
from portakv.plan.move import Move
from portakv.plan.packing import PackNest, PackPlan
from portakv.plan.plan import CopyPlan, Nest
from portakv.view.form import Step, Steps
from portakv.view.view import KVView

#: The names of the entries in a kernel's text: one packs, the other unpacks.
PACKS = "portakv_pack"
UNPACKS = "portakv_unpack"
#: Bytes of a vector of 8 values, the only access to raw rows.
VECTOR = 16
# Array lengths in `Side` of rows.cuh.
MAX_UNITS = 3
MAX_OUTER = 4
MAX_INNER = 6
MAX_NUMBERS = 2**32  # of units in a view: the kernel counts them in 32 bits
# `Copy` of rows.cuh up to its sides: two requests; units, start, unit, ahead; status.
REQUEST = struct.Struct("<12q4Iq")
SPAN = struct.Struct("<2I")
SPAN_AT = 12 * 8
_SIDE_BYTES = 16 * MAX_UNITS + 16 * MAX_OUTER + 8 * MAX_INNER
TABLES_AT = REQUEST.size + 2 * _SIDE_BYTES
#: Threads of one launch, of which HIP takes fewer than 2^32; a larger copy is split.
MAX_THREADS = 2**32 - 1024
#: Planes of a thread block, if a warp takes a plane.
_PLANES = 4
#: Threads of a multiprocessor for which it has 64 registers each.
_THREADS = 1024
#: Directions (True: packs) and thread blocks for which the compiler plans registers by itself.
_BY_COMPILER = frozenset({(False, 128), (False, 160), (False, 576), (True, 160)})


def refusal(nest: PackNest) -> str | None:
    """Return why the kernels do not take a nest, as a sentence; None if they do."""
    if nest.raw_vector < VECTOR or nest.packed_vector < VECTOR:
        width = min(nest.raw_vector, nest.packed_vector)
        return f"it needs {VECTOR} B alignment and the plan allows {width} B"
    if any(step.table for step in (*nest.tokens, *nest.dim)):
        return "the tokens of a block lie in separate allocations"
    inner, _ = raw_steps(nest)
    units = max(len(nest.src.units), len(nest.dst.units))
    if len(nest.loops) > MAX_OUTER or len(inner) > MAX_INNER or units > MAX_UNITS:
        return (
            f"it takes {MAX_OUTER} loops over planes and {MAX_INNER} inside, and the plan has "
            f"{len(nest.loops)} and {len(inner)}"
        )
    return None


def raw_steps(nest: PackNest) -> tuple[Steps, int]:
    """Return the steps through the raw values of a plane, outermost first, and the bytes of a run
    without a gap."""
    outer = [*nest.tokens, *nest.dim]
    run = outer.pop().extent
    while outer and outer[-1].stride == run:
        run *= outer.pop().extent
    return tuple(outer), run


class PackKernel:
    """One nest of a plan: its instance of the kernel, and the packing of its arguments.

    Attributes:
        planes: planes of a unit.
        threads: of a thread block.
    """

    def __init__(self, nest: PackNest, plan: PackPlan) -> None:
        self._nest = nest
        self._packs = plan.packs
        self.unit = plan.unit
        self.planes = prod(loop.extent for loop in nest.loops)
        warps = nest.plane.segments
        self._planes = _PLANES if warps == 1 else 1
        self.threads = 32 * warps * self._planes
        self._steps, self._run = raw_steps(nest)
        raw = [_raw_loop(step) for step in self._steps]
        inner = (raw, []) if plan.packs else ([], raw)
        self.src = SideWords(nest, plan, "src", nest.loops, inner[0])
        self.dst = SideWords(nest, plan, "dst", nest.loops, inner[1])
        self._dst_table_at = TABLES_AT + 8 * max(1, self.src.entries)
        self._overflow_at = self._dst_table_at + 8 * max(1, self.dst.entries)

    @property
    def name(self) -> str:
        """The name of the entry."""
        return PACKS if self._packs else UNPACKS

    @property
    def names(self) -> Mapping[int, str]:
        """The names of its entries, as `RowsKernel` has them."""
        return {1: self.name}

    @property
    def fixed(self) -> bytes:
        """The argument with all values that do not change."""
        tables = max(1, self.src.entries) + max(1, self.dst.entries)
        return bytes(REQUEST.size) + self.src.fixed + self.dst.fixed + bytes(8 * tables + 8)

    @property
    def source(self) -> str:
        """The kernel's whole text; nests of one shape have one text."""
        plane = self._nest.plane
        raw, slots = ("Src", "Dst") if self._packs else ("Dst", "Src")
        inner = extents([step.extent for step in self._steps])
        function = "pack_planes" if self._packs else "unpack_planes"
        threads = self.threads
        # 0: the compiler plans its registers for no number of thread blocks.
        by_compiler = (self._packs, threads) in _BY_COMPILER
        blocks = 0 if by_compiler else max(1, round(_THREADS / threads))
        return "\n".join(
            [
                kernel_text("cuda/pack.cuh"),
                "using namespace portakv;",
                f"typedef {extents([loop.extent for loop in self._nest.loops])} Outer;",
                f"typedef {self.src.shape} Src;",
                f"typedef {self.dst.shape} Dst;",
                f"typedef pack::Format<{plane.code_bits}, {plane.values}, {plane.slot_bytes}> F;",
                f"typedef pack::Raw<{raw}, {self._run // VECTOR}, {inner}> R;",
                "typedef pack::PackOf<Src, Dst> Argument;",
                f'extern "C" __global__ void PORTAKV_BOUNDS({threads}, {blocks}) {self.name}('
                f"const PORTAKV_CONSTANT Argument argument) {{",
                f"    pack::{function}<F, R, {slots}, Outer, {self._planes}>(argument);",
                "}\n",
            ]
        )

    def grid(self, units: int) -> int:
        """Return the thread blocks of a launch of so many units."""
        return -(-units * self.planes // self._planes)

    def pack(self, buffer: bytearray, move: Move, status: int, overflow: int) -> None:
        """Pack a request's addresses and counts into the argument; `pack_span` completes it.

        ``status`` and ``overflow`` are the addresses of the status word and of the overflow words.
        """
        src = self.src.request(move.src, move.src_index)
        dst = self.dst.request(move.dst, move.dst_index)
        REQUEST.pack_into(buffer, 0, *src, *dst, 0, 0, self.unit, 0, status)
        if self.src.entries:
            table = self.src.table(move.src)
            buffer[TABLES_AT : TABLES_AT + len(table)] = table
        if self.dst.entries:
            table = self.dst.table(move.dst)
            buffer[self._dst_table_at : self._dst_table_at + len(table)] = table
        struct.pack_into("<q", buffer, self._overflow_at, overflow)

    def spans(self, units: int) -> list[tuple[int, int]]:
        """Return (first unit, units) of each launch."""
        of_plane = self.threads // self._planes
        most = max(1, MAX_THREADS // of_plane // self.planes)
        return [(start, min(most, units - start)) for start in range(0, units, most)]

    def pack_span(self, buffer: bytearray, start: int, units: int) -> None:
        """Pack the units that this launch moves."""
        SPAN.pack_into(buffer, SPAN_AT, units, start)


def _raw_loop(step: Step) -> Loop:
    """Return a loop of which only the raw side's stride is read."""
    return Loop(("token",), step.extent, 0, step.stride, 0, step.stride)


class SideWords(SideArguments):
    """A side of a kernel that packs or unpacks.

    Attributes:
        kind: as in `SideArguments`, or ``PLANES``: a table of ``entries`` that travels with the
            arguments.
        ids: True if it has ids.
        fixed: the values that a plan fixes, as the kernel's text declares them.
    """

    def __init__(
        self,
        nest: PackNest,
        plan: PackPlan,
        name: str,
        outer: Sequence[Loop],
        inner: Sequence[Loop],
    ) -> None:
        # A side reads of them only what packed nests and plans have as well.
        super().__init__(cast("Nest", nest), cast("CopyPlan", plan), name, outer, inner)
        self.ids = self.per_id > 0
        self.entries = 0
        self.countable = MAX_NUMBERS
        loops = zip(outer, self.walks, strict=True)
        entries = 1 + sum((x.extent - 1) * table for x, (table, _) in loops)
        if getattr(plan, name).table_on_device:
            self.kind = "UNITS"  # also for one address, which the host does not know
        elif self.kind == "UNITS" and not self.side.tabled and entries <= MAX_ENTRIES:
            self.kind = "PLANES"
            self.entries = entries
        walks = [(x.table, x.stride) for x in self.side.units]
        walks += [(0, 0)] * (MAX_UNITS - len(walks)) + self.walks
        walks += [(0, 0)] * (MAX_OUTER - len(self.walks))
        numbers = [*chain(*walks), *self.strides, *[0] * (MAX_INNER - len(self.strides))]
        self.fixed = struct.pack(f"<{len(numbers)}q", *numbers)

    @property
    def shape(self) -> str:
        """The type of the side in the kernel's text."""
        bounded = extents([x.extent for x in self.side.units[1:]])
        ids = str(self.ids).lower()
        return f"SideShape<{ids}, {self.per_id or 1}, {self.kind}, {self.entries}, {bounded}>"

    def table(self, view: KVView) -> bytes:
        """Return the entries that travel in the arguments."""
        packed: bytes | None = view.derived.get(self)
        if packed is None:
            entries = view.origins[self.side.table :][: self.entries]
            packed = view.derived[self] = struct.pack(f"<{self.entries}q", *entries)
        return packed
