# SPDX-License-Identifier: Apache-2.0
"""The text and the arguments of the kernel that reaches host memory, for a plan."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import ClassVar, NamedTuple

from portakv.backends.rows_kernel import RowsKernel
from portakv.errors import Unsupported
from portakv.plan.plan import CopyPlan, Nest

NAME = "portakv_direct"
#: Thread blocks of one launch unless the caller's terms say otherwise. Of a plain kernel of this
#: kind eight reached on an H200 what any number did, 0.95 of memcpy to the host and 0.93 from it;
#: four 0.94 and 0.92, and one 0.62 and 0.49.
BLOCKS = 8
#: Vectors of one launch, counted in 32 bits with room for one turn past the end; a larger copy is
#: split.
MAX_VECTORS = 2**30

# Where the argument has the tables of both requests: each is six words, the table its second.
_TABLE, _SRC_TABLE_AT, _DST_TABLE_AT = struct.Struct("<q"), 8, 7 * 8


class Cut(NamedTuple):
    """How a copy is cut among threads."""

    threads: int = 1024  # of a block
    each: int = 2  # vectors that a thread has under way before its first store
    strip: int = 1024  # threads that take vectors next to each other; it divides a block


#: A quarter of a megabyte under way in eight blocks: more than what the link holds. With eight
#: vectors in each of 512 threads, where both sides have ids, registers spilled: 0.75 - 0.85 of a
#: memcpy from the host on an H200, and 0.92 - 0.95 as it is.
CUT = Cut()


class DirectKernel(RowsKernel):
    """One nest between a device and pinned memory.

    Args:
        nest: the loop nest.
        plan: the plan that it belongs to.
        cut: how it is cut among threads; None: `CUT`.

    Raises:
        Unsupported: as `RowsKernel` does; a unit of more vectors than are counted.
    """

    file = "host/direct.cuh"
    names: ClassVar[dict[int, str]] = {1: NAME}

    def __init__(self, nest: Nest, plan: CopyPlan, cut: Cut | None = None) -> None:
        self._reads_host = plan.src.place != "device"
        if self._reads_host:
            # A plan walks as the destination lies; the link wants neighbours on the host's side.
            loops = sorted(nest.loops, key=lambda x: (not x.tabled, -abs(x.src_stride)))
            nest = replace(nest, loops=tuple(loops))
        super().__init__(nest, plan)
        self.cut = cut or CUT
        whole = self.row * self.planes
        if whole >= MAX_VECTORS:
            raise Unsupported(
                f"A unit of {plan.unit} tokens in {whole} vectors of {self.vector} B",
                f"the kernel counts {MAX_VECTORS}; use backend 'staged'",
            )
        self._most_units = (MAX_VECTORS - 1) // whole
        self._whole = whole

    def entry(self, each: int, name: str) -> str:
        """See `RowsKernel.entry`."""
        cut, of = self.cut, "Inner, Outer, Src, Dst"
        call = (
            f"copy_direct<{self.vector}, {self.run // self.vector}, {cut.strip}, {cut.each}, {of}>"
        )
        entry = f"void PORTAKV_AT_MOST({cut.threads}) {name}(const PORTAKV_CONSTANT Argument copy)"
        return f'extern "C" __global__ {entry} {{ {call}(copy); }}\n'

    def blocks(self, units: int, most: int) -> int:
        """Thread blocks of a launch, at most ``most``: no more than have something to do."""
        return min(most, -(-units * self._whole // (self.cut.threads * self.cut.each)))

    @property
    def wants_table(self) -> bool:
        """True where the kernel reads the host side's addresses from device memory."""
        return (self.src if self._reads_host else self.dst).kind == "UNITS"

    def pack_table(self, buffer: bytearray, table: int) -> None:
        """Where the host side's table of addresses lies on the device."""
        side, at = (self.src, _SRC_TABLE_AT) if self._reads_host else (self.dst, _DST_TABLE_AT)
        _TABLE.pack_into(buffer, at, table + 8 * side.side.table)
