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
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from support.graph_model import ALL, BLOCKS, SLACK, STALL, WIDTHS, Known, Model, Staging, Work
from support.waits import LIMIT

from portakv.errors import TransferError
from portakv.graph import Graph, Handle, Lease, Task

Pairs = list[tuple[int, int]]
BITS = st.lists(st.booleans(), min_size=BLOCKS, max_size=BLOCKS)
PAIRS = st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, BLOCKS - 1)), max_size=3)
AT = st.integers(0, 99)  # chooses among the things that are there
RESULTS = (None, None, None, [True], "no mask", ValueError("as planned"), OSError("as planned"))


class Drawn(NamedTuple):
    """A task to submit."""

    queue: str  # empty: a barrier
    after: list[tuple[int, Pairs | None]]
    rescue: bool
    eligible: list[bool]
    lease: int  # 0: none; 1, 2: a new lease of as many buffers; 3: the lease of the task before


class Terms(NamedTuple):
    """The common terms of the tasks of one call."""

    priority: Any
    deadline: float | None
    store: bool
    until: float | None  # seconds from now


DRAWN = st.builds(
    Drawn,
    queue=st.sampled_from((*WIDTHS, *WIDTHS, "")),
    after=st.lists(st.tuples(AT, st.none() | PAIRS), max_size=2),
    rescue=st.booleans(),
    eligible=st.just([*ALL]) | BITS,
    lease=st.sampled_from((0, 0, 1, 2, 3, 3)),
)
#: Chains that compete for the few buffers.
LEASED = st.builds(
    Drawn,
    queue=st.sampled_from(("disk", "device")),
    after=st.just([]) | st.just([(0, None)]),
    rescue=st.just(value=False),
    eligible=st.just([*ALL]),
    lease=st.sampled_from((1, 2, 3, 3)),
)
GROUPS = st.lists(DRAWN, min_size=1, max_size=4) | st.lists(LEASED, min_size=1, max_size=4)
TERMS = st.builds(
    Terms,
    priority=st.sampled_from(tuple(SLACK)),
    deadline=st.sampled_from((None, None, None, None, 0.0, 0.04, 0.5, 3.0)),
    store=st.booleans(),
    until=st.sampled_from((None, None, None, 0.257, 2.507)),
)


class GraphMachine(RuleBasedStateMachine):
    """Calls of a graph whose clock and work stand still between them."""

    def __init__(self, kind: type[Graph] = Graph) -> None:
        super().__init__()
        self.now = [0.0]
        self.graph = kind(clock=lambda: self.now[0])
        self.model = Model(self.graph, self.now, Staging(2))
        self.last = set[Known]()  # tasks with a deadline, which no later task follows
        for name, width in WIDTHS.items():
            self.graph.queue(name, width, stall_seconds=STALL)

    @rule(drawn=GROUPS, barrier=st.booleans(), terms=TERMS)
    def submit(self, drawn: list[Drawn], barrier: bool, terms: Terms) -> None:
        """Submit tasks that follow each other and earlier tasks, and a barrier with a handle."""
        group = list[Known]()
        earlier = [x for x in self.model.tasks if x not in self.last]
        for each in drawn:
            choices = [*earlier, *group][-6:]
            chosen = {choices[at % len(choices)]: pairs for at, pairs in each.after if choices}
            group.append(self.known(each, chosen, group, terms))
        if barrier:
            followed = {before for known in group for before, _ in known.after}
            ends: dict[Known, Pairs | None] = {x: None for x in group if x not in followed}
            known = self.known(Drawn("", [], False, [*ALL], 0), ends, group, terms)
            known.handle = Handle(self.graph, known.task, missing="skip")
            group.append(known)
        if terms.deadline is not None:
            self.last |= {*group} - {before for known in group for before, _ in known.after}
        tasks = [known.task for known in group]
        self.graph.submit(tasks, priority=terms.priority, deadline=terms.deadline)
        self.model.submit(group, terms.deadline)
        self.model.settle()

    def known(
        self, drawn: Drawn, chosen: dict[Known, Pairs | None], group: list[Known], terms: Terms
    ) -> Known:
        """Return a task that follows the chosen ones, as the model knows it."""
        number = len(self.model.tasks) + len(group)
        work = Work(self.model.log) if drawn.queue else None
        rescue = bool(drawn.rescue and work and len(chosen) == 1)
        after = [(known, None if rescue else pairs) for known, pairs in chosen.items()]
        lease = self.lease(drawn, group, terms) if work else None
        task = Task(
            work,
            BLOCKS,
            queue=self.graph.queue(drawn.queue) if work else None,
            nbytes=number,
            after=[dependency(known, pairs) for known, pairs in after],
            rescue=rescue,
            lease=lease,
            eligible=drawn.eligible,
            name=f"task {number}",
        )
        due = self.now[0] + SLACK[terms.priority]
        known = Known(task, number, after, tuple(drawn.eligible), work, lease, due)
        known.background = terms.priority == "background"
        return known

    def lease(self, drawn: Drawn, group: list[Known], terms: Terms) -> Lease | None:
        """Return a new lease, the lease of a task before it, or None."""
        if drawn.lease == 3:
            return next((x.lease for x in reversed(group) if x.lease), None)
        until = None if terms.until is None else self.now[0] + terms.until
        count = drawn.lease
        return Lease(self.model.staging, count, terms.store, until) if count else None

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
        changed = known.handle.cancel() if known.handle else self.graph.cancel(known.task)
        assert changed == self.model.cancel(known), f"cancel of task {known.number}: {changed}"
        self.model.settle()

    @rule(seconds=st.sampled_from((0.03, 0.3, 1.0, 2.5)))
    def advance(self, seconds: float) -> None:
        """Let time pass, from one deadline to the next."""
        end = self.now[0] + seconds
        stops = sorted({when for when, _ in self.model.timers if when < end})
        for self.now[0] in (*stops, end):
            self.graph.sweep()
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
        if sound:
            self.model.compare()
            assert all(known.final for known in self.model.tasks)
            assert len(self.model.staging.free) == self.model.staging.count
            with pytest.raises(TransferError, match="closed"):
                self.graph.submit([])


def dependency(known: Known, pairs: Pairs | None) -> Any:
    """Return an element of a task's ``after``."""
    if pairs is None:
        return known.task
    return known.task, [block for block, _ in pairs], [its_block for _, its_block in pairs]


WIDE = pytest.param(10.0, marks=pytest.mark.full)


@pytest.mark.parametrize("times", [1.0, WIDE])
def test_any_order_of_calls(times: float) -> None:
    many = max(1, int(times * settings().max_examples))
    run_machine(GraphMachine, settings=settings(max_examples=many, stateful_step_count=30))


# --- seeded bugs, each of which the machine has to find -------------------------------------------


class LandsAll(Graph):
    """A graph whose tasks land blocks that were not there."""

    def end(self, task: Task, landed: Any, state: str, error: Any = None) -> None:
        super().end(task, None if landed is None else np.ones(BLOCKS, bool), state, error)


class CountsNone(Graph):
    """A graph whose figures stand still."""

    def count(self, *terms: Any) -> None:
        pass


class NeverLate(Graph):
    """A graph that ignores deadlines."""

    def sweep(self) -> float:
        return self.clock()


class CancelsShared(Graph):
    """A graph whose cancel ends the tasks that other tasks need."""

    def cancel(self, task: Task, state: Any = "cancelled") -> bool:
        before = [x for x, *_ in task.after if x.queue and not x.ended]
        cancelled = super().cancel(task, state)
        return any([cancelled, *(self.cancel(x, state) for x in before)])


class LastFirst(Graph):
    """A graph that serves its newest task first."""

    def place(self, task: Task) -> None:
        task.schedule.due = float(-task.schedule.number)
        super().place(task)


class WithoutLease(Graph):
    """A graph that starts a task before it has its lease."""

    def place(self, task: Task) -> None:
        assert task.queue
        task.queue.push(task)


class KeepsLease(Graph):
    """A graph that does not give the lease of a failed task back."""

    def end(self, task: Task, landed: Any, state: str, error: Any = None) -> None:
        if state == "failed":
            task.lease = None
        super().end(task, landed, state, error)


BUGS = (LandsAll, CountsNone, NeverLate, CancelsShared, LastFirst, WithoutLease, KeepsLease)


@pytest.mark.parametrize("bug", BUGS)
def test_the_machine_finds(bug: type[Graph]) -> None:
    make: Callable[[], GraphMachine] = lambda: GraphMachine(bug)  # noqa: E731
    terms = settings(max_examples=200, stateful_step_count=30, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_machine(make, settings=terms)  # type: ignore[arg-type]
