# SPDX-License-Identifier: Apache-2.0
"""Marks of rows on a device: a reader sees a mark after the work that the owner's stream had at the
raise, and copies after the work of the stream of its caller."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from support.device_cases import on
from support.migrate_pulls import LAYOUT, MODEL, SMALL, Rows, sides
from support.peer_process import Peer
from support.waits import LIMIT, until
from torch.cuda import _sleep

from portakv import KVView
from portakv.migrate import Channel, Reader
from portakv.migrate.shards import Shard
from portakv_conformance import simdev

SHAPE = 2, 2, 16, 16, 4, 8
POISON = -77


def delay(stream: torch.Stream) -> None:
    """Keep a stream busy for a while."""
    if stream.device.type == "cuda":
        with on(stream):
            _sleep(500_000_000)
    else:
        simdev.delay(stream, 300)


@pytest.mark.parametrize("expose", ["mapped", "staging"])
@pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "by layer"])
def test_a_mark_is_seen_after_the_streams_work(
    accelerator: torch.device, expose: str, by_layer: bool
) -> None:
    """Rows are poison until the stream has written them, long after the raise returned."""
    remote = torch.full(SHAPE, POISON, dtype=torch.int16, device=accelerator)
    local = torch.zeros(SHAPE, dtype=torch.int16, device="cpu")
    writer = torch.Stream(accelerator)
    with sides() as made:
        owner = made.owner(Rows.shard_of(remote), expose=expose, staging=SMALL)
        reader = made.reader(Rows.shard_of(local))
        reader.pull(owner.offer([0], tokens=16).ticket, [0]).synchronize(LIMIT)  # they are paired
        local.zero_()
        offer = owner.offer([3, 2], tokens=32, progress="layers")
        pulled = reader.pull(offer.ticket, [1, 5], by_layer=by_layer, timeout=LIMIT)
        with on(writer):
            for layer in range(2):
                delay(writer)
                remote[layer].fill_(layer + 7)
                offer.raise_to(layer + 1)
        shown = offer.mark
        assert shown is not None
        assert shown < 2  # the call does not wait
        for number, end in enumerate(pulled.layers):
            end.synchronize(LIMIT)
            assert local[number, :, [1, 5]].eq(number + 7).all()
        pulled.synchronize(LIMIT)
        assert offer.mark == 2
        for number in range(2):
            assert local[number, :, [1, 5]].eq(number + 7).all()
        assert not local[:, :, [0, *range(2, 5), *range(6, 16)]].any()


def test_a_mark_that_is_raised_before_the_rows_are_written_shows_poison(
    accelerator: torch.device,
) -> None:
    """The negative control: the order of the raise and of the write counts."""
    remote = torch.full(SHAPE, POISON, dtype=torch.int16, device=accelerator)
    local = torch.zeros(SHAPE, dtype=torch.int16, device="cpu")
    with sides() as made:
        owner = made.owner(Rows.shard_of(remote), expose="staging", staging=SMALL)
        reader = made.reader(Rows.shard_of(local))
        offer = owner.offer([3, 2], tokens=32, progress="layers")
        offer.raise_to(2)
        pulled = reader.pull(offer.ticket, [1, 5], timeout=LIMIT)
        pulled.synchronize(LIMIT)
        remote.fill_(7)
        assert local[:, :, [1, 5]].eq(POISON).all()


def test_a_later_mark_waits_for_the_stream_of_an_earlier_one(accelerator: torch.device) -> None:
    """The second layer is written by a stream that is quick, the first by one that is slow."""
    remote = torch.full(SHAPE, POISON, dtype=torch.int16, device=accelerator)
    local = torch.zeros(SHAPE, dtype=torch.int16, device="cpu")
    slow = torch.Stream(accelerator)
    quick = torch.Stream(accelerator)
    with sides() as made:
        owner = made.owner(Rows.shard_of(remote), staging=SMALL)
        reader = made.reader(Rows.shard_of(local))
        torch.accelerator.synchronize(accelerator)
        offer = owner.offer([3, 2], tokens=32, progress="layers")
        other = owner.offer([4], tokens=16, progress="layers")
        pulled = reader.pull(offer.ticket, [1, 5], timeout=LIMIT)
        with on(slow):
            delay(slow)
            delay(slow)
            remote[0].fill_(7)
            offer.raise_to(1)
        with on(quick):
            remote[1].fill_(8)
            offer.raise_to(2)
            other.raise_to(1)
        assert until(lambda: other.mark == 1, LIMIT)  # it waits for no other offer's stream
        pulled.synchronize(LIMIT)
        assert local[0, :, [1, 5]].eq(7).all()
        assert local[1, :, [1, 5]].eq(8).all()


def test_a_mark_whose_offer_ends_before_the_streams_work_is_not_shown(
    accelerator: torch.device,
) -> None:
    """Another offer may have the place of its words by then."""
    remote = torch.full(SHAPE, POISON, dtype=torch.int16, device=accelerator)
    writer = torch.Stream(accelerator)
    with sides() as made:
        owner = made.owner(Rows.shard_of(remote), staging=SMALL)
        offer = owner.offer([3], tokens=16, progress="layers")
        after = owner.offer([4], tokens=16, progress="layers")
        with on(writer):
            delay(writer)
            remote[0].fill_(7)
            offer.raise_to(1)
            after.raise_to(1)
        offer.revoke()
        assert until(lambda: after.mark == 1, LIMIT)
        assert until(lambda: not owner.raises.pending, LIMIT)
        assert offer.mark == 0


@pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "by layer"])
def test_rows_come_after_the_work_of_the_readers_stream(
    accelerator: torch.device, by_layer: bool
) -> None:
    """As for offers that are complete: the reader still uses its rows at the call."""
    remote = torch.full(SHAPE, POISON, dtype=torch.int16, device=accelerator)
    local = torch.full(SHAPE, 3, dtype=torch.int16, device=accelerator)
    readers = torch.Stream(accelerator)
    with sides() as made:
        owner = made.owner(Rows.shard_of(remote), staging=SMALL)
        reader = made.reader(Rows.shard_of(local))
        offer = owner.offer([3, 2], tokens=32, progress="layers")
        torch.accelerator.synchronize(accelerator)
        with on(readers):
            delay(readers)
            read = local.clone()
            pulled = reader.pull(offer.ticket, [1, 5], by_layer=by_layer, timeout=LIMIT)
        for layer in range(2):
            remote[layer].fill_(layer + 7)
            offer.raise_to(layer + 1)
        pulled.synchronize(LIMIT)
        torch.accelerator.synchronize(accelerator)
        assert (read.cpu() == 3).all()
        for layer in range(2):
            assert local[layer, :, [1, 5]].cpu().eq(layer + 7).all()
        assert local[:, :, [0, *range(2, 5), *range(6, 16)]].cpu().eq(3).all()


# --- two processes

OWNER = """
import torch
from portakv import KVView
from portakv.migrate import Channel, Owner, Shard
device = torch.device("cuda", number)
torch.cuda.set_device(device)
whole = torch.full(shape, poison, dtype=torch.int16, device=device)
owner = Owner(Channel(), Shard(KVView([*whole], layout)), model=model)
slow = torch.ones(8192, 8192, device=device)
answer = None
"""
OFFER = """
whole.fill_(poison)
torch.cuda.synchronize()
offer = owner.offer([3, 2], tokens=32, progress="layers")
answer = offer.ticket
"""
WRITE = """
for layer in range(2):
    for _ in range(20):  # a quarter of a second and more
        slow @ slow
    whole[layer].fill_(value + layer)
    offer.raise_to(layer + 1)
answer = offer.mark
"""


@pytest.mark.gpu
@pytest.mark.parametrize("number", [0, 1], ids=["same", "other"])
@pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "by layer"])
def test_rows_of_another_process_follow_its_stream(number: int, by_layer: bool) -> None:
    """Mapped: the reader's device reads what the owner's device has just written."""
    if torch.cuda.device_count() <= number:
        pytest.skip("it takes two CUDA devices")
    local = torch.full(SHAPE, -1, dtype=torch.int16, device="cuda:0")
    # Not `sides`, which looks for what is left: NCCL keeps descriptors of a process's first group.
    with Peer() as owner, closing(Channel(timeout=20.0)) as channel:
        owner.do(OWNER, number=number, shape=SHAPE, layout=LAYOUT, model=MODEL, poison=POISON)
        reader = Reader(channel, Shard(KVView([*local], LAYOUT)), model=MODEL)
        for value in (7, 17, 27, 37):
            local.fill_(-1)
            ticket = owner.do(OFFER)
            pulled = reader.pull(ticket, [1, 5], by_layer=by_layer, timeout=LIMIT)
            shown = owner.do(WRITE, value=value)
            assert shown < 2
            for layer, end in enumerate(pulled.layers):
                end.synchronize(LIMIT)
                assert (local[layer, :, [1, 5]] == value + layer).all()
            pulled.synchronize(LIMIT)
            assert pulled.statistics.strategy == "mapped"
            for layer in range(2):
                assert (local[layer, :, [1, 5]] == value + layer).all()
            assert (local[:, :, [0, 2, 3, 4, *range(6, 16)]] == -1).all()
        reader.close()
