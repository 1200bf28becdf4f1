# SPDX-License-Identifier: Apache-2.0
"""`Processes`: the processes of a keeper's clients, and their ends."""

from __future__ import annotations

import os
from collections.abc import Iterable

from portakv.errors import HostMemoryError
from portakv.host.shared import started
from portakv.serving.keeper_leases import ClientProcess


class Processes:
    """The processes of clients, each with a descriptor that is readable once it has ended.

    One thread uses it.
    """

    def __init__(self) -> None:
        # A process without a descriptor is looked at; -1.
        self._watched = dict[ClientProcess, int]()

    def watch(self, processes: Iterable[ClientProcess]) -> None:
        """Watch these processes from now on, and no others."""
        present = {process for process in processes if process.key[1] != os.getpid()}
        for process in [*self._watched]:
            if process not in present:
                self._forget(process)
        for process in present:
            if self._watched.get(process, -1) < 0:
                self._watched[process] = _descriptor_of(process)

    def descriptors(self) -> list[int]:
        """Return the descriptors of processes."""
        return [descriptor for descriptor in self._watched.values() if descriptor >= 0]

    def take_ended(self, ready: set[int]) -> list[ClientProcess]:
        """Return the processes that have ended, and watch them no longer.

        ``ready``: the descriptors that are readable.
        """
        ended = list[ClientProcess]()
        for process, descriptor in [*self._watched.items()]:
            if descriptor in ready or (descriptor < 0 and _has_ended(process)):
                self._forget(process)
                ended.append(process)
        return ended

    def close(self) -> None:
        """Watch no process any longer."""
        self.watch(())

    def _forget(self, process: ClientProcess) -> None:
        descriptor = self._watched.pop(process)
        if descriptor >= 0:
            os.close(descriptor)


def _has_ended(process: ClientProcess) -> bool:
    """Return whether a process has ended. False also if the system does not say now: rows that the
    process may write must not be lent to others."""
    (_, pid, began) = process.key
    try:
        return started(pid) != began
    except HostMemoryError:
        return False


def _descriptor_of(process: ClientProcess) -> int:
    """Return a descriptor of a process; -1 if it has ended, or the system gives none.

    A process without a descriptor is looked at instead, so no error of the system is lost.
    """
    (_, pid, _) = process.key
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return -1
    if not _has_ended(process):
        return descriptor
    os.close(descriptor)  # of a later process of that number
    return -1
