# SPDX-License-Identifier: Apache-2.0
"""Runs: a plan expanded on the host into contiguous pieces, for copy engines, files, networks."""

from __future__ import annotations

from collections.abc import Sequence
from operator import sub
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from portakv.errors import SlotError
from portakv.plan.loops import Loop, Nest, Side
from portakv.plan.move import Move
from portakv.view.index import SHORT, UnitNumbers
from portakv.view.view import KVView

Int64 = npt.NDArray[np.int64]


class Runs(NamedTuple):
    """Contiguous pieces: int64 arrays of equal length; ``src`` and ``dst`` hold addresses."""

    src: Int64
    dst: Int64
    nbytes: Int64


class Planes(NamedTuple):
    """The first addresses of planes: int64 arrays of equal length."""

    src: Int64
    dst: Int64


class Factors(NamedTuple):
    """The runs of a nest as a sum: every line in every plane; their addresses are added.

    The planes are in the order of the source, and so are the lines unless any order was requested.
    The lines of a single plane have whole addresses, and the plane is `ONLY_PLANE`.
    """

    planes: Planes
    lines: Runs


#: A plane whose lines have whole addresses.
ONLY_PLANE = Planes(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))


class _Even(NamedTuple):
    """Units of a side at one stride.

    Attributes:
        table, offset: the entry of the table, and the bytes from there to the first unit.
        stride: the bytes between units.
    """

    table: int
    offset: int
    stride: int


class Expansion:
    """The expansion of a nest, as far as no ids and no addresses are needed.

    The loops inside the lines, and the loops over planes. The address of a side that is ``by_line``
    is looked up for each line, else for each plane; it cannot be looked up for both, because the
    two are added.
    """

    def __init__(self, nest: Nest, unit: int) -> None:
        self._nest = nest
        self._unit = unit
        self._inner, outer, self._by_line = _split(nest)
        zero = np.zeros(1, dtype=np.int64)
        #: For each side the table entry and the distance of each plane.
        self._planes = [
            _walk(zero + side.table, zero, outer, at) for at, side in enumerate(nest.sides)
        ]
        self._single = not outer
        #: For each side its units at one stride; None if their addresses take more steps.
        self._even = [
            None if self._inner or by_line else _even(side)
            for side, by_line in zip(nest.sides, self._by_line, strict=True)
        ]
        #: Two units may form one run.
        self._join = all(even is None or even.stride == nest.run for even in self._even)

    def factors(
        self, views: tuple[KVView, KVView], numbers: Sequence[UnitNumbers], ordered: bool
    ) -> Factors:
        """Return the runs of the units with these numbers, on either side, before
        multiplication."""
        src_even, dst_even = self._even
        if src_even is not None and dst_even is not None:
            lines = self._even_lines(views, numbers, (src_even, dst_even))
        else:
            src = self._lines(0, self._nest.src, views[0], numbers[0])
            dst = self._lines(1, self._nest.dst, views[1], numbers[1])
            lines = Runs(src, dst, np.full(src.size, self._nest.run, dtype=np.int64))
        if ordered or (self._join and _may_meet(lines, self._nest.run)):
            lines = _merge(*lines)
        if self._single:
            return Factors(ONLY_PLANE, lines)
        first = self._starts(0, views[0])
        order = first.argsort(kind="stable")
        return Factors(Planes(first[order], self._starts(1, views[1])[order]), lines)

    def _starts(self, at: int, view: KVView) -> Int64:
        """Return the address of each plane on a side, or its distance if lines have addresses."""
        tables, starts = self._planes[at]
        return starts if self._by_line[at] else view.addresses[tables] + starts

    def _even_lines(
        self, views: tuple[KVView, KVView], numbers: Sequence[UnitNumbers], even: Sequence[_Even]
    ) -> Runs:
        """Return the lines of units that lie at one stride on both sides, before neighbours are
        merged."""
        columns = []
        for view, (units, rest), side in zip(views, numbers, even, strict=True):
            stride = side.stride
            first = side.offset + rest * (stride // self._unit)
            if self._single:
                first += view.origins[side.table]
            if units.size > SHORT:
                columns.append(units * stride + first)
            else:
                few = [unit * stride + first for unit in units.tolist()]
                columns.append(np.array(few, dtype=np.int64))
        nbytes = np.empty(columns[0].size, dtype=np.int64)
        nbytes[:] = self._nest.run
        src, dst = columns
        return Runs(src, dst, nbytes)

    def _lines(self, at: int, side: Side, view: KVView, numbers: UnitNumbers) -> Int64:
        """Return the distances of lines from their plane on a side; their addresses if the plane is
        the only one, or if each line has another entry of the table."""
        units, rest = numbers
        by_line = self._by_line[at]
        # Only if tokens lie at one stride may a unit begin between multiples.
        first = side.offset + rest * (side.units[-1].stride // self._unit)
        if self._single and not by_line:
            first += view.origins[side.table]
        even = self._even[at]
        if even is not None:
            return units * even.stride + first
        entries, offsets = side.locate(units)
        if first:
            offsets = offsets + first
        if self._inner or by_line:
            entries = (units * 0 if entries is None else entries) + side.table
            entries, offsets = _walk(entries, offsets, self._inner, at)
        if by_line:
            offsets = view.addresses[entries] + offsets
        return offsets


def _even(side: Side) -> _Even | None:
    """Return the units of a side if all that follow each other lie at one stride; else None."""
    step = side.units[0]
    even = len(side.units) == 1 and not step.extent and not step.table
    return _Even(side.table, side.offset, step.stride) if even else None


def factors(
    expansions: Sequence[Expansion], unit: int, move: Move, ordered: bool = True
) -> list[Factors]:
    """Return for each nest the runs of a copy, before multiplication; raises as `CopyPlan.runs`
    does.

    ``ordered``: the lines of a nest are in the order of the source; else in any order.
    """
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
    skips = False
    for index, view, side in ((src_index, src, "source"), (dst_index, dst, "destination")):
        index.check_length(count, view.slots, side)
        # Ids that are read back from a device were not checked, and may be of any size.
        skips |= index.check(count, view.slots, side) or not index.on_host
    numbers = [index.unit_numbers(count, unit, skips) for index in (src_index, dst_index)]
    if skips:
        moved = (numbers[0].units >= 0) & (numbers[1].units >= 0)
        numbers = [each._replace(units=each.units[moved]) for each in numbers]
    return [each.factors((src, dst), numbers, ordered) for each in expansions]


def summed(several: Sequence[Factors]) -> Runs:
    """Return the runs of several nests, multiplied out and merged, in the order of the source."""
    columns = [_sum(*one) for one in several]
    if len(columns) == 1:
        in_order = several[0].planes is ONLY_PLANE  # as the lines are, whose neighbours are merged
        return columns[0] if in_order else _merge(*columns[0])
    return _merge(*joined(columns))


def unmerged(several: Sequence[Factors]) -> Runs:
    """Return the runs of several nests, multiplied out: neighbours in one plane are merged, planes
    that meet are not. In any order."""
    columns = [_every_line(planes, lines) for planes, lines in several]
    return columns[0] if len(columns) == 1 else joined(columns)


def joined(several: Sequence[Runs]) -> Runs:
    """Return lists of runs one after the other."""
    return Runs(*(np.concatenate(column) for column in zip(*several, strict=True)))


def _sum(planes: Planes, lines: Runs) -> Runs:
    """Return every line in every plane; in order if one of the two lies inside the other's gaps."""
    if planes is ONLY_PLANE:
        return lines
    if lines.src.size > 1 and np.ptp(planes.src) < np.diff(lines.src).min():
        src = _outer(lines.src, planes.src)
        dst = _outer(lines.dst, planes.dst)
        return Runs(src, dst, lines.nbytes.repeat(planes.src.size))
    return _every_line(planes, lines)


def _every_line(planes: Planes, lines: Runs) -> Runs:
    """Return every line in every plane, plane after plane."""
    if planes is ONLY_PLANE:
        return lines
    nbytes = np.empty((planes.src.size, lines.src.size), dtype=np.int64)
    nbytes[:] = lines.nbytes
    return Runs(_outer(planes.src, lines.src), _outer(planes.dst, lines.dst), nbytes.reshape(-1))


def _split(nest: Nest) -> tuple[list[Loop], list[Loop], tuple[bool, bool]]:
    """Return the loops inside the lines, the loops over planes, and for each side whether its
    address is looked up for each line."""
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


def _may_meet(lines: Runs, run: int) -> bool:
    """Return whether a few lines of ``run`` bytes have neighbours on both sides; True for many."""
    number = lines.src.size
    if number > SHORT:
        return True
    sources = lines.src.tolist()
    targets = lines.dst.tolist()
    if len(set(map(sub, targets, sources))) == number:
        return False  # neighbours are moved by one distance
    places = set(zip(sources, targets, strict=True))
    followers = {(source + run, target + run) for source, target in places}
    return not places.isdisjoint(followers)


def _merge(src: Int64, dst: Int64, nbytes: Int64) -> Runs:
    # For a few runs `count_nonzero` takes a quarter of the time that `any` and `all` take.
    steps = src[1:] - src[:-1]
    if np.count_nonzero(steps > 0) < steps.size:
        order = src.argsort()
        ordered = src[order]
        steps = ordered[1:] - ordered[:-1]
        if np.count_nonzero(steps) < steps.size:
            order = np.lexsort((dst, src))  # equal sources go by their destinations
        src = ordered
        dst = dst[order]
        nbytes = nbytes[order]
    joins = steps == nbytes[:-1]
    if np.count_nonzero(joins):
        joins &= dst[1:] - dst[:-1] == nbytes[:-1]
    if not np.count_nonzero(joins):
        return Runs(src, dst, nbytes)
    first = np.flatnonzero(np.concatenate(([True], ~joins)))
    return Runs(src[first], dst[first], np.add.reduceat(nbytes, first))
