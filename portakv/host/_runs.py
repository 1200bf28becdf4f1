# SPDX-License-Identifier: Apache-2.0
"""The free units of a pool, as runs of neighbours: a block of any size takes a run.

Best fit: a block comes from the shortest run that is long enough, and a run that is given back
joins its free neighbours. Single units join only when a longer run is needed, so that a pool whose
blocks have one size pays nothing for it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable


class Runs:
    """Free units, numbered from 0 on; ``len`` is their number. The caller holds a lock.

    Attributes:
        changing: True during a change, and after one that an interrupt stopped; the caller then
            makes the runs again by `between`.
    """

    def __init__(self) -> None:
        self.changing = False
        self._singles = deque[int]()  # free units that were not joined with their neighbours
        self._length = dict[int, int]()  # of each free run, by its first unit
        self._first = dict[int, int]()  # the first unit of each free run, by the unit after it
        self._of_length = dict[int, dict[int, None]]()  # the first units of the runs of a length
        self._lengths = list[int]()  # the lengths of `_of_length`, sorted
        self._in_runs = 0  # units
        self._pieces = set[int]()  # the first unit of each piece of memory

    @classmethod
    def between(cls, used: Iterable[tuple[int, int]], borders: Iterable[int]) -> Runs:
        """Return the runs between the used ones (first unit, length).

        ``borders``: the first unit of each piece of memory, and the unit after the last.
        """
        runs = cls()
        runs._pieces.update(borders)
        at = 0
        for first, length in sorted([*used, *((border, 0) for border in runs._pieces)]):
            if first > at:
                runs._insert(at, first - at)
            at = first + length
        return runs

    def __len__(self) -> int:
        return self._in_runs + len(self._singles)

    def add(self, first: int, length: int) -> None:
        """Add a piece of memory, whose units join no other piece."""
        self._pieces.add(first)
        self._insert_joined(first, length)

    def longest(self) -> int:
        """Return the length of the longest run."""
        self._join_singles()
        return self._lengths[-1] if self._lengths else 0

    def count(self, length: int) -> int:
        """Return how many runs of a length can be taken."""
        if length == 1:
            return len(self)
        self._join_singles()
        at = bisect_left(self._lengths, length)
        return sum(each // length * len(self._of_length[each]) for each in self._lengths[at:])

    def take(self, length: int) -> int:
        """Take a run, and return its first unit; `count` says that there is one."""
        if self._singles:
            if length == 1:
                return self._singles.popleft()
            self._join_singles()
        fitting = self._lengths[bisect_left(self._lengths, length)]
        first = next(iter(self._of_length[fitting]))
        self._remove(first)
        if fitting > length:
            self._insert(first + length, fitting - length)
        return first

    def give(self, first: int, length: int) -> None:
        """Give a run back."""
        if length == 1:
            self._singles.append(first)
        else:
            self._insert_joined(first, length)

    def _join_singles(self) -> None:
        before = self.changing
        self.changing = True
        while self._singles:
            self._insert_joined(self._singles.popleft(), 1)
        self.changing = before

    def _insert_joined(self, first: int, length: int) -> None:
        """Insert a run, joined with its free neighbours in the same piece of memory."""
        after = first + length
        if after in self._length and after not in self._pieces:
            length += self._remove(after)
        before = self._first.get(first)
        if before is not None and first not in self._pieces:
            length += self._remove(before)
            first = before
        self._insert(first, length)

    def _insert(self, first: int, length: int) -> None:
        self._length[first] = length
        self._first[first + length] = first
        if length not in self._of_length:
            self._of_length[length] = {}
            insort(self._lengths, length)
        self._of_length[length][first] = None
        self._in_runs += length

    def _remove(self, first: int) -> int:
        """Remove a run, and return its length."""
        length = self._length.pop(first)
        del self._first[first + length]
        firsts = self._of_length[length]
        del firsts[first]
        if not firsts:
            del self._of_length[length]
            del self._lengths[bisect_left(self._lengths, length)]
        self._in_runs -= length
        return length
