# SPDX-License-Identifier: Apache-2.0
"""Processes that share a pool with a test, and a name for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from portakv.host import shared
from portakv.host.pinned import registered
from portakv.host.pool import Block
from portakv.host.shared import SharedPool

SIZE = 3000


def unused_name() -> Iterator[str]:
    """Yield a unique name, and check that nothing is left under it."""
    name = f"test-{os.getpid()}-{time.monotonic_ns()}"
    yield name
    assert name not in shared.names()
    assert registered() == []


class Child:
    """A forked process that runs a function with one end of a pipe."""

    def __init__(self, work: Callable[[Connection], Any]) -> None:
        self.here, there = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self.here.close()  # so that it ends when the test does, whatever the outcome
            try:
                work(there)
                os._exit(0)
            finally:
                os._exit(1)
        there.close()

    def receive(self) -> Any:
        assert self.here.poll(30), "the child says nothing"
        return self.here.recv()

    def end(self) -> int:
        """Return its exit status."""
        with suppress(BrokenPipeError):  # it may have ended by itself
            self.here.send("end")
        return os.waitpid(self.pid, 0)[1]

    def kill(self) -> None:
        """Kill the process, as the kernel does when memory runs out."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Opener(Child):
    """A process ``holder`` that has opened a pool and called ``do`` with it, and waits. At the end
    it releases the blocks that ``do`` returned."""

    def __init__(self, do: Callable[[SharedPool], list[Block] | None], *pool: Any) -> None:
        def work(pipe: Connection) -> None:
            with SharedPool(*pool, label="holder") as opened:
                blocks = do(opened) or []
                pipe.send([(block.index, block.generation) for block in blocks])
                pipe.recv()
                for block in blocks:
                    block.release()

        super().__init__(work)
        self.blocks: list[tuple[int, int]] = self.receive()  # the index and generation of each


def holder(name: str, count: int, value: int = 1) -> Opener:
    """Return a process that has opened a pool and filled some of its blocks."""

    def work(pool: SharedPool) -> list[Block]:
        blocks = [pool.acquire("offload") for _ in range(count)]
        for block in blocks:
            block.tensor.fill_(value)
        return blocks

    return Opener(work, name)
