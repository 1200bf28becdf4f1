# SPDX-License-Identifier: Apache-2.0
"""Buffers are read by NIXL and Mooncake, if they are installed; and what both have, by a library of
the test's own that can be made to fail."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import pytest
import torch
from support.transport_cases import End, slot_of, wire
from support.waits import LIMIT

from portakv.backends.base import Decision
from portakv.errors import PeerError, TransferError, TransferTimeout
from portakv.migrate.transports import onesided
from portakv.migrate.transports.base import MovingStage
from portakv.migrate.transports.onesided import Mooncake, Nixl, OneSided

CPU = torch.device("cpu")
NEVER = 300.0  # of the transport's own timeout; what ends before it does not end by it


class Memory(OneSided):
    """A library that reads by address, in this process. ``fails``: it says so, after so many bytes;
    ``stuck``: it reads on and on until that is set."""

    name = "memory"
    fails: int | None = None
    stuck: threading.Event | None = None
    broken = False
    reads = threading.Event()

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        return Decision(cls.name, True, "it is here")

    def begin(self, address: str) -> Any:
        if self.broken:
            raise RuntimeError("no such port")
        self.entered = list[tuple[int, int]]()
        self.log = list[tuple[int, int]]()
        return self

    def enter(self, address: int, nbytes: int, device: int) -> Any:
        entry = address, nbytes
        self.entered.append(entry)
        self.log.append(entry)
        return entry

    def deregister(self, handle: Any) -> None:
        self.entered.remove(handle)

    def reach(self, entry: Any) -> bytes:
        return b"here"

    def read(self, lane: Any, moving: Any, there: Any) -> None:
        nbytes = there.nbytes if self.fails is None else self.fails
        if self.stuck is not None:
            self.reads.set()
            self.stuck.wait()
        ctypes.memmove(moving.buffer.data_ptr(), there.address, nbytes)
        if self.fails is not None:
            raise RuntimeError("-1")


def installed(kind: type[OneSided]) -> Any:
    decision = kind.probe(CPU)
    why = pytest.mark.skipif(not decision.accepted, reason=str(decision))
    return pytest.param(kind, marks=why, id=kind.name)


EACH = pytest.mark.parametrize("kind", [Memory, installed(Nixl), installed(Mooncake)])


def empty(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device="cpu")


@EACH
def test_slots_are_read(kind: type[OneSided]) -> None:
    with wire(kind) as both:
        for tag, nbytes in enumerate((1, 7, 1000, 1 << 20)):
            both.cross(nbytes, tag)


@EACH
def test_two_slots_of_one_allocation_are_read_again_and_again(kind: type[OneSided]) -> None:
    staging = slot_of(20_000)
    into = empty(20_000)
    with wire(kind) as both:
        for turn in range(6):
            staging.add_(1)
            buffers = staging.view(2, -1), into.view(2, -1)
            sent = [both.give(buffers[0][tag], 2 * turn + tag) for tag in range(2)]
            taken = [both.take(buffers[1][tag], 2 * turn + tag) for tag in range(2)]
            for moving in (*taken, *sent):
                moving.wait(LIMIT)
            assert torch.equal(into, staging)


@EACH
def test_a_slot_of_another_length_is_not_read(kind: type[OneSided]) -> None:
    """Fault 29. Not one byte of it."""
    with wire(kind) as both:
        for tag, (sent, requested) in enumerate(((5000, 100), (100, 5000))):
            giving = both.give(slot_of(sent), tag)
            into = empty(requested)
            with pytest.raises(PeerError, match=f"expected {requested} B, got {sent}"):
                both.take(into, tag).wait(LIMIT)
            giving.wait(LIMIT)  # the reader has reported that it does not want it
            assert not into.any()
        both.cross(1000)


@EACH
def test_a_death_that_the_channel_notices_ends_what_is_under_way(kind: type[OneSided]) -> None:
    """Fault 5. Also a take whose buffer was not given, and a give that no side took."""
    with wire(kind, NEVER) as both:
        both.cross(100)
        moving = both.give(slot_of(100), 1), both.take(empty(100), 2)
        both.life.end()
        for each in moving:
            with pytest.raises(PeerError, match="is gone"):
                each.wait(LIMIT)
            assert each.has(MovingStage.FREE)
        both.connect()
        both.cross(100)


def test_an_error_after_a_part_counts_for_all_of_it() -> None:
    """Fault 28. As Mooncake's -1 and NIXL's ERR: some of it was moved; other buffers go on."""
    with wire(Memory) as both:
        both.reader.fails = 500
        giving = both.give(slot_of(1000))
        into = empty(1000)
        taking = both.take(into)
        why = r"1000 B did not cross by memory from the owner at \S+: -1\. Pull again"
        with pytest.raises(PeerError, match=why):
            taking.wait(LIMIT)
        assert into[:500].any()
        giving.wait(LIMIT)  # the owner's buffer is free
        both.reader.fails = None
        both.cross(1000, 1)


@pytest.mark.parametrize("timeout", [NEVER, 0.2])
def test_a_slot_that_a_library_cannot_let_go_of_is_not_free_until_it_does(timeout: float) -> None:
    """Fault 8. Mooncake's cannot. The reader learns it immediately, or after its time; the buffer
    is used again only later."""
    with wire(Memory, timeout) as both:
        both.reader.stuck = threading.Event()
        both.reader.reads = threading.Event()
        both.give(slot_of(1000))
        taking = both.take(empty(1000))
        why = "did not cross in 0.2 s"
        assert both.reader.reads.wait(LIMIT)  # the library has it
        if timeout == NEVER:
            both.life.end()
            why = "is gone"
        with pytest.raises(TransferError, match=why):
            taking.wait(LIMIT)
        assert not taking.has(MovingStage.FREE)
        both.reader.stuck.set()
        assert taking.wait_for(MovingStage.FREE, LIMIT)


def test_a_library_that_does_not_start_at_the_owner_is_told_to_the_reader() -> None:
    """Not by silence, which would cost the transport's whole time; and it may be started later."""
    with wire(Memory, NEVER) as both:
        both.owner.broken = True
        both.give(slot_of(100))
        with pytest.raises(PeerError, match="no such port"):
            both.take(empty(100)).wait(LIMIT)
        both.owner.broken = False
        both.cross(100, 1)


def test_what_is_not_given_or_not_taken_ends_by_the_timeout() -> None:
    with wire(Memory, 0.2) as both:
        for moving in (both.take(empty(100), 1), both.give(slot_of(100), 2)):
            with pytest.raises(TransferTimeout, match=r"100 B did not cross in 0.2 s"):
                moving.wait(LIMIT)


@pytest.mark.parametrize(
    ("address", "host"),
    [("ipc:///tmp/x", "127.0.0.1"), ("tcp://127.0.0.1:70", "127.0.0.1"), ("tcp://[::1]:70", "::1")],
)
def test_a_host_is_told_as_its_channels_peers_reach_it(address: str, host: str) -> None:
    assert onesided.own_host(address) == host


@pytest.mark.parametrize("before", [True, False])
def test_a_lane_that_its_reader_closes_frees_the_owners_slots(before: bool) -> None:
    """Slots that are offered before or afterwards, of tags that the reader has passed to its lane
    or not. Without a message about them the owner waited for its whole timeout."""
    with wire(Memory, NEVER) as both:
        both.cross(100)
        taking = [both.take(empty(100), tag) for tag in (1, 2, 3)]  # the third is queued
        lane = both.reader.lane(End.address, both.here)
        given = [both.give(slot_of(100), 4)] if before else []
        time.sleep(0.1)  # so that two wait for their slots
        lane.close(PeerError("The owner did not stop."))
        lane.skip([4])
        for each in taking:
            with pytest.raises(PeerError, match="did not stop"):
                each.wait(LIMIT)
        if not before:
            given = [both.give(slot_of(100), tag) for tag in (1, 2, 3, 4)]
        assert all(each.wait(LIMIT) for each in given)
        both.cross(100, 5)
