# SPDX-License-Identifier: Apache-2.0
"""Copies between views of several allocations: few calls of torch, each row in its place."""

from __future__ import annotations

from collections import Counter
from itertools import product
from operator import mul
from typing import Any

import numpy as np
import pytest
import torch
from support.core_cases import noise
from torch.utils._python_dispatch import TorchDispatchMode

from portakv import Index, KVView, copy_rows
from portakv.backends.strided import _by_entry, _grids

LAYERS = 4
BLOCKS = 9
BLOCK_SIZE = 4
TOKENS = 8
ROW = 6


class Calls(TorchDispatchMode):
    """Counts the ops of torch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def made() -> tuple[list[torch.Tensor], list[torch.Tensor], KVView, KVView]:
    """Paged caches of each layer, chunks, and both as views."""
    caches = [noise(BLOCKS, BLOCK_SIZE, ROW, seed=n) for n in range(LAYERS)]
    chunks = [noise(LAYERS, TOKENS, ROW, seed=9 + n) for n in range(3)]
    views = KVView(caches, "layer | block token dim"), KVView(chunks, "block | layer token dim")
    return caches, chunks, *views


@pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
def test_a_call_for_each_layer_of_each_chunk(store: bool) -> None:
    caches, chunks, paged, paged_chunks = made()
    ids = [7, 2, 0, 5, 8, 3]
    order = [2, 0, 1]
    sides = (paged, Index(ids, BLOCK_SIZE)), (paged_chunks, Index(order, TOKENS))
    (src, src_index), (dst, dst_index) = sides if store else sides[::-1]
    copy_rows(src, dst, src_index, dst_index, backend="reference")  # the backend checks itself once
    with Calls() as calls:
        copy_rows(src, dst, src_index, dst_index, backend="reference")
    rows = torch.stack([layer[ids].reshape(-1, ROW) for layer in caches])
    there = torch.cat([chunks[n] for n in order], dim=1)
    assert torch.equal(rows, there)
    # Chunks are written and read as they lie: no row is moved twice.
    moved = LAYERS * len(chunks)
    assert calls.seen["index_select"] == (moved if store else 0)
    assert calls.seen["index_copy_"] == (0 if store else moved)
    assert not calls.seen["_local_scalar_dense"]
    assert not calls.seen["copy_"]


@pytest.mark.parametrize(
    ("first", "last"), [(0, 6), (2, 6), (0, 4), (2, 3), (1, 6), (0, 5), (1, 2)]
)
@pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
def test_blocks_of_chunks_on_a_device_take_one_call_for_each_layer(
    store: bool, first: int, last: int, accelerator: torch.device
) -> None:
    """Chunks of two blocks, from any block to any other; those of whole chunks need no numbers."""
    caches = [noise(BLOCKS, BLOCK_SIZE, ROW, seed=n) for n in range(LAYERS)]
    chunks = noise(3, LAYERS, TOKENS, ROW, seed=9)
    there = [each.to(accelerator) for each in caches], chunks.to(accelerator)
    paged = KVView(there[0], "layer | block token dim")
    dense = KVView(there[1], "block layer token dim")
    ids = [7, 2, 0, 5, 8, 3][first:last]
    begin = first * BLOCK_SIZE
    count = len(ids) * BLOCK_SIZE
    sides = (paged, Index(ids, BLOCK_SIZE)), (dense, Index(offset=begin))
    (src, src_index), (dst, dst_index) = sides if store else sides[::-1]
    for _ in range(2):  # the backend checks itself once
        with Calls() as calls:
            copy_rows(
                src, dst, src_index, dst_index, count=count, backend="reference"
            ).synchronize()
    for place, block in enumerate(ids, first):
        at = slice(place % 2 * BLOCK_SIZE, (place % 2 + 1) * BLOCK_SIZE)
        for layer in range(LAYERS):
            pair = caches[layer][block], chunks[place // 2, layer, at]
            pair[store].copy_(pair[not store])
    assert all(map(torch.equal, caches, (each.cpu() for each in there[0])))
    assert torch.equal(chunks, there[1].cpu())
    if first % 2 == last % 2 == 0 and accelerator.type != "cuda":
        assert calls.seen["index" if store else "index_put_"] == LAYERS
        assert not {"index_select", "index_copy_", "copy_", "arange"} & calls.seen.keys()


def test_of_two_sides_only_ids_are_looked_at(accelerator: torch.device) -> None:
    """Slots that follow each other are known to lie in their view."""
    cache = noise(20, ROW, seed=1).to(accelerator)
    chunk = noise(5, ROW, seed=2).to(accelerator)
    src = KVView(cache, "token dim")
    dst = KVView(chunk, "token dim")
    for _ in range(2):  # the backend checks itself once
        ids = torch.tensor([7, 2, 0, 5, 8]).to(accelerator)
        with Calls() as calls:
            copy_rows(src, dst, Index(ids), backend="reference")
    assert torch.equal(chunk.cpu(), cache.cpu()[[7, 2, 0, 5, 8]])
    assert calls.seen["ge"] == calls.seen["lt"] == 1
    assert not {"arange", "bitwise_not"} & calls.seen.keys()


def test_rows_of_a_chunk_that_do_not_follow_each_other() -> None:
    caches, chunks, paged, paged_chunks = made()
    slots = [20, 3, 11, 9, 0]  # of the chunks: two lie in the first, in no order
    before = [chunk.clone() for chunk in chunks]
    copy_rows(paged, paged_chunks, Index(offset=1), Index(slots), count=5, backend="reference")
    for at, slot in enumerate(slots):
        for layer in range(LAYERS):
            before[slot // TOKENS][layer, slot % TOKENS] = caches[layer].reshape(-1, ROW)[1 + at]
    assert all(torch.equal(a, b) for a, b in zip(before, chunks, strict=True))


@pytest.mark.parametrize("kind", ["both", "source", "destination", "none"])
def test_units_by_the_entries_of_both_sides(kind: str) -> None:
    drawn = np.random.default_rng(1)
    src_units, dst_units = (torch.from_numpy(drawn.integers(0, 3, 50)) for _ in range(2))
    if kind == "both":
        # some lie one after the other
        dst_units[:20] = 0
        src_units[:20] = 1
    first = src_units if kind in ("both", "source") else None
    other = dst_units if kind in ("both", "destination") else None
    seen: list[int] = []
    for (src, dst), at in _by_entry(first, other, 50):
        places = list(range(50))[at] if isinstance(at, slice) else at.tolist()
        assert places == sorted(places)
        for place in places:
            assert src == (0 if first is None else int(first[place]))
            assert dst == (0 if other is None else int(other[place]))
        seen += places
    assert sorted(seen) == list(range(50))


@pytest.mark.parametrize(
    ("moves", "grids"),
    [([7], 1), ([0, 8, 16], 1), ([0, 96, 8, 104], 1), ([0, 0, 0], 1), ([0, 8, 24], 3), ([8, 0], 2),
     ([0, 4, 10, 14, 20, 24], 1), ([0, 4, 10, 15], 4)],
)  # fmt: skip
def test_planes_are_grids_or_each_by_itself(moves: list[int], grids: int) -> None:
    result = _grids(moves, 2)
    assert len(result) == grids
    listed = list[int]()
    for first, steps in result:
        counted = product(*(range(extent) for extent, _ in reversed(steps)))
        strides = [2 * stride for _, stride in reversed(steps)]
        listed += [first + sum(map(mul, at, strides)) for at in counted]
    assert listed == moves
