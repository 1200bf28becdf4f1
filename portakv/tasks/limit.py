# SPDX-License-Identifier: Apache-2.0
"""Let only a few coroutines work at a time, in the order in which their work is due."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from typing import Literal, TypeAlias, TypeVar

from portakv.runtime.bounded import Bounded
from portakv.tasks.runtime import Runtime, Wait, Work, runtime

T = TypeVar("T")

#: How soon work is due.
Priority: TypeAlias = Literal["urgent", "normal", "background"]
#: Seconds after its request at which work of each priority is due.
SLACK = {"urgent": 0.0, "normal": 0.05, "background": 2.0}


class Turn:
    """Work that waits for a place of a limit, or has one.

    Attributes:
        due: the time at which the work is due.
        number: orders work that is due at the same time.
        nbytes: counts for the rate.
        background: the work may wait for all work that is not of the background.
        alone: of background work, which keeps the interpreter rather than a device: no other such
            work runs at the same time, as more would only make urgent work wait.
        begun: the work has a place.
    """

    def __init__(self, due: float = 0.0, number: int = 0, nbytes: int = 0) -> None:
        self.due = due
        self.number = number
        self.nbytes = nbytes
        self.background = False
        self.alone = False
        self.begun = False
        self.place: Wait | None = None  # for one


class Limit:
    """At most ``width`` coroutines work at a time. The one whose work is due first begins next.

    Work of equal priority begins in the order of its requests. A later request of a higher
    priority overtakes, but not work that has waited for the difference of their `SLACK`. All calls
    are made in steps of coroutines, or with the runtime's lock.

    Args:
        gbps: work begins at a rate of at most so many 10^9 bytes a second; None: at any rate.
    """

    def __init__(self, runtime: Runtime, width: int = 1, gbps: float | None = None) -> None:
        self.width = width
        self._runtime = runtime
        self._free = width
        self._background = 0  # turns of the background that have a place
        self._alone = 0  # those of them that run alone
        self._seconds_per_byte = 1e-9 / gbps if gbps else 0.0
        self._next = 0.0  # the time at which the rate allows more work
        self._delayed = False  # a coroutine waits until then
        self._number = 0
        # Turns that wait, by due time and number: of the background, those of it that run alone,
        # and others. So no kind holds up another one.
        self._heaps = [list[tuple[float, int, Turn]]() for _ in range(3)]

    async def acquire(
        self, nbytes: int = 0, priority: Priority = "normal", until: float | None = None
    ) -> bool:
        """Wait for a place and for the rate; return False if neither came before ``until``.

        After True the caller calls `release` at the end of its work of ``nbytes``.
        """
        due = self._runtime.time() + SLACK[priority]
        if until is not None:
            due = min(due, until)
        self._number += 1
        return await self.take(Turn(due, self._number, nbytes), Wait(until=until))

    async def work(self, call: Callable[..., T], *arguments: object) -> T:
        """Do work that blocks (see `Work`) once there is a place, and return its result."""
        await self.acquire()
        try:
            result: T = await Work(call, *arguments)
            return result
        finally:
            self.release()

    async def take(self, turn: Turn, wait: Wait) -> bool:
        """Wait for the place of a turn; return False if the wait ended before there was one.

        After True the caller calls `release` with the turn.
        """
        turn.place = wait
        self.push(turn)
        try:
            await wait
        except BaseException:  # cancelled, perhaps after the place was given
            if turn.begun:
                self.release(turn)
            raise
        finally:
            wait.woken = True  # else it would get a place
        return turn.begun

    def push(self, turn: Turn) -> None:
        """Let a turn wait, also one that waits and is due sooner from now on."""
        kind = 2
        if turn.background:
            kind = 1 if turn.alone else 0
        heappush(self._heaps[kind], (turn.due, turn.number, turn))
        self._begin()

    def release(self, turn: Turn | None = None) -> None:
        """Give the place of a turn to the one that is due first; None: that of `acquire`."""
        self._free += 1
        if turn is not None and turn.background:
            self._background -= 1
            self._alone -= turn.alone
        self._begin()

    def _begin(self) -> None:
        """Give places to the turns that are due first."""
        while self._free and (heap := self._first()):
            turn = heap[0][2]
            wait = turn.place
            if wait is None or wait.woken:  # it has given up, or this is its former entry
                heappop(heap)
                continue
            now = self._runtime.time()
            if self._next > now:
                self._delay()
                return
            heappop(heap)
            # Late work may catch up by its own time: clocks oversleep. More would be a burst.
            needs = turn.nbytes * self._seconds_per_byte
            self._next = needs + (max(self._next, now - needs) if self._next else now)
            self._free -= 1
            if turn.background:
                self._background += 1
                self._alone += turn.alone
            turn.begun = True
            wait.wake()

    def _first(self) -> list[tuple[float, int, Turn]]:
        """Return the heap of the turn that is due first; an empty one if no turn may begin."""
        background, alone, first = self._heaps
        # One place is left for work that is not of the background.
        if self._background < max(1, self.width - 1):
            if background and (not first or background < first):
                first = background
            if alone and not self._alone and (not first or alone < first):
                first = alone
        return first

    def _delay(self) -> None:
        """Begin again at the time that the rate allows."""
        if not self._delayed:
            self._delayed = True
            self._runtime.start(self._begin_later())

    async def _begin_later(self) -> None:
        await Wait(until=self._next)
        self._delayed = False
        self._begin()


#: The most helpers that do the work of `blocking` at the same time.
BLOCKING = 4

#: The limits of the process, by runtime and name; a forked process has others.
_shared: Bounded[tuple[Runtime, str], Limit] = Bounded("limits of the process", 8)


def shared_limit(name: str, width: int) -> Limit:
    """Return the limit of this process that has a name, made at the first call."""
    here = runtime()
    return _shared.get_or_make((here, name), partial(Limit, here, width))


def blocking() -> Limit:
    """Return the limit of this process for work that may take over a millisecond, such as copies on
    the host, imports and maps of memory. Such work waits for no other work of the limit."""
    return shared_limit("blocking work", BLOCKING)
