# SPDX-License-Identifier: Apache-2.0
"""Free units of memory, such as pages, in runs of any length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable


class Extents:
    """The free units of some memory, from which runs of units are taken and to which they return.

    A run is taken from the shortest extent that has room for it, so that runs of one size fill the
    holes that they leave. Callers hold a lock.

    Runs that lie next to each other are often evicted one after the other: a chain from its end, or
    single blocks as they came. So a run takes the end of its extent that is farther from the run
    that goes next, and what is left of the extent grows by that one.

    Args:
        pieces: as for `add`.

    Attributes:
        free: the number of free units.
    """

    def __init__(self, pieces: Iterable[tuple[int, int]] = ()) -> None:
        self.free = 0
        self._ends = dict[int, int]()  # the unit past each extent, by its first unit
        self._starts = dict[int, int]()  # the first unit of each extent, by the unit past it
        self._sizes = dict[int, dict[int, None]]()  # the first units of the extents of each length
        self._lengths = list[int]()  # the lengths that extents have, in order
        self._cuts = set[int]()  # the ends of pieces
        self._evicted = range(0)  # the last units that were evicted
        self._descends = False  # the last evicted units lie before those evicted before them
        for first, past in pieces:
            self.add(first, past)

    def add(self, first: int, past: int) -> None:
        """Add a piece of memory, from its first unit to the unit past it. No run crosses its
        end."""
        self._cuts.add(past)
        if first < past:
            self._add(first, past)
            self.free += past - first

    def longest(self) -> int:
        """Return the units of the longest run."""
        return self._lengths[-1] if self._lengths else 0

    def count(self, length: int) -> int:
        """Return how many runs of a length can be taken."""
        return sum(each // length * len(alike) for each, alike in self._sizes.items())

    def take(self, count: int, most: int) -> list[int]:
        """Return the first units of at most ``most`` runs of so many units; fewer if no extent has
        room for more.

        What is left of the shortest extent with room is the shortest one again. So all runs of an
        extent are taken together.
        """
        runs = list[int]()
        while len(runs) < most:
            at = bisect_left(self._lengths, count)
            if at == len(self._lengths):
                break
            length = self._lengths[at]
            first = next(iter(self._sizes[length]))
            past = first + length
            units = count * min(length // count, most - len(runs))
            self._remove(first, past)
            if self._descends:
                runs += range(past - count, past - units - 1, -count)
                past -= units
            else:
                runs += range(first, first + units, count)
                first += units
            if first < past:
                self._add(first, past)
            self.free -= units
        return runs

    def take_at(self, first: int, count: int) -> None:
        """Take free units from a certain one on."""
        begin = max(each for each in self._ends if each <= first)
        past = self._ends[begin]
        self._remove(begin, past)
        for extent in ((begin, first), (first + count, past)):
            if extent[0] < extent[1]:
                self._add(*extent)
        self.free -= count

    def give(self, first: int, count: int, evicted: bool = False) -> None:
        """Return units, which join the free ones next to them; ``evicted``: in the order in which
        others go."""
        self.free += count
        past = first + count
        if evicted:
            before = self._evicted
            if first == before.stop or past == before.start:
                self._descends = past == before.start
            self._evicted = range(first, past)
        if first in self._starts and first not in self._cuts:
            start = self._starts[first]
            self._remove(start, first)
            first = start
        if past in self._ends and past not in self._cuts:
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
