# SPDX-License-Identifier: Apache-2.0
"""Requests that a prefill engine hands over to a decode engine, each a simulated process of a
schedule, and their judge.

The prefill engine has other rows in the blocks of a request as soon as it does not lend them any
more. The decode engine pulls at a drawn time, perhaps long after the first lease, or never.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from portakv.serving.handover import Handover, HandoverTerms, Tickets
from portakv.serving.plan import PullJob, RemoteRows
from support.migrate_pulls import MODEL, Rows
from support.schedules import Schedule

TOKENS = 8  # of each request: two blocks
BLOCKS = 16
NOTHING = -1
LEASE = 8.0
TERMS = HandoverTerms(lease=LEASE, timeout=20.0)
#: Seconds in which each engine is done, whatever happens to the other one.
PATIENCE = 300.0


@dataclass
class Handed:
    """A request as it is drawn, and how far it is.

    Attributes:
        number: of the request; ``value``: of its rows.
        delay: seconds until the prefill engine has computed it.
        early: the decode engine may learn of the offer before a worker makes it.
        late: seconds after which the decode engine pulls its rows, or with ``aborts`` needs them no
            longer.
        rows: as the decode engine gets them.
        void: its offer was revoked; ``begun_void``: before the pull began.
        offered: when the prefill engine's worker had made the offer.
        released, freed: when the decode engine needed the rows no longer, and when the prefill
            engine had the blocks again.
    """

    number: int
    delay: float
    early: bool
    late: float
    aborts: bool
    rows: RemoteRows | None = None
    void: bool = False
    expected: float | None = None
    pulled: bool = False
    begun_void: bool = False
    offered: float | None = None
    released: float | None = None
    freed: float | None = None

    @property
    def name(self) -> str:
        return f"request {self.number}"

    @property
    def value(self) -> int:
        return 100 * (self.number + 1)

    @property
    def src(self) -> list[int]:
        return [2 * self.number, 2 * self.number + 1]

    @property
    def dst(self) -> list[int]:
        return [block + 6 for block in self.src]


class HandOvers:
    """Both engines of one schedule. Their memory is the same for all schedules."""

    src = Rows(BLOCKS, 4, fill=NOTHING)
    dst = Rows(BLOCKS, 4, fill=NOTHING)

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.random = schedule.random
        self.src.whole.fill_(NOTHING)
        self.dst.whole.fill_(NOTHING)
        self.prefill = schedule.process("prefill")
        self.decode = schedule.process("decode")
        self.handed = [self.draw(number) for number in range(self.random.choice((1, 1, 2)))]
        #: When the prefill engine revokes all offers; None: it does not.
        self.revokes = self.moment() if self.random.random() < 0.25 else None
        self.failed = False  # a process has died, or connections have ended

    def moment(self) -> float:
        """Draw some seconds."""
        return self.random.choice((0.0, 0.0, 2e-3, 0.05, 0.5, 2.0))

    def draw(self, number: int) -> Handed:
        """Draw a request."""
        random = self.random
        late = random.choice((0.0, 0.0, 0.0, 0.0, 0.05, 2 * LEASE))
        return Handed(number, self.moment(), random.random() < 0.5, late, random.random() < 0.2)

    def pause(self) -> None:
        """Let a step of an engine pass."""
        self.schedule.sleep(self.random.choice((0.01, 0.5, 1.0)))

    # --- the prefill engine

    def begin_prefill(self) -> None:
        """Make the worker of the prefill engine."""
        self.offering = Handover([self.src.shard], MODEL, TERMS, pulls=False)

    def run_prefill(self) -> None:
        """Offer the rows of each request, until all blocks are free again."""
        tickets = Tickets(time.monotonic)
        endpoint = self.offering.endpoint
        assert endpoint is not None
        tickets.open([endpoint], TERMS.lease)
        begun = time.monotonic()
        planned = [*self.handed]
        while any(each.freed is None for each in self.handed):
            age = time.monotonic() - begun
            for each in [each for each in planned if each.delay <= age]:
                planned.remove(each)
                self.write(each)
                rows = tickets.offer(each.name, TOKENS, ((*each.src,),))
                if each.early:
                    each.rows = rows
                else:
                    self.schedule.begin(self.prefill, self.carry, each, rows)
            offered = [each for each in self.handed if each not in planned]
            revoked = self.revokes is not None and self.revokes <= age
            if revoked:
                self.revokes = None
                tickets.revoke()
            self.offering.begin(tickets.plan())
            for each in offered:
                each.offered = each.offered or time.monotonic()
                each.void = each.void or revoked
            self.free(offered)
            self.pause()

    def carry(self, each: Handed, rows: RemoteRows) -> None:
        """Let the decode engine know of an offer after a while."""
        self.schedule.sleep(self.moment())
        each.rows = rows

    def write(self, each: Handed) -> None:
        """Compute the rows of a request: each layer and each token has other bytes."""
        for layer in range(2):
            for token in range(TOKENS):
                row = self.src.whole[layer, :, each.src[token // 4], token % 4]
                row.fill_(each.value + 10 * layer + token)

    def free(self, offered: list[Handed]) -> None:
        """Use the blocks again of requests whose rows are not lent any more."""
        self.offering.ended_offers()
        lent = self.offering.lending
        for each in offered:
            if each.freed is None and each.name not in lent:
                each.freed = time.monotonic()
                self.src.whole[:, :, each.src] = -each.value

    # --- the decode engine

    def begin_decode(self) -> None:
        """Make the worker of the decode engine."""
        self.pulling = Handover([self.dst.shard], MODEL, TERMS, offers=False)

    def run_decode(self) -> None:
        """Pull the rows of each request, and release them."""
        tickets = Tickets(time.monotonic)
        while self.left():
            now = time.monotonic()
            for each in self.left():
                if each.rows is not None and each.expected is None:
                    each.expected = now
                    tickets.expect(each.name, each.rows)
                if each.expected is None or each.pulled or now < each.expected + each.late:
                    continue
                if each.aborts:
                    self.release(tickets, each)
                else:
                    self.plan_pull(tickets, each)
            self.step(tickets)
            self.pause()
        self.step(tickets)  # sends what is released

    def left(self) -> list[Handed]:
        """Return the requests that are not done, and may still come."""
        return [
            each
            for each in self.handed
            if each.released is None and not (self.prefill.dead and each.rows is None)
        ]

    def plan_pull(self, tickets: Tickets, each: Handed) -> None:
        """Plan the pull of a request."""
        assert each.rows is not None
        each.pulled = True
        into = ((*each.dst,),)
        tickets.pull(PullJob(each.number, each.name, each.rows.tickets, 0, TOKENS, into))

    def step(self, tickets: Tickets) -> None:
        """Carry a plan out, and judge the pulls that have ended."""
        plan = tickets.plan()
        for job in plan.pulls:
            each = self.handed[job.number]
            each.begun_void = each.void
        self.pulling.begin(plan)
        for job, landed in self.pulling.ended_pulls():
            each = self.handed[job.number]
            self.judge(each, landed)
            self.release(tickets, each)

    def release(self, tickets: Tickets, each: Handed) -> None:
        """Need the rows of a request no longer."""
        each.released = time.monotonic()
        tickets.release(each.name)

    def judge(self, each: Handed, landed: bool) -> None:
        """Judge how a pull has ended."""
        if not landed:
            assert each.void or self.failed, "rows that are lent did not come"
            return
        assert not each.begun_void, "rows came that were revoked before"
        rows = self.dst.rows(each.dst, TOKENS)
        expected = torch.arange(TOKENS) + each.value
        for layer in range(2):
            right = rows[layer] == (expected + 10 * layer)[:, None, None]
            assert right.all(), "rows that were handed over are wrong"

    # --- the whole

    def fail(self) -> None:
        """End one of the processes, or its connections, at a time that is drawn."""
        self.schedule.sleep(self.moment() + self.moment())
        self.failed = True
        process = self.random.choice((self.prefill, self.decode))
        if self.random.random() < 0.5:
            self.schedule.kill(process)
        else:
            self.schedule.cut(process)

    def run(self) -> None:
        """Hand all requests over, and judge what is left."""
        schedule = self.schedule
        schedule.call(self.prefill, self.begin_prefill)
        schedule.call(self.decode, self.begin_decode)
        threads: dict[Any, Any] = {
            self.prefill: schedule.begin(self.prefill, self.run_prefill),
            self.decode: schedule.begin(self.decode, self.run_decode),
        }
        if self.random.random() < 0.3:
            self.fail()
        for process, thread in threads.items():
            if not process.dead:
                thread.join(PATIENCE)
                assert thread.over or process.dead, f"the {process.name} engine hangs"
        for each in self.handed if not self.failed else ():
            self.judge_release(each)
        for process, handover in ((self.decode, "pulling"), (self.prefill, "offering")):
            if not process.dead:
                schedule.call(process, self.close, getattr(self, handover))

    def judge_release(self, each: Handed) -> None:
        """Judge that blocks were free soon after the decode engine needed them no longer."""
        assert each.offered is not None
        assert each.released is not None
        assert each.freed is not None
        kept = each.freed - max(each.offered, each.released)
        assert kept < LEASE / 2, f"blocks were lent for {kept:.1f} s after their release"

    def close(self, handover: Handover) -> None:
        """Close a worker, which has nothing left."""
        assert not handover.pulling
        handover.close()
        if handover.owner is not None:
            statistics = handover.owner.statistics()
            held = statistics["held"]
            assert held == statistics["slots"] == 0, f"an owner that is closed has {statistics}"


def handovers(schedule: Schedule) -> None:
    """Hand the requests of one schedule over."""
    with patch("portakv.serving.handover.token_bytes", schedule.random.randbytes):
        HandOvers(schedule).run()
