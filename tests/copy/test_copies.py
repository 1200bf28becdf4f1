# SPDX-License-Identifier: Apache-2.0
"""Connector and copies on each device: ids, dtypes, batches, bad ids, memory of the host."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support import simdev_cases
from support.device_cases import (
    BLOCKS,
    CHUNK_LAYOUT,
    HEADS,
    KV_LAYOUT,
    SIZE,
    SLOTS,
    check_caches,
    check_canaries,
    check_chunk,
    gathered,
    host_bytes,
    make_caches,
    make_chunk,
    scattered,
    settle,
)
from support.guarded_memory import check_sentence, refused, untouched

from portakv import (
    AdaptiveConnector,
    DeviceMismatch,
    Index,
    KVView,
    PortaKVError,
    SlotError,
    copy_rows,
)

DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8,
    torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
IDS = [9, -1, 17, 6, 0, -5, 23]


def store_and_load(
    device: torch.device, make: Callable[[], torch.Tensor], ids: Any, slots: list[int]
) -> None:
    """Store slots to one chunk, and load another one to them."""
    chunk, connector = make(), AdaptiveConnector(device)
    caches = make_caches(chunk.dtype, device)
    wanted = gathered(caches, chunk, slots)
    with untouched(caches):
        connector.from_gpu(chunk, caches, ids).synchronize()
    assert torch.equal(host_bytes(chunk), wanted)
    fresh = make()
    back = scattered(caches, fresh, slots)
    with untouched(fresh):
        connector.to_gpu(fresh, caches, ids).synchronize()
    check_caches(caches, back)
    check_canaries(chunk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_bit_by_bit(device: torch.device, dtype: torch.dtype) -> None:
    store_and_load(device, lambda: make_chunk(len(IDS), dtype, device), IDS, IDS)


@pytest.mark.parametrize("place", ["host", "device", "strided"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_every_kind(device: torch.device, dtype: torch.dtype, place: str) -> None:
    ids = torch.tensor(IDS, dtype=dtype, device="cpu" if place == "host" else device)
    if place == "strided":
        ids = torch.stack([ids, ids * 0], dim=1)[:, 0]
    store_and_load(device, lambda: make_chunk(len(IDS), device=device), ids, IDS)


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("pinned", [True, False])
def test_memory_objects_on_the_host(accelerator: torch.device, pinned: bool, place: str) -> None:
    def make() -> torch.Tensor:
        chunk = make_chunk(len(IDS), device="cpu")
        return _pinned(chunk) if pinned else chunk

    ids = torch.tensor(IDS, device="cpu" if place == "host" else accelerator)
    store_and_load(accelerator, make, ids, IDS)
    chunk, caches = make(), make_caches(device=accelerator)
    with untouched(caches, chunk):
        AdaptiveConnector(accelerator).from_gpu(chunk, caches, ids.clamp(max=-1)).synchronize()


def _pinned(chunk: torch.Tensor) -> torch.Tensor:
    """The chunk in pinned memory, its canaries with it."""
    whole = torch.empty(0, dtype=chunk.dtype).set_(chunk.untyped_storage()).pin_memory()
    return whole.as_strided(chunk.shape, chunk.stride(), chunk.storage_offset())


@pytest.mark.parametrize("place", ["host", "device"])
def test_batches(device: torch.device, place: str) -> None:
    caches, connector = make_caches(device=device), AdaptiveConnector(device)
    chunks = [make_chunk(n, device=device) for n in (3, 3, 2, 3)]
    chunks[2] = make_chunk(2, device="cpu")  # another kind of memory
    slots = [9, 2, 17, 6, 0, 3, 11, 23, 14, -1]
    starts, ends = [0, 3, 6, 8], [3, 6, 8, 10]
    jobs = list(zip(chunks, starts, ends, strict=True))
    wanted = [gathered(caches, chunk, slots[start:end]) for chunk, start, end in jobs]
    ids = torch.tensor(slots, device="cpu" if place == "host" else device)
    side = None if device.type == "cpu" else torch.Stream(device)
    connector.batched_from_gpu(chunks, caches, ids, starts, ends, stream=side).synchronize()
    for chunk, want in zip(chunks, wanted, strict=True):
        check_chunk(chunk, want)
    joined = torch.cat([chunk.cpu()[:, :, : end - start] for chunk, start, end in jobs], dim=2)
    caches = make_caches(device=device)
    back = scattered(caches, joined, slots)
    connector.batched_to_gpu(chunks, caches, ids, starts, ends).synchronize()
    check_caches(caches, back)


# Bad ids on the device


@pytest.mark.parametrize("bad", [SLOTS, SLOTS + 3, 2**31 - 1, 2**32 + 1, 2**63 - 1])
@pytest.mark.parametrize("store", [True, False])
def test_bad_device_ids_move_nothing_and_are_reported(
    accelerator: torch.device, store: bool, bad: int
) -> None:
    caches, chunk = make_caches(device=accelerator), make_chunk(5, device=accelerator)
    slots, connector = [9, 2, bad, 6, -1], AdaptiveConnector(accelerator)
    dtype = torch.int32 if bad < 2**31 else torch.int64
    ids = torch.tensor(slots, dtype=dtype, device=accelerator)
    wanted = gathered(caches, chunk, slots) if store else host_bytes(chunk)
    back = [host_bytes(cache) for cache in caches] if store else scattered(caches, chunk, slots)
    move = connector.from_gpu if store else connector.to_gpu
    with pytest.raises(SlotError) as caught:
        move(chunk, caches, ids).synchronize()
    check_sentence(str(caught.value), "Position 2", "past the end", "not moved")
    check_chunk(chunk, wanted)
    check_caches(caches, back)
    # The device is sound, and the error was told: the next call goes on.
    connector.from_gpu(chunk, caches, [1, 2]).synchronize()


@pytest.mark.parametrize("bad", [BLOCKS, 2**31 - 1, 2**61, 2**62, -(2**63)])
@pytest.mark.parametrize("count", [3 * SIZE, 2 * SIZE + 1])
def test_bad_device_blocks(accelerator: torch.device, bad: int, count: int) -> None:
    caches, chunk = make_caches(device=accelerator), make_chunk(count, device=accelerator)
    table = torch.tensor([4, bad, 1], device=accelerator)
    slots = [4 * SIZE + i for i in range(SIZE)] + [-1] * SIZE
    slots += [SIZE + i for i in range(count - 2 * SIZE)]
    wanted = gathered(caches, chunk, slots)
    view = KVView(chunk, CHUNK_LAYOUT, heads=HEADS)
    moved = copy_rows(KVView(caches, KV_LAYOUT), view, Index(table, step=SIZE), count=count)
    told = pytest.raises(SlotError, match=f"Position {SIZE}") if bad > 0 else nullcontext()
    with told:
        moved.synchronize()
    check_chunk(chunk, wanted)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_bad_block_is_named_by_its_position_in_the_whole_copy(
    accelerator: torch.device, bad: int
) -> None:
    """Head, body and tail are launches of their own; each counts from its own first position."""
    caches, chunk = make_caches(device=accelerator), make_chunk(2 * SIZE + 1, device=accelerator)
    blocks = [3, 1, 4]
    blocks[bad] = BLOCKS
    ids = Index(torch.tensor(blocks, device=accelerator), step=SIZE, offset=1)
    view = KVView(chunk, CHUNK_LAYOUT, heads=HEADS)
    moved = copy_rows(KVView(caches, KV_LAYOUT), view, ids, count=2 * SIZE + 1)
    with pytest.raises(SlotError) as caught:
        moved.synchronize()
    position = max(0, bad * SIZE - 1)
    found = int(str(caught.value).split("Position ")[1].split()[0])
    assert position <= found < position + SIZE


@pytest.mark.parametrize("place", ["cpu", "own"])
def test_an_error_is_raised_by_done_or_by_the_next_call(
    accelerator: torch.device, place: str
) -> None:
    caches, connector = make_caches(device=accelerator), AdaptiveConnector(accelerator)
    chunk = make_chunk(3, device="cpu" if place == "cpu" else accelerator)
    before, ids = host_bytes(chunk), torch.tensor([1, SLOTS, 2], device=accelerator)
    moved = connector.from_gpu(chunk, caches, ids)
    settle(accelerator)
    with pytest.raises(SlotError, match="Position 1"):
        moved.done()
    assert torch.equal(host_bytes(chunk)[:, :, 1], before[:, :, 1])
    connector.from_gpu(chunk, caches, ids)
    settle(accelerator)
    with refused(SlotError, "Position 1", "past the end", watch=[*caches, chunk]):
        connector.to_gpu(chunk, caches, [7, 8, 9])
    back = scattered(caches, chunk, [7, 8, 9])
    connector.to_gpu(chunk, caches, [7, 8, 9]).synchronize()
    check_caches(caches, back)


# Rows of one cache, and memory in other places


@pytest.mark.parametrize(
    ("src", "dst"), [([3, 4], None), (None, [3, 4]), ([3, 4], [9, 2]), (Index(offset=8), None)]
)
def test_rows_of_one_cache(device: torch.device, src: Any, dst: Any) -> None:
    caches = make_caches(device=device)
    view = KVView(caches, KV_LAYOUT)
    wanted = [host_bytes(cache) for cache in caches]
    sources = src if isinstance(src, list) else [0, 1] if src is None else [8, 9]
    for want in wanted:
        flat = want.view(2, SLOTS, -1)
        flat[:, dst or [0, 1]] = flat[:, sources].clone()
    copy_rows(view, view, src, dst, count=2).synchronize()
    check_caches(caches, wanted)
    first, second = view.slice(layers=slice(0, 2)), view.slice(layers=slice(1, 3))
    for mine, theirs in ((view, view), (first, second)):
        with refused(SlotError, "source and destination", watch=caches):
            copy_rows(mine, theirs, [3, 4], [4, 9])


@pytest.mark.simdev
def test_the_registry_chooses_for_it() -> None:
    connector = AdaptiveConnector(simdev_cases.NAME)
    assert connector.device == simdev_cases.DEVICE
    assert f"{simdev_cases.NAME}:0" in connector.explain()


def test_devices_that_do_not_belong_together(accelerator: torch.device) -> None:
    caches, chunk = make_caches(device=accelerator), make_chunk(3, device=accelerator)
    connector, name = AdaptiveConnector(accelerator), str(accelerator)
    on_host = [cache.cpu() for cache in caches]
    with refused(DeviceMismatch, "cpu", name, "connector", watch=[*on_host, chunk]):
        connector.from_gpu(chunk, on_host, [1, 2, 3])
    with refused(DeviceMismatch, "cpu", name, watch=[*caches, chunk]):
        connector.from_gpu(chunk, [on_host[0], *caches[1:]], [1, 2, 3])
    pairs = [(AdaptiveConnector("cpu"), on_host, chunk, "cpu")]
    if torch.get_device_module(accelerator).device_count() > 1:
        other = torch.device(accelerator.type, 1)
        with refused(DeviceMismatch, str(other), name):
            connector.register_kv_caches(make_caches(device=other))
        pairs.append((connector, caches, make_chunk(3, device=other), str(other)))
    # A chunk of another device may be refused, or be right.
    for moving, there, here, word in pairs:
        before, wanted = host_bytes(here), gathered(there, here, [1, 2, 3])
        try:
            moving.from_gpu(here, there, [1, 2, 3]).synchronize()
        except PortaKVError as error:
            check_sentence(str(error), word, name)
            wanted = before
        check_chunk(here, wanted)


def test_caches_are_let_go_at_unregister(accelerator: torch.device) -> None:
    caches, chunk = make_caches(device=accelerator), make_chunk(3, device=accelerator)
    refs = [weakref.ref(cache) for cache in caches]
    connector = AdaptiveConnector(accelerator)
    connector.register_kv_caches(caches)
    for slots in (torch.tensor([1, 2, 3], device=accelerator), [1, 2, 3]):
        connector.from_gpu(chunk, None, slots).synchronize()
    del caches
    gc.collect()
    assert all(ref() is not None for ref in refs)
    connector.unregister_kv_caches()
    gc.collect()
    assert not any(ref() is not None for ref in refs)
