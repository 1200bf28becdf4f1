# SPDX-License-Identifier: Apache-2.0
"""Block transfers on a CUDA device: bytes, order, layers, streams."""

from __future__ import annotations

import pytest
import torch
from support.block_cases import (
    BIG,
    DIM,
    HEADS,
    LAYERS,
    SIZE,
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
from support.guarded_memory import refused

from portakv import DeviceMismatch, SlotError, copy_blocks
from portakv.blocks import slices as block_slices
from portakv.runtime.worker import WINDOW

pytestmark = pytest.mark.gpu

SRC, DST = [5, 0, 7, 2, 3], [1, 6, 0, 4, 2]
BLOCK_BYTES = LAYERS * 2 * SIZE * HEADS * DIM * 2


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    # A slice of pageable memory has two blocks, one of pinned memory one.
    monkeypatch.setattr(block_slices, "SLICE", -(-2 * BLOCK_BYTES // WINDOW))


def pair(store: bool, pin: bool = True) -> tuple[Cache, Cache]:
    """A source and a destination, in different layouts, one of them on the host."""
    there, here = layered(DEVICE), block_first(pin=pin)
    torch.cuda.synchronize()
    return (there, here) if store else (here, there)


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("pin", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.usefixtures("small_slices")
def test_every_byte_lands(store: bool, pin: bool, side: bool, way: str) -> None:
    src, dst = pair(store, pin)
    expected = wanted(src, dst, SRC, DST)
    stream = torch.cuda.Stream(DEVICE) if side else None
    before = torch.cuda.current_stream()
    moved = copy_blocks(src.view, dst.view, SRC, DST, stream=stream, **WAYS[way])
    assert torch.cuda.current_stream() == before
    moved.synchronize()
    assert moved.done()
    assert torch.equal(dst.rows(), expected)
    found = moved.statistics
    assert (found.blocks, found.blocks_asked, found.nbytes) == (5, 5, 5 * BLOCK_BYTES)
    assert found.engine
    assert found.why
    assert found.seconds is not None
    assert 0 < found.seconds < 60


@pytest.mark.usefixtures("small_slices")
def test_inside_a_device(way: str) -> None:
    src, dst = layered(DEVICE), block_first(DEVICE)
    expected = wanted(src, dst, SRC, DST)
    moved = copy_blocks(src.view, dst.view, SRC, DST, **WAYS[way])
    moved.synchronize()
    assert torch.equal(dst.rows(), expected)
    assert moved.statistics.seconds is not None


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("store", [False, True])
def test_ids_on_the_device(store: bool, way: str) -> None:
    mine, theirs = [5, -1, 7, 2, 3], [1, 6, 0, -3, 2]
    src, dst = pair(store)
    expected = wanted(src, dst, mine, theirs)
    ids = torch.tensor(mine, device=DEVICE), torch.tensor(theirs, dtype=torch.int32, device=DEVICE)
    copy_blocks(src.view, dst.view, *ids, **WAYS[way]).synchronize()
    assert torch.equal(dst.rows(), expected)
    bad = torch.tensor([5, 100, 2], device=DEVICE)
    with pytest.raises(SlotError):
        copy_blocks(src.view, dst.view, bad, [1, 3, 4], **WAYS[way]).synchronize()


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("side", [False, True])
def test_blocks_come_behind_a_slow_producer(store: bool, side: bool, way: str) -> None:
    (there, here), fresh = pair(True), layered(DEVICE)
    src, dst = (there, here) if store else (here, there)
    stream = torch.cuda.Stream(DEVICE) if side else None
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    if store:
        for layer, made in zip(src.tensors, fresh.tensors, strict=True):
            layer.copy_(made)
    else:
        for layer, made in enumerate(fresh.tensors):
            src.tensors[:, layer].copy_(made.transpose(0, 1), non_blocking=True)
    moved = copy_blocks(src.view, dst.view, SRC, DST, stream=stream, **WAYS[way])
    moved.synchronize()
    assert torch.equal(dst.rows()[:, :, dst.slots(DST)], fresh.rows()[:, :, fresh.slots(SRC)])


# Layers


def test_a_kernel_that_waits_for_one_layer_sees_its_bytes() -> None:
    layers, blocks = 8, 64
    src, from_host = large(blocks, layers, "cpu")
    dst, to_device = large(blocks, layers, DEVICE)
    numbers = numbered(src)[:, :, 0, 0].to(DEVICE)
    ids = list(range(blocks))
    copy_blocks(from_host, to_device, ids, ids, by_layer=True).synchronize()  # compiles
    for _ in range(3):
        dst.zero_()
        stream, reader = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
        found = torch.zeros(layers, dtype=torch.bool, device=DEVICE)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
        moved = copy_blocks(from_host, to_device, ids, ids, by_layer=True, stream=stream)
        assert not moved.done(), "the call waited for its stream"
        for i, layer in enumerate(moved.layers):
            with torch.cuda.stream(reader):
                layer.wait(reader)
                found[i] = (dst[i, :, 0, :] == numbers[i][:, None]).all()
        reader.synchronize()
        assert bool(found.all())
        moved.synchronize()


def test_layers_to_the_host_end_one_by_one() -> None:
    layers, blocks = 8, 64
    src, from_device = large(blocks, layers, DEVICE)
    dst, to_host = large(blocks, layers, "cpu")
    numbers = numbered(src)[:, :, 0, 0].cpu()
    torch.cuda.synchronize()
    ids = list(range(blocks))
    moved = copy_blocks(from_device, to_host, ids, ids[::-1], by_layer=True)
    for i, layer in enumerate(moved.layers):
        layer.synchronize()
        assert holds(dst[i : i + 1], numbers[i : i + 1].flip(1))
    assert moved.done()
    assert moved.statistics.nbytes == layers * blocks * BIG


def test_layers_through_a_thread() -> None:
    layers, blocks = 4, 64
    src, from_host = large(blocks, layers, "cpu")
    dst, to_device = large(blocks, layers, DEVICE)
    numbers = numbered(src)[:, :, 0, 0]
    ids = list(range(blocks))
    moved = copy_blocks(from_host, to_device, ids, ids, by_layer=True, max_gbps=2.0)
    moved.layers[0].synchronize()
    assert not moved.layers[2].done()
    assert holds(dst[:1], numbers[:1])
    moved.synchronize()
    assert holds(dst, numbers)


# Streams


def test_both_directions_at_once(way: str) -> None:
    blocks = 256
    out, from_device = large(blocks, 1, DEVICE)
    there, to_host = large(blocks, 1, "cpu")
    back, from_host = large(blocks, 1, "cpu")
    here, to_device = large(blocks, 1, DEVICE)
    numbers = numbered(out)[:, :, 0, 0].cpu()
    numbered(back)
    torch.cuda.synchronize()
    ids = torch.randperm(blocks)
    streams = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
    options = {**WAYS[way]}
    if "max_gbps" in options:
        options["max_gbps"] = 20.0
    moves = [
        copy_blocks(from_device, to_host, ids, range(blocks), stream=streams[0], **options),
        copy_blocks(from_host, to_device, range(blocks), ids, stream=streams[1], **options),
    ]
    for moved in moves:
        moved.synchronize()
    assert holds(there, numbers[:, ids])
    assert holds(here[:, ids], numbers)


@pytest.mark.parametrize("priority", [-1, 0])
def test_a_stream_of_high_priority(priority: int, way: str) -> None:
    src, dst = pair(store=True)
    expected = wanted(src, dst, SRC, DST)
    for stream in (torch.cuda.Stream(DEVICE, priority), torch.Stream(DEVICE, priority=priority)):
        copy_blocks(src.view, dst.view, SRC, DST, stream=stream, **WAYS[way]).synchronize()
    assert torch.equal(dst.rows(), expected)


def test_a_stream_of_another_device() -> None:
    here = layered()
    with refused(DeviceMismatch, "cpu", "cuda:0", "stream", watch=here.tensors):
        copy_blocks(here.view, here.view, [0], [1], stream=torch.cuda.Stream(DEVICE))
    if torch.cuda.device_count() > 1:
        src, dst = pair(store=True)
        with refused(DeviceMismatch, "cuda:0", "cuda:1", watch=dst.tensors):
            copy_blocks(src.view, dst.view, SRC, DST, stream=torch.cuda.Stream("cuda:1"))
