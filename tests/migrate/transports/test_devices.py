# SPDX-License-Identifier: Apache-2.0
"""Buffers cross between two CUDA devices, whose transports are in one process: by nccl, by NIXL."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from typing import Any

import pytest
import torch
from support.migrate_pulls import LAYOUT, Sides
from support.transport_cases import Wire, slot_of, wire
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import PeerError, TransferCancelled, TransferError
from portakv.migrate.owner import Owner
from portakv.migrate.reader import Reader
from portakv.migrate.shards import Shard
from portakv.migrate.transports.base import MovingStage
from portakv.migrate.transports.distributed import Distributed
from portakv.migrate.transports.onesided import Nixl

DEVICES = ("cuda:0", "cuda:1")
NEVER = 300.0  # of the transport's own timeout; what ends before it does not end by it
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes two CUDA devices"),
]


def nccl(timeout: float = 60.0) -> Wire:
    return Wire(Distributed, timeout, DEVICES)


def delay(cycles: int) -> None:
    """Hold the current stream up for so many cycles of the device."""
    torch.cuda._sleep(cycles)


def close(both: Wire) -> None:
    both.reader.close()
    both.owner.close()


def empty(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device=DEVICES[1])


def test_slots_of_any_size_cross_by_nccl() -> None:
    both = nccl()
    for tag, nbytes in enumerate((1, 7, 1000, 1 << 20, 64 << 20)):
        both.cross(nbytes, tag)
    close(both)


@pytest.mark.parametrize("kind", ["nccl", "nixl"])
def test_a_slot_crosses_behind_what_the_streams_hold(kind: str) -> None:
    """Fault 24 and 25. The owner's stream still writes the buffer; the reader's still reads it."""
    if kind == "nixl" and not (why := Nixl.probe(torch.device(DEVICES[0]))).accepted:
        pytest.skip(str(why))
    both = nccl() if kind == "nccl" else Wire(Nixl, 60.0, DEVICES)
    both.cross(1000)  # so that the pair is made
    nbytes = 1 << 20
    with torch.cuda.device(0):
        buffer = torch.zeros(nbytes, dtype=torch.uint8, device=DEVICES[0])
        delay(500_000_000)
        buffer.fill_(7)
        giving = both.give(buffer, 1)
    with torch.cuda.device(1):
        into = empty(nbytes)
        delay(500_000_000)
        before = into.clone()
        taking = both.take(into, 1)
    taking.wait(LIMIT)
    giving.wait(LIMIT)
    assert bool((into == 7).all())
    assert not before.any()
    close(both)


def test_a_death_that_the_channel_notices_ends_a_take_by_nccl() -> None:
    """Fault 5. By an abort of this pair alone; the device works on, and a new pair is made."""
    both = nccl(NEVER)
    both.cross(1000)
    owner = next(iter(both.life.calls))
    del both.life.calls[owner]  # it says nothing, as one that was killed
    taking = both.take(empty(64 << 20), 1)
    time.sleep(0.5)  # its kernel waits for the peer
    both.life.end()
    with pytest.raises(PeerError, match="is gone"):
        taking.wait(LIMIT)
    until = time.monotonic() + 60
    while not taking.has(MovingStage.FREE):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert int(torch.ones(1000, device=DEVICES[1]).sum()) == 1000
    both.owner.forget(both.life)
    both.connect()
    both.cross(1000)
    close(both)


def test_a_timeout_aborts_and_does_not_end_the_process() -> None:
    both = nccl()
    both.cross(1000)
    both.reader.timeout = 1.0
    with pytest.raises(TransferError, match="did not cross"):
        both.take(empty(1000), 1).wait(LIMIT)
    close(both)


def pulled_between_devices(made: Sides, layers: int) -> tuple[Owner, Reader, torch.Tensor, Any]:
    """Return an owner and a reader on two devices, the owner's rows, and the reader's."""
    remote = torch.zeros(layers, 2, 8, 16, 4, 64, dtype=torch.int16, device=DEVICES[0])
    local = torch.zeros_like(remote, device=DEVICES[1])
    terms: Any = {"expose": "staging", "staging": 4 * remote[0].nbytes}
    owner = made.owner(Shard(KVView([*remote], LAYOUT)), **terms)
    reader = made.reader(Shard(KVView([*local], LAYOUT)), transport="distributed")
    return owner, reader, remote, local


def test_rows_cross_by_nccl_in_more_slices_than_there_are_buffers() -> None:
    """Fault 24 and 25. Streams order the owner's writes, all slices, and the reader's reads."""
    made = Sides()
    owner, reader, remote, local = pulled_between_devices(made, 19)
    for turn in range(1, 9):
        with torch.cuda.device(1):
            delay(20_000_000)
            before = local.clone()
            expected = local.cpu()
        with torch.cuda.device(0):
            delay(20_000_000)
            remote.random_(0, 1 << 14)
            offer = owner.offer(range(8), tokens=128)
        with torch.cuda.device(1):
            pulled = reader.pull(offer.ticket, [*range(7, -1, -1)], verify=bool(turn % 2))
            pulled.synchronize(LIMIT)
        assert pulled.statistics.slices == 19
        assert torch.equal(before.cpu(), expected)
        assert torch.equal(remote.cpu(), local.cpu().flip(2))
    for one in reversed(made.made):
        one.close()


def test_pulls_by_nccl_that_are_cancelled_leave_one_group_in_step() -> None:
    """Fault 30. Also if the owner's stream is busy for longer than it has to stop."""
    made = Sides()
    owner, reader, remote, local = pulled_between_devices(made, 40)
    seed = random.Random(5)
    cancelled = 0
    for turn in range(24):
        with torch.cuda.device(0):
            if turn % 8 == 7:
                delay(1_500_000_000)
            remote.fill_(turn)
            offers = [owner.offer(range(8), tokens=128) for _ in range(2)]
        with torch.cuda.device(1):
            pulls = [reader.pull(offer.ticket, range(8)) for offer in offers]
            time.sleep(seed.random() * 0.004)
            cancelled += pulls[0].cancel()
            for pulled in pulls:
                with suppress(TransferCancelled, PeerError):  # a lane may have been closed
                    pulled.synchronize(LIMIT)
        with torch.cuda.device(0):
            remote.fill_(1000 + turn)
            offer = owner.offer(range(8), tokens=128)
        with torch.cuda.device(1):
            reader.pull(offer.ticket, range(8)).synchronize(LIMIT)
        assert bool((local == 1000 + turn).all())
        owner.revoke_all()
    assert cancelled
    for one in reversed(made.made):
        one.close()


def test_a_pull_by_nccl_that_is_cancelled_long_before_its_bytes_leaves_others_their_lane() -> None:
    """Its copies wait on a stream for bytes that come after two seconds."""
    made = Sides()
    owner, reader, remote, local = pulled_between_devices(made, 9)
    with torch.cuda.device(1):
        reader.pull(owner.offer(range(8), tokens=128).ticket, range(8)).synchronize(LIMIT)
    with torch.cuda.device(0):
        remote.fill_(7)
        delay(4_000_000_000)
        offers = [owner.offer(range(8), tokens=128) for _ in range(2)]
    with torch.cuda.device(1):
        pulls = [reader.pull(offer.ticket, range(8)) for offer in offers]
        time.sleep(0.3)
        assert pulls[0].cancel()
        pulls[1].synchronize(LIMIT)
        with pytest.raises(TransferCancelled):
            pulls[0].synchronize(LIMIT)
    assert bool((local == 7).all())
    for one in reversed(made.made):
        one.close()


def test_a_lane_that_its_owner_closes_alone_ends_a_take_by_nccl() -> None:
    """NCCL does not report it to the reader, which asks; a new pair is made."""
    both = nccl(NEVER)
    both.cross(1000)
    taking = both.take(empty(64 << 20), 1)
    time.sleep(0.2)  # its kernel waits for the peer
    lane = both.owner.lane(both.life, both.there)
    lane.close(PeerError("The owner could not send a buffer; it did not cross."))
    with pytest.raises(PeerError, match="has closed the group"):
        taking.wait(LIMIT)
    both.cross(1000)
    close(both)


def test_slots_cross_by_nixl() -> None:
    if not (why := Nixl.probe(torch.device(DEVICES[0]))).accepted:
        pytest.skip(str(why))
    with wire(Nixl, 60.0, on=DEVICES) as both:
        for tag, nbytes in enumerate((1, 1000, 1 << 20, 64 << 20)):
            both.cross(nbytes, tag)
        both.give(slot_of(100).to(DEVICES[0]), 9)
        with pytest.raises(PeerError, match="100 B were given"):
            both.take(empty(1000), 9).wait(LIMIT)
