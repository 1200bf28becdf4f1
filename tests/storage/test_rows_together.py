# SPDX-License-Identifier: Apache-2.0
"""Rows of several sizes that are taken together are those that are taken one after the other, and
evict the same keys in the same order."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run_model
from support.storage_cases import key_of

from portakv.storage.eviction import FIRST, mark_of
from portakv.storage.memory import ANY, MOST_EVICTED, UNUSED, Claim, HostIndex, Loan, Rows, Want

PAGE = 4096
SIZES = [1, 3, 4, 10]  # pages
LARGEST = 10
STAGING = 4  # rows
HOST = 30  # pages
KEYS = 40


class OneByOne(Rows):
    """Takes each row by a separate look for free pages, and evicts one row after the other."""

    def _zone_rows(self, count: int, want: Want) -> list[int]:
        pages = want.nbytes // PAGE
        items = list[int]()
        while len(items) < count:
            made = self._zone.take(pages, 1)
            for _ in range(MOST_EVICTED):
                group = UNUSED if want.prefetched and self._crowded(want.nbytes) else None
                if made or not self._evict(want, group):
                    break
                made = self._zone.take(pages, 1)
            if not made:
                break
            self._pages[made[0]] = pages
            items += made
        return sorted(items)


class Together(Rows):
    """Evicts a row for each row that is missing, before it looks for free pages again."""

    def _evict_for(self, items: list[int], count: int, want: Want) -> None:
        for _ in range(count - len(items)):
            self._evict(want)
        items += self._zone.take(want.nbytes // PAGE, count - len(items))


class EvictsOwn(Rows):
    """Evicts earlier blocks of the same call."""

    def _evict_for(self, items: list[int], count: int, want: Want) -> None:
        super()._evict_for(items, count, want._replace(claim=ANY))


class EvictsAll(Rows):
    """Evicts for one row until it has a run, however many others go."""

    def _evict_for(self, items: list[int], count: int, want: Want) -> None:
        for _ in range(HOST):
            super()._evict_for(items, count, want)
            if len(items) == count:
                return


class Lease:
    """Rows of both stores that are lent to one call."""

    def __init__(self, items: list[int], pages: int, keys: list[bytes], claim: Claim) -> None:
        self.items = items
        self.pages = pages
        self.keys = keys
        self.claim = claim


class Comparison(RuleBasedStateMachine):
    """The same random steps for both stores; the keys of a call follow each other."""

    kind = Rows
    leases = Bundle("leases")

    @initialize(pages=st.integers(0, 6), small=st.integers(0, HOST), order=st.integers(1, 12))
    def make(self, pages: int, small: int, order: int) -> None:
        """Begin with some rows of a page, of which the next to evict lie apart."""
        sizes = [each * PAGE for each in SIZES]
        size = (STAGING * LARGEST * PAGE, (HOST - pages) * PAGE)
        self.both = [kind(sizes, *size, pin=False) for kind in (self.kind, OneByOne)]
        self.changes = [list[tuple[bytes, bool, str]]() for _ in self.both]
        self.pins = list[list[Loan]]()
        self.loans = list[list[Loan]]()
        for rows, changes in zip(self.both, self.changes, strict=True):
            HostIndex(rows, b"").announce(lambda *change, changes=changes: changes.append(change))
        if small:
            self.end(self.take(1, 0, small, True, True, -1, False, False), False, False)
        for number in range(0, order * KEYS, order):
            self.touch(number, 1)

    def keys(self, first: int, count: int) -> list[bytes]:
        return [key_of((first + number) % KEYS) for number in range(count)]

    def cached(self, rows: Rows) -> list[int | None]:
        loan = rows.borrow([key_of(number) for number in range(KEYS)], self)
        loan.cancel()
        rows.forget_loans()
        return [*loan.rows]

    @rule(
        target=leases,
        pages=st.sampled_from(SIZES),
        first=st.integers(0, KEYS - 1),
        count=st.integers(1, 8),
        store=st.booleans(),
        evict=st.sampled_from([True, True, True, False]),
        place=st.sampled_from([0, -1, -1, -1]),
        prefetched=st.sampled_from([False, False, True]),
        passing=st.sampled_from([False, False, False, True]),
    )
    def take(
        self,
        pages: int,
        first: int,
        count: int,
        store: bool,
        evict: bool,
        place: int,
        prefetched: bool,
        passing: bool,
    ) -> Lease:
        keys = self.keys(first, count)
        claim = Claim({key: number for number, key in enumerate(keys)}, evict=evict)
        at = range(count)[place]
        want = Want(pages * PAGE, store, claim, at, prefetched, passing)
        items, expected = (rows.take(count, want) for rows in self.both)
        assert items == expected
        return Lease(items or [], pages, keys, claim)

    @rule(lease=consumes(leases), chained=st.booleans(), prefetched=st.booleans())
    def end(self, lease: Lease, chained: bool, prefetched: bool) -> None:
        keys = lease.keys
        follows = [FIRST, *(mark_of(key) if chained else FIRST for key in keys[:-1])]
        sizes = [lease.pages * PAGE] * len(keys)
        want = Want(lease.pages * PAGE, True, lease.claim, prefetched=prefetched)
        kept = [rows.keep(lease.items, keys, follows, want, sizes) for rows in self.both]
        assert kept[0] == kept[1]
        for rows in self.both:
            rows.give(lease.items)

    @rule(number=st.integers(0, KEYS - 1))
    def pin(self, number: int) -> None:
        pins = [rows.pin([key_of(number)]) for rows in self.both]
        assert pins[0].rows == pins[1].rows
        self.pins.append(pins)

    @rule(pick=st.integers(0, 9))
    def unpin(self, pick: int) -> None:
        if self.pins:
            for loan in self.pins.pop(pick % len(self.pins)):
                loan.cancel()

    @rule(first=st.integers(0, KEYS - 1), count=st.integers(1, 5))
    def borrow(self, first: int, count: int) -> None:
        self.loans.append([rows.borrow(self.keys(first, count), self) for rows in self.both])

    @rule(pick=st.integers(0, 9))
    def end_loan(self, pick: int) -> None:
        if self.loans:
            for loan in self.loans.pop(pick % len(self.loans)):
                loan.cancel()

    @rule(first=st.integers(0, KEYS - 1), count=st.integers(1, 8))
    def touch(self, first: int, count: int) -> None:
        for rows in self.both:
            rows.touch(self.keys(first, count))

    @rule(number=st.integers(0, KEYS - 1))
    def use(self, number: int) -> None:
        for rows in self.both:
            rows.use([key_of(number)])

    @rule(number=st.integers(0, KEYS - 1))
    def delete(self, number: int) -> None:
        gone, expected = (rows.delete([key_of(number)]) for rows in self.both)
        assert gone == expected

    @invariant()
    def both_are_equal(self) -> None:
        if not hasattr(self, "both"):
            return
        rows, expected = self.both
        assert self.changes[0] == self.changes[1]
        assert self.cached(rows) == self.cached(expected)
        assert rows.chains.by_use() == expected.chains.by_use()
        assert rows.evicted == expected.evicted
        assert rows.nbytes_by_state() == expected.nbytes_by_state()


def comparison(kind: type[Rows]) -> type[Comparison]:
    return type("Rows", (Comparison,), {"kind": kind})


def test_rows_that_are_taken_together() -> None:
    run_model(comparison(Rows), settings=settings(max_examples=120, stateful_step_count=40))


@pytest.mark.parametrize("kind", [Together, EvictsOwn, EvictsAll])
def test_the_comparison_finds_rows_with_a_bug(kind: type[Rows]) -> None:
    terms = settings(max_examples=300, stateful_step_count=40, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_model(comparison(kind), settings=terms)


# --- single cases


def prompt(rows: Rows, first: int, count: int, pages: int) -> list[int]:
    """Cache the blocks of a prompt, each in rows of so many pages; return the rows."""
    keys = [key_of(first + number) for number in range(count)]
    claim = Claim({key: number for number, key in enumerate(keys)})
    want = Want(pages * PAGE, True, claim, count - 1)
    items = rows.take(count, want)
    assert items is not None
    follows = [FIRST, *map(mark_of, keys[:-1])]
    sizes = [pages * PAGE] * count
    assert rows.keep(items, keys, follows, want, sizes) == [True] * count
    rows.give(items)
    rows.touch(keys)
    return items


def rows_of(host: int, kind: type[Rows] = Rows) -> Rows:
    return kind([3 * PAGE, 4 * PAGE], STAGING * 4 * PAGE, host * PAGE, pin=False)


def test_rows_in_place_of_a_prompt_lie_in_its_order() -> None:
    """The last block of a prompt goes first. A copy of rows in that order has no long runs."""
    rows = rows_of(36)
    first = STAGING * 4
    expected = [*range(first, first + 36, 3)]
    for number in range(3):
        assert prompt(rows, 20 * number, 12, 3) == expected
    assert rows.evicted == 24


class Reads(Claim):
    """A load begins to read a key just when it is chosen to go."""

    rows: Rows
    loans: list[Loan]

    def place_of(self, key: bytes) -> int:
        if key == key_of(2) and not self.loans:
            self.loans.append(self.rows.borrow([key], self.rows))
        return super().place_of(key)


def test_a_row_that_a_load_begins_to_read_stays() -> None:
    rows = rows_of(12)
    items = [prompt(rows, number, 1, 3)[0] for number in range(4)]
    Reads.rows = rows
    Reads.loans = []
    made = rows.take(4, Want(3 * PAGE, True, Reads()))
    assert made == [items[0], items[1], items[3], 0], "the last one is a row of staging"
    (loan,) = Reads.loans
    assert [*loan.rows] == [items[2]]
    assert [rows.has(key_of(number)) for number in range(4)] == [False, False, True, False]


class ForgetsLoans(Rows):
    """A negative control: a load is noticed only if it began before its key was next."""

    def _take_away(self, keys: Sequence[bytes]) -> list[int]:
        begun = self.begun
        self.begun = deque()
        try:
            return super()._take_away(keys)
        finally:
            self.begun = begun


def test_without_a_look_at_loans_such_a_row_goes() -> None:
    rows = rows_of(12, ForgetsLoans)
    items = [prompt(rows, number, 1, 3)[0] for number in range(4)]
    Reads.rows = rows
    Reads.loans = []
    assert rows.take(4, Want(3 * PAGE, True, Reads())) == items
