# SPDX-License-Identifier: Apache-2.0
"""The moves of the other tests on CUDA tensors: ids, dtypes, host memory, devices."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from support.device_cases import (
    BLOCKS,
    DEVICE,
    DIM,
    HEADS,
    LAYERS,
    LONG,
    SIZE,
    SLOTS,
    check_caches,
    check_chunk,
    gathered,
    host_bytes,
    make_caches,
    make_chunk,
    scattered,
)
from support.guarded_memory import check_sentence, filled, refused, untouched

from portakv import (
    AdaptiveConnector,
    DeviceMismatch,
    Index,
    KVView,
    PortaKVError,
    SlotError,
    copy_blocks,
    copy_rows,
)

pytestmark = pytest.mark.gpu

KV_LAYOUT = "layer | kv block token head dim"
CHUNK_LAYOUT = "kv layer token (head dim)"
DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8,
    torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
IDS = [9, -1, 17, 6, 0, -5, 23]


@pytest.fixture
def connector() -> AdaptiveConnector:
    return AdaptiveConnector(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_bit_by_bit(connector: AdaptiveConnector, dtype: torch.dtype) -> None:
    caches, chunk, slots = make_caches(dtype), make_chunk(5, dtype), [9, 2, 17, 6, 0]
    wanted = gathered(caches, chunk, slots)
    with untouched(caches):
        connector.from_gpu(chunk, caches, slots).synchronize()
    check_chunk(chunk, wanted)
    back = scattered(caches, chunk, [1, 22, 5, 3, 11])
    with untouched(chunk):
        connector.to_gpu(chunk, caches, [1, 22, 5, 3, 11]).synchronize()
    check_caches(caches, back)


@pytest.mark.parametrize("place", ["host", "device", "strided"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_every_kind(connector: AdaptiveConnector, dtype: torch.dtype, place: str) -> None:
    caches, chunk = make_caches(), make_chunk(len(IDS))
    ids = torch.tensor(IDS, dtype=dtype, device="cpu" if place == "host" else DEVICE)
    if place == "strided":
        ids = torch.stack([ids, ids * 0], dim=1)[:, 0]
        assert not ids.is_contiguous()
    wanted = gathered(caches, chunk, IDS)
    connector.from_gpu(chunk, caches, ids).synchronize()
    check_chunk(chunk, wanted)
    back = scattered(caches, chunk, IDS)
    connector.to_gpu(chunk, caches, ids).synchronize()
    check_caches(caches, back)


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_batches(connector: AdaptiveConnector, place: str) -> None:
    caches, chunks = make_caches(), [make_chunk(n) for n in (3, 3, 2, 3)]
    slots = [9, 2, 17, 6, 0, 3, 11, 23, 14, -1]
    starts, ends = [0, 3, 6, 8], [3, 6, 8, 10]
    jobs = list(zip(chunks, starts, ends, strict=True))
    wanted = [gathered(caches, chunk, slots[start:end]) for chunk, start, end in jobs]
    ids = torch.tensor(slots, device=place)
    connector.batched_from_gpu(chunks, caches, ids, starts, ends).synchronize()
    for chunk, want in zip(chunks, wanted, strict=True):
        check_chunk(chunk, want)
    joined = torch.cat([chunk[:, :, : end - start] for chunk, start, end in jobs], dim=2)
    back = scattered(caches, joined, slots)
    connector.batched_to_gpu(chunks, caches, ids, starts, ends).synchronize()
    check_caches(caches, back)


# Bad ids on the device


@pytest.mark.parametrize("bad", [SLOTS, SLOTS + 3, 2**31 - 1, 2**32 + 1, 2**63 - 1])
@pytest.mark.parametrize("store", [True, False])
def test_bad_device_ids_move_nothing_and_are_reported(
    connector: AdaptiveConnector, store: bool, bad: int
) -> None:
    caches, chunk = make_caches(), make_chunk(5)
    slots = [9, 2, bad, 6, -1]
    dtype = torch.int32 if bad < 2**31 else torch.int64
    ids = torch.tensor(slots, dtype=dtype, device=DEVICE)
    wanted, back = gathered(caches, chunk, slots), scattered(caches, chunk, slots)
    if store:
        transfer = connector.from_gpu(chunk, caches, ids)
    else:
        transfer = connector.to_gpu(chunk, caches, ids)
    with pytest.raises(SlotError) as caught:
        transfer.synchronize()
    check_sentence(str(caught.value), "Position 2", "past the end", "not moved")
    if store:
        check_chunk(chunk, wanted)
    else:
        check_caches(caches, back)
    # The device is sound, and the error was told: the next call goes on.
    connector.from_gpu(chunk, caches, [1, 2]).synchronize()


@pytest.mark.parametrize("bad", [BLOCKS, 2**31 - 1, 2**61, 2**62, -(2**63)])
@pytest.mark.parametrize("count", [3 * SIZE, 2 * SIZE + 1])
def test_bad_device_blocks(bad: int, count: int) -> None:
    caches, chunk = make_caches(), make_chunk(count)
    table = torch.tensor([4, bad, 1], device=DEVICE)
    slots = [4 * SIZE + i if i < SIZE else -1 for i in range(2 * SIZE)]
    slots += [SIZE + i for i in range(count - 2 * SIZE)]
    wanted = gathered(caches, chunk, slots)
    view = KVView(chunk, CHUNK_LAYOUT, heads=HEADS)
    transfer = copy_rows(KVView(caches, KV_LAYOUT), view, Index(table, step=SIZE), count=count)
    if bad > 0:
        with pytest.raises(SlotError, match=f"Position {SIZE}"):
            transfer.synchronize()
    else:
        transfer.synchronize()
    check_chunk(chunk, wanted)


def test_done_raises_for_bad_device_ids(connector: AdaptiveConnector) -> None:
    caches, chunk = make_caches(), make_chunk(3)
    transfer = connector.from_gpu(chunk, caches, torch.tensor([1, SLOTS, 2], device=DEVICE))
    torch.cuda.synchronize()
    with pytest.raises(SlotError):
        transfer.done()


def test_an_error_nobody_asked_for_is_raised_by_the_next_call(
    connector: AdaptiveConnector,
) -> None:
    caches, chunk = make_caches(), make_chunk(3)
    connector.from_gpu(chunk, caches, torch.tensor([1, SLOTS, 2], device=DEVICE))
    torch.cuda.synchronize()
    with refused(SlotError, "Position 1", "past the end", watch=[*caches, chunk]):
        connector.to_gpu(chunk, caches, [7, 8, 9])
    back = scattered(caches, chunk, [7, 8, 9])
    connector.to_gpu(chunk, caches, [7, 8, 9]).synchronize()
    check_caches(caches, back)


def test_bad_host_ids_are_refused_before_launch(connector: AdaptiveConnector) -> None:
    caches, chunk = make_caches(), make_chunk(3)
    for slots in ([1, SLOTS, 2], [1, 2, 2**62]):
        with refused(SlotError, "Position", "slots", watch=[*caches, chunk]):
            connector.to_gpu(chunk, caches, slots)
    with refused(SlotError, "Slot 2", "2 times", watch=[*caches, chunk]):
        connector.to_gpu(chunk, caches, [2, 1, 2])


# Memory objects on the host


@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("pinned", [True, False])
def test_memory_objects_on_the_host(connector: AdaptiveConnector, pinned: bool, place: str) -> None:
    caches = make_caches()
    chunk = make_chunk(len(IDS), device="cpu")
    if pinned:
        chunk = chunk.pin_memory()
    ids = torch.tensor(IDS, device=place)
    wanted = gathered(caches, chunk, IDS)
    with untouched(caches):
        connector.from_gpu(chunk, caches, ids).synchronize()
    assert torch.equal(host_bytes(chunk), wanted)
    other = [9, 3, -1, 5, 21, 0, -1]
    back = scattered(caches, chunk, other)
    with untouched(chunk):
        connector.to_gpu(chunk, caches, torch.tensor(other, device=place)).synchronize()
    check_caches(caches, back)
    with untouched([*caches, chunk]):
        connector.from_gpu(chunk, caches, torch.full((3,), -1, device=place)).synchronize()


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_bad_ids_with_memory_objects_on_the_host(connector: AdaptiveConnector, place: str) -> None:
    caches, chunk = make_caches(), make_chunk(3, device="cpu")
    before = host_bytes(chunk)
    with pytest.raises(SlotError, match="Position 1"):
        connector.from_gpu(chunk, caches, torch.tensor([1, SLOTS, 2], device=place)).synchronize()
    assert torch.equal(host_bytes(chunk)[:, :, 1], before[:, :, 1])


def test_a_batch_of_host_and_device_chunks(connector: AdaptiveConnector) -> None:
    caches = make_caches()
    chunks = [make_chunk(2), make_chunk(2, device="cpu"), make_chunk(2, device="cpu").pin_memory()]
    slots = [9, 2, 17, 6, 0, 3]
    wanted = [gathered(caches, c, slots[2 * i : 2 * i + 2]) for i, c in enumerate(chunks)]
    connector.batched_from_gpu(chunks, caches, slots, [0, 2, 4], [2, 4, 6]).synchronize()
    for chunk, want in zip(chunks, wanted, strict=True):
        assert torch.equal(host_bytes(chunk), want)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_paged_caches_on_the_host(pinned: bool, size: int) -> None:
    """Blocks are swapped out to a paged cache on the host, of another block size, and in again."""
    caches = make_caches()
    blocks = 2 * SLOTS // size
    host = [filled((2, blocks, size, HEADS, DIM)) for _ in range(LAYERS)]
    if pinned:
        host = [layer.pin_memory() for layer in host]
    inner, outer = KVView(caches, KV_LAYOUT), KVView(host, KV_LAYOUT)
    here = [4, 1]
    there = list(range(blocks - 2 * SIZE // size, blocks))[::-1]
    slots = [block * SIZE + i for block in here for i in range(SIZE)]
    mirror = [block * size + i for block in there for i in range(size)]
    before = [host_bytes(layer).reshape(2, 2 * SLOTS, -1) for layer in host]
    copy_blocks(inner, outer, here, there).synchronize()
    for layer, cache in enumerate(caches):
        before[layer][:, mirror] = host_bytes(cache).reshape(2, SLOTS, -1)[:, slots]
        assert torch.equal(host_bytes(host[layer]).reshape(2, 2 * SLOTS, -1), before[layer])
    back = [0, 5]
    landed = [block * SIZE + i for block in back for i in range(SIZE)]
    wanted = [host_bytes(cache) for cache in caches]
    for layer, want in enumerate(wanted):
        want.view(2, SLOTS, -1)[:, landed] = before[layer][:, mirror]
    copy_blocks(outer, inner, there, back).synchronize()
    check_caches(caches, wanted)


# Layouts and places that differ from the CPU's


def test_layers_that_lie_backwards_in_one_allocation() -> None:
    pool = filled((LAYERS, 2, BLOCKS, SIZE, HEADS, DIM), device=DEVICE)
    caches = [pool[layer] for layer in reversed(range(LAYERS))]
    chunk, slots = make_chunk(3), [9, 2, 17]
    wanted = gathered(caches, chunk, slots)
    connector = AdaptiveConnector(DEVICE)
    connector.from_gpu(chunk, caches, slots).synchronize()
    check_chunk(chunk, wanted)
    back = scattered(caches, chunk, [3, 4, 5])
    connector.to_gpu(chunk, caches, [3, 4, 5]).synchronize()
    for cache, want in zip(caches, back, strict=True):
        assert torch.equal(host_bytes(cache), want)


@pytest.mark.parametrize("width", [33, 66, 100, 132])
def test_odd_rows(width: int) -> None:
    caches = [filled((BLOCKS, SIZE, width), torch.uint8, device=DEVICE) for _ in range(LAYERS)]
    chunk = filled((1, LAYERS, 4, width), torch.uint8, device=DEVICE)
    connector = AdaptiveConnector(DEVICE, kv_layout="layer | block token dim")
    connector.from_gpu(chunk, caches, [9, 2, 17, 6]).synchronize()
    for layer, cache in enumerate(caches):
        assert torch.equal(chunk[0, layer], cache.view(SLOTS, width)[[9, 2, 17, 6]])


@pytest.mark.parametrize(
    ("src", "dst"), [([3, 4], None), (None, [3, 4]), ([3, 4], [9, 2]), (Index(offset=8), None)]
)
def test_rows_of_one_cache(src: Any, dst: Any) -> None:
    caches = make_caches()
    view = KVView(caches, KV_LAYOUT)
    wanted = [host_bytes(cache) for cache in caches]
    sources = src if isinstance(src, list) else [0, 1] if src is None else [8, 9]
    for want in wanted:
        flat = want.view(2, SLOTS, -1)
        flat[:, dst or [0, 1]] = flat[:, sources].clone()
    copy_rows(view, view, src, dst, count=2).synchronize()
    check_caches(caches, wanted)
    with refused(SlotError, "source and destination", watch=caches):
        copy_rows(view, view, [3, 4], [4, 3])


def test_inside_and_outside_of_inference_mode(connector: AdaptiveConnector) -> None:
    caches, chunk = make_caches(), make_chunk(3)
    connector.register_kv_caches(caches)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            back = scattered(caches, chunk, [1, 6, 15])
            connector.to_gpu(chunk, None, [1, 6, 15]).synchronize()
            check_caches(caches, back)


def test_devices_that_do_not_belong_together(connector: AdaptiveConnector) -> None:
    caches, chunk = make_caches(), make_chunk(3)
    on_host = [cache.cpu() for cache in caches]
    with refused(DeviceMismatch, "cpu", "cuda:0", "connector", watch=[*on_host, chunk]):
        connector.from_gpu(chunk, on_host, [1, 2, 3])
    with refused(DeviceMismatch, "cpu", "cuda:0", watch=[*caches, chunk]):
        connector.from_gpu(chunk, [caches[0].cpu(), *caches[1:]], [1, 2, 3])
    # A connector of the host may refuse a chunk on the device, or be right.
    wanted = gathered(on_host, chunk, [1, 2, 3])
    try:
        AdaptiveConnector("cpu").from_gpu(chunk, on_host, [1, 2, 3]).synchronize()
    except PortaKVError as error:
        check_sentence(str(error), "cpu", "cuda:0")
    else:
        check_chunk(chunk, wanted)


def test_caches_are_let_go_at_unregister(connector: AdaptiveConnector) -> None:
    caches, chunk = make_caches(), make_chunk(3)
    refs = [weakref.ref(cache) for cache in caches]
    connector.register_kv_caches(caches)
    connector.from_gpu(chunk, None, torch.tensor([1, 2, 3], device=DEVICE)).synchronize()
    connector.from_gpu(chunk, None, [1, 2, 3])
    del caches
    gc.collect()
    assert all(ref() is not None for ref in refs)
    torch.cuda.synchronize()
    connector.unregister_kv_caches()
    gc.collect()
    assert not any(ref() is not None for ref in refs)


# A second device


@pytest.fixture
def second() -> torch.device:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA device is here: this test needs two")
    return torch.device("cuda", 1)


@pytest.mark.parametrize("place", ["cpu", "cuda:1", "cuda:0"])
@pytest.mark.parametrize("late", [True, False])
def test_a_device_that_is_not_current(second: torch.device, place: str, late: bool) -> None:
    assert torch.cuda.current_device() == 0
    caches, chunk = make_caches(device=second), make_chunk(len(IDS), device=second)
    source = make_chunk(len(IDS), device=second)
    connector = AdaptiveConnector(second)
    ids = torch.tensor(IDS, device=place)
    wanted = gathered(caches, source, IDS)
    if late:  # the work must wait on the stream of its own device
        with torch.cuda.device(second):
            torch.cuda._sleep(LONG)
        chunk.copy_(source)
    else:
        wanted = gathered(caches, chunk, IDS)
    connector.from_gpu(chunk, caches, ids).synchronize()
    assert torch.equal(host_bytes(chunk), wanted)
    back = scattered(caches, chunk, IDS)
    connector.to_gpu(chunk, caches, ids).synchronize()
    check_caches(caches, back)
    assert torch.cuda.current_device() == 0


def test_a_chunk_on_another_device(second: torch.device) -> None:
    caches, chunk = make_caches(), make_chunk(3, device=second)
    wanted = gathered(caches, chunk, [1, 2, 3])
    before = host_bytes(chunk)
    try:
        AdaptiveConnector(DEVICE).from_gpu(chunk, caches, [1, 2, 3]).synchronize()
    except PortaKVError as error:
        check_sentence(str(error), "cuda:0", "cuda:1")
        wanted = before
    assert torch.equal(host_bytes(chunk), wanted)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_bad_block_is_named_by_its_position_in_the_whole_copy(bad: int) -> None:
    """Head, body and tail are launches of their own; each counts from its own first position."""
    caches, chunk = make_caches(), make_chunk(2 * SIZE + 1)
    blocks = [3, 1, 4]
    blocks[bad] = BLOCKS
    ids = torch.tensor(blocks, device=DEVICE)
    transfer = copy_rows(
        KVView(caches, "layer | kv block token head dim"),
        KVView(chunk, "kv layer token (head dim)", heads=caches[0].shape[3]),
        Index(ids, step=SIZE, offset=1),
        count=2 * SIZE + 1,
    )
    with pytest.raises(SlotError) as caught:
        transfer.synchronize()
    position = max(0, bad * SIZE - 1)
    found = int(str(caught.value).split("Position ")[1].split()[0])
    assert position <= found < position + SIZE
