# SPDX-License-Identifier: Apache-2.0
"""A limit lets as many work as it has places, in the order in which the work is due."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.seeded_loop import run_seeded

from portakv.tasks import Limit, Rate, Runtime, Turn, Wait
from portakv.tasks.runtime import Priority


@pytest.mark.parametrize("seed", range(10))
def test_no_more_work_than_places(seed: int) -> None:
    now = [0, 0]

    async def steps(of_test: Runtime) -> None:
        limit = Limit(of_test, width=3)

        async def work(n: int) -> None:
            assert await limit.acquire()
            now[0] += 1
            now[1] = max(now)
            await Wait(until=of_test.time() + n)
            now[0] -= 1
            limit.release()

        for each in [of_test.start(work(n)) for n in range(1, 9)]:
            await each

    run_seeded(seed, steps)
    assert now == [0, 3]


def begun(requests: list[tuple[float, Priority]]) -> list[int]:
    """Return the order in which work begins that is requested at times, by priorities."""
    order = list[int]()

    async def steps(of_test: Runtime) -> None:
        limit = Limit(of_test)
        await limit.acquire()

        async def work(n: int, at: float, priority: Priority) -> None:
            await Wait(until=at)
            await limit.acquire(priority=priority)
            order.append(n)
            limit.release()

        handles = [of_test.start(work(n, *each)) for n, each in enumerate(requests)]
        await Wait(until=10.0)
        limit.release()
        for each in handles:
            await each

    run_seeded(1, steps)
    return order


def test_the_order_is_that_of_due_times() -> None:
    assert begun([(1.0, "background"), (1.1, "normal"), (1.12, "urgent"), (1.2, "normal")]) == [
        2,
        1,
        3,
        0,
    ]
    assert begun([(1.0, "background"), (4.0, "urgent")]) == [0, 1], "it has waited long enough"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("end", ["late", "cancelled"])
def test_work_that_gives_up_leaves_its_place(end: str, seed: int) -> None:
    async def steps(of_test: Runtime) -> None:
        limit = Limit(of_test)
        assert await limit.acquire()
        late = of_test.start(limit.acquire(until=1.0 if end == "late" else None))
        if end == "cancelled":
            await Wait(until=1.0)
            late.cancel()
        limit_ends = of_test.start(limit.acquire())
        await Wait(until=1.0)
        limit.release()
        if end == "late" and await late:  # the place came in time
            limit.release()
        assert await limit_ends

    run_seeded(seed, steps)


def test_work_keeps_a_rate() -> None:
    starts = list[float]()

    async def steps(of_test: Runtime) -> None:
        limit = Limit(of_test, width=4, gbps=1.0)

        async def work() -> None:
            assert await limit.acquire(10**9)
            starts.append(of_test.time())
            limit.release()

        for each in [of_test.start(work()) for _ in range(4)]:
            await each
        assert not await limit.acquire(10**9, until=of_test.time() + 0.5)

    run_seeded(3, steps)
    assert [round(x, 6) for x in starts] == [0.0, 1.0, 2.0, 3.0]


def test_work_that_waits_for_a_rate_has_no_place_and_is_overtaken() -> None:
    starts = list[tuple[str, float]]()

    async def steps(of_test: Runtime) -> None:
        limit = Limit(of_test, gbps=1.0)

        async def work(name: str, priority: Priority) -> None:
            assert await limit.acquire(10**9, priority)
            starts.append((name, round(of_test.time(), 6)))
            limit.release()

        handles = [of_test.start(work("first", "urgent"))]
        await Wait(until=0.1)
        handles.append(of_test.start(work("normal", "normal")))
        await Wait(until=0.12)
        handles.append(of_test.start(work("urgent", "urgent")))
        await Wait(until=0.3)
        assert not await limit.acquire(1, until=0.4)
        for each in handles:
            await each

    run_seeded(5, steps)
    assert starts == [("first", 0.0), ("urgent", 1.0), ("normal", 2.0)]


def turn(due: float, number: int, background: bool = False, alone: bool = False) -> Turn:
    """Return the turn of some work."""
    made = Turn(due, number)
    made.background = background
    made.alone = alone
    return made


@pytest.mark.parametrize("seed", range(10))
def test_work_of_the_background_leaves_a_place_and_some_of_it_runs_alone(seed: int) -> None:
    async def steps(of_test: Runtime) -> None:
        limit = Limit(of_test, width=4)
        turns = [turn(0.0, n, True, alone=n < 2) for n in range(6)]
        turns.append(turn(9.0, 9))  # due after all others

        async def work(each: Turn) -> None:
            if await limit.take(each, Wait(until=20.0)):
                await Wait(until=10.0 + each.number)
                limit.release(each)

        handles = [of_test.start(work(each)) for each in turns]
        await Wait(until=5.0)
        assert [each.begun for each in turns] == [True, False, True, True, False, False, True]
        await Wait(until=10.5)  # the first one has ended
        assert [each.begun for each in turns] == [True, True, True, True, False, False, True]
        for each in handles:
            await each
        assert all(each.begun for each in turns)

    run_seeded(seed, steps)


def test_a_turn_that_becomes_due_sooner_is_the_next_once() -> None:
    order = list[int]()

    async def steps(of_test: Runtime) -> None:
        limit = Limit(of_test)
        await limit.acquire()
        turns = [turn(float(n), n, background=True) for n in range(3)]

        async def work(each: Turn) -> None:
            assert await limit.take(each, Wait(here=True))
            order.append(each.number)
            limit.release(each)

        handles = [of_test.start(work(each)) for each in turns]
        await Wait(until=1.0)
        turns[2].due = -1.0
        turns[2].background = False
        limit.push(turns[2])
        limit.release()
        for each in handles:
            await each
        assert await limit.acquire(until=of_test.time() + 1.0), "the former entry took a place"

    run_seeded(2, steps)
    assert order == [2, 0, 1]


def test_when_slices_may_start() -> None:
    watch = SimpleNamespace(time=100.0)
    rate = Rate(2.0, lambda: watch.time)  # 2 bytes in a nanosecond
    assert rate.left() == 0.0
    rate.start(2_000_000)
    assert rate.left() == pytest.approx(1e-3)
    watch.time += 1.5e-3  # it overslept
    assert rate.left() == 0.0
    rate.start(2_000_000)
    assert rate.left() == pytest.approx(0.5e-3)
    watch.time += 0.5e-3
    rate.start(4_000_000)
    assert rate.left() == pytest.approx(2e-3)
    watch.time += 1.0  # the link was busy for long: not all of it may be made up for
    pauses = []
    for _ in range(3):
        pauses.append(rate.left())
        rate.start(2_000_000)
    assert pauses == [0.0, 0.0, pytest.approx(1e-3)]


def test_over_many_slices_the_rate_is_kept_whatever_sleeps_too_long() -> None:
    watch = SimpleNamespace(time=100.0)
    total = 0
    rate = Rate(1.0, lambda: watch.time)
    for nth in range(1000):
        watch.time += rate.left() + (nth % 7) * 1e-5
        rate.start(100_000)
        total += 100_000
    assert total / (watch.time - 100.0) / 1e9 == pytest.approx(1.0, rel=0.05)
