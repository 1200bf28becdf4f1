# SPDX-License-Identifier: Apache-2.0
"""Loops for tests: one with a seeded order and a fake clock, and others in a thread. One of these
has a fake clock, and one watches its steps."""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Callable
from contextvars import Context
from random import Random
from typing import Any

from portakv.tasks import Handle, Runtime
from portakv.tasks.runtime import Loop, Steps

#: Seconds of a thread's processor time that one round of a loop may take.
MOST = 2e-3


class ShuffledLoop(Loop):
    """A loop whose ready calls run in an order that a seed gives."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self._calls = list[asyncio.Handle]()
        super().__init__()

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        self._calls.append(asyncio.Handle(callback, args, self, context))
        super().call_soon(self._run_any)
        return self._calls[-1]

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        self._calls.append(asyncio.Handle(callback, args, self, context))
        super().call_soon_threadsafe(self._run_any)
        return self._calls[-1]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return super().call_at(when, self.call_soon, callback, *args, context=context)

    def _run_any(self) -> None:
        call = self._calls.pop(self.random.randrange(len(self._calls)))
        if not call.cancelled():
            call._run()


class SeededLoop(ShuffledLoop):
    """A loop with a seeded order, whose time is its own: it goes on to the next timer."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        super().__init__(Random(seed))
        self.descriptors.select = self._select  # type: ignore[method-assign]

    def time(self) -> float:
        return self.now

    def _select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "no coroutine is ready, and none waits for a time"
        self.now += timeout
        return []


def run_seeded(seed: int, steps: Callable[[Runtime], Steps[None]]) -> float:
    """Run a coroutine in a seeded order; return the time that it took by the fake clock."""
    loop = SeededLoop(seed)
    runtime = Runtime(loop)
    handle: Handle[None] = runtime.start(steps(runtime))
    handle.on_end(loop.stop)
    loop.run_forever()
    loop.close()
    handle.synchronize()
    return loop.now


class ThreadLoop(Loop):
    """A loop in a separate thread, as another process has one."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.Thread(target=self.run_forever, daemon=True)

    def begin(self) -> None:
        """Start the thread."""
        self.thread.start()

    def end(self) -> None:
        """Stop the thread."""
        self.call_soon_threadsafe(self.stop)
        self.thread.join()
        self.close()


class SetLoop(ThreadLoop):
    """A loop in a thread whose time stands still until a test sets it."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now
        super().__init__()
        self.runtime = Runtime(self)
        self.begin()

    def time(self) -> float:
        return self._now

    def set(self, now: float) -> None:
        """Let it be a time, and wait until the loop has done what is due by then."""
        self._now = now
        for _ in range(2):
            seen = threading.Event()
            self.call_soon_threadsafe(seen.set)
            assert seen.wait(30.0)


class WatchedLoop(ThreadLoop):
    """A loop in a thread that notes the rounds which took more than `MOST` of its processor time.

    Another thread that holds the interpreter takes no processor time of this one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slow = list[float]()
        note_slow_rounds(self, self.slow)
        self.begin()


def note_slow_rounds(loop: Loop, slow: list[float]) -> None:
    """Note the seconds of each round of a loop that takes more than `MOST` of processor time."""
    poll = loop.descriptors.select
    last = 0.0

    def select(timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        nonlocal last
        now = time.thread_time()  # a pause takes none
        if last and now - last > MOST:
            slow.append(now - last)
        last = now
        return poll(timeout)

    loop.descriptors.select = select  # type: ignore[method-assign]


def watch_steps() -> list[float]:
    """Watch each loop that this process makes; return the list of slow rounds."""
    slow = list[float]()
    made = Loop.__init__

    def make(self: Loop) -> None:
        made(self)
        note_slow_rounds(self, slow)

    Loop.__init__ = make  # type: ignore[method-assign]
    return slow
