# SPDX-License-Identifier: Apache-2.0
"""Calls with many blocks are planned in slices, between which others may take the graph's lock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.core_cases import noise
from support.storage_cases import FakeTier, key_of, small_form

from portakv import KVView
from portakv.errors import StoreError
from portakv.storage import BlockStore
from portakv.storage.plan import SLICE

LIMIT = 20.0  # seconds; nothing here takes as long
FORM = small_form(layers=2, heads=1)
MANY = 3 * SLICE - 8
KEYS = [key_of(i) for i in range(MANY)]


def cache(seed: int) -> KVView:
    tensors = [noise(MANY, 2, 4, 1, 32, dtype=torch.float16, seed=seed + i) for i in range(2)]
    return KVView(tensors, "layer | block kv token head dim")


def same(one: KVView, other: KVView) -> bool:
    pairs = zip(one.tensors, other.tensors, strict=True)
    return all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs)


@pytest.fixture
def store() -> Iterator[BlockStore]:
    staging = 4 * MANY * FORM.image_bytes
    with BlockStore(FORM, staging=staging, tiers=[FakeTier()], full="wait") as store:
        store.save(cache(0), range(MANY), KEYS).synchronize(LIMIT)
        yield store
    assert not store._shared.begun
    assert not store._shared.in_transit
    assert store.rows.counts()["lent"] == 0


def on_looks(store: BlockStore, act: Callable[[int], object]) -> list[int]:
    """Call ``act`` with the number of each look at the tier from now on; return the numbers."""
    tier_store: Any = store._tier_stores[0]
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


def test_all_blocks_land(store: BlockStore) -> None:
    target = cache(50)
    looks = on_looks(store, bool)
    store.load(target, range(MANY), KEYS).synchronize(LIMIT)
    assert len(looks) == 3
    assert same(target, cache(0))


def overtakes(store: BlockStore, by_layer: bool) -> bool:
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

    on_looks(store, act)
    target = cache(50)
    handle = store.load(target, range(MANY), KEYS, by_layer=by_layer)
    planned = store.graph.number
    thread.join(LIMIT)
    handle.synchronize(LIMIT)
    assert same(target, cache(0))
    tier_store: Any = store._tier_stores[0]
    del tier_store.known
    barriers = 3  # at most; they come after the last slice
    return tasks[0] < planned - barriers


def test_others_get_the_lock_between_slices(store: BlockStore) -> None:
    """A busy system may wake them too late, but not each time.

    By layer all blocks are planned together, so that the first layer of all comes first: the
    negative control.
    """
    assert any(overtakes(store, by_layer=False) for _ in range(20))
    assert not any(overtakes(store, by_layer=True) for _ in range(3))


def test_a_plan_that_fails_late_leaves_nothing(store: BlockStore) -> None:
    def act(look: int) -> None:
        if look == 1:
            raise RuntimeError("a fault of the tier")

    on_looks(store, act)
    with pytest.raises(RuntimeError, match="a fault of the tier"):
        store.load(cache(50), range(MANY), KEYS)
    target = cache(60)
    store.load(target, range(MANY), KEYS).synchronize(LIMIT)
    assert same(target, cache(0))


def test_a_store_that_closes_meanwhile_refuses_the_rest(store: BlockStore) -> None:
    closers = [threading.Thread(target=store.close)]

    def act(look: int) -> None:
        if look == 0:
            closers[0].start()
            while not store._closed:
                time.sleep(0.001)

    looks = on_looks(store, act)
    with pytest.raises(StoreError, match="open store"):
        store.load(cache(50), range(MANY), KEYS)
    assert looks == [0]
    closers[0].join(LIMIT)
    assert not closers[0].is_alive()


def test_a_load_that_joins_a_slice_of_another_gets_its_blocks(store: BlockStore) -> None:
    first, second = cache(50), cache(60)
    handles: list[Any] = []

    def act(look: int) -> None:
        if look == 1:
            tier_store: Any = store._tier_stores[0]
            del tier_store.known
            handles.append(store.load(second, range(MANY), KEYS))

    on_looks(store, act)
    store.load(first, range(MANY), KEYS).synchronize(LIMIT)
    handles[0].synchronize(LIMIT)
    assert same(first, cache(0))
    assert same(second, cache(0))


def test_steps_end_with_the_result_and_undo_nothing(store: BlockStore) -> None:
    undone: list[int] = []
    owned: list[bool] = []

    def failing() -> Any:
        yield
        raise ZeroDivisionError

    def steps() -> Any:
        for _ in range(3):
            owned.append(store.graph.lock._is_owned())  # type: ignore[attr-defined]
            yield
        return 7

    assert store.graph.run_steps(steps(), undo=undone.append) == 7
    assert owned == [True] * 3
    assert not undone
    with pytest.raises(ZeroDivisionError):
        store.graph.run_steps(failing())
    assert not store.graph.lock._is_owned()  # type: ignore[attr-defined]
