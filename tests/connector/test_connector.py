# SPDX-License-Identifier: Apache-2.0
"""`AdaptiveConnector`: what may be passed, and in which layouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.connector_cases import (
    BLOCKS,
    DIM,
    HEADS,
    LAYERS,
    SIZE,
    SLOTS,
    make_caches,
    make_chunk,
    rows,
    scattered,
)
from support.guarded_memory import filled, refused, same, untouched

from portakv import AdaptiveConnector, Index, LayoutError, Transfer


@pytest.fixture
def connector() -> AdaptiveConnector:
    return AdaptiveConnector("cpu")


def test_defaults_are_flash_attention_and_2ltd(connector: AdaptiveConnector) -> None:
    caches, chunk, slots = make_caches(), make_chunk(5), [7, 0, 23, 4, 11]
    with untouched(caches):
        stored = connector.from_gpu(chunk, caches, slots)
    assert isinstance(stored, Transfer)
    assert same(chunk, rows(caches, slots))
    targets = make_caches()
    wanted = scattered(targets, chunk, [1, 2, 20, 9, 5])
    with untouched(chunk):
        loaded = connector.to_gpu(chunk, targets, [1, 2, 20, 9, 5])
    assert all(map(same, targets, wanted))
    for transfer in (stored, loaded):
        assert transfer.done()
        transfer.wait()
        transfer.synchronize()
        transfer.synchronize()


@pytest.mark.parametrize("form", ["list", "array", "int32", "int64", "strided", "frozen", "index"])
def test_slots_in_every_form(connector: AdaptiveConnector, form: str) -> None:
    caches, chunk, slots = make_caches(), make_chunk(4), [9, 2, 17, 6]
    frozen = np.array(slots)
    frozen.flags.writeable = False
    passed: Any = {
        "list": slots,
        "array": np.array(slots, dtype=np.int32),
        "int32": torch.tensor(slots, dtype=torch.int32),
        "int64": torch.tensor(slots),
        "strided": torch.tensor([[slot, 0] for slot in slots])[:, 0],
        "frozen": frozen,
        "index": Index(slots),
    }[form]
    connector.from_gpu(chunk, caches, passed)
    assert same(chunk, rows(caches, slots))
    wanted = scattered(caches, chunk, list(slots))
    connector.to_gpu(chunk, caches, passed)
    assert all(map(same, caches, wanted))


@pytest.mark.parametrize("step", [-1, 2])
def test_slots_as_a_strided_array(connector: AdaptiveConnector, step: int) -> None:
    caches, slots = make_caches(), np.array([9, 2, 17, 6])[::step]
    chunk = make_chunk(len(slots))
    connector.from_gpu(chunk, caches, slots)
    assert same(chunk, rows(caches, slots.tolist()))


def test_slots_as_a_list_of_numpy_integers(connector: AdaptiveConnector) -> None:
    caches, chunk = make_caches(), make_chunk(3)
    connector.from_gpu(chunk, caches, list(np.array([9, 2, 17])))
    assert same(chunk, rows(caches, [9, 2, 17]))


def test_slots_that_change_after_the_call(connector: AdaptiveConnector) -> None:
    caches, chunk, slots = make_caches(), make_chunk(3), torch.tensor([9, 2, 17])
    for wanted in ([9, 2, 17], [1, 3, 5], [23, 22, 21]):
        slots.copy_(torch.tensor(wanted))
        connector.from_gpu(chunk, caches, slots)
        assert same(chunk, rows(caches, wanted))


def test_start_and_end(connector: AdaptiveConnector) -> None:
    caches, slots = make_caches(), [9, 2, 17, 6, 0, 3]
    for start, end in ((0, None), (0, 6), (2, 5), (5, None), (3, 3)):
        chunk = make_chunk(6)
        count = len(slots[start:end])
        wanted = chunk.clone()
        wanted[:, :, :count] = rows(caches, slots[start:end])
        connector.from_gpu(chunk, caches, slots, start, end)
        assert same(chunk, wanted)
        expected = scattered(caches, chunk, slots[start:end])
        connector.to_gpu(chunk, caches, slots, start=np.int64(start), end=end)
        assert all(map(same, caches, expected))


def test_negative_slots_leave_rows_alone(connector: AdaptiveConnector) -> None:
    caches, chunk, slots = make_caches(), make_chunk(5), [9, -1, 17, -5, 0]
    kept = [0, 2, 4]
    wanted = chunk.clone()
    wanted[:, :, kept] = rows(caches, [9, 17, 0])
    connector.from_gpu(chunk, caches, slots)
    assert same(chunk, wanted)
    expected = scattered(caches, chunk[:, :, kept], [9, 17, 0])
    connector.to_gpu(chunk, caches, slots)
    assert all(map(same, caches, expected))
    with untouched(caches, chunk):
        assert connector.to_gpu(chunk, caches, [-1, -1, -1]).done()


@pytest.mark.parametrize("wrapped", [True, False])
def test_memory_objects(connector: AdaptiveConnector, wrapped: bool) -> None:
    caches, chunk = make_caches(), make_chunk(3)
    memory_obj = SimpleNamespace(tensor=chunk, metadata="kept") if wrapped else chunk
    connector.from_gpu(memory_obj, caches, [4, 5, 6])
    assert same(chunk, rows(caches, [4, 5, 6]))


def test_caches_in_every_container(connector: AdaptiveConnector) -> None:
    caches = make_caches()
    named = {f"model.layers.{i}.attn": cache for i, cache in enumerate(caches)}
    for passed in (caches, tuple(caches), named):
        chunk = make_chunk(3)
        connector.from_gpu(chunk, passed, [4, 5, 6])
        assert same(chunk, rows(caches, [4, 5, 6]))


# Layouts


def test_mla_gets_its_chunk_of_one_kv() -> None:
    caches = [filled((BLOCKS, SIZE, 72)) for _ in range(LAYERS)]
    chunk = filled((1, LAYERS, 4, 72), poison=True)
    connector = AdaptiveConnector("cpu", kv_layout="layer | block token dim")
    slots = [9, 2, 17, 6]
    connector.from_gpu(chunk, caches, slots)
    flat = torch.stack([cache.view(SLOTS, 72)[slots] for cache in caches])
    assert same(chunk[0], flat)
    with refused(LayoutError, "memory_obj", "'kv'", "1", "2", watch=caches):
        connector.from_gpu(filled((2, LAYERS, 4, 72)), caches, slots)


def test_unequal_widths() -> None:
    pairs = [
        (filled((BLOCKS, SIZE, HEADS, 6)), filled((BLOCKS, SIZE, HEADS, 2))) for _ in range(LAYERS)
    ]
    chunk = filled((LAYERS, 4, HEADS, 8), poison=True)
    connector = AdaptiveConnector(
        "cpu",
        kv_layout="layer kv | block token head dim",
        chunk_layout="layer token head (kv dim)",
    )
    slots = [9, 2, 17, 6]
    connector.from_gpu(chunk, pairs, slots)
    for layer, pair in enumerate(pairs):
        flat = [part.view(SLOTS, HEADS, -1)[slots] for part in pair]
        assert same(chunk[layer], torch.cat(flat, dim=-1))
    targets = [tuple(torch.zeros_like(part) for part in pair) for pair in pairs]
    connector.to_gpu(chunk, targets, slots)
    for pair, target in zip(pairs, targets, strict=True):
        for part, landed in zip(pair, target, strict=True):
            assert same(landed.view(SLOTS, HEADS, -1)[slots], part.view(SLOTS, HEADS, -1)[slots])
            assert int((landed != 0).any(-1).any(-1).sum()) <= len(slots)


def test_block_first_chunks() -> None:
    caches, slots = make_caches(), [9, 2, 17, 6, 0, 3, 11]
    chunk = filled((2, LAYERS, 2, SIZE, HEADS, DIM), poison=True)
    before = chunk.clone()
    connector = AdaptiveConnector("cpu", chunk_layout="block layer kv token head dim")
    connector.from_gpu(chunk, caches, slots)
    dense = chunk.permute(2, 1, 0, 3, 4, 5).reshape(2, LAYERS, 8, HEADS * DIM)
    assert same(dense[:, :, :7].contiguous(), rows(caches, slots))
    assert same(chunk[1, :, :, 3], before[1, :, :, 3])


@pytest.mark.parametrize("block_first", [True, False])
def test_hnd_is_read_from_strides(block_first: bool) -> None:
    # The logical shape is that of NHD; heads lie outside of tokens in memory.
    shape = (BLOCKS, 2, HEADS, SIZE, DIM) if block_first else (2, BLOCKS, HEADS, SIZE, DIM)
    caches = [filled(shape).transpose(2, 3) for _ in range(LAYERS)]
    order = "block kv" if block_first else "kv block"
    connector = AdaptiveConnector("cpu", kv_layout=f"layer | {order} token head dim")
    kv_first = [cache.transpose(0, 1) if block_first else cache for cache in caches]
    slots, chunk = [9, 2, 17, 6], make_chunk(4)
    connector.from_gpu(chunk, caches, slots)
    assert same(chunk, rows(kv_first, slots))
    wanted = scattered(kv_first, chunk, [1, 5, 23, 8])
    connector.to_gpu(chunk, caches, [1, 5, 23, 8])
    assert all(same(cache, want) for cache, want in zip(kv_first, wanted, strict=True))


@pytest.mark.parametrize("kv_layout", ["layer kv | block token head dim", "layer | block page"])
def test_layers_that_lie_backwards_in_one_allocation(kv_layout: str) -> None:
    opaque = kv_layout.endswith("page")
    pool = filled((LAYERS, 2, BLOCKS, SIZE, HEADS, DIM))
    if opaque:
        caches: Any = [pool[layer, 0].view(BLOCKS, -1) for layer in reversed(range(LAYERS))]
        connector = AdaptiveConnector(
            "cpu", kv_layout=kv_layout, chunk_layout="layer block page", block_size=SIZE
        )
        chunk = filled((LAYERS, 2, SIZE * HEADS * DIM), poison=True)
        connector.from_gpu(chunk, caches, Index([4, 1], step=SIZE))
        assert same(chunk, torch.stack([cache[[4, 1]] for cache in caches]))
        return
    caches = [(pool[layer, 1], pool[layer, 0]) for layer in reversed(range(LAYERS))]
    chunk = make_chunk(3)
    AdaptiveConnector("cpu", kv_layout=kv_layout).from_gpu(chunk, caches, [9, 2, 17])
    assert same(chunk, rows([torch.stack(pair) for pair in caches], [9, 2, 17]))
