# SPDX-License-Identifier: Apache-2.0
"""Index lists: which slot each position uses, and which lists are refused."""

from __future__ import annotations

from contextlib import nullcontext
from math import gcd
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from portakv import Index, SlotError, Unsupported
from portakv.view.index import index_of

HERE = torch.device("cpu")
NARROW = frozenset({torch.int32})


@st.composite
def indices(draw: st.DrawFn) -> tuple[Index, int, list[int]]:
    """An index, a count that it covers, and the slots by the definition of DESIGN's words:
    position p, with q = p + offset, is slot ids[q // step] * step + q % step."""
    step = draw(st.integers(1, 6))
    ids = draw(st.none() | st.lists(st.integers(-2, 40), max_size=8))
    limit = 30 if ids is None else len(ids) * step
    offset = draw(st.integers(0, limit))
    count = draw(st.integers(0, limit - offset))
    slots = []
    for q in range(offset, offset + count):
        if ids is None:
            slots.append(q)
        else:
            slots.append(-1 if ids[q // step] < 0 else ids[q // step] * step + q % step)
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    tensor = None if ids is None else torch.tensor(ids, dtype=dtype)
    return Index(tensor, step, offset), count, slots


@given(indices(), st.integers(0, 48))
def test_the_definition_from_any_position(case: tuple[Index, int, list[int]], passed: int) -> None:
    index, count, slots = case
    passed = min(passed, count)
    actual = index.shifted(passed).slots(count - passed)
    assert actual.tolist() == slots[passed:]
    assert actual.dtype == np.int64
    assert index.slots(count).tolist() == slots  # the first index is as it was


@given(indices(), st.sampled_from([1, 2, 3, 6]))
def test_units_are_slots_divided(case: tuple[Index, int, list[int]], unit: int) -> None:
    index, count, _ = case
    unit = gcd(unit, index.offset, index.plan_step)
    count -= count % unit
    numbers = index.units(count, unit, HERE)
    assert numbers.dtype == torch.int64
    expected = index.slots(count)[::unit] // unit
    assert np.where(numbers.numpy() < 0, -1, numbers.numpy()).tolist() == expected.tolist()


@given(st.lists(indices(), min_size=1, max_size=4))
def test_joined_indices_follow_each_other(cases: list[tuple[Index, int, list[int]]]) -> None:
    joined = Index.joined([(index, count) for index, count, _ in cases])
    expected = [slot for _, _, slots in cases for slot in slots]
    actual = joined.slots(len(expected))
    assert np.where(actual < 0, -1, actual).tolist() == expected


LISTS: dict[str, Any] = {
    "int64": torch.tensor([4, -1, 7]),
    "int32": torch.tensor([4, -1, 7], dtype=torch.int32),
    "column": torch.tensor([[4, 0], [-1, 0], [7, 0]])[:, 0],
    "stepped": torch.tensor([4, 9, -1, 9, 7], dtype=torch.int32)[::2],
    "array of int32": np.array([4, -1, 7], dtype=np.int32),
    "reversed array": np.array([7, -1, 4])[::-1],
    "array of another byte order": np.array([4, -1, 7], dtype=">i8"),
    "read-only array": np.frombuffer(np.array([4, -1, 7]).tobytes(), np.int64),
    "tuple": (4, -1, 7),
    "list of numpy integers": list(np.array([4, -1, 7])),
}


@pytest.mark.parametrize("make", LISTS)
def test_lists_of_any_make(make: str) -> None:
    index = Index(LISTS[make])
    assert index.slots(3).tolist() == [4, -1, 7]
    assert index.host_ids().flags.c_contiguous
    assert index.length == 3
    assert index.units(3, 1, HERE).tolist() == [4, -1, 7]


def test_ranges_and_one_id_of_a_reversed_array() -> None:
    """Numpy calls such an array contiguous; its stride in torch is negative."""
    assert Index(np.arange(6)[::-1][2:3]).slots(1).tolist() == [3]
    assert Index(range(3, 6)).slots(3).tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (torch.tensor([1.0]), r"of torch.int32 or torch.int64, got dtype torch.float32"),
        (torch.tensor([True]), "dtype torch.bool"),
        (torch.tensor([1], dtype=torch.int16), "dtype torch.int16"),
        (torch.tensor([1], dtype=torch.uint8), "dtype torch.uint8"),
        (np.array([1.5]), "dtype float64"),
        (np.array([1], dtype=np.uint16), "dtype uint16"),
        (np.array([1, None], dtype=object), "object"),
        (np.array(["1"]), "<U1"),
        (torch.tensor(3), r"one dimension, got shape \(\)"),
        (torch.tensor([[1, 2]]), r"shape \(1, 2\)"),
        ([1, 2.0], "got 2.0"),
        ([True], "got True"),
        ([1, None], "got None"),
        ([2**70], "64 bits"),
        ("12", "got a str"),
        ({1, 2}, "got a set"),
        (torch.arange(3).to_sparse(), "dense tensor .* sparse_coo one"),
        (
            torch.nested.nested_tensor([torch.arange(3)] * 2),
            "dense tensor .* nested one",
        ),
        (torch._neg_view(torch.tensor([-1])), r"got a lazily negated tensor. .*resolve_neg\(\)"),
    ],
)
def test_lists_that_are_no_slots(ids: Any, why: str) -> None:
    with pytest.raises(SlotError, match=why):
        Index(ids)


@pytest.mark.parametrize("kind", ["int64", "int32", "strided"])
def test_ids_whose_storage_became_too_short(kind: str) -> None:
    # A tensor that numpy has seen cannot be resized.
    ids = torch.arange(32)[::2] if kind == "strided" else torch.arange(16).to(getattr(torch, kind))
    ids.untyped_storage().resize_(ids.itemsize * ids.stride(0) * 15)
    with pytest.raises(SlotError, match=r"storage holds its 16 ids, got one .* Make the index"):
        Index(ids)


def test_ids_inside_function_transforms() -> None:
    for transform, ids in ((torch.vmap, [[1]]), (torch.func.functionalize, [1])):
        with pytest.raises(SlotError, match=r"owns no memory, .* torch.vmap"):
            transform(Index)(torch.tensor(ids))


@pytest.mark.parametrize(
    ("step", "offset"), [(0, 0), (-1, 0), (1, -1), (1.5, 0), (2, 0.5), ("4", 0), (2**62, 0)]
)
def test_a_bad_step_or_offset(step: Any, offset: Any) -> None:
    with pytest.raises(SlotError, match="from 1 to 2147483647 and an integer offset"):
        Index([1], step, offset)


def test_what_an_index_knows_about_itself() -> None:
    table = Index(torch.tensor([5, 2, 9]), step=4, offset=3)
    nothing = Index(offset=3)
    assert (table.length, table.plan_step, table.on_host) == (9, 4, True)
    assert (nothing.length, nothing.plan_step, nothing.on_host) == (None, 0, True)
    assert repr(table) == "Index(<3 ids on cpu>, step=4, offset=3)"
    assert repr(nothing) == "Index(None, step=1, offset=3)"
    assert Index.of(table) is table
    assert Index.of([3, 1]).slots(2).tolist() == [3, 1]
    assert index_of(None).slots(3).tolist() == [0, 1, 2]
    with pytest.raises(SlotError, match=r"Expected ids, got None. Pass Index\(\)"):
        Index.of(None)  # type: ignore[arg-type]


def test_ids_are_copied_once_for_all_indices_of_a_list() -> None:
    index = Index(torch.tensor([4, -(2**40), 7]))
    narrow = index.ids_on(HERE, NARROW)
    assert narrow.tolist() == [4, -1, 7]
    assert index.shifted(1).ids_on(HERE, NARROW) is narrow
    assert index.placed(HERE, NARROW).ids is narrow
    assert index.shifted(2).placed(HERE, NARROW).slots(1).tolist() == [7]
    with pytest.raises(Unsupported, match=f"id {2**31}"):
        Index([2**31]).ids_on(HERE, NARROW)


def test_ids_that_lie_right_are_not_copied() -> None:
    index = Index(torch.tensor([4, 1]))
    assert index.placed(HERE, frozenset({torch.int64})) is index
    assert index.ids_on(HERE) is index.ids
    assert index.has_ids_on(HERE, frozenset({torch.int64}))
    assert not index.has_ids_on(HERE, NARROW)
    assert Index().placed(HERE, NARROW).ids is None
    stepped = Index(torch.arange(6)[::2]).ids_on(HERE)
    assert stepped.is_contiguous()
    assert stepped.tolist() == [0, 2, 4]


def test_a_copy_that_was_made_elsewhere_is_found() -> None:
    index = Index([4, 1])
    copy = torch.tensor([4, 1], dtype=torch.int32)
    index.add_copy(copy)
    assert index.ids_on(HERE, NARROW) is copy


def test_a_check_remembers_nothing() -> None:
    ids = torch.tensor([4, 1, 5])
    index = Index(ids)
    assert index.check(3, 6, "destination", distinct=True) is False
    ids[1] = 5
    with pytest.raises(SlotError, match="slot 5, which occurs 2 times"):
        index.check(3, 6, "destination", distinct=True)
    ids[1] = -1
    assert index.check(3, 6, "destination", distinct=True) is True


def test_clean_ids_stay_clean_for_their_range() -> None:
    index = Index([4, 1, 5])
    assert index.is_clean(3, 8)
    index.on_host = False  # as if the ids were on a device
    assert not index.is_clean(3, 8)
    index.mark_clean(3, 8)
    assert [index.is_clean(*each) for each in ((3, 8), (2, 8), (3, 4))] == [True, False, False]


@pytest.mark.parametrize(
    ("ids", "step", "offset", "count", "why"),
    [
        ([0, 1], 4, 0, 8, ""),
        ([0, 1], 4, 0, 9, "2 ids .* of the source index, got 9 positions from 0 on"),
        ([0, 1], 4, 4, 5, "2 ids .* 5 positions from 4"),
        (None, 1, 0, 16, ""),
        (None, 1, 1, 16, "of the source, which holds 16 tokens"),
    ],
)
def test_a_list_covers_ids_times_step_and_without_ids_the_view_decides(
    ids: Any, step: int, offset: int, count: int, why: str
) -> None:
    with pytest.raises(SlotError, match=why) if why else nullcontext():
        Index(ids, step, offset).check_length(count, 16, "source")


@given(indices(), st.integers(0, 120), st.integers(0, 3), st.booleans())
def test_a_check_finds_what_the_definition_says(
    case: tuple[Index, int, list[int]], size: int, passed: int, distinct: bool
) -> None:
    """Only positions that are used count, and what was found holds for its view and range only."""
    whole, count, slots = case
    top = max(slots, default=0)
    fewer = max(0, count - passed)
    ranges = [(view, 0, count) for view in (size, size, top, top + 1, 300)]
    for view, first, length in (*ranges, (300, 0, fewer), (300, count - fewer, fewer)):
        index = whole.shifted(first)
        used = slots[first : first + length]
        used = [] if whole.ids is None else used
        valid = [slot for slot in used if slot >= 0]
        past = next((at for at, slot in enumerate(used) if slot >= view), None)
        twice = {slot for slot in valid if valid.count(slot) > 1} if distinct else set()
        if past is None and not twice:
            skips = index.check(length, view, "source", distinct=distinct)
            assert skips is (len(valid) < len(used))
            continue
        with pytest.raises(SlotError) as caught:
            index.check(length, view, "source", distinct=distinct)
        if past is None:
            times = valid.count(min(twice))
            of = f" (of id {min(twice) // index.step})" if index.step > 1 else ""
            expected = (
                f"Expected each slot once in the source index, got slot {min(twice)}{of}, which "
                f"occurs {times} times; "
            )
        else:
            expected = (
                f"Expected the source index to stay inside the view's {view} slots, got slot "
                f"{used[past]}"
            )
            if index.step > 1:
                expected += f" (of id {used[past] // index.step}, {index.step} slots each)"
            expected += f" at position {past}; "
        assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("apart", [1, 100])
def test_duplicates_among_many_are_an_error_of_destinations_only_and_of_no_padding(
    apart: int,
) -> None:
    n = 2000
    ids = apart * torch.arange(n)
    slots = apart * n
    assert Index(ids).check(n, slots, "destination", distinct=True) is False
    ids[-1] = ids[1]
    assert Index(ids).check(n, slots, "source") is False
    with pytest.raises(
        SlotError, match=f"destination index, got slot {apart}, which occurs 2 times"
    ):
        Index(ids).check(n, slots, "destination", distinct=True)
    ids[: n // 2] = -1
    ids[0] = torch.iinfo(torch.int64).min
    assert Index(ids).check(n, slots, "destination", distinct=True) is True


def test_slots_that_do_not_fit_into_32_bits() -> None:
    index = Index(torch.tensor([2**31 - 1, 5], dtype=torch.int32), step=16)
    assert index.slots(17).tolist()[0] == (2**31 - 1) * 16
    assert index.check(17, 2**36, "source", distinct=True) is False
    with pytest.raises(SlotError, match=str((2**31 - 1) * 16)):
        index.check(17, 2**31, "source", distinct=True)
    assert index.units(32, 4, HERE)[0] == (2**31 - 1) * 4
