# SPDX-License-Identifier: Apache-2.0
"""Block transfers on a CUDA device that take a while: slices, graphs, a model running meanwhile."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.block_cases import (
    DST,
    METHODS,
    SLICED,
    SRC,
    block_first,
    holds,
    large,
    layered,
    numbered,
    wanted,
)
from support.device_cases import DEVICE

from portakv import TransferCancelled, TransferError, Unsupported, copy_blocks

pytestmark = pytest.mark.gpu

STORE = pytest.mark.parametrize("store", [True, False], ids=["d2h", "h2d"])


class Pools:
    """Numbered blocks of `BIG` bytes on one side, and room for them on the other."""

    def __init__(self, store: bool, blocks: int) -> None:
        places = (DEVICE, "cpu") if store else ("cpu", DEVICE)
        (self.full, self.src), (self.empty, self.dst) = (large(blocks, 1, p) for p in places)
        self.numbers = numbered(self.full)[:, :, 0, 0].cpu()
        self.ids = list(range(blocks))
        torch.cuda.synchronize()

    def start(self, ids: Any = None, back: Any = None, **options: Any) -> Any:
        """A transfer of blocks, by default of all to the same places."""
        ids = self.ids if ids is None else ids
        return copy_blocks(self.src, self.dst, ids, ids if back is None else back, **options)

    def right(self) -> bool:
        return holds(self.empty, self.numbers)


# Slices


@STORE
def test_cancelling(store: bool) -> None:
    pools = Pools(store, 2048)
    order = torch.randperm(2048)
    moved = pools.start(order, cancellable=True)
    while not moved.statistics.blocks:
        time.sleep(1e-4)
    assert moved.cancel()
    with pytest.raises(TransferCancelled):
        moved.synchronize()
    statistics = moved.statistics
    assert 0 < statistics.blocks < 2048
    assert statistics.cancelled
    pools.numbers[0, order[statistics.blocks :]] = 0
    assert pools.right(), "blocks moved that were not counted, or were not moved that were"


def test_device_work_of_others_goes_on_beside_a_slow_transfer() -> None:
    moved = Pools(True, 256).start(max_gbps=0.2)
    torch.zeros(1 << 20, device=DEVICE).sum().item()
    assert not moved.done()
    assert moved.cancel()
    with pytest.raises(TransferCancelled):
        moved.synchronize()


def test_the_time_ends_when_the_end_is_noticed() -> None:
    moved = Pools(True, 512).start()
    time.sleep(0.2)  # nothing looks at it meanwhile
    moved.synchronize()
    assert moved.statistics.seconds is not None
    assert moved.statistics.seconds >= 0.2


# Graphs


def test_in_a_graph() -> None:
    src = layered(DEVICE)
    dst = block_first(DEVICE)
    expected = wanted(src, dst, SRC, DST)
    ids = torch.tensor(SRC, device=DEVICE), torch.tensor(DST, device=DEVICE)
    copy_blocks(src.view, dst.view, *ids).synchronize()  # prepared
    dst.tensors.zero_()
    blank = dst.rows()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        moved = copy_blocks(src.view, dst.view, *ids)
        for name in (*SLICED, "detached"):
            with pytest.raises(Unsupported, match="capture"):
                copy_blocks(src.view, dst.view, *ids, **METHODS[name])
    with pytest.raises(TransferError):
        moved.synchronize()
    statistics = moved.statistics
    assert (statistics.nbytes, statistics.seconds, statistics.blocks_requested) == (0, None, 5)
    graph.replay()
    torch.cuda.synchronize()
    slots = dst.slots(DST)
    blank[:, :, slots] = expected[:, :, slots]
    assert torch.equal(dst.rows(), blank)


def test_a_capture_beside_a_transfer_in_slices() -> None:
    """CUDA lets a thread break the capture of another one; a worker does not."""
    pools = Pools(True, 256)
    total = torch.zeros(1, device=DEVICE)
    graphs = []
    pools.start(cancellable=True).synchronize()
    pools.empty.zero_()
    torch.cuda.synchronize()
    gc.collect()  # what an earlier test left must not be freed during a capture either
    moved = pools.start(max_gbps=0.2)
    while not moved.done():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total += 1
            time.sleep(0.01)
        graphs.append(graph)
    assert len(graphs) > 2
    for graph in graphs:
        graph.replay()
    assert total.item() == len(graphs)
    assert pools.right()


# Many detached transfers while a model runs

# MiB of one transfer, three slices; transfers; a matrix
BLOCKS = 80
MANY = 10
SIDE = 8192
DETACHED: dict[str, Any] = {"backend": "staged", "detached": True}


class Parts(Pools):
    """Pools between which transfers of disjoint blocks are made."""

    def __init__(self, store: bool) -> None:
        super().__init__(store, BLOCKS * MANY)
        order = torch.randperm(BLOCKS * MANY, generator=torch.Generator().manual_seed(5))
        self.parts = order.split(BLOCKS)
        expected = torch.empty_like(self.numbers)
        for ids in self.parts:
            expected[:, ids.flip(0)] = self.numbers[:, ids]
        self.numbers = expected

    def started(self, **options: Any) -> Sequence[Any]:
        return [self.start(ids, ids.flip(0), **{**DETACHED, **options}) for ids in self.parts]


@STORE
@pytest.mark.parametrize("by_layer", [False, True])
def test_every_byte_lands_beside_a_model(store: bool, by_layer: bool) -> None:
    a = torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty_like(a)
    parts = Parts(store)
    model = torch.cuda.Stream(DEVICE)
    for _ in range(3):
        with torch.cuda.stream(model):
            for _ in range(60):
                torch.mm(a, a, out=out)
        for moved in reversed(parts.started(by_layer=by_layer)):
            moved.synchronize()
            assert moved.done()
            assert moved.statistics.nbytes == BLOCKS << 20
        assert parts.right()
        parts.empty.zero_()
        torch.cuda.synchronize()


@pytest.mark.parametrize("side", [False, True])
@STORE
def test_no_stream_waits_for_it_but_one_that_is_told_to(store: bool, side: bool) -> None:
    parts = Parts(store)
    stream = torch.cuda.Stream(DEVICE) if side else None
    parts.started(stream=stream)[-1].synchronize()
    for _ in range(10):  # a busy host may look later than the transfer takes
        *_, last = parts.started(stream=stream)
        early = []
        for one in {stream or torch.cuda.current_stream(), torch.cuda.current_stream()}:
            one.synchronize()
            early.append(not last.done())
        if all(early):
            break
    else:
        pytest.fail("the streams waited for the transfer's end each time")
    reader = torch.cuda.Stream(DEVICE)
    last.wait(reader)
    reader.synchronize()
    assert last.done()
    torch.cuda.synchronize()
    assert parts.right()
