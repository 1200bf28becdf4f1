# SPDX-License-Identifier: Apache-2.0
"""Block transfers on a CUDA device: what stops them, what must not, and the memory they hold."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
from support.block_cases import (
    BIG,
    SLICED,
    WAYS,
    Cache,
    block_first,
    holds,
    large,
    layered,
    numbered,
    wanted,
)
from support.device_cases import DEVICE, LONG

from portakv import TransferCancelled, TransferError, Unsupported, copy_blocks
from portakv.host import pinned

pytestmark = pytest.mark.gpu

SRC, DST = [5, 0, 7, 2, 3], [1, 6, 0, 4, 2]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pair(store: bool, pin: bool = True) -> tuple[Cache, Cache]:
    """A source and a destination, in different layouts, one of them on the host."""
    there, here = layered(DEVICE), block_first(pin=pin)
    torch.cuda.synchronize()
    return (there, here) if store else (here, there)


# Slices


@pytest.mark.parametrize("store", [False, True])
def test_cancelling(store: bool) -> None:
    blocks = 2048
    there, on_device = large(blocks, 1, DEVICE)
    here, on_host = large(blocks, 1, "cpu")
    src, dst = (there, here) if store else (here, there)
    views = (on_device, on_host) if store else (on_host, on_device)
    numbers = numbered(src)[:, :, 0, 0].cpu()
    torch.cuda.synchronize()
    ids = torch.randperm(blocks)
    moved = copy_blocks(views[0], views[1], ids, ids, cancellable=True)
    while not moved.statistics.blocks:
        time.sleep(1e-4)
    began = time.perf_counter()
    assert moved.cancel()
    with pytest.raises(TransferCancelled):
        moved.synchronize()
    took = time.perf_counter() - began
    found = moved.statistics
    assert 0 < found.blocks < blocks
    assert found.cancelled
    assert took < 0.02, f"it went on for {took} s, which is more than the slices under way"
    left = numbers.clone()
    left[0, ids[found.blocks :]] = 0
    assert holds(dst, left), "blocks moved that were not counted, or were not moved that were"


@pytest.mark.parametrize("store", [False, True])
def test_a_rate_is_kept(store: bool) -> None:
    blocks, rate = 2560, 5.0  # half a second
    there, on_device = large(blocks, 1, DEVICE)
    here, on_host = large(blocks, 1, "cpu")
    src, dst = (there, here) if store else (here, there)
    views = (on_device, on_host) if store else (on_host, on_device)
    numbers = numbered(src)[:, :, 0, 0].cpu()
    torch.cuda.synchronize()
    ids = list(range(blocks))
    began = time.perf_counter()
    moved = copy_blocks(views[0], views[1], ids, ids, max_gbps=rate)
    moved.synchronize()
    took = time.perf_counter() - began
    found = moved.statistics
    # The rate is a limit: never above it, and not far below where the machine is busy.
    assert found.gbps is not None
    for reached in (found.gbps, blocks * BIG / took / 1e9):
        assert 0.75 * rate < reached < 1.03 * rate
    assert holds(dst, numbers)


def test_device_work_of_others_goes_on_beside_a_slow_transfer() -> None:
    src, from_device = large(256, 1, DEVICE)
    _, to_host = large(256, 1, "cpu")
    numbered(src)
    torch.cuda.synchronize()
    moved = copy_blocks(from_device, to_host, range(256), range(256), max_gbps=1.0)
    began = time.perf_counter()
    torch.zeros(1 << 20, device=DEVICE).sum().item()
    assert time.perf_counter() - began < 0.1
    assert not moved.done()
    assert moved.cancel()
    with pytest.raises(TransferCancelled):
        moved.synchronize()


# Lifetimes and graphs


@pytest.mark.parametrize("store", [False, True])
def test_host_memory_is_held_while_bytes_fly(store: bool, way: str) -> None:
    blocks = 64
    for _ in range(3):
        there, on_device = large(blocks, 1, DEVICE)
        here, on_host = large(blocks, 1, "cpu")
        numbers = numbered(there if store else here)[:, :, 0, 0].cpu()
        stream = torch.cuda.Stream(DEVICE)
        torch.cuda.synchronize()
        ids = list(range(blocks))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
        views = (on_device, on_host) if store else (on_host, on_device)
        moved = copy_blocks(views[0], views[1], ids, ids, stream=stream, **WAYS[way])
        if store:  # what came to the host is read by a second copy, behind the first
            moved.wait(stream)
            back, on_device = large(blocks, 1, DEVICE)
            stream.wait_stream(torch.cuda.current_stream())
            copy_blocks(on_host, on_device, ids, ids, stream=stream)
        else:
            back = there
        del here, on_host, views, there
        if way in SLICED and not store:
            gc.collect()
            moved.synchronize()
        del moved
        gc.collect()
        other = pinned.empty((blocks * BIG,), torch.uint8)  # where the freed memory was, perhaps
        other.fill_(255)
        torch.cuda.synchronize()
        assert holds(back, numbers)


@pytest.mark.parametrize("name", ["staged", "descriptors", "direct"])
def test_every_engine_holds_host_memory_that_everybody_forgets(name: str) -> None:
    blocks = 64
    ids = list(range(blocks))
    for _ in range(3):
        there, on_device = large(blocks, 1, DEVICE)
        here, on_host = large(blocks, 1, "cpu")
        numbers = numbered(here)[:, :, 0, 0].clone()
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        copy_blocks(on_host, on_device, ids, ids, backend=name, overlap="idle")
        del here, on_host
        gc.collect()
        other = pinned.empty((blocks * BIG,), torch.uint8)  # where the freed memory was, perhaps
        other.fill_(255)
        torch.cuda.synchronize()
        assert holds(there, numbers)


def test_in_a_graph() -> None:
    src, dst = layered(DEVICE), block_first(DEVICE)
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
                copy_blocks(src.view, dst.view, *ids, **WAYS[name])
    with pytest.raises(TransferError):
        moved.synchronize()
    found = moved.statistics
    assert (found.nbytes, found.seconds, found.blocks_asked) == (0, None, 5)
    graph.replay()
    torch.cuda.synchronize()
    slots = dst.slots(DST)
    blank[:, :, slots] = expected[:, :, slots]
    assert torch.equal(dst.rows(), blank)


def test_a_capture_beside_a_transfer_in_slices() -> None:
    """CUDA lets a thread break the capture of another one; a worker does not."""
    src, from_device = large(256, 1, DEVICE)
    there, to_host = large(256, 1, "cpu")
    numbers = numbered(src)[:, :, 0, 0].cpu()
    total = torch.zeros(1, device=DEVICE)
    copy_blocks(from_device, to_host, range(256), range(256), cancellable=True).synchronize()
    there.zero_()
    torch.cuda.synchronize()
    gc.collect()  # what an earlier test left must not be freed during a capture either
    moved = copy_blocks(from_device, to_host, range(256), range(256), max_gbps=1.0)
    graphs = []
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
    assert holds(there, numbers)


@pytest.mark.parametrize("name", ["staged", "descriptors", "direct"])
def test_an_engine_by_its_name(name: str) -> None:
    for store in (False, True):
        src, dst = pair(store)
        expected = wanted(src, dst, SRC, DST)
        for options in ({}, {"max_thread_blocks": 2}, {"cancellable": True}):
            moved = copy_blocks(src.view, dst.view, SRC, DST, backend=name, **options)
            moved.synchronize()
            assert moved.statistics.engine == name
        assert torch.equal(dst.rows(), expected)


@pytest.mark.parametrize("options", [{"overlap": "idle"}, {"max_thread_blocks": 2}])
def test_terms_that_let_kernels_cross_the_link(options: dict[str, Any]) -> None:
    for store in (False, True):
        src, dst = pair(store)
        expected = wanted(src, dst, SRC, DST)
        moved = copy_blocks(src.view, dst.view, SRC, DST, **options)
        moved.synchronize()
        assert torch.equal(dst.rows(), expected)
        assert moved.statistics.why


def test_the_time_ends_when_the_end_is_noticed() -> None:
    src, from_device = large(512, 1, DEVICE)
    _, to_host = large(512, 1, "cpu")
    numbered(src)
    ids = list(range(512))
    moved = copy_blocks(from_device, to_host, ids, ids)
    time.sleep(0.2)  # nothing looks at it meanwhile
    moved.synchronize()
    assert moved.statistics.seconds is not None
    assert moved.statistics.seconds >= 0.2
