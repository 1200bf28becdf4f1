# SPDX-License-Identifier: Apache-2.0
"""The two ends of a save: the caller's blocks may be written again, and the blocks are stored."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from support.core_cases import noise
from support.device_cases import current, delay, on
from support.graph_ends import submit
from support.storage_cases import FakeTier, counts_of, key_of, small_form
from support.waits import LIMIT, until

from portakv import KVView
from portakv.errors import InvalidTerms, TransferCancelled, TransferError, TransferTimeout
from portakv.storage import BlockStore
from portakv.storage import store as form_store
from portakv.storage.memory import Crossing
from portakv.storage.work import Task

FORM = small_form()
KEYS = [key_of(i) for i in range(8)]
OTHERS = [key_of(i) for i in range(40, 48)]
LAYOUT = "layer | block kv token head dim"


def cache(seed: int = 0, device: torch.device | str = "cpu") -> KVView:
    shape = (12, 2, 4, 2, 32)
    tensors = [noise(*shape, dtype=torch.float16, seed=seed + i) for i in range(4)]
    return KVView([each.to(device) for each in tensors], LAYOUT)


def same(one: KVView, other: KVView, blocks: Any) -> bool:
    pairs = zip(one.tensors, other.tensors, strict=True)
    some = list(blocks)
    return all(torch.equal(*(x[some].cpu().view(torch.int16) for x in pair)) for pair in pairs)


@pytest.fixture
def tier() -> Iterator[FakeTier]:
    """Return a tier whose writes wait until the test's end."""
    tier = FakeTier()
    tier.hold = threading.Event()
    yield tier
    if tier.hold:
        tier.hold.set()


def opened(tier: FakeTier, staging: int = 16, **terms: Any) -> BlockStore:
    return BlockStore(FORM, staging=staging * FORM.image_bytes, tiers=[tier], **terms)


def test_blocks_may_be_written_after_the_release_while_the_tier_writes(tier: FakeTier) -> None:
    source = cache()
    with opened(tier) as store:
        saved = store.save(source, range(8), KEYS, priority="urgent")
        assert saved.released is not None
        saved.released.synchronize(LIMIT)
        assert saved.released.done()
        assert not saved.done()
        for tensor in source.tensors:
            tensor.zero_()
        assert tier.hold is not None
        tier.hold.set()
        saved.synchronize(LIMIT)
        target = cache(50)
        store.load(target, range(8), KEYS).synchronize(LIMIT)
    assert same(target, cache(), range(8))


@contextmanager
def no_copies(store: BlockStore) -> Iterator[None]:
    """Let no worker copy from a view meanwhile."""
    go = threading.Event()
    queue = store.graph.queue("device-host")
    tasks = [Task(lambda *_: go.wait(LIMIT), 1, queue=queue) for _ in range(queue.width)]
    submit(store.graph, tasks, priority="urgent")
    try:
        yield
    finally:
        go.set()


def test_the_release_comes_after_the_copies(tier: FakeTier) -> None:
    with opened(tier) as store:
        with no_copies(store):
            saved = store.save(cache(), range(8), KEYS)
            assert saved.released is not None
            with pytest.raises(TransferTimeout):
                saved.released.synchronize(0.1)
            assert not saved.released.done()
        saved.released.synchronize(LIMIT)
        assert tier.hold is not None
        tier.hold.set()
        saved.synchronize(LIMIT)


def test_a_save_without_free_staging_is_refused_at_the_call(tier: FakeTier) -> None:
    """Also one in the background, which has no slack for it."""
    with opened(tier, staging=2) as store:
        first = store.save(cache(), [0], KEYS[:1])
        second = store.save(cache(), [1], KEYS[1:2])
        assert second.released is not None
        assert second.released.done()
        with pytest.raises(TransferError, match="staging was full"):
            second.synchronize(0.0)
        assert not first.done()
        assert tier.hold is not None
        tier.hold.set()
        first.synchronize(LIMIT)


def long_save(store: BlockStore, many: int, busy: bool = True, seed: int = 5) -> tuple[Any, KVView]:
    """Save many blocks, whose copies begin after the plan if ``busy``; return the handle and the
    cache."""
    tensors = [noise(many, 2, 4, 2, 32, dtype=torch.float16, seed=seed + i) for i in range(4)]
    source = KVView(tensors, LAYOUT)
    keys = [key_of(200 + i) for i in range(many)]
    with no_copies(store) if busy else nullcontext():
        saved = store.save(source, range(many), keys)
    with suppress(TransferError):
        saved.synchronize(LIMIT)
    return saved, source


@pytest.mark.parametrize("cached", [0, 40])
def test_a_save_of_more_than_half_of_staging_has_the_rows_of_the_host_tier(cached: int) -> None:
    """The step of an engine, whose blocks would all become rows of the host tier."""
    size = FORM.image_bytes
    with BlockStore(FORM, staging=16 * size, host=40 * size) as store:
        for first in range(0, cached, 8):
            keys = [key_of(first + i) for i in range(8)]
            store.save(cache(), range(8), keys).synchronize(LIMIT)
        assert counts_of(store.rows)["kept"] == cached
        saved, source = long_save(store, 30)
        assert saved.landed.all()
        target = cache_like(source)
        keys = [key_of(200 + i) for i in range(30)]
        store.load(target, range(30), keys).synchronize(LIMIT)
        assert same(target, source, range(30))
        kept = [store.has(key_of(i)) for i in range(cached)]
        # Of the fourth prompt the last six blocks are gone, and its beginning is there.
        assert kept == [i in (24, 25) or i >= 32 for i in range(cached)]
        counts = counts_of(store.rows)
        assert counts["kept"] == max(30, cached)
        assert counts["lent"] == 0


def cache_like(view: KVView) -> KVView:
    """Return a cache of other bytes and the same shape."""
    return KVView([torch.zeros_like(each) for each in view.tensors], LAYOUT)


def test_a_save_is_dropped_where_no_row_of_the_host_tier_may_go() -> None:
    """The control of the test above: loads read the cached rows."""
    size = FORM.image_bytes
    with BlockStore(FORM, staging=16 * size, host=16 * size) as store:
        store.save(cache(), range(8), KEYS).synchronize(LIMIT)
        pins = store.rows.pin([FORM.digest + key for key in KEYS])
        saved, _ = long_save(store, 30)
        assert saved.landed.tolist() == [i < 8 for i in range(30)]
        assert all(store.has(key) for key in KEYS)
        pins.cancel()
        assert counts_of(store.rows) == {"free": 16, "lent": 0, "kept": 16}


def test_a_save_beyond_the_host_tier_stores_its_first_blocks() -> None:
    """No block of the call evicts an earlier one, whichever lands first."""
    size = FORM.image_bytes
    with BlockStore(FORM, staging=8 * size, host=20 * size) as store:
        saved, _ = long_save(store, 64)
        there = [store.has(key_of(200 + i)) for i in range(64)]
        assert saved.landed.tolist() == there
        assert there == [i < 20 for i in range(64)]


def test_blocks_after_a_gap_evict_nothing_for_their_rows() -> None:
    size = FORM.image_bytes
    with BlockStore(FORM, staging=16 * size, host=8 * size) as store:
        store.save(cache(), range(8), KEYS).synchronize(LIMIT)
        many = 12
        tensors = [noise(many, 2, 4, 2, 32, dtype=torch.float16, seed=i) for i in range(4)]
        keys = [key_of(200 + i) for i in range(many)]
        with no_copies(store):
            saved = store.save(KVView(tensors, LAYOUT), range(many), keys, after=key_of(99))
        with pytest.raises(TransferError):
            saved.synchronize(LIMIT)
        assert not saved.landed.any()
        assert all(store.has(key) for key in KEYS)


def test_a_save_that_is_cancelled_gives_the_rows_of_the_host_tier_back() -> None:
    size = FORM.image_bytes
    with BlockStore(FORM, staging=16 * size, host=24 * size) as store:
        for first in range(0, 24, 8):
            keys = [key_of(first + i) for i in range(8)]
            store.save(cache(), range(8), keys).synchronize(LIMIT)
        tensors = [noise(24, 2, 4, 2, 32, dtype=torch.float16, seed=i) for i in range(4)]
        keys = [key_of(200 + i) for i in range(24)]
        with no_copies(store):
            saved = store.save(KVView(tensors, LAYOUT), range(24), keys)
            assert counts_of(store.rows) == {"free": 8, "lent": 24, "kept": 8}
            saved.cancel()
            # The evicted blocks are gone; their rows are free for others.
            assert counts_of(store.rows) == {"free": 32, "lent": 0, "kept": 8}
        assert [store.has(key_of(i)) for i in range(24)] == [i >= 16 for i in range(24)]
        again, _ = long_save(store, 24)
        assert again.landed.all()


def test_a_save_of_cached_blocks_takes_no_row() -> None:
    size = FORM.image_bytes
    with BlockStore(FORM, staging=2 * size, host=8 * size) as store:
        store.save(cache(), range(8), KEYS, full="wait").synchronize(LIMIT)
        with no_copies(store):
            store.save(cache(), range(8), KEYS).synchronize(LIMIT)
        assert store.rows.evicted == 0


@pytest.mark.parametrize("own", ["drop", "wait"])
def test_a_save_says_what_full_staging_means(tier: FakeTier, own: Any) -> None:
    with opened(tier, staging=2, full="wait" if own == "drop" else "drop") as store:
        first = store.save(cache(), [0], KEYS[:1], full=own)
        second = store.save(cache(), [1], KEYS[1:2], full=own)
        assert second.released is not None
        assert second.released.done() is (own == "drop")
        assert tier.hold is not None
        tier.hold.set()
        first.synchronize(LIMIT)
        second.released.synchronize(LIMIT)
        if own == "wait":
            second.synchronize(LIMIT)
        assert second.landed.all() == (own == "wait")


def test_blocks_of_a_save_that_fit_are_stored_and_the_others_released(tier: FakeTier) -> None:
    with opened(tier, staging=4) as store:
        saved = store.save(cache(), range(8), KEYS)
        assert saved.released is not None
        saved.released.synchronize(LIMIT)
        assert tier.hold is not None
        tier.hold.set()
        with pytest.raises(TransferError, match="staging was full"):
            saved.synchronize(LIMIT)
        assert saved.landed.tolist() == [True] * 2 + [False] * 6


def test_a_save_that_joins_another_reads_nothing(tier: FakeTier) -> None:
    with opened(tier) as store:
        first = store.save(cache(), range(8), KEYS)
        second = store.save(cache(90), range(8), KEYS)
        assert second.released is not None
        assert second.released.done()
        assert tier.hold is not None
        tier.hold.set()
        first.synchronize(LIMIT)
        second.synchronize(LIMIT)


def test_a_save_does_not_join_one_that_was_cancelled(tier: FakeTier) -> None:
    """Loads wait for the rows of that one, but no tier gets them. A further load ends nothing."""
    source = cache()
    views = [cache(90), cache(91)]
    with opened(tier) as store:
        with no_copies(store):
            first = store.save(source, [0], KEYS[:1])
            loads = [store.load(views[0], [0], KEYS[:1])]
            assert first.cancel()
            loads.append(store.load(views[1], [0], KEYS[:1]))
            second = store.save(source, [0], KEYS[:1])
        assert tier.hold is not None
        tier.hold.set()
        with pytest.raises(TransferCancelled):
            first.synchronize(LIMIT)
        for load, into in zip(loads, views, strict=True):
            load.synchronize(LIMIT)
            assert same(into, source, [0])
        second.synchronize(LIMIT)
        assert store.has(KEYS[0])


def test_a_cancelled_save_releases_its_blocks(tier: FakeTier) -> None:
    with opened(tier, staging=2, full="wait") as store:
        first = store.save(cache(), [0], KEYS[:1])
        second = store.save(cache(), [1], KEYS[1:2])
        assert second.released is not None
        assert not second.released.done()
        assert second.cancel()
        second.released.synchronize(LIMIT)
        with pytest.raises(TransferCancelled):
            second.synchronize(LIMIT)
        assert tier.hold is not None
        tier.hold.set()
        first.synchronize(LIMIT)


def test_a_save_whose_copy_fails_releases_its_blocks(tier: FakeTier) -> None:
    source = KVView([tensor.clone() for tensor in cache().tensors], LAYOUT)
    with opened(tier) as store:
        with no_copies(store):
            failed = store.save(source, [1], KEYS[1:2])
            source.tensors[0].untyped_storage().resize_(0)
        assert failed.released is not None
        failed.released.synchronize(LIMIT)
        with pytest.raises(TransferError, match="memory"):
            failed.synchronize(LIMIT)


def test_a_load_releases_nothing(tier: FakeTier) -> None:
    with opened(tier) as store:
        assert store.load(cache(), [1], KEYS[:1], missing="skip").released is None


def test_wrong_terms_are_refused(tier: FakeTier) -> None:
    full: Any = "never"
    with opened(tier) as store, pytest.raises(InvalidTerms, match="full"):
        store.save(cache(), [1], KEYS[:1], full=full)


@pytest.mark.parametrize("full", ["drop", "wait"])
def test_a_save_in_the_background_is_released_before_later_saves(
    full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control may wait for staging, and its copies wait for all normal ones for two seconds."""
    order = list[int]()  # the first block of each copy
    go = threading.Event()
    copy = Crossing.copy

    def noted(self: Crossing, inner: Any, outer: Any, items: Any, at: Any) -> None:
        assert go.wait(LIMIT)
        order.append(int(self.ids[0]))
        copy(self, inner, outer, items, at)

    with BlockStore(FORM, staging=32 * FORM.image_bytes, host=8 * FORM.image_bytes) as store:
        view = cache()
        store.save(view, [11], [key_of(99)]).synchronize(LIMIT)
        monkeypatch.setattr(Crossing, "copy", noted)
        saves = [store.save(view, [n], [key_of(n)], priority="normal") for n in range(3)]
        saves.append(store.save(view, [7], [key_of(7)], full=full))
        time.sleep(0.2)
        saves += [store.save(view, [n], [key_of(n)], priority="normal") for n in (4, 5, 6)]
        go.set()
        for saved in saves:
            saved.synchronize(LIMIT)
    # Two workers copy, so that neighbours may change places.
    assert order.index(7) < order.index(6) if full == "drop" else order.index(7) > order.index(4)


def test_an_urgent_save_waits_for_no_saves_in_the_background(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are due earlier, and one worker is left for others."""
    order = list[int]()  # the first block of each copy
    copy = Crossing.copy

    def slow(self: Crossing, inner: Any, outer: Any, items: Any, at: Any) -> None:
        order.append(int(self.ids[0]))
        time.sleep(0.05)
        copy(self, inner, outer, items, at)

    with BlockStore(FORM, staging=64 * FORM.image_bytes, host=8 * FORM.image_bytes) as store:
        view = cache()
        store.save(view, [11], [key_of(99)]).synchronize(LIMIT)
        monkeypatch.setattr(Crossing, "copy", slow)
        saves = [store.save(view, [n], [key_of(n)]) for n in range(10)]
        time.sleep(0.12)  # they are due by now
        urgent = store.save(view, [10], [key_of(10)], priority="urgent")
        for saved in (urgent, *saves):
            saved.synchronize(LIMIT)
    assert order.index(10) < 9


# --- on a device: the copy is issued in the caller's thread


def warmed(device: torch.device, tier: FakeTier, staging: int = 16) -> BlockStore:
    """Return a store after a save that builds what the saves of a test need, on an idle device."""
    store = opened(tier, staging)
    hold = tier.hold
    tier.hold = None
    store.save(cache(70, device), range(8), OTHERS, full="wait").synchronize(LIMIT)
    tier.hold = hold
    torch.accelerator.synchronize(device)
    return store


def stored(store: BlockStore) -> KVView:
    """Return what a store has under the keys."""
    target = cache(50)
    store.load(target, range(8), KEYS).synchronize(LIMIT)
    return target


def test_a_stream_waits_for_the_release_and_the_host_does_not(
    accelerator: torch.device, tier: FakeTier
) -> None:
    source = cache(0, accelerator)
    with warmed(accelerator, tier) as store:
        # Workers take no part where the host issues the copy.
        with no_copies(store) if accelerator.type == "cuda" else nullcontext():
            delay(current(accelerator))
            saved = store.save(source, range(8), KEYS)
            assert saved.released is not None
            assert not saved.released.done()
            saved.released.wait()
            for tensor in source.tensors:  # ordered after the copy
                tensor.zero_()
        assert tier.hold is not None
        tier.hold.set()
        saved.synchronize(LIMIT)
        saved.released.synchronize(LIMIT)
        assert same(stored(store), cache(), range(8))


@pytest.mark.gpu
def test_work_that_waits_for_no_release_meets_the_copy(tier: FakeTier) -> None:
    """The negative control. The simulated device runs a stream's work when it is waited for."""
    device = torch.device("cuda", 0)
    source = cache(0, device)
    other = torch.Stream(device)
    with on(other):  # the first use of a kernel may wait for the device
        torch.ones_like(source.tensors[0]).zero_()
    with warmed(device, tier) as store:
        delay(current(device))
        saved = store.save(source, range(8), KEYS)
        with on(other):
            for tensor in source.tensors:
                tensor.zero_()
        other.synchronize()
        assert tier.hold is not None
        tier.hold.set()
        saved.synchronize(LIMIT)
        assert not same(stored(store), cache(), range(8))


def test_the_callers_stream_does_not_wait(accelerator: torch.device, tier: FakeTier) -> None:
    """Later work of the stream may end before the copy."""
    source = cache(0, accelerator)
    with warmed(accelerator, tier) as store:
        with no_copies(store):
            delay(current(accelerator))
            saved = store.save(source, range(8), KEYS)
            mark = torch.Event(accelerator)
            mark.record(current(accelerator))
            mark.synchronize()
            assert saved.released is not None
            # The simulated device copies when somebody waits for it; a real one may be done.
            assert accelerator.type == "cuda" or not saved.released.done()
        assert tier.hold is not None
        tier.hold.set()
        saved.synchronize(LIMIT)


def test_rows_of_a_cancelled_save_stay_until_its_copy_ends(
    accelerator: torch.device, tier: FakeTier
) -> None:
    """Others get them next, and the copy would write into their blocks."""
    source = cache(0, accelerator)
    with warmed(accelerator, tier) as store:
        with no_copies(store):
            delay(current(accelerator))
            cancelled = store.save(source, range(8), KEYS)
            assert cancelled.released is not None
            assert not cancelled.released.done()
            assert cancelled.cancel()
            assert cancelled.released.done() or counts_of(store.rows)["lent"] == 8
            assert until(lambda: counts_of(store.rows)["lent"] == 0)
            assert cancelled.released.done()
        assert tier.hold is not None
        tier.hold.set()
        store.save(cache(20), range(8), KEYS).synchronize(LIMIT)
        assert same(stored(store), cache(20), range(8))


def test_blocks_beyond_staging_wait_for_workers(accelerator: torch.device, tier: FakeTier) -> None:
    source = cache(0, accelerator)
    with warmed(accelerator, tier, staging=4) as store:
        saved = store.save(source, range(8), KEYS, full="wait")
        assert saved.released is not None
        with pytest.raises(TransferTimeout):
            saved.released.synchronize(0.05)
        assert tier.hold is not None
        tier.hold.set()
        saved.released.synchronize(LIMIT)
        saved.synchronize(LIMIT)
        assert same(stored(store), cache(), range(8))


@pytest.mark.gpu
@pytest.mark.parametrize("apart", [1, 1 << 30])
def test_a_long_chunk_is_copied_before_the_next_one_takes_rows(
    apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control has one copy for all chunks, after all rows are taken."""
    monkeypatch.setattr(form_store, "LONG", 2 * FORM.image_bytes)
    monkeypatch.setattr(form_store, "APART", apart)
    lent = list[int]()  # rows when a copy begins
    device = torch.device("cuda", 0)
    room = 16 * FORM.image_bytes
    with BlockStore(FORM, staging=room, host=8 * FORM.image_bytes) as store:
        store.save(cache(70, device), range(8), OTHERS, full="wait").synchronize(LIMIT)
        begin = Crossing.begin

        def noted(self: Crossing, *rest: Any) -> None:
            lent.append(counts_of(store.rows)["lent"])
            begin(self, *rest)

        monkeypatch.setattr(Crossing, "begin", noted)
        store.save(cache(0, device), range(8), KEYS, full="wait").synchronize(LIMIT)
        assert lent == ([2, 4, 6, 8] if apart == 1 else [8])
        assert same(stored(store), cache(), range(8))
