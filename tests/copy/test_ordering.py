# SPDX-License-Identifier: Apache-2.0
"""What a connector's copy waits for, what waits for it, and what may be freed meanwhile.

Where waiting is what a test is about, the simulated device shows that without it bytes are wrong.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import no_wait, simdev_cases
from support.device_cases import (
    CHUNK_LAYOUT,
    HEADS,
    KV_LAYOUT,
    check_caches,
    check_chunk,
    current,
    delay,
    gathered,
    host_bytes,
    make_caches,
    make_chunk,
    on,
    scattered,
    settle,
)
from support.guarded_memory import check_sentence, untouched
from support.threads import run_threads

from portakv import AdaptiveConnector, Index, KVView, Unsupported, copy_rows
from portakv.copy import enqueue
from portakv.runtime import transfer
from portakv_benchmarks.shared.timers import DeviceTimer
from portakv_conformance import simdev

IDS = [9, 2, 17, 6, 0]
REPEATS = 100


@pytest.fixture(params=[0, 1], ids=["first", "second"])
def device(request: pytest.FixtureRequest, accelerator: torch.device) -> torch.device:
    """Either device of its kind; the first one is the current one."""
    if request.param >= torch.get_device_module(accelerator).device_count():
        pytest.skip("there is one device of this kind")
    return torch.device(accelerator.type, request.param)


@pytest.fixture
def connector(device: torch.device) -> AdaptiveConnector:
    return AdaptiveConnector(device)


def ids_on(place: str, device: torch.device) -> torch.Tensor:
    return torch.tensor(IDS, device="cpu" if place == "host" else device)


def copy_late(target: Any, fresh: Any) -> None:
    """Give tensors other bytes on the current stream, which is busy."""
    settle(fresh[0].device)
    delay(current(fresh[0].device))
    for old, new in zip(target, fresh, strict=True):
        old.copy_(new, non_blocking=True)


@pytest.mark.parametrize("side", [True, False])
@pytest.mark.parametrize("ids", ["host", "device"])
@pytest.mark.parametrize("memory", ["device", "pinned", "pageable"])
@pytest.mark.parametrize("store", [True, False])
def test_a_copy_waits_for_its_producer(
    connector: AdaptiveConnector, device: torch.device, store: bool, memory: str, ids: str,
    side: bool,
) -> None:  # fmt: skip
    """And what comes behind it on the current stream waits for the copy."""
    caches, chunk = make_caches(device=device), make_chunk(len(IDS), device="cpu")
    chunk = chunk.pin_memory() if memory == "pinned" else chunk
    chunk = make_chunk(len(IDS), device=device) if memory == "device" else chunk
    fresh = make_caches(device=device) if store else [make_chunk(len(IDS), device=device)]
    wanted = [gathered(fresh, chunk, IDS)] if store else scattered(caches, fresh[0], IDS)
    sources, targets = (caches, [chunk]) if store else ([chunk], caches)
    slots, move = ids_on(ids, device), connector.from_gpu if store else connector.to_gpu
    copy_late(sources, fresh)
    moved = move(chunk, caches, slots, stream=torch.Stream(device) if side else None)
    moved.wait()
    landed = [target.clone() for target in targets if target.device == device]
    for source in sources:
        if source.device == device:  # the host would not wait
            source.zero_()
    moved.synchronize()
    for found in (targets, landed or targets):
        assert all(map(torch.equal, map(host_bytes, found), wanted))


@pytest.mark.simdev
@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("store", [True, False])
def test_without_the_connectors_wait_every_copy_is_wrong(
    store: bool, place: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the wait of `enqueue` all of `REPEATS` copies are right, without it none is."""
    if not waits:
        monkeypatch.setattr(enqueue, "follow_current", no_wait.follow_without_waiting)
    device = simdev_cases.OTHER
    caches, chunk = make_caches(device=device), make_chunk(len(IDS), device=device)
    connector = AdaptiveConnector(device)
    connector.register_kv_caches(caches)
    move = connector.from_gpu if store else connector.to_gpu
    slots, wrong = ids_on(place, device), 0
    for repeat in range(REPEATS):
        for tensor in (*caches, chunk):
            tensor.zero_()
        settle(device)
        for tensor in caches if store else [chunk]:
            tensor.fill_(repeat + 1)
        move(chunk, None, slots, stream=torch.Stream(device)).synchronize()
        settle(device)
        rows = [chunk] if store else [cache.flatten(1, 2)[:, IDS] for cache in caches]
        wrong += any(bool((row.cpu() != repeat + 1).any()) for row in rows)
    assert wrong == (0 if waits else REPEATS)


@pytest.mark.parametrize("store", [True, False])
def test_a_transfer_on_a_busy_stream_is_not_done(
    connector: AdaptiveConnector, device: torch.device, store: bool
) -> None:
    caches, chunk = make_caches(device=device), make_chunk(len(IDS), device=device)
    move = connector.from_gpu if store else connector.to_gpu
    move(chunk, caches, [-1] * len(IDS)).synchronize()  # the launch is prepared
    target = chunk if store else caches[0]
    wanted = gathered(caches, chunk, IDS) if store else scattered(caches, chunk, IDS)[0]
    before, side = host_bytes(target), torch.Stream(device)
    settle(device)
    delay(side)
    moved = move(chunk, caches, IDS, stream=side)
    early = target.clone()  # a consumer that does not wait
    assert torch.equal(host_bytes(early), before)
    assert not moved.done()
    moved.wait()
    assert torch.equal(host_bytes(target.clone()), wanted)
    assert moved.done()


# What is freed right after the call


def reuse(device: torch.device, *sizes: int) -> list[torch.Tensor]:
    """Ask the allocator for memory of sizes that were just freed, and fill it with zeros."""
    return [torch.zeros(n, dtype=torch.uint8, device=device) for n in sizes for _ in range(16)]


@pytest.mark.parametrize("keep", [True, False])
def test_a_source_freed_right_after_the_call(
    connector: AdaptiveConnector, device: torch.device, keep: bool
) -> None:
    caches, chunk = make_caches(device=device), make_chunk(len(IDS), device=device)
    back = scattered(caches, chunk, IDS)
    connector.register_kv_caches(caches)
    nbytes, side = chunk.untyped_storage().nbytes(), torch.Stream(device)
    settle(device)
    delay(side)
    loaded: Any = connector.to_gpu(chunk, None, IDS, stream=side)
    del chunk
    if not keep:
        loaded = None
    junk = reuse(device, nbytes)
    settle(device)
    check_caches(caches, back)
    del loaded, junk


@pytest.mark.parametrize("kind", ["device", "strided", "int32", "host", "negative"])
@pytest.mark.parametrize("keep", [True, False])
def test_ids_freed_right_after_the_call(
    connector: AdaptiveConnector, device: torch.device, kind: str, keep: bool
) -> None:
    slots = [*IDS, -1] if kind == "negative" else IDS
    caches, chunk = make_caches(device=device), make_chunk(len(slots), device=device)
    wanted = gathered(caches, chunk, slots)
    connector.register_kv_caches(caches)
    ids = torch.tensor(slots, device="cpu" if kind == "host" else device)
    if kind == "strided":
        ids = torch.stack([ids, ids], dim=1)[:, 0]
    if kind == "int32":
        ids = ids.int()
    side = torch.Stream(device)
    settle(device)
    delay(side)
    stored: Any = connector.from_gpu(chunk, None, ids, stream=side)
    del ids
    if not keep:
        stored = None
    # Zeros are slots as well: a wrong row, never a wild one.
    junk = reuse(device, 4 * len(slots), 8 * len(slots), 16 * len(slots))
    settle(device)
    check_chunk(chunk, wanted)
    del stored, junk


@pytest.mark.simdev
def test_without_recording_a_freed_source_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    device = simdev_cases.DEVICE
    caches, chunk = make_caches(device=device), make_chunk(len(IDS), device=device)
    back, connector = scattered(caches, chunk, IDS), AdaptiveConnector(device)
    connector.register_kv_caches(caches)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    connector.to_gpu(chunk, None, IDS, stream=torch.Stream(device))
    del chunk
    with pytest.raises(RuntimeError, match="freed"):
        settle(device)
    assert any(not torch.equal(host_bytes(x), y) for x, y in zip(caches, back, strict=True))
    settle(device)
    simdev.take_faults()


# Threads and devices


def test_threads_with_streams_of_their_own(
    connector: AdaptiveConnector, device: torch.device
) -> None:
    caches = make_caches(device=device)
    connector.register_kv_caches(caches)

    def work(first: int) -> None:
        slots = [(first + 5 * i) % 24 for i in range(4)]
        ids = torch.tensor(slots, device=device) if first % 2 else slots
        with on(torch.Stream(device)):
            for _ in range(5):
                chunk = make_chunk(4, device=device)
                wanted = gathered(caches, chunk, slots)
                connector.from_gpu(chunk, None, ids).synchronize()
                check_chunk(chunk, wanted)

    settle(device)
    run_threads(work, range(4))


@pytest.fixture
def elsewhere(device: torch.device) -> torch.device:
    """The other device of this kind."""
    if torch.get_device_module(device).device_count() < 2:
        pytest.skip("there is one device of this kind")
    return torch.device(device.type, 1 - (device.index or 0))


@pytest.mark.parametrize("place", ["host", "device"])
def test_another_current_device(
    connector: AdaptiveConnector, device: torch.device, elsewhere: torch.device, place: str
) -> None:
    caches, ids = make_caches(device=device), ids_on(place, device)
    module = torch.get_device_module(device)
    connector.from_gpu(make_chunk(len(IDS), device=device), caches, IDS).synchronize()
    with module.device(elsewhere):
        for _ in range(2):
            chunk = make_chunk(len(IDS), device=device)
            settle(device)
            delay(current(device))  # the work must wait on the stream of its own device
            stored = connector.from_gpu(chunk, caches, ids)
            # `reference`, which the simulated device has, reads device ids and waits for them.
            assert (place == "device" and device.type != "cuda") or not stored.done()
            stored.synchronize()
            check_chunk(chunk, gathered(caches, chunk, IDS))
            assert module.current_device() == elsewhere.index


@pytest.mark.parametrize("spread", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_of_another_device(
    connector: AdaptiveConnector, device: torch.device, elsewhere: torch.device,
    dtype: torch.dtype, spread: bool,
) -> None:  # fmt: skip
    caches, chunk = make_caches(device=device), make_chunk(len(IDS), device=device)
    ids = torch.tensor(IDS, dtype=dtype, device=elsewhere)
    if spread:
        ids = torch.stack([ids, torch.zeros_like(ids)], dim=1)[:, 0]
    wanted = gathered(caches, chunk, IDS)
    connector.from_gpu(chunk, caches, ids).synchronize()
    check_chunk(chunk, wanted)
    chunk = make_chunk(len(IDS), device=device)
    back = scattered(caches, chunk, IDS)
    connector.to_gpu(chunk, caches, ids).synchronize()
    check_caches(caches, back)


@pytest.mark.parametrize("side", [True, False])
@pytest.mark.parametrize("own", [True, False], ids=["own", "another"])
def test_ids_that_a_device_produces_late(
    connector: AdaptiveConnector, device: torch.device, elsewhere: torch.device,
    own: bool, side: bool,
) -> None:  # fmt: skip
    caches, chunk = make_caches(device=device), make_chunk(len(IDS), device=device)
    wanted, fresh = gathered(caches, chunk, IDS), ids_on("device", device if own else elsewhere)
    ids = torch.zeros_like(fresh)
    copy_late([ids], [fresh])
    stream = torch.Stream(device) if side else None
    connector.from_gpu(chunk, caches, ids, stream=stream).synchronize()
    check_chunk(chunk, wanted)


# What a stream, and the end of a transfer, mean


@pytest.mark.parametrize("given", [True, False], ids=["given", "current"])
def test_the_default_stream_passed_to_the_connector(
    connector: AdaptiveConnector, device: torch.device, given: bool
) -> None:
    """Its number is 0, which does not say that no stream was given: only then does waiting for it
    bring the bytes."""
    caches, chunk = make_caches(device=device), make_chunk(len(IDS), device=device)
    wanted = gathered(caches, chunk, IDS)
    connector.register_kv_caches(caches)
    connector.from_gpu(make_chunk(len(IDS), device=device), None, IDS).synchronize()
    default, side = current(device), torch.Stream(device)
    assert default.stream_id == 0
    settle(device)
    delay(default if given else side)
    with on(side):
        moving = connector.from_gpu(chunk, None, IDS, stream=default if given else None)
    default.synchronize()
    assert torch.equal(host_bytes(chunk), wanted) is given  # read behind the default stream alone
    moving.synchronize()
    check_chunk(chunk, wanted)


@pytest.mark.parametrize("waits", [True, False])
def test_synchronize_waits_for_a_copy_within_the_device(
    device: torch.device, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host reads the bytes without another wait for the stream that carried them."""
    src, dst = (make_chunk(12, device=device) for _ in range(2))
    rows, wanted = host_bytes(src), host_bytes(dst)
    wanted[:, :, [1, 2, 11]] = rows[:, :, [3, 0, 7]]
    first, second = (KVView(tensor, CHUNK_LAYOUT, heads=HEADS) for tensor in (src, dst))
    copy_rows(first, second, Index([-1]), Index([-1])).synchronize()  # prepared
    side = torch.Stream(device)
    settle(device)
    delay(side)
    moving = copy_rows(first, second, Index([3, 0, 7]), Index([1, 2, 11]), stream=side)
    if not waits:
        monkeypatch.setattr(transfer.Completion, "synchronize", lambda completion: None)
    moving.synchronize()
    assert torch.equal(host_bytes(dst), wanted) is waits
    monkeypatch.undo()
    moving.synchronize()


@pytest.mark.simdev
def test_a_call_that_only_enqueues_is_timed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's clock around such a call would make any copy fast."""
    device, small = simdev_cases.DEVICE, SimpleNamespace(L2_cache_size=4096)
    module = torch.get_device_module(device)
    monkeypatch.setattr(module, "get_device_properties", lambda device: small, raising=False)
    taken = DeviceTimer(device).sample(lambda i: simdev.delay(current(device), 30), 0, 0.0)
    assert taken.elapsed >= 25_000 > taken.host
    assert not taken.hidden  # no delay kernel on this device: it does not claim to hide the host


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["no ids", "host ids", "device ids"])
def test_capture_is_refused_by_what_cannot_be_captured(kind: str) -> None:
    caches, chunk, other = make_caches(), make_chunk(6), make_chunk(6)
    view, twin = (KVView(tensor, CHUNK_LAYOUT, heads=HEADS) for tensor in (chunk, other))
    paged, slots = KVView(caches, KV_LAYOUT), [*IDS, -1]
    ids = torch.tensor(slots, device="cuda") if kind == "device ids" else slots

    def copy() -> Any:
        if kind == "no ids":
            return copy_rows(twin, view, backend="reference")
        return copy_rows(paged, view, Index(ids), backend="reference")

    copy().synchronize()  # prepared, so that nothing but the launch is left
    with untouched([*caches, other]):
        torch.cuda.synchronize()
        gc.collect()  # a graph that dies during a capture spoils it
        with pytest.raises(Unsupported) as caught, torch.cuda.graph(torch.cuda.CUDAGraph()):
            copy()
        check_sentence(str(caught.value), "graph capture", "capturable")
    # The device is sound, and the same copy works outside of the graph.
    copy().synchronize()
    if kind != "no ids":
        check_chunk(chunk, gathered(caches, chunk, slots))
