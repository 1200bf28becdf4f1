# SPDX-License-Identifier: Apache-2.0
"""Compare a pool with a simple model, by any order of calls that Hypothesis draws."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from support.pinned_runtime import absent
from support.pool_model import Memory, PoolModel, Waiter, Work

from portakv.host.pinned import HostMemoryError
from portakv.host.pool import Block, Extents, PinnedPool

pytestmark = [
    pytest.mark.filterwarnings("ignore:Expected pinned host memory"),
    pytest.mark.filterwarnings("ignore:Blocks were in use:ResourceWarning"),
]
SIZE = 100
ALIGNMENT = 128
AT = st.integers(0, 99)  # chooses among the blocks that are there
COUNTS = st.sampled_from((0, 1, 1, 2, 3, 5, 9))
#: Sizes of blocks; None: of the pool's own.
SIZES = st.sampled_from((None, None, 1, SIZE + 1, SIZE + ALIGNMENT, 300, 500))
Make = Callable[[], Any]


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Memory that a machine may take away; callers that wait look for it often."""
    with pytest.MonkeyPatch.context() as patch:
        absent(patch)
        patch.setattr("portakv.host.pool.GROW_AGAIN", 0.002)
        yield Memory(patch)
    gc.collect()  # later tests compare how much pinned memory there is before and after


class PoolMachine(RuleBasedStateMachine):
    """Calls of one pool by one thread, while other threads wait for blocks."""

    def __init__(self, make: Make, memory: Memory, grow: int, any_size: bool = False) -> None:
        super().__init__()
        self.any_size = any_size
        self.memory = memory
        memory.most = None
        memory.pieces.clear()
        self.pool = make()
        self.model = PoolModel(self.pool, memory, grow, ALIGNMENT)
        self.owners = itertools.count()

    @rule(count=COUNTS, size=SIZES)
    def acquire(self, count: int, size: int | None) -> None:
        """Acquire blocks, or none."""
        size = size if self.any_size else None
        self.model.acquire(count, size, f"owner {next(self.owners)}.")
        self.model.settle()

    @precondition(lambda self: len(self.model.waiters) < 3)
    @rule(count=st.integers(1, 3), size=SIZES)
    def wait(self, count: int, size: int | None) -> None:
        """Let another thread wait for blocks."""
        size = size if self.any_size else None
        waiter = Waiter(self.pool, count, size, f"owner {next(self.owners)}.")
        self.model.waiters.append(waiter)
        self.model.settle()

    @precondition(lambda self: self.model.used)
    @rule(at=AT, use=st.booleans())
    def release(self, at: int, use: bool) -> None:
        """Release a block, which work may still use; to release it again fails."""
        used = self.model.used.pop(at % len(self.model.used))
        work = Work() if use else None
        if work is not None:
            self.model.busy.append((used.block, work))
        used.check()
        used.block.release(work)
        assert not used.block.in_use
        with pytest.raises(HostMemoryError, match="released twice"):
            used.block.release()
        self.model.settle()

    @precondition(lambda self: self.model.busy)
    @rule(at=AT, fails=st.booleans())
    def end_work(self, at: int, fails: bool) -> None:
        """End work that used a block."""
        _, work = self.model.busy[at % len(self.model.busy)]
        work.fails = fails
        work.ended = True
        self.model.settle()

    @rule(most=st.sampled_from((None, None, 0, 1, 2)))
    def change_memory(self, most: int | None) -> None:
        """Let the machine have memory for so many blocks at a time."""
        self.memory.most = None if most is None else most * ALIGNMENT
        self.model.settle(changing=True)

    def teardown(self) -> None:
        """Close the pool."""
        if sys.exc_info()[0] is None and self.any_size and not self.model.waiters:
            self.model.release_all()
        for _, work in self.model.busy:
            work.ended = True
        if sys.exc_info()[0] is None:
            self.model.settle()
            self.model.end(self.pool.close)
        else:
            self.pool.close()


def run(machine: Callable[[], PoolMachine], times: float, **terms: Any) -> None:
    """Run a machine so many times as often as the profile says."""
    many = max(1, int(times * settings().max_examples))
    chosen = settings(max_examples=many, stateful_step_count=40, **terms)
    run_machine(machine, settings=chosen)  # type: ignore[arg-type]


WIDE = pytest.param(10.0, marks=pytest.mark.full)


@pytest.mark.parametrize("times", [0.5, WIDE])
@pytest.mark.parametrize("limit", [3, 9])
def test_any_order_of_calls(memory: Memory, limit: int, times: float) -> None:
    make: Make = lambda: PinnedPool(SIZE, 2, limit=limit, grow=3, alignment=ALIGNMENT)  # noqa: E731
    run(lambda: PoolMachine(make, memory, 3), times)


@pytest.mark.parametrize("times", [0.5, WIDE])
@pytest.mark.parametrize(("limit", "grow"), [(20, 3), (9, 9)])
def test_any_order_of_blocks_of_any_size(
    memory: Memory, limit: int, grow: int, times: float
) -> None:
    make: Make = lambda: PinnedPool(SIZE, 9, limit=limit, grow=grow, alignment=ALIGNMENT)  # noqa: E731
    run(lambda: PoolMachine(make, memory, grow, any_size=True), times)


# --- seeded bugs, each of which the machine has to find -------------------------------------------


class IgnoresWork(PinnedPool):
    """A pool that hands a block out while work uses it."""

    def release(self, block: Block, after: object = None) -> None:
        super().release(block)


class LosesBlocks(PinnedPool):
    """A pool that loses the second of two blocks."""

    def acquire_many(self, count: int, *numbers: Any, **terms: Any) -> list[Block]:
        blocks = super().acquire_many(count, *numbers, **terms)
        return [*blocks[:-1], blocks[0]] if count > 1 else blocks


class GrowsOn(PinnedPool):
    """A pool that ignores its limit."""

    def acquire_many(self, count: int, *numbers: Any, **terms: Any) -> list[Block]:
        self.limit += 1
        return super().acquire_many(count, *numbers, **terms)


class NeverWaits(PinnedPool):
    """A pool whose callers do not wait."""

    def acquire_many(self, count: int, owner: str = "", **terms: Any) -> list[Block]:
        return super().acquire_many(count, owner)


class KeepsUnits(Extents):
    """Extents that get one unit of a larger block back."""

    def give(self, first: int, count: int, evicted: bool = False) -> None:
        super().give(first, 1)


class LosesUnits(PinnedPool):
    """A pool that loses memory of larger blocks."""

    def _add(self, blocks: int, units: int = 1) -> None:
        if not self.blocks:
            self._units = KeepsUnits()
        super()._add(blocks, units)


class TakesTooLittle(PinnedPool):
    """A pool whose larger blocks overlap."""

    def _units_of(self, nbytes: int) -> int:
        return max(1, super()._units_of(nbytes) - 1)


@pytest.mark.parametrize("bug", [LosesUnits, TakesTooLittle])
def test_the_machine_finds_with_blocks_of_any_size(memory: Memory, bug: type[PinnedPool]) -> None:
    make: Make = lambda: bug(SIZE, 9, limit=20, grow=3, alignment=ALIGNMENT)  # noqa: E731
    with pytest.raises(AssertionError):
        run(lambda: PoolMachine(make, memory, 3, True), 2.0, phases=[Phase.generate])


@pytest.mark.parametrize("bug", [IgnoresWork, LosesBlocks, GrowsOn, NeverWaits])
def test_the_machine_finds(memory: Memory, bug: type[PinnedPool]) -> None:
    make: Make = lambda: bug(SIZE, 2, limit=5, grow=3, alignment=ALIGNMENT)  # noqa: E731
    with pytest.raises(AssertionError):
        run(lambda: PoolMachine(make, memory, 3), 2.0, phases=[Phase.generate])
