# SPDX-License-Identifier: Apache-2.0
"""Blocks that `Chains` takes together."""

from __future__ import annotations

import random
from functools import partial

import pytest
from support.storage_cases import key_of

from portakv.storage.eviction import FIRST, UNKNOWN, Chains, mark_of, marks_of


def evict_all(chains: Chains[bytes]) -> list[bytes]:
    """Remove the block that goes next until none can go; return the keys in this order."""
    gone = list[bytes]()
    while (key := chains.next()) is not None:
        chains.remove(key)
        gone.append(key)
    return gone


def note(changes: list[tuple[bytes, bool]], key: bytes, stored: bool, why: str) -> None:
    """Note a change."""
    changes.append((key, stored))


@pytest.mark.parametrize("seed", range(20))
def test_blocks_that_are_added_together_go_as_if_one_after_the_other(seed: int) -> None:
    random_ = random.Random(seed)
    together = Chains[bytes]()
    single = Chains[bytes]()
    changes: list[list[tuple[bytes, bool]]] = [[], []]
    for chains, changed in zip((together, single), changes, strict=True):
        chains.changed = partial(note, changed)
    numbers = random_.sample(range(40), 40)
    for first in range(0, 40, 8):
        keys = [key_of(number) for number in numbers[first : first + 8]]
        marks = [mark_of(key) for key in keys]
        named = [UNKNOWN, FIRST, *(mark_of(key_of(number)) for number in range(40))]
        follows = random_.choices(named, k=8)
        group = random_.choice("ab")
        together.add_all(keys, marks, follows, group)
        for key, mark, before in zip(keys, marks, follows, strict=True):
            single.add(key, mark, before, group)
        assert together.by_use() == single.by_use()
        assert together.next("a") == single.next("a")
        for chains in (together, single):
            if (last := chains.next()) is not None:
                chains.remove(last)
    assert changes[0] == changes[1]
    assert evict_all(together) == evict_all(single)


def test_marks_of_many_keys_are_those_of_each() -> None:
    keys = [key_of(number) for number in range(100)]
    assert marks_of(keys) == [mark_of(key) for key in keys]
    assert marks_of([]) == []
