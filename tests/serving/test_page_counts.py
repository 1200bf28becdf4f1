# SPDX-License-Identifier: Apache-2.0
"""The pages that an engine counts, and lookups that it does not fetch."""

from __future__ import annotations

import pytest

from portakv.serving.pages import Counted, Lookups


def test_pages_are_counted_once() -> None:
    counted = Counted[str]()
    assert counted.add(["a", "b", "c"], [b"a", b"b", b"c"], [1, 0, 3]) == (["a", "c"], [1, 3])
    assert counted.add(["a", "b"], [b"a", b"b"], [1, 2]) == (["b"], [2])
    assert len(counted) == 3
    assert counted.remove([b"b", b"x"]) == [("b", 2), None]
    assert counted.remove([b"b"]) == [None]
    assert len(counted) == 2


def nothing(keys: int) -> str:
    return f"none of {keys}"


def test_an_answer_is_fetched_once() -> None:
    lookups = Lookups[str](nothing)
    assert lookups.add(1, "one", 1, [b"a"]) == ()
    assert lookups.fetch(1) == "one"
    assert lookups.fetch(1) is None


def test_the_oldest_answer_finds_nothing_and_its_locks_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lookups = Lookups[str](nothing, most=2)
    assert lookups.add(1, "one", 3, [b"a"]) == ()
    assert lookups.add(2, "two", 1, [b"b"]) == ()
    assert not caplog.records
    assert lookups.add(3, "three", 1, [b"c"]) == [b"a"]
    assert lookups.add(4, "four", 1, []) == [b"b"]
    assert len(caplog.records) == 1
    assert "A lookup of 3 pages finds none" in caplog.text
    answers = [lookups.fetch(number) for number in (1, 2, 3, 4)]
    assert answers == ["none of 3", "none of 1", "three", "four"]
    assert [lookups.fetch(number) for number in (1, 2, 3, 4, 5)] == [None] * 5
