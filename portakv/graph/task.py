# SPDX-License-Identifier: Apache-2.0
"""Tasks of blocking work for the queues of a graph, and the ends that coroutines wait for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from itertools import count
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from portakv import arguments, tasks
from portakv.graph.trace import Ran, Trace
from portakv.tasks import Runtime, Wait
from portakv.tasks.limit import Turn

#: Blocks of a task: bool ``[blocks]``.
Mask: TypeAlias = npt.NDArray[np.bool_]
E = TypeVar("E", bound="End")


class Executor(Protocol):
    """The graph of a task."""

    runtime: Runtime
    trace: Trace

    def end(
        self, end: End, landed: Mask | None, state: str = ..., error: BaseException | None = None, /
    ) -> None:
        """Record an end."""


class End(tasks.End[None]):
    """The end of work for some blocks. The graph changes it under its lock.

    A coroutine of the graph awaits it, which raises nothing, and any thread waits for it.

    Attributes:
        name: the operation.
        blocks: their number.
        state: how it ended; of a task also how far it is, see `Task.state`.
        ended: True after the end.
        cut: True if no block starts any more: the work has ended or is cancelled.
        error: the first exception of the work, or of work before it.
        landed: the blocks that landed, bool ``[blocks]``, which are known after the end.
        stop: cancels the work before the end: it takes the state and the error of work that has
            not started, and returns True if there is such work.
        trail: the numbers of the last tasks that ran for it, for the trace.
        short: of a save, the queue that did not take all blocks, without an error; else empty.
    """

    def __init__(self, graph: Executor, blocks: int, name: str = "") -> None:
        super().__init__(graph.runtime)
        self.graph: Executor | None = graph
        self.name = name
        self.blocks = blocks
        self.state = "new"
        self.cut = False
        self.landed: Mask = np.zeros(blocks, np.bool_)
        self.stop: Callable[[str, Exception], bool] | None = None
        self.trail: tuple[int, ...] = ()
        self.short = ""

    def add_error(self, error: BaseException | None) -> None:
        """Record an error, unless an earlier one is known."""
        self.error = self.error or error

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the work has ended, at most ``timeout`` seconds; return True if it has."""
        seconds = arguments.seconds("timeout", timeout, optional=True)
        return self.graph is not None and super().wait(seconds)  # else it was not submitted

    def wake_first(self, wait: Wait) -> None:
        """Wake a coroutine at the end before all others, which look at what follows the work."""
        self._calls.appendleft(wait.wake)

    def __await__(self: E) -> Generator[Wait, None, E]:  # type: ignore[override]
        if not self.ended:
            wait = Wait(here=True)
            self.on_end(wait.wake)
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


class Task(End, Turn):
    """Blocking work for some blocks, and its turn in a queue.

    Args:
        work: ``work(task, mask)`` moves the blocks of a mask (bool ``[blocks]``) and returns the
            blocks that landed; None: all of them.
        queue: the queue that runs the task.
        name: the operation, for figures and traces.
        uses: what the work uses until the end of the task.

    Attributes:
        state: new, waiting (for other work), queued or running; then landed (it ran, or no block
            was left for it), failed, cancelled, late or dropped.
        ended, error, landed: of its end, see `End`.
        left: the blocks to move, which are known before the task is queued.
        number: of the task in the order in which tasks were entered.
        due, background, alone: see `Turn`; set ``alone`` before the task is entered.
        soon: a background task that is due as a normal one is, since a caller waits for it; set it
            before the task is entered.
        since: the time since which the task waits for its turn.
        followed: the numbers of the tasks that ran before it, for the trace.
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
        End.__init__(self, queue.graph, blocks, name)
        Turn.__init__(self, nbytes=nbytes)
        self.graph = None  # until it is entered
        self.work: Callable[[Task, Mask], Any] | None = work
        self.queue = queue
        self.uses = uses
        self.left: Mask = self.landed
        self.soon = False
        self.since = 0.0
        self.followed: tuple[int, ...] = ()

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


class Running(NamedTuple):
    """A task that runs since a time; the trace shows it at a place of its queue."""

    place: int
    since: float


class Workers(ABC):
    """The queue of a task, which runs it.

    Attributes:
        tier: empty: no figures count its tasks.
        queued_bytes: of tasks that were entered for it and have not ended.
        running: the tasks that run.
    """

    def __init__(self, graph: Executor, name: str, tier: str) -> None:
        self.graph = graph
        self.name = name
        self.tier = tier
        self.queued_bytes = 0
        self.running = dict[Task, Running]()

    @property
    def slow(self) -> bool:
        """Return True if a task runs for too long, so that new background tasks are dropped."""
        return False

    @abstractmethod
    def push(self, task: Task, /) -> None:
        """Queue a task, also one that is queued and is due sooner from now on."""

    async def run(self, task: Task) -> None:
        """Queue a task, and wait for its end."""
        self.push(task)
        if not task.ended:
            wait = Wait(here=True)
            task.wake_first(wait)
            await wait

    def begin(self, task: Task) -> None:
        """Note that a task runs."""
        places = {running.place for running in self.running.values()}
        place = next(number for number in count(1) if number not in places)
        task.state = "running"
        self.running[task] = Running(place, self.graph.runtime.time())

    def finish(self, task: Task, landed: Mask | None, error: BaseException | None = None) -> None:
        """Record the end of a task that runs. A second call does nothing."""
        running = self.running.pop(task, None)
        if running is None:
            return
        place, start = running
        end = self.graph.runtime.time()
        what = task.number, task.name, task.blocks, task.nbytes, task.followed
        ran = Ran(self.name, place, start, end, *what)
        self.graph.trace.add(self.tier, ran, start - task.since)
        task.trail = (task.number,)
        self.graph.end(task, landed, "failed" if error else "landed", error)
