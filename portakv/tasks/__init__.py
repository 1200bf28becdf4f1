# SPDX-License-Identifier: Apache-2.0
"""Run everything that waits as coroutines: one loop, one thread, one lock for a process."""

from portakv.tasks.limit import Limit, blocking
from portakv.tasks.runtime import End, Handle, Runtime, Signal, TaskGroup, Wait, Work, runtime

__all__ = [
    "End",
    "Handle",
    "Limit",
    "Runtime",
    "Signal",
    "TaskGroup",
    "Wait",
    "Work",
    "blocking",
    "runtime",
]
