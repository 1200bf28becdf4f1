# SPDX-License-Identifier: Apache-2.0
"""Make memory that processes share, and name a process so that no later one has its name."""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from typing import TypeAlias

from portakv.errors import HostMemoryError
from portakv.host import _registration
from portakv.runtime import resources
from portakv.runtime.resources import fcntl

#: The namespace, the number and the start of a process, which no later process has.
Process: TypeAlias = tuple[int, int, int]


def unnamed(nbytes: int) -> mmap.mmap:
    """Return shared memory without a name, with allocated pages, all zero.

    It vanishes with its last process. Other processes open its descriptor. Raises `HostMemoryError`
    if there is no space.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        if nbytes > _registration.available():
            raise OSError(errno.ENOMEM, "more than this process may have")
        with open(os.memfd_create("portakv-", flags), "r+b") as file:
            os.ftruncate(file.fileno(), nbytes)
            _registration.use_huge_pages(file.fileno(), nbytes)
            os.posix_fallocate(file.fileno(), 0, nbytes)
            # If it could become shorter, that would be a SIGBUS for all processes that map it.
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        if error.errno in resources.NONE_FREE:
            why = resources.reason(error)
            raise HostMemoryError(f"Expected a descriptor for shared memory, but {why}.") from None
        raise HostMemoryError(
            f"Expected {nbytes} bytes of shared memory, got none ({error.strerror}). Request less, "
            f"or raise the machine's limit (cgroup)."
        ) from None


def process_space() -> int:
    """Return the namespace of process numbers: each container has a separate one."""
    with suppress(OSError):  # no /proc
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def process_state(pid: int) -> tuple[str, int] | None:
    """Return the state of a process, a letter, and its start time; None: it ended.

    Raises `HostMemoryError` if the system does not say, as without a free descriptor: a process
    that lives must not count as ended.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # the name of a process may be no text
            fields = file.read().rpartition(b")")[2].split()  # from the state on
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError as error:
        raise HostMemoryError(
            f"Expected to read the state of process {pid}, got an error: {resources.reason(error)}."
        ) from None
    state = fields[0].decode()
    return None if state in ("Z", "X") else (state, int(fields[19]))


def started(pid: int) -> int | None:
    """Return the start time of a process, which distinguishes it from a later one of its number;
    None: it ended. Raises as `process_state` does."""
    state = process_state(pid)
    return None if state is None else state[1]


def process_here() -> Process:
    """Return the name of this process, for processes of its host. Raises as `process_state`
    does."""
    pid = os.getpid()
    return process_space(), pid, started(pid) or 0
