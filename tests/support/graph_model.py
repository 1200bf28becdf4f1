# SPDX-License-Identifier: Apache-2.0
"""Predict the states of a transfer graph's tasks, for the state machine that compares them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from portakv.errors import TransferCancelled, TransferError
from portakv.storage.work import End, Graph, Handle, Task
from support.seeded_loop import SetLoop
from support.waits import LIMIT

BLOCKS = 3
ALL = (True,) * BLOCKS
NONE = (False,) * BLOCKS
SLACK = {"urgent": 0.0, "normal": 0.05, "background": 2.0}
WIDTHS = {"disk": 2, "net": 1, "device": 3}
STALL = 2.0  # seconds after which a queue is slow
UNRUN = ("cancelled", "late", "dropped")

Bits = tuple[bool, ...]


class Work:
    """Work that starts, and runs until the machine ends it with a result or an error."""

    def __init__(self, log: list[str]) -> None:
        self.log = log  # mistakes that workers saw
        self.masks = list[Bits]()  # one for each start
        self.go = threading.Event()
        self.result: Any = None

    def __call__(self, task: Task, mask: Any) -> Any:
        self.masks.append(tuple(mask.tolist()))
        if not self.go.wait(4 * LIMIT):
            self.log.append("no one ended a task")
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@dataclass(eq=False)
class Known:
    """A task, or the end of several, and all that the model knows of it."""

    task: Task | End
    number: int  # in the order of submission
    after: list[Known]  # of an end; of a task the one before it in its chain
    work: Work | None = None  # None: an end
    due: float = 0.0
    background: bool = False
    droppable: bool = False  # a queue was slow when it was submitted
    wanted: bool = True  # neither cancelled nor late
    unrun: str = ""  # its state, if it ended without a run
    since: float | None = None  # the time at which it was seen to run
    final: tuple[str, Bits] | None = None  # its state and its blocks when it was seen to end
    handle: Handle | None = None  # of an end

    @property
    def queue(self) -> str:
        """Return the name of its queue; an empty text for an end."""
        return self.task.queue.name if isinstance(self.task, Task) else ""

    @property
    def order(self) -> tuple[float, int]:
        """Return its place among the tasks that wait for the same worker."""
        return self.due, self.number

    @property
    def left(self) -> Bits | None:
        """Return the blocks that it has to move; None before what it follows has ended."""
        left = np.ones(BLOCKS, bool)
        for before in self.after:
            if before.landed is None:
                return None
            left &= before.landed
        return tuple(left.tolist())

    @property
    def landed(self) -> Bits | None:
        """Return its blocks that landed; None before it ends."""
        if self.final:
            return self.final[1]
        if self.unrun:
            return NONE
        left = self.left
        if left is None or not self.work or not any(left):
            return left
        if not self.work.go.is_set():
            return None
        result = self.work.result
        if is_failure(result):
            return NONE
        return left if result is None else tuple(np.logical_and(left, result).tolist())

    @property
    def ended(self) -> bool:
        """Return True if it has ended, by the model."""
        return self.landed is not None

    @property
    def running(self) -> bool:
        """Return True if its work runs."""
        return self.task.state == "running"


def is_failure(result: Any) -> bool:
    """Return True if work raises its result, or returns something that is not a mask."""
    return result is not None and not (isinstance(result, list) and len(result) == BLOCKS)


def free_for_background(running: list[Known], width: int) -> bool:
    """Return True if a queue may start more background work, which leaves one worker to others."""
    return sum(x.background for x in running) < max(1, width - 1)


class Model:
    """The tasks of one graph, and the comparison of each with its predicted state."""

    def __init__(self, graph: Graph, clock: SetLoop) -> None:
        self.graph = graph
        self.clock = clock
        self.log = list[str]()
        self.tasks = list[Known]()
        self.timers = list[tuple[float, Known]]()
        self.counts = Counter[tuple[str, str, str]]()
        # When the graph stood still last:
        self.running = list[Known]()

    # --- what calls change ------------------------------------------------------------------------

    def submit(self, group: list[Known], deadline: float | None) -> None:
        """Add tasks that were submitted together."""
        self.tasks += group
        now = self.clock.time()
        for known in group:
            if deadline is not None:
                known.due = min(known.due, now + deadline)
        if deadline is not None:
            self.timers += [(now + deadline, known) for known in group]
        for known in group:
            if known.background and known.queue and self.slow(known.queue):
                self.cancel(known, "dropped")
                for each in group:
                    each.droppable = True
        self.expire()

    def slow(self, name: str) -> bool:
        """Return True if a task of a queue has run for too long."""
        since = [x.since for x in self.tasks if x.queue == name and x.since is not None]
        return any(self.clock.time() - x > STALL for x in since)

    def expire(self) -> None:
        """End the tasks whose deadline has passed."""
        passed = [x for x in self.timers if x[0] <= self.clock.time()]
        self.timers = [x for x in self.timers if x[0] > self.clock.time()]
        for _, each in sorted(passed, key=lambda x: x[0]):
            self.cancel(each, "late")

    def cancel(self, known: Known, state: str = "cancelled") -> bool:
        """End a task that does not run, or those before an end."""
        if known.ended or known.running or not known.wanted:
            return False
        known.wanted = False
        if known.work:
            known.unrun = state
            return True
        stopped = [x for x in known.after if x.wanted and not (x.ended or x.running)]
        for before in stopped:
            before.wanted = False
            before.unrun = state
        return bool(stopped)

    def close(self) -> None:
        """End every task that does not run, in any order."""
        for known in self.tasks:
            if known.final or known.running:
                continue
            known.wanted = False
            # A task lands if it has nothing to move after the tasks before it are cancelled.
            if known.work and known.task.state != "landed":
                known.unrun = "cancelled"

    # --- what has to hold -------------------------------------------------------------------------

    def settle(self, in_order: bool = True) -> None:
        """Wait until the graph stands still, and compare it with the model."""
        until = time.monotonic() + LIMIT
        while (why := self.moves()) and time.monotonic() < until:
            time.sleep(0.0002)
        assert not why, f"a deadlock: {why}"
        with self.graph.lock:
            if in_order:
                self.compare_order()
            self.compare()

    def moves(self) -> str:
        """Return why the graph does not stand still yet; an empty text if it does."""
        with self.graph.lock:
            for known in self.tasks:
                if known.final or not known.work or not known.running:
                    continue
                if known.work.go.is_set():
                    return "a task whose work is over runs on"
                if not known.work.masks:
                    return "a running task has not started"
            idle = [name for name in WIDTHS if self.idle(name)]
            return f"workers of {idle} are idle" if idle else ""

    def idle(self, name: str) -> bool:
        """Return True if a worker of a queue has to take a queued task."""
        width = WIDTHS[name]
        queued, running = self.at(name)
        if len(running) == width:
            return False
        return any(not x.background or free_for_background(running, width) for x in queued)

    def at(self, name: str) -> tuple[list[Known], list[Known]]:
        """Return the queued and the running tasks of a queue."""
        tasks = [x for x in self.tasks if not x.final and x.queue == name]
        return [x for x in tasks if x.task.state == "queued"], [x for x in tasks if x.running]

    def compare(self) -> None:
        """Compare every task and queue with the model."""
        assert not self.log, self.log
        for known in self.tasks:
            self.compare_task(known)
        self.compare_figures()
        self.running = [x for x in self.tasks if x.running]

    def compare_task(self, known: Known) -> None:
        """Compare one task: it ends once, with the right blocks, and never runs too early."""
        task = known.task
        seen = (task.state, tuple(task.landed.tolist()))
        if known.final:
            assert seen == known.final, "an ended task changed"
            return
        masks = known.work.masks if known.work else []
        if masks:
            assert masks == [known.left], "a wrong mask, a start too early, or two starts"
        expected = self.expected(known)
        if expected == "landed" and known.droppable and not masks and task.state == "dropped":
            # A task without blocks to move may be dropped before the graph sees that.
            known.unrun = expected = "dropped"
        assert task.state == expected, f"task {known.number} is {task.state}, not {expected}"
        if known.running:
            known.since = self.clock.time() if known.since is None else known.since
        assert task.ended == known.ended
        assert known.handle is None or known.handle.cancelled or known.ended == self.done(known)
        if not task.ended:
            return
        assert seen[1] == known.landed, f"task {known.number}: {seen[1]}, not {known.landed}"
        self.compare_error(known)
        known.final = seen
        known.since = None
        if known.queue and task.state != "landed":
            self.counts[known.queue, task.name, task.state] += BLOCKS

    def expected(self, known: Known) -> str:
        """Return the state that a task has to have while the graph stands still."""
        if known.unrun:
            return known.unrun
        left = known.left
        if left is None:
            return "waiting" if known.work else "new"
        if not known.work or not any(left):
            return "landed"
        if known.work.masks:
            if not known.work.go.is_set():
                return "running"
            return "failed" if is_failure(known.work.result) else "landed"
        return "queued"

    def done(self, known: Known) -> bool:
        """Return what the handle of a barrier reports."""
        assert known.handle is not None
        try:
            return known.handle.done()
        except TransferCancelled:
            assert isinstance(known.task.error, TransferCancelled)
            return True

    def compare_error(self, known: Known) -> None:
        """Check that an ended task has its own error, or the error of a task that it follows."""
        error = known.task.error
        result = known.work.result if known.work and known.work.masks else None
        before = [x.task.error for x in known.after if x.task.error]
        if error in before:
            return
        if known.unrun or not known.wanted:
            kind = TransferCancelled if known.unrun == "cancelled" else TransferError
            assert type(error) is kind or (error is None and not known.work)
        elif isinstance(result, Exception):
            assert error is result
        else:
            assert (error is not None) == is_failure(result)
            assert not before, "the error of a task before it is lost"

    def compare_order(self) -> None:
        """Check that no task overtook a task of the same queue that was due before it."""
        for name, width in WIDTHS.items():
            queued, running = self.at(name)
            background = [x for x in running if x.background]
            assert len(background) <= max(1, width - 1), "background work leaves no worker"
            started = [x for x in running if x.since is None]
            for waits in queued:
                rivals = started
                if waits.background and not free_for_background(running, width):
                    rivals = [x for x in started if x.background]
                assert all(x.order < waits.order for x in rivals), "a task was overtaken"

    def compare_figures(self) -> None:
        """Compare the figures of the graph and of its queues."""
        counted = {name: count for name, count in self.graph.counts.blocks.items() if count}
        assert counted == dict(self.counts), "a wrong figure"
        for name in WIDTHS:
            queue = self.graph.queue(name)
            nbytes = sum(x.number for x in self.tasks if x.queue == name and not x.final)
            assert queue.queued_bytes == nbytes
            assert queue.slow == self.slow(name)
