# SPDX-License-Identifier: Apache-2.0
"""Tasks of blocking work for the queues of a graph, and the ends that coroutines wait for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from portakv import arguments
from portakv.runtime.devices import Process
from portakv.tasks import Wait

#: Blocks of a task: bool ``[blocks]``.
Mask: TypeAlias = npt.NDArray[np.bool_]
E = TypeVar("E", bound="End")


class Workers(ABC):
    """The queue of a task, whose workers run it; `Graph.queue` makes it."""

    name: str
    tier: str  # empty: no figures count its tasks
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

    def pause(self, end: End, until: float, now: float, /) -> None:
        """Wait for an end, at most until a time."""


class End:
    """The end of work for some blocks. The graph changes it under its lock.

    A coroutine of the graph awaits it, and any thread waits for it.

    Attributes:
        name: the operation.
        blocks: their number.
        state: how it ended; of a task also how far it is, see `Task.state`.
        ended: True after the end; unlike `done`, cancel no task that is late.
        cut: True if no block starts any more: the work has ended or is cancelled.
        error: the first exception of the work, or of work before it.
        landed: the blocks that landed, bool ``[blocks]``, which are known after the end.
        on_end: a function that is called once at the end, under the graph's lock; set it under that
            lock.
        stop: cancels the work before the end: it takes the state and the error of work that has
            not started, and returns True if there is such work.
        trail: the numbers of the last tasks that ran for it, for the trace.
        short: of a save, the queue that did not take all blocks, without an error; else empty.
    """

    def __init__(self, graph: Executor | None, blocks: int, name: str = "") -> None:
        self.graph = graph
        self.name = name
        self.blocks = blocks
        self.state = "new"
        self.ended = False
        self.cut = False
        self.error: BaseException | None = None
        self.landed: Mask = np.zeros(blocks, np.bool_)
        self.on_end: Callable[[], object] | None = None
        self.stop: Callable[[str, Exception], bool] | None = None
        self.trail: tuple[int, ...] = ()
        self.short = ""
        self.watched = False  # a thread sleeps until the end
        self.waits = list[Wait]()  # of coroutines

    def add_error(self, error: BaseException | None) -> None:
        """Record an error, unless an earlier one is known."""
        self.error = self.error or error

    def done(self) -> bool:
        """Return True if the work has ended; never block."""
        return self.wait(0.0)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the work has ended, at most ``timeout`` seconds; return True if it has."""
        seconds = arguments.seconds("timeout", timeout, optional=True)
        graph = self.graph
        if graph is None:  # it was not submitted
            return False
        if self.ended or graph.process.forked:  # a child has no thread to wait for
            return True
        until = graph.clock() + seconds
        while (now := graph.sweep()) < until and not self.ended:
            graph.pause(self, until, now)
        return self.ended

    def __await__(self: E) -> Generator[Wait, None, E]:
        if not self.ended:
            wait = Wait(here=True)
            self.waits.append(wait)
            yield from wait.__await__()
        return self


class Ending(NamedTuple):
    """An end of some of the blocks of another end: their numbers there, and their numbers among the
    blocks of this end; without numbers it says nothing of blocks.

    Attributes:
        layers: the layers that it completes.
    """

    end: End
    at: Sequence[int] = ()
    rows: Sequence[int] = ()
    layers: range = range(0)


@dataclass(eq=False, slots=True)
class Schedule:
    """The place of a task among the tasks of its graph, which changes it under the graph's lock.

    Attributes:
        number: the number of the task in the order in which tasks were entered.
        due: the time at which the task is due, by the graph's clock.
        background: True if the task may wait for all tasks that are not of the background.
        soon: a background task that is due as a normal one is, since a caller waits for it; set it
            before the task is entered.
        since: the time since which the task waits for a worker.
        followed: the numbers of the tasks that ran before it, for the trace.
    """

    number: int = 0
    due: float = 0.0
    background: bool = False
    soon: bool = False
    since: float = 0.0
    followed: tuple[int, ...] = ()


class Task(End):
    """Blocking work for some blocks.

    Args:
        work: ``work(task, mask)`` moves the blocks of a mask (bool ``[blocks]``) and returns the
            blocks that landed; None: all of them.
        queue: the queue whose workers run the task.
        name: the operation, for figures and traces.
        uses: what the work uses until the end of the task.

    Attributes:
        alone: a background task that keeps the interpreter rather than a device. A queue runs one
            of them at a time, as more would only make urgent work wait; set it before `submit`.
        state: new, waiting (for other work), queued or running; then landed (it ran, or no block
            was left for it), failed, cancelled, late or dropped.
        ended, error, landed, on_end: of its end, see `End`.
        left: the blocks to move, which are known before the task is queued.
        schedule: its place among the tasks of its graph.
    """

    def __init__(
        self,
        work: Callable[[Task, Mask], Any],
        blocks: int,
        *,
        queue: Workers,
        nbytes: int = 0,
        name: str = "",
        uses: Any = None,
    ) -> None:
        if not callable(work):
            raise arguments.invalid("work", "a function", work)
        arguments.whole("blocks", blocks, most=1 << 31)
        arguments.whole("nbytes", nbytes)
        arguments.text("name", name, least=0)
        if not isinstance(queue, Workers):
            raise arguments.invalid("queue", "a Queue", queue, "Take it from Graph.queue(name).")
        super().__init__(None, blocks, name)
        self.work: Callable[[Task, Mask], Any] | None = work
        self.queue = queue
        self.nbytes = nbytes
        self.uses = uses
        self.alone = False
        self.left: Mask = self.landed
        self.schedule = Schedule()

    @property
    def is_short(self) -> bool:
        """Return True if the task did not move all blocks that it had to move."""
        return bool((self.left > self.landed).any())

    def moved(self) -> Mask:
        """Do the work, and return the blocks that landed."""
        assert self.work is not None  # it has not ended
        landed = self.work(self, self.left.copy())
        if landed is None:
            return self.left
        return self.left & np.asarray(landed, np.bool_).reshape(self.blocks)
