# SPDX-License-Identifier: Apache-2.0
"""Pulls of rows on a device: after what the owner's stream still writes, and what the reader's
still reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.migrate_pulls import LAYOUT, SMALL, sides
from support.waits import LIMIT

from portakv import KVView, copy_rows
from portakv.errors import LayoutError
from portakv.migrate import connections
from portakv.migrate.connections import StagingBuffer
from portakv.migrate.shards import Shard
from portakv.migrate.staging import staging
from portakv_conformance import simdev

SHAPE = 2, 2, 16, 16, 4, 8


def delay(device: torch.device) -> None:
    """Hold the current stream up for a while."""
    if device.type == "cuda":
        torch.cuda._sleep(500_000_000)
    else:
        simdev.delay(torch.accelerator.current_stream(device.index), 200)


def shard(whole: torch.Tensor) -> Shard:
    return Shard(KVView([*whole], LAYOUT))


@pytest.mark.parametrize("expose", ["mapped", "staging"])
def test_rows_that_are_still_written_at_the_offer_come_whole(
    accelerator: torch.device, expose: str
) -> None:
    """Fault 24. What the current stream holds at the offer is in what readers get."""
    remote = torch.zeros(SHAPE, dtype=torch.int16, device=accelerator)
    local = torch.zeros(SHAPE, dtype=torch.int16, device="cpu")
    with sides() as made:
        with pytest.raises(LayoutError, match="on one device"):
            made.owner(shard(remote), shard(local))  # one stream could not follow both
        owner = made.owner(shard(remote), expose=expose, staging=SMALL)
        reader = made.reader(shard(local))
        reader.pull(owner.offer([0], tokens=16).ticket, [0]).synchronize(LIMIT)  # they are paired
        for number in (7, 8):
            delay(accelerator)
            remote.fill_(number)
            offer = owner.offer([3, 2], tokens=32)
            pulled = reader.pull(offer.ticket, [1, 5], verify=True)
            pulled.synchronize(LIMIT)
            assert (local[:, :, [1, 5]] == number).all()
            assert not local[:, :, 6:].any()


@pytest.mark.parametrize("by_layer", [False, True])
def test_rows_that_the_reader_still_reads_are_written_behind_that(
    accelerator: torch.device, by_layer: bool
) -> None:
    """Fault 25. A pull is ordered after the reader's current stream."""
    remote = torch.full(SHAPE, 7, dtype=torch.int16, device=accelerator)
    local = torch.full(SHAPE, 3, dtype=torch.int16, device=accelerator)
    with sides() as made:
        owner = made.owner(shard(remote), staging=SMALL)
        reader = made.reader(shard(local))
        reader.pull(owner.offer([0], tokens=16).ticket, [0]).synchronize(LIMIT)
        offer = owner.offer([3, 2], tokens=32)
        delay(accelerator)
        read = local.clone()
        pulled = reader.pull(offer.ticket, [1, 5], by_layer=by_layer)
        pulled.synchronize(LIMIT)
        assert (read[:, :, 1:].cpu() == 3).all()
        assert (local[:, :, [1, 5]].cpu() == 7).all()
        assert (local[:, :, [2, 3, 4, *range(6, 16)]].cpu() == 3).all()


def test_staging_on_the_host_is_pinned_for_rows_of_a_device(accelerator: torch.device) -> None:
    host = torch.device("cpu")
    assert staging(5, host, 1 << 12, accelerator).is_pinned()
    assert not staging(5, host, 1 << 12, host).is_pinned()
    assert staging(5, accelerator, 1 << 12, accelerator).device == accelerator


def test_memory_that_cannot_be_pinned_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For each device; `meta` stands for one."""
    empty = torch.empty

    def fails(*args: Any, pin_memory: bool = False, **terms: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nSearch for the error.")
        return empty(*args, **terms)

    monkeypatch.setattr(torch, "empty", fails)
    host = torch.device("cpu")
    for number in (1, 1, 2):
        assert staging(5, host, rows=torch.device("meta", number)).nbytes == 5
    text = "Staging buffers on the host for meta:%d are pageable, so transfers take longer: %s"
    why = "CUDA error: out of memory"
    assert [record.getMessage() for record in caplog.records] == [
        text % (number, why) for number in (1, 2)
    ]


def rows_that_come_while_the_device_is_busy(device: torch.device) -> bool:
    """Return True if a device that is held up gets the rows of each slice by staging buffers of the
    host, which are fewer than the slices."""
    shape = 2, 2, 64, 16, 4, 8
    remote = torch.arange(shape[0] * shape[1] * shape[2] * 512, dtype=torch.int32, device="cpu")
    remote = remote.view(shape)
    local = torch.zeros(shape, dtype=torch.int32, device=device)
    blocks = [*range(shape[2])]
    with sides() as made:
        owner = made.owner(shard(remote), expose="staging", staging=SMALL)
        reader = made.reader(shard(local))
        reader.pull(owner.offer([0], tokens=16).ticket, [0]).synchronize(LIMIT)
        offer = owner.offer(blocks, tokens=16 * len(blocks))
        delay(device)
        reader.pull(offer.ticket, blocks).synchronize(LIMIT)
    return torch.equal(local.cpu(), remote)


def test_a_staging_buffer_of_the_host_is_filled_after_its_last_copy(
    accelerator: torch.device,
) -> None:
    assert rows_that_come_while_the_device_is_busy(accelerator)


def rows_of_a_buffer_that_is_filled_again(device: torch.device) -> torch.Tensor:
    """Return rows that a busy device copies from a staging buffer of the host, which gets other
    bytes as soon as it may."""
    buffer = StagingBuffer(staging(4096, torch.device("cpu"), rows=device), device)
    buffer.memory.fill_(1)
    shape = 1, 2, 4, 16, 4, 8
    rows = torch.zeros(shape, dtype=torch.uint8, device=device)
    src = KVView([*buffer.memory.view(shape)], LAYOUT)
    dst = KVView([*rows], LAYOUT)
    copy_rows(src, dst).synchronize()
    delay(device)
    buffer.copy = copy_rows(src, dst)
    buffer.prepare(4096, 4096)
    buffer.memory.fill_(2)
    torch.accelerator.current_stream(device.index).synchronize()
    return rows.cpu()


def test_a_staging_buffer_is_free_after_its_last_copy(accelerator: torch.device) -> None:
    assert (rows_of_a_buffer_that_is_filled_again(accelerator) == 1).all()


def test_the_copy_is_what_a_staging_buffer_waits_for(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    monkeypatch.setattr(connections, "has_ended", lambda copy, wait: True)
    assert (rows_of_a_buffer_that_is_filled_again(accelerator) == 2).any()


@pytest.mark.gpu
@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="it takes two CUDA devices")
def test_an_owner_on_another_device_than_the_current_one() -> None:
    """Its events are that device's: to wait for one of another ended the process."""
    remote = torch.full(SHAPE, 7, dtype=torch.int16, device="cuda:1")
    local = torch.zeros(SHAPE, dtype=torch.int16, device="cpu")
    with sides() as made, torch.cuda.device(0):
        owner = made.owner(shard(remote))
        reader = made.reader(shard(local))
        assert {event.device for event in owner._events} == {remote.device}
        for block in range(3):
            reader.pull(owner.offer([block], tokens=16).ticket, [block]).synchronize(LIMIT)
    assert (local[:, :, :3] == 7).all()
