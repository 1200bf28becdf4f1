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


class Limit:
    """At most ``width`` coroutines work at a time. The one whose work is due first begins next.

    Work of equal priority begins in the order of its requests. A later request of a higher
    priority overtakes, but not work that has waited for the difference of their `SLACK`.

    Args:
        gbps: work begins at a rate of at most so many 10^9 bytes a second; None: at any rate.
    """

    def __init__(self, runtime: Runtime, width: int = 1, gbps: float | None = None) -> None:
        self._runtime = runtime
        self._free = width
        self._seconds_per_byte = 1e-9 / gbps if gbps else 0.0
        self._next = 0.0  # the time at which the rate allows more work
        self._number = 0
        self._waiting = list[tuple[float, int, Wait]]()  # a heap

    async def acquire(
        self, nbytes: int = 0, priority: Priority = "normal", until: float | None = None
    ) -> bool:
        """Wait for a place and for the rate; return False if neither came before ``until``.

        After True the caller calls `release` at the end of its work of ``nbytes``.
        """
        if self._free and not self._waiting:
            self._free -= 1
        elif not await self._wait(priority, until):
            return False
        begins = False
        try:
            begins = await self._keep_rate(nbytes, until)
        finally:
            if not begins:
                self.release()
        return begins

    async def work(self, call: Callable[..., T], *arguments: object) -> T:
        """Do work that blocks (see `Work`) once there is a place, and return its result."""
        await self.acquire()
        try:
            result: T = await Work(call, *arguments)
            return result
        finally:
            self.release()

    async def _wait(self, priority: Priority, until: float | None) -> bool:
        """Wait until `release` gives a place to this coroutine."""
        now = self._runtime.time()
        due = now + SLACK[priority]
        if until is not None:
            due = min(due, until)
        wait = Wait(until=until)
        self._number += 1
        entry = (due, self._number, wait)
        heappush(self._waiting, entry)
        try:
            if await wait:
                return True
        except BaseException:  # cancelled, perhaps after the place was given
            if wait.woken:
                self.release()
            raise
        finally:
            wait.woken = True  # else `release` would give it the place
        return False

    async def _keep_rate(self, nbytes: int, until: float | None) -> bool:
        """Reserve the time of so many bytes, and wait for its start."""
        now = self._runtime.time()
        needs = nbytes * self._seconds_per_byte
        # Late work may catch up by its own time: clocks oversleep. More would be a burst.
        start = max(self._next, now - needs)
        if until is not None and start > until:
            return False
        self._next = start + needs
        if start > now:
            await Wait(until=start)
        return True

    def release(self) -> None:
        """Give the place to the work that is due first. Runs in a step of a coroutine."""
        while self._waiting:
            _, _, wait = heappop(self._waiting)
            if not wait.woken:
                wait.wake()
                return
        self._free += 1


#: The most helpers that do the work of `blocking` at the same time.
BLOCKING = 4

#: The limits of such work, by runtime; a forked process has another.
_blocking: Bounded[Runtime, Limit] = Bounded("limits of blocking work", 1)


def blocking() -> Limit:
    """Return the limit of this process for work that may take over a millisecond, such as copies on
    the host, imports and maps of memory. Such work waits for no other work of the limit."""
    here = runtime()
    return _blocking.get_or_make(here, partial(Limit, here, BLOCKING))
