# SPDX-License-Identifier: Apache-2.0
"""Shapes: how many contiguous runs a copy has, counted without expanding its plan.

What a copy costs an engine that uses the device's copy engine is decided by its bytes and by the
number of pieces that they lie in. Counting looks at the loops of the plan, and at which ids have
their neighbours next to them; the ids of an `Index` that is used again are looked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from portakv.engines.pieces import ALL, LEAST_HEIGHT, TALL
from portakv.host.memcpy import MAX_PITCH
from portakv.plan.loops import Loop, Nest
from portakv.plan.plan import CopyPlan
from portakv.plan.runs import Int64
from portakv.view.form import Steps
from portakv.view.index import Index

_KEPT = 256  # counts that are remembered for each plan
#: Units up to which ids are sorted, since runs are merged in the order of their addresses; counted
#: in the order of the index, the runs of more units may seem to be more than they are.
_SORTED = 1 << 16


class Shape(NamedTuple):
    """Bytes of a copy and the pieces that they lie in.

    ``runs`` are contiguous, neighbours merged: as many as `CopyPlan.runs` gives, or more where
    parts of a plan happen to meet. ``pieces`` are about what `fold` makes of them: what the host
    asks for, while the device pays for each row of a 2-D copy about as for a copy of its own.
    """

    nbytes: int
    runs: int
    pieces: int

    @property
    def run_bytes(self) -> int:
        """Bytes of a run, on average."""
        return max(1, self.nbytes // max(1, self.runs))


class RunCounter:
    """Counts the runs of one plan.

    Args:
        plan: any plan.
        mirrored: its two sides are one, and the runs are those between that side's memory and
            dense rows in the order of its index.
        fold_below: as `Crossing.fold_below` has it; 0: nothing folds, however many lie together.
    """

    def __init__(self, plan: CopyPlan, mirrored: bool = False, fold_below: int = ALL) -> None:
        self._unit, self._nests, self._mirrored = plan.unit, plan.nests, mirrored
        self._bytes, self._below = plan.token_bytes, fold_below
        self._known: dict[Any, int] = {}

    @classmethod
    def of_host(cls, plan: CopyPlan, fold_below: int = ALL) -> RunCounter:
        """A counter of the runs between a plan's host memory and dense rows in its order."""
        device_first = plan.src.place == "device"
        form, step = (plan.dst, plan.dst_step) if device_first else (plan.src, plan.src_step)
        return cls(CopyPlan(form, form, step, step, plan.unit), True, fold_below)

    def groups(self, src_index: Index, dst_index: Index, count: int) -> int:
        """Into how many groups ``count`` positions fall, in each of which the units follow each
        other on both sides."""
        key = _list_of(src_index), _list_of(dst_index), count
        known = self._known.get(key)
        if known is not None:
            return known
        found = self._count_groups(src_index, dst_index, count // self._unit)
        if len(self._known) >= _KEPT:
            self._known.clear()
        self._known[key] = found
        return found

    def shape(self, groups: int, count: int) -> Shape:
        """The shape of ``count`` positions that fall into so many groups."""
        units = count // self._unit
        parts = [_of_nest(nest, units, groups, self._below) for nest in self._nests]
        return Shape(count * self._bytes, sum(p[0] for p in parts), sum(p[1] for p in parts))

    def unmerged(self, count: int) -> Shape:
        """The shape for who merges nothing, as a kernel that goes by the plan's loops."""
        units = count // self._unit
        runs = units * sum(prod(loop.extent for loop in nest.loops) for nest in self._nests)
        return Shape(count * self._bytes, runs, runs)

    def _count_groups(self, src_index: Index, dst_index: Index, units: int) -> int:
        if units < 2:
            return units
        sides = [(self._nests[0].src.units, src_index), (self._nests[0].dst.units, dst_index)]
        limits = tuple(_limit(steps) for steps, _ in sides)
        if all(index.ids is None for _, index in sides):
            firsts = tuple(index.offset // self._unit for _, index in sides)
            return _consecutive(firsts, limits, units)
        lists = [index for _, index in sides if index.ids is not None]
        unknown = [index for index in lists if index.known_ids() is None]
        if unknown:  # asking the device would wait for it: taken as scattered
            return min(units, max(-(-units * self._unit // index.step) for index in unknown))
        numbers = [_numbers(index, units, self._unit) for _, index in sides]
        return _groups(numbers, limits, falling=not self._mirrored)


def _list_of(index: Index) -> tuple[object, bool, int]:
    """Which slots an index names, and whether the host knows them."""
    known = index.ids is None or index.known_ids() is not None
    return index.ids_token, known, index.offset


def _limit(steps: Steps) -> int:
    """After how many units they do not go on at the same pitch; 0: never."""
    return steps[-1].extent if len(steps) > 1 else 0


def _numbers(index: Index, units: int, unit: int) -> Int64:
    """The number of each unit, as `Index.units` has it."""
    first = index.offset // unit
    ids = index.known_ids()
    if index.ids is None or ids is None:
        return np.arange(first, first + units, dtype=np.int64)
    per_id = index.step // unit
    if per_id == 1:
        return ids[first : first + units]
    at = np.arange(first, first + units, dtype=np.int64)
    return np.asarray(ids[at // per_id] * per_id + at % per_id)


@lru_cache(maxsize=1024)
def _consecutive(firsts: tuple[int, ...], limits: tuple[int, ...], units: int) -> int:
    """Groups of units that follow each other on all sides, but for limits."""
    if not any(limits):
        return 1
    numbers = [np.arange(first, first + units, dtype=np.int64) for first in firsts]
    return _groups(numbers, limits, falling=False)


def _groups(numbers: Sequence[Int64], limits: Sequence[int], falling: bool) -> int:
    """Groups of positions in which the numbers of all sides rise by one, across no limit.

    ``falling``: positions that fall by one on all sides belong together as well, and so do others
    that follow each other once they are sorted.
    """
    first = numbers[0]
    if falling and first.size <= _SORTED and bool((first[1:] < first[:-1]).any()):
        order = np.argsort(first, kind="stable")
        numbers = [column[order] for column in numbers]
    rises = [np.diff(column) for column in numbers]
    joins = np.logical_and.reduce([rise == 1 for rise in rises])
    for column, limit in zip(numbers, limits, strict=True):
        if limit:
            joins &= column[1:] % limit != 0
    if falling and first.size > _SORTED:
        joins |= np.logical_and.reduce([rise == -1 for rise in rises])
    return int(joins.size + 1 - np.count_nonzero(joins))


def _of_nest(nest: Nest, units: int, groups: int, below: int) -> tuple[int, int]:
    """Runs and pieces of one nest, folded as `fold` does with this ``below`` (0: not at all), on
    average."""
    if not units:
        return 0, 0
    src, dst = nest.src.units[-1], nest.dst.units[-1]
    joined = src.stride == dst.stride == nest.run and not (src.table or dst.table)
    lines, width, loops = (groups if joined else units), nest.run, list(nest.loops)
    if joined and _equal(nest, units, groups):
        width, loops = _absorb(loops, nest.run * (units // groups))
    around = prod(loop.extent for loop in loops)
    runs = pieces = lines * around
    if not below:
        return runs, runs
    least = LEAST_HEIGHT if max(width, nest.run * units // lines) < below else TALL
    for loop in loops:
        if not loop.tabled and _folds(least, loop.extent, width, loop.src_stride, loop.dst_stride):
            pieces = min(pieces, runs // loop.extent)
    if not joined and _folds(least, units // groups, width, src.stride, dst.stride):
        pieces = min(pieces, groups * around)
    return runs, pieces


def _equal(nest: Nest, units: int, groups: int) -> bool:
    """Whether all groups are known to be of one length: there is one, or each is a whole block."""
    limits = [limit for side in (nest.src, nest.dst) if (limit := _limit(side.units))]
    return groups == 1 or (bool(limits) and units == groups * min(limits))


def _absorb(loops: list[Loop], width: int) -> tuple[int, list[Loop]]:
    """Merge loops into a run that they continue on both sides; what is left of them."""
    left = list(loops)
    while True:
        following = [x for x in left if x.src_stride == x.dst_stride == width and not x.tabled]
        if not following:
            return width, left
        left.remove(following[0])
        width *= following[0].extent


def _folds(least: int, height: int, width: int, *pitches: int) -> bool:
    """Whether rows at such pitches become one 2-D copy, of so many at least."""
    return height >= least and width <= min(pitches) and max(pitches) <= MAX_PITCH
