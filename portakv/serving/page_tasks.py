# SPDX-License-Identifier: Apache-2.0
"""`PageTasks`: saves and loads of pages whose sizes are not known before they come.

A task has pages of any sizes, each at its own address. Its coroutine waits for their ends, and a
helper reports them. Another helper opens the store for sizes that are new.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import compress
from typing import Generic, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from portakv.errors import PortaKVError, TransferTimeout
from portakv.runtime.bounded import Bounded, Until
from portakv.runtime.rate_limited_log import SLOW_DEVICE, RateLimitedLog
from portakv.serving.pages import SAVE, PageBlocks, PageJob, PageStore, ServerPageStore
from portakv.serving.worker import Calls
from portakv.storage.calls import Change
from portakv.storage.eviction import Pins
from portakv.storage.tiers.base import Keys
from portakv.storage.work import Mask
from portakv.tasks import Limit, Signal, TaskGroup, Wait, runtime

# ------------------------------------------------------------------------------------------------
# The pages of a store that an engine counts, and lookups whose answers it has not fetched.

_logger = logging.getLogger(__name__)
Kind: TypeAlias = Literal["save", "load"]
Key = TypeVar("Key")
Answer = TypeVar("Answer")

#: The most lookups whose answers wait to be fetched. The locks of older ones end, and their answers
#: find nothing: so many of these wait.
UNFETCHED = 4096
EMPTY = 1 << 16


class Counted(Generic[Key]):
    """The pages that an engine counts, by their names, with its own keys and their bytes."""

    def __init__(self) -> None:
        self._lock = runtime().lock
        self._pages = dict[bytes, tuple[Key, int]]()

    def __len__(self) -> int:
        return len(self._pages)

    def add(
        self, keys: Iterable[Key], names: Iterable[bytes], sizes: Iterable[int]
    ) -> tuple[list[Key], list[int]]:
        """Count pages; return the keys and bytes of those that were not counted.

        Pages of size 0 are not there.
        """
        new = list[Key]()
        new_sizes = list[int]()
        with self._lock:
            for key, name, nbytes in zip(keys, names, sizes, strict=True):
                if nbytes and name not in self._pages:
                    self._pages[name] = key, nbytes
                    new.append(key)
                    new_sizes.append(nbytes)
        return new, new_sizes

    def remove(self, names: Iterable[bytes]) -> list[tuple[Key, int] | None]:
        """Count pages no more; return the key and the bytes of each, or None for one that was not
        counted."""
        with self._lock:
            return [self._pages.pop(name, None) for name in names]


class Lookups(Generic[Answer]):
    """The answers of lookups, until they are fetched, with the names of the pages they locked.

    An answer that too many lookups follow before it is fetched finds nothing. So each lookup ends,
    and the locks of those that no one fetches end, too.

    Args:
        nothing: returns an answer of a number of keys that finds none.
        most: the most answers that keep their locks.
    """

    def __init__(self, nothing: Callable[[int], Answer], most: int = UNFETCHED) -> None:
        self._log = RateLimitedLog(_logger)
        self._lock = runtime().lock
        self._nothing = nothing
        self._most = most
        self._answers: Bounded[int, Answer] = Bounded("answers of lookups", EMPTY)
        # By lookup, the number of its keys and the names of locked pages, the oldest first.
        self._locked = dict[int, tuple[int, Keys]]()

    def add(self, number: int, answer: Answer, keys: int, locked: Keys) -> Keys:
        """Keep the answer of a lookup of so many keys.

        Returns the names whose locks are to end, since the answer of another lookup was not fetched
        in time.
        """
        with self._lock:
            self._answers[number] = answer
            self._locked[number] = keys, locked
            if len(self._locked) <= self._most:
                return ()
            late = next(iter(self._locked))
            keys, locked = self._locked.pop(late)
            self._answers[late] = self._nothing(keys)
        self._log.warning(
            "unfetched",
            "A lookup of %d pages finds none: %d later ones came before its answer was fetched. "
            "Look at the engine's log.",
            keys,
            self._most,
            lines=1,
        )
        return locked

    def fetch(self, number: int) -> Answer | None:
        """Return the answer of a lookup, once; None if there is none."""
        with self._lock:
            self._locked.pop(number, None)
            return self._answers.pop(number, None)


# ------------------------------------------------------------------------------------------------
# Saves and loads of pages of any sizes.

_log = RateLimitedLog(_logger)
#: Seconds between two looks for pages that were lost.
LOOK = 1.0
#: Seconds between two attempts to open a store after one that failed.
PAUSE = 5.0
#: The most keys that wait to be deleted when the store has opened.
DELETED = 65536


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
        jobs: with the numbers of their pages; None: the task has not begun.
    """

    def __init__(self, kind: Kind, keys: Keys, buffers: Sequence[Buffer], tag: Hashable) -> None:
        self.kind = kind
        self.keys = keys
        self.buffers = buffers
        self.tag = tag
        self.landed = np.zeros(len(keys), np.bool_)
        self.fresh = np.zeros(len(keys), np.bool_)
        self.jobs: Sequence[tuple[PageJob, list[int]]] | None = None

    @property
    def landed_bytes(self) -> int:
        """Return the bytes of the pages that landed; of a save, those that were not there
        before."""
        moved = self.landed & self.fresh if self.kind == "save" else self.landed
        return sum(buffer.nbytes for buffer in compress(self.buffers, moved))

    def parts(self) -> list[tuple[int, list[int]]]:
        """Return the numbers of pages that one job moves, with their bytes: each key once."""
        parts = dict[tuple[int, int], list[int]]()
        seen = Counter[bytes]()
        for number, (key, buffer) in enumerate(zip(self.keys, self.buffers, strict=True)):
            parts.setdefault((buffer.nbytes, seen[key]), []).append(number)
            seen[key] += 1
        return [(nbytes, part) for (nbytes, _), part in parts.items()]


class PageTasks:
    """The tasks of an engine over a store of pages.

    Args:
        store: of the pages; `close` closes it.
        ended: called for each task that has ended, in a helper thread.
        lost: called with the keys of `page_key` of pages that the store no longer has, after these
            calls.

    No method but `close` waits for a transfer, and none waits for a folder to open. A save that the
    folder holds up ends after `SAVE` seconds, a load after the deadline of the store's terms. After
    `close` tasks end without a page.
    """

    def __init__(
        self,
        store: PageStore | ServerPageStore,
        ended: Callable[[PageTask], object],
        lost: Callable[[list[bytes]], object],
    ) -> None:
        self.store = store
        self._ended = ended
        self._lost = lost
        self._runtime = runtime()
        self._calls = Calls()  # open the store
        self._waiting = set[PageTask]()  # until the store has opened for their sizes
        self._begun = Signal(self._runtime)  # tells of tasks that have begun
        self._changes = deque[Change]()  # that an opening has seen, until they are reported
        self._deleted = deque[bytes](maxlen=DELETED)  # while the store was closed
        self._unopened: Until[int] = Until("sizes of pages that did not open", 1024)
        self._closing = False
        # The locks of pages add up. A batch of pins ends with the last lock of its pages.
        self._locks = dict[bytes, list[Pins]]()
        self._locks_of = Counter[Pins]()
        store.changes()  # later changes are kept
        self._reports = Limit(self._runtime)  # one after the other
        self._running = TaskGroup(self._runtime, self._failed)
        self._running.start(self._watch())

    @property
    def alive(self) -> bool:
        """Return whether tasks are carried out."""
        return not self._closing and len(self._running) > 0

    @property
    def locked(self) -> int:
        """Return the number of pages that are locked."""
        return len(self._locks)

    def begin(
        self, kind: Kind, keys: Keys, buffers: Sequence[Buffer], tag: Hashable = None
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
            self._waiting.add(task)
            self._calls.add(partial(self._open_for, task))
        else:
            self._begin(task)
        self._running.start(self._carry_out(task))
        return task

    def holds(self, keys: Keys) -> Mask:
        """Return which pages can be loaded in some size, bool ``[keys]``."""
        result = np.zeros(len(keys), np.bool_)
        for pages in self.store.every():
            result |= pages.holds(keys)
        return result

    def stored(self, task: PageTask) -> Mask:
        """Return which pages of a save that has ended are stored, bool ``[keys]``.

        The index of a server follows the end of a save, so that it does not count.
        """
        return task.landed if self.store.remote else self.holds(task.keys)

    def lock(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Lock the pages that can be loaded in some size; return their bytes, int64 ``[keys]``.

        A page that is not there has 0 bytes, and no lock. The store evicts no page before the last
        of its locks has ended. A size that is new ends all locks.
        """
        result = np.zeros(len(keys), np.int64)
        left = [*range(len(keys))]
        for pages in self.store.every():
            pins = pages.pin([keys[number] for number in left])
            locked = [*compress(left, pins.held)]
            with self._runtime.lock:
                for number in locked:
                    self._locks.setdefault(keys[number], []).append(pins)
                    self._locks_of[pins] += 1
            result[locked] = pages.size.nbytes
            left = [*compress(left, ~pins.held)]
        return result

    def lock_later(self, keys: Keys, locked: Callable[[npt.NDArray[np.int64]], object]) -> None:
        """Lock pages, and call with what `lock` returns: within this call, or in a thread if
        another process answers."""

        def lock() -> None:
            sizes = np.zeros(len(keys), np.int64)
            try:
                sizes = self.lock(keys)
            finally:  # the engine waits for the call
                locked(sizes)

        if not self.store.remote or not self._calls.add(lock):
            lock()

    def unlock(self, keys: Iterable[bytes]) -> None:
        """End a lock of each page; ignore pages that are not locked."""
        ended = list[Pins]()
        with self._runtime.lock:
            for key in keys:
                if key not in self._locks:
                    continue
                pins = self._locks[key].pop()
                if not self._locks[key]:
                    del self._locks[key]
                self._locks_of[pins] -= 1
                if not self._locks_of[pins]:
                    del self._locks_of[pins]
                    ended.append(pins)
        for pins in ended:
            pins.release()

    def delete(self, keys: Keys) -> Mask:
        """Delete pages of any size, locked or not; return which were stored, bool ``[keys]``.

        While the store opens, no page is known to be stored. The pages are deleted, and reported
        as lost, when it has opened.
        """
        result = np.zeros(len(keys), np.bool_)
        before = self._opened()
        for pages in self.store.every():
            result |= pages.delete(keys)
        after = self._opened()
        if (None in before or before != after) and not self._closing:
            self._deleted.extend(keys)
            self._calls.add(self._delete_again)
        return result

    def _opened(self) -> list[PageBlocks | None]:
        """Return the open stores of all sizes; None for a size that is closed."""
        return [pages.blocks for pages in self.store.every()]

    def close(self, timeout: float = 10.0) -> None:
        """End the tasks, which are not reported, close the store, and end its locks, each within so
        many seconds.

        Raises `TransferTimeout` as `BlockStore.close` does.
        """
        self._closing = True
        try:
            with suppress(TransferTimeout):
                self._runtime.start(self._running.close()).synchronize(timeout)
            self.store.close(timeout)
        finally:
            self._calls.close(timeout)

    # --- the helper that opens the store

    def _open_for(self, task: PageTask) -> None:
        """Open the store for a task and begin it, unless it has ended meanwhile; close the store
        again if it was closed meanwhile."""
        for nbytes in self._closed_sizes(task):
            if not self._closing:
                self._open(nbytes)
        self._delete_again()
        with self._runtime.lock:
            waits = task in self._waiting
            self._waiting.discard(task)
        if waits:
            self._begin(task)
        if self._closing:
            try:
                self.store.close()
            except TransferTimeout as error:
                _log.warning("close", "A store of pages was left open: %s", error)

    def _open(self, nbytes: int) -> None:
        """Open the store for a size; after a failure, not again for `PAUSE` seconds."""
        if self._unopened.holds(nbytes):
            return
        try:
            self.store.pages(nbytes)
            self._changes.extend(self.store.changes())  # later changes are kept
        except PortaKVError as error:
            _log.warning("open", "Pages are not stored or loaded: %s", error)
            self._unopened.hold(nbytes, PAUSE)

    def _delete_again(self) -> None:
        """Delete the pages whose deletion came while the store was closed."""
        if self._deleted and None not in self._opened():
            keys = [self._deleted.popleft() for _ in range(len(self._deleted))]
            self.delete(keys)

    def _closed_sizes(self, task: PageTask) -> set[int]:
        """Return the sizes of a task for which the store is to be opened.

        Of a size that no save had yet, there is no page to load.
        """
        every = {pages.size.nbytes: pages for pages in self.store.every()}
        sizes = {buffer.nbytes for buffer in task.buffers}
        known = {nbytes for nbytes in sizes if nbytes in every}
        closed = {nbytes for nbytes in known if every[nbytes].blocks is None}
        return closed | (sizes - known if task.kind == "save" else set())

    def _begin(self, task: PageTask) -> None:
        """Begin the jobs of a task. Pages of a job that cannot begin do not land."""
        by_size = {pages.size.nbytes: pages for pages in self.store.every()}
        jobs = list[tuple[PageJob, list[int]]]()
        for nbytes, part in task.parts():
            pages = by_size.get(nbytes)
            if pages is None:
                continue
            keys = [task.keys[number] for number in part]
            try:
                view = pages.at([task.buffers[number].address for number in part])
                if task.kind == "save":
                    task.fresh[part] = ~pages.holds(keys)
                    job = pages.save(keys, view, priority="background")
                else:
                    job = pages.load(keys, view)
            except PortaKVError as error:
                # The other parts have begun, so that the caller must not get an error.
                _log.warning("begin", "Pages are not stored or loaded: %s", error)
            else:
                jobs.append((job, part))
        with self._runtime.step:
            task.jobs = jobs
            self._begun.notify()

    # --- coroutines

    async def _carry_out(self, task: PageTask) -> None:
        """Wait for the end of a task, and report it. The store may not open in time for it."""
        limit = SAVE if task.kind == "save" else self.store.terms.deadline
        until = self._runtime.time() + limit

        def has_begun() -> bool:
            return task.jobs is not None

        if not await self._begun.wait_for(has_begun, until) and task in self._waiting:
            self._waiting.discard(task)
            task.jobs = ()
            line = "Pages are not stored or loaded: their folder does not open. %s"
            _log.warning("late", line, SLOW_DEVICE)
        await self._begun.wait_for(has_begun)
        for job, part in task.jobs or ():
            await job.until_end()
            task.landed[part] = job.landed
        await self._reports.work(self._report, task)

    async def _watch(self) -> None:
        """Have pages reported that were lost while no task ended."""
        while True:
            await Wait(until=self._runtime.time() + LOOK)
            await self._reports.work(self._report)

    def _report(self, *ended: PageTask) -> None:
        """Report tasks that have ended, and the pages that were lost, to the engine."""
        reports = [partial(self._ended, task) for task in ended]
        if lost := self._lost_pages():
            reports.append(partial(self._lost, lost))
        for report in reports if not self._closing else ():
            try:
                report()
            except Exception as error:  # of the engine's own code, which may raise anything
                self._failed(error)

    def _lost_pages(self) -> list[bytes]:
        """Return the keys of pages that were lost, and not stored again."""
        changes = [self._changes.popleft() for _ in range(len(self._changes))]
        changes += self.store.changes()
        gone = [change.key for change in changes if not change.stored]
        return [*compress(gone, ~self.holds(gone))]

    def _failed(self, error: BaseException) -> None:
        """Log an error that ends no other report."""
        _log.warning("report", "A report of pages failed: %r. Look at the engine's log.", error)
