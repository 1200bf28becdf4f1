# SPDX-License-Identifier: Apache-2.0
"""`Rows`: what is lent, kept, pinned and evicted, by a model that counts."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from support.storage_cases import counts_of, key_of

from portakv.storage.eviction import FIRST, mark_of
from portakv.storage.memory import Claim, Loan, Rows, Want

LOAD = Want(4096, False)
SAVE = Want(4096, True, Claim(evict=False))


def rows_of(staging: int, host: int, row_bytes: int = 4096, kind: type[Rows] = Rows) -> Rows:
    """Return so many rows of one size."""
    return kind([row_bytes], staging * row_bytes, host * row_bytes, pin=False)


def fill_rows(rows: Rows, *numbers: int, prefetched: bool = False) -> list[bool]:
    """Lend a row for each number and keep it; return which were kept."""
    result = []
    for number in numbers:
        items = rows.take(1, LOAD)
        assert items is not None
        result += rows.keep(
            items, [key_of(number)], [FIRST], Want(4096, False, prefetched=prefetched)
        )
        rows.give(items)
    return result


def test_rows_are_aligned_and_apart() -> None:
    rows = rows_of(3, 2, 8192)
    assert rows.tensor.shape == (5, 8192)
    assert rows.tensor.data_ptr() % 4096 == 0
    assert rows.memory == ((rows.tensor.data_ptr(), 5 * 8192),)
    assert not rows.pinned
    for item in range(5):
        rows.array[item][:] = item
    assert (rows.tensor.numpy() == np.arange(5)[:, None]).all()


@pytest.mark.parametrize("staging", [1, 2, 9])
def test_a_lease_is_all_or_none_and_stores_leave_half_to_loads(staging: int) -> None:
    rows = rows_of(staging, 4)
    assert fill_rows(rows, 0, 1, 2, 3) == [True] * 4
    half = max(1, staging // 2)
    assert rows.most == half
    first = rows.take(half, SAVE)
    assert first is not None
    assert rows.take(1, SAVE) is None
    rest = rows.take(staging - half, LOAD) if staging > half else []
    assert rest is not None
    assert rows.take(1, LOAD) is None, "kept rows are never lent"
    rows.give(first)
    assert rows.take(half + 1, LOAD) is None
    assert rows.take(half, LOAD) is not None


def test_the_row_used_least_recently_goes_unless_it_is_pinned() -> None:
    """Fault 58, 59 of the host tier: what is being read stays, and if all is, nothing is kept."""
    rows = rows_of(2, 3)
    assert fill_rows(rows, 0, 1, 2) == [True] * 3
    assert fill_rows(rows, 1) == [False]
    rows.touch([key_of(0), key_of(2)])  # a prefix: 0 is to outlive 2, and both 1
    pin = rows.pin([key_of(1)])
    assert fill_rows(rows, 3) == [True]
    assert [rows.has(key_of(i)) for i in range(4)] == [True, True, False, True]
    pins = [pin, rows.pin([key_of(0), key_of(3), key_of(9)])]
    assert fill_rows(rows, 4) == [False]
    assert len({row for each in pins for row in each.rows}) == 4
    assert pins[1].rows[2] is None
    for each in pins:
        each.cancel()
    assert fill_rows(rows, 4) == [True]
    assert counts_of(rows) == {"free": 2, "lent": 0, "kept": 3}
    assert rows.evicted == 2


def test_what_was_prefetched_and_not_used_takes_half() -> None:
    rows = rows_of(2, 4)
    fill_rows(rows, 0, 1)
    assert fill_rows(rows, 2, 3, 4, prefetched=True) == [True] * 3
    assert [rows.has(key_of(i)) for i in range(5)] == [True, True, False, True, True]
    rows.pin([key_of(3)]).cancel()  # used: it counts as any other
    fill_rows(rows, 5, prefetched=True)
    assert [rows.has(key_of(i)) for i in range(6)] == [False, True, False, True, True, True]


def test_without_a_host_tier_nothing_is_kept() -> None:
    rows = rows_of(2, 0)
    assert fill_rows(rows, 0) == [False]
    assert counts_of(rows)["free"] == 2


# --- several rows together


@pytest.mark.parametrize("seed", range(20))
def test_rows_that_are_kept_together_are_kept_as_one_after_the_other(seed: int) -> None:
    random = Random(seed)
    numbers = range(24)
    own = {key_of(number): place for place, number in enumerate(numbers)}
    together = rows_of(8, 6)
    single = rows_of(8, 6)
    for _ in range(40):
        some = [key_of(number) for number in random.sample(numbers, 4)]
        marks = [mark_of(key_of(random.choice(numbers))) for _ in some]
        claim = Claim(own, (), random.random() < 0.8)
        want = Want(4096, True, claim, prefetched=random.random() < 0.3)
        both = [rows.take(4, SAVE) for rows in (together, single)]
        assert both[0] is not None
        assert both[1] is not None
        kept = together.keep(both[0], some, marks, want)
        each = [
            single.keep([item], [key], [mark], want)[0]
            for item, key, mark in zip(both[1], some, marks, strict=True)
        ]
        assert kept == each
        for rows, items in zip((together, single), both, strict=True):
            assert items is not None
            rows.give(items)
        assert together.chains.by_use() == single.chains.by_use()
        assert counts_of(together) == counts_of(single)
        assert together.evicted == single.evicted


# --- saves take rows of the host tier


def filled(staging: int = 8, host: int = 8, cached: int = 8) -> Rows:
    """Return rows of which the host tier has the keys 0, 1, ... in order of use."""
    rows = rows_of(staging, host)
    assert fill_rows(rows, *range(cached)) == [True] * cached
    return rows


def cached_numbers(rows: Rows) -> list[int]:
    """Return the numbers of the keys that have a row, the least recently used first."""
    return [int.from_bytes(key[:4], "little") for key in rows.chains.by_use()]


def claim_of(*numbers: int, evict: bool = True, apart: tuple[bytes, ...] = ()) -> Claim:
    """Return the claim of a call of these keys."""
    return Claim({key_of(number): place for place, number in enumerate(numbers)}, apart, evict)


def test_a_save_takes_rows_in_place_of_the_next_to_evict() -> None:
    rows = filled()
    claim = claim_of(*range(100, 112))
    assert rows.take(7, SAVE) is None, "the control: without a claim saves have half of staging"
    want = Want(4096, True, claim, 6)
    items = rows.take(7, want)
    assert items is not None
    assert cached_numbers(rows) == [3, 4, 5, 6, 7]
    assert rows.evicted == 3
    assert counts_of(rows) == {"free": 4, "lent": 7, "kept": 5}

    # They become rows of the host tier without a further eviction, until half of staging is left.
    keys = [key_of(number) for number in range(100, 107)]
    assert rows.keep(items[:3], keys[:3], [FIRST] * 3, want) == [True] * 3
    assert rows.evicted == 3
    assert rows.keep(items[3:], keys[3:], [FIRST] * 4, want) == [True] * 4
    assert rows.evicted == 7
    assert cached_numbers(rows) == [7, *range(100, 107)]
    rows.give(items)
    assert counts_of(rows) == {"free": 8, "lent": 0, "kept": 8}


def test_free_rows_of_the_host_tier_come_before_cached_ones() -> None:
    rows = filled(cached=5)
    assert rows.take(7, Want(4096, True, claim_of(100, evict=False), 0)) is not None
    assert cached_numbers(rows) == [*range(5)]
    assert rows.take(1, Want(4096, True, claim_of(100, evict=False), 0)) is None


def test_rows_beyond_staging_are_not_cached_until_they_come_back() -> None:
    rows = filled()
    items = rows.take(8, Want(4096, True, claim_of(100), 0))
    assert items is not None
    other = rows.take(1, LOAD)
    assert other is not None
    assert rows.keep(other, [key_of(50)], [FIRST]) == [True]  # in place of the next one
    assert cached_numbers(rows) == [5, 6, 7, 50]
    rows.give(other)
    rows.give(items)
    assert fill_rows(rows, *range(20, 24)) == [True] * 4
    assert len(cached_numbers(rows)) == 8


def test_loads_find_their_half_of_staging_whatever_saves_have() -> None:
    rows = filled()
    assert rows.take(12, Want(4096, True, claim_of(100), 0)) is not None
    assert rows.take(1, Want(4096, True, claim_of(100), 0)) is None, (
        "the host tier has no more rows"
    )
    assert rows.take(5, LOAD) is None
    assert rows.take(4, LOAD) is not None
    assert counts_of(rows) == {"free": 0, "lent": 16, "kept": 0}


def test_loads_beyond_their_half_leave_less_to_saves() -> None:
    rows = filled()
    loads = rows.take(6, LOAD)
    assert loads is not None
    claim = claim_of(100)
    assert rows.take(3, Want(4096, True, claim, 0)) is None, (
        "the rows of the host tier come after the half"
    )
    assert rows.take(2, Want(4096, True, claim, 0)) is not None
    assert rows.evicted == 0
    rows.give(loads)
    assert rows.take(9, Want(4096, True, claim, 0)) is not None


@pytest.mark.parametrize("why", ["pinned", "lent", "earlier", "kept prefix", "not allowed"])
def test_a_save_takes_no_row_that_may_not_go(why: str) -> None:
    rows = filled()
    claim = claim_of(*range(100, 108))
    caller = Caller()
    loan = None
    if why == "pinned":
        assert None not in rows.pin([key_of(number) for number in range(8)]).rows
    elif why == "lent":
        loan = rows.borrow([key_of(number) for number in range(8)], caller)
    elif why == "earlier":
        claim = claim_of(*range(8), *range(100, 108))
    elif why == "kept prefix":
        claim = Claim({key_of(0): -1, key_of(100): 0})
    else:
        claim = claim_of(*range(100, 108), evict=False)
    assert rows.take(5, Want(4096, True, claim, 12)) is None
    assert rows.evicted == 0
    assert cached_numbers(rows) == [*range(8)]
    assert rows.take(4, Want(4096, True, claim, 12)) is not None  # of staging
    if loan is not None:
        loan.cancel()


class Caller:
    """An owner of a loan."""


class Hasty(Rows):
    """Rows that evict one after the other, before they know whether enough may go."""

    def _evict_for_saves(self, beyond: int, want: Want) -> bool:
        while len(self.index) + beyond > self.host:
            if not self._evict(want):
                return False
        return True


@pytest.mark.parametrize("why", ["pinned", "lent", "earlier"])
@pytest.mark.parametrize("kind", [Rows, Hasty], ids=["rows", "negative control"])
def test_a_save_that_finds_too_few_rows_evicts_none(kind: type[Rows], why: str) -> None:
    """Of the three rows that it needs the last one may not go."""
    rows = rows_of(8, 8, kind=kind)
    assert fill_rows(rows, *range(8)) == [True] * 8
    claim = claim_of(*range(100, 108))
    loan = None
    if why == "pinned":
        assert None not in rows.pin([key_of(number) for number in range(2, 8)]).rows
    elif why == "lent":
        loan = rows.borrow([key_of(number) for number in range(2, 8)], rows)
    else:
        claim = claim_of(*range(2, 8), *range(100, 108))
    place = 12 if why == "earlier" else 6
    counts = counts_of(rows)
    assert rows.take(7, Want(4096, True, claim, place)) is None
    whole = cached_numbers(rows) == [*range(8)]
    assert whole is (kind is Rows)
    assert (rows.evicted == 0) is whole
    assert (counts_of(rows) == counts) is whole
    if whole:  # the order is what it was
        items = rows.take(6, Want(4096, True, claim, place))
        assert items is not None
        assert cached_numbers(rows) == [*range(2, 8)]
    if loan is not None:
        loan.cancel()


class Lender(dict[bytes, int]):
    """Positions of a call's keys; a load takes the row of a key when its position is read."""

    def __init__(self, rows: Rows, key: bytes) -> None:
        super().__init__({key_of(100): 0})
        self.rows = rows
        self.key = key
        self.loans = list[Loan]()

    def get(self, key: bytes, *default: int) -> int:  # type: ignore[override]
        if key == self.key:
            self.loans.append(self.rows.borrow([key], self))
        return super().get(key, *default)


def test_a_load_that_comes_between_choice_and_eviction_keeps_all_rows() -> None:
    """A loan takes no lock."""
    rows = filled()
    lender = Lender(rows, key_of(2))
    assert rows.take(7, Want(4096, True, Claim(lender), 0)) is None
    assert cached_numbers(rows) == [*range(8)]
    assert rows.evicted == 0
    (loan,) = lender.loans
    loan.cancel()
    assert rows.take(7, Want(4096, True, claim_of(100), 0)) is not None
    assert cached_numbers(rows) == [*range(3, 8)]


def test_a_save_takes_rows_of_later_blocks_of_its_call_and_of_other_forms() -> None:
    """Their positions are in the call, but they come after its block, or are of another form."""
    rows = filled()
    later = claim_of(100, 101, *range(8))
    assert rows.take(5, Want(4096, True, later, 1)) is not None
    assert cached_numbers(rows) == [*range(1, 8)]
    apart = Claim(claim_of(*range(8), 100).own, (b"",))  # the form of keys without a prefix
    assert rows.take(1, Want(4096, True, apart, 8)) is not None
    assert cached_numbers(rows) == [*range(2, 8)]


def test_a_predecessor_stays_while_its_successor_does() -> None:
    rows = rows_of(8, 4)
    items = rows.take(4, LOAD)
    assert items is not None
    keys = [key_of(number) for number in range(4)]
    follows = [FIRST, *(mark_of(key) for key in keys[:-1])]
    assert rows.keep(items, keys, follows) == [True] * 4
    assert rows.take(6, Want(4096, True, claim_of(100), 0)) is not None
    assert sorted(cached_numbers(rows)) == [0, 1]


def test_a_save_takes_the_rows_of_prefetched_blocks_in_their_turn() -> None:
    rows = filled(cached=2)
    assert fill_rows(rows, 20, 21, prefetched=True) == [True] * 2
    assert fill_rows(rows, 2, 3, 4, 5) == [True] * 4
    assert rows.take(7, Want(4096, True, claim_of(100), 0)) is not None
    assert cached_numbers(rows) == [21, 2, 3, 4, 5]
    assert fill_rows(rows, 22, 23, 24, prefetched=True) == [True] * 3
    assert cached_numbers(rows)[-3:] == [22, 23, 24]


def test_without_a_host_tier_a_claim_changes_nothing() -> None:
    rows = rows_of(8, 0)
    assert rows.take(5, Want(4096, True, claim_of(100), 0)) is None
    assert rows.take(4, Want(4096, True, claim_of(100), 0)) is not None
    assert rows.take(1, Want(4096, True, claim_of(100), 0)) is None


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_in_one_place_whatever_comes(seed: int) -> None:
    """Random calls against a count: no row is lost or in two places, and loads find their half."""
    random = Random(seed)
    staging = random.choice([1, 2, 5, 8])
    host = random.choice([0, 1, 4, 9])
    rows = rows_of(staging, host)
    lent: list[tuple[list[int], bool]] = []
    pins: list[Loan] = []
    for _ in range(400):
        step = random.random()
        key = key_of(random.randrange(30))
        if step < 0.5:
            store = random.random() < 0.6
            claim = claim_of(*random.sample(range(30), 12), evict=random.random() < 0.9)
            before = set(cached_numbers(rows))
            items = rows.take(random.randint(1, 4), Want(4096, store, claim, 5))
            gone = before - set(cached_numbers(rows))
            assert not gone or store
            assert all(claim.place_of(key_of(number)) > 5 for number in gone)
            if items is not None:
                lent.append((items, store))
        elif step < 0.9 and lent:
            items, _ = lent.pop(random.randrange(len(lent)))
            some = [key_of(number) for number in random.sample(range(30), len(items))]
            prefetch = Want(4096, False, prefetched=random.random() < 0.3)
            rows.keep(items, some, [FIRST] * len(items), prefetch)
            rows.give(items)
        elif step < 0.95:
            pins.append(rows.pin([key]))
        elif pins:
            pins.pop().cancel()
        saved = sum(len(items) for items, store in lent if store)
        loaded = sum(len(items) for items, store in lent if not store)
        counts = counts_of(rows)
        assert counts["lent"] == saved + loaded
        assert sum(counts.values()) == staging + host
        assert counts["kept"] + max(0, saved - rows.most) <= host
        left = staging - loaded - min(saved, rows.most)
        assert left >= 0
        assert counts["free"] >= left, "a load would wait for a row of the host tier"
