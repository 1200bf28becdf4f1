# SPDX-License-Identifier: Apache-2.0
"""Judge protocols by drawn schedules of their threads, loops and processes, with drawn faults.

Each protocol has a machine, which judges what its schedules do, and seeded bugs that it must find.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.scheduled_handovers import handovers
from support.scheduled_pulls import pulls
from support.scheduled_servers import hands, takeovers
from support.scheduled_stores import evictions, saves
from support.schedules import LoggedErrors, Schedule, Stuck, judge, simulated

from portakv.serving.server.state import ServerState

pytestmark = pytest.mark.xdist_group("schedules")  # one process freezes its objects

#: Schedules of each machine, of which two or more find each bug below, and those of `.ci/full`.
SCHEDULES = 50
WIDE = 10_000
PARTS = 10

MACHINES: dict[str, Callable[[Schedule], None]] = {
    "pull": pulls,
    "hand-over": handovers,
    "lending": hands,
    "takeover": takeovers,
    "save": saves,
    "eviction": evictions,
}


class Fault(NamedTuple):
    """A bug of a protocol: the name of a function, and what takes its place."""

    machine: str
    name: str
    instead: Any


def no_names(*_: object) -> list[Any]:
    """Return an empty list."""
    return []


def no_call(*_: object) -> None:
    """Do nothing."""


_report = ServerState.report


def report_whole(state: ServerState, session: int, number: int, landed: bytes) -> None:
    """Take the part of a rank for the whole blocks."""
    lease = state.leases.get(number)
    if lease is not None and lease.client.session == session:
        lease.cells = -1
    _report(state, session, number, landed)


def yes(*_: object) -> bool:
    """Return True."""
    return True


def lock_nothing(file: Path) -> int:
    """Open a file that a process has to lock before it serves."""
    return os.open(file, os.O_RDWR | os.O_CREAT, 0o600)


FAULTS = [
    # A reader takes rows of an offer that has ended meanwhile.
    Fault("pull", "portakv.migrate.pull.Pull.ended_offer", no_call),
    # An owner uses blocks again whose end it has not shown.
    Fault("pull", "portakv.migrate.words.Words.end", no_call),
    # The coroutine that looks after pulls is not woken.
    Fault("pull", "portakv.migrate.reader.Housekeeper.wake", no_call),
    # An engine uses blocks again that it lends.
    Fault("hand-over", "portakv.serving.handover.Handover.lending", property(no_names)),
    # The other engine learns neither that its rows are needed nor that they are not.
    Fault("hand-over", "portakv.serving.handover.Handover.tell", no_call),
    # Rows are not released.
    Fault("hand-over", "portakv.serving.handover.Tickets.release", no_call),
    # Rows are handed over that must not be used.
    Fault("hand-over", "portakv.migrate.owner.Owner.revoke_all", no_call),
    # A block is sealed when the first of its ranks has copied its part.
    Fault("lending", "portakv.serving.server.state.ServerState.report", report_whole),
    # The blocks of a save are released while they are copied.
    Fault("lending", "portakv.serving.server.client.ServerTransfer.is_released", yes),
    # Rows stay lent to a process that has ended.
    Fault("lending", "portakv.serving.server.state.ServerState.process_ended", no_call),
    # Two processes serve one place.
    Fault("takeover", "portakv.serving.server.link.lock", lock_nothing),
    # A server that ends in order has its place for ever.
    Fault("takeover", "portakv.serving.server.link.Place.release", no_call),
    # Transfers of a session that has ended go on.
    Fault("takeover", "portakv.serving.server.client.StoreClient.close_all", no_call),
    # A load takes bytes that a tier has damaged.
    Fault("save", "portakv.storage.image.verify", yes),
    # A transfer that ends keeps its rows.
    Fault("save", "portakv.storage.memory.Rows.give", no_call),
    Fault("eviction", "portakv.storage.memory.Rows.give", no_call),
    # Pins hold nothing. A search for a block that has no pin then goes on for ever.
    Fault("eviction", "portakv.storage.eviction.Chains.pin", no_call),
]


@pytest.fixture(scope="module", autouse=True)
def _collect_later() -> Iterator[None]:
    """Let what was frozen for the schedules be collected with what the file leaves."""
    yield
    gc.unfreeze()


@pytest.mark.parametrize("machine", MACHINES)
def test_a_protocol_holds_in_each_schedule(machine: str) -> None:
    judge(MACHINES[machine], range(SCHEDULES))


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("machine", MACHINES)
def test_a_protocol_holds_in_many_schedules(machine: str, part: int) -> None:
    judge(MACHINES[machine], range(part, WIDE, PARTS))


def each_fault() -> Iterator[Any]:
    """Yield the faults; all but the first of each machine are for .ci/full."""
    seen = set[str]()
    for each in FAULTS:
        marks = [pytest.mark.full] if each.machine in seen else []
        seen.add(each.machine)
        yield pytest.param(each, id=f"{each.machine}-{each.name}", marks=marks)


@pytest.mark.parametrize("fault", list(each_fault()))
def test_a_machine_finds_a_bug(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """The negative controls."""
    monkeypatch.setattr(fault.name, fault.instead)
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


@pytest.mark.parametrize("preemption", [0.0, 3e-3])
def test_a_thread_that_loops_and_waits_for_nothing_is_an_error(
    monkeypatch: pytest.MonkeyPatch, preemption: float
) -> None:
    monkeypatch.setattr("support.schedules.TURN", 0.2)
    monkeypatch.setattr("support.schedules.MOST_CALLS", 1000)

    def loop(schedule: Schedule) -> None:
        while True:
            yes(schedule)

    with simulated(), pytest.raises(Stuck, match=r"does not end after|waits for nothing"):
        Schedule(0, preemption).run(loop)


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


class Owner:
    """An object that a record of the log may keep."""

    def fail(self) -> None:
        """Log an error, whose frame holds this object."""
        try:
            raise OSError("it fails")
        except OSError as error:
            logging.getLogger("portakv.tests").warning("%s", error, exc_info=True)


@pytest.mark.parametrize("fault", [False, True])
def test_the_log_keeps_no_object_of_a_schedule(
    fault: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = list[weakref.ref[Owner]]()

    def scenario(schedule: Schedule) -> None:
        owner = Owner()
        owners.append(weakref.ref(owner))
        process = schedule.process("fails")
        thread = schedule.begin(process, owner.fail)
        thread.join()

    if fault:
        monkeypatch.setattr(LoggedErrors, "emit", lambda handler, record: None)
    with simulated(), suppress(OSError):
        Schedule(0).run(scenario)
    assert "it fails" in caplog.text
    assert [owner() is not None for owner in owners] == [fault]
