# SPDX-License-Identifier: Apache-2.0
"""Run everything that waits as coroutines: one loop, one thread, one lock for a process."""

from portakv.tasks.limit import SLACK, Limit, Priority, Turn, blocking, shared_limit
from portakv.tasks.runtime import End, Handle, Runtime, Signal, TaskGroup, Wait, Work, runtime

__all__ = [
    "SLACK",
    "End",
    "Handle",
    "Limit",
    "Priority",
    "Runtime",
    "Signal",
    "TaskGroup",
    "Turn",
    "Wait",
    "Work",
    "blocking",
    "runtime",
    "shared_limit",
]
