# SPDX-License-Identifier: Apache-2.0
"""Caches and chunks in a connector's default layouts, what they hold by plain indexing, and a
registry for each test of the modules that import the fixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from portakv import AdaptiveConnector, Index
from portakv.registry import registry
from support.guarded_memory import filled

LAYERS = 3
BLOCKS = 6
SIZE = 4
HEADS = 2
DIM = 8
SLOTS = BLOCKS * SIZE
KV_LAYOUT = "layer | kv block token head dim"


def make_caches(
    blocks: int = BLOCKS, dtype: torch.dtype = torch.float16, device: torch.device | str = "cpu"
) -> list[torch.Tensor]:
    """Return a list over layers of ``(2, blocks, SIZE, HEADS, DIM)``."""
    return [filled((2, blocks, SIZE, HEADS, DIM), dtype, device=device) for _ in range(LAYERS)]


def make_chunk(
    tokens: int, dtype: torch.dtype = torch.float16, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return a poisoned chunk ``[2, LAYERS, tokens, HEADS * DIM]``."""
    return filled((2, LAYERS, tokens, HEADS * DIM), dtype, poison=True, device=device)


def rows(caches: list[torch.Tensor], slots: list[int]) -> torch.Tensor:
    """Return the expected rows of a chunk of ``slots``: ``[2, LAYERS, T, HEADS * DIM]``."""
    flat = [cache.reshape(2, -1, HEADS * DIM)[:, slots] for cache in caches]
    return torch.stack(flat, dim=1)


def scattered(
    caches: list[torch.Tensor], chunk: torch.Tensor, slots: list[int]
) -> list[torch.Tensor]:
    """Return the expected caches after the first tokens of a chunk went to ``slots``."""
    result = []
    for layer, cache in enumerate(caches):
        flat = cache.reshape(2, -1, HEADS * DIM).clone()
        flat[:, slots] = chunk[:, layer, : len(slots)]
        result.append(flat.view(cache.shape))
    return result


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a separate registry, and no forced backend."""
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)


@pytest.fixture
def caches() -> list[torch.Tensor]:
    return make_caches()


def store(
    caches: list[torch.Tensor], slots: Any, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the chunk that a connector stored, the expected chunk) for slots of which some are
    padding; their rows keep the chunk's poison."""
    index = slots if isinstance(slots, Index) else Index(slots)
    expanded = index.slots(index.length or 0)
    chunk = make_chunk(len(expanded))
    wanted = chunk.clone()
    stored = torch.from_numpy(expanded >= 0)
    wanted[:, :, stored] = rows(caches, expanded[expanded >= 0].tolist())
    connector = AdaptiveConnector("cpu", backend=backend)
    connector.from_gpu(chunk, caches, index).synchronize()
    return chunk, wanted
