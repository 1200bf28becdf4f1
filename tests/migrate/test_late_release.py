# SPDX-License-Identifier: Apache-2.0
"""Memory whose release waits for a device stays while a step may wait for this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from support.migrate_pulls import Couple, Sides, sides
from support.waits import LIMIT

from portakv.copy.layer_words import LayerWords
from portakv.host import _registration
from portakv.migrate import shared_memory
from portakv.runtime import late_release
from portakv.runtime.devices import this_process

CPU = torch.device("cpu")


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


def mappings() -> int:
    """Return the number of mappings of memory that this process shares, as an owner or a reader."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("/memfd:portakv")


@pytest.mark.parametrize("end", ["end_waits", "rest", "close"])
def test_memory_of_an_owner_that_is_gone(made: Sides, end: str) -> None:
    both = Couple(made)
    both.pull(both.offer()).synchronize(LIMIT)
    before = mappings()
    words = LayerWords(CPU, 1)
    words.begin()
    both.reader.close()
    held = mappings()
    getattr(words, end)()
    assert mappings() < held <= before


def test_memory_that_is_not_what_its_owner_says(
    made: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that finds this out has mapped it."""
    known = shared_memory.proof
    monkeypatch.setattr(
        "portakv.migrate.described.proof", lambda _, device: known(bytes(16), device)
    )
    both = Couple(made)
    offer = both.offer()
    before = mappings()
    words = LayerWords(CPU, 1)
    words.begin()
    both.pull(offer).synchronize(LIMIT)  # by staging
    held = mappings()
    words.end_waits()
    assert before <= mappings() < held


def test_memory_of_an_owner_without_a_step(made: Sides) -> None:
    both = Couple(made)
    both.pull(both.offer()).synchronize(LIMIT)
    before = mappings()
    both.reader.close()
    assert mappings() < before


def test_words_that_are_dropped_hold_nothing() -> None:
    words = LayerWords(CPU, 1)
    words.begin()
    assert late_release.is_held()
    released = list[int]()
    late_release.release(partial(released.append, 1))
    assert not released
    del words
    gc.collect()
    assert not late_release.is_held()
    assert released == [1]


def test_a_step_that_begins_while_memory_is_unmapped() -> None:
    """The next memory waits for the end of that step."""
    words = [LayerWords(CPU, 1) for _ in range(2)]
    words[0].begin()
    released = list[int]()

    def first() -> None:
        released.append(1)
        words[1].begin()

    late_release.release(first)
    late_release.release(partial(released.append, 2))
    words[0].end_waits()
    assert released == [1]
    words[1].end_waits()
    assert released == [1, 2]


def test_two_steps_at_a_time() -> None:
    words = [LayerWords(CPU, 1) for _ in range(2)]
    for each in words:
        each.begin()
    words[0].end_waits()
    assert late_release.is_held()
    words[1].end_waits()
    assert not late_release.is_held()


class Registered(_registration.Registration):
    """A registration of no memory; ``undone``: the driver has ended it."""

    def __init__(self) -> None:
        self.registered = [1]
        self.pieces = []
        self.undone = False
        self._process = this_process()

    def _unregister(self) -> None:
        self.undone = True


def test_registered_memory_that_is_dropped() -> None:
    registration = Registered()
    words = LayerWords(CPU, 1)
    words.begin()
    registration.undo()
    assert not registration.undone
    words.end_waits()
    assert registration.undone
