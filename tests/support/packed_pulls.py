# SPDX-License-Identifier: Apache-2.0
"""Caches of raw rows of bf16 and of packed slots, and pulls between them, for the tests of packed
pulls."""

from __future__ import annotations

from typing import Any

import torch

from portakv import KVView, Pack, copy_blocks
from portakv.errors import PackOverflow
from portakv.migrate import Shard
from portakv.migrate.crossed import PullStatistics
from portakv.migrate.shared_memory import shared_empty
from support.migrate_pulls import Sides
from support.waits import LIMIT

LAYOUT = "layer | kv block token head dim"
IMAGE = "block layer kv head page"
LAYERS = 2
HEADS = 4
SIZE = 16
DIM = 32
#: A block of raw rows, and of slots.
RAW_BYTES = LAYERS * 2 * HEADS * SIZE * DIM * 2
SLOT_BYTES = LAYERS * 2 * HEADS * Pack().plane(SIZE * DIM).slot_bytes
BLOCKS = [7, 3, 11, 0, 5]


class Raw:
    """A cache of bf16 in shared memory: normally distributed values, or one value."""

    def __init__(
        self,
        blocks: int = 12,
        size: int = SIZE,
        heads: int = HEADS,
        dim: int = DIM,
        fill: float | None = None,
    ) -> None:
        self.whole = shared_empty((LAYERS, 2, blocks, size, heads, dim), torch.bfloat16)
        if fill is None:
            seeded = torch.Generator(device="cpu").manual_seed(1)
            values = torch.randn(self.whole.shape, generator=seeded, device="cpu")
            self.whole.copy_(values.to(torch.bfloat16))
        else:
            self.whole.fill_(fill)
        self.view = KVView([*self.whole], LAYOUT)

    def spoil(self, *blocks: int) -> None:
        """Fill a plane of each block with so many exponents that no slot holds it."""
        for block in blocks:
            noise(self.whole[1, 0, block, :, 2])

    def bits(self, blocks: Any, tokens: int, first: int = 0) -> torch.Tensor:
        """Return the bits of tokens of blocks, ``[layer, kv, token, head, dim]``."""
        rows = self.whole[:, :, torch.as_tensor(blocks)].flatten(2, 3)[:, :, first:tokens]
        return rows.contiguous().view(torch.int16)


class Packed:
    """A cache of slots in shared memory, and its blocks as raw rows."""

    def __init__(self, blocks: int = 12, heads: int = HEADS, pack: Pack | None = None) -> None:
        pack = pack or Pack()
        slot = pack.plane(SIZE * DIM).slot_bytes
        self.whole = shared_empty((blocks, LAYERS, 2, heads, slot), torch.uint8)
        self.whole.zero_()
        self.view = KVView(self.whole, IMAGE, block_size=SIZE, dim=DIM, encoding=pack)

    def of(self, raw: Raw) -> Packed:
        """Pack all blocks of a raw cache, but for those that do not fit."""
        try:
            every = range(len(self.whole))
            copy_blocks(raw.view, self.view, every, every).synchronize()
        except PackOverflow:
            pass
        return self

    def raw(self) -> Raw:
        """Return the blocks unpacked."""
        heads = self.whole.shape[3]
        raw = Raw(len(self.whole), heads=heads, fill=0.0)
        every = range(len(self.whole))
        copy_blocks(self.view, raw.view, every, every).synchronize()
        return raw


def noise(rows: torch.Tensor) -> None:
    """Fill rows with patterns of all exponents in turn."""
    count = torch.arange(rows.numel(), dtype=torch.int64, device="cpu") * 12345
    rows.copy_(count.to(torch.int16).view(torch.bfloat16).view(rows.shape))


def pulled(
    made: Sides, src: Any, dst: Any, into: Any, tokens: int = 80, **options: Any
) -> PullStatistics:
    """Pull the first tokens of `BLOCKS`; return the figures."""
    method = options.pop("method", "staging")
    staging = options.pop("staging", 1 << 20)
    blocks = options.pop("blocks", BLOCKS)
    owner = made.owner(Shard(src.view), expose=method, staging=staging)
    reader = made.reader(Shard(dst.view))
    pull = reader.pull(owner.offer(blocks, tokens=tokens).ticket, into, **options)
    pull.synchronize(LIMIT)
    return pull.statistics
