# SPDX-License-Identifier: Apache-2.0
"""Lies that a single call does not show: claims that cannot be true on this device, calls that mix
with their neighbours, a stream taken for none. Each was found by a mutant that survived."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from portakv import Transfer
from portakv_conformance.cases import Bench, Facility, Shape, Subject, arguments_of, plan_of
from portakv_conformance.cases.test_ordering import Late
from portakv_conformance.cases.test_safety import DUPLICATES, check_duplicates

pytestmark = pytest.mark.area("claims")

SHAPE = Shape(layers=3, widths=(64, 64))
BUSY = 300  # milliseconds


@pytest.mark.claim("places")
def test_places_are_of_this_device(subject: Subject) -> None:
    """A backend of the host claims host memory only; others claim pairs with their device on one
    side."""
    for pair in sorted(subject.can.places):
        right = ("device" in pair) == (subject.device.type != "cpu")
        assert right, f"It runs on {subject.device} and claims to copy from {' to '.join(pair)}."


@pytest.mark.claim("capturable")
def test_capture_is_claimed_where_there_are_graphs(subject: Subject, facility: Facility) -> None:
    """`capturable` is claimed only on a device whose torch can capture: nothing else shows it."""
    assert facility.graphs or not subject.can.capturable, (
        f"It claims capturable, but torch captures no graphs on {subject.device.type}."
    )


@pytest.mark.claim("alignment")
@pytest.mark.parametrize("times", [1, 3, 5])
def test_rows_as_short_as_claimed(bench: Bench, direction: str, times: int) -> None:
    """Rows of as many bytes as it claims to need, or an odd multiple of them, are not refused."""
    least = bench.subject.can.alignment
    shape = Shape(heads=1, widths=(times * least,) * 2)
    case = bench.some(direction, shape, 9, dtype=torch.uint8)
    assert bench.copy(case), (
        f"It claims an alignment of {least} B and refuses rows of {times * least} B: "
        f"{bench.judge.declined[-1]}"
    )


def _other_slots(ids: torch.Tensor) -> None:
    ids.copy_(torch.where(ids >= 0, (ids + 7) % SHAPE.slots, ids))


@pytest.mark.area("ordering")
@pytest.mark.parametrize("kind", ["int32", "int64", "pinned"])
def test_host_ids_that_change_right_after_the_call(bench: Bench, direction: str, kind: str) -> None:
    """A list of ids on the host belongs to the caller again when the call returns."""
    dtype = torch.int32 if kind == "int32" else torch.int64
    for _ in range(2):  # the second call is by a launch that was prepared
        ids = torch.tensor(bench.shuffled(SHAPE.slots, 9, 1), dtype=dtype)
        ids = ids.pin_memory() if kind == "pinned" and bench.facility.streams else ids
        case = bench.move(direction, SHAPE, ids)
        expected = case.expected()
        started = list[Transfer]()
        copy = partial(bench.subject.copy, *arguments_of(case), count=case.count)
        bench.facility.delay(BUSY)
        if not bench.judge.carried(lambda: started.append(copy()), case):  # noqa: B023 (called immediately)
            return
        _other_slots(ids)
        bench.judge.finish(started[0])
        bench.judge.check(expected, case, "Its ids were read after the call had returned. ")


@pytest.mark.claim("index_on")
def test_a_launch_has_read_its_host_ids(bench: Bench, direction: str) -> None:
    """A launch that reads ids on the host has read them when it returns."""
    if bench.subject.can.index_on != "host":
        bench.judge.not_claimed("index_on", "it reads ids on the device.")
    ids = bench.judge.ids(bench.shuffled(SHAPE.slots, 9))
    case = bench.move(direction, SHAPE, ids)
    expected = case.expected()
    launch = bench.judge.launch_of(case)
    bench.facility.synchronize()
    bench.facility.delay(BUSY)
    pending = launch(None, None)
    if bench.subject.can.index_on == "host":
        _other_slots(ids)
    bench.judge.land(pending)
    bench.judge.check(expected, case, "Its ids were read after the launch had returned. ")


@pytest.mark.claim("threads")
def test_each_thread_gets_its_own_copy(bench: Bench, direction: str) -> None:
    """Several threads call one launch concurrently; each call moves its own rows, once."""
    if not bench.judge.claims("threads", "the library lets one thread at a time into a launch."):
        return
    prepared = None
    for turn in range(12):
        # Fresh destinations each time: a call that is lost is not made good by the next.
        cases = [bench.other(10 * turn + n).some(direction, SHAPE, 9) for n in range(4)]
        prepared = prepared or bench.subject.prepare(plan_of(cases[0]))
        bench.judge.at_once(cases, prepared)


@pytest.mark.area("safety")
@pytest.mark.parametrize("step", [1, 4])
def test_duplicates_that_reach_a_launch(bench: Bench, step: int) -> None:
    """A destination that occurs twice, in ids that were not checked, corrupts nothing else."""
    shape = replace(SHAPE, block_size=4, blocks=6)
    case = bench.scatter(shape, torch.tensor(DUPLICATES).to(bench.subject.device), step=step)
    check_duplicates(bench.judge, case, bench.judge.launch_to_the_end(case))


@pytest.mark.area("ordering")
@pytest.mark.needs("accelerator")
def test_the_default_stream_is_a_stream(bench: Bench, direction: str) -> None:
    """The default stream, passed while another is current, is not a missing one, though it is 0."""
    late = Late(bench, bench.some(direction, SHAPE, 9))
    facility = bench.facility
    launch = bench.judge.launch_of(late.case)
    late.produce()
    default = facility.current()
    side = facility.stream()
    facility.synchronize()
    facility.delay(BUSY, side)
    with facility.on(side):
        pending = launch(default, None)
    bench.judge.land(pending, default)
    late.check()  # while the other stream is still busy
