# SPDX-License-Identifier: Apache-2.0
"""The ledgers of two engines that hand requests over, by random walks and step by step."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
from support.serving_faults import LentAndGivenBack
from support.serving_handovers import walk

from portakv.migrate import Ticket
from portakv.migrate.messages import Named
from portakv.serving import Group, Ledger, Report
from portakv.serving.handover_terms import RemoteRows
from portakv.serving.no_store import NoStore
from portakv.serving.plan import NO_HANDOVERS, Handovers, PullJob, Renewal
from portakv.serving.tickets import RENEWALS, Endpoint

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
        for engine in walk(Ledger, seed, STEPS):
            counts.update(engine.ledger.counts)
    return counts


def test_walks_pull_and_fail() -> None:
    """Otherwise they show nothing of these."""
    counts = walked(0)
    assert counts["offers"] > 100
    assert counts["pulls"] > 100
    assert counts["pulled_tokens"] > 300
    assert counts["failed_pulls"] > 10


class PulledAgain(Ledger):
    """A ledger that pulls rows again which did not come."""

    def take(self, report: Report) -> None:
        failed = [
            (self._requests[live.job.request], live.job)
            for number, live in self._jobs.items()
            if isinstance(live.job, PullJob) and report.loaded.get(number)
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
def test_walks_find_a_ledger_with_a_bug(made: type[Ledger], what: str) -> None:
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


def ledger_of(clock: Clock | None = None, workers: int = 1) -> Ledger:
    return Ledger(16, [Group(16)], workers, NoStore(), clock or Clock())


def expecting() -> Ledger:
    """Return a ledger with a request whose prompt another engine has computed."""
    ledger = ledger_of()
    ledger.add("a", PROMPT, remote=ROWS)
    return ledger


def pulled(ledger: Ledger, computed: int = 0) -> PullJob:
    """Let a scheduler decide on a pull, and return it."""
    tokens = ledger.leading("a", computed)
    assert tokens == len(PROMPT) - computed
    ledger.allocated("a", computed, tokens, ((5, 6, 7),))
    (job,) = ledger.plan().handovers.pulls
    return job


def ended(ledger: Ledger, job: PullJob, landed: bool) -> None:
    """Let a pull end in one worker."""
    report = Report()
    report.end_load(job.number, frozenset() if landed else frozenset({0}))
    ledger.take(report)


def test_a_pull_brings_all_rows_of_a_prompt() -> None:
    """Blocks that the engine has already are not touched."""
    ledger = expecting()
    assert ledger.awaits("a")
    job = pulled(ledger, computed=16)
    assert (job.first, job.tokens, job.blocks) == (16, 40, ((-1, 6, 7),))
    assert job.tickets == ROWS.tickets
    assert not ledger.awaits("a")
    ended(ledger, job, landed=True)
    assert ledger.plan().handovers == Handovers(released=ROWS.tickets)
    assert ledger.plan().handovers is NO_HANDOVERS
    assert ledger.counts["pulled_tokens"] == 24


def test_a_pull_names_the_blocks_that_the_rows_fill() -> None:
    """An engine allocates blocks for later tokens as well, which a pull would refuse."""
    ledger = expecting()
    tokens = ledger.leading("a", 16)
    assert tokens == 24
    ledger.allocated("a", 16, tokens, ((5, 6, 7, 8, 9),))
    (job,) = ledger.plan().handovers.pulls
    assert job.blocks == ((-1, 6, 7),)


@pytest.mark.parametrize("idle", [True, False])
def test_a_plan_with_a_pull_says_whether_the_engine_does_nothing_else(idle: bool) -> None:
    ledger = expecting()
    ledger.leading("a", 0)
    ledger.allocated("a", 0, len(PROMPT), ((5, 6, 7),))
    plan = ledger.plan(idle)
    assert plan.handovers.pulls
    assert plan.idle is idle
    assert not ledger.plan(idle).idle


def test_a_pull_that_failed_is_not_tried_again() -> None:
    ledger = expecting()
    ended(ledger, pulled(ledger), landed=False)
    assert ledger.plan().handovers.released == ROWS.tickets
    assert ledger.leading("a", 0) == 0
    ledger.allocated("a", 0, 0, ((5, 6, 7),))
    assert ledger.plan().handovers is NO_HANDOVERS
    assert ledger.counts["failed_pulls"] == 1
    assert not ledger.finished("a")
    assert ledger.statistics()["requests"] == 0


def test_a_pull_ends_with_its_last_worker() -> None:
    """Rows that one of them lacks are missing."""
    ledger = ledger_of(workers=2)
    ledger.add("a", PROMPT, remote=ROWS)
    job = pulled(ledger)
    ended(ledger, job, landed=False)
    assert ledger.plan().handovers is NO_HANDOVERS
    ended(ledger, job, landed=True)
    assert ledger.plan().handovers.released == ROWS.tickets
    assert ledger.counts["failed_pulls"] == 1


@pytest.mark.parametrize("how", ["aborted", "computed", "forgotten"])
def test_rows_that_no_one_pulls_are_released(how: str) -> None:
    ledger = expecting()
    if how == "aborted":
        assert not ledger.finished("a")
    elif how == "computed":
        ledger.allocated("a", 0, 0, ((5, 6, 7),))
    else:
        assert ledger.forget()
    assert ledger.plan().handovers.released == ROWS.tickets
    assert ledger.leading("a", 0) == 0


def test_a_request_that_is_aborted_in_a_pull_keeps_its_blocks() -> None:
    """They are the engine's until the pull has ended."""
    ledger = expecting()
    job = pulled(ledger)
    assert not ledger.finished("a")
    assert ledger.statistics()["requests"] == 1
    ended(ledger, job, landed=True)
    assert ledger.plan().handovers.released == ROWS.tickets
    assert ledger.statistics()["requests"] == 0


def test_leases_are_renewed_until_the_end_of_the_pull() -> None:
    clock = Clock()
    ledger = ledger_of(clock)
    ledger.add("a", PROMPT, remote=ROWS)
    assert ledger.plan().handovers is NO_HANDOVERS
    for _ in range(2):
        clock.now += ROWS.lease / RENEWALS
        renewal = Renewal(ROWS.tickets, ROWS.lease)
        assert ledger.plan().handovers == Handovers(renewals=(renewal,))
        assert ledger.plan().handovers is NO_HANDOVERS
    job = pulled(ledger)
    clock.now += ROWS.lease / RENEWALS
    assert len(ledger.plan().handovers.renewals) == 1
    ended(ledger, job, landed=True)
    clock.now += ROWS.lease
    assert ledger.plan().handovers == Handovers(released=ROWS.tickets)


def test_a_request_does_not_choose_how_often_leases_are_renewed() -> None:
    clock = Clock()
    ledger = ledger_of(clock)
    ledger.add("a", PROMPT, remote=ROWS._replace(lease=1e-9))
    renewed = 0
    for _ in range(100):
        clock.now += 1e-3
        renewed += len(ledger.plan().handovers.renewals)
    assert renewed <= 1


ENDPOINTS = [Endpoint("ipc:///a", EPOCH), Endpoint("ipc:///b", EPOCH[::-1])]


def test_an_offer_has_one_name_in_all_workers() -> None:
    ledger = ledger_of(workers=2)
    ledger.open_offers(ENDPOINTS, 7.0)
    ledger.add("a", PROMPT)
    rows = ledger.offer("a", 40, ((1, 2, 3),))
    assert rows is not None
    assert (rows.tokens, rows.lease) == (40, 7.0)
    assert ledger.finished("a")
    plan = ledger.plan()
    (job,) = plan.handovers.offers
    assert plan.retained == ("a",)
    assert (job.request, job.tokens, job.blocks, job.lease) == ("a", 40, ((1, 2, 3),), 7.0)
    names = [Named.read(ticket) for ticket in rows.tickets]
    assert names == [Named(each.epoch, each.address, job.name) for each in ENDPOINTS]
    assert not ledger.retains  # the engine does not wait for blocks that others take
    ledger.freed(["a"])
    assert ledger.statistics()["requests"] == 0


def test_nothing_is_offered_before_workers_say_where() -> None:
    ledger = ledger_of()
    ledger.add("a", PROMPT)
    assert ledger.offer("a", 40, ((1, 2, 3),)) is None
    assert ledger.offer("unknown", 40, ((1, 2, 3),)) is None
    assert not ledger.finished("a")


def test_offers_end_when_other_weights_are_loaded() -> None:
    ledger = ledger_of()
    ledger.open_offers(ENDPOINTS[:1], 7.0)
    for name in ("a", "b"):
        ledger.add(name, PROMPT)
    rows = ledger.offer("a", 40, ((1, 2, 3),))
    assert rows is not None
    assert ledger.finished("a")
    ledger.forget()
    plan = ledger.plan()
    named = Named.read(rows.tickets[0])
    assert named is not None
    assert plan.handovers == Handovers(revoked=True, withdrawn=(named.name,))
    assert plan.retained == ("a",)
    ledger.forget()
    assert ledger.plan().handovers == Handovers(revoked=True)
    assert ledger.offer("b", 40, ((1, 2, 3),)) is None


def test_ends_of_offers_are_counted() -> None:
    ledger = ledger_of()
    one = Report()
    one.end_offer("taken")
    other = Report()
    other.end_offer("expired")
    ledger.take(one.merged(other).merged(one))
    assert ledger.counts["offers_taken"] == 2
    assert ledger.counts["offers_expired"] == 1


def test_rows_that_were_pulled_are_saved() -> None:
    """A store of the decode engine has them for the next turn of a conversation."""

    class Empty(NoStore):
        def has(self, key: bytes, /) -> bool:
            return False

    ledger = Ledger(16, [Group(16)], 1, Empty(), Clock())
    ledger.add("a", PROMPT, remote=ROWS)
    ended(ledger, pulled(ledger), landed=True)
    ledger.scheduled("a", 39, 40, ((5, 6, 7),), replaced=True)
    (save,) = ledger.plan().saves
    assert (save.first, len(save.keys), save.blocks) == (0, 2, ((5, 6),))
