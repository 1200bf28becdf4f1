# SPDX-License-Identifier: Apache-2.0
"""Find rows of one view that share bytes, from strides and extents, for views that are written.

The answer is exact: rows may lie between each other, as long as no byte has two places. A search
that takes too many decisions has no answer, and its rows count as apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd, prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from portakv.runtime.bounded import Bounded
from portakv.view.form import PART_AXES, Form, KVRows

#: Decisions after which a search ends without a result. Layouts of engines need fewer than 20.
MOST_DECISIONS = 20_000


class Term(NamedTuple):
    """A whole number from ``low`` to ``high``, times ``stride`` bytes."""

    low: int
    high: int
    stride: int
    axis: str


class Walk(NamedTuple):
    """The steps of one plane, or of several, through memory: the extent, stride and axis of each.

    ``table``: the extents and table steps of the axes that go through the table of addresses.
    """

    memory: tuple[tuple[int, int, str], ...]
    table: tuple[tuple[int, int], ...]

    @property
    def reach(self) -> int:
        """Return the bytes from the first of a walk to past its last."""
        return 1 + sum((extent - 1) * stride for extent, stride, _ in self.memory)


def walk_of(part: KVRows, count: int | None) -> Walk:
    """Return the walk of a part; ``count`` is the extent of its unbounded axis, None: unknown."""
    memory = []
    table = []
    for axis in PART_AXES:
        steps = part.axis(axis)
        for step in steps:
            extent = step.extent
            if not extent:
                inner = prod(each.extent or 1 for each in steps)
                least = 1 if step.table or step.stride else 2  # with stride 0 any number shares
                extent = least if count is None else count // inner
            if extent > 1 and step.table:
                table.append((extent, step.table))
            elif extent > 1:
                memory.append((extent, step.stride, axis))
    return Walk(tuple(memory), tuple(table))


def shared_axes(form: Form, count: int | None) -> tuple[str, ...]:
    """Return the axes along which two rows share a byte, of rows with one address; () if none do.

    ``count`` is the number of blocks, or of a chunk's tokens; None: unknown.
    """
    return _shared.get_or_make((form, count), lambda: _shared_axes(form, count))


#: The search takes as long as ten views.
_shared: Bounded[tuple[Form, int | None], tuple[str, ...]] = Bounded("axes that share bytes", 4096)


def _shared_axes(form: Form, count: int | None) -> tuple[str, ...]:
    walks = [walk_of(part, count) for part in form.parts]
    for walk in walks:
        terms = [Term(1 - extent, extent - 1, stride, axis) for extent, stride, axis in walk.memory]
        found = solve(terms, 0, nonzero=True)
        if found:
            return found
    entries = dict.fromkeys(part.table for part in form.parts)
    for entry in entries:
        together = [n for n, part in enumerate(form.parts) if part.table == entry]
        begins = [np.array([form.parts[n].offset]) for n in together]
        shared = _shared_by_walks([walks[n] for n in together], begins)
        if shared:
            return shared
    return ()


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Return True if two elements of a tensor share a byte."""
    sizes = [*tensor.shape, tensor.itemsize]
    strides = [*(stride * tensor.itemsize for stride in tensor.stride()), 1]
    if 0 in sizes:
        return False
    terms = [Term(1 - n, n - 1, step, "") for n, step in zip(sizes, strides, strict=True) if n > 1]
    return solve(terms, 0, nonzero=True) is not None


def shared_by_addresses(
    form: Form, count: int | None, addresses: npt.NDArray[np.int64]
) -> tuple[str, ...]:
    """Return the axes along which rows of several addresses share a byte; () if none do.

    The first is "" if an axis goes through the addresses. `shared_axes` judges rows with one
    address.
    """
    walks = [walk_of(part, count) for part in form.parts]
    begins = []
    for part, walk in zip(form.parts, walks, strict=True):
        entries = np.array([part.table])
        for extent, step in walk.table:
            entries = np.add.outer(entries, np.arange(extent) * step).reshape(-1)
        begins.append(addresses[entries] + part.offset)
    return _shared_by_walks(walks, begins)


def _shared_by_walks(
    walks: Sequence[Walk], begins: Sequence[npt.NDArray[np.int64]]
) -> tuple[str, ...]:
    """Return the axes along which two of several walks share a byte, each from its addresses.

    The first of them is ``kv`` for two walks, and "" for two addresses of one.
    """
    sizes = [len(each) for each in begins]
    firsts = np.concatenate(begins)
    order = np.argsort(firsts, kind="stable")
    kinds = np.repeat(np.arange(len(walks)), sizes)[order]
    firsts = firsts[order]
    pasts = firsts + np.array([walk.reach for walk in walks])[kinds]
    if (firsts[1:] >= np.maximum.accumulate(pasts)[:-1]).all():
        return ()
    # Pairs at one distance have one answer.
    for src, dst, distance in dict.fromkeys(
        _pairs(kinds.tolist(), firsts.tolist(), pasts.tolist())
    ):
        found = _shared_by_two(walks[src].memory, walks[dst].memory, distance)
        if found is not None:
            return ("" if src == dst else "kv", *found)
    return ()


def _pairs(
    kinds: Sequence[int], firsts: Sequence[int], pasts: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Yield the walks and the distance of each two whose ranges overlap; addresses ascend."""
    for at, past in enumerate(pasts):
        for other in range(at + 1, len(firsts)):
            if firsts[other] >= past:
                break
            yield kinds[at], kinds[other], firsts[other] - firsts[at]


def _shared_by_two(
    one: tuple[tuple[int, int, str], ...], other: tuple[tuple[int, int, str], ...], distance: int
) -> tuple[str, ...] | None:
    """Return the axes along which two walks share a byte; None if they share none.

    The other walk begins ``distance`` bytes after the first one.
    """
    ranges: dict[tuple[int, str], list[int]] = {}
    for extent, stride, axis in one:
        ranges.setdefault((stride, axis), [0, 0])[1] += extent - 1
    for extent, stride, axis in other:
        ranges.setdefault((stride, axis), [0, 0])[0] -= extent - 1
    terms = [Term(low, high, stride, axis) for (stride, axis), (low, high) in ranges.items()]
    return solve(terms, distance)


def solve(terms: Sequence[Term], target: int, nonzero: bool = False) -> tuple[str, ...] | None:
    """Return the axes of the terms that are not 0 in a sum of ``target``; None if no sum has it.

    ``nonzero``: a sum without such a term does not count. None also if the search is too long.
    """
    still = [term.axis for term in terms if not term.stride and term.high]  # in any sum
    ordered = sorted((term for term in terms if term.stride), key=lambda term: term.stride)
    if nonzero and still:
        return (still[0],)
    if nonzero and ordered and ordered[0].stride == 1:
        # Rows at multiples of at least their bytes share one only if they begin together.
        apart = gcd(*(term.stride for term in ordered[1:]))
        if ordered[0].high < apart:
            ordered = [term._replace(stride=term.stride // apart) for term in ordered[1:]]
    search = _Search(ordered)
    return search.run(len(ordered), target, nonzero)


class _Search:
    """Search for a sum of terms, from the largest stride on."""

    def __init__(self, ordered: Sequence[Term]) -> None:
        self._terms = ordered
        self._decisions = 0
        # For the first n terms: the least and the largest sum, and what divides every sum.
        self._lows = [0]
        self._highs = [0]
        self._divisors = [0]
        for term in ordered:
            self._lows.append(self._lows[-1] + term.low * term.stride)
            self._highs.append(self._highs[-1] + term.high * term.stride)
            self._divisors.append(gcd(self._divisors[-1], term.stride))
        self._failed = set[tuple[int, int, bool]]()

    def run(self, count: int, target: int, nonzero: bool) -> tuple[str, ...] | None:
        """Return the axes of a sum of the first ``count`` terms, as `solve` does."""
        if not count:
            return () if target == 0 and not nonzero else None
        key = count, target, nonzero
        if key in self._failed:
            return None
        term = self._terms[count - 1]
        for number in self._candidates(count, target):
            self._decisions += 1
            if self._decisions > MOST_DECISIONS:
                return None
            rest = self.run(count - 1, target - number * term.stride, nonzero and not number)
            if rest is not None:
                own = (term.axis,) if number else ()
                return tuple(dict.fromkeys(own + rest))
        self._failed.add(key)
        return None

    def _candidates(self, count: int, target: int) -> list[int] | range:
        """Return the numbers of a term with which the smaller ones may still reach a target."""
        term = self._terms[count - 1]
        least = max(term.low, -((self._highs[count - 1] - target) // term.stride))
        most = min(term.high, (target - self._lows[count - 1]) // term.stride)
        # The smaller terms sum to multiples of their divisor only.
        divisor = self._divisors[count - 1]
        if not divisor:
            number, rest = divmod(target, term.stride)
            return [] if rest or not least <= number <= most else [number]
        common = gcd(term.stride, divisor)
        if target % common:
            return []
        step = divisor // common
        first = target // common * pow(term.stride // common, -1, step) % step if step > 1 else 0
        numbers = range(least + (first - least) % step, most + 1, step)
        if least <= 0 <= most:
            return sorted(numbers, key=abs) if len(numbers) < MOST_DECISIONS else numbers
        return numbers
