# SPDX-License-Identifier: Apache-2.0
"""Pages of `canonical_layout`: what each worker copies to and from a chunk of the whole model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from portakv import LayoutError, copy_rows
from portakv.integrations import IntegrationError
from portakv.integrations.vllm.moves import (
    RankMapping,
    Run,
    Share,
    groups_of,
    moves_of,
    page_bytes,
)

LAYERS = 3
HEADS = 4
TOKENS = 8
DIM = 16
BLOCKS = 12
CHUNKS = 5
TOGETHER = 2
HEAD = TOKENS * DIM


class Memory:
    """A stand-in of vLLM's shared memory, with gaps between the chunks."""

    def __init__(self) -> None:
        self.rows = torch.zeros(CHUNKS, 1 << 15, dtype=torch.int8)
        self.used = 0

    def create_next_canonical_view(self, tensor_page_size: int) -> torch.Tensor:
        first = self.used
        self.used += tensor_page_size
        return self.rows[:, first : self.used]


def mapped(rank: int, workers: int, writers: int = 1) -> Any:
    """Return what vLLM says of a page ``[k/v, heads of the rank, tokens, dim]`` of a rank."""
    alike = workers // writers  # ranks with different heads
    heads = HEADS // alike
    part = rank // writers
    runs = [
        SimpleNamespace(
            local_offset=kv * heads * HEAD,
            canonical_offset=(kv * HEADS + part * heads) * HEAD,
            fragment_size=HEAD,
            num_fragments=heads,
            local_stride=HEAD,
            canonical_stride=HEAD,
        )
        for kv in range(2)
    ]
    return SimpleNamespace(
        canonical_page_size_bytes=2 * HEADS * HEAD,
        runs=runs,
        num_writers=writers,
        writer_index=rank % writers,
    )


def refs_of(mapping: Any, width: int) -> list[list[Any]]:
    refs = [
        SimpleNamespace(tensor_idx=at, page_size_bytes=width, mapping=mapping)
        for at in range(LAYERS)
    ]
    return [refs]


def model() -> np.ndarray:
    """Return the pages of the whole model, ``[layers, blocks, k/v, heads, bytes]``."""
    draw = np.random.default_rng(0)
    return draw.integers(-128, 128, (LAYERS, BLOCKS, 2, HEADS, HEAD), np.int8)


def pages_of(whole: np.ndarray, rank: int, workers: int, writers: int = 1) -> list[torch.Tensor]:
    alike = workers // writers
    heads = HEADS // alike
    first = rank // writers * heads
    own = whole[:, :, :, first : first + heads]
    # Rows with a gap, as padded pages have.
    tensors = [torch.full((BLOCKS, own[0, 0].size + 64), 9, dtype=torch.int8) for _ in own]
    for tensor, layer in zip(tensors, own, strict=True):
        tensor[:, : own[0, 0].size] = torch.from_numpy(layer.reshape(BLOCKS, -1).copy())
    return [tensor[:, : own[0, 0].size] for tensor in tensors]


def move(groups: Any, blocks: list[int], chunks: list[int], store: bool, first: int = 0) -> None:
    device = SimpleNamespace(
        block_ids=np.array(blocks), group_sizes=[len(blocks)], block_indices=[first]
    )
    host = SimpleNamespace(block_ids=np.array(chunks))
    for each in moves_of(groups, set(), TOGETHER, device, host, store):
        for part in each.parts:
            sides = (part.device, part.host, each.blocks, each.places)
            if not store:
                sides = (part.host, part.device, each.places, each.blocks)
            copy_rows(*sides, count=each.pages).synchronize()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 4)])
def test_engines_with_other_numbers_of_workers_read_each_other(before: int, after: int) -> None:
    whole = model()
    memory = Memory()
    blocks = [7, 2, 11, 4, 0]
    for rank in range(before):
        memory.used = 0
        pages = pages_of(whole, rank, before)
        refs = refs_of(mapped(rank, before), pages[0].shape[1])
        share = Share(rank, before, True)
        move(groups_of(refs, pages, TOGETHER, 0, memory, share), blocks, [3, 0, 4], True)
    # The bytes of a chunk are those of the model, and nothing else was written.
    places = [(3, 0), (3, 1), (0, 0), (0, 1), (4, 0)]
    page = 2 * HEADS * HEAD
    expected = np.zeros_like(memory.rows.numpy())
    for layer in range(LAYERS):
        for block, (chunk, at) in zip(blocks, places, strict=True):
            begin = (layer * TOGETHER + at) * page
            expected[chunk, begin : begin + page] = whole[layer, block].reshape(-1)
    assert (memory.rows.numpy() == expected).all()
    for rank in range(after):
        memory.used = 0
        pages = pages_of(np.zeros_like(whole), rank, after)
        refs = refs_of(mapped(rank, after), pages[0].shape[1])
        share = Share(rank, after, True)
        move(groups_of(refs, pages, TOGETHER, 0, memory, share), [1, 5, 6], [3, 0], False, first=1)
        right = pages_of(whole, rank, after)
        for got, wanted in zip(pages, right, strict=True):
            assert torch.equal(got[[1, 5, 6]], wanted[[2, 11, 4]])
            assert not got[[0, 2, 3, 4, 7]].any()


def test_workers_with_equal_bytes_take_turns() -> None:
    """Each page of a chunk is written once, by one of the workers that have its bytes."""
    whole = model()
    blocks = [*range(8)]
    written = []
    for rank in range(4):
        memory = Memory()
        pages = pages_of(whole, rank, 4, 2)
        refs = refs_of(mapped(rank, 4, 2), pages[0].shape[1])
        groups = groups_of(refs, pages, TOGETHER, 0, memory, Share(rank, 4, True))
        move(groups, blocks, [0, 1, 2, 3], True)
        there = memory.rows.numpy()[:4, : memory.used].reshape(4, LAYERS, TOGETHER, 2, HEADS, HEAD)
        written.append((there != 0).any(-1))
    assert (np.sum(written, 0) == 1).all()


def test_pages_without_a_mapping_are_stored_whole() -> None:
    """Packed and cross-layer pages, of one worker and of several."""
    for workers in (1, 2):
        memory = Memory()
        stored = []
        for rank in range(workers):
            memory.used = 0
            pages = [torch.randint(-128, 128, (BLOCKS, 640), dtype=torch.int8)]
            refs = [[SimpleNamespace(tensor_idx=0, page_size_bytes=640, mapping=None)]]
            groups = groups_of(refs, pages, TOGETHER, 0, memory, Share(rank, workers, False))
            move(groups, [3, 8], [2], True)
            stored.append((pages[0].clone(), groups))
            pages[0].zero_()
        for kept, groups in stored:
            move(groups, [8, 1], [2], False)
            assert torch.equal(groups[0][0].device.tensors[0][1].flatten(), kept[8])


def test_pages_without_a_mapping_are_not_shared() -> None:
    refs = [[SimpleNamespace(tensor_idx=0, page_size_bytes=640, mapping=None)]]
    pages = [torch.zeros(BLOCKS, 640, dtype=torch.int8)]
    with pytest.raises(IntegrationError, match="Leave canonical_layout out"):
        groups_of(refs, pages, TOGETHER, 0, Memory(), Share(0, 2, True))


def test_wrong_mappings_are_named() -> None:
    pages = [torch.zeros(BLOCKS, 64, dtype=torch.int8)]
    ref = SimpleNamespace(tensor_idx=0, page_size_bytes=64)
    with pytest.raises(LayoutError, match="none for tensor 1"):
        page_bytes([[(ref, RankMapping(64, (Run(0, 0, 64),)))]], 2)
    ref.mapping = mapped(0, 1)
    with pytest.raises(LayoutError, match="Expected fragments in pages of 64"):
        groups_of([[ref]], pages, TOGETHER, 0, Memory(), Share(0, 1, True))
