# SPDX-License-Identifier: Apache-2.0
"""The pages that an engine counts, and lookups that it does not fetch."""

from __future__ import annotations

from portakv.serving.page_counts import Counted, Lookups


def test_pages_are_counted_once() -> None:
    counted = Counted[str]()
    assert counted.add(["a", "b", "c"], [b"a", b"b", b"c"], [1, 0, 3]) == (["a", "c"], [1, 3])
    assert counted.add(["a", "b"], [b"a", b"b"], [1, 2]) == (["b"], [2])
    assert len(counted) == 3
    assert counted.remove([b"b", b"x"]) == [("b", 2), None]
    assert counted.remove([b"b"]) == [None]
    assert len(counted) == 2


def test_an_answer_is_fetched_once() -> None:
    lookups = Lookups[str]()
    assert lookups.add(1, "one", [b"a"]) == ()
    assert lookups.fetch(1) == "one"
    assert lookups.fetch(1) is None


def test_the_locks_of_the_oldest_answer_end() -> None:
    lookups = Lookups[str](most=2)
    assert lookups.add(1, "one", [b"a"]) == ()
    assert lookups.add(2, "two", [b"b"]) == ()
    assert lookups.add(3, "three", [b"c"]) == [b"a"]
    assert [lookups.fetch(number) for number in (1, 2, 3)] == [None, "two", "three"]
