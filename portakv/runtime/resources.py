# SPDX-License-Identifier: Apache-2.0
"""Start threads and count descriptors, and name the limit that leaves this process without one."""

from __future__ import annotations

import errno
import logging
import os
import threading

from portakv.errors import PortaKVError

_log = logging.getLogger(__name__)
#: Fewer free descriptors than these are few: a channel or a server then raises the soft limit.
FEW = 64
#: Why no thread can be started.
NO_THREAD = (
    "no thread can be started, see `ulimit -u`, the limit of processes of the container "
    "(pids.max) and the memory"
)
#: The errors of system calls that have no descriptor: of the process, and of the whole system.
NONE_FREE = (errno.EMFILE, errno.ENFILE)


def free(most: int) -> int:
    """Return how many descriptors this process can open now; count up to ``most``."""
    opened = list[int]()
    try:
        for _ in range(most):
            opened.append(os.eventfd(0))
    except OSError:  # no other call shows it: a look into /proc needs a descriptor, too
        pass
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return len(opened)


def raise_limit() -> bool:
    """Raise the soft limit of this process's descriptors to the hard one; return whether it was
    lower. The limit is the whole process's."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in (hard, resource.RLIM_INFINITY):
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # a container may forbid it
        return False
    _log.info(
        "Few file descriptors are free: `ulimit -n` of this process is %d, was %d.", hard, soft
    )
    return True


def raise_limit_if_few() -> None:
    """Raise the soft limit to the hard one if fewer than `FEW` descriptors are free."""
    if free(FEW) < FEW:
        raise_limit()


def reason(error: Exception, process: str = "this process") -> str:
    """Return the text of an operating system's error, with the limit if it is one of descriptors.

    Args:
        process: the process that has the limit, as the subject of the sentence.

    The text ends without a full stop.
    """
    number = getattr(error, "errno", None)
    if number == errno.ENFILE:
        return "the host has too many open files (sysctl fs.file-max)"
    if number != errno.EMFILE:
        return str(error)
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"{process} has too many open files: `ulimit -n` allows {soft} (hard limit {hard}), and "
        f"{free(FEW)} are free. Raise the limit, or close files"
    )


def start_thread(thread: threading.Thread, error: type[PortaKVError]) -> None:
    """Start a thread; raise ``error`` if the system gives no more."""
    try:
        thread.start()
    except RuntimeError:
        raise error(f"Expected to start the thread {thread.name!r}, but {NO_THREAD}.") from None
