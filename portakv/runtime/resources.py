# SPDX-License-Identifier: Apache-2.0
"""What the system gives this process: threads, descriptors, Linux."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from portakv.errors import PortaKVError, Unsupported

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


# ------------------------------------------------------------------------------------------------
# Keep torch's calls of a worker thread off the threads of OpenMP.
#
# Each thread that calls torch has a separate team of OpenMP threads. After each call the team
# spins for a while, on the cores of the model that computes meanwhile.


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch's calls of this thread run in this thread alone; other threads change nothing.

    Does nothing if torch was built without OpenMP. Not for the main thread, where an interrupt
    might leave the number of the caller at one.
    """
    library = _library()
    if library is None:
        yield
        return
    before = torch.get_num_threads()  # torch sets the number of a new thread in its first call
    library.omp_set_num_threads(1)
    try:
        yield
    finally:
        library.omp_set_num_threads(before)


@cache
def _library() -> ctypes.PyDLL | None:
    """Return torch's library, by which the OpenMP functions are found that torch calls."""
    try:
        library = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.omp_set_num_threads(library.omp_get_max_threads())
    except (OSError, AttributeError):  # another system, or another library for threads
        return None
    return library


# ------------------------------------------------------------------------------------------------
# Name the parts of PortaKV that need Linux, where another system runs.
#
# Layouts, plans and the backend `reference` run on any system. Host memory, block stores,
# migration and serving use Linux's files, descriptors and ``/proc``.

if TYPE_CHECKING:
    import fcntl as fcntl
else:
    try:
        import fcntl
    except ImportError:  # Windows

        class fcntl:
            """Replace the module on systems without it; `require_linux` is called before use."""


def require_linux(what: str) -> None:
    """Raise `Unsupported` on another system than Linux.

    Args:
        what: the part that needs it, as the subject of a sentence.
    """
    here = sys.platform
    if here != "linux":
        raise Unsupported(what, f"it needs Linux, and this system is {here}; run it on Linux")


def fallocate(fd: int, offset: int, nbytes: int) -> None:
    """Allocate space for a part of an open file, which is longer then if the part ends after it.

    `os.posix_fallocate` emulates this on a file system without it, by a write of one byte to each
    page, which ``O_DIRECT`` rejects. This function raises `OSError` with ``EOPNOTSUPP`` instead.
    """
    call = ctypes.CDLL(None, use_errno=True).fallocate
    numbers = ctypes.c_long(offset), ctypes.c_long(nbytes)
    while call(fd, 0, *numbers):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
