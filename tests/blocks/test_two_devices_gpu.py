# SPDX-License-Identifier: Apache-2.0
"""Block transfers of two devices at once, to and from one pool of the host."""

from __future__ import annotations

import pytest
import torch

from portakv import KVView, copy_blocks
from portakv.host import pinned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

LAYERS, BLOCKS, SIZE, ROW, MOVED = 8, 64, 16, 256, 24
CACHE, POOL = "layer kv block token (head dim)", "block kv layer token (head dim)"


def view(tensor: torch.Tensor, layout: str) -> KVView:
    return KVView(tensor, layout, heads=2)


@pytest.mark.parametrize("engine", [None, "staged", "descriptors", "direct"])
def test_two_devices_store_and_load_at_once(engine: str | None) -> None:
    """Whichever device is the current one, bytes and order are each device's own."""
    pool = pinned.empty((BLOCKS, 2, LAYERS, SIZE, ROW), torch.int16)
    shape = (LAYERS, 2, BLOCKS, SIZE, ROW)
    caches = [
        torch.randint(-999, 999, shape, dtype=torch.int16, device=f"cuda:{d}") for d in (0, 1)
    ]
    ids = [torch.randperm(BLOCKS)[:MOVED] for _ in caches]
    there = [torch.arange(MOVED) + 32 * d for d in (0, 1)]
    for _ in range(10):
        stores = [
            copy_blocks(view(c, CACHE), view(pool, POOL), mine, theirs, backend=engine)
            for c, mine, theirs in zip(caches, ids, there, strict=True)
        ]
    for store in stores:
        store.synchronize()
    empty = [torch.zeros_like(c) for c in caches]
    loads = [
        copy_blocks(view(pool, POOL), view(c, CACHE), theirs, mine, backend=engine)
        for c, mine, theirs in zip(empty, ids, there, strict=True)
    ]
    for load in loads:
        load.synchronize()
    for cache, back, mine, theirs in zip(caches, empty, ids, there, strict=True):
        rows = cache[:, :, mine.to(cache.device)]
        assert torch.equal(pool[theirs], rows.cpu().permute(2, 1, 0, 3, 4))
        assert torch.equal(back[:, :, mine.to(cache.device)], rows)
        assert int(back.count_nonzero()) == int(rows.count_nonzero())
