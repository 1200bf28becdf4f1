# SPDX-License-Identifier: Apache-2.0
"""A process that a test forks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any


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
