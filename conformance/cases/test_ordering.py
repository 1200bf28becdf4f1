# SPDX-License-Identifier: Apache-2.0
"""Order on accelerators: what a copy waits for, what waits for it, what may be freed. A slow job
stands before the producer or before the copy, so that a missing wait shows."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.by_hand import Shape, Workshop, on_host
from portakv_conformance.judge.claims import launch_of, plan_of
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import Judge, asked_of, index_of, view_of

pytestmark = [pytest.mark.area("ordering"), pytest.mark.needs("accelerator")]

SHAPE = Shape(layers=3, widths=(64, 64))
SLOW = 60  # milliseconds
STREAMS = ("none", "side", "current")
PLACES = ("host", "device")


class Late:
    """A case whose source holds other bytes until `produce`; ``expected`` is what must come out."""

    def __init__(self, judge: Judge, case: Case) -> None:
        self.judge, self.case = judge, case
        self.expected = case.expected()
        self.final = [guard.payload().clone() for guard in case.src.guards]
        self.views = view_of(case.src), view_of(case.dst)
        self.indices = index_of(case.src), index_of(case.dst)
        self.copy().synchronize()  # compiles outside of the race
        self.expected.before.restore(guard.whole for guard in case.dst.guards)
        for guard in case.src.guards:
            guard.payload().fill_(0xEE)
        judge.facility.synchronize()

    def produce(self) -> None:
        """Write the source, on the current stream."""
        for guard, final in zip(self.case.src.guards, self.final, strict=True):
            guard.payload().copy_(final, non_blocking=True)

    def copy(self, stream: torch.Stream | None = None) -> Any:
        """The copy, as a user gets it."""
        count = self.case.count
        return self.judge.subject.copy(*self.views, *self.indices, count=count, stream=stream)

    def check(self, *, source: bool = True) -> None:
        """Judge the bytes; all work has ended."""
        failing, self.judge.failing = self.judge.failing, self.case
        self.judge.check(self.expected, self.case, source=source)
        self.judge.failing = failing


def made(judge: Judge, home: Workshop, direction: str, ids: str, *, now: bool = False) -> Late:
    """A case whose ids lie on the host or on the device, with its source in place if asked."""
    slots = torch.tensor(home.shuffled(SHAPE.slots, 9, 1))
    slots = slots.to(judge.subject.device) if ids == "device" else slots
    late = Late(judge, home.move(direction, SHAPE, slots))
    if now:
        late.produce()
        judge.facility.synchronize()
    return late


@pytest.mark.parametrize("ids", PLACES)
@pytest.mark.parametrize("where", STREAMS)
def test_a_copy_waits_for_its_producer(
    facility: Facility, judge: Judge, home: Workshop, direction: str, where: str, ids: str
) -> None:
    """A copy is ordered behind all earlier work of the caller's current stream, on any stream."""
    check_late(facility, made(judge, home, direction, ids), where)


@pytest.mark.parametrize("where", STREAMS)
def test_later_work_waits_for_the_copy(
    facility: Facility, judge: Judge, home: Workshop, direction: str, where: str
) -> None:
    """Behind ``Transfer.wait`` the current stream may read the destination and reuse the source."""
    late, side = made(judge, home, direction, "host", now=True), facility.stream()
    with facility.on(side if where == "current" else facility.current()):
        facility.delay(SLOW, side if where == "side" else None)
        transfer = late.copy(side if where == "side" else None)
        transfer.wait()
        landed = [guard.whole.clone() for guard in late.case.dst.guards]
        for guard in late.case.src.guards:
            guard.payload().fill_(0x11)
        facility.current().synchronize()
    facility.synchronize()
    for guard, copy in zip(late.case.dst.guards, landed, strict=True):
        assert torch.equal(guard.whole.cpu(), copy.cpu()), "Behind wait() bytes were still coming."
    late.check(source=False)


@pytest.mark.parametrize("where", ["none", "side"])
def test_ids_that_are_produced_late(
    facility: Facility, judge: Judge, home: Workshop, direction: str, where: str
) -> None:
    """Ids on the device are read behind the work that writes them."""
    late = made(judge, home, direction, "device")
    side = late.case.src if direction == "gather" else late.case.dst
    assert side.ids is not None
    late.produce()
    fresh = side.ids.clone()
    side.ids.copy_(torch.arange(len(fresh)).flip(0))
    facility.synchronize()
    late.indices = index_of(late.case.src), index_of(late.case.dst)
    facility.delay(SLOW)
    side.ids.copy_(fresh, non_blocking=True)
    late.copy(facility.stream() if where == "side" else None).synchronize()
    late.check()


def test_done_means_landed(judge: Judge, home: Workshop, direction: str) -> None:
    """A transfer on a busy stream says that it is done only when its bytes have landed."""
    late, side = made(judge, home, direction, "host", now=True), judge.facility.stream()
    judge.facility.delay(SLOW, side)
    transfer = late.copy(side)
    judge.finish(transfer, "synchronize" if not transfer.done() else "done")
    late.check()


@pytest.mark.parametrize("ids", PLACES)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "dropped"])
def test_memory_freed_right_after_the_call(
    facility: Facility, judge: Judge, home: Workshop, direction: str, keep: bool, ids: str
) -> None:
    """Source and ids may be freed right after the call: the copy still reads what was there."""
    late, side = made(judge, home, direction, ids, now=True), facility.stream()
    facility.delay(SLOW, side)
    transfer = late.copy(side)
    expected, target = late.expected, late.case.dst
    sizes = [guard.whole.numel() for guard in late.case.src.guards]
    sizes += [tensor.nbytes for tensor in (late.case.src.ids, target.ids) if tensor is not None]
    target = replace(target, ids=None)
    if not keep:
        del transfer
    del late
    gc.collect()
    # Zeros are slots as well: what reads reused ids moves a wrong row, never a wild one.
    junk = [torch.zeros(n, dtype=torch.uint8, device=facility.device) for n in sizes * 4]
    facility.synchronize()
    assert junk
    verdict = judge.compare(expected, target.tensors)
    assert verdict is None, f"Its memory was reused too early. {verdict}"
    judge.examples += 1


@pytest.mark.parametrize("given", [True, False], ids=["given", "current"])
def test_a_launch_works_on_its_stream(
    facility: Facility, judge: Judge, home: Workshop, direction: str, given: bool
) -> None:
    """A launch orders its work on the stream that it is given, or else on the current one."""
    lates = [Late(judge, home.some(direction, SHAPE, 9)) for _ in range(3)]
    prepared = judge.subject.prepare(plan_of(lates[0].case))
    for late in lates:
        # Ids are brought over now: the copy of a list would wait for the device.
        launch = launch_of(judge.subject, late.case, prepared)
        facility.synchronize()
        stream = facility.stream()
        with facility.on(stream):
            facility.delay(SLOW)
            late.produce()
            pending = None if given else launch(None, None)
        if given:
            pending = launch(stream, None)
        judge.land(pending, stream)
        late.check()


def _busy(facility: Facility, stream: torch.Stream) -> torch.Event:
    end = torch.Event(facility.device)
    facility.delay(2 * SLOW, stream)
    end.record(stream)
    return end


@pytest.mark.parametrize("ids", ["no-ids", "ids"])
def test_a_launch_returns_while_its_stream_is_busy(
    facility: Facility, judge: Judge, home: Workshop, direction: str, ids: str
) -> None:
    """A launch does not wait for its stream, unless it has to read ids that lie on the device."""
    can, case = judge.subject.can, home.some(direction, SHAPE, 9)
    if ids == "no-ids":
        case = Case(replace(case.src, ids=None), replace(case.dst, ids=None), case.count)
    late = Late(judge, case)
    launch = launch_of(judge.subject, case)
    launch(None, None)  # makes what only a first launch has to wait for
    late.produce()
    facility.synchronize()
    # Whether slow work is slow here is asked of another stream: work that was asked for has begun.
    late_at_all = not _busy(facility, facility.stream()).query()
    assert late_at_all or facility.emulated, "The slow job ended as soon as it was ordered."
    busy = _busy(facility, stream := facility.stream())
    pending = launch(stream, None)
    waited = late_at_all and busy.query()
    judge.land(pending, stream)
    late.check()
    if ids == "no-ids" or can.index_on == "host" or can.capturable:
        assert not waited, (
            "The launch returned only after the work that stood on its stream before: it waits, "
            "and with it everything that the host could have enqueued meanwhile."
        )


def test_copies_on_two_streams_at_once(judge: Judge, home: Workshop, direction: str) -> None:
    """Copies on two streams do not share anything that one of them still needs."""
    shops = [replace(home, seed=home.seed + number) for number in range(2)]
    lates = [Late(judge, shop.some(direction, SHAPE, 9, 1)) for shop in shops]
    transfers = []
    for turn, late in enumerate(lates):
        stream = judge.facility.stream()
        late.produce()
        judge.facility.delay(SLOW * (2 - turn), stream)
        transfers.append(late.copy(stream))
    for transfer in transfers:
        transfer.synchronize()
    for late in lates:
        late.check()


def test_a_load_behind_a_store_of_the_same_rows(judge: Judge, home: Workshop) -> None:
    """On one stream, a store reads its rows before the load behind it writes them."""
    slots = home.shuffled(SHAPE.slots, 9)
    store = home.gather(SHAPE, slots)
    fresh = replace(home, seed=home.seed + 1).scatter(SHAPE, slots)
    both = (store, Case(fresh.src, replace(store.src), 9))
    expected = [case.expected() for case in both]
    judge.facility.delay(SLOW)
    transfers = [judge.subject.copy(*asked_of(case)) for case in both]
    for transfer in transfers:
        transfer.synchronize()
    for case, wanted in zip(both, expected, strict=True):
        judge.check(wanted, case, source=False)


def check_late(facility: Facility, late: Late, where: str) -> None:
    """Judge a copy behind a slow producer, on the current stream, ``current`` for one that is not
    the default, or on another."""
    side = facility.stream()
    with facility.on(side if where == "current" else facility.current()):
        facility.delay(SLOW)
        late.produce()
        transfer = late.copy(side if where == "side" else None)
    transfer.synchronize()
    late.check()


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("where", ["none", "side"])
def test_a_store_to_the_host_waits_for_its_producer(
    facility: Facility, judge: Judge, home: Workshop, where: str, pinned: bool
) -> None:
    """A store to the host reads the device behind the work that writes it."""
    case = home.some("gather", SHAPE, 9, 1, {"device": "cpu"})
    check_late(facility, Late(judge, replace(case, dst=on_host(case.dst, pinned))), where)


@pytest.mark.parametrize("where", ["none", "side"])
def test_a_load_of_pinned_memory_that_is_being_written(
    facility: Facility, judge: Judge, home: Workshop, where: str
) -> None:
    """A load reads pinned memory behind the work that writes it."""
    case = home.some("scatter", SHAPE, 9, 1, {"device": "cpu"})
    late = Late(judge, replace(case, src=on_host(case.src, True)))
    late.final = [final.to(facility.device) for final in late.final]
    facility.synchronize()
    check_late(facility, late, where)
