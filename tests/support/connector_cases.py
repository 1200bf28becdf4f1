# SPDX-License-Identifier: Apache-2.0
"""Caches and chunks in a connector's default layouts, and what they hold by plain indexing."""

from __future__ import annotations

import torch

from support.guarded_memory import filled

LAYERS, BLOCKS, SIZE, HEADS, DIM = 3, 6, 4, 2, 8
SLOTS = BLOCKS * SIZE


def make_caches(
    blocks: int = BLOCKS,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """A list over layers of ``(2, blocks, SIZE, HEADS, DIM)``."""
    return [filled((2, blocks, SIZE, HEADS, DIM), dtype, device=device) for _ in range(LAYERS)]


def make_chunk(
    tokens: int, dtype: torch.dtype = torch.float16, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A poisoned chunk ``[2, LAYERS, tokens, HEADS * DIM]``."""
    return filled((2, LAYERS, tokens, HEADS * DIM), dtype, poison=True, device=device)


def rows(caches: list[torch.Tensor], slots: list[int]) -> torch.Tensor:
    """What a chunk of ``slots`` holds: ``[2, LAYERS, T, HEADS * DIM]``."""
    flat = [cache.reshape(2, -1, HEADS * DIM)[:, slots] for cache in caches]
    return torch.stack(flat, dim=1)


def scattered(
    caches: list[torch.Tensor], chunk: torch.Tensor, slots: list[int]
) -> list[torch.Tensor]:
    """What the caches hold once the first tokens of a chunk went to ``slots``."""
    found = []
    for layer, cache in enumerate(caches):
        flat = cache.reshape(2, -1, HEADS * DIM).clone()
        flat[:, slots] = chunk[:, layer, : len(slots)]
        found.append(flat.view(cache.shape))
    return found
