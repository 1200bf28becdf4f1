# SPDX-License-Identifier: Apache-2.0
"""Mutants that claim what they cannot do, or do less than CORE asks, or do not keep to a claim."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from portakv import KVView, Unsupported
from portakv.backends.base import Capabilities, Decision, Launch
from portakv.plan.plan import CopyPlan, Nest
from portakv_conformance.mutants.base import HOST, Call, HostRows, Int64, Mask, Pair, Runs


class ClaimsSkipping(HostRows):
    """Claims to skip negative ids and takes them for slot 0."""

    def moved(self, src: Int64, dst: Int64) -> Mask:
        for side in (src, dst):
            side[side < 0] = 0
        return super().moved(src, dst)


class ClaimsGuards(HostRows):
    """Claims to guard against slots past the end and clamps them to the last one instead."""

    def bad(self, src: Int64, dst: Int64, src_end: int, dst_end: int, call: Call) -> Mask:
        np.minimum(src, src_end - 1, out=src)
        np.minimum(dst, dst_end - 1, out=dst)
        return super().bad(src, dst, src_end, dst_end, call)


class GuardOffByOne(HostRows):
    """The guard takes the slot right behind the last one for a good one."""

    def bad(self, src: Int64, dst: Int64, src_end: int, dst_end: int, call: Call) -> Mask:
        return super().bad(src, dst, src_end + 1, dst_end + 1, call)


class StatusIgnored(HostRows):
    """A bad slot moves nothing, and nobody is told: the status word stays 0."""

    def told(self, bad: Int64, unit: int, call: Call) -> int:
        return 0


class StatusFromZero(HostRows):
    """The status word holds the position, not position + 1: a bad first id looks like none."""

    def told(self, bad: Int64, unit: int, call: Call) -> int:
        return super().told(bad, unit, call) - 1


class StatusInUnits(HostRows):
    """The status word counts units, and so names another position than the bad one."""

    def told(self, bad: Int64, unit: int, call: Call) -> int:
        return super().told(bad, 1, call)


class StatusOfTheWholeList(HostRows):
    """The status word counts from the first id of the list, wherever the copy begins in it."""

    def told(self, bad: Int64, unit: int, call: Call) -> int:
        return super().told(bad, unit, call) + call.src_index.offset + call.dst_index.offset


class StatusWithoutPadding(HostRows):
    """The status word counts the positions that are moved, and so leaves out padding before it."""

    def told(self, bad: Int64, unit: int, call: Call) -> int:
        src, dst = (
            self.numbers(index, int(bad[0]), unit) for index in (call.src_index, call.dst_index)
        )
        return super().told(np.array([self.moved(src, dst).sum()]), unit, call)


class StatusOfAllAtOnce(HostRows):
    """Each bad position is put into the status word by an atomic or, so that several mix."""

    def told(self, bad: Int64, unit: int, call: Call) -> int:
        return int(np.bitwise_or.reduce(bad * unit + 1))


class StatusCountsTheBad(HostRows):
    """The status word tells how many ids were bad where there are several, not where one stands."""

    def told(self, bad: Int64, unit: int, call: Call) -> int:
        return len(bad) if len(bad) > 1 else super().told(bad, unit, call)


class BadSlotStopsTheRest(HostRows):
    """One bad slot and nothing at all is moved, though all other rows should be."""

    def bad(self, src: Int64, dst: Int64, src_end: int, dst_end: int, call: Call) -> Mask:
        bad = super().bad(src, dst, src_end, dst_end, call)
        if bad.any():
            src[:] = -1
        return bad


class ClaimsTables(HostRows):
    """Claims pointer tables and reads the first address only."""

    def table(self, view: KVView) -> Int64:
        found = super().table(view)
        return np.full_like(found, found[0])


class ClaimsSingleBytes(HostRows):
    """Claims an alignment of one byte, but has no vector below 4 bytes and leaves such rows out."""

    def move(self, runs: Runs, call: Call) -> None:
        if runs.vector >= 4:
            super().move(runs, call)


class ClaimsAnyLoops(HostRows):
    """Claims any number of loops and has registers for two: the innermost others are not walked."""

    def nests(self, plan: CopyPlan) -> Sequence[Nest]:
        return [replace(nest, loops=nest.loops[:2]) for nest in plan.nests]


class TakesMoreThanItClaims(HostRows, max_loops=1):
    """Claims one loop, accepts plans of more, and leaves out the loops that it does not have."""

    def check(self, plan: CopyPlan) -> Decision:
        return Decision(self.name, True, "it takes every plan")

    def nests(self, plan: CopyPlan) -> Sequence[Nest]:
        return [replace(nest, loops=nest.loops[:1]) for nest in plan.nests]


class ClaimsThreads(HostRows):
    """Claims that a launch may be called from several threads, and keeps its arguments in one
    place for all of them."""

    def carry(self, call: Call) -> None:
        self._call = call
        time.sleep(0.001)
        super().carry(self._call)


class ClaimsGraphs(HostRows, capturable=True):
    """Claims that launches can be captured into graphs of a device that has none."""


class ClaimsTheDevice(HostRows, places=HOST | {("device", "device")}):
    """Claims to copy within device memory, though it runs on the host."""


_IDS = frozenset((torch.int32, torch.int64, torch.float32))


class ClaimsFloatIds(HostRows, index_dtypes=_IDS):
    """Claims to read ids of float32, which no index has."""


class ClaimsChange(HostRows):
    """What it claims changes from one question to the next."""

    _asked = 0

    def capabilities(self) -> Capabilities:
        self._asked += 1
        return replace(super().capabilities(), guards=self._asked % 2 == 1)


class RefusesEverything(HostRows):
    """Claims much and refuses every plan, in the hope that refusals count as skipped."""

    def check(self, plan: CopyPlan) -> Decision:
        return Decision(self.name, False, "it would rather not")


class RefusesOddWidths(HostRows):
    """Refuses rows of an odd number of bytes, which CORE asks of every backend."""

    def prepare(self, plan: CopyPlan) -> Launch:
        if any(width % 2 for width in plan.src.widths):
            raise Unsupported("Moving odd rows", "rows have to be whole words of 2 bytes")
        return super().prepare(plan)


class RefusesOddHeads(HostRows):
    """Refuses head counts that are no power of two, though it claims nothing that says so."""

    def check(self, plan: CopyPlan) -> Decision:
        heads = plan.src.heads
        if heads & (heads - 1):
            return Decision(self.name, False, f"{heads} heads are no power of two")
        return super().check(plan)


class DividesByRows(HostRows):
    """A copy whose positions are all padding ends in a division by zero."""

    def pairs(self, call: Call) -> Pair:
        src, dst = super().pairs(call)
        self._bytes_of_a_row = call.count * call.plan.token_bytes // len(src)
        return src, dst
