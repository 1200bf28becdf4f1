# SPDX-License-Identifier: Apache-2.0
"""A small pool of three layers and a chunk, on any device."""

from __future__ import annotations

import torch

from portakv import KVView
from support.core_cases import noise


def pool(
    device: torch.device | str, *, blocks: int = 6, dim: int = 8, layers: int = 3
) -> list[torch.Tensor]:
    """Return layers ``[kv, block, token (4), head (2), dim]`` in separate allocations."""
    return [noise(2, blocks, 4, 2, dim, seed=n).to(device) for n in range(layers)]


def chunk(
    device: torch.device | str, tokens: int, *, dim: int = 8, layers: int = 3
) -> torch.Tensor:
    return noise(2, layers, tokens, 2 * dim, seed=99).to(device)


def paged(caches: list[torch.Tensor]) -> KVView:
    return KVView(caches, "layer | kv block token head dim")


def dense(rows: torch.Tensor) -> KVView:
    return KVView(rows, "kv layer token (head dim)", heads=2)


def rows_of(caches: list[torch.Tensor]) -> torch.Tensor:
    """Return a copy of a pool on the host: [kv, layer, slot, (head dim)]."""
    return torch.stack([c.cpu().flatten(3).flatten(1, 2) for c in caches], dim=1)
