# SPDX-License-Identifier: Apache-2.0
"""Tasks of a transfer graph, and the leases of staging buffers that chains of tasks take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from portakv import arguments
from portakv.runtime.devices import Process

#: Blocks of a task: bool ``[blocks]``.
Mask: TypeAlias = npt.NDArray[np.bool_]


class Workers(ABC):
    """The queue of a task, whose workers run it; `Graph.queue` makes it."""

    name: str
    tier: str
    width: int
    queued_bytes: int

    @property
    @abstractmethod
    def slow(self) -> bool:
        """Return True if a task runs for too long."""

    @abstractmethod
    def push(self, task: Task, /) -> None:
        """Queue a task."""


class Executor(Protocol):
    """The graph of a task."""

    process: Process
    clock: Callable[[], float]

    def sweep(self) -> float:
        """Cancel tasks that are late, and return the time."""

    def pause(self, task: Task, until: float, now: float, /) -> None:
        """Wait for the end of a task, at most until a time."""


class Pool(Protocol):
    """The owner of staging buffers that leases take from."""

    def take(self, count: int, store: bool, /) -> Any | None:
        """Return ``count`` items, or None if there are not enough. ``store``: a save takes them."""

    def give(self, items: Any, /) -> object:
        """Take items back."""


@dataclass(eq=False)
class Lease:
    """Items that a chain of tasks takes from a pool before its first task starts: all or none.

    The items go back when the last task that names the lease has ended. ``ended(lease)`` is called
    before ``pool.give(items)``, under the graph's lock. After ``until``, by the graph's clock,
    tasks that still wait for the lease end as dropped.
    """

    pool: Pool
    count: int  # 0: it takes none, and its items are the maker's
    store: bool = False
    until: float | None = None
    ended: Callable[..., object] | None = None
    items: Any = None  # while it is granted
    users: int = 0  # tasks that name it and have not ended
    tasks: list[Task] = field(default_factory=list, init=False)  # tasks that wait for it

    def __post_init__(self) -> None:
        arguments.whole("count", self.count)
        if self.count:
            check_pool(self.pool)
        arguments.flag("store", self.store)
        if self.until is not None:
            arguments.number("until", self.until, what="a time of the graph's clock")
        if self.ended is not None and not callable(self.ended):
            raise arguments.invalid("ended", "a function or None", self.ended)

    def take(self) -> Any | None:
        """Return items of the pool, or None if there are not enough, under the graph's lock."""
        return self.pool.take(self.count, self.store)


def check_pool(pool: object) -> None:
    """Raise `InvalidTerms` for an object without ``take`` and ``give``."""
    if not callable(getattr(pool, "take", None)) or not callable(getattr(pool, "give", None)):
        raise arguments.invalid("pool", "an object with take() and give()", pool)


@dataclass(eq=False, slots=True)
class Schedule:
    """The place of a task among the tasks of its graph, which changes it under the graph's lock.

    Attributes:
        graph: the graph that the task was submitted to; None before.
        number: the number of the task in the order of submission.
        due: the time at which the task is due, by the graph's clock.
        background: True if the task may wait for all tasks that are not of the background.
        soon: a background task that is due as a normal one is, since a caller waits for it; set it
            before `submit`.
        since: the time since which the task waits for a worker.
        waits: how many tasks that it follows have not ended.
        followers: the tasks that follow it, until its end.
        watched: True if a thread sleeps until its end.
        trail: the numbers of the tasks that ran before it, if it never ran; for the trace.
    """

    graph: Executor | None = None
    number: int = 0
    due: float = 0.0
    background: bool = False
    soon: bool = False
    since: float = 0.0
    waits: int = 0
    followers: list[Task] = field(default_factory=list)
    watched: bool = False
    trail: Collection[int] = ()


class Outcome:
    """The state and the result of a task, which its graph changes under its lock.

    Attributes:
        state: see `Task.state`.
        ended: True after the end.
        cut: True if no block starts any more: the task has ended or is cancelled.
        error: see `Task.error`.
        left: the blocks to move, which are known before the task is queued.
        landed: the blocks that landed.
        short: the queue of the first task before a barrier that did not move all of its blocks,
            without an error; else empty.
    """

    __slots__ = ("cut", "ended", "error", "landed", "left", "short", "state")

    def __init__(self, blocks: int) -> None:
        self.state = "new"
        self.ended = False
        self.cut = False
        self.error: BaseException | None = None
        self.landed: Mask = np.zeros(blocks, np.bool_)
        self.left: Mask = self.landed
        self.short = ""

    @property
    def is_short(self) -> bool:
        """Return True if the task did not move all blocks that it had to move."""
        return bool((self.left > self.landed).any())

    def add_error(self, error: BaseException | None) -> None:
        """Record an error, unless an earlier one is known."""
        self.error = self.error or error

    def end(self, state: str, landed: Mask | None, error: BaseException | None) -> None:
        """Record the end with the blocks that landed; None: no block."""
        self.add_error(error)
        if landed is not None:
            self.landed = self.landed | landed
        self.state = state
        self.ended = True
        self.cut = True


@dataclass(eq=False, repr=False)
class Task:
    """Blocking work for some blocks.

    Args:
        work: ``work(task, mask)`` moves the blocks of a mask (bool ``[blocks]``) and returns the
            blocks that landed; None: all of them.
        queue: the queue whose workers run the task. A task without a queue is a barrier, which
            ends after all tasks that it follows.
        after: tasks, or `Dependency` tuples (task, blocks, its blocks).
        rescue: move the blocks that did not land in the one task that it follows.
        eligible: the blocks to try, or a function that returns them; the graph calls it under its
            lock after all tasks in ``after`` have ended.
        name: the operation, for figures and traces.

    Attributes:
        alone: a background task that keeps the interpreter rather than a device. A queue runs one
            of them at a time, as more would only make urgent work wait; set it before `submit`.
        on_end: a function that is called once at the end, under the graph's lock; set it under that
            lock.
        schedule: its place among the tasks of its graph.
        outcome: its state and its result.
    """

    work: Callable[[Task, Mask], Any] | None
    blocks: int
    _: KW_ONLY
    queue: Workers | None = None
    nbytes: int = 0
    after: Sequence[Any] = ()
    rescue: bool = False
    lease: Lease | None = None
    eligible: Mask | Sequence[bool] | Callable[[], Mask] | None = None
    name: str = ""
    alone: bool = field(default=False, init=False)
    on_end: Callable[[], object] | None = field(default=None, init=False)
    schedule: Schedule = field(init=False)
    outcome: Outcome = field(init=False)

    def __post_init__(self) -> None:
        if self.work is not None and not callable(self.work):
            raise arguments.invalid("work", "a function or None", self.work)
        arguments.whole("blocks", self.blocks, most=1 << 31)
        arguments.whole("nbytes", self.nbytes)
        arguments.flag("rescue", self.rescue)
        arguments.text("name", self.name, least=0)
        if self.queue is not None and not isinstance(self.queue, Workers):
            do = "Take it from Graph.queue(name)."
            raise arguments.invalid("queue", "a Queue", self.queue, do)
        if self.lease is not None:
            arguments.instance("lease", self.lease, Lease)
        self.after = self._dependencies()
        self.schedule = Schedule()
        self.outcome = Outcome(self.blocks)

    @property
    def state(self) -> str:
        """Return how far the task is.

        It is new, waiting, leasing, queued or running; then landed (it ran, or no block was left
        for it), failed, cancelled, late or dropped.
        """
        return self.outcome.state

    @property
    def ended(self) -> bool:
        """Return True if the task has ended; unlike `done`, cancel no task that is late."""
        return self.outcome.ended

    @property
    def error(self) -> BaseException | None:
        """Return the first exception of the task or of a task that it follows."""
        return self.outcome.error

    @property
    def landed(self) -> Mask:
        """Return the blocks that landed, bool ``[blocks]``, which are known after the end."""
        return self.outcome.landed

    def _dependencies(self) -> list[Dependency]:
        """Return the checked ``after``; raise `InvalidTerms` for other objects than tasks."""
        dependencies = list[Dependency]()
        if not self.after and type(self.after) in (list, tuple):
            return dependencies
        for each in arguments.items("after", self.after, "tasks"):
            terms = each if isinstance(each, tuple) and len(each) == 3 else (each, None, None)
            if not isinstance(terms[0], Task):
                expected = "tasks, or tuples (task, blocks, its blocks)"
                raise arguments.invalid("after", expected, terms[0])
            dependencies.append(Dependency(*terms))
        return dependencies

    def ran_before(self) -> set[int]:
        """Return the numbers of the tasks that it follows, through tasks that never ran."""
        before = [x.schedule for x, *_ in self.after]
        return {number for each in before for number in each.trail or (each.number,)}

    def done(self) -> bool:
        """Return True if the task has ended; never block."""
        return self.wait(0.0)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the task has ended, at most ``timeout`` seconds; return True if it has."""
        seconds = arguments.seconds("timeout", timeout, optional=True)
        graph = self.schedule.graph
        if graph is None:  # it was not submitted
            return False
        outcome = self.outcome
        if outcome.ended or graph.process.forked:  # a child has no thread to wait for
            return True
        until = graph.clock() + seconds
        while (now := graph.sweep()) < until and not outcome.ended:
            graph.pause(self, until, now)
        return outcome.ended


class Dependency(NamedTuple):
    """A task that another task follows.

    Block ``blocks[i]`` of the follower needs block ``its_blocks[i]`` of the task. None: each block
    needs the block of the same number.
    """

    task: Task
    blocks: Sequence[int] | None = None
    its_blocks: Sequence[int] | None = None


class Guard:
    """Follows tasks that a later task will follow: nothing cancels them for lack of followers.

    Attributes:
        followed: how many tasks were passed to `follow`.
    """

    def __init__(self) -> None:
        # It counts as ended, so that the end of a task that it follows does not start it.
        self._task = Task(None, 0)
        self._task.outcome.ended = True
        self.followed = 0

    def follow(self, tasks: Sequence[Task]) -> None:
        """Follow tasks, under the graph's lock."""
        for task in tasks:
            followers = task.schedule.followers
            if not task.ended and self._task not in followers:
                followers.append(self._task)
        self.followed += len(tasks)

    def release(self) -> None:
        """Let the tasks be cancelled from now on, unless other tasks follow them."""
        self._task.outcome.cut = True
