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
    METHODS,
    SIZE,
    SLICED,
    SRC,
    Pair,
    block_first,
    inside,
    layered,
    pair,
    until,
    wanted,
)
from support.device_cases import SIDE, STORE, current, delay, on, settle
from support.threads import run_threads

from portakv import Index, copy_blocks
from portakv.copy import submit
from portakv.copy.slices import WINDOW
from portakv.host import small
from portakv.registry import prepared
from portakv.runtime import transfer
from portakv_conformance import simdev

pytestmark = pytest.mark.usefixtures("small_slices")
ENGINES: list[dict[str, Any]] = [
    {"backend": name, **more}
    for name in ("staged", "batched_memcpy", "zero_copy")
    for more in ({"overlap": "idle"}, {"detached": True})
]
PIN = pytest.mark.parametrize("pin", [False, True], ids=["pageable", "pinned"])


@SIDE
@STORE
def test_blocks_come_behind_their_producer(
    accelerator: torch.device, store: bool, side: bool, options: dict[str, Any]
) -> None:
    for _ in range(2):
        blocks = pair(accelerator, store)
        fresh = layered(accelerator)
        src = blocks.src
        dst = blocks.dst
        settle(accelerator)
        delay(current(accelerator))
        for at, made in enumerate(fresh.tensors):
            if store:
                src.tensors[at].copy_(made)
            else:
                src.tensors[:, at].copy_(made.transpose(0, 1), non_blocking=True)
        stream = torch.Stream(accelerator, priority=-1) if side else None
        blocks.start(stream=stream, **options).synchronize()
        assert torch.equal(dst.rows()[:, :, dst.slots(DST)], fresh.rows()[:, :, fresh.slots(SRC)])


@pytest.mark.parametrize("waits", [True, False])
def test_a_stream_waits_for_one_layer(
    accelerator: torch.device, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without its wait it sees other bytes."""
    if not waits:
        monkeypatch.setattr(transfer.Completion, "wait", lambda self, stream: None)
    pair(accelerator, store=False).start(by_layer=True).synchronize()  # prepared
    for _ in range(3):
        blocks = pair(accelerator, store=False)
        stream = torch.Stream(accelerator)
        copies = []
        delay(stream)
        moved = blocks.start(by_layer=True, stream=stream)
        assert not moved.done()
        for layer, cache in zip(moved.layers, blocks.dst.tensors, strict=True):
            reader = torch.Stream(accelerator)
            with on(reader):
                layer.wait()
                copies.append(cache.clone())
            current(accelerator).wait_stream(reader)
        rows = [x.cpu().view(torch.int16).reshape(2, -1, HEADS * DIM) for x in copies]
        assert all(map(torch.equal, rows, blocks.expected)) is waits
        moved.synchronize()


def test_a_layer_ends_before_the_whole(accelerator: torch.device) -> None:
    blocks = pair(accelerator, store=True)
    moved = blocks.start(by_layer=True, stream=torch.Stream(accelerator))
    moved.layers[0].synchronize()
    assert moved.layers[0].done()
    assert torch.equal(blocks.dst.rows()[0], blocks.expected[0])
    moved.layers[2].synchronize()
    assert moved.layers[1].done()
    assert moved.done()


def test_both_directions_on_one_cache(accelerator: torch.device, options: dict[str, Any]) -> None:
    """Blocks leave and others come while a thread waits for each."""
    cache = layered(accelerator)
    there = block_first(pin=True)
    here = block_first(pin=True)
    settle(accelerator)
    both = Pair(cache, there, [0, 1, 2], [4, 5, 6]), Pair(here, cache, [7, 3, 1], [5, 6, 7])
    moves = [each.start(stream=torch.Stream(accelerator), **options) for each in both]
    run_threads(lambda move: move.synchronize(), moves)
    assert all(each.landed() for each in both)


@pytest.mark.parametrize("terms", [*METHODS.values(), *ENGINES], ids=str)
@STORE
def test_two_devices(accelerator: torch.device, store: bool, terms: dict[str, Any]) -> None:
    """Whichever device is the current one, bytes and order are each device's own."""
    if torch.get_device_module(accelerator).device_count() < 2:
        pytest.skip("there is one device of this kind")
    if accelerator.type != "cuda" and terms.get("backend") == "zero_copy":
        pytest.skip("no kernel of this device reads host memory")
    both = [pair(torch.device(accelerator.type, index), store) for index in range(2)]
    for moved in [each.start(**terms) for _ in range(5) for each in both]:
        moved.synchronize()
    assert all(each.landed() for each in both)


# What stops it, and what must not


@pytest.mark.simdev
@STORE
@PIN
def test_as_much_is_under_way_in_one_slice_that_blocks_as_in_three(
    store: bool, pin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "SLICE", BLOCK_BYTES)
    moved = pair(simdev_cases.DEVICE, store, pin).start(cancellable=True)
    moved.synchronize()
    assert WINDOW == 3
    assert moved.statistics.slices == (5 if pin else 2)  # of five blocks


@pytest.mark.parametrize("terms", [*METHODS.values(), *ENGINES], ids=str)
@STORE
@PIN
def test_memory_that_everybody_forgets(
    accelerator: torch.device, store: bool, pin: bool, terms: dict[str, Any]
) -> None:
    """The views, the tensors and the handle go while bytes fly; a second copy shows what came."""
    engine = terms.get("backend")
    if engine and (not pin or (engine == "zero_copy" and accelerator.type != "cuda")):
        pytest.skip("the engine does not reach this memory")
    first = pair(accelerator, store, pin)
    back = layered(accelerator) if store else block_first(pin=True)
    rows = wanted(first.src, back, SRC, SRC)
    settle(accelerator)
    stream = torch.Stream(accelerator)
    delay(stream)
    moved = first.start(stream=stream, **terms)
    if terms.keys() & {"detached", "cancellable", "max_gbps"}:
        moved.wait()
    second = copy_blocks(first.dst.view, back.view, DST, SRC, stream=stream)
    del moved, first
    gc.collect()
    rubbish = [torch.zeros(1 << 12, dtype=torch.int16, pin_memory=pin) for _ in range(20)]
    rubbish += [torch.zeros(1 << 12, dtype=torch.int16, device=accelerator) for _ in range(20)]
    second.synchronize()
    assert torch.equal(back.rows(), rows)
    del rubbish


def test_a_forgotten_transfer_in_slices_goes_on(accelerator: torch.device) -> None:
    blocks = pair(accelerator, store=True)
    blocks.start(cancellable=True)
    del blocks.src
    gc.collect()
    until(blocks.landed)


# Ids that cross the link: those of one call together, and the host does not wait for the call


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of ids of each send, as on devices that a kernel sends ids to."""
    monkeypatch.setattr(prepared, "ASYNCHRONOUS", frozenset({simdev_cases.DEVICE.type}))
    sent: list[int] = []
    send = small.to_device

    def noted(values: Any, *rest: Any) -> torch.Tensor:
        sent.append(len(values))
        return send(values, *rest)

    monkeypatch.setattr(small, "to_device", noted)
    return sent


@pytest.mark.simdev
@SIDE
def test_ids_of_one_call_cross_together_without_a_wait(
    side: bool, method: str, sent: list[int]
) -> None:
    device = simdev_cases.DEVICE
    for _ in range(2):
        blocks = inside(device)
        stream = torch.Stream(device) if side else None
        sent.clear()
        simdev.delay(current(device), 50)
        moved = blocks.start(dst_ids=torch.tensor(DST), stream=stream, **METHODS[method])
        if method not in SLICED and "detached" not in method:
            assert sent == [10]
            assert not moved.done(), "the host waited for the stream"
        moved.synchronize()
        assert blocks.landed()
        assert sum(sent) == 10


@pytest.mark.simdev
def test_an_index_that_is_kept_is_not_sent_behind_a_stream(sent: list[int]) -> None:
    """It may be used on another stream next, which does not wait for this one."""
    blocks = inside(simdev_cases.DEVICE)
    src_index = Index(SRC, step=SIZE)
    dst_index = Index(DST, step=SIZE)
    for stream in (None, torch.Stream(simdev_cases.DEVICE)):
        blocks.start(src_index, dst_index, stream=stream).synchronize()
        assert blocks.landed()
    assert not sent
