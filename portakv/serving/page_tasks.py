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


class _Locks:
    """The locks of pages, which add up. A batch of pins ends with the last lock of its pages."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key = dict[bytes, list[_Batch]]()

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, keys: Iterable[bytes], pins: Pins) -> None:
        """Note a lock of each key, which the pins keep."""
        batch = _Batch(pins)
        with self._lock:
            for key in keys:
                self._by_key.setdefault(key, []).append(batch)
                batch.left += 1

    def end(self, keys: Iterable[bytes]) -> None:
        """End a lock of each key; ignore keys without one."""
        ended = list[_Batch]()
        with self._lock:
            for key in keys:
                batches = self._by_key.get(key)
                if not batches:
                    continue
                batch = batches.pop()
                if not batches:
                    del self._by_key[key]
                batch.left -= 1
                if not batch.left:
                    ended.append(batch)
        for batch in ended:
            batch.pins.release()


class _Batch:
    """The pins of a lookup, and the number of its locks that have not ended."""

    def __init__(self, pins: Pins) -> None:
        self.pins = pins
        self.left = 0


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
        self._locks = _Locks()
        self._new = Finished[PageTask]()  # tasks of sizes that are not open, for the thread
        self._new.start()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="portakv-pages", daemon=True)
        store.changes()  # later changes are kept
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Return whether tasks are carried out."""
        return self._thread.is_alive() and not self._closing.is_set()

    @property
    def locked(self) -> int:
        """Return the number of pages that are locked."""
        return len(self._locks)

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
        if self._closing.is_set() or self._is_open({buffer.nbytes for buffer in buffers}):
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

    def lock(self, keys: Sequence[bytes]) -> Mask:
        """Lock the pages that can be loaded in some size; return which, bool ``[keys]``.

        The store evicts no page before the last of its locks has ended.
        """
        result = np.zeros(len(keys), np.bool_)
        left = [*range(len(keys))]
        for pages in self.store.every():
            pins = pages.pin([keys[number] for number in left])
            locked = [number for number, held in zip(left, pins.held, strict=True) if held]
            self._locks.add([keys[number] for number in locked], pins)
            result[locked] = True
            left = [number for number in left if not result[number]]
        return result

    def unlock(self, keys: Iterable[bytes]) -> None:
        """End a lock of each page; ignore pages that are not locked."""
        self._locks.end(keys)

    def delete(self, keys: Sequence[bytes]) -> Mask:
        """Delete pages of any size, locked or not; return which were stored, bool ``[keys]``."""
        result = np.zeros(len(keys), np.bool_)
        for pages in self.store.every():
            result |= pages.delete(keys)
        return result

    def close(self, timeout: float = 10.0) -> None:
        """End the tasks within so many seconds, and close the store.

        Raises `TransferTimeout` as `BlockStore.close` does.
        """
        self._closing.set()
        self._new.close()
        try:
            self.store.close(timeout)
        finally:
            self._thread.join(timeout)

    # --- the thread

    def _run(self) -> None:
        """Report what ends, until the store is closed."""
        poller = select.poll()
        for fd in (self.store.fileno(), self._new.fileno()):
            poller.register(fd, select.POLLIN)
        while not self._closing.is_set():
            poller.poll(LOOK)
            try:
                self._look()
            except Exception:
                # What an engine's listener raises must not end the thread, or tasks would hang.
                _log.exception("look", "A report of pages failed")

    def _look(self) -> None:
        """Report the tasks that have ended and the pages that were lost; begin new tasks."""
        for job in self.store.finished():
            task, part = _of(job)
            task.landed[part] = job.landed
            self._end_one(task)
        gone = [change.key for change in self.store.changes() if not change.stored]
        if gone:
            lost = [*compress(gone, ~self.holds(gone))]
            if lost:
                self._lost(lost)
        for task in self._new.take():
            self._open(task)

    def _open(self, task: PageTask) -> None:
        """Open the store for the sizes of a task, and begin it."""
        try:
            for nbytes in {buffer.nbytes for buffer in task.buffers}:
                self.store.pages(nbytes)
        except PortaKVError as error:
            _log.warning("open", "Pages are not stored or loaded: %s", error)
        self._begin(task)

    def _is_open(self, sizes: set[int]) -> bool:
        """Return whether the store has all of some sizes."""
        opened = {each.size.nbytes for each in self.store.every() if each.blocks is not None}
        return sizes <= opened

    def _begin(self, task: PageTask) -> None:
        """Begin the jobs of a task; a part whose size is not open lands no page."""
        by_size = {pages.size.nbytes: pages for pages in self.store.every()}
        parts = task.parts()
        task.left = len(parts) + 1
        for (nbytes, _), part in parts.items():
            pages = by_size.get(nbytes)
            if pages is None:
                self._end_one(task)
                continue
            keys = [task.keys[number] for number in part]
            view = pages.at([task.buffers[number].address for number in part])
            if task.kind == "save":
                task.fresh[part] = ~pages.holds(keys)
                pages.save(keys, view, tag=(task, part))
            else:
                pages.load(keys, view, tag=(task, part))
        self._end_one(task)

    def _end_one(self, task: PageTask) -> None:
        """Count the end of a part of a task, and report the task after the last part."""
        with self._counting:
            task.left -= 1
            last = not task.left
        if last:
            self._ended(task)
