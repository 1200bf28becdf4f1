# SPDX-License-Identifier: Apache-2.0
"""Buffers cross by torch.distributed; the death of a peer ends them, and a new pair is made."""

from __future__ import annotations

import gc
import os
import queue
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from support.migrate_pulls import LAYOUT, sides
from support.simdev_cases import DEVICE, OTHER, current
from support.transport_cases import End, Wire, slot_of, wire
from support.waits import LIMIT

from portakv import Index, KVView
from portakv.backends.base import Decision
from portakv.errors import OfferGone, PeerError, TransferCancelled, TransferError, Unsupported
from portakv.migrate.channel import Channel
from portakv.migrate.messages import Answer, Bye
from portakv.migrate.shards import Shard
from portakv.migrate.transports import TRANSPORTS
from portakv.migrate.transports.base import MovingStage
from portakv.migrate.transports.distributed import DevicePair, Distributed
from portakv.runtime.devices import inside
from portakv_conformance import simdev

NEVER = 300.0  # of the transport's own timeout; what ends before it does not end by it
OWNER = Path(__file__).parent / "owner_process.py"


def empty(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device="cpu")


def test_slots_of_any_size_cross() -> None:
    with wire(Distributed) as both:
        for tag, nbytes in enumerate((0, 1, 7, 1000, 1 << 20)):
            both.cross(nbytes, tag)


def test_slots_cross_in_the_order_in_which_they_are_given_two_at_a_time() -> None:
    """And if they are taken before."""
    with wire(Distributed) as both:
        buffers = [slot_of(10_000, seed) for seed in range(8)]
        into = [empty(10_000) for _ in buffers]
        taken = [both.take(each, tag % 2) for tag, each in enumerate(into[:4])]
        sent = [both.give(buffer, tag % 2) for tag, buffer in enumerate(buffers)]
        taken += [both.take(each, tag % 2) for tag, each in enumerate(into[4:])]
        for moving in (*taken, *sent):
            moving.wait(LIMIT)
        assert all(map(torch.equal, buffers, into))


def test_nothing_of_the_callers_settings_matters() -> None:
    with wire(Distributed) as both, torch.inference_mode(), torch.device("meta"):
        both.cross(1000)


@pytest.mark.parametrize("side", ["take", "give"])
def test_a_death_that_the_channel_notices_ends_what_is_under_way(side: str) -> None:
    """Fault 5. Not the transport's timeout ends it; the buffer is free, and a new pair is made."""
    with wire(Distributed, NEVER) as both:
        both.cross(100)
        buffers = [slot_of(1 << 20), slot_of(1 << 20)]
        only = list(both.life.calls.items())[side == "take"]  # the other side hears nothing
        both.life.calls = dict([only])
        moving = [getattr(both, side)(buffer, tag) for tag, buffer in enumerate(buffers)]
        time.sleep(0.1)  # so that gloo has the first one
        both.life.end()
        for each in moving:
            with pytest.raises(PeerError, match="is gone"):
                each.wait(LIMIT)
            assert each.has(MovingStage.FREE)
        both.life.end()
        both.owner.forget(both.life)
        both.reader.forget(End.address)
        both.connect()
        both.cross(100)


@pytest.mark.full
def test_an_owner_killed_in_mid_chunk_is_told_by_the_channel() -> None:
    """Fault 5. A real process, killed while a buffer of it crosses; gloo alone would wait on, and
    the thread that it blocks does."""
    channel = Channel()
    owner = subprocess.Popen([sys.executable, str(OWNER)], stdout=subprocess.PIPE, text=True)
    transport = Distributed(torch.device("cpu"), NEVER)
    try:
        assert owner.stdout is not None
        address, nbytes = owner.stdout.readline().split()
        into = empty(int(nbytes))
        channel.ask(address, Bye(), Answer)
        taking = transport.lane(address, channel).move(into, 0)
        while not (into[0] or taking.has(MovingStage.OVER)):
            time.sleep(1e-4)
        owner.kill()
        with pytest.raises(PeerError):
            taking.wait(LIMIT)
        assert taking.has(MovingStage.FREE)
        landed = into.clone()
        assert landed[0] == 7  # it was in the middle of it
        assert not landed.all()
        assert transport.lanes == {}
    finally:
        owner.kill()
        owner.wait()
        transport.close()
        channel.close()


@pytest.mark.parametrize(("sent", "requested"), [(5000, 100), (100, 5000), (1, 0)])
def test_a_slot_of_another_length_is_an_error_on_either_side(sent: int, requested: int) -> None:
    """Fault 29. gloo takes too few bytes for all, and ends the process if there are too many."""
    with wire(Distributed) as both:
        giving = both.give(slot_of(sent))
        into = empty(requested)
        with pytest.raises(PeerError, match=f"expected {requested} B, got {sent}"):
            both.take(into).wait(LIMIT)
        with pytest.raises(PeerError):
            giving.wait(LIMIT)
        assert not into.any()
        both.cross(1000)


def test_the_timeout_is_the_last_resort() -> None:
    """Fault 8. A peer that gives nothing, and lives."""
    with wire(Distributed) as both:
        both.cross(100)
        both.reader.timeout = 0.3
        taking = both.take(empty(100))
        with pytest.raises(TransferError, match="did not cross"):
            taking.wait(LIMIT)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_refuses_and_leaves_its_parents_pair_alone() -> None:
    """Fault 31. The child closes what it inherited; the parent goes on."""
    with wire(Distributed) as both:
        both.cross(100)
        child = os.fork()
        code = 1
        if not child:
            try:
                both.give(slot_of(100))
            except Unsupported:
                both.owner.close()
                both.reader.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        both.cross(100)


def test_a_channel_that_watches_nobody_leaves_no_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    with wire(Distributed) as both:

        def closed(*_: object) -> None:
            raise PeerError("The channel was closed.")

        monkeypatch.setattr(both.here, "watch", closed)
        with pytest.raises(PeerError, match="channel was closed"):
            both.take(empty(100))
        assert both.reader.lanes == {}


class Group:
    """Do what nccl does for two simulated devices: all in stream order, whatever the tags."""

    delays: ClassVar = list[int]()  # milliseconds before the next bytes
    errors: ClassVar = list[Exception]()  # of the next calls

    def __init__(self, device: torch.device, wire: queue.Queue[Any]) -> None:
        self.device = device
        self.wire = wire
        self.aborted = False

    def send(self, buffers: list[torch.Tensor], _: int, tag: int) -> Any:
        if self.errors:
            raise self.errors.pop()
        # The host does not wait for the peer: bytes leave the buffer when the stream comes here.
        simdev.delay(current(self.device), self.delays.pop() if self.delays else 20)
        left = buffers[0].clone()
        LEFT.append(left)  # a stream of the other device reads it
        gone = current(self.device).record_event()
        self.wire.put((left, gone))
        return self.ordered(gone)

    def recv(self, buffers: list[torch.Tensor], _: int, tag: int) -> Any:
        sent, ready = self.wire.get(timeout=LIMIT)
        ready.wait(current(self.device))
        simdev.delay(current(self.device), 20)
        buffers[0].copy_(sent, non_blocking=True)
        return self.ordered(current(self.device).record_event())

    def ordered(self, event: torch.Event) -> Any:
        return SimpleNamespace(wait=lambda: event.wait(current(self.device)))

    def abort(self) -> None:
        self.aborted = True
        time.sleep(1)  # until what was on the stream has ended, landed or not


LEFT = list[torch.Tensor]()
WIRES = dict[str, Any]()  # by the name of the pair


class SimulatedPair(DevicePair):
    def _join(self) -> Any:
        self.meet() if self.address else self.named.wait(LIMIT)
        return Group(self.transport.device, WIRES.setdefault(self.name, queue.Queue()))


class Simulated(Distributed):
    name = "simulated"
    on_device = SimulatedPair

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        return Decision(cls.name, device.type != "cpu", "it is simulated")


@contextmanager
def collected() -> Iterator[None]:
    """Collect garbage before, and none inside: pinned memory that an earlier test left would wait
    for all streams of all devices there."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.simdev
def test_rows_cross_between_devices_in_more_slices_than_there_are_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault 24, 25 and 27. The host waits for no copy of the owner's, and streams order all. The
    reader's device waits for as many bytes as were requested, also if they cannot be brought."""
    timed = list[float]()

    class Queue(queue.SimpleQueue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            timed.extend([] if timeout is None else [timeout])
            return super().get(block, timeout)

    monkeypatch.setattr("portakv.migrate.transports.base.SimpleQueue", Queue)
    monkeypatch.setitem(TRANSPORTS.targets, Simulated.name, Simulated)
    remote = torch.zeros(9, 2, 8, 16, 4, 8, dtype=torch.int16, device=DEVICE)
    local = torch.zeros_like(remote, device=OTHER)
    views = [KVView([*x], LAYOUT) for x in (remote, local)]
    busy = torch.Stream(OTHER)
    streams = inside(torch.Stream(DEVICE)), inside(torch.Stream(OTHER))
    with sides() as made, collected(), streams[0], streams[1]:
        owner = made.owner(Shard(views[0]), expose="staging", staging=4 * remote[0].nbytes)
        reader = made.reader(Shard(views[1]), transport=Simulated.name)
        for turn in range(1, 6):
            before = local.cpu()
            if turn == 2:  # another stream, which has nothing to do with it
                simdev.delay(busy, 60_000)
            simdev.delay(current(OTHER), 50)
            read = local.clone()
            simdev.delay(current(DEVICE), 50)
            remote.copy_(torch.arange(remote.numel()).view(remote.shape).to(DEVICE) * turn)
            offer = owner.offer(range(8), tokens=128)
            fails = turn % 2
            if fails:  # ids were looked at when they were offered
                offer.ids = [(offer.ids[0][0] + 1000, 16)]
            pulled = reader.pull(offer.ticket, [*range(7, -1, -1)])
            with pytest.raises(OfferGone, match="log has the reason") if fails else nullcontext():
                pulled.synchronize(LIMIT)
            assert turn != 2 or not busy.query()
            assert torch.equal(read.cpu(), before)
            assert pulled.statistics.slices == 9
            assert fails or torch.equal(remote.cpu(), local.cpu().flip(2))
        until = time.monotonic() + 5
        while owner.statistics()["taken"] != 2 and time.monotonic() < until:
            time.sleep(0.01)
        # Pulls that fail leave their offers.
        assert owner.statistics()["taken"] == 2
    assert timed == []  # such a wait may never end (Python 3.10 - 3.12)


@pytest.mark.simdev
def test_pulls_between_devices_that_are_cancelled_leave_one_group_in_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault 30. No host waits for a slice, and the owner stops after any of them."""
    monkeypatch.setitem(TRANSPORTS.targets, Simulated.name, Simulated)
    remote = torch.zeros(9, 2, 8, 16, 4, 8, dtype=torch.int16, device=DEVICE)
    local = torch.zeros(9, 2, 16, 16, 4, 8, dtype=torch.int16, device=OTHER)
    views = [KVView([*x], LAYOUT) for x in (remote, local)]
    monkeypatch.setattr("portakv.migrate.staged_reader.STOPPING", 60.0)  # also on a busy machine
    seed = random.Random(4)
    before = len(WIRES)
    cancelled = 0
    for rows in (remote, local):
        rows.cpu()  # the streams below are not ordered after the zeros
    with sides() as made, inside(torch.Stream(DEVICE)), inside(torch.Stream(OTHER)):
        owner = made.owner(Shard(views[0]), expose="staging", staging=4 * remote[0].nbytes)
        reader = made.reader(Shard(views[1]), transport=Simulated.name)
        for turn in range(1, 9):
            remote.copy_(torch.arange(remote.numel()).view(remote.shape).to(DEVICE) * turn)
            # Each has separate blocks: a pull that was cancelled may still write to its own.
            pulls = [
                reader.pull(owner.offer(range(8), tokens=128).ticket, [*blocks])
                for blocks in (range(15, 7, -1), range(7, -1, -1))
            ]
            time.sleep(seed.random() * 0.1)
            cancelled += pulls[0].cancel()
            pulls[1].synchronize(LIMIT)
            assert torch.equal(remote.cpu(), local[:, :, :8].cpu().flip(2))
            with suppress(TransferCancelled):
                pulls[0].synchronize(LIMIT)
            owner.revoke_all()
    assert cancelled
    assert len(WIRES) == before + 1


@pytest.mark.simdev
@pytest.mark.parametrize("size", [16, 32])
def test_devices_pack_and_unpack_slots(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A block that does not fit is known only when the reader's device has ended its copy."""
    monkeypatch.setitem(TRANSPORTS.targets, Simulated.name, Simulated)
    values = torch.arange(2 * 2 * 8 * 16 * 4 * 32, dtype=torch.int64).view(2, 2, 8, 16, 4, 32)
    remote = (1 + values % 100 / 100).bfloat16()
    noise = values[1, 0, 3, :, 2].mul(12345).to(torch.int16)  # all exponents in turn
    remote[1, 0, 3, :, 2] = noise.view(torch.bfloat16)
    there = remote.to(DEVICE)
    local = torch.zeros(2, 2, 8, size, 4, 32, dtype=torch.bfloat16, device=OTHER)
    with sides() as made, inside(torch.Stream(DEVICE)), inside(torch.Stream(OTHER)):
        owner = made.owner(Shard(KVView([*there], LAYOUT)), expose="staging", staging=1 << 20)
        reader = made.reader(Shard(KVView([*local], LAYOUT)), transport=Simulated.name)
        blocks = [5, 3, 6, 0]
        into = [2, 7, 1, 4][: 4 * 16 // size]
        pulled = reader.pull(owner.offer(blocks, tokens=64).ticket, into, encoding="pack")
        pulled.synchronize(LIMIT)
        rows = local.cpu()[:, :, into].flatten(2, 3).view(torch.int16)
    assert torch.equal(rows, remote[:, :, blocks].flatten(2, 3).view(torch.int16))
    assert pulled.statistics.strategy == Simulated.name
    assert pulled.statistics.packed
    assert pulled.statistics.blocks_raw == 1


@pytest.mark.simdev
def test_a_death_ends_the_slots_that_cross_on_a_device_and_aborts_their_group() -> None:
    """Fault 5. Two are on their way; neither counts, and no thread is left."""
    both = Wire(Simulated, NEVER, (str(DEVICE), str(OTHER)))
    for tag, nbytes in enumerate((1, 1000, 1 << 20)):
        both.cross(nbytes, tag)
    lanes = both.reader.lane(End.address, both.here), both.owner.lane(both.life, both.there)
    group = lanes[0].group
    simdev.delay(current(DEVICE), 500)
    sent = [both.give(slot_of(100).to(DEVICE, non_blocking=True), tag) for tag in range(3)]
    taking = [both.take(torch.zeros(100, dtype=torch.uint8, device=OTHER)) for _ in sent]
    time.sleep(0.1)  # so that they are on the stream
    both.life.end()
    for each in taking:
        with pytest.raises(PeerError, match="is gone"):
            each.wait(LIMIT)
        assert each.wait_for(MovingStage.FREE, LIMIT)
    assert group.aborted
    both.reader.close(20)
    both.owner.close(20)
    assert not any(x.is_alive() for lane in lanes for x in lane.threads)


@pytest.mark.simdev
def test_a_slot_on_a_device_that_takes_too_long_ends_the_one_behind_it() -> None:
    """Fault 8. Its group is aborted: what ends on the stream then has not landed."""
    both = Wire(Simulated, NEVER, (str(DEVICE), str(OTHER)))
    both.cross(100)
    simdev.delay(current(DEVICE), 2500)
    for tag in range(2):
        both.give(slot_of(100).to(DEVICE, non_blocking=True), tag)
    taking = list[Any]()
    for both.reader.timeout in (0.2, NEVER):
        taking.append(both.take(torch.zeros(100, dtype=torch.uint8, device=OTHER)))
    for each in taking:
        with pytest.raises(TransferError, match=r"did not cross in 0\.2 s"):
            each.wait(LIMIT)
    for transport in (both.reader, both.owner):
        transport.close(20)


@pytest.mark.simdev
def test_a_pull_that_is_cancelled_long_before_its_bytes_leaves_others_their_lane(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its copies on the device wait for bytes, and another pull needs the lane. It was closed after
    `STOPPING`, so that the other pull failed."""
    monkeypatch.setitem(TRANSPORTS.targets, Simulated.name, Simulated)
    remote = torch.zeros(9, 2, 8, 16, 4, 8, dtype=torch.int16, device=DEVICE)
    local = torch.zeros_like(remote, device=OTHER)
    views = [KVView([*x], LAYOUT) for x in (remote, local)]
    before = len(WIRES)
    with sides() as made, inside(torch.Stream(DEVICE)), inside(torch.Stream(OTHER)):
        owner = made.owner(Shard(views[0]), expose="staging", staging=4 * remote[0].nbytes)
        reader = made.reader(Shard(views[1]), transport=Simulated.name)
        # Ids on the device: the host would wait for the bytes to bring or to check them.
        into: Any = Index(torch.arange(7, -1, -1, device=OTHER), 16, trusted=True)
        offer = owner.offer(range(8), tokens=128)
        reader.pull(offer.ticket, into).synchronize(LIMIT)  # so that the group is made
        remote.copy_(torch.arange(remote.numel()).view(remote.shape).to(DEVICE))
        Group.delays.append(3000)
        offers = [owner.offer(range(8), tokens=128) for _ in range(2)]
        pulls = [reader.pull(offer.ticket, into) for offer in offers]
        time.sleep(0.3)  # its copies are on the device's stream by then
        assert pulls[0].cancel()
        pulls[1].synchronize(LIMIT)
        assert torch.equal(remote.cpu(), local.cpu().flip(2))
        with pytest.raises(TransferCancelled):
            pulls[0].synchronize(LIMIT)
    assert len(WIRES) == before + 1


@pytest.mark.simdev
@pytest.mark.parametrize("closed", [True, False])
def test_a_lane_that_its_owner_closes_alone_ends_the_readers_slots(closed: bool) -> None:
    """The group of a device does not report it; the reader waited for the transport's timeout."""
    both = Wire(Simulated, NEVER, (str(DEVICE), str(OTHER)))
    both.cross(100)
    simdev.delay(current(DEVICE), 3000)
    both.give(slot_of(100).to(DEVICE, non_blocking=True), 1)
    taking = both.take(torch.zeros(100, dtype=torch.uint8, device=OTHER), 1)
    assert taking.wait_for(MovingStage.ISSUED, LIMIT)
    if closed:
        lane = both.owner.lane(both.life, both.there)
        lane.close(PeerError("The owner could not send a buffer; it did not cross."))
    with pytest.raises(PeerError, match="has closed the group") if closed else nullcontext():
        taking.wait(LIMIT)
    for transport in (both.reader, both.owner):
        transport.close(20)


@pytest.mark.simdev
def test_slots_after_the_first_are_issued_by_the_caller_and_a_failure_ends_the_lane() -> None:
    """No thread has to wake first. Slots that were issued before the failure do not count."""
    both = Wire(Simulated, NEVER, (str(DEVICE), str(OTHER)))
    both.cross(100)
    simdev.delay(current(DEVICE), 300)
    giving = [both.give(slot_of(100).to(DEVICE, non_blocking=True), 1)]
    assert giving[0].has(MovingStage.ISSUED)
    lane = both.owner.lane(both.life, both.there)
    Group.errors.append(RuntimeError("no memory"))
    giving.append(both.give(slot_of(100).to(DEVICE, non_blocking=True), 2))
    for each in giving:
        with pytest.raises(PeerError, match="no memory"):
            each.wait(LIMIT)
    assert lane.gone is not None
    assert both.owner.lane(both.life, both.there) is not lane
    for transport in (both.reader, both.owner):
        transport.close(20)
