# SPDX-License-Identifier: Apache-2.0
"""What a copy on CUDA streams waits for, what waits for it, and what may be freed meanwhile."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from support.device_cases import (
    DEVICE,
    HEADS,
    LONG,
    check_caches,
    check_chunk,
    gathered,
    host_bytes,
    make_caches,
    make_chunk,
    scattered,
)
from support.guarded_memory import check_sentence, untouched

from portakv import AdaptiveConnector, Index, KVView, Unsupported, copy_rows

pytestmark = pytest.mark.gpu

IDS = [9, 2, 17, 6, 0]
KV_LAYOUT = "layer | kv block token head dim"


@pytest.fixture
def connector() -> AdaptiveConnector:
    return AdaptiveConnector(DEVICE)


@pytest.fixture
def side() -> Any:
    return torch.cuda.Stream(DEVICE)


def passed_ids(place: str) -> torch.Tensor:
    return torch.tensor(IDS, device=place)


@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("on_side", [True, False])
def test_a_store_waits_for_its_producer(
    connector: AdaptiveConnector, side: Any, on_side: bool, place: str
) -> None:
    caches, fresh, chunk = make_caches(), make_caches(), make_chunk(len(IDS))
    wanted = gathered(fresh, chunk, IDS)
    ids = passed_ids(place)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)  # the producer comes late
    for cache, new in zip(caches, fresh, strict=True):
        cache.copy_(new)
    transfer = connector.from_gpu(chunk, caches, ids, stream=side if on_side else None)
    transfer.wait()
    landed = chunk.clone()  # on the current stream, behind the transfer
    for cache in caches:
        cache.zero_()
    assert torch.equal(host_bytes(landed), wanted)
    transfer.synchronize()
    check_chunk(chunk, wanted)


@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("on_side", [True, False])
def test_a_load_waits_for_its_producer(
    connector: AdaptiveConnector, side: Any, on_side: bool, place: str
) -> None:
    caches, chunk, fresh = make_caches(), make_chunk(len(IDS)), make_chunk(len(IDS))
    back = scattered(caches, fresh, IDS)
    ids = passed_ids(place)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    chunk.copy_(fresh)
    transfer = connector.to_gpu(chunk, caches, ids, stream=side if on_side else None)
    transfer.wait()
    chunk.zero_()  # must not overtake the load
    transfer.synchronize()
    check_caches(caches, back)


def test_ids_that_are_produced_late(connector: AdaptiveConnector, side: Any) -> None:
    caches, chunk = make_caches(), make_chunk(len(IDS))
    wanted = gathered(caches, chunk, IDS)
    fresh, ids = passed_ids("cuda"), torch.zeros(len(IDS), dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    ids.copy_(fresh)
    connector.from_gpu(chunk, caches, ids, stream=side).synchronize()
    check_chunk(chunk, wanted)


def test_a_transfer_on_a_busy_stream_is_not_done(connector: AdaptiveConnector, side: Any) -> None:
    caches, chunk = make_caches(), make_chunk(len(IDS))
    wanted = gathered(caches, chunk, IDS)
    connector.from_gpu(chunk, caches, IDS).synchronize()  # the launch is prepared
    chunk.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
    transfer = connector.from_gpu(chunk, caches, IDS, stream=side)
    assert not transfer.done()
    transfer.wait()
    landed = chunk.clone()
    assert torch.equal(host_bytes(landed), wanted)
    assert transfer.done()


def test_the_current_stream_need_not_be_the_default(
    connector: AdaptiveConnector, side: Any
) -> None:
    caches, fresh, chunk = make_caches(), make_caches(), make_chunk(len(IDS))
    wanted = gathered(fresh, chunk, IDS)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        for cache, new in zip(caches, fresh, strict=True):
            cache.copy_(new)
        transfer = connector.from_gpu(chunk, caches, IDS)
    transfer.synchronize()
    check_chunk(chunk, wanted)


# What is freed right after the call


def reuse(nbytes: int) -> list[torch.Tensor]:
    """Ask the allocator for blocks of a size that was just freed, and fill them with zeros."""
    return [torch.zeros(nbytes, dtype=torch.uint8, device=DEVICE) for _ in range(16)]


@pytest.mark.parametrize("keep", [True, False])
def test_a_source_freed_right_after_the_call(
    connector: AdaptiveConnector, side: Any, keep: bool
) -> None:
    caches, chunk = make_caches(), make_chunk(len(IDS))
    back = scattered(caches, chunk, IDS)
    connector.register_kv_caches(caches)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
    transfer: Any = connector.to_gpu(chunk, None, IDS, stream=side)
    nbytes = chunk.untyped_storage().nbytes()
    del chunk
    if not keep:
        transfer = None
    junk = reuse(nbytes)
    torch.cuda.synchronize()
    assert junk
    check_caches(caches, back)
    del transfer


@pytest.mark.parametrize("kind", ["device", "strided", "host", "negative"])
@pytest.mark.parametrize("keep", [True, False])
def test_ids_freed_right_after_the_call(
    connector: AdaptiveConnector, side: Any, kind: str, keep: bool
) -> None:
    caches, slots = make_caches(), [*IDS, -1] if kind == "negative" else IDS
    chunk = make_chunk(len(slots))
    wanted = gathered(caches, chunk, slots)
    connector.register_kv_caches(caches)
    ids = torch.tensor(slots, device="cpu" if kind == "host" else DEVICE)
    if kind == "strided":
        ids = torch.stack([ids, ids], dim=1)[:, 0]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
    transfer: Any = connector.from_gpu(chunk, None, ids, stream=side)
    del ids
    if not keep:
        transfer = None
    junk = reuse(8 * len(slots))  # zeros are slots as well: a wrong row, never a wild one
    torch.cuda.synchronize()
    assert junk
    check_chunk(chunk, wanted)
    del transfer


# The host on one side


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("on_side", [True, False])
def test_a_store_to_the_host_waits_for_its_producer(
    connector: AdaptiveConnector, side: Any, on_side: bool, pinned: bool
) -> None:
    caches, fresh = make_caches(), make_caches()
    chunk = make_chunk(len(IDS), device="cpu")
    if pinned:
        chunk = chunk.pin_memory()
    wanted = gathered(fresh, chunk, IDS)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    for cache, new in zip(caches, fresh, strict=True):
        cache.copy_(new)
    connector.from_gpu(chunk, caches, IDS, stream=side if on_side else None).synchronize()
    assert torch.equal(host_bytes(chunk), wanted)


@pytest.mark.parametrize("on_side", [True, False])
def test_a_load_of_pinned_memory_that_is_still_being_written(
    connector: AdaptiveConnector, side: Any, on_side: bool
) -> None:
    caches, fresh = make_caches(), make_chunk(len(IDS))
    chunk = make_chunk(len(IDS), device="cpu").pin_memory()
    back = scattered(caches, fresh, IDS)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    chunk.copy_(fresh, non_blocking=True)
    connector.to_gpu(chunk, caches, IDS, stream=side if on_side else None).synchronize()
    check_caches(caches, back)


# Several at once


def test_overlapping_copies_on_two_streams(connector: AdaptiveConnector) -> None:
    caches = make_caches()
    chunks = [make_chunk(5), make_chunk(5)]
    ranges = [[1, 3, 5, 7, 9], [2, 4, 6, 8, 10]]
    back = scattered(caches, torch.cat(chunks, dim=2), ranges[0] + ranges[1])
    streams = [torch.cuda.Stream(DEVICE) for _ in range(2)]
    transfers = []
    for chunk, slots, stream in zip(chunks, ranges, streams, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG // 4)
        transfers.append(connector.to_gpu(chunk, caches, slots, stream=stream))
    for transfer in transfers:
        transfer.synchronize()
    check_caches(caches, back)


def test_a_load_behind_a_store_of_the_same_rows(connector: AdaptiveConnector) -> None:
    caches, chunk, other = make_caches(), make_chunk(len(IDS)), make_chunk(len(IDS))
    wanted, back = gathered(caches, chunk, IDS), scattered(caches, other, IDS)
    torch.cuda._sleep(LONG)
    stored = connector.from_gpu(chunk, caches, IDS)
    loaded = connector.to_gpu(other, caches, IDS)
    stored.synchronize()
    loaded.synchronize()
    check_chunk(chunk, wanted)
    check_caches(caches, back)


def test_threads_with_streams_of_their_own(connector: AdaptiveConnector) -> None:
    caches = make_caches()
    connector.register_kv_caches(caches)
    faults: list[BaseException] = []

    def work(first: int) -> None:
        try:
            slots = [(first + 5 * i) % 24 for i in range(4)]
            ids = torch.tensor(slots, device=DEVICE) if first % 2 else slots
            with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
                for _ in range(20):
                    chunk = make_chunk(4)
                    wanted = gathered(caches, chunk, slots)
                    connector.from_gpu(chunk, None, ids).synchronize()
                    check_chunk(chunk, wanted)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


# Graphs


@pytest.mark.parametrize("kind", ["no ids", "host ids", "device ids", "padded host ids"])
def test_capture_is_refused_by_what_cannot_be_captured(kind: str) -> None:
    caches, chunk, other = make_caches(), make_chunk(6), make_chunk(6)
    view = KVView(chunk, "kv layer token (head dim)", heads=HEADS)
    twin = KVView(other, "kv layer token (head dim)", heads=HEADS)
    paged = KVView(caches, KV_LAYOUT)
    ids = torch.tensor([*IDS, -1], device=DEVICE) if kind == "device ids" else [*IDS, 3]
    if kind == "padded host ids":
        ids = [*IDS, -1]

    def copy() -> Any:
        if kind == "no ids":
            return copy_rows(twin, view, backend="reference")
        return copy_rows(paged, view, Index(ids), backend="reference")

    copy().synchronize()  # prepared, so that nothing but the launch is left
    with untouched([*caches, other]):
        torch.cuda.synchronize()
        gc.collect()  # a graph that dies during a capture spoils it
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(Unsupported) as caught, torch.cuda.graph(graph):
            copy()
        check_sentence(str(caught.value), "graph capture", "capturable")
    # The device is sound, and the same copy works outside of the graph.
    copy().synchronize()
    if kind != "no ids":
        wanted = gathered(caches, chunk, list(torch.as_tensor(ids).tolist()))
        check_chunk(chunk, wanted)
