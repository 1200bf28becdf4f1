# SPDX-License-Identifier: Apache-2.0
"""Run what waits on the loop beside a thread that holds the interpreter, and watch each step.

Each port runs in a fresh process, whose loops are watched.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.waits import LIMIT

BEGIN = """
import gc, sys, threading, time
gc.disable()  # it may collect in any step
from contextlib import closing
from support.seeded_loop import MOST, watch_steps
from support.waits import LIMIT
slow = watch_steps()
def hold():
    while True:
        pass
if sys.argv[1] == "busy":
    threading.Thread(target=hold, daemon=True).start()
"""
PULL = """
from support.migrate_pulls import Couple, sides
with sides() as made:
    both = Couple(made)
    for number in range(10):
        offer = both.offer()
        both.pull(offer, verify=number == 9).synchronize(LIMIT)
        assert both.right()
        assert offer.taken(LIMIT)
"""
SERVER = """
from support.store_server_host import KEYS, caches, hosts, same
with hosts() as made:
    whole = caches()
    into = caches()
    blocks = made(whole).join(whole).blocks[0]
    for number in range(10):
        blocks.save(whole, range(4), KEYS[:4]).synchronize(LIMIT)
        loaded = blocks.load(into, range(4), KEYS[:4])
        loaded.synchronize(LIMIT)
        assert loaded.landed.all() and same(whole, into, 4)
"""
STORE = """
from tempfile import TemporaryDirectory
from portakv.storage import BlockForm, BlockStore, Disk
from support.store_server_host import KEYS, caches, same
whole = caches()
into = caches()
form = BlockForm.of(whole, "model")
with TemporaryDirectory() as folder:
    size = 16 * form.image_bytes
    with BlockStore(form, staging=size, tiers=[Disk(folder, capacity=1 << 24)]) as store:
        for number in range(5):
            store.save(whole, range(4), KEYS[:4]).synchronize(LIMIT)
            store.load(into, range(4), KEYS[:4]).synchronize(LIMIT)
            assert same(whole, into, 4)
"""
SLOW = """
from portakv.tasks import Wait, runtime
async def steps():
    await Wait(until=runtime().time())
    end = time.thread_time() + 2 * MOST
    while time.thread_time() < end:
        pass
    await Wait(until=runtime().time())
runtime().start(steps()).synchronize(LIMIT)
"""
END = """
print("ended", *slow)
"""
RUNS = 3
PORTS = {"pull": PULL, "store server": SERVER, "store": STORE}


@pytest.mark.parametrize("how", ["idle", "busy"])
@pytest.mark.parametrize("port", PORTS)
def test_a_port_runs_in_short_steps_and_beside_a_thread_that_holds_the_interpreter(
    port: str, how: str
) -> None:
    judge(PORTS[port], how)


def test_a_long_step_is_found() -> None:
    """The negative control."""
    with pytest.raises(AssertionError, match=r"^ended 0\."):
        judge(SLOW, "idle")


def judge(script: str, how: str) -> None:
    """Expect a run without a slow step, and that the script ends in each.

    What other processes do to the caches of a busy machine makes a step of one run slow. A step
    that has too much to do is slow in all.
    """
    for _ in range(RUNS):
        done = run(script, how)
        assert done.stdout.startswith("ended"), done.stdout + done.stderr
        if done.stdout == "ended\n":
            return
    raise AssertionError(done.stdout)


def run(script: str, how: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process whose loops are watched."""
    return subprocess.run(
        [sys.executable, "-c", BEGIN + script + END, how],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
