# SPDX-License-Identifier: Apache-2.0
"""Processes that save are killed at random while folders grow, evict, and take space from each
other. What a later store finds is whole, right and a beginning of its chain, below the bound.

`pytest -m slow -k kills` kills 200 for each engine.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import slot_cases as cases
from support.slot_cases import LARGE
from support.storage_cases import key_of

from portakv.storage import BlockForm, Disk, image
from portakv.storage.eviction import FIRST, mark_of
from portakv.storage.io.base import Ended, Request
from portakv.storage.tiers.disk import DiskStore

FORMS = [replace(LARGE, model=f"model {number}") for number in range(3)]
ROOM = 24 * LARGE.image_bytes
CHAINS = [[key_of(100 * chain + number) for number in range(1, 13)] for chain in range(8)]


def opened(folder: Path, forms: list[BlockForm], io: Any) -> list[DiskStore]:
    """Return the stores of a tier, in a folder in which earlier processes were killed."""
    return cases.all_reopened(Disk(folder, capacity=ROOM, io=io), forms)


def writer(
    folder: Path,
    forms: list[BlockForm],
    io: Any,
    spoil: Callable[[DiskStore, int], None] = lambda store, ready: None,
    least: int = 1,
) -> Callable[[int], None]:
    """Save the next blocks of chains of own forms in a child until it is killed.

    ``spoil`` changes a store of the child, which then breaks a promise. ``least``: blocks of a
    call, unless the chain ends before.
    """

    def work(ready: int) -> None:
        draw = random.Random(os.getpid())
        stores = opened(folder, forms, io)
        for store in stores:
            spoil(store, ready)
        first = max(store.generation for store in stores)
        for generation in range(first + 1, 10**6):
            chain = draw.choice(CHAINS)
            store = draw.choice(stores)
            form = store.form
            there = store.has(chain).index(False) if not all(store.has(chain)) else 0
            keys = chain[there : there + draw.randint(least, 6)]
            marks = [mark_of(chain[there - 1]) if there else FIRST, *map(mark_of, keys)]
            rows = cases.images(len(keys), form)
            sums = []
            for row, key, mark in zip(rows, keys, marks, strict=False):
                row[image.HEADER : image.HEADER + form.payload_bytes] = cases.payload(form, key)
                sums.append(image.seal(row, form, key, generation, mark))
            own = {key: number for number, key in enumerate(chain)}
            store.write(store.queue(keys[0]), keys, [*rows], [generation] * len(keys), sums, own)
            os.write(ready, b"x")

    return work


def check(folder: Path, form: BlockForm, io: str) -> int:
    """Return how many blocks a form has, each of which is right."""
    (store,) = opened(folder, [form], io)
    try:
        stored = []
        for chain in CHAINS:
            there = store.has(chain)
            assert there == sorted(there, reverse=True), "a block without its predecessor"
            stored += [key for key, is_there in zip(chain, there, strict=True) if is_there]
        rows = cases.images(max(len(stored), 1), form)
        landed = store.read(stored, [*rows][: len(stored)])
        assert landed == [True] * len(stored), "a block with wrong bytes"
        assert all(cases.holds(row, form, key) for row, key in zip(rows, stored, strict=False))
        return len(stored)
    finally:
        store.close()


@pytest.mark.parametrize("io", ["ring", "threads"])
@pytest.mark.parametrize(
    "kills", [4, pytest.param(200, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_kills_at_random(tmp_path: Path, io: str, kills: int) -> None:
    total = 0
    for number in range(kills):
        form = FORMS[number * 7 // 4 % 3]
        cases.kill_writer(writer(tmp_path, [form], io), 0.05)
        total += check(tmp_path, form, io)
        if number % 8 == 7:
            for each in FORMS:
                check(tmp_path, each, io)
        assert sum(path.stat().st_size for path in tmp_path.glob("*/slots")) <= ROOM
    assert total >= 2 * kills


@pytest.mark.parametrize("io", ["ring", "threads"])
@pytest.mark.parametrize(
    "kills", [4, pytest.param(200, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_kills_of_a_process_that_saves_several_forms(tmp_path: Path, io: str, kills: int) -> None:
    """Its forms take slots from each other."""
    total = 0
    for number in range(kills):
        forms = FORMS[number % 3 :] + FORMS[: number % 3]
        cases.kill_writer(writer(tmp_path, forms, io), 0.1)
        total += sum(check(tmp_path, form, io) for form in FORMS)
        assert sum(path.stat().st_size for path in tmp_path.glob("*/slots")) <= ROOM
    assert total >= 2 * kills


class Hasty:
    """An engine that reports the end of a write after the first page of its bytes."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def run(self, requests: Sequence[Request], ended: Ended | None = None) -> list[int]:
        begun = [each._replace(nbytes=image.HEADER) if each.write else each for each in requests]
        results = self.engine.run(begun, ended)
        return [each.nbytes if each.write else n for each, n in zip(requests, results, strict=True)]

    def close(self) -> None:
        self.engine.close()


def record_early(store: Any, _: int) -> None:
    """Record blocks before all of their bytes are written."""
    store.engine = Hasty(store.engine)


def record_backwards(store: DiskStore, ready: int) -> None:
    """Record the last block of a call first, and wait there for the kill."""
    slots: Any = store.parts[0]
    write = store.write
    seal = slots.seal

    def saved(*call: Any) -> list[bool]:
        blocks: list[Any] = []

        def later(*block: Any) -> bool:
            blocks.append(block)
            return True

        slots.seal = later
        landed = write(*call)
        slots.seal = seal
        seal(*blocks.pop())
        if blocks:
            os.write(ready, b"x")
            signal.pause()
        return landed

    store.write = saved  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("io", ["ring", "threads"])
@pytest.mark.parametrize(
    ("spoil", "damage"),
    [
        (record_early, "a block with wrong bytes"),
        (record_backwards, "a block without its predecessor"),
    ],
)
def test_kills_of_a_wrong_writer_are_noticed(
    tmp_path: Path, io: str, spoil: Callable[[DiskStore, int], None], damage: str
) -> None:
    """The negative control: records that come too early, or in the wrong order."""
    work = writer(tmp_path, FORMS[:1], io, spoil, least=2)
    cases.kill_writer(work, 0.0)
    with pytest.raises(AssertionError, match=damage):
        check(tmp_path, FORMS[0], io)
