# SPDX-License-Identifier: Apache-2.0
"""Block transfers between a device and the host: what they wait for, what waits for them, what
stops them, and which memory they hold."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from support import simdev_cases
from support.block_cases import (
    BLOCK_BYTES,
    DIM,
    DST,
    HEADS,
    SIZE,
    SLICED,
    SRC,
    WAYS,
    block_first,
    layered,
    pair,
    until,
    wanted,
)
from support.device_cases import current, delay, on, settle
from support.threads import run_threads

from portakv import Index, TransferCancelled, copy_blocks
from portakv.blocks import slices as block_slices
from portakv.host import small
from portakv.registry import prepared
from portakv.runtime import transfer
from portakv.runtime.worker import WINDOW
from portakv_conformance import simdev

pytestmark = pytest.mark.usefixtures("small_slices")


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("store", [False, True])
def test_blocks_come_behind_their_producer(
    accelerator: torch.device, store: bool, side: bool, options: dict[str, Any]
) -> None:
    for _ in range(2):
        src, dst = pair(accelerator, store)
        fresh = layered(accelerator)
        settle(accelerator)
        delay(current(accelerator))
        for at, made in enumerate(fresh.tensors):
            if store:
                src.tensors[at].copy_(made)
            else:
                src.tensors[:, at].copy_(made.transpose(0, 1), non_blocking=True)
        stream = torch.Stream(accelerator) if side else None
        moved = copy_blocks(src.view, dst.view, SRC, DST, stream=stream, **options)
        moved.synchronize()
        assert torch.equal(dst.rows()[:, :, dst.slots(DST)], fresh.rows()[:, :, fresh.slots(SRC)])


@pytest.mark.parametrize("waits", [True, False])
def test_a_stream_waits_for_one_layer(
    accelerator: torch.device, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without its wait it sees other bytes."""
    if not waits:
        monkeypatch.setattr(transfer.Completion, "wait", lambda self, stream: None)
    warm = pair(accelerator, store=False)
    copy_blocks(warm[0].view, warm[1].view, SRC, DST, by_layer=True).synchronize()
    for _ in range(3):
        src, dst = pair(accelerator, store=False)
        expected, stream, found = wanted(src, dst, SRC, DST), torch.Stream(accelerator), []
        delay(stream)
        moved = copy_blocks(src.view, dst.view, SRC, DST, by_layer=True, stream=stream)
        assert not moved.done()
        for layer, cache in zip(moved.layers, dst.tensors, strict=True):
            reader = torch.Stream(accelerator)
            with on(reader):
                layer.wait()
                found.append(cache.clone())
            current(accelerator).wait_stream(reader)
        rows = [x.cpu().view(torch.int16).reshape(2, -1, HEADS * DIM) for x in found]
        assert all(map(torch.equal, rows, expected)) is waits
        moved.synchronize()


def test_a_layer_ends_before_the_whole(accelerator: torch.device) -> None:
    src, dst = pair(accelerator, store=True)
    stream = torch.Stream(accelerator)
    moved = copy_blocks(src.view, dst.view, SRC, DST, by_layer=True, stream=stream)
    moved.layers[0].synchronize()
    assert moved.layers[0].done()
    moved.layers[2].synchronize()
    assert moved.layers[1].done()
    assert moved.done()


def test_both_directions_at_once(accelerator: torch.device, options: dict[str, Any]) -> None:
    for _ in range(3):
        pairs = pair(accelerator, store=True), pair(accelerator, store=False)
        expected = [wanted(*each, SRC, DST) for each in pairs]
        moves = [
            copy_blocks(a.view, b.view, SRC, DST, stream=torch.Stream(accelerator), **options)
            for a, b in pairs
        ]
        for moved in reversed(moves):
            moved.synchronize()
        assert all(torch.equal(b.rows(), row) for (_, b), row in zip(pairs, expected, strict=True))


def test_both_directions_on_one_cache(accelerator: torch.device) -> None:
    """Blocks leave and others come while a thread waits for each."""
    cache, there, here = layered(accelerator), block_first(pin=True), block_first(pin=True)
    settle(accelerator)
    stored = wanted(cache, there, [0, 1, 2], [4, 5, 6])
    loaded = wanted(here, cache, [7, 3, 1], [5, 6, 7])
    streams = torch.Stream(accelerator), torch.Stream(accelerator)
    moves = [
        copy_blocks(cache.view, there.view, [0, 1, 2], [4, 5, 6], stream=streams[0]),
        copy_blocks(here.view, cache.view, [7, 3, 1], [5, 6, 7], stream=streams[1]),
    ]
    run_threads(lambda move: move.synchronize(), moves)
    assert torch.equal(there.rows(), stored)
    assert torch.equal(cache.rows(), loaded)


def test_two_devices(accelerator: torch.device, options: dict[str, Any]) -> None:
    if torch.get_device_module(accelerator).device_count() < 2:
        pytest.skip("there is one device of this kind")
    pairs = [pair(torch.device(accelerator.type, i), store=True) for i in range(2)]
    expected = [wanted(*each, SRC, DST) for each in pairs]
    moves = [copy_blocks(a.view, b.view, SRC, DST, **options) for a, b in pairs]
    for moved, (_, dst), rows in zip(moves, pairs, expected, strict=True):
        moved.synchronize()
        assert torch.equal(dst.rows(), rows)


@pytest.mark.parametrize("priority", [-1, 0])
def test_a_stream_of_high_priority(
    accelerator: torch.device, priority: int, options: dict[str, Any]
) -> None:
    src, dst = pair(accelerator, store=True)
    expected = wanted(src, dst, SRC, DST)
    stream = torch.Stream(accelerator, priority=priority)
    copy_blocks(src.view, dst.view, SRC, DST, stream=stream, **options).synchronize()
    assert torch.equal(dst.rows(), expected)


# What stops it, and what must not


@pytest.mark.parametrize("store", [False, True])
def test_cancelling(
    accelerator: torch.device, store: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_slices, "SLICE", 1)
    src, dst = pair(accelerator, store)
    before, after = dst.rows(), wanted(src, dst, SRC, DST)
    moved = copy_blocks(src.view, dst.view, SRC, DST, max_gbps=BLOCK_BYTES / 5e8)
    until(lambda: moved.statistics.blocks >= 2)
    assert moved.cancel()
    with pytest.raises(TransferCancelled):
        moved.synchronize()
    blocks = moved.statistics.blocks
    slots = dst.slots(DST[:blocks])
    before[:, :, slots] = after[:, :, slots]
    assert 2 <= blocks < 5
    assert torch.equal(dst.rows(), before)


@pytest.mark.simdev
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("pin", [False, True], ids=["pageable", "pinned"])
def test_as_much_is_under_way_in_one_slice_that_blocks_as_in_three(
    store: bool, pin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_slices, "SLICE", BLOCK_BYTES)
    src, dst = pair(simdev_cases.DEVICE, store, pin)
    moved = copy_blocks(src.view, dst.view, SRC, DST, cancellable=True)
    moved.synchronize()
    assert WINDOW == 3
    assert moved.statistics.slices == (5 if pin else 2)  # of five blocks


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("pin", [False, True], ids=["pageable", "pinned"])
def test_memory_that_everybody_forgets(
    accelerator: torch.device, store: bool, pin: bool, way: str
) -> None:
    """The views, the tensors and the handle go while bytes fly; a second copy shows what came."""
    src, dst = pair(accelerator, store, pin)
    through, back = dst, layered(accelerator) if store else block_first(pin=True)
    rows = wanted(src, back, SRC, SRC)
    settle(accelerator)
    stream = torch.Stream(accelerator)
    delay(stream)
    moved = copy_blocks(src.view, dst.view, SRC, DST, stream=stream, **WAYS[way])
    if way not in ("at once", "by layer"):
        moved.wait()
    second = copy_blocks(through.view, back.view, DST, SRC, stream=stream)
    del moved, src, dst, through
    gc.collect()
    rubbish = [torch.zeros(1 << 12, dtype=torch.int16, pin_memory=pin) for _ in range(20)]
    rubbish += [torch.zeros(1 << 12, dtype=torch.int16, device=accelerator) for _ in range(20)]
    second.synchronize()
    assert torch.equal(back.rows(), rows)
    del rubbish


def test_a_forgotten_transfer_in_slices_goes_on(accelerator: torch.device) -> None:
    src, dst = pair(accelerator, store=True)
    expected = wanted(src, dst, SRC, DST)
    copy_blocks(src.view, dst.view, SRC, DST, cancellable=True)
    del src
    gc.collect()
    until(lambda: torch.equal(dst.rows(), expected))


# Ids that cross the link: those of one call at once, and without the host waiting for it


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ids were sent each time, as on devices that are sent ids by a kernel."""
    monkeypatch.setattr(prepared, "AT_ONCE", frozenset({simdev_cases.DEVICE.type}))
    sent: list[int] = []
    send = small.to_device

    def noted(values: Any, *rest: Any) -> torch.Tensor:
        sent.append(len(values))
        return send(values, *rest)

    monkeypatch.setattr(small, "to_device", noted)
    return sent


@pytest.mark.simdev
@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("store", [False, True])
def test_ids_of_one_call_cross_together_and_keep_no_host_waiting(
    store: bool, side: bool, way: str, sent: list[int]
) -> None:
    device = simdev_cases.DEVICE
    for _ in range(2):
        src, dst = layered(device), block_first(device)
        (src, dst) = (src, dst) if store else (dst, src)
        settle(device)
        expected = wanted(src, dst, SRC, DST)
        stream = torch.Stream(device) if side else None
        sent.clear()
        simdev.delay(current(device), 50)
        moved = copy_blocks(src.view, dst.view, SRC, torch.tensor(DST), stream=stream, **WAYS[way])
        if way not in SLICED and "detached" not in way:
            assert sent == [10]
            assert not moved.done(), "the host waited for the stream"
        moved.synchronize()
        assert torch.equal(dst.rows(), expected)
        assert sum(sent) == 10


@pytest.mark.simdev
def test_an_index_that_is_kept_is_not_sent_behind_a_stream(sent: list[int]) -> None:
    """It may be used on another stream next, which does not wait for this one."""
    device = simdev_cases.DEVICE
    src, dst = layered(device), block_first(device)
    settle(device)
    expected = wanted(src, dst, SRC, DST)
    mine, theirs = Index(SRC, step=SIZE), Index(DST, step=SIZE)
    assert not prepared.bring((mine, theirs), device, frozenset({torch.int64}))
    for stream in (None, torch.Stream(device)):
        copy_blocks(src.view, dst.view, mine, theirs, stream=stream).synchronize()
        assert torch.equal(dst.rows(), expected)
    assert not sent
