# SPDX-License-Identifier: Apache-2.0
"""The scheduler sides of two engines that hand requests over, by random walks and step by step."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
from support.serving_faults import LentAndGivenBack
from support.serving_handovers import walk

from portakv.migrate import Ticket
from portakv.migrate.messages import Named
from portakv.serving import Group, Report, SchedulerSide
from portakv.serving.handover import RENEWALS, Endpoint
from portakv.serving.local import StoreIndex
from portakv.serving.plan import NO_HANDOVERS, Handovers, PullJob, RemoteRows

WALKS = 1600  # in all
PARTS = 16
FEW = 2  # parts that run each time
STEPS = 25


@pytest.mark.parametrize(
    "part", [*range(FEW), *(pytest.param(n, marks=pytest.mark.full) for n in range(FEW, PARTS))]
)
def test_any_walk_of_two_engines(part: int) -> None:
    """No request computes with rows that are not its own, and each one ends."""
    walked(part)


@cache
def walked(part: int) -> Counter[str]:
    """Return what the walks of a part counted."""
    counts = Counter[str]()
    for seed in range(part * WALKS // PARTS, (part + 1) * WALKS // PARTS):
        for engine in walk(SchedulerSide, seed, STEPS):
            counts.update(engine.scheduler_side.counts)
    return counts


def test_walks_pull_and_fail() -> None:
    """Otherwise they show nothing of these."""
    counts = walked(0)
    assert counts["offers"] > 100
    assert counts["pulls"] > 100
    assert counts["pulled_tokens"] > 300
    assert counts["failed_pulls"] > 10


class PulledAgain(SchedulerSide):
    """A scheduler side that pulls rows again which did not come."""

    def take(self, report: Report) -> None:
        failed = [
            (self._requests[live.job.request], live.job)
            for number, live in self._jobs.items()
            if isinstance(live.job, PullJob) and report.missing.get(number)
        ]
        super().take(report)
        for state, job in failed:
            state.remote = RemoteRows(job.tickets, job.tokens, 1.0)


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (LentAndGivenBack, "a request reads other rows"),
        (PulledAgain, "a request loads again and again"),
    ],
)
def test_walks_find_a_scheduler_side_with_a_bug(made: type[SchedulerSide], what: str) -> None:
    def walks() -> None:
        for seed in range(300):
            walk(made, seed, STEPS)

    with pytest.raises(AssertionError, match=what):
        walks()


# --- step by step


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


PROMPT = [*range(100, 140)]
EPOCH = bytes(range(16))
ROWS = RemoteRows((Ticket.of("ipc:///a", EPOCH, b"n" * 32),), len(PROMPT), lease=30.0)


def scheduler_side_of(clock: Clock | None = None, workers: int = 1) -> SchedulerSide:
    return SchedulerSide(16, [Group(16)], workers, None, clock or Clock())


def expecting() -> SchedulerSide:
    """Return a scheduler side with a request whose prompt another engine has computed."""
    scheduler_side = scheduler_side_of()
    scheduler_side.add("a", PROMPT, remote=ROWS)
    return scheduler_side


def pulled(scheduler_side: SchedulerSide, computed: int = 0) -> PullJob:
    """Let a scheduler decide on a pull, and return it."""
    tokens = scheduler_side.leading("a", computed)
    assert tokens == len(PROMPT) - computed
    scheduler_side.allocated("a", computed, tokens, ((5, 6, 7),))
    (job,) = scheduler_side.plan().handovers.pulls
    return job


def ended(scheduler_side: SchedulerSide, job: PullJob, landed: bool) -> None:
    """Let a pull end in one worker."""
    report = Report()
    report.end(job.number, frozenset() if landed else frozenset({0}))
    scheduler_side.take(report)


def test_a_pull_brings_all_rows_of_a_prompt() -> None:
    """Blocks that the engine has already are not touched."""
    scheduler_side = expecting()
    assert scheduler_side.awaits("a")
    job = pulled(scheduler_side, computed=16)
    assert (job.first, job.tokens, job.blocks) == (16, 40, ((-1, 6, 7),))
    assert job.tickets == ROWS.tickets
    assert not scheduler_side.awaits("a")
    ended(scheduler_side, job, landed=True)
    assert scheduler_side.plan().handovers == Handovers(released=[*ROWS.tickets])
    assert scheduler_side.plan().handovers is NO_HANDOVERS
    assert scheduler_side.counts["pulled_tokens"] == 24


def test_a_pull_names_the_blocks_that_the_rows_fill() -> None:
    """An engine allocates blocks for later tokens as well, which a pull would refuse."""
    scheduler_side = expecting()
    tokens = scheduler_side.leading("a", 16)
    assert tokens == 24
    scheduler_side.allocated("a", 16, tokens, ((5, 6, 7, 8, 9),))
    (job,) = scheduler_side.plan().handovers.pulls
    assert job.blocks == ((-1, 6, 7),)


@pytest.mark.parametrize("idle", [True, False])
def test_a_plan_with_a_pull_says_whether_the_engine_does_nothing_else(idle: bool) -> None:
    scheduler_side = expecting()
    scheduler_side.leading("a", 0)
    scheduler_side.allocated("a", 0, len(PROMPT), ((5, 6, 7),))
    plan = scheduler_side.plan(idle)
    assert plan.handovers.pulls
    assert plan.idle is idle
    assert not scheduler_side.plan(idle).idle


def test_a_pull_that_failed_is_not_tried_again() -> None:
    scheduler_side = expecting()
    ended(scheduler_side, pulled(scheduler_side), landed=False)
    assert scheduler_side.plan().handovers.released == [*ROWS.tickets]
    assert scheduler_side.leading("a", 0) == 0
    scheduler_side.allocated("a", 0, 0, ((5, 6, 7),))
    assert scheduler_side.plan().handovers is NO_HANDOVERS
    assert scheduler_side.counts["failed_pulls"] == 1
    assert not scheduler_side.finished("a")
    assert scheduler_side.statistics()["requests"] == 0


def test_a_pull_ends_with_its_last_worker() -> None:
    """Rows that one of them lacks are missing."""
    scheduler_side = scheduler_side_of(workers=2)
    scheduler_side.add("a", PROMPT, remote=ROWS)
    job = pulled(scheduler_side)
    ended(scheduler_side, job, landed=False)
    assert scheduler_side.plan().handovers is NO_HANDOVERS
    ended(scheduler_side, job, landed=True)
    assert scheduler_side.plan().handovers.released == [*ROWS.tickets]
    assert scheduler_side.counts["failed_pulls"] == 1


@pytest.mark.parametrize("how", ["aborted", "computed", "forgotten"])
def test_rows_that_no_one_pulls_are_released(how: str) -> None:
    scheduler_side = expecting()
    if how == "aborted":
        assert not scheduler_side.finished("a")
    elif how == "computed":
        scheduler_side.allocated("a", 0, 0, ((5, 6, 7),))
    else:
        assert scheduler_side.forget()
    assert scheduler_side.plan().handovers.released == [*ROWS.tickets]
    assert scheduler_side.leading("a", 0) == 0


def test_a_request_that_is_aborted_in_a_pull_keeps_its_blocks() -> None:
    """They are the engine's until the pull has ended."""
    scheduler_side = expecting()
    job = pulled(scheduler_side)
    assert not scheduler_side.finished("a")
    assert scheduler_side.statistics()["requests"] == 1
    ended(scheduler_side, job, landed=True)
    assert scheduler_side.plan().handovers.released == [*ROWS.tickets]
    assert scheduler_side.statistics()["requests"] == 0


def test_leases_are_renewed_until_the_end_of_the_pull() -> None:
    clock = Clock()
    scheduler_side = scheduler_side_of(clock)
    scheduler_side.add("a", PROMPT, remote=ROWS)
    assert scheduler_side.plan().handovers is NO_HANDOVERS
    for _ in range(2):
        clock.now += ROWS.lease / RENEWALS
        assert scheduler_side.plan().handovers == Handovers(renewals=[ROWS])
        assert scheduler_side.plan().handovers is NO_HANDOVERS
    job = pulled(scheduler_side)
    clock.now += ROWS.lease / RENEWALS
    assert len(scheduler_side.plan().handovers.renewals) == 1
    ended(scheduler_side, job, landed=True)
    clock.now += ROWS.lease
    assert scheduler_side.plan().handovers == Handovers(released=[*ROWS.tickets])


def test_a_request_does_not_choose_how_often_leases_are_renewed() -> None:
    clock = Clock()
    scheduler_side = scheduler_side_of(clock)
    scheduler_side.add("a", PROMPT, remote=ROWS._replace(lease=1e-9))
    renewed = 0
    for _ in range(100):
        clock.now += 1e-3
        renewed += len(scheduler_side.plan().handovers.renewals)
    assert renewed <= 1


ENDPOINTS = [Endpoint("ipc:///a", EPOCH), Endpoint("ipc:///b", EPOCH[::-1])]


def test_an_offer_has_one_name_in_all_workers() -> None:
    scheduler_side = scheduler_side_of(workers=2)
    scheduler_side.open_offers(ENDPOINTS, 7.0)
    scheduler_side.add("a", PROMPT)
    rows = scheduler_side.offer("a", 40, ((1, 2, 3),))
    assert rows is not None
    assert (rows.tokens, rows.lease) == (40, 7.0)
    assert scheduler_side.finished("a")
    plan = scheduler_side.plan()
    (job,) = plan.handovers.offers
    assert plan.retained == ["a"]
    assert (job.request, job.tokens, job.blocks, job.lease) == ("a", 40, ((1, 2, 3),), 7.0)
    names = [Named.read(ticket) for ticket in rows.tickets]
    assert names == [Named(each.epoch, each.address, job.name) for each in ENDPOINTS]
    assert not scheduler_side.retains  # the engine does not wait for blocks that others take
    scheduler_side.freed(["a"])
    assert scheduler_side.statistics()["requests"] == 0


def test_nothing_is_offered_before_workers_say_where() -> None:
    scheduler_side = scheduler_side_of()
    scheduler_side.add("a", PROMPT)
    assert scheduler_side.offer("a", 40, ((1, 2, 3),)) is None
    assert scheduler_side.offer("unknown", 40, ((1, 2, 3),)) is None
    assert not scheduler_side.finished("a")


def test_offers_end_when_other_weights_are_loaded() -> None:
    scheduler_side = scheduler_side_of()
    scheduler_side.open_offers(ENDPOINTS[:1], 7.0)
    for name in ("a", "b"):
        scheduler_side.add(name, PROMPT)
    rows = scheduler_side.offer("a", 40, ((1, 2, 3),))
    assert rows is not None
    assert scheduler_side.finished("a")
    scheduler_side.forget()
    plan = scheduler_side.plan()
    named = Named.read(rows.tickets[0])
    assert named is not None
    assert plan.handovers == Handovers(revoked=True, withdrawn=[named.name])
    assert plan.retained == ["a"]
    scheduler_side.forget()
    assert scheduler_side.plan().handovers == Handovers(revoked=True)
    assert scheduler_side.offer("b", 40, ((1, 2, 3),)) is None


def test_ends_of_offers_are_counted() -> None:
    scheduler_side = scheduler_side_of()
    one = Report()
    one.offers["taken"] += 1
    other = Report()
    other.offers["expired"] += 1
    scheduler_side.take(one.merged(other).merged(one))
    assert scheduler_side.counts["offers_taken"] == 2
    assert scheduler_side.counts["offers_expired"] == 1


def test_rows_that_were_pulled_are_saved() -> None:
    """A store of the decode engine has them for the next turn of a conversation."""
    scheduler_side = SchedulerSide(16, [Group(16)], 1, StoreIndex(), Clock())
    scheduler_side.add("a", PROMPT, remote=ROWS)
    ended(scheduler_side, pulled(scheduler_side), landed=True)
    scheduler_side.scheduled("a", 39, 40, ((5, 6, 7),), replaced=True)
    (save,) = scheduler_side.plan().saves
    assert (save.first, len(save.keys), save.blocks) == (0, 2, ((5, 6),))
