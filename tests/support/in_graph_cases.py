# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of transfers inside `torch.compile`."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

LAYERS, BLOCKS, SIZE, HEADS, DIM = 3, 8, 4, 2, 8
SLOTS = BLOCKS * SIZE
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COMPILERS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Nothing compiled before is there."""
    torch._dynamo.reset()


def make_caches(device: str) -> list[torch.Tensor]:
    return [torch.randn(2, BLOCKS, SIZE, HEADS, DIM, device=device) for _ in range(LAYERS)]


def in_one_allocation(device: str) -> list[torch.Tensor]:
    """As `make_caches`, all layers views of one tensor."""
    return list(torch.randn(LAYERS, 2, BLOCKS, SIZE, HEADS, DIM, device=device))


ALLOCATIONS = [make_caches, in_one_allocation]


def make_chunk(tokens: int, device: str) -> torch.Tensor:
    return torch.randn(2, LAYERS, tokens, HEADS * DIM, device=device)


def rows_of(caches: list[torch.Tensor], slots: torch.Tensor) -> torch.Tensor:
    """What a store of these slots puts into a chunk."""
    return torch.stack([cache.reshape(2, SLOTS, HEADS * DIM)[:, slots] for cache in caches], dim=1)


class Counter(CompileCounterWithBackend):
    """Counts compilations, and keeps the graphs."""

    def ops(self) -> list[str]:
        return [
            str(node.target)
            for graph in self.graphs
            for node in graph.graph.nodes
            if "portakv" in str(node.target)
        ]
