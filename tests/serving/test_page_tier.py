# SPDX-License-Identifier: Apache-2.0
"""The tier below an engine's own tier of host memory, and faults of its disk."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.store_damage import cut_files, damaged_images_believed, flip_bits, swap_images
from support.waits import LIMIT, until

from portakv.serving import PageJob, PageStore, StoreTerms
from portakv.serving.bucket import MISSING
from portakv.serving.pages import FAILED, PACE, PENDING, Pages, PageTier

SIZE = 8192
SLOTS = 24


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """A tier over memory of an engine, and what each slot should hold."""

    def __init__(self, folder: Path, capacity: int = 64 << 20, reports: bool = False) -> None:
        terms = StoreTerms(str(folder), capacity, host=0, staging=2 << 20)
        self.clock = Clock()
        self.store = PageStore(terms, "m", [SIZE])
        self.memory = np.zeros((SLOTS, SIZE), np.uint8)
        self.tier = PageTier(
            self.store,
            self.store.pages(SIZE),
            self.memory.data,
            chain_of=lambda key: key[-1:],
            reports=reports,
            now=self.clock,
        )
        self.number = 0

    def save(self, names: list[int], request: str = "r") -> list[bool]:
        """Save pages, and return which are stored."""
        slots = range(len(names))
        for slot, name in zip(slots, names, strict=True):
            self.memory[slot] = page(name)
        return self._ended(lambda keys: self.tier.save(self.number, keys, slots, request), names)

    def load(self, names: list[int]) -> list[bool]:
        """Load pages, and return which landed; each of those has its bytes, no other is written."""
        self.memory[:] = 7
        landed = self._ended(
            lambda keys: self.tier.load(self.number, keys, range(len(keys))), names
        )
        for slot, name in enumerate(names):
            expected = page(name) if landed[slot] else np.full(SIZE, 7, np.uint8)
            assert (self.memory[slot] == expected).all(), f"page {name}, landed: {landed[slot]}"
        return landed

    def _ended(self, begin: Callable[[list[bytes]], None], names: list[int]) -> list[bool]:
        self.number += 1
        begin([key(name) for name in names])
        assert self.tier.busy
        jobs = list[PageJob]()

        def ended() -> bool:
            jobs.extend(self.tier.ended())
            return bool(jobs)

        assert until(ended, LIMIT)
        assert [job.tag for job in jobs] == [self.number]
        assert not self.tier.busy
        landed: list[bool] = jobs[0].landed.tolist()
        return landed


def key(name: int) -> bytes:
    return name.to_bytes(35, "big") + b"\0"


def page(name: int) -> np.ndarray:
    return np.random.default_rng(name).integers(0, 256, SIZE, np.uint8)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path / "kv")
    yield made
    made.tier.close()


def test_pages_come_back(scene: Scene) -> None:
    names = [*range(10)]
    assert not scene.tier.has(key(3))
    assert all(scene.save(names))
    assert all(scene.tier.has(key(name)) for name in names)
    assert all(scene.load([*reversed(names)]))
    assert scene.load([3, 99, 5]) == [True, False, True]
    assert scene.tier.counts == {"loaded": 12, "load_failed": 1, "stored": 10, "store_failed": 0}


def test_a_page_that_did_not_land_is_not_offered_for_a_while(scene: Scene) -> None:
    """An engine that asks again would get the same answer, and no further."""
    scene.save([1, 2])
    pages = scene.store.pages(SIZE)
    real = pages.load
    pages.load = lambda *args, **terms: real(*args, **{**terms, "deadline": 0.0})  # type: ignore
    assert scene.load([1]) == [False]
    pages.load = real  # type: ignore[method-assign]
    assert pages.has(key(1))
    assert not scene.tier.has(key(1))
    assert scene.tier.has(key(2))
    scene.clock.now += FAILED + 1
    assert scene.tier.has(key(1))
    assert scene.load([1]) == [True]


def test_a_page_that_is_saved_again_is_offered_again(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "kv")
    scene.save([1, 2])
    flip_bits(tmp_path / "kv", random.Random(0), 4000)
    assert scene.load([1, 2]) == [False, False]
    assert not scene.tier.has(key(1))
    assert scene.save([1]) == [True]
    assert scene.tier.has(key(1))
    assert scene.load([1]) == [True]
    scene.tier.close()


def test_the_end_of_a_prompt_is_evicted_before_its_beginning(tmp_path: Path) -> None:
    image = 3 * 4096
    scene = Scene(tmp_path / "kv", 8 * image)
    for first in range(0, 6, 2):  # one prompt, in three jobs
        assert all(scene.save([first, first + 1], "long"))
    assert all(scene.save([100, 101], "other"))
    assert all(scene.save([200, 201], "third"))
    there = [scene.tier.has(key(name)) for name in range(6)]
    assert there == sorted(there, reverse=True)
    assert there[0]
    assert not there[5]
    scene.tier.forget("long")
    scene.tier.close()


def test_uses_are_recorded_once_in_a_while(tmp_path: Path) -> None:
    """Pages that the engine has itself stay on the disk as long as they are used."""
    image = 3 * 4096
    for touches in (True, False):
        scene = Scene(tmp_path / f"kv {touches}", 8 * image)
        for name in range(8):
            assert scene.save([name], f"request {name}") == [True]
        if touches:
            scene.tier.touch([key(0), key(1)])
            scene.tier.step()  # not yet
            scene.clock.now += PACE + 1
            scene.tier.step()
            scene.tier.drain()
        for name in range(100, 104):
            assert scene.save([name], f"request {name}") == [True]
        assert [scene.tier.has(key(name)) for name in range(2)] == [touches] * 2
        scene.tier.close()


def test_a_job_that_is_refused_ends_without_a_page(scene: Scene) -> None:
    scene.tier.load(1, [key(1), key(1)], [0, 1])
    scene.tier.save(2, [key(1)], [SLOTS], "r")
    scene.tier.drain()
    jobs = scene.tier.ended()
    assert [job.tag for job in jobs] == [1, 2]
    assert not any(job.landed.any() for job in jobs)


class Raising:
    """Pages of which none can be loaded, for a reason that nobody expects."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pages, name)

    def load(self, *_: object, **__: object) -> PageJob:
        raise ValueError("of no kind that is expected")


def test_an_error_of_any_kind_ends_its_job(scene: Scene) -> None:
    """The engine waits for each job before it resets its cache."""
    pages: Any = Raising(scene.store.pages(SIZE))
    tier = PageTier(scene.store, pages, scene.memory.data, chain_of=lambda key: key[-1:])
    tier.load(1, [key(1)], [0])
    tier.drain()
    (job,) = tier.ended()
    assert job.tag == 1
    assert not job.landed.any()
    assert not tier.busy
    tier.close()


def test_jobs_after_the_close_end_without_a_page(scene: Scene) -> None:
    """The engine waits for the end of each job, and may drain them."""
    scene.save([1])
    scene.tier.close()
    scene.memory[:] = 7
    scene.tier.load(10, [key(1)], [0])
    scene.tier.save(11, [key(2)], [1], "r")
    scene.tier.touch([key(1)])
    scene.tier.step()
    assert scene.tier.busy
    drained = threading.Thread(target=scene.tier.drain, daemon=True)
    drained.start()
    drained.join(LIMIT)
    assert not drained.is_alive()
    jobs = scene.tier.ended()
    assert [job.tag for job in jobs] == [10, 11]
    assert not any(job.landed.any() for job in jobs)
    assert scene.tier.ended() == []
    assert not scene.tier.busy
    assert (scene.memory == 7).all()


@pytest.mark.parametrize("end", [PageTier.drain, PageTier.close], ids=["drain", "close"])
def test_jobs_are_reported_once_after(end: Callable[[PageTier], None], scene: Scene) -> None:
    scene.memory[:] = 1
    for number in range(8):
        scene.tier.save(number, [key(number)], [number], "r")
    end(scene.tier)
    assert {job.tag for job in scene.tier.ended()} == {*range(8)}
    assert scene.tier.ended() == []
    assert not scene.tier.busy


def test_a_job_whose_begin_outlives_the_close_is_reported_after_its_begin(scene: Scene) -> None:
    """Until then the memory of the job may be written."""
    pages = scene.store.pages(SIZE)
    real = pages.load
    goes_on = threading.Event()

    def slow(*args: Any, **terms: Any) -> PageJob:
        assert goes_on.wait(LIMIT)
        return real(*args, **terms)

    pages.load = slow  # type: ignore[method-assign]
    scene.tier.load(1, [key(1)], [0])
    scene.tier.load(2, [key(2)], [1])
    scene.tier.close(timeout=0.1)
    assert scene.tier.ended() == []
    assert scene.tier.busy
    goes_on.set()
    scene.tier.drain()
    jobs = scene.tier.ended()
    assert [job.tag for job in jobs] == [1, 2]
    assert not any(job.landed.any() for job in jobs)
    assert not scene.tier.busy


def test_events_tell_of_stored_and_lost_pages(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "kv", 4 * 3 * 4096, reports=True)
    scene.save([1, 2, 3], "one")
    assert scene.tier.events() == ([key(1), key(2), key(3)], [])
    scene.save([4, 5], "two")
    stored, lost = scene.tier.events()
    assert stored == [key(4), key(5)]
    assert lost == [key(3)]
    assert scene.tier.events() == ([], [])
    scene.tier.close()


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_faults_of_the_disk_bring_no_wrong_bytes(guard: bool, tmp_path: Path) -> None:
    """Bits are flipped, images swapped, files cut, in turns; pages are saved again in between."""
    believed = nullcontext() if guard else damaged_images_believed()
    scene = Scene(tmp_path / "kv")
    draw = random.Random(1)
    names = [*range(16)]
    image = scene.store.pages(SIZE).form.image_bytes
    faults = [
        lambda: flip_bits(tmp_path / "kv", draw, 3),
        lambda: swap_images(tmp_path / "kv", draw, image),
        lambda: cut_files(tmp_path / "kv", draw.randrange(1, 16) * image),
    ]
    wrong = missed = right = 0
    with believed:
        for turn in range(30):
            scene.save(names)
            faults[turn % 3]()
            try:
                landed = scene.load(names)
            except AssertionError:
                wrong += 1
                continue
            missed += landed.count(False)
            right += landed.count(True)
    scene.tier.close()
    assert (wrong == 0) is guard
    if guard:
        assert missed > 30
        assert right > 30


def test_a_lookup_without_an_end_is_a_miss_after_a_while(tmp_path: Path) -> None:
    """Such as one whose worker is gone: `step`, which begins it, is not called."""
    (tmp_path / "bucket").mkdir(mode=0o700)
    terms = StoreTerms(host=1 << 20, staging=2 << 20, bucket=f"file://{tmp_path / 'bucket'}")
    store = PageStore(terms, "m", [SIZE])
    clock = Clock()
    memory = np.zeros((1, SIZE), np.uint8)
    tier = PageTier(store, store.pages(SIZE), memory, now=clock)
    assert tier.look(key(0), "r") is None
    clock.now += PENDING - 1.0
    assert tier.look(key(0), "r") is None
    clock.now += 1.0
    assert tier.look(key(0), "r") is False
    assert tier.look(key(0), "r") is False
    clock.now += MISSING
    assert tier.look(key(0), "r") is None  # it is looked up again
    tier.close()


def test_a_bucket_is_asked_and_no_scheduler_waits(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir(mode=0o700)
    terms = StoreTerms(host=1 << 20, staging=2 << 20, bucket=f"file://{tmp_path / 'bucket'}")
    keys = [key(name) for name in range(6)]
    memory = np.stack([page(name) for name in range(8)])
    with PageStore(terms, "m", [SIZE]) as store:
        pages = store.pages(SIZE)
        assert pages.save(keys[:4], pages.over(memory), range(4)).wait(LIMIT)
    store = PageStore(terms, "m", [SIZE])
    clock = Clock()
    tier = PageTier(store, store.pages(SIZE), memory, now=clock)
    assert [tier.look(each, "r") for each in keys] == [None] * 6
    tier.step()
    assert until(lambda: None not in [tier.look(each, "r") for each in keys], LIMIT)
    assert [tier.look(each, "r") for each in keys] == [True] * 4 + [False] * 2
    memory[:] = 0
    tier.load(1, keys[:4], range(4))
    tier.drain()
    (job,) = tier.ended()
    assert job.landed.all()
    assert (memory[:4] == np.stack([page(name) for name in range(4)])).all()
    clock.now += 60.0
    assert tier.look(keys[5], "r") is None  # it may be there by now
    tier.close()
