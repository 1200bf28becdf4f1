# SPDX-License-Identifier: Apache-2.0
"""Mutants that misread an index: padding, offsets, steps, dtypes, bad and repeated slots."""

from __future__ import annotations

import numpy as np
import torch

from portakv import Index
from portakv_conformance.mutants.base import Call, HostRows, Int64, Mask, Pair, narrow


class NegativeIsLastRow(HostRows):
    """A negative slot is read as in Python: -1 is the last row of the source."""

    def bad(self, src: Int64, dst: Int64, src_end: int, dst_end: int, call: Call) -> Mask:
        bad = super().bad(src, dst, src_end, dst_end, call)
        src[src < 0] += src_end
        return bad


class NegativeSkippedInSourceOnly(HostRows):
    """Padding is looked for in the source's ids; a negative destination is taken for slot 0."""

    def moved(self, src: Int64, dst: Int64) -> Mask:
        dst[dst < 0] = 0
        return src >= 0


class NegativeEndsTheList(HostRows):
    """A negative slot is taken for the end of the list: what follows it is not moved."""

    def moved(self, src: Int64, dst: Int64) -> Mask:
        return np.logical_and.accumulate(super().moved(src, dst))


class OnlyMinusOneIsPadding(HostRows):
    """Only -1 counts as padding; other negative slots are moved to and from slot 0."""

    def moved(self, src: Int64, dst: Int64) -> Mask:
        for side in (src, dst):
            side[side < -1] = 0
        return super().moved(src, dst)


class Int32ReadAsInt64(HostRows):
    """A list of int32 is read as int64, two ids as one."""

    def ids(self, ids: torch.Tensor) -> Int64:
        plain = np.ascontiguousarray(ids.numpy()).view(np.uint8)
        return np.append(plain, np.zeros_like(plain))[: 8 * ids.numel()].view(np.int64)


class Int64ReadAsInt32(HostRows):
    """Ids are narrowed to int32: a wild id of 64 bits becomes a slot that exists."""

    def ids(self, ids: torch.Tensor) -> Int64:
        return narrow(super().ids(ids))


class StartIgnored(HostRows):
    """The offset of an index is ignored: every copy begins with its first id."""

    def start(self, index: Index) -> int:
        return 0 if index.ids is not None else index.offset


class ChunkStartIgnored(HostRows):
    """A side without ids begins at its first token, whatever its offset says."""

    def start(self, index: Index) -> int:
        return 0 if index.ids is None else index.offset


class BlockIdsAsSlots(HostRows):
    """The ids of a block table are taken for slots where a block is moved in several pieces."""

    def numbers(self, index: Index, units: int, unit: int) -> Int64:
        per_id = index.step // unit
        if index.ids is None or per_id == 1:
            return super().numbers(index, units, unit)
        at = np.arange(index.offset // unit, index.offset // unit + units)
        ids = self.ids(index.ids)[at // per_id]
        return np.where(ids < 0, -1, ids + at % per_id)


class PartialBlockRepeats(HostRows):
    """Inside a block of the table the position is lost: each piece is the block's first."""

    def numbers(self, index: Index, units: int, unit: int) -> Int64:
        found = super().numbers(index, units, unit)
        per_id = index.step // unit
        return found if index.ids is None else np.where(found < 0, found, found // per_id * per_id)


class PartialBlockDropped(HostRows):
    """Only whole blocks are moved: the tokens of a last block that is not full are forgotten."""

    def units(self, call: Call) -> int:
        size = max(call.src.form.block_size, call.dst.form.block_size, 1)
        return (call.count // size * size or call.count) // call.plan.unit


class GridClipped(HostRows):
    """The grid is clipped at 65535 units, the rest of a long list is not moved."""

    def units(self, call: Call) -> int:
        return min(super().units(call), 65535)


class SixteenBitCount(HostRows):
    """Units are counted in 16 bits: of 70000 only 4464 are moved."""

    def units(self, call: Call) -> int:
        return super().units(call) & 0xFFFF


class OneUnitForgotten(HostRows):
    """A copy of a single unit is taken for an empty one."""

    def units(self, call: Call) -> int:
        found = super().units(call)
        return found if found > 1 else 0


class DuplicatesPastTheEnd(HostRows):
    """Of slots that occur twice in the destination the second is written behind the last slot."""

    def pairs(self, call: Call) -> Pair:
        src, dst = super().pairs(call)
        repeated = np.ones(dst.shape, dtype=bool)
        repeated[np.unique(dst, return_index=True)[1]] = False
        return src, np.where(repeated, call.dst.slots // call.plan.unit, dst)


class DuplicatesMixed(HostRows):
    """A source slot that occurs twice is moved once: the later positions stay as they were."""

    def pairs(self, call: Call) -> Pair:
        src, dst = super().pairs(call)
        first = np.sort(np.unique(src, return_index=True)[1])
        return src[first], dst[first]
