# SPDX-License-Identifier: Apache-2.0
"""Caches, a chunk and a connector on which calls may go wrong."""

from __future__ import annotations

import torch

from portakv import AdaptiveConnector, KVView
from support.guarded_memory import filled

LAYERS, BLOCKS, SIZE, HEADS, DIM = 3, 5, 4, 2, 8
SLOTS = BLOCKS * SIZE
KV_LAYOUT = "layer | kv block token head dim"
CHUNK_LAYOUT = "kv layer token (head dim)"


class Scene:
    """Caches, a chunk and a connector, and the calls that may go wrong on them."""

    def __init__(self) -> None:
        self.caches = [filled((2, BLOCKS, SIZE, HEADS, DIM)) for _ in range(LAYERS)]
        self.chunk = filled((2, LAYERS, 8, HEADS * DIM), poison=True)
        self.connector = AdaptiveConnector("cpu")

    @property
    def memory(self) -> list[torch.Tensor]:
        return [*self.caches, self.chunk]

    def cache_view(self) -> KVView:
        return KVView(self.caches, KV_LAYOUT)

    def chunk_view(self) -> KVView:
        return KVView(self.chunk, CHUNK_LAYOUT, heads=HEADS)
