# SPDX-License-Identifier: Apache-2.0
"""The scheduler side of an engine with several steps in flight: those of the stages of a pipeline,
or those of a scheduler that plans ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from support.serving_faults import GivenBackAtOnce, NotHeld, NotStopped
from support.serving_stages import StagedEngine, StoreOfOne

from portakv.serving import Group, SchedulerSide

WALKS = 2_000  # in all
PARTS = 4
STEPS = 24  # of a walk, before it serves the requests that are left
AHEAD = 200  # walks of a scheduler that plans ahead


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(x, marks=pytest.mark.full) for x in range(1, PARTS))]
)
def test_any_walk_of_an_engine_with_stages(part: int) -> None:
    """No block in two hands in any stage, no end twice, and every request ends."""
    walked(part)


@cache
def walked(part: int) -> Counter[str]:
    """Return what the walks of a part counted, and how many times a request was preempted."""
    counts = Counter[str]()
    for seed in range(part * WALKS // PARTS, (part + 1) * WALKS // PARTS):
        depth = 2 + seed % 3
        engine = StagedEngine(SchedulerSide, seed, depth=depth)
        engine.run(STEPS)
        counts.update(engine.scheduler_side.counts)
        assert engine.most == depth
        counts["preempted"] += sum(each.preemptions for each in engine.requests.values())
    return counts


def test_walks_have_steps_in_flight_and_load_save_and_fail() -> None:
    """Otherwise they show nothing of these."""
    counts = walked(0)
    assert counts["saves"] > 1000
    assert counts["landed_blocks"] > 100
    assert counts["failed_loads"] > 10
    assert counts["preempted"] > 100


class FirstReport(SchedulerSide):
    """A scheduler side that takes the report of the first stage for that of all."""

    def __init__(
        self, block_size: int, groups: Sequence[Group], workers: int, *args: Any, **terms: Any
    ) -> None:
        super().__init__(block_size, groups, 1, *args, **terms)


@pytest.mark.parametrize(
    "made",
    [GivenBackAtOnce, NotStopped, NotHeld, FirstReport],
)
def test_walks_find_a_scheduler_side_with_a_bug(made: type[SchedulerSide]) -> None:
    def walks() -> None:
        for seed in range(400):
            StagedEngine(made, seed, depth=2).run(STEPS)

    with pytest.raises(AssertionError, match="a save read rows of something else"):
        walks()


def test_any_walk_of_an_engine_that_schedules_ahead() -> None:
    """One worker. A step is planned before the scheduler has the report of the step before it."""
    counts = Counter[str]()
    for seed in range(AHEAD):
        engine = StagedEngine(SchedulerSide, seed, StoreOfOne, depth=2)
        engine.run(STEPS)
        assert engine.most == 2
        counts.update(engine.scheduler_side.counts)
        counts["preempted"] += sum(each.preemptions for each in engine.requests.values())
    assert counts["saves"] > 500
    assert counts["landed_blocks"] > 100
    assert counts["failed_loads"] > 10
    assert counts["preempted"] > 50


@pytest.mark.parametrize("made", [GivenBackAtOnce, NotStopped, NotHeld])
def test_walks_ahead_find_a_scheduler_side_with_a_bug(made: type[SchedulerSide]) -> None:
    def walks() -> None:
        for seed in range(2 * AHEAD):
            StagedEngine(made, seed, StoreOfOne, depth=2).run(STEPS)

    with pytest.raises(AssertionError, match="a save read rows of something else"):
        walks()
