# SPDX-License-Identifier: Apache-2.0
"""What a store announces: handles that have ended, and blocks that were stored or lost."""

from __future__ import annotations

import random
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.core_cases import noise
from support.storage_cases import FakeTier, key_of, small_form
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import StoreError, TransferError
from portakv.runtime import interrupts
from portakv.storage import BlockStore, Disk
from portakv.storage.calls import Announced, Change, Snapshot
from portakv.storage.work import Graph

FORM = small_form()
SIZE = FORM.image_bytes
KEYS = [key_of(i) for i in range(40)]
LAYOUT = "layer | block kv token head dim"


def cache(seed: int = 0, device: torch.device | str = "cpu") -> KVView:
    shape = (12, 2, 4, 2, 32)
    tensors = [noise(*shape, dtype=torch.float16, seed=seed + i) for i in range(4)]
    return KVView([each.to(device) for each in tensors], LAYOUT)


def readable(fd: int, seconds: float = 0.0) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])


def quiet(store: BlockStore) -> bool:
    """Return whether nothing is left to take.

    A worker makes the descriptor readable after its handle was added, so it can do so once more for
    a handle that was taken in between.
    """
    until = time.monotonic() + LIMIT
    while readable(store.finished_fd(), 0.1) and time.monotonic() < until:
        if store.finished():
            return False
    return not readable(store.finished_fd()) and not store.finished()


def opened(host: int = 0, tiers: Any = (), **terms: Any) -> BlockStore:
    return BlockStore(FORM, staging=16 * SIZE, host=host * SIZE, tiers=tiers, full="wait", **terms)


def ended(store: BlockStore, many: int) -> list[Any]:
    """Return so many handles, which an event loop would wait for."""
    result: list[Any] = []
    until = time.monotonic() + LIMIT
    while len(result) < many and time.monotonic() < until:
        readable(store.finished_fd(), 1.0)
        result += store.finished()
    return result


# --- handles ---


def test_nothing_is_kept_before_the_first_call() -> None:
    with opened(host=8) as store:
        store.save(cache(), range(8), KEYS[:8]).synchronize(LIMIT)
        assert store.finished() == []
        assert not readable(store.finished_fd())


@pytest.mark.parametrize("host", [0, 3, 8])
def test_handles_are_there_when_they_have_ended(host: int) -> None:
    """Loads of host hits, of other blocks, and of both."""
    tier = FakeTier()
    with opened(host, tiers=[tier]) as store:
        store.finished()
        saved = store.save(cache(), range(8), KEYS[:8])
        assert ended(store, 1) == [saved]
        assert saved.done()
        target = cache(50)
        loaded = [store.load(target, [i], KEYS[i : i + 1]) for i in range(8)]
        loaded += [store.load(target, range(8), KEYS[:8])]
        handles = ended(store, 9)
        assert {*handles} == {*loaded}
        assert all(handle.landed.all() for handle in handles)
        assert quiet(store)


def test_a_call_that_fails_or_is_cancelled_ends_too() -> None:
    tier = FakeTier()
    tier.hold = threading.Event()
    with opened(tiers=[tier]) as store:
        store.finished()
        missing = store.load(cache(50), [1], KEYS[:1])
        assert ended(store, 1) == [missing]
        with pytest.raises(TransferError):
            missing.done()
        saved = store.save(cache(), [1], KEYS[1:2])
        assert store.finished() == []
        tier.refuse = True
        tier.hold.set()
        assert ended(store, 1) == [saved]
        empty = store.load(cache(50), [], [])
        assert ended(store, 1) == [empty]


def test_a_prefetch_ends(tmp_path: Path) -> None:
    with opened(tiers=[Disk(tmp_path, capacity=1 << 20, io="threads")]) as store:
        store.save(cache(), range(8), KEYS[:8]).synchronize(LIMIT)
    with opened(8, tiers=[Disk(tmp_path, capacity=1 << 20, io="threads")]) as store:
        store.finished()
        fetched = store.prefetch(KEYS[:4])
        assert ended(store, 1) == [fetched]


def test_an_end_wakes_a_thread_that_waits_for_the_descriptor() -> None:
    tier = FakeTier()
    tier.hold = threading.Event()
    with opened(tiers=[tier]) as store:
        fd = store.finished_fd()
        store.save(cache(), range(8), KEYS[:8])
        assert not readable(fd, 0.05)
        tier.hold.set()
        assert readable(fd, LIMIT)


def test_a_closed_store_announces_nothing() -> None:
    store = opened(host=8)
    store.finished()
    store.listen()
    store.close()
    for call in (
        store.finished,
        store.finished_fd,
        store.keys,
        store.listen,
        store.listen_fd,
    ):
        with pytest.raises(StoreError, match="open store"):
            call()


@pytest.mark.gpu
def test_host_hits_of_a_device_end() -> None:
    device = torch.device("cuda", 0)
    with opened(8) as store:
        store.save(cache(), range(8), KEYS[:8]).synchronize(LIMIT)
        store.finished()
        target = cache(50, device)
        loaded = store.load(target, range(8), KEYS[:8])
        assert ended(store, 1) == [loaded]
        assert loaded.done()


# --- blocks ---


def apply(index: dict[str, set[bytes]], changes: list[Change]) -> None:
    for change in changes:
        keys = index.setdefault(change.tier, set())
        (keys.add if change.stored else keys.discard)(change.key)


def index_of(snapshot: Snapshot) -> dict[str, set[bytes]]:
    return {tier: {*keys} for tier, keys in snapshot.keys.items()}


@pytest.fixture(params=[0, 6])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockStore]:
    """Return a store whose host tier and whose disk hold a few blocks."""
    disk = Disk(tmp_path, capacity=12 * SIZE, io="threads")
    with opened(request.param, tiers=[disk]) as store:
        yield store


def run(store: BlockStore, seed: int, rounds: int = 30) -> None:
    """Save and load any blocks, of which most get lost."""
    choice = random.Random(seed)
    for _ in range(rounds):
        first = choice.randrange(len(KEYS) - 4)
        keys = KEYS[first : first + choice.randint(1, 4)]
        blocks = range(len(keys))
        if choice.random() < 0.6:
            store.save(cache(), blocks, keys).wait()
        else:
            store.load(cache(50), blocks, keys, missing="skip").wait()


def run_all(store: BlockStore) -> None:
    def safe(seed: int) -> None:
        try:
            run(store, seed)
        except TransferError:  # a block did not land, as others took its place
            safe(seed + 100)

    threads = [threading.Thread(target=safe, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_listener_knows_the_keys(store: BlockStore) -> None:
    """It takes a snapshot amid changes, and applies those that follow."""
    threads = [threading.Thread(target=run_all, args=[store])]
    assert store.listen() == []
    threads[0].start()
    time.sleep(0.02)
    snapshot = store.keys()
    threads[0].join()
    changes = store.listen()
    numbers = [change.number for change in changes]
    assert numbers == [*range(1, len(numbers) + 1)]
    index = index_of(snapshot)
    apply(index, [change for change in changes if change.number > snapshot.number])
    now = store.keys()
    assert now.number == len(numbers)
    assert {k: v for k, v in index.items() if v} == {k: v for k, v in index_of(now).items() if v}
    assert any(not change.stored and change.why == "evicted" for change in changes)
    for tier, keys in index_of(now).items():
        assert len(keys) <= {"host": 6, "disk": 12}[tier]
        assert all(store.has(key) for key in keys)


def test_a_listener_that_misses_a_loss_believes_in_a_block(store: BlockStore) -> None:
    """The negative control of the test before."""
    store.listen()
    for first in range(0, 40, 4):
        store.save(cache(), range(4), KEYS[first : first + 4], after=None).wait()
    index: dict[str, set[bytes]] = {}
    apply(index, [change for change in store.listen() if change.stored])
    assert index["disk"] > index_of(store.keys())["disk"]


def test_a_damaged_block_is_lost(tmp_path: Path) -> None:
    with opened(tiers=[Disk(tmp_path, capacity=1 << 20, io="threads")]) as store:
        store.save(cache(), range(4), KEYS[:4]).synchronize(LIMIT)
        assert store.listen() == []
        assert {*store.keys().keys["disk"]} == {*KEYS[:4]}
        (path,) = tmp_path.rglob("slots")
        content = bytearray(path.read_bytes())
        content[4096 + 7] ^= 1
        path.write_bytes(content)
        store.load(cache(50), range(4), KEYS[:4], missing="skip").synchronize(LIMIT)
        (change,) = store.listen()
        assert (change.tier, change.stored, change.why) == ("disk", False, "damaged")
        assert store.listen() == []


def test_a_call_without_changes_hands_nothing_to_a_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine calls this in each step, in its main thread. Control: a change needs a helper."""
    calls = list[None]()

    def count() -> bool:
        calls.append(None)
        return True

    with opened(8) as store:
        assert store.listen() == []
        monkeypatch.setattr(interrupts, "interruptible", count)
        assert store.listen() == []
        assert calls == []
        store.save(cache(), range(2), KEYS[:2]).synchronize(LIMIT)
        calls.clear()
        assert len(store.listen()) == 2
        assert len(calls) == 1
        assert store.listen() == []
        assert len(calls) == 1


def test_the_descriptor_is_readable_while_changes_wait() -> None:
    with opened(8) as store:
        fd = store.listen_fd()
        assert not readable(fd)
        store.save(cache(), range(2), KEYS[:2]).synchronize(LIMIT)
        assert readable(fd, LIMIT)
        assert [change.stored for change in store.listen()] == [True, True]
        assert not readable(fd)


class Reports:
    """A tier's index that reports on demand."""

    tier = "disk"
    changed: Any = None

    def keys(self) -> list[bytes]:
        return KEYS[:1]

    def announce(self, changed: Any) -> None:
        self.changed = changed


def test_a_slow_listener_sees_the_gap() -> None:
    limit = 65536
    reports = Reports()
    announced = Announced(Graph())
    announced.indices[""] = {"disk": reports}
    changes = announced.listen()
    for _ in range(limit + 3):
        reports.changed(KEYS[0], True, "")
    taken = changes.take()
    assert len(taken) == limit
    assert taken[0].number == 4
    assert announced.snapshot([""]) == Snapshot(limit + 3, {"disk": KEYS[:1]})


def test_a_tier_without_an_index_is_left_out() -> None:
    with opened(tiers=[FakeTier()]) as store:
        store.save(cache(), range(2), KEYS[:2]).synchronize(LIMIT)
        assert store.keys() == Snapshot(0, {})


def test_two_disks_have_two_names(tmp_path: Path) -> None:
    disks = [Disk(tmp_path / name, capacity=1 << 20, io="threads") for name in "ab"]
    with opened(tiers=disks) as store:
        assert store.listen() == []
        store.save(cache(), range(2), KEYS[:2]).synchronize(LIMIT)
        index: dict[str, set[bytes]] = {}
        apply(index, store.listen())
        assert index == index_of(store.keys()) == {"disk": {*KEYS[:2]}, "disk 2": {*KEYS[:2]}}


def test_close_wakes_who_waits_for_the_descriptor() -> None:
    store = opened(host=8)
    fd = store.finished_fd()
    woken: list[bool] = []
    thread = threading.Thread(target=lambda: woken.append(readable(fd, LIMIT)))
    thread.start()
    time.sleep(0.05)
    store.close()
    thread.join(LIMIT)
    assert woken == [True]
