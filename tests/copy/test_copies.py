# SPDX-License-Identifier: Apache-2.0
"""Connector and copies on each device: ids, dtypes, batches, bad ids, memory of the host."""

from __future__ import annotations

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
    STORE,
    Rig,
    check,
    gathered,
    host_bytes,
    make_caches,
    make_chunk,
    scattered,
    settle,
)
from support.guarded_memory import check_sentence, refused, untouched

from portakv import AdaptiveConnector, Index, KVView, copy_rows
from portakv.errors import DeviceMismatch, PortaKVError, SlotError

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
IDS = [9, -1, 17, 6, 0, -5, 23]
PLACES = pytest.mark.parametrize("place", ["host", "device"])


@pytest.fixture
def rig(device: torch.device) -> Rig:
    return Rig(device)


@pytest.fixture
def card(accelerator: torch.device) -> Rig:
    return Rig(accelerator)


def moved(rig: Rig, store: bool, chunk: torch.Tensor, ids: Any, slots: list[int]) -> None:
    """Move the rows of the slots, and nothing else."""
    wanted = rig.wanted(store, chunk, slots)
    with untouched(rig.targets(not store, chunk)):
        rig.move(store, chunk, rig.caches, ids).synchronize()
    check(rig.targets(store, chunk), wanted)


@STORE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_bit_by_bit(rig: Rig, dtype: torch.dtype, store: bool) -> None:
    rig.caches = make_caches(dtype, rig.device)
    moved(rig, store, make_chunk(len(IDS), dtype, rig.device), IDS, IDS)


@STORE
@pytest.mark.parametrize("place", ["host", "device", "strided"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_every_kind(rig: Rig, dtype: torch.dtype, place: str, store: bool) -> None:
    ids = rig.ids(IDS, place).to(dtype)
    if place == "strided":
        ids = torch.stack([ids, ids * 0], dim=1)[:, 0]
    moved(rig, store, rig.chunk(len(IDS)), ids, IDS)


@STORE
@PLACES
@pytest.mark.parametrize("memory", ["pinned", "pageable"])
def test_memory_objects_on_the_host(card: Rig, memory: str, place: str, store: bool) -> None:
    for slots in (IDS, [-1] * len(IDS)):
        moved(card, store, card.chunk(len(IDS), memory), card.ids(slots, place), slots)


@PLACES
def test_batches(rig: Rig, place: str) -> None:
    chunks = [rig.chunk(3), rig.chunk(3), rig.chunk(2, "pageable"), rig.chunk(3)]
    slots = [9, 2, 17, 6, 0, 3, 11, 23, 14, -1]
    starts = [0, 3, 6, 8]
    ends = [3, 6, 8, 10]
    jobs = list(zip(chunks, starts, ends, strict=True))
    wanted = [gathered(rig.caches, chunk, slots[start:end]) for chunk, start, end in jobs]
    ids = rig.ids(slots, place)
    side = None if rig.device.type == "cpu" else torch.Stream(rig.device)
    store = rig.connector.batched_from_gpu
    load = rig.connector.batched_to_gpu
    store(chunks, None, ids, starts, ends, stream=side).synchronize()
    check(chunks, wanted)
    joined = torch.cat([chunk.cpu()[:, :, : end - start] for chunk, start, end in jobs], dim=2)
    caches = make_caches(device=rig.device)
    back = scattered(caches, joined, slots)
    load(chunks, caches, ids, starts, ends).synchronize()
    check(caches, back)


# Bad ids on the device


@pytest.mark.parametrize("bad", [SLOTS, SLOTS + 3, 2**31 - 1, 2**32 + 1, 2**63 - 1])
@STORE
def test_bad_device_ids_move_nothing_and_are_reported(card: Rig, store: bool, bad: int) -> None:
    chunk = card.chunk()
    slots = [9, 2, bad, 6, -1]
    ids = card.ids(slots).to(torch.int32 if bad < 2**31 else torch.int64)
    wanted = card.wanted(store, chunk, slots)
    with untouched(card.targets(not store, chunk)), pytest.raises(SlotError) as caught:
        card.move(store, chunk, None, ids).synchronize()
    check_sentence(str(caught.value), "Position 2", "past the end", "not moved")
    check(card.targets(store, chunk), wanted)
    # The device is sound, and the error was reported: the next call goes on.
    card.move(store, chunk[:, :, :2], None, [1, 2]).synchronize()


def blocks_to(chunk: torch.Tensor, rig: Rig, ids: list[int], offset: int = 0) -> Any:
    """A copy of the rows of blocks, which are named on the device."""
    view = KVView(chunk, CHUNK_LAYOUT, heads=HEADS)
    index = Index(rig.ids(ids), step=SIZE, offset=offset)
    return copy_rows(KVView(rig.caches, KV_LAYOUT), view, index, count=chunk.shape[2])


@pytest.mark.parametrize("bad", [BLOCKS, 2**31 - 1, 2**61, 2**62, -(2**63)])
@pytest.mark.parametrize("count", [3 * SIZE, 2 * SIZE + 1])
def test_bad_device_blocks(card: Rig, bad: int, count: int) -> None:
    chunk = card.chunk(count)
    slots = [4 * SIZE + i for i in range(SIZE)] + [-1] * SIZE
    slots += [SIZE + i for i in range(count - 2 * SIZE)]
    wanted = card.wanted(True, chunk, slots)
    outcome = pytest.raises(SlotError, match=f"Position {SIZE}") if bad > 0 else nullcontext()
    with outcome:
        blocks_to(chunk, card, [4, bad, 1]).synchronize()
    check([chunk], wanted)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_bad_block_is_named_by_its_position_in_the_whole_copy(card: Rig, bad: int) -> None:
    """Head, body and tail are launches of their own; each counts from its own first position."""
    blocks = [3, 1, 4]
    blocks[bad] = BLOCKS
    with pytest.raises(SlotError) as caught:
        blocks_to(card.chunk(2 * SIZE + 1), card, blocks, offset=1).synchronize()
    position = max(0, bad * SIZE - 1)
    reported = int(str(caught.value).split("Position ")[1].split()[0])
    assert position <= reported < position + SIZE


@pytest.mark.parametrize("memory", ["device", "pageable"])
def test_an_error_is_raised_by_done_or_by_the_next_call(card: Rig, memory: str) -> None:
    chunk = card.chunk(3, memory)
    ids = card.ids([1, SLOTS, 2])
    before = host_bytes(chunk)
    failed = card.move(True, chunk, None, ids)
    settle(card.device)
    with pytest.raises(SlotError, match="Position 1"):
        failed.done()
    assert torch.equal(host_bytes(chunk)[:, :, 1], before[:, :, 1])
    card.move(True, chunk, None, ids)
    settle(card.device)
    other = Rig(card.device)
    moved(other, False, other.chunk(3), [7, 8, 9], [7, 8, 9])  # it is not this one's error
    with refused(SlotError, "Position 1", "past the end", watch=[*card.caches, chunk]):
        card.move(False, chunk, None, [7, 8, 9])
    moved(card, False, chunk, [7, 8, 9], [7, 8, 9])


# Rows of one cache, and memory in other places


@pytest.mark.parametrize(
    ("src", "dst"), [([3, 4], None), (None, [3, 4]), ([3, 4], [9, 2]), (Index(offset=8), None)]
)
def test_rows_of_one_cache(rig: Rig, src: Any, dst: Any) -> None:
    view = KVView(rig.caches, KV_LAYOUT)
    wanted = [host_bytes(cache) for cache in rig.caches]
    sources = src if isinstance(src, list) else [0, 1] if src is None else [8, 9]
    for want in wanted:
        flat = want.view(2, SLOTS, -1)
        flat[:, dst or [0, 1]] = flat[:, sources].clone()
    copy_rows(view, view, src, dst, count=2).synchronize()
    check(rig.caches, wanted)
    with refused(SlotError, "source and destination", watch=rig.caches):
        first = view.slice(layers=slice(0, 2))
        second = view.slice(layers=slice(1, 3))
        copy_rows(first, second, [3, 4], [4, 9])


@pytest.mark.simdev
def test_the_registry_chooses_for_it() -> None:
    connector = AdaptiveConnector(simdev_cases.NAME)
    assert connector.device == simdev_cases.DEVICE
    assert f"{simdev_cases.NAME}:0" in connector.explain()


def test_devices_that_do_not_belong_together(card: Rig) -> None:
    caches = card.caches
    chunk = card.chunk(3)
    name = str(card.device)
    on_host = [cache.cpu() for cache in caches]
    with refused(DeviceMismatch, "cpu", name, "connector", watch=[*on_host, chunk]):
        card.connector.from_gpu(chunk, on_host, [1, 2, 3])
    with refused(DeviceMismatch, "cpu", name, watch=[*caches, chunk]):
        card.connector.from_gpu(chunk, [on_host[0], *caches[1:]], [1, 2, 3])
    pairs = [(AdaptiveConnector("cpu"), on_host, chunk, "cpu")]
    if torch.get_device_module(card.device).device_count() > 1:
        other = torch.device(card.device.type, 1)
        with refused(DeviceMismatch, str(other), name):
            card.connector.register_kv_caches(make_caches(device=other))
        pairs.append((card.connector, caches, make_chunk(3, device=other), str(other)))
    # A chunk of another device may be refused, or be right.
    for connector, there, here, word in pairs:
        before = host_bytes(here)
        wanted = gathered(there, here, [1, 2, 3])
        try:
            connector.from_gpu(here, there, [1, 2, 3]).synchronize()
        except PortaKVError as error:
            check_sentence(str(error), word, name)
            wanted = before
        check([here], [wanted])
