# SPDX-License-Identifier: Apache-2.0
"""PortaKV's connector and copies on the simulated device: what they wait for, and what waits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.device_cases import check_caches, check_chunk, gathered, host_bytes, scattered
from support.guarded_memory import check_sentence
from support.simdev_cases import (
    DEVICE,
    HEADS,
    IDS,
    NAME,
    OTHER,
    SIZE,
    current,
    differ,
    fresh_caches,
    make_caches,
    make_chunk,
    on,
    produce,
)

from portakv import (
    AdaptiveConnector,
    DeviceMismatch,
    Index,
    KVView,
    SlotError,
    copy_blocks,
    copy_rows,
)
from portakv.copy import enqueue
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

REPEATS = 100
KV_LAYOUT = "layer | kv block token head dim"
CHUNK_LAYOUT = "kv layer token (head dim)"


@pytest.fixture(params=[DEVICE, OTHER], ids=["first device", "second device"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def connector(device: torch.device) -> AdaptiveConnector:
    return AdaptiveConnector(device)


@pytest.fixture(autouse=True)
def _no_faults_left() -> Any:
    yield
    torch.accelerator.synchronize(DEVICE)
    torch.accelerator.synchronize(OTHER)
    assert not simdev.take_faults()


def test_the_registry_chooses_for_it() -> None:
    connector = AdaptiveConnector(NAME)
    assert connector.device == DEVICE
    assert f"{NAME}:0" in connector.explain()


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("side", [True, False])
def test_a_store_waits_for_its_producer(
    connector: AdaptiveConnector, device: torch.device, side: bool, place: str
) -> None:
    (caches, fresh), chunk = fresh_caches(device), make_chunk(len(IDS), device)
    wanted = gathered(fresh, chunk, IDS)
    ids = torch.tensor(IDS, device="cpu" if place == "host" else device)
    simdev.delay(current(device), 5)
    produce(caches, fresh)
    stream = torch.Stream(device) if side else None
    transfer = connector.from_gpu(chunk, caches, ids, stream=stream)
    transfer.wait()
    landed = chunk.clone()
    for cache in caches:
        cache.zero_()
    transfer.synchronize()
    assert torch.equal(host_bytes(landed), wanted)
    check_chunk(chunk, wanted)


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("side", [True, False])
def test_a_load_waits_for_its_producer(
    connector: AdaptiveConnector, device: torch.device, side: bool, place: str
) -> None:
    caches, chunk = make_caches(device), make_chunk(len(IDS), device)
    fresh = make_chunk(len(IDS), device)
    back = scattered(caches, fresh, IDS)
    ids = torch.tensor(IDS, device="cpu" if place == "host" else device)
    simdev.delay(current(device), 5)
    chunk.copy_(fresh)
    stream = torch.Stream(device) if side else None
    transfer = connector.to_gpu(chunk, caches, ids, stream=stream)
    transfer.wait()
    chunk.zero_()
    transfer.synchronize()
    check_caches(caches, back)


def _order_without_its_wait(stream: torch.Stream, device: torch.device, placed: Any) -> None:
    """`enqueue._order` with the line that waits taken out: only the allocator is told."""
    src, dst = placed[0].src, placed[0].dst
    tables = [view.table for view in (src, dst) if len(view.origins) > 1]
    indices = [index for move in placed for index in (move.src_index, move.dst_index)]
    ids = [index.ids for index in indices if index.ids is not None]
    for tensor in (*src.owners, *dst.owners, *ids, *tables):
        if tensor.device == device:
            tensor.record_stream(stream)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("ids", ["host", "device"])
@pytest.mark.parametrize("store", [True, False])
def test_without_the_connectors_wait_every_copy_is_wrong(
    connector: AdaptiveConnector,
    device: torch.device,
    store: bool,
    ids: str,
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the wait of `enqueue._order` all of `REPEATS` copies are right, without it none is."""
    if not waits:
        monkeypatch.setattr(enqueue, "_order", _order_without_its_wait)
    caches, chunk = make_caches(device), make_chunk(len(IDS), device)
    connector.register_kv_caches(caches)
    slots = torch.tensor(IDS, device="cpu" if ids == "host" else device)
    wrong = 0
    for repeat in range(REPEATS):
        for tensor in (*caches, chunk):
            tensor.zero_()
        torch.accelerator.synchronize(device)
        for tensor in caches if store else [chunk]:
            tensor.fill_(repeat + 1)
        move = connector.from_gpu if store else connector.to_gpu
        move(chunk, None, slots, stream=torch.Stream(device)).synchronize()
        torch.accelerator.synchronize(device)
        rows = [chunk] if store else [cache.flatten(1, 2)[:, IDS] for cache in caches]
        wrong += any(bool((row.cpu() != repeat + 1).any()) for row in rows)
    assert wrong == (0 if waits else REPEATS)


@pytest.mark.parametrize("store", [True, False])
def test_a_consumer_that_does_not_wait_is_wrong(
    connector: AdaptiveConnector, device: torch.device, store: bool
) -> None:
    """Which shows that the waits of the tests above are what makes them pass."""
    caches, chunk = make_caches(device), make_chunk(len(IDS), device)
    move = connector.from_gpu if store else connector.to_gpu
    target = chunk if store else caches[0]
    before = host_bytes(target)
    torch.accelerator.synchronize(device)
    transfer = move(chunk, caches, IDS, stream=torch.Stream(device))
    early = target.clone()
    assert torch.equal(host_bytes(early), before)
    transfer.wait()
    assert differ(target.clone(), before)


def test_ids_that_are_produced_late(connector: AdaptiveConnector, device: torch.device) -> None:
    caches, chunk = make_caches(device), make_chunk(len(IDS), device)
    wanted = gathered(caches, chunk, IDS)
    fresh = torch.tensor(IDS, device=device)
    ids = torch.zeros(len(IDS), dtype=torch.int64, device=device)
    torch.accelerator.synchronize(device)
    simdev.delay(current(device), 5)
    ids.copy_(fresh)
    connector.from_gpu(chunk, caches, ids, stream=torch.Stream(device)).synchronize()
    check_chunk(chunk, wanted)


def test_a_transfer_on_a_busy_stream_is_not_done(
    connector: AdaptiveConnector, device: torch.device
) -> None:
    caches, chunk = make_caches(device), make_chunk(len(IDS), device)
    wanted = gathered(caches, chunk, IDS)
    side = torch.Stream(device)
    simdev.delay(side, 5)
    transfer = connector.from_gpu(chunk, caches, IDS, stream=side)
    assert not transfer.done()
    transfer.wait()
    assert torch.equal(host_bytes(chunk.clone()), wanted)
    assert transfer.done()


# What is freed right after the call


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("side", [True, False])
def test_a_source_freed_right_after_the_call(
    connector: AdaptiveConnector, device: torch.device, side: bool, keep: bool
) -> None:
    caches, chunk = make_caches(device), make_chunk(len(IDS), device)
    back = scattered(caches, chunk, IDS)
    connector.register_kv_caches(caches)
    stream = torch.Stream(device) if side else None
    transfer: Any = connector.to_gpu(chunk, None, IDS, stream=stream)
    shape = chunk.shape
    del chunk
    if not keep:
        transfer = None
    with on(current(device)):
        junk = [torch.zeros(shape, dtype=torch.float16, device=device) for _ in range(8)]
    torch.accelerator.synchronize(device)
    assert junk
    check_caches(caches, back)
    del transfer


@pytest.mark.parametrize("kind", ["device", "strided", "int32", "host", "negative"])
@pytest.mark.parametrize("keep", [True, False])
def test_ids_freed_right_after_the_call(
    connector: AdaptiveConnector, device: torch.device, kind: str, keep: bool
) -> None:
    slots = [*IDS, -1] if kind == "negative" else IDS
    caches, chunk = make_caches(device), make_chunk(len(slots), device)
    wanted = gathered(caches, chunk, slots)
    connector.register_kv_caches(caches)
    ids = torch.tensor(slots, device="cpu" if kind == "host" else device)
    if kind == "strided":
        ids = torch.stack([ids, ids], dim=1)[:, 0]
    if kind == "int32":
        ids = ids.int()
    transfer: Any = connector.from_gpu(chunk, None, ids, stream=torch.Stream(device))
    del ids
    if not keep:
        transfer = None
    junk = [torch.zeros(n, dtype=torch.int64, device=device) for n in (5, 6, 10, 12)]
    torch.accelerator.synchronize(device)
    assert junk
    check_chunk(chunk, wanted)
    del transfer


def test_without_recording_a_freed_source_is_wrong(
    connector: AdaptiveConnector, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches, chunk = make_caches(device), make_chunk(len(IDS), device)
    back = scattered(caches, chunk, IDS)
    connector.register_kv_caches(caches)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    connector.to_gpu(chunk, None, IDS, stream=torch.Stream(device))
    del chunk
    with pytest.raises(RuntimeError, match="freed"):
        torch.accelerator.synchronize(device)
    assert any(differ(cache, want) for cache, want in zip(caches, back, strict=True))


# The host on one side


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("side", [True, False])
def test_a_store_to_the_host(
    connector: AdaptiveConnector, device: torch.device, side: bool, pinned: bool
) -> None:
    (caches, fresh), chunk = fresh_caches(device), make_chunk(len(IDS), "cpu")
    chunk = chunk.pin_memory() if pinned else chunk
    wanted = gathered(fresh, chunk, IDS)
    simdev.delay(current(device), 5)
    produce(caches, fresh)
    stream = torch.Stream(device) if side else None
    connector.from_gpu(chunk, caches, IDS, stream=stream).synchronize()
    assert torch.equal(host_bytes(chunk), wanted)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("side", [True, False])
def test_a_load_from_the_host(
    connector: AdaptiveConnector, device: torch.device, side: bool, pinned: bool
) -> None:
    caches, fresh = make_caches(device), make_chunk(len(IDS), device)
    chunk = make_chunk(len(IDS), "cpu")
    back = scattered(caches, fresh if pinned else chunk, IDS)
    if pinned:  # still being written when the call comes
        chunk = chunk.pin_memory()
        chunk.copy_(fresh, non_blocking=True)
    stream = torch.Stream(device) if side else None
    connector.to_gpu(chunk, caches, IDS, stream=stream).synchronize()
    check_caches(caches, back)


# Whatever else a device may be asked


def test_rows_and_blocks_between_layouts(device: torch.device) -> None:
    caches, other = make_caches(device), make_caches(device)
    src = KVView(caches, KV_LAYOUT)
    blocks = copy_blocks(src, KVView(other, KV_LAYOUT), [3, 0, 5], [1, 2, 4], backend="reference")
    blocks.synchronize()
    for old, new in zip(caches, other, strict=True):
        assert torch.equal(host_bytes(old)[:, [3, 0, 5]], host_bytes(new)[:, [1, 2, 4]])
    pool = torch.empty(2, len(caches), 12, HEADS, 16, dtype=torch.float16, device=device)
    dst = KVView(pool, "kv layer token head dim")
    copy_rows(src, dst, Index([4, 1, 2], step=SIZE), backend="reference").synchronize()
    for layer, cache in enumerate(caches):
        rows = host_bytes(cache)[:, [4, 1, 2]].flatten(1, 2)
        assert torch.equal(host_bytes(pool)[:, layer], rows)


def test_batches(connector: AdaptiveConnector, device: torch.device) -> None:
    caches, chunks = make_caches(device), [make_chunk(2, device), make_chunk(3, device)]
    wanted = [gathered(caches, c, s) for c, s in zip(chunks, (IDS[:2], IDS[2:]), strict=True)]
    stream = torch.Stream(device)
    connector.batched_from_gpu(chunks, caches, IDS, [0, 2], [2, 5], stream=stream).synchronize()
    for chunk, want in zip(chunks, wanted, strict=True):
        check_chunk(chunk, want)


def test_bad_slots_on_the_device_are_told(
    connector: AdaptiveConnector, device: torch.device
) -> None:
    caches, slots = make_caches(device), [9, 500, 17]
    chunk = make_chunk(3, device)
    wanted = gathered(caches, chunk, slots)
    transfer = connector.from_gpu(chunk, caches, torch.tensor(slots, device=device))
    with pytest.raises(SlotError, match="Position 1"):
        transfer.synchronize()
    check_chunk(chunk, wanted)


def test_a_cache_of_the_other_device_is_refused() -> None:
    with pytest.raises(DeviceMismatch) as caught:
        AdaptiveConnector(DEVICE).register_kv_caches(make_caches(OTHER))
    check_sentence(str(caught.value), f"{NAME}:1", f"{NAME}:0")


def test_threads_with_streams_of_their_own(
    connector: AdaptiveConnector, device: torch.device
) -> None:
    caches = make_caches(device)
    connector.register_kv_caches(caches)
    faults: list[BaseException] = []

    def work(first: int) -> None:
        try:
            slots = [(first + 5 * i) % 24 for i in range(4)]
            ids = torch.tensor(slots, device=device) if first % 2 else slots
            with on(torch.Stream(device)):
                for _ in range(5):
                    chunk = make_chunk(4, device)
                    wanted = gathered(caches, chunk, slots)
                    connector.from_gpu(chunk, None, ids).synchronize()
                    check_chunk(chunk, wanted)
        except BaseException as fault:
            faults.append(fault)

    torch.accelerator.synchronize(device)
    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def test_another_current_device(connector: AdaptiveConnector, device: torch.device) -> None:
    caches, chunk = make_caches(device), make_chunk(len(IDS), device)
    wanted = gathered(caches, chunk, IDS)
    there = OTHER if device == DEVICE else DEVICE
    with torch.get_device_module(NAME).device(there):
        connector.from_gpu(chunk, caches, IDS).synchronize()
        connector.from_gpu(chunk, caches, torch.tensor(IDS, device=device)).synchronize()
    check_chunk(chunk, wanted)
