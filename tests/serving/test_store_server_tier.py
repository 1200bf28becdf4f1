# SPDX-License-Identifier: Apache-2.0
"""The tier below an engine's host memory in a store that several engines of a host share.

A test of a fault asks that each page that lands has its bytes, and its control that pages have
other bytes without the guard.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ready
from support.faulty_io import VARIABLE, set_fault
from support.stopping import go_on, stop
from support.store_damage import any_images_believed, flip_bits, swap_images
from support.waits import LIMIT, until

from portakv.serving import PageJob, StoreTerms
from portakv.serving.pages import PageSize, PageStore, PageTier
from portakv.serving.server.client import Known, missed
from portakv.serving.server.messages import KeysPage
from portakv.storage.image import HEADER

SIZE = 8192
SLOTS = 24
NAMES = [*range(1, 13)]


class Engine:
    """A tier over memory of an engine."""

    def __init__(self, folder: Path, **more: Any) -> None:
        terms = {"capacity": 4 << 20, "host": 0, "staging": 2 << 20, **more}
        made = StoreTerms(str(folder), shared=True, **terms)
        self.store = PageStore(made, "model", [PageSize(SIZE)], identity="identity")
        self.memory = np.zeros((SLOTS, SIZE), np.uint8)
        pages = self.store.pages(SIZE)
        self.tier = PageTier(self.store, pages, self.memory.data, reports=True)
        self.number = 0

    def save(self, names: list[int]) -> list[bool]:
        """Save pages; return which are stored."""
        for slot, name in enumerate(names):
            self.memory[slot] = page(name)
        self.number += 1
        self.tier.save(self.number, [*map(key, names)], range(len(names)), "request")
        return self._landed()

    def load(self, names: list[int]) -> list[bool]:
        """Load pages; return which landed. No other page is written."""
        self.memory[:] = 7
        self.number += 1
        self.tier.load(self.number, [*map(key, names)], range(len(names)))
        landed = self._landed()
        for slot, there in enumerate(landed):
            assert there or (self.memory[slot] == 7).all()
        return landed

    def right(self, names: list[int]) -> int:
        """Load pages, each of which is right or missing; return how many landed."""
        landed = self.load(names)
        assert self.wrong(names, landed) == 0
        return sum(landed)

    def wrong(self, names: list[int], landed: list[bool]) -> int:
        """Return how many pages landed with other bytes."""
        pairs = zip(names, landed, strict=True)
        return sum(
            there and not (self.memory[slot] == page(name)).all()
            for slot, (name, there) in enumerate(pairs)
        )

    def _landed(self) -> list[bool]:
        jobs = list[PageJob]()

        def ended() -> bool:
            jobs.extend(self.tier.ended())
            return bool(jobs)

        assert until(ended, LIMIT)
        assert [job.tag for job in jobs] == [self.number]
        landed: list[bool] = jobs[0].landed.tolist()
        return landed

    def has_all(self) -> bool:
        return all(self.tier.has(key(name)) for name in NAMES)


def key(name: int) -> bytes:
    return name.to_bytes(36, "big")


def page(name: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(name).integers(0, 256, SIZE, np.uint8)


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def opened(folder: Path, closing: ExitStack, **more: Any) -> Engine:
    made = Engine(folder, **more)
    closing.callback(made.tier.close)
    return made


def test_what_one_engine_has_stored_the_other_loads(tmp_path: Path, closing: ExitStack) -> None:
    """Both have the events of evictions."""
    one = opened(tmp_path / "kv", closing, capacity=32 * (SIZE + HEADER))
    other = opened(tmp_path / "kv", closing, capacity=32 * (SIZE + HEADER))
    assert all(one.save(NAMES))
    assert one.tier.events().stored == [*map(key, NAMES)]
    assert until(other.has_all, LIMIT)
    assert other.right(NAMES) == len(NAMES)
    assert other.load([99]) == [False]
    usage = other.store.usage()
    assert usage.used >= len(NAMES) * SIZE
    assert usage.capacity == 32 * (SIZE + HEADER)

    lost = list[bytes]()

    def evicted() -> bool:
        other.save([100 + len(lost) + at for at in range(SLOTS)])
        lost.extend(one.tier.events().lost)
        return bool(lost)

    assert until(evicted, LIMIT)
    assert {*lost} <= {*map(key, NAMES)}


def test_losses_between_two_store_servers_are_reported() -> None:
    """What the server before had, and the next one lacks, was lost meanwhile."""
    one = b"1" * 32
    two = b"2" * 32
    before = Known()
    before.add_page(KeysPage(0, "0 disk", (one, two)))
    after = Known()
    after.add_page(KeysPage(0, "0 disk", (two,)))
    (change,) = missed([before], [after])
    assert change.key == one
    assert not change.stored
    assert missed([], [after]) == []


SERVER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from serving.test_store_server_tier import NAMES, Engine

engine = Engine(Path({folder!r}))
assert all(engine.save(NAMES[:4]))
print("stored", flush=True)
while True:
    engine.save(NAMES)
    engine.load(NAMES)
"""


def serving(folder: Path, closing: ExitStack) -> ready.Python:
    """Return a process that serves a folder, and saves and loads in it."""
    code = SERVER.format(tests=str(Path(__file__).parents[1]), folder=str(folder))
    process = ready.Python("-c", textwrap.dedent(code), stdout=subprocess.PIPE)
    closing.enter_context(process)
    closing.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.readline() == b"stored\n"
    return process


@pytest.mark.full
def test_kill_9_of_the_process_that_serves(tmp_path: Path, closing: ExitStack) -> None:
    """Jobs in flight end, pages are right or missing, and the other process serves then."""
    process = serving(tmp_path / "kv", closing)
    other = opened(tmp_path / "kv", closing)
    assert until(lambda: other.right(NAMES[:4]) == 4, LIMIT)
    for number in range(20):
        other.tier.load(f"load {number}", [*map(key, NAMES)], range(len(NAMES)))
    os.kill(process.pid, signal.SIGKILL)
    other.tier.drain()
    ended = other.tier.ended()
    assert len(ended) == 20
    assert not other.tier.busy
    assert until(lambda: all(other.save([*NAMES, 50])), LIMIT)
    assert other.right([*NAMES, 50]) == len(NAMES) + 1


@pytest.mark.full
def test_a_process_that_serves_and_hangs_costs_misses(tmp_path: Path, closing: ExitStack) -> None:
    """A call of the engine waits for nothing, and its jobs end."""
    process = serving(tmp_path / "kv", closing)
    other = opened(tmp_path / "kv", closing, deadline=1.0)
    assert until(lambda: other.right(NAMES[:4]) == 4, LIMIT)
    stop(process.pid)
    try:
        assert other.load(NAMES[:4]) == [False] * 4
        assert other.load(NAMES[:4]) == [False] * 4
    finally:
        go_on(process.pid)
    assert until(lambda: all(other.save(NAMES)), LIMIT)
    assert other.right(NAMES) == len(NAMES)


def test_a_job_that_the_store_server_does_not_end_is_cancelled(
    tmp_path: Path, closing: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save whose disk hangs ends after its deadline, and no page of it counts."""
    fault = tmp_path / "fault"
    set_fault(fault, "write hang")
    monkeypatch.setenv(VARIABLE, str(fault))
    monkeypatch.setenv("PORTAKV_IO", "support.faulty_io:Faulty")
    engine = opened(tmp_path / "kv", closing)
    closing.callback(set_fault, fault, "")
    pages = engine.store.pages(SIZE)
    job = pages.save([key(1)], engine.tier.view, [0], deadline=0.05)
    assert until(job.done, LIMIT)
    assert not job.landed.any()


def test_the_store_server_ends_a_load_from_a_disk_that_hangs(
    tmp_path: Path, closing: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so itself, although no one asks for jobs that are late, and all workers hang."""
    fault = tmp_path / "fault"
    set_fault(fault, "")
    monkeypatch.setenv(VARIABLE, str(fault))
    monkeypatch.setenv("PORTAKV_IO", "support.faulty_io:Faulty")
    engine = opened(tmp_path / "kv", closing)
    closing.callback(set_fault, fault, "")
    assert all(engine.save(NAMES))
    assert until(engine.has_all, LIMIT)
    set_fault(fault, "read hang")
    pages = engine.store.pages(SIZE)
    view = engine.tier.view
    jobs = [pages.load([key(name)], view, [name], deadline=0.3) for name in NAMES]
    assert until(lambda: all(job.ended for job in jobs), LIMIT)
    assert not any(job.landed.any() for job in jobs)


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_damaged_pages_are_missing(guard: bool, tmp_path: Path, closing: ExitStack) -> None:
    one = opened(tmp_path / "kv", closing)
    other = opened(tmp_path / "kv", closing)
    assert all(one.save(NAMES))
    assert until(other.has_all, LIMIT)
    draw = random.Random(1)
    flip_bits(tmp_path / "kv", draw, 200)
    swap_images(tmp_path / "kv", draw, SIZE + HEADER)
    with nullcontext() if guard else any_images_believed():
        landed = other.load(NAMES)
    assert (other.wrong(NAMES, landed) == 0) is guard
    assert all(landed) is not guard
