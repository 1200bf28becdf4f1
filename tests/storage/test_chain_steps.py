# SPDX-License-Identifier: Apache-2.0
"""What a change of a long chain costs, in steps, and the circles that a short walk has to find."""

from __future__ import annotations

import random

import pytest

from portakv.storage.eviction import FIRST, Chains


class CountedMark:
    """A mark that counts the look-ups of all marks in mappings, which are the steps of a walk."""

    steps = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        CountedMark.steps += 1
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CountedMark) and other.number == self.number


def order_of_writes(kind: str, many: int) -> list[int]:
    """Return the order in which the writes of a chain end."""
    numbers = [*range(many)]
    if kind == "in order":
        return numbers
    if kind == "backwards":
        return numbers[::-1]
    if kind == "each second one first":
        return [*numbers[1::2], *numbers[::2]]
    if kind == "the first one last":
        return [*numbers[1:], 0]
    if kind == "by four workers":
        draw = random.Random(4)
        return sorted(numbers, key=lambda number: number + draw.randrange(4))
    return random.Random(5).sample(numbers, many)


ORDERS = (
    "in order",
    "backwards",
    "each second one first",
    "the first one last",
    "by four workers",
    "in any order",
)


@pytest.mark.parametrize("kind", ORDERS)
def test_a_block_of_a_long_chain_costs_as_much_as_one_of_a_short_chain(kind: str) -> None:
    """A tier expects each block before it adds it, and blocks come in any order."""
    many = 4000
    marks = [CountedMark(number) for number in range(many)]
    follows = [FIRST, *marks[:-1]]
    chains = Chains[int]()
    CountedMark.steps = 0
    for number in range(many):
        chains.expect(follows[number])
    for number in order_of_writes(kind, many):
        chains.unexpect(follows[number])
        chains.add(number, marks[number], follows[number], "a")
    assert CountedMark.steps < 40 * many, "walks to the first block take millions of steps"

    CountedMark.steps = 0
    gone = []
    while (key := chains.next()) is not None:
        chains.remove(key)
        gone.append(key)
    assert gone == [*range(many)][::-1]
    assert CountedMark.steps < 40 * many


def test_a_walk_passes_no_block_that_is_gone() -> None:
    """A circle is found also if it is closed after a removal, in a chain that was walked before."""
    chains = Chains[int]()
    for number in (0, 1, 2, 3, 5, 4):  # 4 leads to 5, so that a walk begins at 3
        chains.add(number, number + 10, number + 9 if number else FIRST, "a")
    chains.remove(1)  # it is damaged; 2 and all after it stay
    chains.add(1, 11, 13, "a")  # it would follow 3, which follows 2, which follows it
    gone = []
    while (key := chains.next()) is not None:
        chains.remove(key)
        gone.append(key)
    assert gone == [0, 5, 4, 3, 2, 1]
