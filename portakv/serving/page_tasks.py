# SPDX-License-Identifier: Apache-2.0
"""`PageTasks`: saves and loads of pages whose sizes are not known before they come.

A task has pages of any sizes, each at its own address. A thread reports the ends of tasks and the
pages that were lost. Another thread opens the store for sizes that are new.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from itertools import compress
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from portakv.errors import PortaKVError, TransferTimeout
from portakv.graph import Mask
from portakv.runtime.finished import Finished
from portakv.runtime.rate_limited_log import SLOW_DEVICE, RateLimitedLog
from portakv.serving.calls import Calls
from portakv.serving.kept_page_store import KeptPageStore
from portakv.serving.pages import SAVE, PageJob, Pages, PageStore
from portakv.storage.changes import Change
from portakv.storage.pins import Pins

_log = RateLimitedLog(logging.getLogger(__name__))
#: Milliseconds between two looks for tasks that are late while all workers hang: while a load is
#: under way, whose caller waits, and else.
SOON = 100
LOOK = 1000
#: Seconds between two attempts to open a store after one that failed.
PAUSE = 5.0
#: The most keys that wait to be deleted when the store has opened.
DELETED = 65536

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
        return sum(buffer.nbytes for buffer in compress(self.buffers, moved))

    def parts(self) -> list[tuple[int, list[int]]]:
        """Return the numbers of pages that one job moves, with their bytes: each key once.

        Of a task without pages, one part without any.
        """
        parts = dict[tuple[int, int], list[int]]()
        seen = dict[bytes, int]()
        for number, (key, buffer) in enumerate(zip(self.keys, self.buffers, strict=True)):
            times = seen.get(key, 0)
            seen[key] = times + 1
            parts.setdefault((buffer.nbytes, times), []).append(number)
        return [(nbytes, part) for (nbytes, _), part in parts.items()] or [(0, [])]


class _Locks:
    """The locks of pages, which add up. A batch of pins ends with the last lock of its pages.

    ``waits``: a lock waits for a keeper, which may take two seconds, so that a thread makes it.
    """

    def __init__(self, waits: bool) -> None:
        self._lock = threading.Lock()
        self._by_key = dict[bytes, list[_Batch]]()
        self._calls = Calls("portakv-pages-lock") if waits else None

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, keys: Iterable[bytes], pins: Pins) -> None:
        """Note a lock of each key, which the pins keep."""
        batch = _Batch(pins)
        with self._lock:
            for key in keys:
                self._by_key.setdefault(key, []).append(batch)
                batch.left += 1

    def call(self, lock: Callable[[], object]) -> None:
        """Make a call that locks pages: here, or in the thread."""
        if self._calls is None or not self._calls.add(lock):
            lock()

    def close(self, timeout: float) -> None:
        """End the thread after its calls; wait at most so many seconds."""
        if self._calls is not None:
            self._calls.close(timeout)

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


class _Waiting(NamedTuple):
    """A task that waits until the store has opened for its sizes.

    Attributes:
        task: which has begun no job.
        until: the time of the monotonic clock at which it ends without a page.
    """

    task: PageTask
    until: float


class Opening:
    """An opening of the store for sizes that are new.

    Its thread ends when the medium has answered. It may outlive the tasks that wait for it.

    Args:
        store: of the pages.
        sizes: bytes of a page of each size.
        closing: set before the store is closed.
        ended: called at the end, in the thread.

    Attributes:
        sizes: as passed.
        changes: of the pages, from the first opening until the end.
        done: whether it has ended.
    """

    def __init__(
        self,
        store: PageStore | KeptPageStore,
        sizes: set[int],
        closing: threading.Event,
        ended: Callable[[], object],
    ) -> None:
        self.sizes = sizes
        self.changes = list[Change]()
        self.done = False
        self._store = store
        self._closing = closing
        self._ended = ended
        try:
            self.start()
        except RuntimeError as error:  # the opening has failed
            _log.warning("thread", "Pages are not stored or loaded: %s.", error)
            self.done = True
            ended()

    def start(self) -> None:
        """Start the thread; raise `RuntimeError` if the process can have no other."""
        threading.Thread(target=self.run, name="portakv-pages-open", daemon=True).start()

    def run(self) -> None:
        """Open the store, and close it again if it was closed meanwhile."""
        try:
            for nbytes in self.sizes:
                if not self._closing.is_set():
                    self._open(nbytes)
            if self._closing.is_set():
                self._store.close()
        except TransferTimeout as error:
            _log.warning("close", "A store of pages was left open: %s", error)
        finally:
            self.done = True
            self._ended()

    def _open(self, nbytes: int) -> None:
        try:
            self._store.pages(nbytes)
            self.changes += self._store.changes()  # later changes are kept
        except PortaKVError as error:
            _log.warning("open", "Pages are not stored or loaded: %s", error)


class PageTasks:
    """The tasks of an engine over a store of pages.

    Args:
        store: of the pages; `close` closes it.
        ended: called for each task that has ended, in the thread of the tasks.
        lost: called with the keys of `page_key` of pages that the store no longer has, in the same
            thread.

    No method but `close` waits for a transfer, and none waits for a folder to open. A save that the
    folder holds up ends after `SAVE` seconds, a load after the deadline of the store's terms. After
    `close` tasks end without a page.
    """

    def __init__(
        self,
        store: PageStore | KeptPageStore,
        ended: Callable[[PageTask], object],
        lost: Callable[[list[bytes]], object],
    ) -> None:
        self.store = store
        self._ended = ended
        self._lost = lost
        self._new = Finished[PageTask | None]()  # tasks of sizes to be opened, by the thread
        self._new.start()
        self._waiting = list[_Waiting]()  # of the thread
        self._opening: Opening | None = None
        self._deleted = deque[bytes](maxlen=DELETED)  # while the store was closed
        self._next_try = dict[int, float]()  # of sizes for which the store could not be opened
        self._loads = set[PageTask]()  # under way
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="portakv-pages", daemon=True)
        store.changes()  # later changes are kept
        self._locks = _Locks(isinstance(store, KeptPageStore))
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
        # A page that is saved after its deletion stays.
        if self._deleted or self._closed_sizes(task):
            self._new.add(task)
        else:
            self._begin(task)
        return task

    def holds(self, keys: Sequence[bytes]) -> Mask:
        """Return which pages can be loaded in some size, bool ``[keys]``."""
        result = np.zeros(len(keys), np.bool_)
        for pages in self.store.every():
            result |= pages.holds(keys)
        return result

    def stored(self, task: PageTask) -> Mask:
        """Return which pages of a save that has ended are stored, bool ``[keys]``.

        The index of a keeper follows the end of a save, so that it does not count.
        """
        if isinstance(self.store, KeptPageStore):
            return task.landed
        return self.holds(task.keys)

    def lock(self, keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """Lock the pages that can be loaded in some size; return their bytes, int64 ``[keys]``.

        A page that is not there has 0 bytes, and no lock. The store evicts no page before the last
        of its locks has ended. A size that is new ends all locks.
        """
        result = np.zeros(len(keys), np.int64)
        left = [*range(len(keys))]
        for pages in self.store.every():
            pins = pages.pin([keys[number] for number in left])
            locked = [*compress(left, pins.held)]
            self._locks.add([keys[number] for number in locked], pins)
            result[locked] = pages.size.nbytes
            left = [*compress(left, ~pins.held)]
        return result

    def lock_later(
        self, keys: Sequence[bytes], locked: Callable[[npt.NDArray[np.int64]], object]
    ) -> None:
        """Lock pages, and call with what `lock` returns: within this call, or in a thread if the
        store is that of a keeper."""
        self._locks.call(partial(self._lock_then, keys, locked))

    def _lock_then(
        self, keys: Sequence[bytes], locked: Callable[[npt.NDArray[np.int64]], object]
    ) -> None:
        sizes = np.zeros(len(keys), np.int64)
        try:
            sizes = self.lock(keys)
        finally:  # the engine waits for the call
            locked(sizes)

    def unlock(self, keys: Iterable[bytes]) -> None:
        """End a lock of each page; ignore pages that are not locked."""
        self._locks.end(keys)

    def delete(self, keys: Sequence[bytes]) -> Mask:
        """Delete pages of any size, locked or not; return which were stored, bool ``[keys]``.

        While the store opens, no page is known to be stored. The pages are deleted, and reported
        as lost, when it has opened.
        """
        result = np.zeros(len(keys), np.bool_)
        before = self._opened()
        for pages in self.store.every():
            result |= pages.delete(keys)
        after = self._opened()
        if (None in before or before != after) and not self._closing.is_set():
            self._deleted.extend(keys)
            self._new.add(None)  # it may have opened by now
        return result

    def _opened(self) -> list[int | None]:
        """Return what tells the stores of all sizes apart; None for a size that is closed."""
        opened = [pages.opened for pages in self.store.every()]
        return [None if made is None else id(made) for made in opened]

    def close(self, timeout: float = 10.0) -> None:
        """End the tasks, which are not reported, close the store, and end its locks, each within so
        many seconds.

        Raises `TransferTimeout` as `BlockStore.close` does.
        """
        self._closing.set()
        self._new.add(None)
        self._thread.join(timeout)
        try:
            self.store.close(timeout)
        finally:
            self._new.close()
            self._locks.close(timeout)

    # --- the thread

    def _run(self) -> None:
        """Report what ends, until the store is closed."""
        poller = select.poll()
        for fd in (self.store.fileno(), self._new.fileno()):
            poller.register(fd, select.POLLIN)
        while not self._closing.is_set():
            poller.poll(SOON if self._loads else LOOK)
            self._look()

    def _look(self) -> None:
        """Report the tasks that have ended and the pages that were lost; begin new tasks."""
        # Taken before the end of an opening is read, which wakes this thread by the same queue.
        began = [task for task in self._new.take() if task is not None]
        ended = list[PageTask]()
        for job in self.store.finished():
            task, part = _of(job)
            task.landed[part] = job.landed
            task.left -= 1
            if not task.left:
                ended.append(task)
        self._loads.difference_update(ended)
        changes = self._end_opening()
        self._delete_again()
        changes += self.store.changes()
        gone = [change.key for change in changes if not change.stored]
        for task in ended:
            _report(self._ended, task)
        lost = [*compress(gone, ~self.holds(gone))]
        if lost:
            _report(self._lost, lost)
        for task in began:
            limit = SAVE if task.kind == "save" else self.store.terms.deadline
            self._waiting.append(_Waiting(task, time.monotonic() + limit))
        self._waiting = [each for each in self._waiting if not self._has_ended_waiting(each)]

    def _delete_again(self) -> None:
        """Delete the pages whose deletion came while the store was closed."""
        if self._deleted and None not in self._opened():
            keys = [self._deleted.popleft() for _ in range(len(self._deleted))]
            self.delete(keys)

    def _end_opening(self) -> list[Change]:
        """Note the end of an opening; return the changes that it has seen.

        After a failure a size is not tried again for `PAUSE` seconds.
        """
        opening = self._opening
        if opening is None or not opening.done:
            return []
        self._opening = None
        opened = {pages.size.nbytes for pages in self.store.every() if pages.opened is not None}
        for nbytes in opening.sizes - opened:
            self._next_try[nbytes] = time.monotonic() + PAUSE
        return opening.changes

    def _has_ended_waiting(self, waiting: _Waiting) -> bool:
        """Begin a task whose sizes are open, or end it if it is late; return whether it was done.

        The store opens for the sizes of the first task that waits. While it opens, it is closed
        for all sizes.
        """
        now = time.monotonic()
        task = waiting.task
        closed = self._closed_sizes(task)
        tried = {nbytes for nbytes in closed if now < self._next_try.get(nbytes, 0.0)}
        if self._opening is None:
            if closed == tried:
                self._begin(task)
                return True
            self._opening = Opening(
                self.store, closed - tried, self._closing, lambda: self._new.add(None)
            )
        if now < waiting.until:
            return False
        line = "Pages are not stored or loaded: their folder does not open. %s"
        _log.warning("late", line, SLOW_DEVICE)
        parts = task.parts()
        task.left = len(parts)
        for _, part in parts:
            self._fail(task, part)
        return True

    def _closed_sizes(self, task: PageTask) -> set[int]:
        """Return the sizes of a task for which the store is to be opened.

        Of a size that no save had yet, there is no page to load.
        """
        every = {pages.size.nbytes: pages for pages in self.store.every()}
        sizes = {buffer.nbytes for buffer in task.buffers}
        known = {nbytes for nbytes in sizes if nbytes in every}
        closed = {nbytes for nbytes in known if every[nbytes].opened is None}
        return closed | (sizes - known if task.kind == "save" else set())

    def _begin(self, task: PageTask) -> None:
        """Begin the jobs of a task; each ends by the queue of the store."""
        every = {pages.size.nbytes: pages for pages in self.store.every()}
        parts = task.parts()
        task.left = len(parts)
        if task.kind == "load":
            sleeps = not self._loads
            self._loads.add(task)
            if sleeps:  # the thread looks again soon
                self._new.add(None)
        for nbytes, part in parts:
            try:
                self._begin_part(task, part, every.get(nbytes))
            except PortaKVError as error:
                # The other parts have begun, so that the caller must not get an error.
                _log.warning("begin", "Pages are not stored or loaded: %s", error)
                self._fail(task, part)

    def _begin_part(self, task: PageTask, part: list[int], pages: Pages | None) -> None:
        if pages is None or not part:
            self._fail(task, part)
            return
        keys = [task.keys[number] for number in part]
        view = pages.at([task.buffers[number].address for number in part])
        if task.kind == "save":
            task.fresh[part] = ~pages.holds(keys)
            pages.save(keys, view, priority="background", tag=(task, part))
        else:
            pages.load(keys, view, tag=(task, part))

    def _fail(self, task: PageTask, part: list[int]) -> None:
        """End a part of a task without a page."""
        keys = [task.keys[number] for number in part]
        self.store.ended.add(PageJob(task.kind, keys, 0, (task, part)))


def _of(job: PageJob) -> tuple[PageTask, list[int]]:
    """Return the task of a job, and the numbers of its pages."""
    tag: Any = job.tag
    task, part = tag
    return task, part


def _report(call: Callable[[Any], object], what: object) -> None:
    """Call what an engine wants to hear; its errors end no other report."""
    try:
        call(what)
    except Exception as error:  # of the engine's own code, which may raise anything
        _log.warning("report", "A report of pages failed: %r. Look at the engine's log.", error)
