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


@HostRows.mutate("moved")
def ClaimsSkipping(right: HostRows, src: Int64, dst: Int64) -> Mask:
    """Claims to skip negative ids and takes them for slot 0."""
    for side in (src, dst):
        side[side < 0] = 0
    return right.moved(src, dst)


@HostRows.mutate("bad")
def ClaimsGuards(right: HostRows, src: Int64, dst: Int64, call: Call) -> Mask:
    """Claims to guard against slots past the end and clamps them to the last one instead."""
    for side, end in zip((src, dst), call.ends, strict=True):
        np.minimum(side, end - 1, out=side)
    return right.bad(src, dst, call)


@HostRows.mutate("bad")
def GuardOffByOne(right: HostRows, src: Int64, dst: Int64, call: Call) -> Mask:
    """The guard accepts the slot directly after the last one."""
    return right.bad(src - 1, dst - 1, call)


@HostRows.mutate("status_of")
def StatusIgnored(right: HostRows, bad: Int64, call: Call) -> int:
    """A bad slot moves nothing and is not reported: the status word stays 0."""
    return 0


@HostRows.mutate("status_of")
def StatusFromZero(right: HostRows, bad: Int64, call: Call) -> int:
    """The status word holds the position, not position + 1: a bad first id looks like none."""
    return right.status_of(bad, call) - 1


@HostRows.mutate("status_of")
def StatusInUnits(right: HostRows, bad: Int64, call: Call) -> int:
    """The status word counts units, and so names another position than the bad one."""
    return int(bad[0]) + 1


@HostRows.mutate("status_of")
def StatusOfTheWholeList(right: HostRows, bad: Int64, call: Call) -> int:
    """The status word counts from the first id of the list, wherever the copy begins in it."""
    return right.status_of(bad, call) + call.src_index.offset + call.dst_index.offset


@HostRows.mutate("status_of")
def StatusWithoutPadding(right: HostRows, bad: Int64, call: Call) -> int:
    """The status word counts the positions that are moved, and so leaves out padding before it."""
    before = replace(call, count=int(bad[0]) * call.plan.unit, status=None)
    return right.status_of(np.array([len(right.pairs(before)[0])]), call)


@HostRows.mutate("status_of")
def StatusOfAllAtOnce(right: HostRows, bad: Int64, call: Call) -> int:
    """Each bad position is put into the status word by an atomic or, so that several mix."""
    return int(np.bitwise_or.reduce(bad * call.plan.unit + 1))


@HostRows.mutate("status_of")
def StatusOfTheLast(right: HostRows, bad: Int64, call: Call) -> int:
    """The status word is written for each bad position in turn, so the last one stays."""
    return right.status_of(bad[-1:], call)


@HostRows.mutate("status_of")
def StatusCountsTheBad(right: HostRows, bad: Int64, call: Call) -> int:
    """The status word counts the bad ids if there are several, and names no position."""
    return len(bad) if len(bad) > 1 else right.status_of(bad, call)


@HostRows.mutate("bad")
def BadSlotStopsTheRest(right: HostRows, src: Int64, dst: Int64, call: Call) -> Mask:
    """One bad slot and nothing at all is moved, though all other rows should be."""
    bad = right.bad(src, dst, call)
    if bad.any():
        src[:] = -1
    return bad


@HostRows.mutate("table")
def ClaimsTables(right: HostRows, view: KVView) -> Int64:
    """Claims pointer tables and reads the first address only."""
    table = right.table(view)
    return np.full_like(table, table[0])


@HostRows.mutate("move")
def ClaimsSingleBytes(right: HostRows, runs: Runs, call: Call) -> None:
    """Claims an alignment of one byte, but has no vector below 4 bytes and leaves such rows out."""
    if runs.vector >= 4:
        right.move(runs, call)


@HostRows.mutate("nests")
def ClaimsAnyLoops(right: HostRows, plan: CopyPlan) -> Sequence[Nest]:
    """Claims any number of loops and has registers for two: the innermost others are not walked."""
    return [replace(nest, loops=nest.loops[:2]) for nest in plan.nests]


class TakesMoreThanItClaims(HostRows, max_loops=1):
    """Claims one loop, accepts plans of more, and leaves out the loops that it does not have."""

    def check(self, plan: CopyPlan) -> Decision:
        return Decision(self.name, True, "it takes every plan")

    def nests(self, plan: CopyPlan) -> Sequence[Nest]:
        return [replace(nest, loops=nest.loops[:1]) for nest in plan.nests]


@HostRows.mutate("carry")
def ClaimsThreads(right: HostRows, call: Call) -> None:
    """Claims that a launch may be called from several threads, and keeps its arguments in one
    place for all of them."""
    right.state["call"] = call
    time.sleep(0.001)
    right.carry(right.state["call"])


class ClaimsGraphs(HostRows, capturable=True):
    """Claims that launches can be captured into graphs of a device that has none."""


class ClaimsTheDevice(HostRows, places=HOST | {("device", "device")}):
    """Claims to copy within device memory, though it runs on the host."""


class ClaimsFloatIds(HostRows, index_dtypes=frozenset((torch.int32, torch.int64, torch.float32))):
    """Claims to read ids of float32, which no index has."""


@HostRows.mutate("capabilities")
def ClaimsChange(right: HostRows) -> Capabilities:
    """The claims change from one call to the next."""
    right.state["guards"] = not right.state.get("guards", False)
    return replace(right.capabilities(), guards=right.state["guards"])


@HostRows.mutate("check")
def RefusesEverything(right: HostRows, plan: CopyPlan) -> Decision:
    """Claims much and refuses every plan, in the hope that refusals count as skipped."""
    return replace(right.check(plan), accepted=False, reason="it would rather not")


@HostRows.mutate("prepare")
def RefusesOddWidths(right: HostRows, plan: CopyPlan) -> Launch:
    """Refuses rows of an odd number of bytes, which CORE asks of every backend."""
    if any(width % 2 for width in plan.src.widths):
        raise Unsupported("Moving odd rows", "rows have to be whole words of 2 bytes")
    return right.prepare(plan)


@HostRows.mutate("check")
def RefusesOddHeads(right: HostRows, plan: CopyPlan) -> Decision:
    """Refuses head counts that are no power of two, though it claims nothing that says so."""
    heads = plan.src.heads
    decision = right.check(plan)
    why = f"{heads} heads are not a power of two"
    return replace(decision, accepted=False, reason=why) if heads & (heads - 1) else decision


@HostRows.mutate("pairs")
def DividesByRows(right: HostRows, call: Call) -> Pair:
    """A copy whose positions are all padding ends in a division by zero."""
    src, dst = right.pairs(call)
    right.state["bytes of a row"] = call.count * call.plan.token_bytes // len(src)
    return src, dst
