# SPDX-License-Identifier: Apache-2.0
"""Compare a transfer graph with a simple model, by any order of calls that Hypothesis draws."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from support.graph_ends import end_of, run_in_turn, submit
from support.graph_model import BLOCKS, SLACK, STALL, WIDTHS, Known, Model, Work
from support.seeded_loop import SetLoop
from support.waits import LIMIT

from portakv.errors import TransferError
from portakv.storage.work import End, Graph, Handle, Task

BITS = st.lists(st.booleans(), min_size=BLOCKS, max_size=BLOCKS)
AT = st.integers(0, 99)  # chooses among the things that are there
RESULTS = (None, None, None, [True], "no mask", ValueError("as planned"), OSError("as planned"))


class Terms(NamedTuple):
    """The common terms of the tasks of one call."""

    priority: Any
    deadline: float | None


GROUPS = st.lists(st.sampled_from([*WIDTHS]), min_size=1, max_size=4)  # the queue of each task
TERMS = st.builds(
    Terms,
    priority=st.sampled_from(tuple(SLACK)),
    deadline=st.sampled_from((None, None, None, None, 0.0, 0.04, 0.5, 3.0)),
)


class GraphMachine(RuleBasedStateMachine):
    """Calls of a graph whose clock and work stand still between them."""

    def __init__(self, kind: type[Graph] = Graph, task: type[Task] = Task) -> None:
        super().__init__()
        self.task = task
        self.clock = SetLoop()
        self.graph = kind(runtime=self.clock.runtime)
        self.model = Model(self.graph, self.clock)
        for name, width in WIDTHS.items():
            self.graph.queue(name, width, stall_seconds=STALL)

    @rule(queues=GROUPS, ends=st.booleans(), terms=TERMS)
    def submit(self, queues: list[str], ends: bool, terms: Terms) -> None:
        """Submit tasks, and perhaps wait for the end of all by a handle."""
        group = [self.known(queue, [], number, terms) for number, queue in enumerate(queues)]
        tasks = [known.task for known in group if isinstance(known.task, Task)]
        submit(self.graph, tasks, priority=terms.priority, deadline=terms.deadline)
        self.model.submit(group, terms.deadline)
        if ends:
            self.end(group)
        self.model.settle()

    @rule(queues=GROUPS, ends=st.booleans())
    def chain(self, queues: list[str], ends: bool) -> None:
        """Run tasks one after the other, each for the blocks that the one before it landed."""
        group = list[Known]()
        for number, queue in enumerate(queues):
            group.append(self.known(queue, [*group], number, Terms("normal", None)))
        run_in_turn(self.graph, [known.task for known in group if isinstance(known.task, Task)])
        self.model.submit(group, None)
        if ends:
            self.end(group)
        self.model.settle()

    def known(self, queue: str, after: list[Known], at: int, terms: Terms) -> Known:
        """Return a task, as the model knows it."""
        number = len(self.model.tasks) + at
        work = Work(self.model.log)
        name = f"task {number}"
        task = self.task(work, BLOCKS, queue=self.graph.queue(queue), nbytes=number, name=name)
        due = self.clock.time() + SLACK[terms.priority]
        return Known(task, number, after, work, due, terms.priority == "background")

    def end(self, group: list[Known]) -> None:
        """Wait for the end of tasks by a handle."""
        tasks = [known.task for known in group if isinstance(known.task, Task)]
        end = end_of(self.graph, tasks, BLOCKS)
        known = Known(end, len(self.model.tasks), [*group])
        known.handle = Handle(end, missing="skip")
        self.model.submit([known], None)

    @rule(at=AT, result=st.sampled_from(RESULTS) | BITS, together=st.sampled_from((1, 1, 3)))
    def finish(self, at: int, result: Any, together: int) -> None:
        """End the work of running tasks."""
        running = self.model.running
        if not running:  # a precondition would make the draws depend on the order of threads
            return
        works = [running[(at + n) % len(running)].work for n in range(together)]
        for work in works:
            assert work is not None
            work.result = result
        for work in works:
            assert work is not None
            work.go.set()
        self.model.settle(in_order=together == 1)

    @precondition(lambda self: self.model.tasks)
    @rule(at=AT)
    def cancel(self, at: int) -> None:
        """Cancel one of the last tasks."""
        known = self.model.tasks[-1 - at % min(12, len(self.model.tasks))]
        changed = known.handle.cancel() if known.handle else known.task.cancel()
        assert changed == self.model.cancel(known), f"cancel of task {known.number}: {changed}"
        self.model.settle()

    @rule(seconds=st.sampled_from((0.03, 0.3, 1.0, 2.5)))
    def advance(self, seconds: float) -> None:
        """Let time pass, from one deadline to the next."""
        end = self.clock.time() + seconds
        stops = sorted({when for when, _ in self.model.timers if when < end})
        for at in (*stops, end):
            self.clock.set(at)
            self.model.expire()
            self.model.settle()

    def teardown(self) -> None:
        """Close the graph: tasks that run may end, and no other task starts."""
        sound = sys.exc_info()[0] is None
        closed = self.graph.close(0.0)
        works = [known.work for known in self.model.tasks if known.work]
        try:
            if sound:
                self.model.close()
                self.model.compare()
                assert closed == all(known.ended for known in self.model.tasks)
        finally:
            for work in works:
                work.go.set()
        assert self.graph.close(LIMIT) or not sound
        self.clock.end()
        if sound:
            self.model.compare()
            assert all(known.final for known in self.model.tasks)
            with pytest.raises(TransferError, match="closed"):
                self.graph.check_open()


WIDE = pytest.param(10.0, marks=pytest.mark.full)


@pytest.mark.parametrize("times", [1.0, WIDE])
def test_any_order_of_calls(times: float) -> None:
    many = max(1, int(times * settings().max_examples))
    run_machine(GraphMachine, settings=settings(max_examples=many, stateful_step_count=30))


# --- seeded bugs, each of which the machine has to find -------------------------------------------


class LandsAll(Task):
    """A task that lands blocks that were not there."""

    def finish(self, landed: Any, state: str = "landed", error: Any = None) -> None:
        super().finish(None if landed is None else np.ones(BLOCKS, bool), state, error)


class CountsNone(Graph):
    """A graph whose figures stand still."""

    def count(self, *terms: Any) -> None:
        pass


class NeverLate(Task):
    """A task that ignores deadlines."""

    def cancel_at(self, when: float) -> None:
        pass


class LastFirst(Graph):
    """A graph that serves its newest task first."""

    def enter(self, tasks: Any, *terms: Any) -> None:
        super().enter(tasks, *terms)
        for task in tasks:
            task.due = float(-task.number)


class RunsAll(Task):
    """A task that moves all blocks, whatever those before it moved."""

    async def move(self, left: Any, *before: End) -> Any:
        return await super().move(np.ones(BLOCKS, bool), *before)


class ForgetsErrors(Task):
    """A task that does not have the errors of what it follows."""

    async def move(self, left: Any, *before: End) -> Any:
        return await super().move(left)


class CancelsNothing(Task):
    """A task that nothing cancels."""

    def stop(self, state: str, error: Exception) -> bool:
        return False


BUGS = (LandsAll, CountsNone, NeverLate, LastFirst, RunsAll, ForgetsErrors, CancelsNothing)


@pytest.mark.parametrize("bug", BUGS)
def test_the_machine_finds(bug: type[Graph] | type[Task]) -> None:
    terms: dict[str, Any] = {"task" if issubclass(bug, Task) else "kind": bug}
    make: Callable[[], GraphMachine] = lambda: GraphMachine(**terms)  # noqa: E731
    wide = settings(max_examples=200, stateful_step_count=30, phases=[Phase.generate])
    # A second run in which threads take another turn is a find, too.
    with pytest.raises((AssertionError, Flaky)):
        run_machine(make, settings=wide)  # type: ignore[arg-type]
