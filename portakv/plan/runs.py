# SPDX-License-Identifier: Apache-2.0
"""Runs: a plan expanded on the host into contiguous pieces, for copy engines, files, networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from portakv.errors import SlotError
from portakv.plan.loops import Loop, Nest
from portakv.plan.move import Move
from portakv.view.view import KVView

Int64 = npt.NDArray[np.int64]


class Runs(NamedTuple):
    """Contiguous pieces: int64 arrays of equal length; ``src`` and ``dst`` hold addresses."""

    src: Int64
    dst: Int64
    nbytes: Int64


class Factors(NamedTuple):
    """The runs of a nest as a sum: every line in every plane; their addresses are added.

    Both are in the order of the source. ``nbytes`` of planes is the size of the longest line.
    """

    planes: Runs
    lines: Runs


def factors(nests: Sequence[Nest], unit: int, move: Move) -> list[Factors]:
    """Return for each nest the runs of a copy, before multiplication; raises as `CopyPlan.runs`
    does."""
    src = move.src
    dst = move.dst
    src_index = move.src_index
    dst_index = move.dst_index
    count = move.count
    if not isinstance(count, (int, np.integer)) or count < 0 or count % unit:
        raise SlotError(
            f"Expected runs of a multiple of the plan's unit {unit}, got {count!r} tokens. Pass "
            f"head and tail to a plan with unit=1."
        )
    for index, view, side in ((src_index, src, "source"), (dst_index, dst, "destination")):
        index.check_length(count, view.slots, side)
        index.check(count, view.slots, side)
    slots = src_index.slots(count, unit), dst_index.slots(count, unit)
    moved = (slots[0] >= 0) & (slots[1] >= 0)
    if not moved.all():
        slots = slots[0][moved], slots[1][moved]
    return [_factors(nest, unit, (src, dst), slots) for nest in nests]


def summed(several: Sequence[Factors]) -> Runs:
    """Return the runs of several nests, multiplied out and merged, in the order of the source."""
    columns = [_sum(*one) for one in several]
    if len(columns) == 1:
        return _merge(*columns[0])
    return _merge(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def _sum(planes: Runs, lines: Runs) -> Runs:
    """Return every line in every plane; in order if one of the two lies inside the other's gaps."""
    outer = planes
    inner = lines
    if lines.src.size > 1 and np.ptp(planes.src) < np.diff(lines.src).min():
        outer = lines
        inner = planes
    nbytes = np.broadcast_to(lines.nbytes, (planes.src.size, lines.src.size))
    if outer is lines:
        nbytes = nbytes.T
    src = _outer(outer.src, inner.src)
    dst = _outer(outer.dst, inner.dst)
    return Runs(src, dst, nbytes.reshape(-1))


def _factors(
    nest: Nest, unit: int, views: tuple[KVView, KVView], slots: tuple[Int64, Int64]
) -> Factors:
    inner, outer, by_line = _split(nest)
    planes = []
    lines = []
    zero = np.zeros(1, dtype=np.int64)
    for at, (side, view, unit_slots) in enumerate(
        zip((nest.src, nest.dst), views, slots, strict=True)
    ):
        entries, offsets = side.locate(unit_slots // unit)
        # Only if tokens lie at one stride may a unit begin between multiples.
        offsets = offsets + unit_slots % unit * (side.units[-1].stride // unit) + side.offset
        entries = (unit_slots * 0 if entries is None else entries) + side.table
        entries, offsets = _walk(entries, offsets, inner, at)
        tables, starts = _walk(zero + side.table, zero, outer, at)
        if by_line[at]:
            offsets = view.addresses[entries] + offsets
        else:
            starts = view.addresses[tables] + starts
        planes.append(starts)
        lines.append(offsets)
    merged = _merge(lines[0], lines[1], np.full(lines[0].shape, nest.run, dtype=np.int64))
    order = np.argsort(planes[0], kind="stable")
    widest = np.full(order.shape, merged.nbytes.max(initial=0), dtype=np.int64)
    return Factors(Runs(planes[0][order], planes[1][order], widest), merged)


def _split(nest: Nest) -> tuple[list[Loop], list[Loop], tuple[bool, bool]]:
    """Return the loops inside the lines, the loops over planes, and the side to look up per line.

    The third value is true for each side whose address is looked up for each line. A side's address
    cannot be looked up for both lines and planes, because the two are added.
    """
    inner: list[Loop] = []
    outer = list(nest.loops)
    src = nest.src.tabled
    dst = nest.dst.tabled
    # A loop that is taken into the lines for one side may need a look-up of the other side, which
    # then takes more loops.
    while True:
        taken = [x for x in outer if (src and x.src_table) or (dst and x.dst_table)]
        if not taken:
            return inner, outer, (src, dst)
        inner += taken
        outer = [x for x in outer if x not in taken]
        src = src or any(x.src_table for x in taken)
        dst = dst or any(x.dst_table for x in taken)


def _walk(entries: Int64, offsets: Int64, loops: Sequence[Loop], side: int) -> tuple[Int64, Int64]:
    """Return the table entries and byte offsets for each step of the loops."""
    for loop in loops:
        at = np.arange(loop.extent, dtype=np.int64)
        entries = _outer(entries, at * (loop.src_table, loop.dst_table)[side])
        offsets = _outer(offsets, at * (loop.src_stride, loop.dst_stride)[side])
    return entries, offsets


def _outer(base: Int64, steps: Int64) -> Int64:
    return np.asarray((base[:, None] + steps[None, :]).reshape(-1))


def _merge(src: Int64, dst: Int64, nbytes: Int64) -> Runs:
    if not (src[1:] > src[:-1]).all():
        order = np.lexsort((dst, src))
        src = src[order]
        dst = dst[order]
        nbytes = nbytes[order]
    joins = (src[:-1] + nbytes[:-1] == src[1:]) & (dst[:-1] + nbytes[:-1] == dst[1:])
    if not joins.any():
        return Runs(src, dst, nbytes)
    first = np.flatnonzero(np.concatenate(([True], ~joins)))
    return Runs(src[first], dst[first], np.add.reduceat(nbytes, first))
