# SPDX-License-Identifier: Apache-2.0
"""Calls with many blocks are planned in slices, between which others may take the graph's lock."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.core_cases import noise
from support.interrupts import settles
from support.storage_cases import FakeStore, FakeTier, counts_of, key_of, rows_in_use, small_form
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import StoreError
from portakv.runtime.interrupts import abandoned
from portakv.storage import BlockStore
from portakv.storage.calls import SLICE
from portakv.storage.work import Graph

FORM = small_form(layers=2, heads=2)
MANY = 3 * SLICE - 8
KEYS = [key_of(i) for i in range(MANY)]


def cache(seed: int, blocks: int = MANY) -> KVView:
    tensors = [noise(blocks, 2, 4, 2, 32, dtype=torch.float16, seed=seed + i) for i in range(2)]
    return KVView(tensors, "layer | block kv token head dim")


def same(one: KVView, other: KVView) -> bool:
    pairs = zip(one.tensors, other.tensors, strict=True)
    return all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs)


class Watched(FakeTier):
    """A tier whose looks at its index can be watched."""

    def open(self, graph: Any, rows: Any, forms: Any, own: int = 1) -> list[FakeStore]:
        self.opened = super().open(graph, rows, forms, own)
        return self.opened


@pytest.fixture
def tier() -> Watched:
    return Watched()


@pytest.fixture
def store(tier: Watched) -> Iterator[BlockStore]:
    staging = 4 * MANY * FORM.image_bytes
    with BlockStore(FORM, staging=staging, tiers=[tier], full="wait") as store:
        store.save(cache(0), range(MANY), KEYS).synchronize(LIMIT)
        yield store
    assert counts_of(store.rows)["lent"] == 0


def is_open(store: BlockStore) -> bool:
    try:
        store.has(KEYS[0])
    except StoreError:
        return False
    return True


def on_looks(tier: Watched, act: Callable[[int], object]) -> list[int]:
    """Call ``act`` with the number of each look at the tier from now on; return the numbers."""
    tier_store: Any = tier.opened[0]
    known = tier_store.known
    looks: list[int] = []

    def look(keys: Any) -> list[bool]:
        if len(keys) > 8:  # not the looks at the end of a save
            looks.append(len(looks))
            act(looks[-1])
        result: list[bool] = known(keys)
        return result

    tier_store.known = look
    return looks


def test_all_blocks_land(store: BlockStore, tier: Watched) -> None:
    target = cache(50)
    looks = on_looks(tier, bool)
    store.load(target, range(MANY), KEYS).synchronize(LIMIT)
    assert len(looks) == 3
    assert same(target, cache(0))


def overtakes(store: BlockStore, tier: Watched, by_layer: bool) -> bool:
    """Return whether a thread that waits for the lock gets it before a load is planned."""
    tasks: list[int] = []

    def other() -> None:
        with store.graph.lock:
            tasks.append(store.graph.number)

    thread = threading.Thread(target=other)

    def act(look: int) -> None:
        if look == 0:
            thread.start()
            time.sleep(0.02)  # it sleeps on the lock by then

    on_looks(tier, act)
    target = cache(50)
    handle = store.load(target, range(MANY), KEYS, by_layer=by_layer)
    planned = store.graph.number
    thread.join(LIMIT)
    handle.synchronize(LIMIT)
    assert same(target, cache(0))
    del tier.opened[0].known
    barriers = 3  # at most; they come after the last slice
    return tasks[0] < planned - barriers


def test_others_get_the_lock_between_slices(store: BlockStore, tier: Watched) -> None:
    """A busy system may wake them too late, but not each time.

    By layer all blocks are planned together, so that the first layer of all comes first: the
    negative control.
    """
    assert any(overtakes(store, tier, by_layer=False) for _ in range(20))
    assert not any(overtakes(store, tier, by_layer=True) for _ in range(3))


def test_a_plan_that_fails_late_leaves_nothing(store: BlockStore, tier: Watched) -> None:
    def act(look: int) -> None:
        if look == 1:
            raise RuntimeError("a fault of the tier")

    on_looks(tier, act)
    with pytest.raises(RuntimeError, match="a fault of the tier"):
        store.load(cache(50), range(MANY), KEYS)
    target = cache(60)
    store.load(target, range(MANY), KEYS).synchronize(LIMIT)
    assert same(target, cache(0))


def test_a_store_that_closes_meanwhile_refuses_the_rest(store: BlockStore, tier: Watched) -> None:
    closers = [threading.Thread(target=store.close)]

    def act(look: int) -> None:
        if look == 0:
            closers[0].start()
            while is_open(store):
                time.sleep(0.001)

    looks = on_looks(tier, act)
    with pytest.raises(StoreError, match="open store"):
        store.load(cache(50), range(MANY), KEYS)
    assert looks == [0]
    closers[0].join(LIMIT)
    assert not closers[0].is_alive()


def test_a_load_that_joins_a_slice_of_another_gets_its_blocks(
    store: BlockStore, tier: Watched
) -> None:
    first = cache(50)
    second = cache(60)
    handles: list[Any] = []

    def act(look: int) -> None:
        if look == 1:
            del tier.opened[0].known
            handles.append(store.load(second, range(MANY), KEYS))

    on_looks(tier, act)
    store.load(first, range(MANY), KEYS).synchronize(LIMIT)
    handles[0].synchronize(LIMIT)
    assert same(first, cache(0))
    assert same(second, cache(0))


def test_others_get_the_lock_while_a_plan_breathes() -> None:
    graph = Graph()
    free: list[bool] = []

    def is_free(seconds: float = 0.05) -> None:
        free.append(graph.lock.acquire(timeout=seconds))
        if free[-1]:
            graph.lock.release()

    def look() -> None:
        thread = threading.Thread(target=is_free)
        thread.start()
        thread.join()

    async def plan() -> float:
        look()
        since = time.perf_counter()
        assert await graph.runtime.breathe(since) == since  # it has held the lock for a moment only
        waits = threading.Thread(target=is_free, args=(LIMIT,))
        waits.start()
        later = since
        while waits.is_alive():  # a busy machine may begin it late
            later = await graph.runtime.breathe(since - 1.0)
        assert later > since
        look()
        return later

    with pytest.raises(ZeroDivisionError):
        graph.runtime.run(lambda: failing())
    graph.runtime.run(plan)
    assert free == [False, True, False]
    is_free()
    assert free[-1]


async def failing() -> float:
    return 1 / 0


def test_a_cancelled_call_takes_nothing_from_one_that_is_being_planned() -> None:
    """It joined the first slice of another save, which nothing else follows yet."""
    tier = Watched(width=1)
    tier.hold = threading.Event()
    handles: list[Any] = []
    with BlockStore(FORM, staging=4 * MANY * FORM.image_bytes, tiers=[tier]) as store:
        tier_store: Any = tier.opened[0]
        queue_for_write = tier_store.queue_for_write
        looks: list[int] = []

        def asked(nbytes: int) -> Any:
            looks.append(nbytes)
            if len(looks) == 4 and not handles:  # a chunk of a later slice is planned
                joined = range(SLICE, SLICE + 8)  # their write is queued
                handles.append(store.save(cache(0), joined, [KEYS[i] for i in joined]))
                handles[0].cancel()
            return queue_for_write(nbytes)

        tier_store.queue_for_write = asked
        saved = store.save(cache(0), range(MANY), KEYS)
        tier.hold.set()
        saved.synchronize(LIMIT)
        assert handles
        assert saved.landed.all()


def test_a_plan_that_fails_late_releases_rows_of_the_host_tier_once() -> None:
    tier = Watched()
    size = FORM.image_bytes
    with BlockStore(
        FORM, staging=4 * MANY * size, host=MANY * size, tiers=[tier], full="wait"
    ) as store:
        store.save(cache(0), range(MANY), KEYS).synchronize(LIMIT)
        tier_store: Any = tier.opened[0]

        def fail(keys: Any) -> Any:
            raise RuntimeError("a fault of the tier")

        known = tier_store.known
        other = [*KEYS, key_of(10_000)]

        def at_last(keys: Any) -> Any:
            return fail(keys) if key_of(10_000) in keys else known(keys)

        tier_store.known = at_last
        with pytest.raises(RuntimeError, match="a fault of the tier"):
            store.load(cache(50, len(other)), range(len(other)), other)
        until = time.monotonic() + LIMIT
        while rows_in_use(store.rows) and time.monotonic() < until:
            time.sleep(0.01)
        assert rows_in_use(store.rows) == 0
        reading = store.rows.pin([FORM.digest + KEYS[0]])
        assert rows_in_use(store.rows) == 1
        reading.cancel()
        assert rows_in_use(store.rows) == 0


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_call_is_planned_no_further(store: BlockStore, tier: Watched) -> None:
    """Its caller has no handle, and may use its memory again."""

    def act(look: int) -> None:
        if look == 0:
            _thread.interrupt_main()
            assert settles(abandoned)  # the caller leaves the plan

    looks = on_looks(tier, act)
    with pytest.raises(KeyboardInterrupt):
        store.load(cache(50), range(MANY), KEYS)
    tasks = store.graph.number
    time.sleep(0.1)
    assert looks == [0]
    assert store.graph.number == tasks


def test_a_save_looks_its_keys_up_in_slices(store: BlockStore, tier: Watched) -> None:
    many: list[int] = []
    tier_store: Any = tier.opened[0]
    wants = tier_store.wants

    def look(keys: Any) -> Any:
        many.append(len(keys))
        return wants(keys)

    tier_store.wants = look
    others = [key_of(MANY + i) for i in range(MANY)]
    store.save(cache(0), range(MANY), others).synchronize(LIMIT)
    assert many == [SLICE, SLICE, SLICE - 8]


def save_twice(store: BlockStore, tier: Watched, keys: list[bytes]) -> bool:
    """Save blocks while another thread saves the same ones; return whether their plans mixed."""
    by_other: list[bool] = []
    seconds: list[Any] = []

    def other() -> None:
        seconds.append(store.save(cache(0), range(MANY), keys, priority="urgent"))

    thread = threading.Thread(target=other)

    def act(look: int) -> None:
        by_other.append(threading.get_ident() == thread.ident)  # a helper plans for this thread
        if look == 0:
            thread.start()
            time.sleep(0.02)  # it sleeps on the lock by then

    on_looks(tier, act)
    before = tier.writes
    handle = store.save(cache(0), range(MANY), keys, priority="urgent")
    thread.join(LIMIT)
    del tier.opened[0].known
    for each in (handle, *seconds):
        each.synchronize(LIMIT)
        assert each.landed.all()
        assert each.released.done()
    assert tier.writes - before == MANY, "blocks were written twice"
    last = len(by_other) - by_other[::-1].index(False)
    return True in by_other[:last]


def test_two_equal_saves_write_each_block_once(store: BlockStore, tier: Watched) -> None:
    """Also while both are planned, in turns."""
    mixed = [
        save_twice(store, tier, [key_of((2 + n) * MANY + i) for i in range(MANY)])
        for n in range(10)
    ]
    assert any(mixed)
