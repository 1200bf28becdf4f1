# SPDX-License-Identifier: Apache-2.0
"""Processes that own or read rows for tests which kill them: forked from one that has imported all,
so that one is made in milliseconds."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

from support.peer_process import Peer

_BEGIN = "import support.migrate_pulls\nfrom support.migrate_nursery import bear, end, hear\n"
_children: dict[int, Any] = {}  # in the nursery: the pipe of each


class Nursery(Peer):
    """A process that forks the processes of tests; they end with it."""

    def __init__(self) -> None:
        super().__init__()
        self.do(_BEGIN)

    def __enter__(self) -> Nursery:
        return self

    def born(self, code: str, **values: Any) -> tuple[int, Any]:
        """Return a process that runs code, which begins with nothing but ``tell``, and its first
        message."""
        pid = self.do("answer = bear(run, values)", run=code, values=values)
        return pid, self.hear(pid)

    def hear(self, pid: int) -> Any:
        """Return its next message."""
        return self.do("answer = hear(pid)", pid=pid)

    def end(self, pid: int) -> None:
        """Kill one."""
        self.do("end(pid)", pid=pid)


def bear(code: str, values: dict[str, Any]) -> int:
    """Fork in the nursery, and return the pid."""
    here, there = os.pipe()
    pid = os.fork()
    if pid:
        os.close(there)
        _children[pid] = os.fdopen(here, "rb")
        return pid
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with os.fdopen(there, "wb", 0) as out:
        try:
            _run(code, values, lambda message: out.write(pickle.dumps(message)))
        finally:
            signal.pause()
            os._exit(1)


def _run(code: str, values: dict[str, Any], tell: Callable[[Any], object]) -> None:
    try:
        exec(code, {**values, "tell": tell})
    except Exception as error:
        tell(f"{type(error).__name__}: {error}")


def hear(pid: int) -> Any:
    """Return the next message of a child."""
    return pickle.load(_children[pid])


def end(pid: int) -> None:
    """Kill a child, and forget it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _children.pop(pid).close()
