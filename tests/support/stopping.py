# SPDX-License-Identifier: Apache-2.0
"""Stop and continue processes of tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from support.waits import LIMIT, until


def stop(pid: int) -> None:
    """Stop a process, and return when each of its threads stands still.

    ``SIGSTOP`` alone does not wait: on a busy machine a thread may run on and answer a message.
    """
    os.kill(pid, signal.SIGSTOP)
    assert until(lambda: stopped(pid), LIMIT)


def go_on(pid: int) -> None:
    """Continue a stopped process."""
    os.kill(pid, signal.SIGCONT)


def stopped(pid: int) -> bool:
    """Return whether each thread of a process is stopped."""
    return all(_state(thread) == "T" for thread in Path(f"/proc/{pid}/task").iterdir())


def _state(thread: Path) -> str:
    """Return the state of a thread (proc(5), the field after the name in parentheses)."""
    return (thread / "stat").read_bytes().rpartition(b")")[2].split()[0].decode()
