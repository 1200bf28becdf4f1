# SPDX-License-Identifier: Apache-2.0
"""Mappings that forget their oldest entries."""

import gc
from functools import partial
from operator import mul

import pytest
from support.threads import run_threads

from portakv.runtime.bounded import Bounded, Until, caches


def test_the_entry_that_was_inserted_first_goes_first() -> None:
    cache: Bounded[int, str] = Bounded("numbers", 2)
    assert cache.setdefault(1, "one") == "one"
    assert cache.get_or_make(2, lambda: "two") == "two"
    assert cache.get(1) == "one"  # which does not make it younger
    cache[3] = "three"
    assert (cache.get(1), cache.get(2), cache.get(3)) == (None, "two", "three")
    cache[2] = "deux"  # neither does this
    assert list(cache.values()) == ["deux", "three"]
    cache[4] = "four"
    assert (2 in cache, len(cache), cache.pop(3), cache.pop(3, None)) == (False, 2, "three", None)
    assert Bounded.get is dict.get  # so that a hit costs what one of a dictionary does


def test_an_entry_is_made_once_and_not_remembered_if_it_cannot_be_made() -> None:
    cache: Bounded[int, float | None] = Bounded("quotients", 4)
    with pytest.raises(ZeroDivisionError):
        cache.get_or_make(0, lambda: 1 / 0)
    assert len(cache) == 0
    made: list[int] = []
    for _ in range(2):  # None is a value as any
        assert cache.get_or_make(0, lambda: made.append(1)) is None
    assert made == [1]
    assert cache.setdefault(0, 5) is None
    assert 0 in cache


def test_existing_mappings_are_listed_by_name() -> None:
    later: Bounded[int, int] = Bounded("zebras of a test", 3)
    sooner: Bounded[int, int] = Bounded("ants of a test", 5)
    sooner[1] = 1
    listed = [(c.name, len(c), c.limit) for c in caches() if c.name.endswith("of a test")]
    assert listed == [("ants of a test", 1, 5), ("zebras of a test", 0, 3)]
    del later, sooner
    gc.collect()
    assert not [c for c in caches() if c.name.endswith("of a test")]


def test_threads_fill_one_at_once() -> None:
    cache: Bounded[int, int] = Bounded("squares", 8)

    def fill(start: int) -> None:
        for i in range(2000):
            key = (start + i) % 50
            assert cache.get_or_make(key, partial(mul, key, key)) == key * key

    run_threads(fill, range(0, 42, 7))
    assert len(cache) <= 8


def test_what_is_held_anew_is_the_newest() -> None:
    now = [0.0]
    until: Until[str] = Until("beliefs of a test", 2, lambda: now[0])
    until.hold("a", 5.0)
    until.hold("b", 5.0, False)
    until.hold("a", 9.0, "damaged")
    until.hold("c", 5.0)
    assert [until.held(key) for key in "abc"] == ["damaged", None, True]
    now[0] = 6.0
    assert [until.holds(key) for key in "abc"] == [True, False, False]
