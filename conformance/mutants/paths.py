# SPDX-License-Identifier: Apache-2.0
"""Mutants of which one path alone is wrong: many tensors, two lists of ids, merged runs, errors."""

from __future__ import annotations

import numpy as np

from portakv import Index, KVView, Unsupported
from portakv.plan.loops import Loop
from portakv.plan.plan import Nest
from portakv_conformance.mutants.addressing import ThirtyTwoBitOffset
from portakv_conformance.mutants.base import (
    Call,
    DeviceRows,
    HostRows,
    Int64,
    Mask,
    Pair,
    Runs,
    narrow,
)


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
        return entry, byte if unit == 1 else narrow(byte)


class MigrationsInThirtyTwoBits(HostRows):
    """The path for ids on both sides works out byte offsets in 32 bits."""

    def pieces(self, call: Call) -> list[Runs]:
        wrong = ThirtyTwoBitOffset(self.device)
        return wrong.pieces(call) if _of_both(call) else super().pieces(call)


class FarChunkOnTheDevice(DeviceRows):
    """On the device the byte offsets of a chunk are worked out in 32 bits and wrap past 2 GiB."""

    profile = "full"

    def address(self, view: KVView, entry: Int64, byte: Int64) -> Int64:
        return super().address(view, entry, byte if view.block_size else narrow(byte))


class FarPlanesOnTheDevice(DeviceRows):
    """On the device the stride between planes is cut to 32 bits."""

    profile = "full"

    def walk(self, loop: Loop, name: str) -> Pair:
        entries, steps = super().walk(loop, name)
        return entries, narrow(steps)


class MigrationsClipped(HostRows):
    """The grid of the path for ids on both sides is clipped at 65535 units."""

    def units(self, call: Call) -> int:
        found = super().units(call)
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


def _by_source(runs: Runs) -> Runs:
    return runs.at(np.argsort(runs.src, kind="stable"))


class MergedBySourceAlone(HostRows):
    """Runs are merged where they are neighbours in the source, wherever the destination is."""

    def move(self, runs: Runs, call: Call) -> None:
        runs, at = _by_source(runs), np.arange(len(runs.src))
        follows = np.diff(runs.src, prepend=-1) == runs.nbytes
        begins = np.maximum.accumulate(np.where(follows, 0, at))
        behind = (at - begins) * runs.nbytes
        merged = Runs(runs.src, runs.dst[begins] + behind, runs.nbytes, runs.vector)
        super().move(merged, call)


class LastRunLost(HostRows):
    """A merged run is sent when the next begins; one that ends the list is never sent."""

    def move(self, runs: Runs, call: Call) -> None:
        runs = _by_source(runs)
        follows = (np.diff(runs.src) == runs.nbytes) & (np.diff(runs.dst) == runs.nbytes)
        if follows.size and follows[-1]:
            begins = np.nonzero(~follows)[0]
            runs = runs.at(slice(begins[-1] + 1 if begins.size else 0))
        super().move(runs, call)


class OnlyFirstNest(HostRows):
    """Of a plan with a nest for each kv only the first is carried out."""

    def pieces(self, call: Call) -> list[Runs]:
        return super().pieces(call)[:1]


class ErrorAfterPartialWrite(HostRows):
    """That a row is not of whole words is found, and refused, after half of the rows are moved."""

    def move(self, runs: Runs, call: Call) -> None:
        if runs.vector > 1:
            super().move(runs, call)
            return
        super().move(runs.at(slice(len(runs.dst) // 2)), call)
        raise Unsupported("Moving single bytes", "rows have to be whole words of 2 bytes")
