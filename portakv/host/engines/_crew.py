# SPDX-License-Identifier: Apache-2.0
"""A crew: threads of the host that copy in its memory, while the caller does something else.

Torch's own threads copy one tensor at a time, and keep the caller meanwhile. These take calls that
release the interpreter's lock and that each run in one thread.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial
from queue import SimpleQueue

import torch

Call = Callable[[], object]

#: Threads that take part in a batch, at most. Each has to be woken, and to take the interpreter's
#: lock for every call.
MOST = 8


class Batch:
    """Calls that the crew makes, in any order, once it is started; the caller helps in `wait`.

    No more threads take part than torch may use here (`torch.get_num_threads`), the caller among
    them: where that is one, `wait` makes all of the calls.
    """

    def __init__(self, calls: Iterable[Call]) -> None:
        self._calls = deque(calls)
        # Lists and a queue, whose methods nothing can interrupt halfway.
        self._begun: list[None] = []
        self._ended: list[None] = []
        self._failed: list[BaseException] = []
        self._bell: SimpleQueue[None] = SimpleQueue()

    def start(self) -> None:
        """Let the crew begin."""
        hands = min(len(self._calls), torch.get_num_threads(), MOST) - 1
        if hands > 0:
            _crew().invite(self, hands)

    def wait(self) -> None:
        """Help until all calls have ended; raises what one of them raised.

        Nothing is under way when it returns, or raises that or an interrupt.
        """
        try:
            self._work()
        finally:
            self.stop()
        if self._failed:
            error = self._failed[0]
            try:
                raise error
            finally:
                del error  # it holds this frame
                self._failed.clear()

    def stop(self) -> None:
        """Drop the calls that nobody has begun, and wait for the others."""
        self._calls.clear()
        interrupt: KeyboardInterrupt | None = None
        while len(self._ended) < len(self._begun):
            try:
                self._bell.get()
            except KeyboardInterrupt as error:  # a call takes less than a millisecond
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def share(self) -> None:
        """Take part in a thread of the crew."""
        self._begun.append(None)  # before a call is taken, so that `stop` waits for it
        try:
            self._work()
        except BaseException as error:
            self._calls.clear()
            self._failed.append(error)
        finally:
            self._ended.append(None)
            self._bell.put(None)

    def _work(self) -> None:
        while True:
            try:
                call = self._calls.popleft()
            except IndexError:
                return
            call()


class _Crew:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        # One for each thread, since the threads that wait at one queue wake each other in a row.
        self._doors: list[SimpleQueue[Batch]] = []

    def invite(self, batch: Batch, hands: int) -> None:
        """Have so many threads take part in a batch, as soon as they are done with earlier ones."""
        with self._lock, suppress(RuntimeError):  # where none can start, the caller works alone
            while len(self._doors) < hands:
                door = SimpleQueue[Batch]()
                serve = partial(_serve, door)
                threading.Thread(target=serve, name="portakv-crew", daemon=True).start()
                self._doors.append(door)
        for door in self._doors[:hands]:
            door.put(batch)


def _serve(door: SimpleQueue[Batch]) -> None:
    while True:
        door.get().share()  # by no name: a thread that waits holds no batch


@cache
def _crew() -> _Crew:
    """The crew of this process: a forked one has none of its parent's threads."""
    os.register_at_fork(after_in_child=_crew.cache_clear)
    return _Crew()
