# SPDX-License-Identifier: Apache-2.0
"""Mutants that reach the wrong address: offsets, strides, bases and the table of addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from portakv import Index, KVView
from portakv.plan.plan import CopyPlan, Loop, Nest, Side
from portakv_conformance.mutants.base import HostRows, Int64, Pair


def narrow(numbers: Int64) -> Int64:
    """Return numbers as they come back from 32 bits."""
    return numbers.astype(np.int32).astype(np.int64)


@HostRows.mutate("numbers")
def OffByOneSlot(right: HostRows, index: Index, units: int, unit: int) -> Int64:
    """Slots of the source are counted from one, so each row comes from the slot after it."""
    numbers = right.numbers(index, units, unit)
    return numbers if index.ids is None else np.where(numbers > 0, numbers - 1, numbers)


@HostRows.mutate("address")
def ThirtyTwoBitOffset(right: HostRows, view: KVView, entry: Int64, byte: Int64) -> Int64:
    """Byte offsets are worked out in 32 bits and wrap in a cache of more than 2 GiB."""
    return right.address(view, entry, narrow(byte))


@HostRows.mutate("address")
def UnsignedOffset(right: HostRows, view: KVView, entry: Int64, byte: Int64) -> Int64:
    """Byte offsets are kept in 32 bits without a sign and wrap in a cache of more than 4 GiB."""
    return right.address(view, entry, byte & 0xFFFFFFFF)


@HostRows.mutate("place")
def IgnoredStride(right: HostRows, side: Side, numbers: Int64) -> Pair:
    """The stride of a block is taken as block_size times the stride of a token."""
    units = side.units
    if len(units) > 1 and not any(step.table for step in units):
        dense = replace(units[0], stride=units[1].extent * units[1].stride)
        side = replace(side, units=(dense, *units[1:]))
    return right.place(side, numbers)


@HostRows.mutate("table")
def IgnoredStorageOffset(right: HostRows, view: KVView) -> Int64:
    """Addresses are taken from the storage, so a tensor that begins inside of it is missed."""
    inside = [owner.data_ptr() - owner.untyped_storage().data_ptr() for owner in view.owners]
    return np.asarray(right.table(view) - np.array(inside))


@HostRows.mutate("table")
def FirstTensorForAll(right: HostRows, view: KVView) -> Int64:
    """One base address is used for tensors that lie in separate allocations at equal distances."""
    table = right.table(view)
    if len(table) < 3:
        return table
    return np.asarray(table[0] + np.arange(len(table)) * (table[1] - table[0]))


@HostRows.mutate("table")
def SortedTable(right: HostRows, view: KVView) -> Int64:
    """Swapped layers: the table is filled by rising address, not in the order of the layers."""
    return np.sort(right.table(view))


@HostRows.mutate("nests")
def FirstStridesForAll(right: HostRows, plan: CopyPlan) -> Sequence[Nest]:
    """Keys and values of unequal width are both walked with the strides of the keys."""
    src = plan.nests[0].src.units
    dst = plan.nests[0].dst.units
    return [
        replace(nest, src=replace(nest.src, units=src), dst=replace(nest.dst, units=dst))
        for nest in plan.nests
    ]


@HostRows.mutate("nests")
def UnequalWidthsMixed(right: HostRows, plan: CopyPlan) -> Sequence[Nest]:
    """Values of unequal width are moved with as many bytes as the keys have."""
    alike = [replace(nest, run=min(plan.nests[0].run, nest.run)) for nest in plan.nests]
    return [replace(nest, vector=np.gcd(nest.run, nest.vector).item()) for nest in alike]


@HostRows.mutate("nests")
def OnlyFirstBlockSize(right: HostRows, plan: CopyPlan) -> Sequence[Nest]:
    """The block size of the source is used for the destination as well."""
    src = plan.nests[0].src.units
    dst = plan.nests[0].dst.units
    if len(src) != len(dst):
        return plan.nests
    units = [replace(at, extent=like.extent) for at, like in zip(dst, src, strict=True)]
    return [replace(nest, dst=replace(nest.dst, units=tuple(units))) for nest in plan.nests]


@HostRows.mutate("turns")
def PlanesInEightBits(right: HostRows, loop: Loop) -> Int64:
    """Layers are counted in eight bits, so layer 256 of a deep model is layer 0 again."""
    return right.turns(loop) & (0xFF if "layer" in loop.name else -1)


@HostRows.mutate("walk")
def TableStepsInBytes(right: HostRows, loop: Loop, name: str) -> Pair:
    """A step through the table is taken in bytes, eight for an entry, and so passes over seven."""
    entries, steps = right.walk(loop, name)
    return entries * 8 if loop.extent > 2 else entries, steps


@HostRows.mutate("turns")
def RepeatsMovedOnce(right: HostRows, loop: Loop) -> Int64:
    """A loop without a stride in the source, rows that are seen twice, is left out."""
    turns = right.turns(loop)
    return turns if loop.src_stride or loop.src_table else turns[:1]


@HostRows.mutate("place")
def RepeatsAVectorApart(right: HostRows, side: Side, numbers: Int64) -> Pair:
    """Rows of a source that all lie at one address, by a stride of 0, are read a vector apart."""
    units = [at if at.stride or at.table else replace(at, stride=16) for at in side.units]
    return right.place(replace(side, units=tuple(units)), numbers)


@HostRows.mutate("turns")
def HeadsRoundedDown(right: HostRows, loop: Loop) -> Int64:
    """Heads are halved until one is left, so of 6 or 12 heads only 4 or 8 are walked."""
    turns = right.turns(loop)
    return turns[: 1 << (loop.extent.bit_length() - 1)] if "head" in loop.name else turns


@HostRows.mutate("turns")
def HeadsRoundedUp(right: HostRows, loop: Loop) -> Int64:
    """Heads are walked up to the next power of two, and no mask leaves out those past the last."""
    if "head" in loop.name:
        loop = replace(loop, extent=1 << (loop.extent - 1).bit_length())
    return right.turns(loop)
