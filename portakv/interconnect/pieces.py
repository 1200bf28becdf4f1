# SPDX-License-Identifier: Apache-2.0
"""Pieces: the copies that cross the link; runs at constant pitches become 2-D copies.

The core expands plans and folds their runs. The number of runs and pieces decides the cost of a
copy by a strategy. It is counted without expanding the plan: from its loops, and from the ids whose
neighbours follow them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from portakv.core.runs import (
    NeedsEdges,
    count_groups,
    list_pieces,
    pointer_to,
)
from portakv.host import pinned
from portakv.host.memcpy import MAX_PITCH
from portakv.plan.plan import CopyPlan, Move
from portakv.plan.runs import Int64, Runs, check_count, index_words, outside, side_words
from portakv.view.form import Steps
from portakv.view.index import Index
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
#: layer-first pool take 0.03 ms of one core instead of 2.7. Runs that meet only at the ends of
#: planes are not merged.
LARGE = 4096

_WORDS = 7  # a flag and three lists
_ONES = np.ones(4096, dtype=np.int64)
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
        return int(self.width @ self.height)


def pieces_of(plan: CopyPlan, move: Move, below: int = ALL, merged: bool = False) -> Pieces:
    """Return a plan's runs as few pieces: exactly their bytes, each once, in any order.

    No piece reaches from one allocation of the views into another, nor across a boundary between
    two registrations, which drivers reject. Runs of ``below`` bytes or more become rows only if
    many lie together, those of `APART` bytes never. Raise as `CopyPlan.runs` does.

    ``merged``: runs that happen to meet where planes end are merged, too.
    """
    words = plan.words.buffer_info()[0]
    uncrossed = Uncrossed()
    request = request_of(plan, move, below, merged, uncrossed)
    room = int(move.count) // plan.unit * plan.runs_per_unit
    try:
        columns = list_pieces(words, request, room)
    except NeedsEdges:
        uncrossed = Uncrossed(move.src, move.dst)
        request = request_of(plan, move, below, merged, uncrossed)
        columns = list_pieces(words, request, room)
    if columns is None:
        raise outside(move)
    return _pieces(columns)


def request_of(
    plan: CopyPlan, move: Move, below: int, merged: bool, uncrossed: Uncrossed
) -> tuple[int, ...]:
    """Return the words of a request for pieces, which are read while ``uncrossed`` lives; raise as
    `CopyPlan.runs` does."""
    check_copy(plan, move)
    src, dst, src_index, dst_index, count = move
    sides = *side_words(src, src_index), *side_words(dst, dst_index)
    whole = whole_bytes(src), whole_bytes(dst)
    return (*sides, count, *limits_of(below), *whole, merged, *uncrossed.words)


def check_copy(plan: CopyPlan, move: Move) -> None:
    """Raise as `CopyPlan.runs` does for a copy that a plan does not describe."""
    plan.check_sides(move.src, move.dst, move.src_index, move.dst_index)
    check_count(plan.unit, move.count)


def limits_of(below: int) -> tuple[int, ...]:
    """Return the limits of folding, as the core reads them."""
    return below, LEAST_HEIGHT, TALL, APART, LARGE, MAX_PITCH


class Uncrossed:
    """Addresses that no piece crosses: between two registrations, and the edges of the allocations
    of views.

    Attributes:
        words: 1 if there are views, and the lists, as the core reads them while this object lives.
    """

    __slots__ = ("_arrays", "words")

    def __init__(self, *views: KVView) -> None:
        boundaries = pinned.boundaries()
        self.words = array("q", bytes(8 * _WORDS))
        if not (boundaries or views):
            return
        self._arrays = [np.array(boundaries, dtype=np.int64)]
        self._arrays += [view.edges() for view in views if view.entries > 1]
        self.words[0] = bool(views)
        for number, each in enumerate(self._arrays):
            self.words[1 + 2 * number] = pointer_to(each)
            self.words[2 + 2 * number] = each.size

    @property
    def address(self) -> int:
        """Return the address of the words."""
        return self.words.buffer_info()[0]


def whole_bytes(view: KVView) -> int:
    """Return all bytes at each of a view's several addresses; 0 if unknown, or for one address."""
    return view.entry_bytes if view.entries > 1 else 0


def _pieces(columns: Sequence[Int64]) -> Pieces:
    if len(columns) == 6:
        return Pieces(*columns)
    dst, src, width = columns
    return _plain(Runs(src, dst, width))


def _plain(runs: Runs) -> Pieces:
    src, dst, width = runs
    number = width.size
    height = _ONES[:number] if number <= _ONES.size else np.ones(number, dtype=np.int64)
    return Pieces(dst, src, width, height, width, width)


#: Units up to which ids are sorted, since runs are merged in the order of their addresses. The runs
#: of more units are counted in the order of the index, and may seem more than they are.
SORTED = 1 << 16


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
        #: The limits of folding, as the core reads them.
        self.folding = array("q", limits_of(fold_below))
        self._words = plan.words

    @classmethod
    def of_host(cls, plan: CopyPlan, fold_below: int = ALL) -> RunCounter:
        """Return a counter of the runs between a plan's host memory and dense rows in its order."""
        device_first = plan.src.place == "device"
        form, step = (plan.dst, plan.dst_step) if device_first else (plan.src, plan.src_step)
        return cls(CopyPlan(form, form, step, step, plan.unit), True, fold_below)

    def groups(self, src_index: Index, dst_index: Index, count: int) -> int:
        """Return the number of groups of ``count`` positions. In a group the units follow each
        other on both sides."""
        units = count // self._unit
        if units < 2:
            return units
        both = (src_index, dst_index)
        lists = [index for index in both if index.ids is not None]
        limits = [_limit(side.units) for side in self._nests[0].sides]
        if not (lists or any(limits)):
            return 1
        unknown = [index for index in lists if index.known_ids() is None]
        if unknown:  # reading ids back would wait for the device: they count as scattered
            return min(units, max(-(-units * self._unit // index.step) for index in unknown))
        sides = (0, 0, *index_words(src_index), 0), (0, 0, *index_words(dst_index), 0)
        copy = (*sides[0], *sides[1], units * self._unit)
        most = 0 if self._dense else SORTED
        groups = count_groups(copy, self._unit, limits[0], limits[1], most)
        # Whoever copies finds the sentence for a range past the end of a list.
        return units if groups is None else groups

    @property
    def plan_at(self) -> int:
        """Return the address of the words of the plan, which stay as long as this object."""
        return self._words.buffer_info()[0]

    @property
    def limits(self) -> tuple[int, int]:
        """Return after how many units the pitch of the source and of the destination changes; 0:
        never."""
        src, dst = (_limit(side.units) for side in self._nests[0].sides)
        return src, dst


def _limit(steps: Steps) -> int:
    """Return after how many units the pitch changes; 0: never."""
    return steps[-1].extent if len(steps) > 1 else 0
