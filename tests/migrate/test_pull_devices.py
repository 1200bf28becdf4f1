# SPDX-License-Identifier: Apache-2.0
"""Pulls of rows on a device: after what the owner's stream still writes, and what the reader's
still reads."""

from __future__ import annotations

import pytest
import torch
from support.migrate_pulls import LAYOUT, SMALL, sides

from portakv import KVView
from portakv.errors import LayoutError
from portakv.migrate.shards import Shard
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
        reader.pull(owner.offer([0], tokens=16).ticket, [0]).synchronize(60)  # they are paired
        for number in (7, 8):
            delay(accelerator)
            remote.fill_(number)
            offer = owner.offer([3, 2], tokens=32)
            pulled = reader.pull(offer.ticket, [1, 5], verify=True)
            pulled.synchronize(60)
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
        reader.pull(owner.offer([0], tokens=16).ticket, [0]).synchronize(60)
        offer = owner.offer([3, 2], tokens=32)
        delay(accelerator)
        read = local.clone()
        pulled = reader.pull(offer.ticket, [1, 5], by_layer=by_layer)
        pulled.synchronize(60)
        assert (read[:, :, 1:].cpu() == 3).all()
        assert (local[:, :, [1, 5]].cpu() == 7).all()
        assert (local[:, :, [2, 3, 4, *range(6, 16)]].cpu() == 3).all()


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
            reader.pull(owner.offer([block], tokens=16).ticket, [block]).synchronize(60)
    assert (local[:, :, :3] == 7).all()
