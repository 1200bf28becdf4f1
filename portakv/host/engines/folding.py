# SPDX-License-Identifier: Apache-2.0
"""Folding: runs at constant pitches on both sides become rows of one 2-D copy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...runs import Int64, Runs
from ...view import KVView
from .. import _registrations
from .._pitched import MAX_PITCH

#: Fewer rows stay copies of their own: a 2-D copy is a call by itself, and about as dear for the
#: host as this many entries of a batched one. A default, not a measurement.
LEAST_HEIGHT = 4

_Mask = npt.NDArray[np.bool_]


class Pieces(NamedTuple):
    """2-D copies: int64 arrays of one length, addresses and bytes; height 1 is a plain copy.

    No byte of the destinations occurs twice, so that their order does not matter.
    """

    dst: Int64
    src: Int64
    width: Int64
    height: Int64
    dst_pitch: Int64
    src_pitch: Int64

    @property
    def number(self) -> int:
        """How many pieces."""
        return self.dst.size

    @property
    def nbytes(self) -> int:
        """All bytes that they move."""
        return int(self.width @ self.height)


def fold(runs: Runs, src: KVView | None = None, dst: KVView | None = None) -> Pieces:
    """Runs as few pieces. Exactly their bytes, each once; the order of pieces is any.

    Args:
        runs: in the order of the source, as `CopyPlan.runs` gives them, with neighbours merged.
        src, dst: the views that they lie in: no piece then reaches from one allocation of theirs
            into another, nor over a seam between two registrations, which drivers refuse.
    """
    runs, areas = _apart(runs, [view for view in (src, dst) if view is not None])
    best = _in_order(runs, areas)
    for lag in _lags(runs):
        if lag >= best.number:  # it gives as many pieces at least
            break
        order = _by_lag(runs.nbytes.size, lag)
        there = _in_order(Runs(*(column[order] for column in runs)), areas[:, order])
        if there.number < best.number:
            best = there
    return best


def _in_order(runs: Runs, areas: Int64) -> Pieces:
    """Fold rows that follow each other in this order."""
    src, dst, width = runs
    ahead, below = np.diff(src), np.diff(dst)
    joins = (width[1:] == width[:-1]) & (np.minimum(ahead, below) >= width[:-1])
    joins &= np.maximum(ahead, below) <= MAX_PITCH
    for area in areas:
        joins &= area[1:] == area[:-1]
    same = (ahead[1:] == ahead[:-1]) & (below[1:] == below[:-1]) & joins[1:] & joins[:-1]
    # A streak is steps alike; of two that share a row the first one has it.
    first = np.flatnonzero(_led(~same))[: joins.size]
    length = np.diff(first, append=joins.size)
    long = joins[first] & (length >= LEAST_HEIGHT - 1)
    if not long.any():
        return Pieces(dst, src, width, np.ones_like(width), width, width)
    streak = np.repeat(np.where(long, np.arange(first.size), -1), length)
    before, after = np.append(-1, streak), np.append(streak, -1)
    of_row = np.where(before >= 0, before, after)
    begins = np.flatnonzero((of_row < 0) | _led(of_row[1:] != of_row[:-1]))
    height, widths = np.diff(begins, append=width.size), width[begins]
    step = np.minimum(begins, joins.size - 1)
    pitches = [np.where(height > 1, column[step], widths) for column in (below, ahead)]
    return Pieces(dst[begins], src[begins], widths, height, *pitches)


def _led(rest: _Mask) -> _Mask:
    return np.concatenate(([True], rest))


def _lags(runs: Runs) -> list[int]:
    """After how many runs the steps between them repeat: so many blocks, for each of many layers.

    Found by looking where the step at a few places occurs next, and after that.
    """
    ahead, below, width = np.diff(runs.src), np.diff(runs.dst), runs.nbytes[:-1]
    steps = width.size
    found = set[int]()
    for at in {0, steps // 3, steps // 2} if steps >= LEAST_HEIGHT else ():
        alike = (ahead[at:] == ahead[at]) & (below[at:] == below[at]) & (width[at:] == width[at])
        found.update(int(gap) for gap in np.flatnonzero(alike)[1:3])
    return sorted(lag for lag in found if 1 < lag <= steps // (LEAST_HEIGHT - 1))


def _by_lag(count: int, lag: int) -> Int64:
    """The order in which each run is followed by the one ``lag`` behind it."""
    rounds = -(-count // lag)
    order = np.arange(rounds * lag, dtype=np.int64).reshape(rounds, lag).T.reshape(-1)
    return np.asarray(order[order < count])


def _apart(runs: Runs, views: list[KVView]) -> tuple[Runs, Int64]:
    """Runs cut where allocations meet, and for each the area that it begins in, on either side."""
    seams = _seams(views)
    if not seams.size:
        return runs, np.zeros((0, runs.nbytes.size), dtype=np.int64)
    for side in (0, 1):
        runs = _cut(runs, side, seams)
    return runs, np.stack([np.searchsorted(seams, runs[side], "right") for side in (0, 1)])


def _seams(views: list[KVView]) -> Int64:
    """Addresses, in order, that no copy may reach across."""
    found = set(_registrations.seams())
    for view in views:
        if len(view.origins) > 1:
            for owner in view.owners:
                storage = owner.untyped_storage()
                found |= {storage.data_ptr(), storage.data_ptr() + storage.nbytes()}
    return np.array(sorted(found), dtype=np.int64)


def _cut(runs: Runs, side: int, seams: Int64) -> Runs:
    """Runs that reach across no seam on one side."""
    starts, nbytes = runs[side], runs.nbytes
    inside = np.searchsorted(seams, starts, "right")
    cuts = np.searchsorted(seams, starts + nbytes, "left") - inside
    if not (cuts > 0).any():
        return runs
    parts = np.maximum(cuts, 0) + 1
    of_run = np.repeat(np.arange(starts.size), parts)
    number = np.arange(of_run.size) - np.repeat(np.cumsum(parts) - parts, parts)
    bounds = np.append(seams, np.iinfo(np.int64).max)
    begin = np.where(number > 0, bounds[inside[of_run] + number - 1], starts[of_run])
    end = np.minimum(bounds[inside[of_run] + number], (starts + nbytes)[of_run])
    moved = begin - starts[of_run]
    return Runs(runs.src[of_run] + moved, runs.dst[of_run] + moved, end - begin)
