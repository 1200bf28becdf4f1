# SPDX-License-Identifier: Apache-2.0
"""Buffers cross between two CUDA devices, whose transports are in one process: by nccl, by NIXL."""

from __future__ import annotations

import time

import pytest
import torch
from support.transport_cases import Wire, slot_of, wire

from portakv.errors import PeerError, TransferError
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
        torch.cuda._sleep(500_000_000)
        buffer.fill_(7)
        giving = both.give(buffer, 1)
    with torch.cuda.device(1):
        into = empty(nbytes)
        torch.cuda._sleep(500_000_000)
        before = into.clone()
        taking = both.take(into, 1)
    taking.wait(60)
    giving.wait(60)
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
    with pytest.raises(PeerError, match="peer is gone"):
        taking.wait(60)
    until = time.monotonic() + 60
    while not taking.free.is_set():
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
        both.take(empty(1000), 1).wait(60)
    close(both)


def test_slots_cross_by_nixl() -> None:
    if not (why := Nixl.probe(torch.device(DEVICES[0]))).accepted:
        pytest.skip(str(why))
    with wire(Nixl, 60.0, on=DEVICES) as both:
        for tag, nbytes in enumerate((1, 1000, 1 << 20, 64 << 20)):
            both.cross(nbytes, tag)
        both.give(slot_of(100).to(DEVICES[0]), 9)
        with pytest.raises(PeerError, match="100 B were given"):
            both.take(empty(1000), 9).wait(60)
