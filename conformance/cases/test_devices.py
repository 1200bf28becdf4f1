# SPDX-License-Identifier: Apache-2.0
"""Threads with streams of their own, and a device that is not the current one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch

from portakv import DeviceMismatch, Unsupported
from portakv_conformance.cases.test_ordering import SHAPE, SLOW, Late
from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.by_hand import Workshop
from portakv_conformance.judge.claims import at_once
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import Judge, asked_of, index_of
from portakv_conformance.judge.subject import subject as find

pytestmark = [pytest.mark.area("ordering"), pytest.mark.needs("accelerator")]


def test_threads_with_streams_of_their_own(judge: Judge, home: Workshop) -> None:
    """Threads that copy on streams of their own do not disturb each other."""
    shops = [replace(home, seed=home.seed + n) for n in range(3)]
    lates = [Late(judge, shop.some("gather", SHAPE, 9, 1)) for shop in shops]

    def work(late: Late) -> None:
        with judge.facility.on(judge.facility.stream()):
            for _ in range(5):
                judge.facility.delay(1)
                late.produce()
                late.copy().synchronize()

    at_once([partial(work, late) for late in lates])
    for late in lates:
        late.check()


@pytest.mark.needs("two devices")
@pytest.mark.parametrize("thread", [False, True], ids=["same-thread", "other-thread"])
def test_another_device_than_the_current_one(
    judge: Judge, home: Workshop, direction: str, thread: bool
) -> None:
    """A copy runs on the device of its views, in any thread, and leaves the current one alone."""
    subject, current = judge.subject, torch.accelerator.current_device_index()
    other = judge.facility.second()
    there = find(subject.name, other, emulated=subject.emulated)
    theirs = Judge(there, Facility(other, subject.emulated), judge.seed)
    late = Late(theirs, replace(home, device=str(other)).some(direction, SHAPE, 9, 1))

    def work() -> int:
        # Which device is current is a matter of each thread, and need not be the judged one.
        torch.accelerator.set_device_index(subject.device.index)
        late.produce()
        late.copy().synchronize()
        return torch.accelerator.current_device_index()

    try:
        found = ThreadPoolExecutor(1).submit(work).result() if thread else work()
    finally:
        torch.accelerator.set_device_index(current)
    theirs.facility.synchronize()
    assert found == subject.device.index, "The current device changed."
    late.check()
    judge.examples += 1


@pytest.mark.needs("two devices")
@pytest.mark.parametrize("late", [False, True], ids=["there", "late"])
def test_ids_on_another_device(judge: Judge, home: Workshop, direction: str, late: bool) -> None:
    """Ids may lie on another device than the views, and be written there behind slow work."""
    there = Facility(judge.facility.second(), judge.facility.emulated)
    slots = torch.tensor(home.shuffled(SHAPE.slots, 9, 1))
    copy = Late(judge, home.move(direction, SHAPE, slots.to(there.device)))
    copy.produce()
    judge.facility.synchronize()
    if late:
        side = copy.case.src if direction == "gather" else copy.case.dst
        assert side.ids is not None
        fresh = side.ids.clone()
        side.ids.copy_(torch.arange(len(fresh)).flip(0))
        there.synchronize()
        copy.indices = index_of(copy.case.src), index_of(copy.case.dst)
        there.delay(SLOW, there.current())
        side.ids.copy_(fresh, non_blocking=True)
    copy.copy().synchronize()
    copy.check()


@pytest.mark.needs("two devices")
def test_views_on_two_devices_are_refused(judge: Judge, home: Workshop) -> None:
    """A copy between two devices is refused in words, not carried out on one of them."""
    there = replace(home, device=str(judge.facility.second()))
    case = Case(home.cache(SHAPE, [1, 2]), there.chunk(SHAPE, 2, source=False), 2)
    with pytest.raises((DeviceMismatch, Unsupported)):
        judge.subject.copy(*asked_of(case)[:3])
    judge.examples += 1
