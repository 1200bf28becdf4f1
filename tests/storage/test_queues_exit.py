# SPDX-License-Identifier: Apache-2.0
"""A graph at the end of the interpreter."""

from __future__ import annotations

import pytest
from support import ready
from support.waits import LIMIT


@pytest.mark.parametrize(
    ("seconds", "left"), [(0.5, 0), pytest.param(99, 3, marks=pytest.mark.slow)]
)
def test_the_interpreter_ends_with_a_full_queue(seconds: float, left: int) -> None:
    """Fault 64. What runs may go on for 10 s, and the rest does not begin."""
    script = f"""
import atexit, time
from support.graph_ends import submit
from portakv.storage.work import Graph, Task
queue = Graph().queue("any", 3)
atexit.register(lambda: print(queue.queued_bytes))  # after the graph's end
def work(task, mask):
    time.sleep({seconds})
submit(queue.graph, [Task(work, 1, queue=queue, nbytes=1) for _ in range(999)])
while len(queue.running) < 3:
    time.sleep(0.001)
"""
    done = ready.run("-c", script, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{left}\n", "")
