# SPDX-License-Identifier: Apache-2.0
"""Mutants that misread an index: padding, offsets, steps, dtypes, bad and repeated slots."""

from __future__ import annotations

import numpy as np
import torch

from portakv import Index
from portakv_conformance.mutants.addressing import narrow
from portakv_conformance.mutants.base import Call, HostRows, Int64, Mask, Pair


@HostRows.mutate("bad")
def NegativeIsLastRow(right: HostRows, src: Int64, dst: Int64, call: Call) -> Mask:
    """A negative slot is read as in Python: -1 is the last row of the source."""
    bad = right.bad(src, dst, call)
    src[src < 0] += call.ends[0]
    return bad


@HostRows.mutate("moved")
def NegativeSkippedInSourceOnly(right: HostRows, src: Int64, dst: Int64) -> Mask:
    """Padding is looked for in the source's ids; a negative destination is taken for slot 0."""
    dst[dst < 0] = 0
    return src >= 0


@HostRows.mutate("moved")
def NegativeEndsTheList(right: HostRows, src: Int64, dst: Int64) -> Mask:
    """A negative slot is taken for the end of the list: what follows it is not moved."""
    return np.logical_and.accumulate(right.moved(src, dst))


@HostRows.mutate("moved")
def OnlyMinusOneIsPadding(right: HostRows, src: Int64, dst: Int64) -> Mask:
    """Only -1 counts as padding; other negative slots are moved to and from slot 0."""
    for side in (src, dst):
        side[side < -1] = 0
    return right.moved(src, dst)


@HostRows.mutate("ids")
def Int32ReadAsInt64(right: HostRows, ids: torch.Tensor) -> Int64:
    """A list of int32 is read as int64, two ids as one."""
    plain = np.ascontiguousarray(ids.numpy()).view(np.uint8)
    return np.append(plain, np.zeros_like(plain))[: 8 * ids.numel()].view(np.int64)


@HostRows.mutate("ids")
def Int64ReadAsInt32(right: HostRows, ids: torch.Tensor) -> Int64:
    """Ids are narrowed to int32: a wild id of 64 bits becomes a slot that exists."""
    return narrow(right.ids(ids))


@HostRows.mutate("start")
def StartIgnored(right: HostRows, index: Index) -> int:
    """The offset of an index is ignored: every copy begins with its first id."""
    return 0 if index.ids is not None else index.offset


@HostRows.mutate("start")
def ChunkStartIgnored(right: HostRows, index: Index) -> int:
    """A side without ids begins at its first token, whatever its offset says."""
    return 0 if index.ids is None else index.offset


@HostRows.mutate("numbers")
def BlockIdsAsSlots(right: HostRows, index: Index, units: int, unit: int) -> Int64:
    """The ids of a block table are taken for slots where a block is moved in several pieces."""
    per_id = index.step // unit
    if index.ids is None or per_id == 1:
        return right.numbers(index, units, unit)
    at = np.arange(index.offset // unit, index.offset // unit + units)
    ids = right.ids(index.ids)[at // per_id]
    return np.where(ids < 0, -1, ids + at % per_id)


@HostRows.mutate("numbers")
def PartialBlockRepeats(right: HostRows, index: Index, units: int, unit: int) -> Int64:
    """Inside a block of the table the position is lost: each piece is the block's first."""
    numbers = right.numbers(index, units, unit)
    per_id = index.step // unit
    if index.ids is None:
        return numbers
    return np.where(numbers < 0, numbers, numbers // per_id * per_id)


@HostRows.mutate("units")
def PartialBlockDropped(right: HostRows, call: Call) -> int:
    """Only whole blocks are moved: the tokens of a last block that is not full are forgotten."""
    size = max(call.src.form.block_size, call.dst.form.block_size, 1)
    return (call.count // size * size or call.count) // call.plan.unit


@HostRows.mutate("units")
def GridClipped(right: HostRows, call: Call) -> int:
    """The grid is clipped at 65535 units, the rest of a long list is not moved."""
    return min(right.units(call), 65535)


@HostRows.mutate("units")
def SixteenBitCount(right: HostRows, call: Call) -> int:
    """Units are counted in 16 bits: of 70000 only 4464 are moved."""
    return right.units(call) & 0xFFFF


@HostRows.mutate("units")
def OneUnitForgotten(right: HostRows, call: Call) -> int:
    """A copy of a single unit is taken for an empty one."""
    count = right.units(call)
    return count if count > 1 else 0


@HostRows.mutate("pairs")
def DuplicatesPastTheEnd(right: HostRows, call: Call) -> Pair:
    """The second occurrence of a destination slot is written to the place after the last slot."""
    src, dst = right.pairs(call)
    repeated = np.ones(dst.shape, dtype=bool)
    repeated[np.unique(dst, return_index=True)[1]] = False
    return src, np.where(repeated, call.dst.slots // call.plan.unit, dst)


@HostRows.mutate("pairs")
def DuplicatesMixed(right: HostRows, call: Call) -> Pair:
    """A source slot that occurs twice is moved once: the later positions stay as they were."""
    src, dst = right.pairs(call)
    first = np.sort(np.unique(src, return_index=True)[1])
    return src[first], dst[first]
