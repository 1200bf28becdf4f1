# SPDX-License-Identifier: Apache-2.0
"""Judge protocols by drawn schedules of their threads, loops and processes, with drawn faults.

Each protocol has a machine, which judges what its schedules do, and seeded bugs that it must find.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from support.scheduled_pulls import pulls
from support.schedules import Schedule, Stuck, judge, simulated

from portakv.migrate.pull import Pull
from portakv.migrate.reader import Housekeeper
from portakv.migrate.words import Words

#: Schedules of each machine, and those of `.ci/full`, in parts.
SCHEDULES = 200
WIDE = 10_000
PARTS = 10

MACHINES: dict[str, Callable[[Schedule], None]] = {"pull": pulls}


class Fault(NamedTuple):
    """A bug of a protocol: a name of a class, and what takes its place."""

    machine: str
    owner: type
    name: str
    instead: Callable[..., Any]

    @property
    def id(self) -> str:
        """Return the name of the bug."""
        return f"{self.machine}-{self.owner.__name__}.{self.name}"


def no_call(*_: object) -> None:
    """Do nothing."""


FAULTS = [
    # A reader takes rows of an offer that has ended meanwhile.
    Fault("pull", Pull, "ended_offer", no_call),
    # An owner uses blocks again whose end it has not shown.
    Fault("pull", Words, "end", no_call),
    # The coroutine that looks after pulls is not woken.
    Fault("pull", Housekeeper, "wake", no_call),
]


@pytest.mark.parametrize("machine", MACHINES)
def test_a_protocol_holds_in_each_schedule(machine: str) -> None:
    judge(MACHINES[machine], range(SCHEDULES))


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("machine", MACHINES)
def test_a_protocol_holds_in_many_schedules(machine: str, part: int) -> None:
    judge(MACHINES[machine], range(part, WIDE, PARTS))


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.id for fault in FAULTS])
def test_a_machine_finds_a_bug(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """The negative controls."""
    monkeypatch.setattr(fault.owner, fault.name, fault.instead)
    with pytest.raises(AssertionError, match="The schedule of seed"):
        judge(MACHINES[fault.machine], range(SCHEDULES))


# --- the schedules themselves


class Counter:
    """A number that threads add to. With a fault they look and write in two steps."""

    def __init__(self, fault: bool) -> None:
        self.fault = fault
        self.lock = threading.Lock()
        self.number = 0

    def add(self) -> None:
        with self.lock:
            before = self.number
            if not self.fault:
                self.number += 1
        if self.fault:
            time.sleep(0.0)
            self.number = before + 1


def count(schedule: Schedule, fault: bool) -> int:
    """Return what four threads count to."""
    counter = Counter(fault)
    process = schedule.process("counts")
    threads = [schedule.begin(process, counter.add) for _ in range(4)]
    for thread in threads:
        thread.join()
    return counter.number


@pytest.mark.parametrize("fault", [False, True])
def test_schedules_find_a_race_of_threads(fault: bool) -> None:
    numbers = set[int]()
    with simulated():
        for seed in range(50):
            Schedule(seed).run(lambda schedule: numbers.add(count(schedule, fault)))
    assert (numbers == {4}) == (not fault)


def test_a_pause_takes_no_time_and_a_wait_ends_by_the_clock() -> None:
    times = list[float]()

    def wait(schedule: Schedule) -> None:
        begin = schedule.now
        time.sleep(1000.0)
        lock = threading.Lock()
        lock.acquire()
        assert not lock.acquire(timeout=500.0)
        assert not threading.Event().wait(250.0)
        times.append(schedule.now - begin)

    with simulated():
        Schedule(0).run(wait)
    assert times == [pytest.approx(1750.0)]


def test_threads_that_wait_for_each_other_are_an_error() -> None:
    def wait(schedule: Schedule) -> None:
        locks = threading.Lock(), threading.Lock()
        for one in locks:
            one.acquire()
        process = schedule.process("waits")
        for one in locks:
            schedule.begin(process, one.acquire).join()

    with simulated(), pytest.raises(Stuck):
        Schedule(0).run(wait)


def test_a_process_that_is_killed_takes_no_further_step() -> None:
    steps = list[int]()

    def act() -> None:
        try:
            while True:
                time.sleep(1.0)
                steps.append(len(steps))
        finally:
            steps.append(-1)

    def kill(schedule: Schedule) -> None:
        process = schedule.process("dies")
        schedule.begin(process, act)
        schedule.sleep(3.5)
        schedule.kill(process)
        schedule.sleep(3.0)
        assert steps == [0, 1, 2]

    with simulated():
        Schedule(0).run(kill)


def test_what_is_simulated_is_as_before_afterwards() -> None:
    names = [
        (threading, "Lock"),
        (threading, "RLock"),
        (threading, "Thread"),
        (time, "monotonic"),
        (time, "sleep"),
    ]
    before = [getattr(module, name) for module, name in names]
    with simulated():
        assert not [x for x in before if x in [getattr(m, name) for m, name in names]]
    assert before == [getattr(module, name) for module, name in names]
