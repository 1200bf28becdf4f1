# SPDX-License-Identifier: Apache-2.0
"""`BlockStore` over tiers that are dicts of bytes: which bytes land where, whatever fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from support import ready
from support.ambient import STATES
from support.core_cases import noise
from support.device_cases import current, delay
from support.graph_ends import end_of_handle
from support.storage_cases import FakeStore, FakeTier, counts_of, key_of, rows_in_use, small_form
from support.threads import interrupting
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import (
    InvalidTerms,
    LayoutError,
    SlotError,
    StoreError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.graph import Collector
from portakv.storage import BlockStore
from portakv.storage.form import BlockForm
from portakv.storage.memory import Want
from portakv.storage.tiers import remote
from portakv.storage.tiers.base import TierStore
from portakv.storage.tiers.disk import Disk, DiskStore
from portakv.storage.tiers.remote import RemoteStore
from portakv.storage.work import Graph

KEYS = [key_of(i) for i in range(8)]
NO_RETRY = {"max_retries": 0}


def cache(
    blocks: int = 12, layers: int = 4, heads: int = 2, size: int = 4, seed: int = 0
) -> KVView:
    """Return a paged cache of noise in a layout of vLLM."""
    shape = (blocks, 2, size, heads, 32)
    tensors = [noise(*shape, dtype=torch.float16, seed=seed + i) for i in range(layers)]
    return KVView(tensors, "layer | block kv token head dim")


def tokens_of(view: KVView, blocks: Any, heads: slice = slice(None)) -> Any:
    """Return all bytes of blocks, ``[layers, kv, tokens, heads, bytes]``."""
    layers = []
    for tensor in view.tensors:
        raw = tensor.cpu().view(torch.uint8).numpy()[np.array([*blocks])]
        layers.append(np.moveaxis(raw, 0, 1).reshape(2, -1, *raw.shape[3:])[:, :, heads])
    return np.stack(layers)


def same(one: KVView, blocks: Any, other: KVView, other_blocks: Any) -> bool:
    return bool((tokens_of(one, blocks) == tokens_of(other, other_blocks)).all())


@pytest.fixture
def opened() -> Iterator[Any]:
    """Return a maker of stores, ``staging`` and ``host`` in rows; at the end no row may be out."""
    stores: list[BlockStore] = []

    def make(
        form: BlockForm | None = None, staging: int = 8, host: int = 0, **terms: Any
    ) -> BlockStore:
        form = form or small_form()
        terms = {"full": "wait", **terms}
        size = max(
            [
                form.image_bytes,
                *(x.image_bytes for t in terms.get("tiers", ()) for x in t.forms(form)),
            ]
        )
        stores.append(BlockStore(form, staging=staging * size, host=host * size, **terms))
        return stores[-1]

    yield make
    for store in stores:
        store.close(LIMIT)
        counts = counts_of(store.rows)
        assert counts["lent"] == 0
        assert counts["free"] + counts["kept"] == store.rows.tensor.shape[0]
        assert not rows_in_use(store.rows)


def saved(store: BlockStore, view: KVView, blocks: Any = range(8), keys: Any = KEYS) -> None:
    handle = store.save(view, blocks, keys, priority="urgent", deadline=LIMIT)
    handle.synchronize(LIMIT)
    assert handle.landed.all()


# --- bytes ---


@pytest.mark.parametrize("host", [0, 3, 8])
@pytest.mark.parametrize("staging", [1, 3, 40])
def test_what_was_saved_is_loaded_into_another_cache(opened: Any, host: int, staging: int) -> None:
    source = cache()
    target = cache(seed=50)
    tier = FakeTier()
    store = opened(tiers=[tier], staging=staging, host=host)
    handle = store.save(source, range(2, 10), KEYS)
    handle.synchronize(LIMIT)
    assert handle.landed.all()
    assert len(tier.blocks) == 8
    assert store.lookup([*KEYS[:5], key_of(99), *KEYS[5:]]) == 5
    assert store.lookup(KEYS) == 8
    rest = tokens_of(target, [0, 9, 10, 11])
    loaded = store.load(target, range(1, 9), KEYS)
    loaded.synchronize(LIMIT)
    assert loaded.landed.all()
    assert same(source, range(2, 10), target, range(1, 9))
    assert (tokens_of(target, [0, 9, 10, 11]) == rest).all()
    assert len(tier.reads) == 8 - min(host, 8), "the host tier has the blocks of a save"


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("ids", ["list", "tensor", "array"])
def test_views_with_blocks_of_any_size(opened: Any, size: int, ids: str) -> None:
    """Keys need not fill the last block."""
    make: Any = {"list": list, "tensor": torch.tensor, "array": np.array}[ids]
    source = cache()
    target = cache(20, size=size, seed=9)
    store = opened(host=8)
    saved(store, source)
    blocks = np.random.default_rng(size).permutation(20)[: -(-7 * 4 // size)].tolist()
    before = tokens_of(target, blocks)
    store.load(target, make(blocks), KEYS[:7]).synchronize(LIMIT)
    after = tokens_of(target, blocks)
    wanted = tokens_of(source, range(7))
    assert (after[:, :, :28] == wanted).all()
    assert (after[:, :, 28:] == before[:, :, 28:]).all()
    again = opened(host=8)
    saved(again, target, blocks, KEYS[:7])
    copy = cache(seed=70)
    again.load(copy, range(7), KEYS[:7]).synchronize(LIMIT)
    assert same(source, range(7), copy, range(7))


@pytest.mark.parametrize("state", STATES)
def test_a_store_in_any_state_of_torch(opened: Any, state: str) -> None:
    source = cache()
    target = cache(seed=50)
    with STATES[state](torch.device("cpu")):
        store = opened(host=2, tiers=[FakeTier()])
        saved(store, source)
        store.load(target, range(8), KEYS).synchronize(LIMIT)
    assert same(source, range(8), target, range(8))


# --- what fails ---


@pytest.mark.parametrize("missing", [[0], [4], [7], [0, 3, 7], list(range(8))])
def test_missing_blocks_are_told_exactly(opened: Any, missing: list[int]) -> None:
    """Fault 55: nothing is written for them, and all others land."""
    source = cache()
    target = cache(seed=50)
    tier = FakeTier()
    store = opened(tiers=[tier], staging=3)
    saved(store, source)
    for i in missing:
        del tier.blocks[store.form, KEYS[i]]
    there = [i for i in range(8) if i not in missing]
    before = tokens_of(target, range(12))
    loaded = store.load(target, range(8), KEYS)
    with pytest.raises(TransferError, match=f"{len(there)} of 8 blocks"):
        loaded.synchronize(LIMIT)
    assert loaded.landed.tolist() == [i in there for i in range(8)]
    assert not there or same(source, there, target, there)
    assert (
        tokens_of(target, [*missing, 8])
        == before.reshape(4, 2, 12, 4, 2, 64)[:, :, [*missing, 8]].reshape(4, 2, -1, 2, 64)
    ).all()
    again = store.load(target, range(8), KEYS, missing="skip")
    again.synchronize(LIMIT)
    assert (again.landed == loaded.landed).all()
    assert store.lookup(KEYS) == min(missing)


@pytest.mark.parametrize("fault", ["flip", "error"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_the_next_tier_is_asked_for_what_does_not_land(
    opened: Any, fault: str, by_layer: bool
) -> None:
    source = cache()
    target = cache(seed=50)
    near = FakeTier("near")
    far = FakeTier("remote")
    store = opened(tiers=[near, far])
    saved(store, source)
    near.faults = {KEYS[2]: [fault], KEYS[7]: [fault]}
    del near.blocks[store.form, KEYS[4]]
    near.reads.clear()
    store.load(target, range(8), KEYS, by_layer=by_layer).synchronize(LIMIT)
    assert same(source, range(8), target, range(8))
    assert {key for key, _ in far.reads} >= {KEYS[2], KEYS[4], KEYS[7]}
    assert KEYS[4] not in {key for key, _ in near.reads}


def test_a_block_that_is_wrong_in_the_only_tier_is_a_miss(opened: Any) -> None:
    source = cache()
    target = cache(seed=50)
    tier = FakeTier()
    store = opened(tiers=[tier])
    saved(store, source)
    tier.faults = {KEYS[3]: ["flip"]}
    loaded = store.load(target, range(8), KEYS, missing="skip")
    loaded.synchronize(LIMIT)
    assert loaded.landed.tolist() == [i != 3 for i in range(8)]
    assert store.lookup(KEYS) == 3
    saved(store, source)  # the one that is missing, and no other
    assert store.lookup(KEYS) == 8


def test_one_key_loaded_by_16_threads_is_read_once(opened: Any) -> None:
    """Fault 56."""
    source = cache()
    tier = FakeTier()
    go = threading.Event()
    store = opened(tiers=[tier])
    saved(store, source)
    tier.faults = {KEYS[0]: [lambda: go.wait(LIMIT)]}
    targets = [cache(seed=100 + i) for i in range(16)]
    handles = list[Any]()
    threads = [
        threading.Thread(target=lambda x=x: handles.append(store.load(x, [3], KEYS[:1])))
        for x in targets
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    go.set()
    for handle in handles:
        handle.synchronize(LIMIT)
    assert len(handles) == 16
    assert tier.reads == [(KEYS[0], None)]
    assert all(same(source, [0], target, [3]) for target in targets)


def test_a_block_whose_save_is_under_way_is_loaded_from_its_rows(opened: Any) -> None:
    """Fault 57; and a second save of it is nothing, which ends with the first."""
    source = cache()
    target = cache(seed=50)
    tier = FakeTier()
    go = threading.Event()
    store = opened(tiers=[tier], staging=16)
    tier.hold = go
    first = store.save(source, range(8), KEYS, priority="urgent")
    store.load(target, range(8), KEYS).synchronize(LIMIT)
    assert same(source, range(8), target, range(8))
    assert not tier.reads
    second = store.save(target, range(8), KEYS, priority="urgent")
    assert not first.done()
    assert not second.done()
    go.set()
    second.synchronize(LIMIT)
    assert first.landed.all()
    assert second.landed.all()
    assert tier.writes == 8


def test_a_key_that_every_tier_has_is_not_saved_again(opened: Any) -> None:
    source = cache()
    near = FakeTier("near")
    far = FakeTier("far")
    store = opened(tiers=[near, far])
    saved(store, source)
    del far.blocks[store.form, KEYS[1]]
    saved(store, cache(seed=3))  # other bytes: a key names contents, so nothing may change
    assert (near.writes, far.writes) == (8, 9)
    assert near.blocks[store.form, KEYS[0]] == far.blocks[store.form, KEYS[0]]
    far.refuse = True
    handle = store.save(source, [9], [key_of(9)], priority="urgent")
    with pytest.raises(TransferError):
        handle.synchronize(LIMIT)
    assert not handle.landed.any()
    assert store.lookup([key_of(9)]) == 1


def test_a_block_is_stored_the_second_time_it_is_offered(opened: Any, tmp_path: Path) -> None:
    """The first time is not an error and moves nothing, whichever folder it would go to. Nothing
    has landed then."""
    source = cache()
    size = small_form().image_bytes
    folders = [tmp_path / str(i) for i in range(2)]
    disk = Disk(*folders, capacity=20 * size, admit="second", io="threads")
    store = opened(tiers=[disk])
    first = store.save(source, range(3), KEYS[:3])
    first.synchronize(LIMIT)
    assert not first.landed.any()
    assert store.lookup(KEYS) == 0
    assert not store.graph.trace.ran
    second = store.save(source, range(2, 8), KEYS[2:])
    second.synchronize(LIMIT)
    assert second.landed.tolist() == [True] + [False] * 5
    assert store.lookup(KEYS[2:]) == 1
    saved(store, source)
    assert store.lookup(KEYS) == 8


@pytest.mark.parametrize("full", ["drop", "wait"])
def test_a_save_without_room_is_dropped_or_waits(opened: Any, full: str) -> None:
    """Fault 59: all rows are out."""
    source = cache()
    tier = FakeTier()
    go = threading.Event()
    store = opened(tiers=[tier], staging=2, full=full)
    tier.hold = go
    first = store.save(source, [0], KEYS[:1], priority="urgent")
    second = store.save(source, [1], KEYS[1:2], priority="urgent")
    if full == "drop":
        with pytest.raises(TransferError):
            second.synchronize(LIMIT)
    else:
        with pytest.raises(TransferTimeout):
            second.synchronize(0.05)
    go.set()
    first.synchronize(LIMIT)
    if full == "wait":
        second.synchronize(LIMIT)
    assert second.landed.all() == (full == "wait")


def test_a_read_that_hangs_costs_its_caller_alone(opened: Any) -> None:
    """Fault 26: the deadline ends its load; its row stays out; others go on."""
    source = cache()
    target = cache(seed=50)
    tier = FakeTier()
    go = threading.Event()
    store = opened(tiers=[tier], staging=4)
    saved(store, source)
    tier.faults = {KEYS[0]: [lambda: go.wait(LIMIT)]}
    before = tokens_of(target, [0])
    hangs = store.load(target, [0], KEYS[:1], deadline=0.1)
    with pytest.raises(TransferTimeout):
        hangs.synchronize(0.01)
    with pytest.raises(TransferError):
        hangs.synchronize(LIMIT)
    assert counts_of(store.rows)["lent"] == 1
    assert not hangs.landed.any()
    store.load(target, range(1, 8), KEYS[1:]).synchronize(LIMIT)
    assert same(source, range(1, 8), target, range(1, 8))
    go.set()
    assert (tokens_of(target, [0]) == before).all()
    stuck = threading.Event()
    tier.faults = {KEYS[1]: [stuck.wait]}
    store.load(target, [1], KEYS[1:2])
    with pytest.raises(TransferTimeout, match="1 transfers"):
        store.close(0.05)
    stuck.set()


def test_close_lets_saves_end_and_refuses_more(opened: Any) -> None:
    """Fault 15; a save that hangs keeps the tier open until it ended, and is reported."""
    source = cache()
    tier = FakeTier()
    go = threading.Event()
    store = opened(tiers=[tier], staging=2)
    tier.hold = go
    handle = store.save(source, range(8), KEYS)
    with pytest.raises(TransferTimeout):
        store.close(0.05)
    assert not tier.closed
    go.set()
    store.close(LIMIT)
    assert [tier.closed] == [1]
    with pytest.raises(TransferCancelled):
        handle.synchronize(LIMIT)
    assert 0 < handle.landed.sum() == len(tier.blocks) < 8
    quick = opened(host=8)
    handle = quick.save(source, range(8), KEYS)
    quick.close(LIMIT)
    assert handle.landed.all()
    for ask in (quick.lookup, quick.prefetch):
        with pytest.raises(StoreError, match="closed"):
            ask(KEYS)


@pytest.mark.parametrize("how", ["cancel", "deadline", "cancel before"])
def test_a_save_goes_on_for_the_other_that_joined_it(opened: Any, how: str) -> None:
    """The first one is cancelled or late, and the second one ends well."""
    source = cache()
    tier = FakeTier()
    far = FakeTier("far", width=1)
    go = Event()
    store = opened(tiers=[tier, far], staging=16 if how == "cancel before" else 4)
    tier.hold = far.hold = go
    first = store.save(
        source, range(8), KEYS, priority="urgent", deadline=0.2 if how == "deadline" else None
    )
    if how == "cancel before":
        queues = store.graph.queues
        while len(queues["fake:x"].running) < 2 or not queues["far:x"].running:
            time.sleep(0.01)
        assert first.cancel()
    second = store.save(source, range(8), KEYS, priority="urgent")
    if how == "cancel":
        assert not first.cancel()
    elif how == "deadline":
        with pytest.raises(TransferTimeout):
            first.synchronize(0.4)
    go.set()
    second.synchronize(LIMIT)
    assert second.landed.all()
    assert len(tier.blocks) == len(far.blocks) == 8


def test_a_load_joins_a_save_that_waits_for_staging(opened: Any) -> None:
    source = cache()
    target = cache(seed=50)
    tier = FakeTier()
    go = threading.Event()
    store = opened(tiers=[tier], staging=2, full="drop")
    tier.hold = go
    first = store.save(source, [0], KEYS[:1], priority="urgent")
    second = store.save(source, [1], KEYS[1:2], priority="normal", full="wait")
    loaded = store.load(target, [1], KEYS[1:2])
    third = store.save(source, [2], KEYS[2:3], priority="normal")
    with pytest.raises(TransferTimeout):
        loaded.synchronize(0.2)
    go.set()
    for handle in (loaded, first, second):
        handle.synchronize(LIMIT)
    assert same(source, [1], target, [1])
    with pytest.raises(TransferError, match="staging was full"):
        third.synchronize(LIMIT)


def test_nobody_joins_a_read_that_was_given_up(opened: Any) -> None:
    """Its load was cancelled, and it has to stop: another load reads independently."""
    source = cache()
    target = cache(seed=50)
    tier = FakeTier()
    stopped = Event()
    go = Event()
    store = opened(tiers=[tier])
    saved(store, source)
    begun = Event()
    cancelled = Event()
    tier_store = store._tier_stores[0]
    read = tier_store.read

    def reads(keys: Any, rows: Any, segments: Any, stop: Any, report: Any) -> Any:
        begun.set()
        assert cancelled.wait(LIMIT)
        if not stop():
            return read(keys, rows, segments, stop, report)
        stopped.set()
        go.wait(LIMIT)
        return [False] * len(keys)

    tier_store.read = reads
    first = store.load(cache(), [3], KEYS[:1])
    assert begun.wait(LIMIT)
    assert first.cancel()
    cancelled.set()
    assert stopped.wait(LIMIT)
    second = store.load(target, [3], KEYS[:1])
    go.set()
    second.synchronize(LIMIT)
    assert same(source, [0], target, [3])


def test_a_prefix_outlives_its_suffix(opened: Any, tmp_path: Path) -> None:
    """A long save is of many nodes: its head is the newest of them on disk, and used last."""
    source = cache()
    target = cache(seed=50)
    form = small_form()

    def make(slots: int) -> BlockStore:
        disk = Disk(tmp_path, capacity=slots * form.image_bytes, io="threads")
        return cast(BlockStore, opened(tiers=[disk], staging=2, host=4))

    store = make(8)
    saved(store, source)
    tier_store: Any = store._tier_stores[0]
    assert tier_store.parts[0].by_use() == KEYS[::-1]
    assert [store.rows.has(form.digest + key) for key in KEYS] == [True] * 4 + [False] * 4
    store.close()
    (tmp_path / form.name / "order").unlink()  # as after a kill: then the records tell the order
    store = make(8)
    saved(store, source, [8, 9], [key_of(8), key_of(9)])
    assert store.lookup(KEYS) == 6
    loaded = store.load(target, range(8), KEYS, missing="skip")
    loaded.synchronize(LIMIT)
    assert loaded.landed.tolist() == [True] * 6 + [False] * 2


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("older", [False, True])
def test_a_save_of_more_than_a_tier_holds_leaves_its_beginning(
    opened: Any, tmp_path: Path, where: str, older: bool
) -> None:
    """Older blocks go first, except for blocks of the same call that are there already."""
    source = cache(20)
    keys = [key_of(i) for i in range(20)]
    form = small_form()
    disk = Disk(tmp_path, capacity=10 * form.image_bytes, io="threads", workers=1)
    terms: Any = {"tiers": [disk]} if where == "disk" else {"host": 10}
    store = opened(**terms)
    if older:
        saved(store, source, range(5), keys[:5])
        saved(store, cache(), range(5), [key_of(i) for i in range(90, 95)])
    handle = store.save(source, range(20), keys)
    assert end_of_handle(handle).wait(LIMIT)
    assert handle.landed.tolist() == [i < 10 for i in range(20)]
    assert store.lookup(keys) == 10
    saved(store, source, [11], [key_of(99)])  # of another call: it takes the end's place
    assert (store.lookup(keys), store.lookup([key_of(99)])) == (9, 1)


def test_a_load_of_more_than_the_host_tier_holds_leaves_its_beginning_there(opened: Any) -> None:
    """Chunks end in any order, and blocks are used once a load or prefetch ends, the first last. No
    block goes before the blocks that follow it."""
    source = cache(20)
    keys = [key_of(i) for i in range(20)]
    tier = FakeTier()
    go = Event()
    saved(opened(tiers=[tier]), source, range(20), keys)
    store = opened(tiers=[tier], host=10)
    names = [small_form().digest + key for key in keys]
    tier.faults = {keys[0]: [lambda: go.wait(LIMIT)]}
    handle = store.load(cache(20, seed=50), range(20), keys)
    while counts_of(store.rows)["kept"] < 10:
        time.sleep(0.01)
    go.set()
    handle.synchronize(LIMIT)
    assert store.rows.chains.by_use() == names[9::-1]
    store.load(cache(20, seed=50), range(4, 20), keys[4:]).synchronize(LIMIT)
    assert store.rows.chains.by_use() == names[3::-1] + names[9:3:-1]
    reads = len(tier.reads)
    store.prefetch(keys[:4]).synchronize(LIMIT)
    assert len(tier.reads) == reads, "the beginning is still there"


FOR_EVER: Any = {"read_timeout": "86400s"}


@pytest.mark.parametrize("cached", [0, 3])
def test_a_lookup_does_not_wait_for_a_store_that_is_dead(opened: Any, cached: int) -> None:
    """Near blocks count, and blocks without an answer count as missing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/kv"
        far = remote.Remote(address, client_options=FOR_EVER, retry_config=NO_RETRY)
        store = opened(host=4, tiers=[far])
        for row in range(cached):
            (item,) = store.rows.take(1, Want(store.rows.row_bytes, False))
            assert store.rows.keep([item], [store.form.digest + KEYS[row]], [0]) == [True]
        for keys in (KEYS, KEYS[: cached + 1]):
            assert store.lookup(keys, timeout=0.2) == cached
    for timeout in (float("nan"), -1):
        with pytest.raises(InvalidTerms, match="Expected timeout to be a number of seconds"):
            store.lookup(KEYS, timeout=timeout)


def test_a_store_is_closed_at_the_end_of_its_context(opened: Any) -> None:
    tier = FakeTier()
    with opened(tiers=[tier]) as store:
        saved(store, cache())
    assert tier.closed == 1
    with pytest.raises(StoreError, match="closed"):
        store.lookup(KEYS)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["save", "load"])
def test_close_knows_each_transfer_of_a_block(opened: Any, kind: str, shared: bool) -> None:
    """Fault 15. One hangs and was cancelled, the next one of the same block ended: tiers stay open,
    as what hangs would go on in a file that was opened since."""
    view = cache()
    tier = FakeTier()
    go = Event()
    begun = Event()
    store = opened(tiers=[tier], graph=Graph() if shared else None)
    if kind == "load":
        saved(store, view)
    move = store.load if kind == "load" else store.save

    def hang(*_: Any) -> bool:
        begun.set()
        return go.wait(LIMIT)

    tier.faults = {KEYS[0]: [hang]}
    tier.hold = SimpleNamespace(wait=hang)
    first = move(view, [0], KEYS[:1], priority="urgent")
    assert begun.wait(LIMIT)
    first.cancel()
    tier.hold = None
    move(view, [1], KEYS[:1], priority="urgent").synchronize(LIMIT)
    with pytest.raises(TransferTimeout, match="1 transfers"):
        store.close(0.05)
    closed = tier.closed
    go.set()
    store.close(LIMIT)
    assert [closed, tier.closed] == [0, 1]


def many_blocks(folder: Path, io: Any) -> tuple[BlockStore, KVView, list[bytes]]:
    """Return a store on disk with room for the blocks of a view, and their keys."""
    view = cache(128)
    form = BlockForm.of(view, model="m")
    keys = [key_of(i) for i in range(128)]
    tier = Disk(folder, capacity=128 * form.image_bytes, io=io)
    store = BlockStore(form, staging=128 * form.image_bytes, tiers=[tier], full="wait")
    return store, view, keys


@pytest.mark.parametrize("io", ["ring", pytest.param("threads", marks=pytest.mark.full)])
def test_a_process_that_ends_while_it_reads_loses_no_block(tmp_path: Path, io: str) -> None:
    """Fault 14. The interpreter ends without `close`; what was saved is there afterwards."""
    text = """if True:
        import os, sys, time
        from test_store import many_blocks
        store, view, keys = many_blocks(*sys.argv[1:])
        print(store.lookup(keys))
        begun = [store.load(view, [i], keys[i : i + 1]) for i in range(128)]
        time.sleep(0.01)
    """
    try:
        store, view, keys = many_blocks(tmp_path, io)
    except StoreError as error:
        pytest.skip(str(error))
    store.save(view, range(128), keys).synchronize(LIMIT)
    store.close()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = ready.run("-c", text, tmp_path, io, env=env, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "128\n", "")
    store, *_ = many_blocks(tmp_path, io)
    assert sum(store.lookup([key]) for key in keys) == 128
    store.close()


def test_a_load_that_nobody_waits_for_does_not_fail_close(opened: Any) -> None:
    """Its graph is shared, its read has begun, its deadline has passed; close waits for it."""
    source = cache()
    tier = FakeTier()
    go = threading.Event()
    graph = Graph()
    store = opened(tiers=[tier], graph=graph)
    saved(store, source)
    tier.faults = {KEYS[0]: [lambda: go.wait(LIMIT)]}
    late = store.load(cache(seed=50), [0], KEYS[:1], deadline=0.05, missing="skip")
    late.synchronize(LIMIT)
    threading.Timer(0.2, go.set).start()
    store.close(LIMIT)
    assert tier.closed == 1
    refused = opened(tiers=[tier], graph=graph)
    assert graph.close(LIMIT)
    with pytest.raises(StoreError, match="closed"):
        refused.load(source, range(8), KEYS)


def test_close_does_not_wait_for_a_prefetch(opened: Any) -> None:
    source = cache()
    tier = FakeTier()
    calls = list[bool]()
    begun = Event()
    saved(opened(tiers=[tier]), source)
    store = opened(tiers=[tier], host=4)
    tier_store = store._tier_stores[0]

    def hangs(keys: Any, rows: Any, segments: Any, stop: Any, report: Any) -> Any:
        begun.set()
        while not stop():
            time.sleep(0.01)
        calls.append(True)
        return [False] * len(keys)

    tier_store.read = hangs
    store.prefetch([KEYS[0]])
    assert begun.wait(LIMIT)
    store.close(LIMIT)
    assert calls == [True]


def test_ctrl_c_in_synchronize_leaves_the_transfer(opened: Any) -> None:
    """Fault 16."""
    source = cache()
    target = cache(seed=50)
    tier = FakeTier()
    go = threading.Event()
    store = opened(tiers=[tier])
    saved(store, source)
    tier.faults = {KEYS[0]: [lambda: go.wait(LIMIT)]}
    handle = store.load(target, range(8), KEYS)
    with interrupting(type(handle).synchronize), pytest.raises(KeyboardInterrupt):
        handle.synchronize(LIMIT)
    go.set()
    handle.synchronize(LIMIT)
    assert same(source, range(8), target, range(8))


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_a_load_is_planned_leaves_nothing(opened: Any) -> None:
    """Fault 16: no call waits for reads that never begin."""
    source = cache()
    target = cache(seed=50)
    tier = FakeTier()
    store = opened(tiers=[tier])
    saved(store, source)
    tier_store: Any = store._tier_stores[0]
    tier_store.touch = lambda keys: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        store.load(target, range(8), KEYS)
    tier_store.touch = lambda keys: None
    store.load(target, range(8), KEYS).synchronize(LIMIT)
    assert same(source, range(8), target, range(8))


def test_cancel_leaves_the_rest(opened: Any) -> None:
    source = cache()
    target = cache(seed=50)
    tier = FakeTier(width=1)
    go = threading.Event()
    store = opened(tiers=[tier], staging=2)
    saved(store, source)
    tier.faults = {KEYS[0]: [lambda: go.wait(LIMIT)]}
    before = tokens_of(target, range(8))
    handle = store.load(target, range(8), KEYS)
    assert handle.cancel()
    assert handle.cancelled
    go.set()
    with pytest.raises(TransferCancelled):
        handle.synchronize(LIMIT)
    assert not handle.landed.any()
    assert (tokens_of(target, range(8)) == before).all()
    store.load(target, range(8), KEYS).synchronize(LIMIT)
    assert same(source, range(8), target, range(8))


# --- parts, layers, prefetch ---


def ranks(
    view: KVView, count: int, by: str, model: str = "org/model@1"
) -> list[tuple[BlockForm, KVView]]:
    """Return the forms and views of ranks that each hold an equal part of layers or heads."""
    result = []
    for rank in range(count):
        of = view.layers if by == "layers" else view.heads
        cut = slice(rank * of // count, (rank + 1) * of // count)
        part = view.slice(layers=cut) if by == "layers" else view.slice(heads=cut)
        one = KVView(
            [
                x[:, :, :, cut if by == "heads" else slice(None)].clone()
                for x in view.tensors[cut if by == "layers" else slice(None)]
            ],
            "layer | block kv token head dim",
        )
        assert (one.layers, one.heads) == (part.layers, part.heads)
        ranges: Any = {by: (cut.start, cut.stop, of)}
        result.append((BlockForm.of(one, model, **ranges), one))
    return result


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("by", ["layers", "heads"])
@pytest.mark.parametrize(("writers", "readers"), [(1, 4), (4, 1), (2, 4), (4, 2)])
def test_ranks_of_another_size_load_what_others_saved(
    opened: Any, by: str, writers: int, readers: int, remote: bool
) -> None:
    whole = cache(layers=4, heads=4)
    tier = FakeTier("remote" if remote else "fake")
    for form, view in ranks(whole, writers, by):
        saved(opened(form, tiers=[tier]), view)
    for (form, target), (_, source) in zip(
        ranks(cache(layers=4, heads=4, seed=90), readers, by),
        ranks(whole, readers, by),
        strict=True,
    ):
        store = opened(form, tiers=[tier], host=3)
        assert store.lookup(KEYS) == 8
        loaded = store.load(target, range(8), KEYS, by_layer=readers == 1)
        loaded.synchronize(LIMIT)
        assert same(source, range(8), target, range(8))
        store.load(target, range(2, 10), KEYS).synchronize(LIMIT)  # of host rows in part
        assert same(source, range(8), target, range(2, 10))


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("by", ["layers", "heads"])
@pytest.mark.parametrize(
    "model", [f"m{n}" for n in range(8)]
)  # their forms' digests have any order
def test_two_splits_of_one_axis_are_read_beside_each_other(
    opened: Any, model: str, by: str, far: bool
) -> None:
    """Fault 62: each block by the parts that have it, of one split or of several."""
    whole, target = (cache(layers=12, heads=12, seed=n) for n in (0, 50))
    tier = FakeTier("remote" if far else "fake")
    # A block that two ranks have, one that four, of which the last two do not know the first; a
    # half and two quarters; a half and two thirds, which overlap; and two that are not whole.
    has = {2: ["xx", "", "x.", "x.", "x.", ".x"], 4: ["", "xxxx", ".xxx", "", "", "x.xx"]}
    has[3] = ["", "", "", ".xx", "x.x", ""]
    for count, parts_of_blocks in has.items():
        for n, (form, view) in enumerate(ranks(whole, count, by, model)):
            some = [i for i, parts in enumerate(parts_of_blocks) if parts[n : n + 1] == "x"]
            saved(opened(form, tiers=[tier]), view, some, [KEYS[i] for i in some])
    store = opened(BlockForm.of(whole, model), tiers=[tier], staging=9)
    assert [store.lookup([key]) for key in KEYS[:6]] == [1, 1, 1, 1, 0, 0]
    assert store.lookup(KEYS) == 4
    loaded = store.load(target, range(6), KEYS[:6], missing="skip", by_layer=True)
    loaded.synchronize(LIMIT)
    assert loaded.landed.tolist() == [True] * 4 + [False] * 2
    assert same(whole, range(4), target, range(4))


def test_a_part_that_is_missing_is_a_miss_for_that_block_alone(opened: Any) -> None:
    """Fault 62."""
    whole = cache(heads=4)
    target = cache(heads=4, seed=50)
    tier = FakeTier()
    forms = []
    for form, view in ranks(whole, 4, "heads"):
        forms.append(form)
        saved(opened(form, tiers=[tier]), view)
    del tier.blocks[forms[2], KEYS[5]]
    tier.faults = {KEYS[1]: ["flip"]}  # in the part that is read first
    store = opened(small_form(heads=4), tiers=[tier])
    before = tokens_of(target, [5])
    loaded = store.load(target, range(8), KEYS, missing="skip")
    loaded.synchronize(LIMIT)
    assert loaded.landed.tolist() == [i not in (1, 5) for i in range(8)]
    assert same(whole, [0, 2, 3, 4, 6, 7], target, [0, 2, 3, 4, 6, 7])
    assert (tokens_of(target, [5]) == before).all()


BIG = {"layers": 8, "heads": 8, "size": 64}  # 64 KiB a layer: segments of four layers


@pytest.mark.parametrize("big", [True, False])
def test_layers_end_one_behind_the_other(opened: Any, big: bool) -> None:
    """Each layer is verified before it is passed on; with one segment only its upload is cut."""
    shape: Any = BIG if big else {}
    source = cache(4, **shape)
    target = cache(4, seed=50, **shape)
    tier = FakeTier(width=1)
    go = threading.Event()
    form = BlockForm.of(source, "org/model@1")
    assert len(form.segments) == (2 if big else 1)
    store = opened(form, tiers=[tier], staging=4)
    saved(store, source, range(2), KEYS[:2])
    reads = 4 if big else 2
    tier.faults = {KEYS[1]: [None, lambda: go.wait(LIMIT)]} if big else {}
    loaded = store.load(target, range(2), KEYS[:2], by_layer=True)
    assert len(loaded.layers) == source.layers
    loaded.layers[0].synchronize(LIMIT)
    if big:
        assert same_layers(source, target, range(4))
        assert not loaded.layers[4].done()
        go.set()
    loaded.synchronize(LIMIT)
    assert all(layer.done() for layer in loaded.layers)
    assert len(tier.reads) == reads
    assert same(source, range(2), target, range(2))
    assert ("2 segments" if big else "as a whole") in store.explain()


def same_layers(one: KVView, other: KVView, layers: Any) -> bool:
    return all(
        torch.equal(one.tensors[i][:2].view(torch.uint8), other.tensors[i][:2].view(torch.uint8))
        for i in layers
    )


def test_a_whole_load_joins_one_by_layer_and_the_other_way(opened: Any) -> None:
    source = cache(4, **BIG)
    tier = FakeTier()
    store = opened(BlockForm.of(source, "org/model@1"), tiers=[tier], staging=4, host=2)
    saved(store, source, range(2), KEYS[:2])
    for first in (True, False):
        for key in KEYS[:2]:
            store.rows.index.pop(key, None)
        targets = [cache(4, seed=50 + i, **BIG) for i in range(2)]
        handles = [
            store.load(x, range(2), KEYS[:2], by_layer=(i == 0) == first)
            for i, x in enumerate(targets)
        ]
        for handle, target in zip(handles, targets, strict=True):
            handle.synchronize(LIMIT)
            assert same(source, range(2), target, range(2))


@pytest.mark.parametrize("staging", [2, 5, 8])
def test_a_load_by_layer_that_staging_cannot_hold_at_once(opened: Any, staging: int) -> None:
    """Its first layers do not wait for the last ones."""
    shape: Any = {"layers": 4, "heads": 8, "size": 128}  # a segment for each two layers
    source = cache(12, **shape)
    target = cache(12, seed=50, **shape)
    tier = FakeTier(width=1)
    store = opened(BlockForm.of(source, "org/model@1"), tiers=[tier], staging=staging)
    saved(store, source)
    store.load(target, range(8), KEYS, by_layer=True).synchronize(LIMIT)
    assert [segment for _, segment in tier.reads] == [[0]] * 8 + [[1]] * 8
    again = opened(store.form, tiers=[tier], staging=staging, host=2)
    go = Event()
    other = cache(12, seed=70, **shape)
    names = [store.form.digest + key for key in KEYS]
    tier.faults = {KEYS[0]: [lambda: go.wait(LIMIT)]}
    handles = [again.load(target, range(8), KEYS, by_layer=True), again.load(other, range(8), KEYS)]
    go.set()
    for handle in handles:
        handle.synchronize(LIMIT)
    assert same(source, range(8), other, range(8)), "it reads on its own if it has to"
    assert counts_of(again.rows)["kept"] == sum(map(again.rows.has, names)) == 2, "whole blocks"
    assert same(source, range(8), target, range(8))


def test_prefetched_blocks_are_loaded_without_the_tier(opened: Any) -> None:
    """Blocks that are prefetched and not yet used take half of the host tier."""
    source = cache()
    target = cache(seed=50)
    tier = FakeTier()
    saved(opened(tiers=[tier]), source)
    store = opened(tiers=[tier], host=8)
    handle = store.prefetch(KEYS, priority="urgent")
    handle.synchronize(LIMIT)
    assert handle.landed.tolist() == [True] * 4 + [False] * 4
    assert counts_of(store.rows)["kept"] == 4
    tier.reads.clear()
    store.load(target, range(4), KEYS[:4]).synchronize(LIMIT)
    assert not tier.reads
    assert same(source, range(4), target, range(4))
    again = store.prefetch(KEYS[:4])
    again.synchronize(LIMIT)
    assert again.landed.all()
    assert not tier.reads
    with pytest.raises(StoreError, match="host tier"):
        opened(tiers=[tier]).prefetch(KEYS)


# --- what is refused ---


@pytest.mark.parametrize(
    ("blocks", "keys", "error", "says"),
    [
        (range(2), [b"short", key_of(1)], InvalidTerms, r"got 5 bytes as keys\[0\]"),
        (range(2), [b"x" * 33, key_of(1)], InvalidTerms, "33 bytes"),
        (range(2), [key_of(1), key_of(1)], InvalidTerms, r"keys\[1\] equal to keys\[0\]"),
        (range(2), KEYS, InvalidTerms, "Expected blocks to be 8 ids, .* 8 keys of 4, got 2"),
        ([0, 12], KEYS[:2], SlotError, "ids from 0 to 11, .* got 12 at position 1"),
        (range(3), KEYS[:2], InvalidTerms, "Expected blocks to be 2 ids, .* got 3"),
        (None, KEYS[:2], InvalidTerms, "Expected blocks to be ids of the view's .* got None"),
        ([0.5, 1.0], KEYS[:2], SlotError, r"whole numbers .* got 0\.5"),
    ],
)
@pytest.mark.parametrize("call", ["save", "load"])
def test_keys_and_blocks_that_fit_no_call(
    opened: Any, call: str, blocks: Any, keys: Any, error: Any, says: str
) -> None:
    """Fault 63: wrong lengths, duplicates, more keys than blocks; nothing is moved."""
    view = cache()
    store = opened(host=8)
    before = tokens_of(view, range(12))
    with pytest.raises(error, match=says):
        getattr(store, call)(view, blocks, keys)
    assert (tokens_of(view, range(12)) == before).all()
    assert counts_of(store.rows)["free"] == 16


def test_what_a_store_refuses(opened: Any, tmp_path: Path) -> None:
    view = cache()
    store = opened(host=2)
    with pytest.raises(SlotError, match=r"^Expected blocks to name each block once, got 3 at"):
        store.load(view, [3, 3], KEYS[:2])  # Fault 63: two blocks would meet
    for other, error in (
        (cache(heads=3), LayoutError),
        (cache(layers=3), LayoutError),
        ("view", LayoutError),
    ):
        with pytest.raises(error):
            store.load(other, [0], KEYS[:1])
    chunk = KVView(
        torch.zeros(2, 4, 8, 64, dtype=torch.float16), "kv layer token (head dim)", heads=2
    )
    with pytest.raises(LayoutError, match="paged"):
        store.save(chunk, [0], KEYS[:1])
    wrong = KVView(
        [x.view(torch.bfloat16) for x in view.tensors], "layer | block kv token head dim"
    )
    with pytest.raises(LayoutError):
        store.save(wrong, [0], KEYS[:1])
    with pytest.raises(InvalidTerms, match="priority"):
        store.lookup(KEYS) or store.prefetch(KEYS, priority="high")
    with pytest.raises(InvalidTerms, match="missing"):
        store.load(view, [0], KEYS[:1], missing="hide")
    for later in ("soon", float("nan"), -1, True):
        with pytest.raises(InvalidTerms, match="Expected deadline to be a number of seconds"):
            store.load(view, [0], KEYS[:1], deadline=later)
    form = small_form()
    size = small_form().image_bytes
    wrong_terms: list[dict[str, Any]] = [
        {"full": "grow"},
        {"tiers": FakeTier()},
        {"form": view},
        {"staging": "1 GB"},
        {"host": None},
        {"tiers": ["s3://bucket"]},
        {"graph": 3},
        {"weak_keys": 1},
    ]
    for terms in wrong_terms:
        with pytest.raises(InvalidTerms, match=rf"Expected {next(iter(terms))}\b"):
            BlockStore(**{"form": form, "staging": size, "host": size, **terms})
    assert BlockStore(form, staging=2.5 * size, host=1e5).rows.staging == 2  # type: ignore[arg-type]
    for rows in ({"staging": 0, "host": 4}, {"host": 0, "staging": 4}):
        with pytest.raises(StoreError, match=rf"Expected {next(iter(rows))} .* block of \d+ bytes"):
            opened(**rows)
    odd: Any
    for odd in ({"host": -1, "tiers": [FakeTier()]}, {"staging": float("inf"), "host": 4}):
        with pytest.raises(InvalidTerms, match=f"Expected {next(iter(odd))} to be"):
            opened(**odd)
    assert opened(host=1, weak_keys=True).lookup([b"weak"]) == 0


def tier_stores(disk: DiskStore, far: RemoteStore, fake: FakeStore) -> list[TierStore]:
    return [disk, far, fake]


def test_a_tier_that_cannot_be_opened_closes_the_others() -> None:
    first = FakeTier()
    second = FakeTier()
    form = small_form()
    second.open = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        BlockStore(form, staging=form.image_bytes, tiers=[first, second])
    assert first.closed == 1


def test_what_can_be_seen(opened: Any, tmp_path: Path) -> None:
    source = cache()
    tier = FakeTier()
    store = opened(tiers=[tier], host=2, graph=(graph := Graph()))
    saved(store, source)
    store.load(source, range(8), KEYS).synchronize(LIMIT)
    statistics = store.statistics()
    assert statistics["tiers"][0]["blocks"] == 8
    json.dumps(statistics)
    registry = CollectorRegistry()
    registry.register(Collector(store))
    text = generate_latest(registry).decode()
    size = store.form.image_bytes
    assert f'portakv_staging_bytes{{state="kept"}} {2.0 * size}' in text
    assert 'portakv_tier_blocks_total{op="load",result="hit",tier="host"} 2.0' in text
    store.trace(str(tmp_path / "run.json"))
    names = {x["name"] for x in json.loads((tmp_path / "run.json").read_text())["traceEvents"]}
    assert {"save", "load"} <= names
    assert "fake " in store.explain()
    assert "a dict of bytes" in store.explain()
    store.close()
    assert graph.close(LIMIT)


def test_a_forked_child_is_refused(opened: Any) -> None:
    """Fault 13, and it may close the store and end, which changes nothing for its parent."""
    source = cache()
    target = cache(seed=50)
    store = opened(host=8)
    saved(store, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that threads run
        child = os.fork()
    if not child:
        refused = 0
        for ask in (store.lookup, store.prefetch, lambda x: store.load(target, range(8), x)):
            try:
                ask(KEYS)
            except StoreError:
                refused += 1
        store.close()
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    store.load(target, range(8), KEYS).synchronize(LIMIT)
    assert same(source, range(8), target, range(8))


# --- devices ---


def test_a_save_waits_for_the_kernel_that_writes_the_blocks(
    opened: Any, accelerator: torch.device
) -> None:
    """Fault 61: the copy is ordered after the work of the caller's stream, which is late."""
    fresh = cache()
    target = cache(seed=50)
    tier = FakeTier()
    on_device = KVView(
        [torch.zeros_like(x, device=accelerator) for x in fresh.tensors],
        "layer | block kv token head dim",
    )
    sent = [x.to(accelerator) for x in fresh.tensors]
    torch.accelerator.synchronize(accelerator)
    store = opened(tiers=[tier], host=4)
    store.load(on_device, [0], KEYS[:1], missing="skip").synchronize(LIMIT)  # what is prepared once
    delay(current(accelerator))
    for dst, src in zip(on_device.tensors, sent, strict=True):
        dst.copy_(src)
    saved(store, on_device)
    store.load(target, range(8), KEYS).synchronize(LIMIT)
    assert same(fresh, range(8), target, range(8))


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_load_waits_for_what_reads_the_blocks(
    opened: Any, accelerator: torch.device, by_layer: bool
) -> None:
    source = cache()
    tier = FakeTier()
    store = opened(tiers=[tier], host=4)
    saved(store, source)
    target = KVView(
        [x.to(accelerator) for x in cache(seed=50).tensors], "layer | block kv token head dim"
    )
    torch.accelerator.synchronize(accelerator)
    before = tokens_of(target, range(12))
    delay(current(accelerator))
    copies = [x.clone() for x in target.tensors]
    loaded = store.load(target, torch.arange(8), KEYS, by_layer=by_layer)
    loaded.wait()
    after = tokens_of(target, range(8))
    assert (after == tokens_of(source, range(8))).all()
    read = KVView(copies, "layer | block kv token head dim")
    assert (tokens_of(read, range(12)) == before).all()


@pytest.mark.gpu
def test_inside_graph_capture_nothing_is_moved(opened: Any) -> None:
    device = torch.device("cuda", 0)
    store = opened(host=2)
    view = KVView([x.to(device) for x in cache().tensors], "layer | block kv token head dim")
    for call in (store.save, store.load):
        with (
            pytest.raises(Unsupported, match="graph capture"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            call(view, [0], KEYS[:1])


def test_blocks_belong_to_a_load_until_its_end(opened: Any) -> None:
    """Fault 60. It is written there; blocks that lie at one address are refused."""
    assert "belong to a load until its end" in str(BlockStore.__doc__)
    store = opened(host=2)
    once = torch.zeros(1, 2, 4, 2, 32, dtype=torch.float16)
    twice = KVView([once.expand(3, -1, -1, -1, -1)] * 4, "layer | block kv token head dim")
    with pytest.raises(LayoutError):
        store.load(twice, [0, 1], KEYS[:2])
