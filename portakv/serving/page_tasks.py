# SPDX-License-Identifier: Apache-2.0
"""`PageTasks`: saves and loads of pages whose sizes are not known before they come.

A task has pages of any sizes, each at its own address. A thread reports the ends of tasks and the
pages that were lost, and opens the store for sizes that are new.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from portakv.errors import PortaKVError
from portakv.graph import Mask
from portakv.runtime.finished import Finished
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.pages import PageJob, PageStore, page_key

_log = RateLimitedLog(logging.getLogger(__name__))
#: Milliseconds between two looks at pages that were lost while no task ends.
LOOK = 1000

Kind: TypeAlias = Literal["save", "load"]


class Buffer(NamedTuple):
    """Bytes in the host memory of an engine.

    Attributes:
        address: of the first byte.
        nbytes: the number of bytes.
    """

    address: int
    nbytes: int


class PageTask:
    """A save or a load of pages.

    Attributes:
        kind: "save" or "load".
        keys: as the caller passed them; a key may come several times.
        buffers: a page for each key.
        tag: what the caller passed to tell its tasks apart.
        landed: the pages that are stored or were loaded, bool ``[keys]``.
        fresh: the pages of a save that the store did not have before, bool ``[keys]``.
    """

    def __init__(
        self, kind: Kind, keys: Sequence[bytes], buffers: Sequence[Buffer], tag: Hashable
    ) -> None:
        self.kind = kind
        self.keys = keys
        self.buffers = buffers
        self.tag = tag
        self.landed = np.zeros(len(keys), np.bool_)
        self.fresh = np.zeros(len(keys), np.bool_)
        self.left = 0  # jobs that have not ended

    @property
    def landed_bytes(self) -> int:
        """Return the bytes of the pages that landed; of a save, those that were not there
        before."""
        moved = self.landed & self.fresh if self.kind == "save" else self.landed
        return sum(self.buffers[number].nbytes for number in np.flatnonzero(moved))

    def parts(self) -> dict[tuple[int, int], list[int]]:
        """Return the numbers of pages that one job moves: of one size, and each key once."""
        parts = dict[tuple[int, int], list[int]]()
        seen = dict[bytes, int]()
        for number, (key, buffer) in enumerate(zip(self.keys, self.buffers, strict=True)):
            times = seen.get(key, 0)
            seen[key] = times + 1
            parts.setdefault((buffer.nbytes, times), []).append(number)
        return parts


class PageTasks:
    """The tasks of an engine over a store of pages.

    Args:
        store: of the pages; `close` closes it.
        ended: called for each task that has ended, in the thread of the tasks.
        lost: called with the keys of `page_key` of pages that the store no longer has, in the same
            thread.

    No method but `close` waits for a transfer. After `close` tasks end without a page.
    """

    def __init__(
        self,
        store: PageStore,
        ended: Callable[[PageTask], object],
        lost: Callable[[list[bytes]], object],
    ) -> None:
        self.store = store
        self._ended = ended
        self._lost = lost
        self._new = Finished[PageTask]()  # tasks of sizes that are not open
        self._new.start()
        self._closed = threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        store.changes()  # later changes are kept
        self._thread = threading.Thread(target=self._run, name="portakv-pages", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Return whether tasks will end."""
        return self._thread.is_alive() and not self._closed.is_set()

    def begin(
        self, kind: Kind, keys: Sequence[bytes], buffers: Sequence[Buffer], tag: Hashable = None
    ) -> PageTask:
        """Begin a task. Its buffers belong to it until its end.

        Args:
            kind: "save" or "load".
            keys: of any length.
            buffers: a page for each key.
            tag: any value, for the caller.
        """
        task = PageTask(kind, keys, buffers, tag)
        known = {size.nbytes for size in self.store.sizes()}
        if self._closed.is_set() or {buffer.nbytes for buffer in buffers} <= known:
            self._begin(task)
        else:
            self._new.add(task)
        return task

    def holds(self, keys: Sequence[bytes]) -> Mask:
        """Return which pages can be loaded in some size, bool ``[keys]``."""
        result = np.zeros(len(keys), np.bool_)
        for pages in self.store.every():
            result |= pages.holds(keys)
        return result
