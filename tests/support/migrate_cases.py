# SPDX-License-Identifier: Apache-2.0
"""A model in parts: windows that ranks of any TP, PP and CP size hold, and caches full of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from portakv.migrate.messages import Box, Range
from portakv.migrate.shards import Shard
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.rows import leaves
from support.cache_cases import Cache

Model = list[np.ndarray[Any, np.dtype[np.uint8]]]  # for each kv [layer, token, head, byte]
_EQUAL = "vllm-nhd vllm-hnd flexkv-blockfirst flexkv-layerfirst dynamo-universal swifttransformer"
#: Elements of float16 for each kv, and presets that can hold them.
WIDTHS: dict[tuple[int, ...], str] = {
    (8, 8): f"{_EQUAL} epd vllm-0.26-nhd vllm-blhnc sglang-mha vllm-ascend",
    (8, 4): "vllm-0.26-nhd vllm-lhbnc vllm-ascend",
    (12,): "vllm-mla vllm-0.29-mla sglang-mla",
}


class Rank(NamedTuple):
    """One process of several: what it holds of the model, and which tokens."""

    layers: Range
    heads: Range
    tokens: np.ndarray[Any, np.dtype[np.bool_]]

    @property
    def box(self) -> Box:
        return self.layers[:2], self.heads[:2]

    def part(self, array: Any) -> Any:
        """Return the same of an array [layer, token, head, ...]: all tokens."""
        return array[slice(*self.layers[:2]), :, slice(*self.heads[:2])]


@st.composite
def ranges(draw: st.DrawFn, extent: int, most: int) -> list[Range]:
    """Return an axis as up to ``most`` ranks hold it: in uneven parts, or each part by several
    ranks."""
    count = draw(st.integers(1, most))
    if count > extent:
        return [(n * extent // count, n * extent // count + 1, extent) for n in range(count)]
    cuts = draw(st.permutations(range(1, extent)))[: count - 1]
    ends = [0, *sorted(cuts), extent]
    return [(a, b, extent) for a, b in pairwise(ends)]


@st.composite
def ranks(
    draw: st.DrawFn, layers: int, heads: int, tokens: int, most: tuple[int, int, int] = (3, 6, 3)
) -> list[Rank]:
    """Return the ranks of one side, in any order: PP, TP and CP sizes, each up to ``most``; CP
    deals the tokens out in turns."""
    cp = draw(st.integers(1, most[2]))
    turn = draw(st.integers(1, 5))
    dealt = [np.arange(tokens) // turn % cp == n for n in range(cp)]
    stages = draw(ranges(layers, most[0]))
    parts = draw(ranges(heads, most[1]))
    return draw(st.permutations([Rank(a, b, c) for a in stages for b in parts for c in dealt]))


class Held:
    """The cache of a rank: its tokens lie in blocks in any order, one more block does not belong to
    it."""

    def __init__(
        self,
        rank: Rank,
        preset: str,
        widths: tuple[int, ...],
        size: int,
        seed: int = 0,
        shared: bool = False,
    ) -> None:
        count = -(-len(rank.tokens) // size)
        extents = [past - first for first, past, _ in (rank.layers, rank.heads)]
        self.rank = rank
        self.size = size
        layers, heads = extents
        self.cache = Cache(preset, layers, heads, widths, count + 1, size, seed=seed, shared=shared)
        self.shard = Shard(self.cache.view, rank.layers, rank.heads)
        self.blocks = np.random.default_rng(seed).permutation(count + 1)[:count]
        slots = (self.blocks[:, None] * size + np.arange(size)).ravel()[: len(rank.tokens)]
        self.slots = np.where(rank.tokens, slots, -1)

    def written(self, model: Model, first: int = 0) -> Memory:
        """Return the memory of the cache after its rows of the model, from a token on, were written
        by the oracle."""
        rows = self.cache.rows
        memory = Memory.snapshot(self.cache.tensors)
        here = self.rank.tokens & (np.arange(len(self.slots)) >= first)
        for kv, whole in enumerate(model):
            for layer, own in enumerate(self.rank.part(whole)):
                at = rows.row_addresses(kv, layer, self.slots[here])
                memory.write(at, own[here])
        return memory

    def fill(self, model: Model) -> None:
        """Write its rows of the model."""
        storages = [tensor.untyped_storage() for tensor in leaves(self.cache.tensors)]
        empty = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.written(model).restore(empty.new_empty(0).set_(storage) for storage in storages)


def drawn_model(layers: int, tokens: int, heads: int, widths: tuple[int, ...]) -> Model:
    """Return random rows of a model of float16."""
    random = np.random.default_rng([layers, tokens, heads])
    shapes = [(layers, tokens, heads, 2 * width) for width in widths]
    return [random.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
