# SPDX-License-Identifier: Apache-2.0
"""Run what waits on the loop beside a thread that holds the interpreter, and watch each step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.busy_ports import PORTS
from support.waits import LIMIT

RUNS = 3


@pytest.mark.parametrize("how", ["idle", "busy"])
def test_ports_run_in_short_steps_and_beside_a_thread_that_holds_the_interpreter(how: str) -> None:
    judge([*PORTS], how)


def test_a_long_step_is_found() -> None:
    """The negative control."""
    with pytest.raises(AssertionError, match=r"^slow 0\."):
        judge(["store_server", "slow"], "idle")


def judge(ports: list[str], how: str) -> None:
    """Expect a run of each port without a slow step, and that each port ends in each of its runs.

    What other processes do to the caches of a busy machine makes a step of one run slow. A step
    that has too much to do is slow in all.
    """
    left = ports
    for _ in range(RUNS):
        done = run(left, how)
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines] == left, done.stdout + done.stderr
        slow = [line for line in lines if " " in line]
        if not slow:
            return
        left = [line.split()[0] for line in slow]
    raise AssertionError("\n".join(slow))


def run(ports: list[str], how: str) -> subprocess.CompletedProcess[str]:
    """Run ports in a process whose loops are watched."""
    return subprocess.run(
        [sys.executable, "-m", "support.busy_ports", how, *ports],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
