# SPDX-License-Identifier: Apache-2.0
"""Threads with streams of their own, and a device that is not the current one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from portakv_conformance.cases import Bench, Case, Facility, Judge
from portakv_conformance.cases.test_ordering import SHAPE, SLOW, Late
from portakv_conformance.judge.judging import at_once
from portakv_conformance.judge.subject import subject as find

pytestmark = [pytest.mark.area("ordering"), pytest.mark.needs("accelerator")]


def test_threads_with_streams_of_their_own(bench: Bench) -> None:
    """Threads that copy on streams of their own do not disturb each other."""
    lates = [Late(bench, bench.other(n).some("gather", SHAPE, 9, 1)) for n in range(3)]

    def work(late: Late) -> None:
        with bench.facility.on(bench.facility.stream()):
            for _ in range(5):
                bench.facility.delay(1)
                late.produce()
                late.copy().synchronize()

    at_once([partial(work, late) for late in lates])
    for late in lates:
        late.check()


@pytest.mark.needs("two devices")
@pytest.mark.parametrize("thread", [False, True], ids=["same-thread", "other-thread"])
def test_another_device_than_the_current_one(bench: Bench, direction: str, thread: bool) -> None:
    """A copy runs on the device of its views, in any thread, and leaves the current one alone."""
    subject = bench.subject
    current = torch.accelerator.current_device_index()
    other = bench.facility.second()
    judged = find(subject.name, other, emulated=subject.emulated)
    judge = Judge(judged, Facility(other, subject.emulated), bench.judge.seed)
    there = replace(bench, device=str(other), judge=judge)
    late = Late(there, there.some(direction, SHAPE, 9, 1))

    def work() -> int:
        # Which device is current is a matter of each thread, and need not be the judged one.
        torch.accelerator.set_device_index(subject.device.index)
        there.facility.delay(SLOW)
        late.produce()
        late.copy().synchronize()
        return torch.accelerator.current_device_index()

    try:
        device = ThreadPoolExecutor(1).submit(work).result() if thread else work()
    finally:
        torch.accelerator.set_device_index(current)
    there.facility.synchronize()
    assert device == subject.device.index, "The current device changed."
    late.check()
    bench.judge.examples += 1


@pytest.mark.needs("two devices")
@pytest.mark.parametrize("supplied", [True, False], ids=["given", "current"])
def test_a_launch_on_another_device(bench: Bench, direction: str, supplied: bool) -> None:
    """A launch orders its work on the stream that it gets, or else on the current stream of its
    device, whichever device is current in the thread."""
    subject = bench.subject
    other = bench.facility.second()
    judge = Judge(
        find(subject.name, other, emulated=subject.emulated),
        Facility(other, subject.emulated),
        bench.judge.seed,
    )
    there = replace(bench, device=str(other), judge=judge)
    late = Late(there, there.some(direction, SHAPE, 9))
    launch = judge.launch_of(late.case)
    there.facility.synchronize()

    stream = there.facility.stream() if supplied else there.facility.current()
    current = torch.accelerator.current_device_index()
    try:
        torch.accelerator.set_device_index(subject.device.index)
        with there.facility.on(stream):
            there.facility.delay(SLOW)
            late.produce()
        torch.accelerator.set_device_index(subject.device.index)
        pending = launch(stream if supplied else None, None)
        device = torch.accelerator.current_device_index()
    finally:
        torch.accelerator.set_device_index(current)
    judge.land(pending, stream)
    assert device == subject.device.index, "The current device changed."
    late.check()
    bench.judge.examples += 1


@pytest.mark.needs("two devices")
@pytest.mark.parametrize("late", [False, True], ids=["there", "late"])
def test_ids_on_another_device(bench: Bench, direction: str, late: bool) -> None:
    """Ids may lie on another device than the views, and be written there after slow work."""
    there = Facility(bench.facility.second(), bench.facility.emulated)
    slots = torch.tensor(bench.shuffled(SHAPE.slots, 9, 1))
    copy = Late(bench, bench.move(direction, SHAPE, slots.to(there.device)))
    copy.produce()
    bench.facility.synchronize()
    if late:
        copy.write_ids_late(there)
    copy.copy().synchronize()
    copy.check()


@pytest.mark.needs("two devices")
def test_views_on_two_devices_are_refused(bench: Bench) -> None:
    """A copy from another device is right, or refused in words; reports list the case's name."""
    there = replace(bench, device=str(bench.facility.second()))
    gather = Case(there.cache(SHAPE, [1, 2]), bench.chunk(SHAPE, 2, source=False), 2)
    scatter = Case(there.chunk(SHAPE, 2), bench.cache(SHAPE, [5, 0], source=False), 2)
    for case, overlap in product((gather, scatter), ("compute", "idle")):
        bench.judge.call(case, partial(bench.judge.start, case, overlap=overlap))
