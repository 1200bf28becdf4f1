# SPDX-License-Identifier: Apache-2.0
"""`Rows`: what is lent, kept, pinned and evicted, by a model that counts."""

from __future__ import annotations

import numpy as np
import pytest
from support.storage_cases import key_of

from portakv.storage.chains import FIRST
from portakv.storage.rows import Rows


def fill_rows(rows: Rows, *numbers: int, prefetched: bool = False) -> list[bool]:
    """Lend a row for each number and keep it; return which were kept."""
    result = []
    for number in numbers:
        items = rows.take(1, False)
        assert items is not None
        result += rows.keep(items, [key_of(number)], [FIRST], prefetched)
        rows.give(items)
    return result


def test_rows_are_aligned_and_apart() -> None:
    rows = Rows(8192, 3, 2, pin=False)
    assert rows.tensor.shape == (5, 8192)
    assert rows.tensor.data_ptr() % 4096 == 0
    assert rows.memory == ((rows.tensor.data_ptr(), 5 * 8192),)
    assert not rows.pinned
    for item in range(5):
        rows.array[item][:] = item
    assert (rows.tensor.numpy() == np.arange(5)[:, None]).all()


@pytest.mark.parametrize("staging", [1, 2, 9])
def test_a_lease_is_all_or_none_and_stores_leave_half_to_loads(staging: int) -> None:
    rows = Rows(4096, staging, 4, pin=False)
    half = max(1, staging // 2)
    assert rows.most == half
    first = rows.take(half, True)
    assert first is not None
    assert rows.take(1, True) is None
    rest = rows.take(staging - half, False) if staging > half else []
    assert rest is not None
    assert rows.take(1, False) is None, "kept rows are never lent"
    rows.give(first)
    assert rows.take(half + 1, False) is None
    assert rows.take(half, False) is not None


def test_the_row_used_least_recently_goes_unless_it_is_pinned() -> None:
    """Fault 58, 59 of the host tier: what is being read stays, and if all is, nothing is kept."""
    rows = Rows(4096, 2, 3, pin=False)
    assert fill_rows(rows, 0, 1, 2) == [True] * 3
    assert fill_rows(rows, 1) == [False]
    rows.touch([key_of(0), key_of(2)])  # a prefix: 0 is to outlive 2, and both 1
    pin = rows.find(key_of(1))
    assert pin is not None
    assert fill_rows(rows, 3) == [True]
    assert [rows.has(key_of(i)) for i in range(4)] == [True, True, False, True]
    pins = [pin, *(item for i in (0, 3) if (item := rows.find(key_of(i))) is not None)]
    assert fill_rows(rows, 4) == [False]
    assert len({*pins}) == 3
    rows.unpin(pins)
    assert fill_rows(rows, 4) == [True]
    assert rows.find(key_of(9)) is None
    assert rows.counts() == {"free": 2, "lent": 0, "kept": 3}
    assert rows.evicted == 2


def test_what_was_prefetched_and_not_used_takes_half() -> None:
    rows = Rows(4096, 2, 4, pin=False)
    fill_rows(rows, 0, 1)
    assert fill_rows(rows, 2, 3, 4, prefetched=True) == [True] * 3
    assert [rows.has(key_of(i)) for i in range(5)] == [True, True, False, True, True]
    item = rows.find(key_of(3))  # used: it counts as any other
    assert item is not None
    rows.unpin([item])
    fill_rows(rows, 5, prefetched=True)
    assert [rows.has(key_of(i)) for i in range(6)] == [False, True, False, True, True, True]


def test_without_a_host_tier_nothing_is_kept() -> None:
    rows = Rows(4096, 2, 0, pin=False)
    assert fill_rows(rows, 0) == [False]
    assert rows.counts()["free"] == 2
