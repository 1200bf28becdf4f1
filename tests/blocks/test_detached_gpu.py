# SPDX-License-Identifier: Apache-2.0
"""Detached transfers on a CUDA device: many under way beside a model, and nobody waits for them."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from support.block_cases import holds, large, numbered
from support.device_cases import DEVICE, LONG

from portakv import Index, copy_blocks

pytestmark = pytest.mark.gpu

BLOCKS, MANY = 80, 10  # MiB of one transfer, three slices; transfers
SIDE = 8192


class Pools:
    """A numbered pool and an empty one, and transfers of disjoint blocks between them."""

    def __init__(self, downward: bool) -> None:
        places = (DEVICE, "cpu") if downward else ("cpu", DEVICE)
        (full, self.src), (self.empty, self.dst) = (large(BLOCKS * MANY, 1, p) for p in places)
        self.order = torch.randperm(BLOCKS * MANY, generator=torch.Generator().manual_seed(5))
        self.numbers = numbered(full)[:, :, 0, 0].cpu()
        torch.cuda.synchronize()

    def started(self, **options: Any) -> list[Any]:
        parts = self.order.split(BLOCKS)
        asked = {"backend": "staged", "detached": True, **options}
        return [copy_blocks(self.src, self.dst, ids, ids.flip(0), **asked) for ids in parts]

    def right(self) -> bool:
        expected = torch.empty_like(self.numbers)
        for ids in self.order.split(BLOCKS):
            expected[:, ids.flip(0)] = self.numbers[:, ids]
        return holds(self.empty, expected)


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_every_byte_lands_beside_a_model(downward: bool, by_layer: bool) -> None:
    a = torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=DEVICE)
    out, pools, model = torch.empty_like(a), Pools(downward), torch.cuda.Stream(DEVICE)
    for _ in range(3):
        with torch.cuda.stream(model):
            for _ in range(60):
                torch.mm(a, a, out=out)
        moves = pools.started(by_layer=by_layer)
        for moved in reversed(moves):
            moved.synchronize()
            assert moved.done()
            assert moved.statistics.nbytes == BLOCKS << 20
        assert pools.right()
        pools.empty.zero_()
        torch.cuda.synchronize()


def test_both_directions_and_a_pool_that_is_stored_and_loaded_again() -> None:
    down, up = Pools(True), Pools(False)
    moves = [move for pair in zip(down.started(), up.started(), strict=True) for move in pair]
    for moved in moves:
        moved.wait()
    again, back = large(BLOCKS * MANY, 1, DEVICE)
    ids = list(range(BLOCKS * MANY))
    copy_blocks(down.dst, back, ids, ids, backend="staged", detached=True).synchronize()
    torch.cuda.synchronize()
    assert down.right()
    assert up.right()
    assert torch.equal(again.cpu(), down.empty)


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
def test_no_stream_waits_for_it_but_one_that_is_told_to(downward: bool, side: bool) -> None:
    pools = Pools(downward)
    stream = torch.cuda.Stream(DEVICE) if side else None
    pools.started(stream=stream)[-1].synchronize()
    *_, last = pools.started(stream=stream)
    for one in {stream or torch.cuda.current_stream(), torch.cuda.current_stream()}:
        one.synchronize()
        assert not last.done()
    reader = torch.cuda.Stream(DEVICE)
    last.wait(reader)
    reader.synchronize()
    assert last.done()
    torch.cuda.synchronize()
    assert pools.right()


def test_it_comes_behind_what_the_stream_holds_and_memory_is_held() -> None:
    for _ in range(3):
        there, src = large(BLOCKS, 1, DEVICE)
        here, dst = large(BLOCKS, 1, "cpu")
        ids = list(range(BLOCKS))
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        numbers = numbered(there)[:, :, 0, 0].clone()
        copy_blocks(src, dst, ids, ids, backend="staged", detached=True)
        del there, src, dst  # the allocator gives these bytes to others
        others = [
            torch.full((BLOCKS << 18,), 7, dtype=torch.int32, device=DEVICE) for _ in range(2)
        ]
        torch.cuda.synchronize()
        assert holds(here, numbers)
        assert others


@pytest.mark.parametrize("name", ["host", "descriptors", "direct", "staged"])
def test_every_engine(name: str) -> None:
    pools = Pools(True)
    for moved in pools.started(backend=name, overlap="idle"):
        moved.synchronize()
    assert pools.right()


def test_inside_a_device() -> None:
    (full, src), (empty, dst) = (large(BLOCKS, 1, DEVICE) for _ in range(2))
    numbers, ids = numbered(full)[:, :, 0, 0].clone(), list(range(BLOCKS))
    torch.cuda.synchronize()
    moved = copy_blocks(src, dst, ids, ids, detached=True)
    moved.synchronize()
    assert holds(empty, numbers)


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
def test_ids_that_an_index_keeps_and_everybody_forgets(downward: bool) -> None:
    """Their copy on the device is given back while the gather or scatter still has to read it."""
    for seed in range(5):
        places = (DEVICE, "cpu") if downward else ("cpu", DEVICE)
        (full, src), (empty, dst) = (large(BLOCKS, 1, place) for place in places)
        numbers = numbered(full)[:, :, 0, 0].clone()
        order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(seed))
        ids, back = Index(order, step=1), Index(order.flip(0), step=1)
        asked: dict[str, Any] = {"backend": "staged", "detached": True}
        copy_blocks(src, dst, ids, back, **asked).synchronize()
        empty.zero_()
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        copy_blocks(src, dst, ids, back, **asked)
        del ids, back
        gc.collect()
        others = [torch.zeros(BLOCKS, dtype=torch.int64, device=DEVICE) for _ in range(64)]
        torch.cuda.synchronize()
        expected = torch.empty_like(numbers)
        expected[:, order.flip(0)] = numbers[:, order]
        assert holds(empty, expected)
        assert others
