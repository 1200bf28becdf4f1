# SPDX-License-Identifier: Apache-2.0
"""The simulated device itself: torch on it, its memory, its streams and its faults."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.device_cases import on
from support.simdev_cases import DEVICE, NAME, OTHER, current

from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

REPEATS = 100


@pytest.fixture(autouse=True)
def _no_faults_left() -> Any:
    yield
    for device in (DEVICE, OTHER):
        torch.accelerator.synchronize(device)
    assert not simdev.take_faults()


# What torch sees


def test_it_says_what_it_is() -> None:
    module = torch.get_device_module(NAME)
    assert simdev.EMULATED
    assert module.EMULATED
    for word in ("emulated", str(OTHER)):
        assert word in module.get_device_name(OTHER)
    assert (simdev.loaded(), simdev.available()) == (NAME, None)
    assert str(torch.accelerator.current_accelerator()) == NAME
    assert torch.accelerator.device_count() == module.device_count() == 2


def test_one_name_in_a_process() -> None:
    simdev.load(NAME)
    other = next(name for name in simdev.NAMES if name != NAME)
    with pytest.raises(simdev.SimulatedDeviceError, match=f"{NAME!r}, which .*{other!r}"):
        simdev.load(other)
    with pytest.raises(ValueError, match="'cuda'"):
        simdev.load("cuda")


@pytest.mark.parametrize("device", [DEVICE, OTHER])
def test_operators_agree_with_the_cpu(device: torch.device) -> None:
    there = torch.arange(24, dtype=torch.float32).view(4, 6)
    rows = torch.tensor([2, 0])

    def results(x: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
        written = x.clone()
        put = x.clone()
        scattered = x.clone()
        written.index_copy_(0, ids, x[:2] + 100)
        put[:, 1:4][ids] = 7.0
        put[x > 20] = -1
        scattered.scatter_(1, ids[:, None], 3.0)
        out = torch.empty(0, device=x.device)
        torch.index_select(x, 0, ids, out=out)
        return [
            written,
            put,
            scattered,
            out,
            x.index_select(1, ids),
            x[ids],
            x[:, ids],
            x[x > 3],
            x.nonzero(),
            torch.gather(x, 1, ids[None]),
            x.t().contiguous(),
            x[1:3, 2:].clone(),
            torch.cat([x, x + 1]),
            torch.stack([x, x * 2]).sum(0),
            x.view(torch.int32) + 1,
            x.unfold(1, 2, 2).clone(),
            x.to(torch.bfloat16),
            x.to(torch.int32).clamp(2, 5),
            x.unique(),
            torch.arange(5, device=x.device),
            torch.full((3,), 2, device=x.device),
            x.view(torch.complex64).clone(),
            x.sort(dim=1, descending=True).indices,
            torch.where(x > 3, x, 0),
            x.expand(2, 4, 6).reshape(-1),
            x.permute(1, 0)[ids],
        ]

    pairs = zip(results(there.to(device), rows.to(device)), results(there, rows), strict=True)
    for result, wanted in pairs:
        assert (result.device, result.stride()) == (device, wanted.stride())
        assert torch.equal(result.cpu(), wanted)
    assert there.to(device).sum().item() == 276
    assert torch.equal(there.to(device), there.to(device))


def test_what_portakv_needs_does_not_wait_for_the_device() -> None:
    """Operators that waited would hide a missing wait of the caller; so would those that wait for
    more than they read, such as a blocking copy of ids after a producer."""
    x = torch.zeros(8, 4, dtype=torch.int64, device=DEVICE)
    ids = torch.tensor([1, 2], device=DEVICE)
    out = torch.empty(2, 4, dtype=x.dtype, device=DEVICE)
    before = simdev.synchronised()
    (launches, waits) = simdev.counted()
    torch.accelerator.synchronize()
    x.fill_(1)
    marker = torch.Event(DEVICE)
    marker.record()
    torch.index_select(x, 0, ids, out=out)
    x.index_copy_(0, ids, out)
    x[ids] = out
    x.copy_(x.clone().fill_(3))
    torch.cat([x, x])
    ids.to(torch.int32).clamp(0, 5)
    torch.zeros(3, device=DEVICE)
    assert torch.tensor([3, 4], device=DEVICE).cpu().tolist() == [3, 4]
    assert not marker.query()
    assert simdev.synchronised() == before
    assert simdev.counted() == (launches + 13, waits + 3)


def test_errors_of_shapes_and_places_are_raised_by_the_call() -> None:
    x = torch.zeros(4, 2, device=DEVICE)
    with pytest.raises(RuntimeError, match="size of tensor"):
        x + torch.zeros(3, device=DEVICE)
    for elsewhere in (torch.zeros(4, 2), torch.zeros(4, 2, device=OTHER)):
        with pytest.raises(RuntimeError, match="same device"):
            x + elsewhere
    with pytest.raises(RuntimeError, match="same device"):
        torch.index_select(x, 0, torch.tensor([1]))


def test_current_device_and_stream_belong_to_a_thread() -> None:
    def seen() -> tuple[int, int]:
        return torch.accelerator.current_device_index(), current(OTHER).stream_id

    side = torch.Stream(OTHER)
    with on(side), ThreadPoolExecutor() as threads:
        assert torch.accelerator.current_device_index() == 1
        assert current(OTHER) == side
        assert torch.empty(1, device=NAME).device == OTHER
        assert threads.submit(seen).result() == (0, 0)
    assert torch.accelerator.current_device_index() == 0
    assert torch.get_device_module(NAME).default_stream(OTHER) == current(OTHER)


# Streams and events


def test_work_is_late_until_it_is_needed() -> None:
    stream = torch.Stream(DEVICE)
    event = torch.Event(DEVICE)
    pinned = torch.zeros(4, dtype=torch.int64).pin_memory()
    with on(stream):
        pinned.copy_(torch.arange(4, device=DEVICE), non_blocking=True)
    event.record(stream)
    assert not event.query()
    assert pinned.tolist() == [0, 0, 0, 0]
    event.synchronize()
    assert event.query()
    assert pinned.tolist() == [0, 1, 2, 3]


def test_events_measure_time_and_who_asks_often_sees_them_end() -> None:
    first, last = (torch.Event(DEVICE, enable_timing=True) for _ in range(2))
    first.record()
    simdev.delay(current(), 20)
    last.record()
    while not last.query():  # a test's own limit ends it
        pass
    assert 15 < first.elapsed_time(last) < 10_000


@pytest.mark.parametrize("device", [DEVICE, OTHER])
@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("writes_late", [False, True])
def test_a_missing_wait_is_wrong_every_time(
    device: torch.device, waits: bool, early: bool, writes_late: bool
) -> None:
    """A read of what is written, or a write of what is read: the second stream comes too early, or
    the first one too late; also where it is needed last, and where the host asks for the streams in
    the order that would be right by luck."""
    wrong = 0
    for repeat in range(REPEATS):
        first = torch.Stream(device)
        second = torch.Stream(device)
        cell, taken = (torch.zeros(64, device=device) for _ in range(2))
        torch.accelerator.synchronize(device)
        with on(first):
            taken.copy_(cell) if writes_late else cell.fill_(repeat + 1)
        if waits:
            second.wait_stream(first)
        with on(second):
            cell.fill_(repeat + 1) if writes_late else taken.copy_(cell)
        for stream in (first, second) if early else (second, first):
            stream.synchronize()
        wanted = 0 if writes_late else repeat + 1
        wrong += int((taken.cpu() != wanted).any())
    assert wrong == (0 if waits else REPEATS)


def test_a_copy_between_devices_waits_for_both() -> None:
    source = torch.zeros(64, device=DEVICE)
    target = torch.zeros(64, device=OTHER)
    simdev.delay(current(), 5)
    source.fill_(3)
    target.fill_(4)
    target.copy_(source)
    source.fill_(5)
    assert target.add(1).cpu().unique().tolist() == [4]


def test_pageable_memory_is_read_at_once_and_pinned_memory_later() -> None:
    for pinned, wanted in ((False, 1), (True, 2)):
        source = torch.ones(8, pin_memory=pinned)
        assert source.is_pinned() == pinned
        there = source.to(DEVICE, non_blocking=True)
        source.fill_(2)
        assert there.cpu().unique().tolist() == [wanted]


# Memory


def test_freed_memory_is_soon_somebody_elses() -> None:
    side = torch.Stream(DEVICE)
    source = torch.arange(1000, device=DEVICE)
    side.wait_stream(current())
    with on(side):
        copy = source.clone()
    del source  # and no code has recorded that another stream reads it
    with on(side):
        with pytest.raises(RuntimeError, match=r"8000 bytes that were freed.*record_str"):
            copy.cpu()
        assert copy.cpu().view(torch.uint8).unique().tolist() == [0xDB]


def test_a_write_to_freed_memory_hits_its_next_owner() -> None:
    side = torch.Stream(DEVICE)
    freed = torch.zeros(1000, device=DEVICE)
    address = freed.data_ptr()
    torch.accelerator.synchronize()
    with on(side):
        freed.fill_(7)
    del freed
    current().synchronize()
    owner = torch.zeros(1000, device=DEVICE)
    assert owner.data_ptr() == address
    current().synchronize()
    with pytest.raises(RuntimeError, match=r"fill_ on stream .* freed"):
        side.synchronize()
    assert owner.cpu().unique().tolist() == [7]


def test_memory_of_recorded_streams_is_used_again_only_behind_them() -> None:
    side = torch.Stream(DEVICE)
    source = torch.zeros(50_000, device=DEVICE)
    address = source.data_ptr()
    current().synchronize()
    with on(side):
        used = source + 1
    source.record_stream(side)
    del source
    other = torch.zeros(50_000, device=DEVICE)
    assert other.data_ptr() != address
    torch.accelerator.synchronize()
    assert used.cpu().unique().tolist() == [1]
    assert torch.zeros(50_000, device=DEVICE).data_ptr() == address


def test_large_memory_is_unmapped_when_it_is_freed_and_storages_can_be_resized() -> None:
    side = torch.Stream(DEVICE)
    large = torch.zeros(100 << 20, dtype=torch.uint8, device=DEVICE)
    torch.accelerator.synchronize()
    with on(side):
        part = large[:10].clone()
    del large
    with pytest.raises(RuntimeError, match=r"freed"):
        side.synchronize()
    del part
    x = torch.arange(8, device=DEVICE)
    x.untyped_storage().resize_(128)
    assert torch.equal(x.cpu(), torch.arange(8))
    x.untyped_storage().resize_(0)
    assert x.untyped_storage().nbytes() == 0


# Faults


def test_a_failing_job_is_told_to_whoever_waits() -> None:
    x = torch.zeros(4, device=DEVICE)
    x.index_select(0, torch.tensor([9], device=DEVICE))
    with pytest.raises(RuntimeError, match=f"index_select on stream 0 of {NAME}:0 failed: .*range"):
        torch.accelerator.synchronize()
    torch.accelerator.synchronize()
    assert x.cpu().tolist() == [0, 0, 0, 0]


def test_copy_runs_refuses_what_it_does_not_reach() -> None:
    here, there, host = (
        torch.zeros(16, dtype=torch.uint8, device=device) for device in (DEVICE, OTHER, "cpu")
    )
    for source, size in ((here, 17), (here, -1), (host, 8), (there, 8)):
        run = (torch.tensor([number]) for number in (source.data_ptr(), here.data_ptr(), size))
        sources, destinations, sizes = run
        with pytest.raises(RuntimeError, match="copy_runs was given"):
            simdev.copy_runs(sources, destinations, sizes)
    one = torch.tensor([1])
    with pytest.raises(ValueError, match="int64"):
        simdev.copy_runs(one.int(), one, one)
    with pytest.raises(ValueError, match="2 destinations"):
        simdev.copy_runs(one, torch.tensor([1, 2]), one)


def test_early_runs_each_job_before_its_launch_returns() -> None:
    event = torch.Event(DEVICE)
    with simdev.early():
        torch.zeros(4, device=DEVICE)
        event.record()
        assert event.query()
