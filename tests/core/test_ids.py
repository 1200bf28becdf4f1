# SPDX-License-Identifier: Apache-2.0
"""Lists of ids in the core: what it reads, what it refuses, and what it expands them to.

The oracle expands every position by numpy and Python's integers, and looks for faults there.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from portakv import Index, SlotError
from portakv.core import ids as core

PAST_ANY_VIEW = 2**62
INT64 = (-(2**63), 2**63 - 1)
INT32 = (-(2**31), 2**31 - 1)


@dataclass(frozen=True)
class Case:
    """Ids of one side of a copy, and a view of ``slots`` slots."""

    ids: tuple[int, ...]
    step: int
    offset: int
    count: int
    slots: int
    narrow: bool = False
    #: From one id to the next one, in ids; negative: the list lies backwards in an array.
    spread: int = 1

    def listed(self) -> Any:
        """Return the ids in memory, as the case describes it."""
        memory = np.full(len(self.ids) * abs(self.spread), 3, np.int32 if self.narrow else np.int64)
        if self.spread < 0:
            view = memory[:: self.spread]
            view[:] = self.ids
            return view
        memory[:: self.spread] = self.ids
        return torch.from_numpy(memory)[:: self.spread]

    def index(self) -> Index:
        return Index(self.listed(), self.step, self.offset)

    def places(self) -> range:
        """Return the places of the ids that the positions use."""
        if not self.count:
            return range(0)
        past = -(-(self.offset + self.count) // self.step)
        return range(self.offset // self.step, past)

    def expanded(self) -> list[int]:
        """Return the slot of each position; -1 if its id is negative."""
        most = PAST_ANY_VIEW // self.step
        expanded = []
        for q in range(self.offset, self.offset + self.count):
            each = self.ids[q // self.step]
            expanded.append(-1 if each < 0 else min(each, most) * self.step + q % self.step)
        return expanded


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw ids of which some are negative, far past any view, or named again."""
    narrow = draw(st.booleans())
    lowest, largest = INT32 if narrow else INT64
    step = draw(st.sampled_from([1, 1, 2, 3, 4, 16]) | st.integers(1, 40))
    top = draw(st.sampled_from([4, 40, 2**20, largest]))
    usual = st.integers(0, top)
    odd = st.sampled_from([-1, -2, lowest, largest, largest // step, min(largest, 2**62) // step])
    ids = draw(st.lists(usual | odd if draw(st.booleans()) else usual, max_size=40))
    if draw(st.booleans()):
        ids = sorted(set(ids))
    total = len(ids) * step
    offset = draw(st.integers(0, total) | st.sampled_from([0, 0, min(step, total)]))
    count = draw(st.just(total - offset) | st.integers(0, total - offset))
    above = max([0, *ids]) + 1
    slots = draw(
        st.sampled_from([above * step, (above - 1) * step, above * step - 1, PAST_ANY_VIEW, 0])
        | st.integers(0, 64 * step)
    )
    spread = draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
    return Case(tuple(ids), step, offset, count, min(slots, PAST_ANY_VIEW), narrow, spread)


def sentence(case: Case, distinct: bool) -> str:
    """Return how the error of a list begins; empty if there is none."""
    expanded = case.expanded()
    for position, slot in enumerate(expanded):
        if slot >= case.slots:
            each = case.ids[(case.offset + position) // case.step]
            of = f" (of id {each}, {case.step} slots each)" if case.step > 1 else ""
            return (
                f"Expected the source index to stay inside the view's {case.slots} slots, got slot "
                f"{slot}{of} at position {position}; nothing was moved. Correct the index: its "
                f"last id is {case.slots // case.step - 1}."
            )
    times = Counter(slot for slot in expanded if slot >= 0)
    twice = [slot for slot, number in times.items() if number > 1] if distinct else []
    if not twice:
        return ""
    slot = min(twice)
    of = f" (of id {slot // case.step})" if case.step > 1 else ""
    return (
        f"Expected each slot once in the source index, got slot {slot}{of}, which occurs "
        f"{times[slot]} times; nothing was moved. Name it once, or pass Index.without_repeats(), "
        f"which keeps the last."
    )


def named_sentence(case: Case) -> str:
    """Return the error that names an argument, for a list that has one."""
    one = "block" if case.step > 1 else "slot"
    last = case.slots // case.step - 1
    seen: dict[int, int] = {}
    again = ""
    for place in case.places():
        each = case.ids[place]
        if each > last:
            return (
                f"Expected blocks to be ids from 0 to {last}, the {one}s of the view, got {each} "
                f"at position {place}. Correct this id."
            )
        if each >= 0 and seen.setdefault(each, place) != place and not again:
            again = (
                f"Expected blocks to name each {one} once, got {each} at positions {seen[each]} "
                f"and {place}. Name it once."
            )
    return again


def judge(case: Case) -> None:
    """Compare everything that the core makes of a list with the oracle."""
    index = case.index()
    expanded = case.expanded()
    negative = any(case.ids[place] < 0 for place in case.places())
    for distinct in (False, True):
        expected = sentence(case, distinct)
        if expected:
            with pytest.raises(SlotError) as caught:
                index.check(case.count, case.slots, "source", distinct=distinct)
            assert str(caught.value) == expected
            with pytest.raises(SlotError) as caught:
                index.check_named("blocks", case.count, case.slots, distinct=distinct)
            assert str(caught.value) == named_sentence(case)
            continue
        assert index.check(case.count, case.slots, "source", distinct=distinct) is negative
        assert index.check_named("blocks", case.count, case.slots, distinct=distinct) is negative
        assert index.skips(case.count, case.slots) is negative

    for every in {1, 3, case.step}:
        assert index.slots(case.count, every).tolist() == expanded[::every]

    unique = index.without_repeats()
    last = {each: place for place, each in enumerate(case.ids)}
    expected_ids = [
        each if each < 0 or last[each] == place else -1 for place, each in enumerate(case.ids)
    ]
    assert unique.host_ids().tolist() == expected_ids
    assert (unique is index) == (expected_ids == list(case.ids))


#: Cases in which the core and the Python that it replaced differed at some time.
CORPUS = [
    # No position uses the id that the offset cuts.
    Case((-1, 2168614364840691143, 1537228672809129301), 3, 2, 0, 535026),
    # The view's end cuts the last id, of which only valid tokens are used.
    Case((0, 2), 4, 0, 6, 10),
    Case((2, 0), 4, 0, 8, 10),
    # An id occurs twice, and its tokens once.
    Case((5, 5), 4, 2, 4, 24),
    Case((5, 5, 5), 4, 2, 8, 24),
    Case((7, 7), 1, 0, 2, 8, spread=-1),
    # Ids that a multiplication by the step would overflow.
    Case((2**63 - 1, 2**62, 2**62 // 3), 3, 1, 8, PAST_ANY_VIEW),
    Case((-(2**63), 2**63 - 1), 1, 0, 2, PAST_ANY_VIEW),
    Case((-(2**31), 2**31 - 1, -1), 16, 15, 33, 2**36, narrow=True, spread=2),
]


@given(cases())
def test_the_core_does_what_the_definition_says(case: Case) -> None:
    judge(case)


for each in CORPUS:
    test_the_core_does_what_the_definition_says = example(each)(
        test_the_core_does_what_the_definition_says
    )


@st.composite
def long_lists(draw: st.DrawFn) -> Case:
    """Draw lists that are longer than a vector, dense or few in their view."""
    count = draw(st.sampled_from([15, 16, 17, 64, 1000, 3000]))
    span = draw(st.sampled_from([count, 2 * count, 15 * count, 16 * count, 17 * count, 2**34]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["drawn", "distinct", "even", "runs"]))
    if kind == "drawn":
        ids = rng.integers(0, span, count)
    elif kind == "distinct":
        ids = rng.permutation(np.unique(rng.integers(0, span, count)))
    elif kind == "even":
        ids = np.arange(count) * max(1, span // count)
    else:
        first = rng.permutation(np.unique(rng.integers(0, max(1, span // 16), -(-count // 16))))
        ids = (first[:, None] * 16 + np.arange(16)).reshape(-1)[:count]
    faults = draw(st.lists(st.sampled_from([-1, span, INT64[1], 0, 1]), max_size=3))
    for fault in faults:
        ids[rng.integers(0, ids.size)] = fault
    return Case(tuple(ids.tolist()), 1, 0, ids.size, span, spread=draw(st.sampled_from([1, 2])))


@given(long_lists())
def test_long_lists_dense_and_far_apart(case: Case) -> None:
    judge(case)


@pytest.mark.full
@given(cases() | long_lists())
@settings(max_examples=200_000)
def test_many_lists(case: Case) -> None:
    judge(case)


@pytest.mark.parametrize("distance", [1, 16, 233, 75025, 2**16, 2**32 + 1, 2654435769])
def test_ids_at_one_distance_take_no_longer(distance: int) -> None:
    """A table whose hash maps such ids to neighbours would take 10^8 steps for them."""
    count = 1 << 14
    ids = torch.arange(count).flip(0) * distance
    slots = count * distance
    assert core.check(ids, 1, 0, count, slots, True) == core.CLEAN
    ids[0] = ids[-1]
    assert core.check(ids, 1, 0, count, slots, True) == core.TWICE
    assert core.fault(ids, 1, 0, count, slots, True).again_place == count - 1


# --- Python's lists -------------------------------------------------------------------------------


class Number(int):
    """An integer of another type."""


@given(st.lists(st.integers(-(2**65), 2**65) | st.integers(-3, 300), max_size=70))
def test_lists_are_read_as_python_reads_them(ids: list[int]) -> None:
    if all(INT64[0] <= each <= INT64[1] for each in ids):
        read = core.read_list(ids)
        assert read is not None
        assert read[0].tolist() == read[1].tolist() == ids
        assert Index(tuple(ids)).host_ids().tolist() == ids
        return
    assert core.read_list(ids) is None
    with pytest.raises(SlotError, match="at most 64 bits in an index, got a larger number"):
        Index(ids)


@pytest.mark.parametrize("other", [True, 2.0, None, "1", 2**63, -(2**63) - 1, np.int64(4)], ids=str)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_list_with_another_item_is_not_read(other: Any, place: int) -> None:
    ids: list[Any] = [3, -1]
    ids.insert(place, other)
    assert core.read_list(ids) is None


def test_a_list_keeps_its_references() -> None:
    ids = [2**40 + each for each in range(100)]
    others = [*ids, object()]
    references = [sys.getrefcount(each) for each in others]
    for _ in range(10):
        assert core.read_list(ids) is not None
        assert core.read_list(others) is None
    assert [sys.getrefcount(each) for each in others] == references


def test_integers_of_other_types_are_read_by_numpy() -> None:
    assert Index([Number(4), np.int32(1), 7]).host_ids().tolist() == [4, 1, 7]
    with pytest.raises(SlotError, match="got True"):
        Index([2**70, True])  # the type counts before the number


# --- Memory and threads ---------------------------------------------------------------------------


def test_positions_that_the_ids_do_not_cover() -> None:
    """The core reads nothing behind a list, whatever its arguments are."""
    index = Index([4, 1, 7], 2)
    with pytest.raises(IndexError, match="3 ids do not cover 7 positions from 0 on"):
        index.slots(7)
    with pytest.raises(IndexError):
        index.shifted(7).slots(1)
    for offset, count in ((0, 2**62), (2**62, 2**62), (2**63 - 1, 2**63 - 1), (6, 1), (0, -1)):
        code = core.check(torch.tensor([4, 1, 7]), 2, offset, count, 16, True)
        assert code == core.CLEAN


def test_ids_at_any_address() -> None:
    memory = np.zeros(41, np.uint8)
    ids = np.frombuffer(memory.data, np.int64, 5, offset=1)
    ids[:] = [4, 1, -1, 2**40, 0]
    assert Index(ids).slots(5).tolist() == [4, 1, -1, 2**40, 0]
    with pytest.raises(SlotError, match=f"slot {2**40} at position 3"):
        Index(ids).check(5, 100, "source")


def test_threads_share_an_index() -> None:
    count = 4096
    index = Index(torch.randperm(2 * count)[:count])
    expected = index.host_ids().tolist()
    wrong: list[object] = []

    def look() -> None:
        for number in range(200):
            judged = index.check(count, 2 * count, "source", distinct=number % 2 > 0)
            if judged or index.slots(count).tolist() != expected:
                wrong.append(number)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_that_make_one_array_of_ids_share_the_first() -> None:
    """The core reads it by its address, so none may take its place."""
    apart = torch.arange(80_000)[::2]
    for _ in range(20):
        index = Index(apart)
        begin = threading.Barrier(4)
        made: list[np.ndarray[Any, Any]] = []

        def make(index: Index = index, begin: threading.Barrier = begin, made: Any = made) -> None:
            begin.wait()
            made.append(index.host_ids())

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(each) for each in made}) == 1
        assert np.array_equal(made[0], apart.numpy())


def test_ids_that_change_during_a_check_harm_no_memory() -> None:
    """Their result is undefined. Sanitizers see what the core reads and writes."""
    count = 4096
    ids = torch.randperm(count)
    index = Index(ids)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            ids[::7] = INT64[1]
            ids[::7] = torch.arange(0, count, 7)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            with suppress(SlotError):
                index.check(count, count, "source", distinct=True)
    finally:
        stop.set()
        thread.join()
