# SPDX-License-Identifier: Apache-2.0
"""Batches of chunks: equal and unequal ones, partial ones, ranges apart, none at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.connector_cases import (
    DIM,
    HEADS,
    LAYERS,
    SIZE,
    make_caches,
    make_chunk,
    rows,
    scattered,
)
from support.guarded_memory import filled, refused, same, untouched
from support.small_backends import small_backend

from portakv import AdaptiveConnector, SlotError
from portakv.backends.reference import Reference
from portakv.registry import registry

# name: tokens of each chunk, starts, ends
BATCHES: dict[str, tuple[list[int], list[int], list[int]]] = {
    "equal": ([4, 4, 4], [0, 4, 8], [4, 8, 12]),
    "one": ([4], [3], [7]),
    "partial last": ([4, 4, 4], [0, 4, 8], [4, 8, 10]),
    "partial first": ([4, 4], [0, 2], [2, 6]),
    "all partial": ([4, 4, 4], [0, 2, 5], [2, 5, 6]),
    "unequal": ([4, 2, 4, 3], [0, 4, 6, 10], [4, 6, 10, 12]),
    "apart": ([4, 4], [7, 1], [11, 5]),
    "a gap": ([3, 3, 3], [0, 4, 8], [3, 7, 11]),
    "some empty": ([4, 4, 4], [0, 4, 4], [4, 4, 8]),
    "nothing to move": ([4, 4], [3, 5], [3, 5]),
    "none": ([], [], []),
}
SLOTS = [9, 2, 17, 6, 0, 3, 11, 23, 14, 5, 20, 8]


@pytest.fixture
def connector() -> AdaptiveConnector:
    return AdaptiveConnector("cpu")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", BATCHES)
def test_batches(connector: AdaptiveConnector, name: str, dtype: torch.dtype) -> None:
    sizes, starts, ends = BATCHES[name]
    caches, chunks = make_caches(), [make_chunk(size) for size in sizes]
    slots = torch.tensor(SLOTS, dtype=dtype)
    wanted = [chunk.clone() for chunk in chunks]
    for want, start, end in zip(wanted, starts, ends, strict=True):
        want[:, :, : end - start] = rows(caches, SLOTS[start:end])
    with untouched(caches):
        stored = connector.batched_from_gpu(chunks, caches, slots, starts, ends)
    assert stored.done()
    assert all(map(same, chunks, wanted))
    expected = make_caches()
    targets = [cache.clone() for cache in expected]
    for chunk, start, end in zip(chunks, starts, ends, strict=True):
        expected = scattered(expected, chunk, SLOTS[start:end])
    with untouched(chunks):
        connector.batched_to_gpu(chunks, targets, slots, starts, ends).synchronize()
    assert all(map(same, targets, expected))


def test_negative_slots_in_a_batch(connector: AdaptiveConnector) -> None:
    caches, chunks = make_caches(), [make_chunk(4) for _ in range(3)]
    slots = [9, -1, 17, 6, -1, -1, -1, -1, 14, 5, -3, 8]
    wanted = [chunk.clone() for chunk in chunks]
    for position, slot in enumerate(slots):
        if slot >= 0:
            wanted[position // 4][:, :, position % 4] = rows(caches, [slot])[:, :, 0]
    connector.batched_from_gpu(chunks, caches, slots, [0, 4, 8], [4, 8, 12])
    assert all(map(same, chunks, wanted))
    expected = scattered(caches, torch.cat(chunks, dim=2)[:, :, [0, 2, 3, 8, 9, 11]],
                         [9, 17, 6, 14, 5, 8])  # fmt: skip
    connector.batched_to_gpu(chunks, caches, slots, [0, 4, 8], [4, 8, 12])
    assert all(map(same, caches, expected))


def different_kinds() -> dict[str, Any]:
    """Pairs of chunks that hold equal rows but are not alike as tensors."""
    wide = filled((2, LAYERS, 4, 2, HEADS * DIM), poison=True)
    return {
        "dtypes": [make_chunk(4), make_chunk(4, torch.bfloat16)],
        "widths": [make_chunk(4), filled((2, LAYERS, 4, HEADS * DIM // 2), torch.float32)],
        "ranks": [make_chunk(4), filled((2, LAYERS, 4, HEADS, DIM), poison=True)],
        "strides": [make_chunk(4), wide[:, :, :, 1]],
        "objects": [SimpleNamespace(tensor=make_chunk(4)), make_chunk(4)],
    }


@pytest.mark.parametrize("kind", ["dtypes", "widths", "ranks", "strides", "objects"])
def test_chunks_of_several_kinds(kind: str) -> None:
    connector = AdaptiveConnector("cpu", reinterpret=kind in ("dtypes", "widths"))
    caches, pair = make_caches(), different_kinds()[kind]
    slots = SLOTS[:8]
    connector.batched_from_gpu(pair, caches, slots, [0, 4], [4, 8])
    for chunk, part in zip(pair, (slots[:4], slots[4:]), strict=True):
        tensor = getattr(chunk, "tensor", chunk).contiguous()
        plain = tensor.view(2, LAYERS, 4, -1).view(torch.float16)
        assert same(plain, rows(caches, part))


def test_block_first_chunks_in_a_batch() -> None:
    caches = make_caches()
    chunks = [filled((1, LAYERS, 2, SIZE, HEADS, DIM), poison=True) for _ in range(3)]
    connector = AdaptiveConnector("cpu", chunk_layout="block layer kv token head dim")
    connector.batched_from_gpu(chunks, caches, SLOTS, [0, 4, 8], [4, 8, 12])
    for i, chunk in enumerate(chunks):
        plain = chunk[0].permute(1, 0, 2, 3, 4).reshape(2, LAYERS, SIZE, HEADS * DIM)
        assert same(plain.contiguous(), rows(caches, SLOTS[4 * i : 4 * i + 4]))


def test_one_launch_for_chunks_of_equal_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    backend = small_backend("counts")
    registry.register_backend("counts", backend)
    connector = AdaptiveConnector("cpu", backend="counts")
    assert issubclass(backend, Reference)
    checks = len(backend.given)
    caches, chunks = make_caches(), [make_chunk(n) for n in (4, 2, 4, 2, 4)]
    ends = [4, 6, 10, 11, 12]
    connector.batched_from_gpu(chunks, caches, SLOTS, [0, 4, 6, 10, 11], ends)
    assert len(backend.given) - checks == 2


def test_overlapping_ranges_are_stored_but_not_loaded(connector: AdaptiveConnector) -> None:
    caches, chunks = make_caches(), [make_chunk(4), make_chunk(4)]
    connector.batched_from_gpu(chunks, caches, SLOTS, [0, 2], [4, 6])
    assert same(chunks[1], rows(caches, SLOTS[2:6]))
    with refused(SlotError, "2 times", "once", watch=[*caches, *chunks]):
        connector.batched_to_gpu(chunks, caches, SLOTS, [0, 2], [4, 6])
