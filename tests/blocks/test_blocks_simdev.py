# SPDX-License-Identifier: Apache-2.0
"""Block transfers between the simulated device and the host: bytes, order, layers, lifetimes."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from support.block_cases import (
    BLOCKS,
    DIM,
    HEADS,
    LAYERS,
    SIZE,
    SLICED,
    WAYS,
    Cache,
    block_first,
    layered,
    wanted,
)
from support.block_moves import DST, ORDERED, SRC, _no_faults_left, pair, settled, way
from support.guarded_memory import refused
from support.simdev_cases import DEVICE, OTHER, current, on

from portakv import DeviceMismatch, SlotError, TransferCancelled, Unsupported, copy_blocks
from portakv.blocks import slices as block_slices
from portakv.runtime import transfer
from portakv.runtime.worker import WINDOW
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

__all__ = ["_no_faults_left", "way"]  # fixtures

BLOCK_BYTES = LAYERS * 2 * SIZE * HEADS * DIM * 2
REPEATS = 6


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    # A slice has two blocks, or one where several are under way.
    monkeypatch.setattr(block_slices, "SLICE", -(-2 * BLOCK_BYTES // WINDOW))


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("pin", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("store", [False, True])
def test_every_byte_lands(store: bool, pin: bool, side: bool, way: str) -> None:
    src, dst = pair(store, pin)
    expected = wanted(src, dst, SRC, DST)
    stream = torch.Stream(DEVICE) if side else None
    moved = copy_blocks(src.view, dst.view, SRC, DST, stream=stream, **WAYS[way])
    moved.synchronize()
    assert moved.done()
    assert torch.equal(dst.rows(), expected)
    found = moved.statistics
    assert (found.blocks, found.blocks_asked, found.nbytes) == (5, 5, 5 * BLOCK_BYTES)
    assert found.engine == "ring" if not pin else found.engine in ("staged", "descriptors")
    assert found.why
    assert found.seconds is not None
    assert found.gbps is not None


def test_inside_a_device(way: str) -> None:
    src, dst = layered(DEVICE), block_first(DEVICE)
    settled()
    expected = wanted(src, dst, SRC, DST)
    moved = copy_blocks(src.view, dst.view, SRC, DST, **WAYS[way])
    moved.synchronize()
    assert torch.equal(dst.rows(), expected)
    found = moved.statistics
    assert found.seconds is not None


@pytest.mark.parametrize("store", [False, True])
def test_skipped_blocks_and_ids_on_the_device(store: bool, way: str) -> None:
    mine, theirs = [5, -1, 7, 2, 3], [1, 6, 0, -3, 2]
    src, dst = pair(store)
    expected = wanted(src, dst, mine, theirs)
    ids = torch.tensor(mine, device=DEVICE), torch.tensor(theirs, dtype=torch.int32, device=DEVICE)
    copy_blocks(src.view, dst.view, *ids, **WAYS[way]).synchronize()
    assert torch.equal(dst.rows(), expected)


@pytest.mark.parametrize("store", [False, True])
def test_bad_ids_on_the_device(store: bool, way: str) -> None:
    src, dst = pair(store)
    expected = wanted(src, dst, [5, 2], [1, 4])
    ids = torch.tensor([5, BLOCKS, 2], device=DEVICE)
    if way not in SLICED:
        moved = copy_blocks(src.view, dst.view, ids, [1, 3, 4], **WAYS[way])
        with pytest.raises(SlotError):
            moved.synchronize()
        assert torch.equal(dst.rows(), expected)
    else:  # they are read before anything is issued
        with refused(SlotError, "source", f"id {BLOCKS}", watch=dst.tensors):
            copy_blocks(src.view, dst.view, ids, [1, 3, 4], **WAYS[way])


# Order


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("store", [False, True])
def test_blocks_come_behind_their_producer(store: bool, side: bool, way: str) -> None:
    for _ in range(REPEATS if way not in SLICED else 3):
        src, dst = pair(store)
        fresh, stream = layered(DEVICE), torch.Stream(DEVICE) if side else None
        settled()
        simdev.delay(current(), 2)
        rows = src.tensors if store else [src.tensors[:, i] for i in range(LAYERS)]
        for layer, made in zip(rows, fresh.tensors, strict=True):
            made = made if store else made.transpose(0, 1)
            layer.copy_(made, non_blocking=True)
        moved = copy_blocks(src.view, dst.view, SRC, DST, stream=stream, **WAYS[way])
        moved.synchronize()
        assert torch.equal(dst.rows()[:, :, dst.slots(DST)], fresh.rows()[:, :, fresh.slots(SRC)])


def read_behind_layers(moved: Any, dst: Cache) -> list[torch.Tensor]:
    """Copies of each layer's cache, made on streams that wait for that layer alone."""
    found = []
    for layer, cache in zip(moved.layers, dst.tensors, strict=True):
        reader = torch.Stream(DEVICE)
        with on(reader):
            layer.wait()
            found.append(cache.clone())
        current().wait_stream(reader)
    return found


def test_a_stream_waits_for_one_layer() -> None:
    for _ in range(REPEATS):
        src, dst = pair(store=False)
        expected = wanted(src, dst, SRC, DST)
        stream = torch.Stream(DEVICE)
        simdev.delay(current(), 1)
        moved = copy_blocks(src.view, dst.view, SRC, DST, by_layer=True, stream=stream)
        assert not moved.done()
        copies = read_behind_layers(moved, dst)
        for layer, copied in enumerate(copies):
            rows = copied.cpu().view(torch.int16).reshape(2, -1, HEADS * DIM)
            assert torch.equal(rows, expected[layer])
        moved.synchronize()


def test_without_its_wait_a_stream_sees_other_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail."""
    monkeypatch.setattr(transfer.Completion, "wait", lambda self, stream: None)
    src, dst = pair(store=False)
    expected = wanted(src, dst, SRC, DST)
    stream = torch.Stream(DEVICE)
    simdev.delay(stream, 5)
    moved = copy_blocks(src.view, dst.view, SRC, DST, by_layer=True, stream=stream)
    copies = read_behind_layers(moved, dst)
    rows = [x.cpu().view(torch.int16).reshape(2, -1, HEADS * DIM) for x in copies]
    assert not all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))
    moved.synchronize()


def test_a_layer_ends_before_the_whole() -> None:
    src, dst = pair(store=True)
    stream = torch.Stream(DEVICE)
    moved = copy_blocks(src.view, dst.view, SRC, DST, by_layer=True, stream=stream)
    moved.layers[0].synchronize()
    assert moved.layers[0].done()
    moved.layers[2].synchronize()
    assert moved.layers[1].done()
    assert moved.done()


def test_both_directions_at_once(way: str) -> None:
    for _ in range(5):
        out, back = pair(store=True), pair(store=False)
        expected = wanted(*out, SRC, DST), wanted(*back, DST, SRC)
        streams = torch.Stream(DEVICE), torch.Stream(DEVICE)
        first = copy_blocks(out[0].view, out[1].view, SRC, DST, stream=streams[0], **WAYS[way])
        second = copy_blocks(back[0].view, back[1].view, DST, SRC, stream=streams[1], **WAYS[way])
        second.synchronize()
        first.synchronize()
        assert torch.equal(out[1].rows(), expected[0])
        assert torch.equal(back[1].rows(), expected[1])


def test_both_directions_on_one_cache() -> None:
    """Blocks leave and others come while a thread waits for each."""
    cache, there, here = layered(DEVICE), block_first(pin=True), block_first(pin=True)
    settled()
    stored = wanted(cache, there, [0, 1, 2], [4, 5, 6])
    loaded = wanted(here, cache, [7, 3, 1], [5, 6, 7])
    streams = torch.Stream(DEVICE), torch.Stream(DEVICE)
    moves = [
        copy_blocks(cache.view, there.view, [0, 1, 2], [4, 5, 6], stream=streams[0]),
        copy_blocks(here.view, cache.view, [7, 3, 1], [5, 6, 7], stream=streams[1]),
    ]
    threads = [threading.Thread(target=move.synchronize) for move in moves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(there.rows(), stored)
    assert torch.equal(cache.rows(), loaded)


def test_two_devices(way: str) -> None:
    pairs = [pair(store=True, device=device) for device in (DEVICE, OTHER)]
    expected = [wanted(*each, SRC, DST) for each in pairs]
    moves = [copy_blocks(a.view, b.view, SRC, DST, **WAYS[way]) for a, b in pairs]
    for moved, (_, dst), rows in zip(moves, pairs, expected, strict=True):
        moved.synchronize()
        assert torch.equal(dst.rows(), rows)


def test_a_stream_of_high_priority(way: str) -> None:
    src, dst = pair(store=True)
    expected = wanted(src, dst, SRC, DST)
    stream = torch.Stream(DEVICE, priority=-1)
    copy_blocks(src.view, dst.view, SRC, DST, stream=stream, **WAYS[way]).synchronize()
    assert torch.equal(dst.rows(), expected)


# What stops it, and what must not


def test_cancelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_slices, "SLICE", 1)
    for store in (False, True):
        src, dst = pair(store)
        before, after = dst.rows(), wanted(src, dst, SRC, DST)
        moved = copy_blocks(src.view, dst.view, SRC, DST, max_gbps=BLOCK_BYTES / 2e9)
        while moved.statistics.blocks < 2:
            pass
        assert moved.cancel()
        with pytest.raises(TransferCancelled):
            moved.synchronize()
        blocks = moved.statistics.blocks
        slots = dst.slots(DST[:blocks])
        before[:, :, slots] = after[:, :, slots]
        assert 2 <= blocks < 5
        assert torch.equal(dst.rows(), before)


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("pin", [False, True], ids=["pageable", "pinned"])
def test_as_much_is_under_way_in_one_slice_that_blocks_as_in_three(
    store: bool, pin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_slices, "SLICE", BLOCK_BYTES)
    src, dst = pair(store, pin)
    moved = copy_blocks(src.view, dst.view, SRC, DST, cancellable=True)
    moved.synchronize()
    assert WINDOW == 3
    assert moved.statistics.slices == (5 if pin else 2)  # of five blocks


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("pin", [False, True], ids=["pageable", "pinned"])
def test_memory_that_everybody_forgets(store: bool, pin: bool, way: str) -> None:
    """The views, the tensors and the handle go while bytes fly; a second copy shows what came."""
    for _ in range(3):
        src, dst = pair(store, pin)
        expected = wanted(src, dst, SRC, DST)
        through, back = (dst, layered(DEVICE)) if store else (dst, block_first(pin=True))
        rows = wanted(src, back, SRC, SRC)
        settled()
        stream = torch.Stream(DEVICE)
        simdev.delay(stream, 1)
        moved = copy_blocks(src.view, dst.view, SRC, DST, stream=stream, **WAYS[way])
        if way not in ORDERED:
            moved.wait()
        second = copy_blocks(through.view, back.view, DST, SRC, stream=stream)
        del moved, src, dst, through
        gc.collect()
        rubbish = [torch.zeros(1 << 12, dtype=torch.int16, pin_memory=pin) for _ in range(20)]
        rubbish += [torch.zeros(1 << 12, dtype=torch.int16, device=DEVICE) for _ in range(20)]
        second.synchronize()
        assert torch.equal(back.rows(), rows)
        assert expected.numel()


def test_a_forgotten_transfer_in_slices_goes_on() -> None:
    src, dst = pair(store=True)
    expected = wanted(src, dst, SRC, DST)
    copy_blocks(src.view, dst.view, SRC, DST, cancellable=True)
    view = dst.view
    del src
    gc.collect()
    for _ in range(2000):
        if torch.equal(dst.rows(), expected):
            break
        threading.Event().wait(0.005)
    assert torch.equal(dst.rows(), expected)
    assert view.slots == BLOCKS * SIZE


def test_a_stream_of_another_device(way: str) -> None:
    src, dst = pair(store=True)
    with refused(DeviceMismatch, str(DEVICE), str(OTHER), "stream", watch=dst.tensors):
        copy_blocks(src.view, dst.view, SRC, DST, stream=torch.Stream(OTHER), **WAYS[way])
    with refused(DeviceMismatch, str(DEVICE), str(OTHER), watch=dst.tensors):
        copy_blocks(src.view, layered(OTHER).view, SRC, DST, **WAYS[way])
    here = layered()
    with refused(DeviceMismatch, "cpu", "stream", watch=here.tensors):
        copy_blocks(here.view, here.view, [0], [1], stream=torch.Stream(DEVICE), **WAYS[way])


def test_limits_where_no_kernel_reads_host_memory() -> None:
    src, dst = layered(DEVICE), layered(DEVICE)
    with refused(Unsupported, "max_thread_blocks=4", "host memory", watch=dst.tensors):
        copy_blocks(src.view, dst.view, SRC, DST, max_thread_blocks=4)
    back = block_first(pin=True)
    expected = wanted(src, back, SRC, DST)
    copy_blocks(src.view, back.view, SRC, DST, max_thread_blocks=4, overlap="idle").synchronize()
    assert torch.equal(back.rows(), expected)


@pytest.mark.parametrize("name", ["staged", "descriptors", "host"])
@pytest.mark.parametrize("terms", [{}, {"max_thread_blocks": 3}, {"max_gbps": 1.0}])
def test_an_engine_by_its_name(name: str, terms: dict[str, Any]) -> None:
    src, dst = pair(store=True)
    expected = wanted(src, dst, SRC, DST)
    moved = copy_blocks(src.view, dst.view, SRC, DST, backend=name, **terms)
    moved.synchronize()
    assert torch.equal(dst.rows(), expected)
    assert name in ("host", moved.statistics.engine)
