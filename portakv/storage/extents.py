# SPDX-License-Identifier: Apache-2.0
"""`Extents`: free pages of memory, in runs of any length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


class Extents:
    """The free pages of a range, from which runs of pages are taken and to which they return.

    A run is taken from the shortest extent that has room for it, so that runs of one size fill the
    holes that they leave. Callers hold a lock.

    Runs that lie next to each other are often evicted one after the other: a chain from its end, or
    single blocks as they came. So a run takes the end of its extent that is farther from the run
    that goes next, and what is left of the extent grows by that one.

    Args:
        pieces: the first page of each piece of memory, and the page past it. No run crosses the end
            of a piece.

    Attributes:
        free: the number of free pages.
    """

    def __init__(self, pieces: Sequence[tuple[int, int]]) -> None:
        self.free = 0
        self._ends = dict[int, int]()  # the page past each extent, by its first page
        self._starts = dict[int, int]()  # the first page of each extent, by the page past it
        self._sizes = dict[int, dict[int, None]]()  # the first pages of the extents of each length
        self._lengths = list[int]()  # the lengths that extents have, in order
        self._past = frozenset(past for _, past in pieces)
        self._evicted = range(0)  # the last pages that were evicted
        self._descends = False  # the last evicted pages lie before those evicted before them
        for first, past in pieces:
            if first < past:
                self._add(first, past)
                self.free += past - first

    def take(self, count: int) -> int | None:
        """Return the first of so many pages; None if no extent has as many."""
        at = bisect_left(self._lengths, count)
        if at == len(self._lengths):
            return None
        first = next(iter(self._sizes[self._lengths[at]]))
        past = self._ends[first]
        self._remove(first, past)
        self.free -= count
        if self._descends:
            if first < past - count:
                self._add(first, past - count)
            return past - count
        if first + count < past:
            self._add(first + count, past)
        return first

    def give(self, first: int, count: int, evicted: bool = False) -> None:
        """Return pages, which join the free ones next to them; ``evicted``: in the order in which
        others go."""
        self.free += count
        past = first + count
        if evicted:
            if first == self._evicted.stop or past == self._evicted.start:
                self._descends = past == self._evicted.start
            self._evicted = range(first, past)
        if first in self._starts and first not in self._past:
            before = self._starts[first]
            self._remove(before, first)
            first = before
        if past in self._ends and past not in self._past:
            after = self._ends[past]
            self._remove(past, after)
            past = after
        self._add(first, past)

    def _add(self, first: int, past: int) -> None:
        length = past - first
        self._ends[first] = past
        self._starts[past] = first
        if length not in self._sizes:
            self._sizes[length] = {}
            insort(self._lengths, length)
        self._sizes[length][first] = None

    def _remove(self, first: int, past: int) -> None:
        length = past - first
        del self._ends[first]
        del self._starts[past]
        alike = self._sizes[length]
        del alike[first]
        if not alike:
            del self._sizes[length]
            del self._lengths[bisect_left(self._lengths, length)]
