# SPDX-License-Identifier: Apache-2.0
"""Mutants of which one path alone is wrong: many tensors, whole blocks, ids on both sides."""

from __future__ import annotations

import numpy as np

from portakv import Index, KVView
from portakv.plan.loops import Loop
from portakv.plan.plan import CopyPlan, Nest
from portakv_conformance.mutants.addressing import ThirtyTwoBitOffset
from portakv_conformance.mutants.base import Call, HostRows, Mask, Pair, Runs
from portakv_conformance.mutants.cells import Int64
from portakv_conformance.mutants.device_rows import DeviceRows


def _of_both(call: Call) -> bool:
    """Whether both sides have ids, as in copies between caches."""
    return call.src_index.ids is not None and call.dst_index.ids is not None


class TableOf64(HostRows):
    """The table travels in the arguments and has room for 64 addresses; more wrap around."""

    def address(self, view: KVView, entry: Int64, byte: Int64) -> Int64:
        return super().address(view, entry % 64, byte)


class TableOf256(HostRows):
    """The table has room for 256 addresses; of a list of more blocks the others wrap around."""

    def address(self, view: KVView, entry: Int64, byte: Int64) -> Int64:
        return super().address(view, entry % 256, byte)


class BlocksInThirtyTwoBits(HostRows):
    """Byte offsets have 64 bits where tokens move one by one, and 32 where whole blocks do."""

    def offsets(self, nest: Nest, name: str, numbers: Int64, index: Index, unit: int) -> Pair:
        entry, byte = super().offsets(nest, name, numbers, index, unit)
        return entry, byte if unit == 1 else byte.astype(np.int32).astype(np.int64)


class MigrationsInThirtyTwoBits(HostRows):
    """The path for ids on both sides works out byte offsets in 32 bits."""

    def pieces(self, plan: CopyPlan, call: Call) -> list[Runs]:
        narrow = ThirtyTwoBitOffset(self.device)
        return narrow.pieces(plan, call) if _of_both(call) else super().pieces(plan, call)


class FarChunkOnTheDevice(DeviceRows):
    """On the device the byte offsets of a chunk are worked out in 32 bits and wrap past 2 GiB."""

    profile = "full"

    def address(self, view: KVView, entry: Int64, byte: Int64) -> Int64:
        narrow = byte if view.block_size else byte.astype(np.int32).astype(np.int64)
        return super().address(view, entry, narrow)


class FarPlanesOnTheDevice(DeviceRows):
    """On the device the stride between planes is cut to 32 bits."""

    profile = "full"

    def walk(self, loop: Loop, name: str) -> tuple[Int64, Int64]:
        entries, steps = super().walk(loop, name)
        return entries, steps.astype(np.int32).astype(np.int64)


class MigrationsClipped(HostRows):
    """The grid of the path for ids on both sides is clipped at 65535 units."""

    def units(self, plan: CopyPlan, call: Call) -> int:
        found = super().units(plan, call)
        return min(found, 65535) if _of_both(call) else found


class GuardsSourceOnly(HostRows):
    """With ids on both sides only the source's are guarded: a bad destination is the last slot."""

    def bad(self, src: Int64, dst: Int64, src_end: int, dst_end: int, call: Call) -> Mask:
        if _of_both(call):
            np.minimum(dst, dst_end - 1, out=dst)
        return super().bad(src, dst, src_end, dst_end, call)


class PaddingHidesBadIds(HostRows):
    """A bad id that faces padding on the other side is skipped with it, and not reported."""

    def bad(self, src: Int64, dst: Int64, src_end: int, dst_end: int, call: Call) -> Mask:
        return super().bad(src, dst, src_end, dst_end, call) & self.moved(src, dst)
