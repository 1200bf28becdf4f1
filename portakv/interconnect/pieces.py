# SPDX-License-Identifier: Apache-2.0
"""Pieces: the copies that cross the link; runs at constant pitches become 2-D copies.

The number of runs and pieces decides the cost of a copy by a strategy. It is counted without
expanding the plan: from its loops, and from the ids whose neighbours follow them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from portakv.host import pinned
from portakv.host.memcpy import MAX_PITCH
from portakv.plan.loops import Loop, Nest
from portakv.plan.plan import CopyPlan, Move
from portakv.plan.runs import ONLY_PLANE, Factors, Int64, Planes, Runs, summed, unmerged
from portakv.runtime.bounded import Bounded
from portakv.view.form import Steps
from portakv.view.index import SHORT, Index
from portakv.view.view import KVView

#: Fewer rows stay separate copies. A 2-D copy is a separate call, and costs the host as much as
#: this many entries of a batched call (H200: 3.3 us, and 0.42 us for an entry).
LEAST_HEIGHT = 8

#: The same for wide rows, which cross faster as entries of a batch. Yet this many rows become one
#: 2-D copy, since the host would be busy for longer than the link. On an H200 64 rows of 32 KiB
#: took the host 4 us and reached 0.78 (D2H) and 0.92 (H2D) of a memcpy. As entries they took it 28
#: us and more, and reached 0.98 where the host kept up, 0.5 - 0.9 where it did not.
TALL = 32

#: Rows of this many bytes stay entries of a batch, if the link has batches: the host describes an
#: entry (0.42 us) in less than the link takes to move it (1.2 us), and looking for constant pitches
#: would take the host longer than it saves.
APART = 64 << 10

#: A width that no row reaches.
ALL = 1 << 62

#: From this many runs on, factors are folded before they are multiplied: 57,088 runs of a
#: layer-first pool take 3.5 ms of one core instead of 24. Runs that meet only at the ends of planes
#: are not merged.
LARGE = 4096

Mask = npt.NDArray[np.bool_]


_NO_BOUNDARIES = np.zeros(0, dtype=np.int64)
_ONES = np.ones(LARGE, dtype=np.int64)
_ONES.setflags(write=False)  # the heights of most lists of pieces


class Pieces(NamedTuple):
    """2-D copies: int64 arrays of one length, addresses and bytes; height 1 is a plain copy.

    No byte of the destinations occurs twice, so their order does not matter.
    """

    dst: Int64
    src: Int64
    width: Int64
    height: Int64
    dst_pitch: Int64
    src_pitch: Int64

    @property
    def number(self) -> int:
        """Return the number of pieces."""
        return self.dst.size

    @property
    def nbytes(self) -> int:
        """Return all bytes that the pieces move."""
        if self.plain and self.width.size <= SHORT:  # 0.4 us in place of 3
            return sum(self.width.tolist())
        return int(self.width @ self.height)

    @property
    def plain(self) -> bool:
        """Return True if all pieces were made as plain copies; without a look at them, so False
        says nothing."""
        return self.dst_pitch is self.width

    def part(self, first: int, past: int) -> Pieces:
        """Return a range of the pieces."""
        return Pieces(*(column[first:past] for column in self))

    def where(self, chosen: Mask) -> Pieces:
        """Return some of the pieces."""
        return Pieces(*(column[chosen] for column in self))


def portions(pieces: Pieces, most: int) -> list[tuple[int, int, int]]:
    """Return the ranges of pieces, in their order, that have ``most`` bytes at most each; a larger
    piece is a range. A range is (first, past, bytes)."""
    total = pieces.nbytes
    if pieces.number < 2 or total <= most:
        return [(0, pieces.number, total)]
    reached = np.cumsum(pieces.width if pieces.plain else pieces.width * pieces.height)
    first = before = 0
    ranges = []
    while first < pieces.number:
        past = max(first + 1, int(reached.searchsorted(before + most, "right")))
        after = int(reached[past - 1])
        ranges.append((first, past, after - before))
        first = past
        before = after
    return ranges


def none_above(pieces: Pieces, most: int) -> Pieces:
    """Return the pieces, in any order, of ``most`` bytes at most each: larger pieces are cut
    between their rows, and single rows anywhere."""
    large = pieces.width * pieces.height > most
    if not large.any():
        return pieces
    columns = [column.tolist() for column in pieces.where(large)]
    parts = [part for piece in zip(*columns, strict=True) for part in _parts(piece, most)]
    several = [pieces.where(~large), Pieces(*np.array(parts, dtype=np.int64).T)]
    dst, src, width, *shape = (np.concatenate(column) for column in zip(*several, strict=True))
    return _plain(Runs(src, dst, width)) if pieces.plain else Pieces(dst, src, width, *shape)


def _parts(piece: Sequence[int], most: int) -> Iterator[tuple[int, ...]]:
    """Yield a piece in parts of ``most`` bytes at most."""
    dst, src, width, height, dst_pitch, src_pitch = piece
    high = max(1, most // width)  # rows of a part
    for row in range(0, height, high):
        rows = min(high, height - row)
        target = dst + row * dst_pitch
        source = src + row * src_pitch
        if rows > 1:
            yield target, source, width, rows, dst_pitch, src_pitch
            continue
        for at in range(0, width, most):
            length = min(most, width - at)
            yield target + at, source + at, length, 1, length, length


def pieces_of(plan: CopyPlan, move: Move, below: int = ALL) -> Pieces:
    """Return the pieces of a plan's runs, as `to_2d_copies` makes them; raise as `CopyPlan.runs`
    does."""
    src = move.src
    dst = move.dst
    # Wide runs stay separate pieces in any order.
    apart = below <= APART <= plan.run and not plan.by_unit
    several = plan.factors(move, not apart)
    if apart and not _planes_meet(several):
        # Each run lies in the allocation of its plane, so the ends of allocations need no look-up.
        runs = unmerged(several)
        return _plain(_apart(runs, [])[0] if pinned.boundaries() else runs)
    if several[0].planes is ONLY_PLANE and (_whole_entries(plan, src) or _whole_entries(plan, dst)):
        # Each unit is all bytes at one address, so no unit joins another, and the ends of
        # allocations need no look-up.
        return _plain(_apart(_in_parts(summed(several), plan.nests[0].run), [])[0])
    if sum(planes.src.size * lines.src.size for planes, lines in several) >= LARGE:
        boundaries = _boundaries([src, dst])
        if all(_between(boundaries, *each) for each in several):
            folded = [_fold_factors(boundaries, below, *each) for each in several]
            if len(folded) == 1:
                return folded[0]
            return Pieces(*(np.concatenate(column) for column in zip(*folded, strict=True)))
    return to_2d_copies(summed(several), src, dst, below)


def _planes_meet(several: Sequence[Factors]) -> bool:
    """Return whether a nest has one line in several planes, which may follow each other."""
    for planes, lines in several:  # noqa: SIM110 - a hot path: a generator costs twice as much
        if planes.src.size > 1 == lines.src.size:
            return True
    return False


def _whole_entries(plan: CopyPlan, view: KVView) -> bool:
    """Return whether a run of a plan is all bytes at one of a view's several addresses."""
    return view.entries > 1 and [view.entry_bytes] == [nest.run for nest in plan.nests]


def _in_parts(runs: Runs, nbytes: int) -> Runs:
    """Return runs cut into parts of ``nbytes``."""
    parts = runs.nbytes // nbytes
    of_run = np.repeat(np.arange(parts.size), parts)
    moved = nbytes * (np.arange(of_run.size) - np.repeat(np.cumsum(parts) - parts, parts))
    return Runs(runs.src[of_run] + moved, runs.dst[of_run] + moved, np.full_like(moved, nbytes))


def _between(boundaries: Int64, planes: Planes, lines: Runs) -> bool:
    """Return whether no plane's lines lie on both sides of a boundary."""
    if not boundaries.size or not lines.nbytes.size:
        return True
    for side in (0, 1):
        first = planes[side] + lines[side].min()
        past = planes[side] + (lines[side] + lines.nbytes).max()
        if (_search(boundaries, first, "right") != _search(boundaries, past, "left")).any():
            return False
    return True


def _fold_factors(boundaries: Int64, below: int, planes: Planes, lines: Runs) -> Pieces:
    """Fold the planes or the lines, whichever gives fewer pieces, and return every line in every
    plane."""
    if not lines.nbytes.size:
        return _plain(lines)
    by_line = _least(lines, np.zeros((0, lines.nbytes.size), dtype=np.int64), below)
    areas = [_search(boundaries, planes[at] + lines[at].min(), "right") for at in (0, 1)]
    widest = lines.nbytes.max()
    wide_planes = Runs(*planes, np.full(planes.src.size, widest, dtype=np.int64))
    by_plane = _least(wide_planes, np.stack(areas), ALL if widest < below else 0)
    if by_plane.number * lines.nbytes.size < by_line.number * planes.src.size:
        return _times(by_plane, _plain(lines))
    return _times(_plain(wide_planes), by_line)


def _times(planes: Pieces, lines: Pieces) -> Pieces:
    """Return every line in every plane. Either the lines have one row each, or the planes."""
    own = Pieces(*(column[:, None] for column in planes))
    columns = [own.dst + lines.dst, own.src + lines.src, lines.width, own.height * lines.height]
    for outer, inner in zip(own[4:], lines[4:], strict=True):
        columns.append(np.where(own.height > 1, outer, inner) if own.height.max() > 1 else inner)
    shape = planes.number, lines.number
    return Pieces(*(np.broadcast_to(column, shape).reshape(-1) for column in columns))


def _plain(runs: Runs) -> Pieces:
    src, dst, width = runs
    number = width.size
    height = _ONES[:number] if number <= LARGE else np.ones(number, dtype=np.int64)
    return Pieces(dst, src, width, height, width, width)


def to_2d_copies(
    runs: Runs, src: KVView | None = None, dst: KVView | None = None, below: int = ALL
) -> Pieces:
    """Return runs as few pieces: exactly their bytes, each once, in any order.

    The runs come in the order of the source, with neighbours merged. No piece reaches from one
    allocation of the views into another, nor across a boundary between two registrations, which
    drivers reject. Runs of ``below`` bytes or more become rows only if many lie together, those of
    `APART` bytes never.
    """
    return _least(*_apart(runs, [view for view in (src, dst) if view is not None]), below)


def _least(runs: Runs, areas: Int64, below: int = ALL) -> Pieces:
    """Fold runs, each in an area, in the order that gives the fewest pieces."""
    if below <= APART <= np.minimum.reduce(runs.nbytes, initial=ALL):
        return _plain(runs)
    best = _in_order(runs, areas, below)
    for lag in _lags(runs):
        if lag >= best.number:  # it gives at least as many pieces
            break
        order = _by_lag(runs.nbytes.size, lag)
        there = _in_order(Runs(*(column[order] for column in runs)), areas[:, order], below)
        if there.number < best.number:
            best = there
    return best


def _in_order(runs: Runs, areas: Int64, below: int) -> Pieces:
    """Fold rows that follow each other in this order."""
    src, dst, width = runs
    if width.size < LEAST_HEIGHT:
        return _plain(runs)
    src_step = np.diff(src)
    dst_step = np.diff(dst)
    joins = (width[1:] == width[:-1]) & (np.minimum(src_step, dst_step) >= width[:-1])
    joins &= np.maximum(src_step, dst_step) <= MAX_PITCH
    for area in areas:
        joins &= area[1:] == area[:-1]
    same = (
        (src_step[1:] == src_step[:-1]) & (dst_step[1:] == dst_step[:-1]) & joins[1:] & joins[:-1]
    )
    # A streak is a sequence of equal steps. A row that two streaks share belongs to the first.
    first = np.flatnonzero(np.append(True, ~same))[: joins.size]
    length = np.diff(first, append=joins.size)
    least = np.where(width[first] < below, LEAST_HEIGHT, TALL)
    long = joins[first] & (length >= least - 1)
    if not long.any():
        return _plain(runs)
    streak = np.repeat(np.where(long, np.arange(first.size), -1), length)
    before = np.append(-1, streak)
    after = np.append(streak, -1)
    of_row = np.where(before >= 0, before, after)
    begins = np.flatnonzero((of_row < 0) | np.append(True, of_row[1:] != of_row[:-1]))
    height = np.diff(begins, append=width.size)
    widths = width[begins]
    step = np.minimum(begins, joins.size - 1)
    pitches = [np.where(height > 1, column[step], widths) for column in (dst_step, src_step)]
    return Pieces(dst[begins], src[begins], widths, height, *pitches)


def _lags(runs: Runs) -> list[int]:
    """Return after how many runs the steps between them repeat, such as the number of blocks of
    each layer.

    The step at a few positions is compared with later steps.
    """
    src_steps = np.diff(runs.src)
    dst_steps = np.diff(runs.dst)
    width = runs.nbytes[:-1]
    steps = width.size
    lags = set[int]()
    for at in {0, steps // 3, steps // 2} if steps >= LEAST_HEIGHT else ():
        alike = (
            (src_steps[at:] == src_steps[at])
            & (dst_steps[at:] == dst_steps[at])
            & (width[at:] == width[at])
        )
        lags.update(int(gap) for gap in np.flatnonzero(alike)[1:3])
    return sorted(lag for lag in lags if 1 < lag <= steps // (LEAST_HEIGHT - 1))


def _by_lag(count: int, lag: int) -> Int64:
    """Return the order in which each run precedes the run ``lag`` later."""
    rounds = -(-count // lag)
    order = np.arange(rounds * lag, dtype=np.int64).reshape(rounds, lag).T.reshape(-1)
    return np.asarray(order[order < count])


def _apart(runs: Runs, views: list[KVView]) -> tuple[Runs, Int64]:
    """Cut runs where allocations meet; return them, and the area in which each begins, on either
    side."""
    boundaries = _boundaries(views)
    if not boundaries.size:
        return runs, np.zeros((0, runs.nbytes.size), dtype=np.int64)
    for side in (0, 1):
        runs = _cut(runs, side, boundaries)
    return runs, np.stack([_search(boundaries, runs[side], "right") for side in (0, 1)])


def _boundaries(views: list[KVView]) -> Int64:
    """Return the addresses, in order, that no copy may cross."""
    several = [view.edges() for view in views if view.entries > 1]
    registered = pinned.boundaries()
    if registered:
        several.append(np.array(registered, dtype=np.int64))
    return np.unique(np.concatenate(several)) if several else _NO_BOUNDARIES


def _search(boundaries: Int64, addresses: Int64, side: Literal["left", "right"]) -> Int64:
    """Search as `np.searchsorted` does; many boundaries in the order of the addresses, six times as
    fast."""
    if boundaries.size < FEW:
        return np.asarray(np.searchsorted(boundaries, addresses, side))
    order = np.argsort(addresses)
    positions = np.empty_like(addresses)
    positions[order] = np.searchsorted(boundaries, addresses[order], side)
    return positions


def _cut(runs: Runs, side: int, boundaries: Int64) -> Runs:
    """Cut runs so that none crosses a boundary on one side."""
    starts = runs[side]
    nbytes = runs.nbytes
    inside = _search(boundaries, starts, "right")
    cuts = _search(boundaries, starts + nbytes, "left") - inside
    if not (cuts > 0).any():
        return runs
    parts = np.maximum(cuts, 0) + 1
    of_run = np.repeat(np.arange(starts.size), parts)
    number = np.arange(of_run.size) - np.repeat(np.cumsum(parts) - parts, parts)
    bounds = np.append(boundaries, np.iinfo(np.int64).max)
    begin = np.where(number > 0, bounds[inside[of_run] + number - 1], starts[of_run])
    end = np.minimum(bounds[inside[of_run] + number], (starts + nbytes)[of_run])
    moved = begin - starts[of_run]
    return Runs(runs.src[of_run] + moved, runs.dst[of_run] + moved, end - begin)


#: The number of boundaries that fit into a core's nearest cache.
FEW = 1024
_CACHED = 256  # counts cached for each plan
#: Units up to which ids are sorted, since runs are merged in the order of their addresses. The runs
#: of more units are counted in the order of the index, and may seem more than they are.
SORTED = 1 << 16


class Shape(NamedTuple):
    """Bytes of a copy and the pieces that they lie in.

    ``runs`` are contiguous, with neighbours merged: as many as `CopyPlan.runs` gives, or more if
    parts of a plan happen to meet. ``pieces`` are about as many as `to_2d_copies` makes: the host
    pays for each piece, while the device pays for each row of a 2-D copy about as for a separate
    copy.
    """

    nbytes: int
    runs: int
    pieces: int

    @property
    def run_bytes(self) -> int:
        """Return the average bytes of a run."""
        return max(1, self.nbytes // max(1, self.runs))


class RunCounter:
    """Count the runs of one plan.

    ``dense``: both sides of the plan have one form, and its runs are counted between that form's
    memory and dense rows in the order of its index. ``fold_below``: the link's limit; 0: nothing
    folds.
    """

    def __init__(self, plan: CopyPlan, dense: bool = False, fold_below: int = ALL) -> None:
        self._unit = plan.unit
        self._nests = plan.nests
        self._dense = dense
        self._bytes = plan.token_bytes
        self._below = fold_below
        self._known: Bounded[tuple[object, ...], int] = Bounded("counts of runs", _CACHED)

    @classmethod
    def of_host(cls, plan: CopyPlan, fold_below: int = ALL) -> RunCounter:
        """Return a counter of the runs between a plan's host memory and dense rows in its order."""
        device_first = plan.src.place == "device"
        form, step = (plan.dst, plan.dst_step) if device_first else (plan.src, plan.src_step)
        return cls(CopyPlan(form, form, step, step, plan.unit), True, fold_below)

    def groups(self, src_index: Index, dst_index: Index, count: int) -> int:
        """Return the number of groups of ``count`` positions. In a group the units follow each
        other on both sides."""
        key = _list_of(src_index), _list_of(dst_index), count
        units = count // self._unit
        return self._known.get_or_make(key, lambda: self._count_groups(src_index, dst_index, units))

    def shape(self, groups: int, count: int) -> Shape:
        """Return the shape of ``count`` positions in ``groups`` groups."""
        units = count // self._unit
        parts = [_of_nest(nest, units, groups, self._below) for nest in self._nests]
        return Shape(count * self._bytes, sum(p[0] for p in parts), sum(p[1] for p in parts))

    def unmerged(self, count: int) -> Shape:
        """Return the shape for a kernel that follows the plan's loops and merges nothing."""
        units = count // self._unit
        runs = units * sum(prod(loop.extent for loop in nest.loops) for nest in self._nests)
        return Shape(count * self._bytes, runs, runs)

    def _count_groups(self, src_index: Index, dst_index: Index, units: int) -> int:
        if units < 2:
            return units
        sides = [(self._nests[0].src.units, src_index), (self._nests[0].dst.units, dst_index)]
        limits = tuple(_limit(steps) for steps, _ in sides)
        lists = [index for _, index in sides if index.ids is not None]
        if not (lists or any(limits)):
            return 1
        unknown = [index for index in lists if index.known_ids() is None]
        if unknown:  # reading ids back would wait for the device: they count as scattered
            return min(units, max(-(-units * self._unit // index.step) for index in unknown))
        count = units * self._unit
        numbers = [index.unit_numbers(count, self._unit).units for _, index in sides]
        return _groups(numbers, limits, falling=not self._dense)


def _list_of(index: Index) -> tuple[object, bool, int]:
    """Return the slots that an index names, and whether the host knows them. All unknown lists are
    equal."""
    known = index.ids is None or index.known_ids() is not None
    return index.ids_token if known else None, known, index.offset


def _limit(steps: Steps) -> int:
    """Return after how many units the pitch changes; 0: never."""
    return steps[-1].extent if len(steps) > 1 else 0


def _groups(numbers: Sequence[Int64], limits: Sequence[int], falling: bool) -> int:
    """Return the number of groups of positions in which the numbers of all sides rise by one,
    across no limit.

    ``falling``: positions that fall by one on all sides also form a group, and so do positions that
    follow each other after sorting.
    """
    first = numbers[0]
    if falling and first.size <= SORTED and bool((first[1:] < first[:-1]).any()):
        order = np.argsort(first, kind="stable")
        numbers = [column[order] for column in numbers]
    rises = [np.diff(column) for column in numbers]
    joins = np.logical_and.reduce([rise == 1 for rise in rises])
    for column, limit in zip(numbers, limits, strict=True):
        if limit:
            joins &= column[1:] % limit != 0
    if falling and first.size > SORTED:
        joins |= np.logical_and.reduce([rise == -1 for rise in rises])
    return int(joins.size + 1 - np.count_nonzero(joins))


def _of_nest(nest: Nest, units: int, groups: int, below: int) -> tuple[int, int]:
    """Return the average runs and pieces of one nest, folded as `to_2d_copies` does with this
    ``below`` (0: nothing folds)."""
    if not units:
        return 0, 0

    # Units that follow each other on both sides form one run for each group.
    src = nest.src.units[-1]
    dst = nest.dst.units[-1]
    joined = src.stride == dst.stride == nest.run and not (src.table or dst.table)
    lines = groups if joined else units
    width = nest.run
    loops = list(nest.loops)

    limits = [limit for side in (nest.src, nest.dst) if (limit := _limit(side.units))]
    # All groups have one known length: there is one group, or each group is a whole block.
    if joined and (groups == 1 or (limits and units == groups * min(limits))):
        width, loops = _absorb(loops, nest.run * (units // groups))

    around = prod(loop.extent for loop in loops)
    runs = pieces = lines * around
    least = _least_height(max(width, nest.run * units // lines), below)

    # Rows that may become one 2-D copy: their number, their pitches, and the resulting pieces.
    rows = [(x.extent, x.src_stride, x.dst_stride, runs // x.extent) for x in loops if not x.tabled]
    if not joined:
        rows.append((units // groups, src.stride, dst.stride, groups * around))
    for height, *pitches, folded in rows:
        if height >= least and width <= min(pitches) and max(pitches) <= MAX_PITCH:
            pieces = min(pieces, folded)
    return runs, pieces


def _least_height(width: int, below: int) -> int:
    """Return how many rows of this width become one 2-D copy."""
    if not below or below <= APART <= width:
        return ALL
    # Wide rows cross faster as entries of a batch, so that only many of them fold.
    return LEAST_HEIGHT if width < below else TALL


def _absorb(loops: list[Loop], width: int) -> tuple[int, list[Loop]]:
    """Merge loops into a run that they continue on both sides; return its width and the other
    loops."""
    for loop in loops:
        if loop.src_stride == loop.dst_stride == width and not loop.tabled:
            return _absorb([x for x in loops if x is not loop], width * loop.extent)
    return width, loops
