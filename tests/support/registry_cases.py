# SPDX-License-Identifier: Apache-2.0
"""A registry for each test, and a store through it. Test modules import the fixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from portakv import AdaptiveConnector, Index
from portakv.registry import registry
from support.guarded_memory import filled

LAYERS, BLOCKS, SIZE, HEADS, DIM = 3, 6, 4, 2, 8
KV_LAYOUT = "layer | kv block token head dim"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of its own for each test, and no forced backend."""
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    return


@pytest.fixture
def caches() -> list[torch.Tensor]:
    return [filled((2, BLOCKS, SIZE, HEADS, DIM)) for _ in range(LAYERS)]


def store(
    caches: list[torch.Tensor], slots: Any, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the chunk that a connector stored, what it should hold) for slots of which some are
    padding; their rows keep the chunk's poison."""
    index = slots if isinstance(slots, Index) else Index(slots)
    expanded = index.slots(index.length or 0)
    chunk = filled((2, LAYERS, len(expanded), HEADS * DIM), poison=True)
    wanted = chunk.clone()
    for layer, cache in enumerate(caches):
        rows = cache.view(2, BLOCKS * SIZE, HEADS * DIM)
        for position, slot in enumerate(expanded.tolist()):
            if slot >= 0:
                wanted[:, layer, position] = rows[:, slot]
    connector = AdaptiveConnector("cpu", backend=backend)
    connector.from_gpu(chunk, caches, index).synchronize()
    return chunk, wanted
