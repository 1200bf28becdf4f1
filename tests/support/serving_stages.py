# SPDX-License-Identifier: Apache-2.0
"""The model of a serving engine whose workers are the stages of a pipeline, or one worker whose
scheduler plans ahead (vLLM's asynchronous scheduling).

Several steps are in flight: the scheduler plans a step before it knows the tokens and the reports
of the steps before it, and each stage carries out the steps in their order, but later than the
stage before it. As in vLLM, a request whose blocks are taken, or that is aborted, may be part of
steps that are in flight; what they compute is dropped.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from portakv.serving import Plan, SchedulerSide
from support.serving_model import Draw, Engine, Request, Store, Worker

PACE = 0.6  # the chance that a stage carries out its next step meanwhile


class StagedStore(Store):
    """A store of the parts of two or three stages."""

    def __init__(self, chance: random.Random, draw: Draw) -> None:
        draw.workers = chance.choice([2, 3])
        super().__init__(chance, draw)


class StoreOfOne(Store):
    """The store of one worker."""

    def __init__(self, chance: random.Random, draw: Draw) -> None:
        draw.workers = 1
        super().__init__(chance, draw)


class Part(NamedTuple):
    """The part of a request in a step, as it was when the step was planned.

    Attributes:
        computed: tokens before this one are there.
        past: tokens before this one are there after the step.
        preemptions: of the request; with more of them, the step computes for nothing.
    """

    request: Request
    rows: list[int]
    blocks: list[int]
    computed: int
    past: int
    preemptions: int


class Flight(NamedTuple):
    """A step that is in flight."""

    plan: Plan
    parts: list[Part]


class StagedEngine(Engine):
    """An engine whose workers carry out a step one after the other.

    Args:
        depth: the most steps in flight.
    """

    def __init__(
        self,
        made: type[SchedulerSide],
        seed: int,
        store: Callable[[random.Random, Draw], Any] = StagedStore,
        worker: Callable[[Engine, int], Any] = Worker,
        depth: int = 2,
    ) -> None:
        super().__init__(made, seed, store, worker)
        self._depth = depth
        self._flights = deque[Flight]()
        self._carried = [0] * self.draw.workers  # the flights that a stage has carried out
        self.most = 0  # flights that were planned before the first of them had ended

    def step(self) -> None:
        """Plan a step if there is room, let stages go on, and take the output of the oldest."""
        if len(self._flights) < self._depth:
            self._flights.append(self._plan())
            self.most = max(self.most, len(self._flights))
        before = len(self._flights)
        for stage, carried in enumerate(self._carried):
            if carried < before and self.chance.random() < PACE:
                self._carry_out(stage, self._flights[carried])
                self._carried[stage] += 1
            before = self._carried[stage]
        if before:  # the last stage has carried out the oldest step
            self._take_output(self._flights.popleft())
            self._carried = [carried - 1 for carried in self._carried]
        self.store.age()

    @property
    def idle(self) -> bool:
        """Return whether no request and no step is left."""
        return super().idle and not any(flight.parts for flight in self._flights)

    def _plan(self) -> Flight:
        """Plan a step, after which its tokens count as computed."""
        plan, until = self.schedule()
        parts = list[Part]()
        for request, (_, past) in until.items():
            rows = request.rows
            blocks = [*request.blocks]
            part = Part(request, rows, blocks, request.computed, past, request.preemptions)
            parts.append(part)
            request.computed = past
            self.pool.cache(request)
        return Flight(plan, parts)

    def _carry_out(self, stage: int, flight: Flight) -> None:
        """Write the rows of a step in one stage; what they depend on must be right there."""
        worker = self.workers[stage]
        worker.before_step(flight.plan)
        window = self.draw.window
        size = self.draw.block_size
        for part in flight.parts:
            first = 0 if window is None else max(0, part.computed - window + 1)
            for token in range(first, part.past):
                block = part.blocks[token // size]
                if token >= part.computed:
                    worker.write(block, token % size, part.rows[token])
                row = worker.row(block, token % size)
                assert row == part.rows[token], "a request reads other rows"
        worker.after_step(flight.plan)

    def _take_output(self, flight: Flight) -> None:
        """Take the reports of all stages, and the tokens that the last one has sampled."""
        self.take_reports()
        for part in flight.parts:
            request = part.request
            is_last = part.past == len(request.tokens)
            if is_last and part.preemptions == request.preemptions:
                self.advance(request)
