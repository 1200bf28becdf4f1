# SPDX-License-Identifier: Apache-2.0
"""Mutants that reach the wrong address: offsets, strides, bases and the table of addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from portakv import Index, KVView
from portakv.plan.loops import Loop
from portakv.plan.plan import CopyPlan, Nest, Side
from portakv_conformance.mutants.base import Call, HostRows, Int64, Pair, narrow


class OffByOneSlot(HostRows):
    """Slots of the source are counted from one, so each row comes from the slot behind it."""

    def numbers(self, index: Index, units: int, unit: int) -> Int64:
        found = super().numbers(index, units, unit)
        return found if index.ids is None else np.where(found > 0, found - 1, found)


class ThirtyTwoBitOffset(HostRows):
    """Byte offsets are worked out in 32 bits and wrap in a cache of more than 2 GiB."""

    def address(self, view: KVView, entry: Int64, byte: Int64) -> Int64:
        return super().address(view, entry, narrow(byte))


class UnsignedOffset(HostRows):
    """Byte offsets are kept in 32 bits without a sign and wrap in a cache of more than 4 GiB."""

    def address(self, view: KVView, entry: Int64, byte: Int64) -> Int64:
        return super().address(view, entry, byte & 0xFFFFFFFF)


class IgnoredStride(HostRows):
    """The stride of a block is taken as block_size times the stride of a token."""

    def place(self, side: Side, numbers: Int64) -> Pair:
        units = side.units
        if len(units) > 1 and not any(step.table for step in units):
            dense = replace(units[0], stride=units[1].extent * units[1].stride)
            side = replace(side, units=(dense, *units[1:]))
        return super().place(side, numbers)


class IgnoredStorageOffset(HostRows):
    """Addresses are taken from the storage, so a tensor that begins inside of it is missed."""

    def table(self, view: KVView) -> Int64:
        inside = [owner.data_ptr() - owner.untyped_storage().data_ptr() for owner in view.owners]
        return np.asarray(super().table(view) - np.array(inside))


class FirstTensorForAll(HostRows):
    """One base address is used for tensors that lie in separate allocations at equal distances."""

    def table(self, view: KVView) -> Int64:
        found = super().table(view)
        if len(found) < 3:
            return found
        return np.asarray(found[0] + np.arange(len(found)) * (found[1] - found[0]))


class SortedTable(HostRows):
    """Swapped layers: the table is filled by rising address, not in the order of the layers."""

    def table(self, view: KVView) -> Int64:
        return np.sort(super().table(view))


class FirstStridesForAll(HostRows):
    """Keys and values of unequal width are both walked with the strides of the keys."""

    def nests(self, plan: CopyPlan) -> Sequence[Nest]:
        src, dst = plan.nests[0].src.units, plan.nests[0].dst.units
        return [
            replace(nest, src=replace(nest.src, units=src), dst=replace(nest.dst, units=dst))
            for nest in plan.nests
        ]


class UnequalWidthsMixed(HostRows):
    """Values of unequal width are moved with as many bytes as the keys have."""

    def nests(self, plan: CopyPlan) -> Sequence[Nest]:
        alike = [replace(nest, run=min(plan.nests[0].run, nest.run)) for nest in plan.nests]
        return [replace(nest, vector=np.gcd(nest.run, nest.vector).item()) for nest in alike]


class OnlyFirstBlockSize(HostRows):
    """The block size of the source is used for the destination as well."""

    def planned(self, call: Call) -> CopyPlan:
        self._extents = [step.extent for step in call.plan.nests[0].src.units]
        return call.plan

    def place(self, side: Side, numbers: Int64) -> Pair:
        if len(side.units) == len(self._extents):
            pairs = zip(side.units, self._extents, strict=True)
            side = replace(side, units=tuple(replace(at, extent=n) for at, n in pairs))
        return super().place(side, numbers)


class PlanesInEightBits(HostRows):
    """Layers are counted in eight bits, so layer 256 of a deep model is layer 0 again."""

    def turns(self, loop: Loop) -> Int64:
        return super().turns(loop) & (0xFF if "layer" in loop.name else -1)


class TableStepsInBytes(HostRows):
    """A step through the table is taken in bytes, eight for an entry, and so passes over seven."""

    def walk(self, loop: Loop, name: str) -> Pair:
        entries, steps = super().walk(loop, name)
        return entries * 8 if loop.extent > 2 else entries, steps


class RepeatsMovedOnce(HostRows):
    """A loop without a stride in the source, rows that are seen twice, is left out."""

    def turns(self, loop: Loop) -> Int64:
        found = super().turns(loop)
        return found if loop.src_stride or loop.src_table else found[:1]


class RepeatsAVectorApart(HostRows):
    """Rows of a source that all lie at one address, by a stride of 0, are read a vector apart."""

    def place(self, side: Side, numbers: Int64) -> Pair:
        units = [at if at.stride or at.table else replace(at, stride=16) for at in side.units]
        return super().place(replace(side, units=tuple(units)), numbers)


class HeadsRoundedDown(HostRows):
    """Heads are halved until one is left, so of 6 or 12 heads only 4 or 8 are walked."""

    def turns(self, loop: Loop) -> Int64:
        found = super().turns(loop)
        return found[: 1 << (loop.extent.bit_length() - 1)] if "head" in loop.name else found


class HeadsRoundedUp(HostRows):
    """Heads are walked up to the next power of two, and no mask leaves out those past the last."""

    def turns(self, loop: Loop) -> Int64:
        if "head" in loop.name:
            loop = replace(loop, extent=1 << (loop.extent - 1).bit_length())
        return super().turns(loop)
