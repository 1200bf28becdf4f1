# SPDX-License-Identifier: Apache-2.0
"""Order on accelerators: what a copy waits for, what waits for it, what may be freed. A slow job
stands before the producer or before the copy, so that a missing wait shows."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from portakv import Transfer
from portakv_conformance.cases import Bench, Case, Facility, Shape, arguments_of, plan_of
from portakv_conformance.draw.by_hand import on_host

pytestmark = [pytest.mark.area("ordering"), pytest.mark.needs("accelerator")]

SHAPE = Shape(layers=3, widths=(64, 64))
SLOW = 60  # milliseconds
STREAMS = ("none", "side", "current")
PLACES = ("host", "device")


class Late:
    """A case whose source holds other bytes until `produce`; ``expected`` is what must come out."""

    def __init__(self, bench: Bench, case: Case) -> None:
        self.bench = bench
        self.case = case
        self.expected = case.expected()
        self.final = [guard.payload().clone() for guard in case.src.guards]
        self.arguments = arguments_of(case)
        self.copy().synchronize()  # compiles outside of the race
        self.expected.before.restore(guard.whole for guard in case.dst.guards)
        for guard in case.src.guards:
            guard.payload().fill_(0xEE)
        bench.facility.synchronize()

    def produce(self) -> None:
        """Write the source, on the current stream."""
        for guard, final in zip(self.case.src.guards, self.final, strict=True):
            guard.payload().copy_(final, non_blocking=True)

    def copy(self, stream: torch.Stream | None = None) -> Transfer:
        """Start the copy as a user does."""
        return self.bench.subject.copy(*self.arguments, count=self.case.count, stream=stream)

    def check(self, *, source: bool = True) -> None:
        """Judge the bytes; all work has ended."""
        judge = self.bench.judge
        failing = judge.failing
        judge.failing = self.case
        judge.check(self.expected, self.case, source=source)
        judge.failing = failing

    def check_after_its_producer(self, where: str) -> None:
        """Judge a copy after a slow producer, on the current stream or on another."""
        facility = self.bench.facility
        side = facility.stream()
        with facility.on(side if where == "current" else facility.current()):
            facility.delay(SLOW)
            self.produce()
            transfer = self.copy(side if where == "side" else None)
        transfer.synchronize()
        self.check()

    def write_ids_late(self, facility: Facility) -> None:
        """Let slow work on the current stream of a device write the ids, which lie there."""
        side = self.case.src if self.case.src.ids is not None else self.case.dst
        assert side.ids is not None
        fresh = side.ids.clone()
        side.ids.copy_(torch.arange(len(fresh)).flip(0))
        facility.synchronize()
        self.arguments = arguments_of(self.case)
        facility.delay(SLOW)
        side.ids.copy_(fresh, non_blocking=True)


def made(bench: Bench, direction: str, ids: str, *, now: bool = False) -> Late:
    """Return a case whose ids lie on the host or on the device.

    Its source is in place if requested.
    """
    slots = bench.on_device(SHAPE.slots, 9, 1)
    late = Late(bench, bench.move(direction, SHAPE, slots if ids == "device" else slots.cpu()))
    if now:
        late.produce()
        bench.facility.synchronize()
    return late


@pytest.mark.parametrize("ids", PLACES)
@pytest.mark.parametrize("where", STREAMS)
def test_a_copy_waits_for_its_producer(bench: Bench, direction: str, where: str, ids: str) -> None:
    """A copy is ordered after all earlier work of the caller's current stream, on any stream."""
    made(bench, direction, ids).check_after_its_producer(where)


@pytest.mark.parametrize("where", STREAMS)
def test_later_work_waits_for_the_copy(bench: Bench, direction: str, where: str) -> None:
    """After ``Transfer.wait`` the current stream may read the destination and reuse the source."""
    late = made(bench, direction, "host", now=True)
    side = bench.facility.stream()
    with bench.facility.on(side if where == "current" else bench.facility.current()):
        bench.facility.delay(SLOW, side if where == "side" else None)
        transfer = late.copy(side if where == "side" else None)
        transfer.wait()
        landed = [guard.whole.clone() for guard in late.case.dst.guards]
        for guard in late.case.src.guards:
            guard.payload().fill_(0x11)
        bench.facility.current().synchronize()
    bench.facility.synchronize()
    for guard, copy in zip(late.case.dst.guards, landed, strict=True):
        assert torch.equal(guard.whole.cpu(), copy.cpu()), "Bytes were still arriving after wait()."
    late.check(source=False)


@pytest.mark.parametrize("where", ["none", "side"])
def test_ids_that_are_produced_late(bench: Bench, direction: str, where: str) -> None:
    """Ids on the device are read after the work that writes them."""
    late = made(bench, direction, "device", now=True)
    late.write_ids_late(bench.facility)
    late.copy(bench.facility.stream() if where == "side" else None).synchronize()
    late.check()


def test_done_means_landed(bench: Bench, direction: str) -> None:
    """A transfer on a busy stream says that it is done only when its bytes have landed."""
    late = made(bench, direction, "host", now=True)
    side = bench.facility.stream()
    bench.facility.delay(SLOW, side)
    transfer = late.copy(side)
    bench.judge.finish(transfer, "synchronize" if not transfer.done() else "done")
    late.check()


@pytest.mark.parametrize("ids", PLACES)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "dropped"])
def test_memory_freed_right_after_the_call(
    bench: Bench, direction: str, keep: bool, ids: str
) -> None:
    """Source and ids may be freed right after the call: the copy still reads what was there."""
    late = made(bench, direction, ids, now=True)
    side = bench.facility.stream()
    bench.facility.delay(SLOW, side)
    transfer = late.copy(side)
    expected = late.expected
    target = late.case.dst
    sizes = [guard.whole.numel() for guard in late.case.src.guards]
    sizes += [tensor.nbytes for tensor in (late.case.src.ids, target.ids) if tensor is not None]
    target = replace(target, ids=None)
    if not keep:
        del transfer
    del late
    gc.collect()
    # Zeros are slots as well: what reads reused ids moves a wrong row, never a wild one.
    junk = [torch.zeros(n, dtype=torch.uint8, device=bench.facility.device) for n in sizes * 4]
    bench.facility.synchronize()
    assert junk
    verdict = bench.judge.compare(expected, target.tensors)
    assert verdict is None, f"Its memory was reused too early. {verdict}"
    bench.judge.examples += 1


@pytest.mark.parametrize("supplied", [True, False], ids=["given", "current"])
def test_a_launch_works_on_its_stream(bench: Bench, direction: str, supplied: bool) -> None:
    """A launch orders its work on the stream that it is given, or else on the current one."""
    lates = [Late(bench, bench.some(direction, SHAPE, 9)) for _ in range(3)]
    prepared = bench.subject.prepare(plan_of(lates[0].case))
    for late in lates:
        # Ids are brought over now: the copy of a list would wait for the device.
        launch = bench.judge.launch_of(late.case, prepared)
        bench.facility.synchronize()
        stream = bench.facility.stream()
        with bench.facility.on(stream):
            bench.facility.delay(SLOW)
            late.produce()
            pending = None if supplied else launch(None, None)
        if supplied:
            pending = launch(stream, None)
        bench.judge.land(pending, stream)
        late.check()


def _busy(facility: Facility, stream: torch.Stream) -> torch.Event:
    end = torch.Event(facility.device)
    facility.delay(2 * SLOW, stream)
    end.record(stream)
    return end


@pytest.mark.parametrize("ids", ["no-ids", "ids"])
def test_a_launch_returns_while_its_stream_is_busy(bench: Bench, direction: str, ids: str) -> None:
    """A launch does not wait for its stream, unless it has to read ids that lie on the device."""
    can = bench.subject.can
    case = bench.some(direction, SHAPE, 9)
    if ids == "no-ids":
        case.src.ids = None
        case.dst.ids = None
    late = Late(bench, case)
    launch = bench.judge.launch_of(case)
    launch(None, None)  # makes what only a first launch has to wait for
    late.produce()
    bench.facility.synchronize()
    # Another stream shows if slow work is slow here, since the requested work has begun.
    late_at_all = not _busy(bench.facility, bench.facility.stream()).query()
    assert late_at_all or bench.facility.emulated, "The slow job ended as soon as it was ordered."
    busy = _busy(bench.facility, stream := bench.facility.stream())
    pending = launch(stream, None)
    waited = late_at_all and busy.query()
    bench.judge.land(pending, stream)
    late.check()
    if ids == "no-ids" or can.index_on == "host" or can.capturable:
        assert not waited, (
            "The launch returned only after the work that stood on its stream before: it waits, "
            "and with it everything that the host could have enqueued meanwhile."
        )


def test_copies_on_two_streams_at_once(bench: Bench, direction: str) -> None:
    """Copies on two streams do not share anything that one of them still needs."""
    lates = [Late(bench, bench.other(number).some(direction, SHAPE, 9, 1)) for number in range(2)]
    transfers = []
    for turn, late in enumerate(lates):
        stream = bench.facility.stream()
        late.produce()
        bench.facility.delay(SLOW * (2 - turn), stream)
        transfers.append(late.copy(stream))
    for transfer in transfers:
        transfer.synchronize()
    for late in lates:
        late.check()


def test_a_load_after_a_store_of_the_same_rows(bench: Bench) -> None:
    """A store reads its rows before a later load on the same stream writes them."""
    slots = bench.shuffled(SHAPE.slots, 9)
    store = bench.gather(SHAPE, slots)
    fresh = bench.other(1).scatter(SHAPE, slots)
    both = (store, Case(fresh.src, replace(store.src), 9))
    expected = [case.expected() for case in both]
    bench.facility.delay(SLOW)
    transfers = [bench.judge.start(case) for case in both]
    for transfer in transfers:
        transfer.synchronize()
    for case, wanted in zip(both, expected, strict=True):
        bench.judge.check(wanted, case, source=False)


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("where", ["none", "side"])
def test_a_store_to_the_host_waits_for_its_producer(bench: Bench, where: str, pinned: bool) -> None:
    """A store to the host reads the device after the work that writes it."""
    case = bench.some("gather", SHAPE, 9, 1, {"device": "cpu"})
    late = Late(bench, replace(case, dst=on_host(case.dst, pinned)))
    late.check_after_its_producer(where)


@pytest.mark.parametrize("where", STREAMS[:2])
def test_a_load_of_pinned_memory_that_is_being_written(bench: Bench, where: str) -> None:
    """A load reads pinned memory after the work that writes it."""
    case = bench.some("scatter", SHAPE, 9, 1, {"device": "cpu"})
    late = Late(bench, replace(case, src=on_host(case.src, True)))
    late.final = [final.to(bench.facility.device) for final in late.final]
    bench.facility.synchronize()
    late.check_after_its_producer(where)
