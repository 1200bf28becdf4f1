# SPDX-License-Identifier: Apache-2.0
"""Run everything that waits as coroutines: one loop, one thread, one lock for a process."""

from portakv.tasks.runtime import (
    SLACK,
    End,
    Handle,
    Limit,
    Priority,
    Rate,
    Runtime,
    Signal,
    TaskGroup,
    Turn,
    Wait,
    Work,
    blocking,
    runtime,
    shared_limit,
)

__all__ = [
    "SLACK",
    "End",
    "Handle",
    "Limit",
    "Priority",
    "Rate",
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
