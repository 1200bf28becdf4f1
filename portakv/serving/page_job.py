# SPDX-License-Identifier: Apache-2.0
"""`PageJob`: a save or a load of pages; `Overdue`: the saves that have to end by a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Literal, Protocol

import numpy as np

from portakv.arguments import seconds
from portakv.errors import PortaKVError
from portakv.graph import Handle, Mask
from portakv.runtime.finished import Finished
from portakv.serving.keeper_transfer import KeptTransfer


class PageJob:
    """A save or a load of pages. Any thread may call.

    Attributes:
        kind: "save" or "load".
        keys: as the caller passed them.
        tag: what the caller passed to tell its jobs apart.
        nbytes: bytes of a page.
        began: when the call was made, in seconds of `time.monotonic`.
        seconds: from then to the end; 0 before the end.
    """

    def __init__(
        self, kind: Literal["save", "load"], keys: Sequence[bytes], nbytes: int, tag: Hashable
    ) -> None:
        self.kind = kind
        self.keys = keys
        self.tag = tag
        self.nbytes = nbytes
        self.began = time.monotonic()
        self.seconds = 0.0
        self._handle: Handle | KeptTransfer | None = None
        self._overdue: Overdue | None = None  # has the job until its end
        self._given_up: Mask | None = None  # the pages that had landed by then

    def __repr__(self) -> str:
        return f"PageJob({self.kind}, {len(self.keys)} pages, tag={self.tag!r})"

    @property
    def handle(self) -> Handle | KeptTransfer | None:
        """Return the store's handle, or the keeper's transfer; None if there was no store."""
        return self._handle

    @property
    def landed(self) -> Mask:
        """Return the pages that are stored, or were loaded, bool ``[keys]``; none before the
        end."""
        if self._given_up is not None:
            return self._given_up
        if self._handle is None:
            return np.zeros(len(self.keys), np.bool_)
        return self._handle.landed

    def done(self) -> bool:
        """Return whether the job has ended, so that nothing uses the pages; never block or
        raise."""
        if self._handle is None or self._given_up is not None:
            return True
        return _has_ended(self._handle)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the job has ended, at most so many seconds; return whether it has."""
        limit = seconds("timeout", timeout, optional=True)
        if self._handle is not None and self._given_up is None:
            with suppress(PortaKVError):
                self._handle.synchronize(limit)
        return self.done()

    def give_up(self) -> bool:
        """End a save of `PageStore` that a tier holds, once nothing reads its pages.

        Returns whether the job has ended. Pages that are being written may land later.
        """
        released = None if self._handle is None else self._handle.released
        unused = released is not None and _has_ended(released)
        if unused and self._overdue is not None and self._overdue.remove(self):
            self._given_up = self.landed.copy()
            self._add()
        return self.done()

    def cancel(self) -> bool:
        """Move no further page; return whether some pages will not be moved.

        The pages that are being moved are in use until the end.
        """
        return self._handle is not None and self._handle.cancel()

    def _follow(
        self, handle: Handle | KeptTransfer, ended: Finished[PageJob], overdue: Overdue | None
    ) -> None:
        """Add the job to a queue at the end of its handle, or when it is given up."""
        self._handle = handle
        self._ended = ended
        self._overdue = overdue
        handle.when_ended(self._end)

    def _end(self) -> None:
        if self._overdue is None or self._overdue.remove(self):
            self._add()

    def _add(self) -> None:
        self.seconds = time.monotonic() - self.began
        self._ended.add(self)


class Overdue:
    """Saves with the times by which they have to end. The caller that removes a save ends it.

    Any thread may call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until = dict[PageJob, float]()
        self._next = float("inf")  # no save is due before

    def add(self, job: PageJob, until: float) -> None:
        """Add a save that has to end by a time of `time.monotonic`."""
        with self._lock:
            self._until[job] = until
            self._next = min(self._next, until)

    def remove(self, job: PageJob) -> bool:
        """Remove a save; return whether it was there."""
        with self._lock:
            return self._until.pop(job, None) is not None

    def due(self, now: float) -> list[PageJob]:
        """Return the saves whose times have come; they stay until `remove`."""
        if now < self._next:
            return []
        with self._lock:
            self._next = min(self._until.values(), default=float("inf"))
            return [job for job, until in self._until.items() if until <= now]


class _Ends(Protocol):
    def done(self) -> bool: ...


def _has_ended(transfer: _Ends) -> bool:
    """Return whether a transfer has ended, with or without an error."""
    try:
        return transfer.done()
    except PortaKVError:
        return True
