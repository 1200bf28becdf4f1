# SPDX-License-Identifier: Apache-2.0
"""`PageTasks`: saves and loads of pages whose sizes are not known before they come.

A task has pages of any sizes, each at its own address. A coroutine has helpers report the ends of
tasks and the pages that were lost. Another helper opens the store for sizes that are new.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import compress
from math import gcd
from secrets import token_hex
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from portakv.arguments import invalid, items, octets, whole
from portakv.errors import InvalidTerms, PortaKVError, TransferTimeout
from portakv.runtime.bounded import Bounded
from portakv.runtime.finished import Finished
from portakv.runtime.rate_limited_log import SLOW_DEVICE, RateLimitedLog
from portakv.serving.local import StoreTerms, log_start
from portakv.serving.pages import (
    SAVE,
    PageBlocks,
    PageJob,
    Pages,
    PageSize,
    PageStore,
    ServerPageBlocks,
    SizedPages,
    Usage,
    check_raw,
    check_shared,
)
from portakv.serving.server.client import (
    StoreClient,
)
from portakv.serving.server.index import ServerIndex
from portakv.serving.server.server import StoreServer, place_of
from portakv.serving.worker import Calls
from portakv.storage.calls import Change
from portakv.storage.eviction import Pins
from portakv.storage.tiers.base import Keys
from portakv.storage.work import Mask
from portakv.tasks import Wait, Work, runtime

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
        # Answers, with the numbers of their keys, and the names of locked pages.
        self._open = OrderedDict[int, tuple[Answer, int, Keys]]()
        # The numbers of keys of lookups whose answers find nothing now.
        self._empty: Bounded[int, int] = Bounded("lookups without an answer", EMPTY)

    def add(self, number: int, answer: Answer, keys: int, locked: Keys) -> Keys:
        """Keep the answer of a lookup of so many keys.

        Returns the names whose locks are to end, since the answer of another lookup was not fetched
        in time.
        """
        with self._lock:
            self._open[number] = answer, keys, locked
            if len(self._open) <= self._most:
                return ()
            late, (_, keys, locked) = self._open.popitem(last=False)
            self._empty[late] = keys
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
            found = self._open.pop(number, None)
            keys = self._empty.pop(number, None)
        if found is not None:
            return found[0]
        return None if keys is None else self._nothing(keys)


# ------------------------------------------------------------------------------------------------
# Pages of an engine's host memory in the store of a host's server.


def page_store(
    terms: StoreTerms, model: str, sizes: Sequence[PageSize], identity: str = ""
) -> PageStore | ServerPageStore:
    """Return a store of pages by its terms: that of a server if they have ``shared``.

    The log has a line about it. Raises `InvalidTerms` for a folder that cannot be made or written,
    and as `PageStore` and `ServerPageStore` do.
    """
    terms.check_usable()
    store: PageStore | ServerPageStore
    server = "This process"
    if terms.shared:
        store = ServerPageStore(terms, model, sizes, identity)
        if not store.serves:
            server = "Another process of this host"
    else:
        store = PageStore(terms, model, sizes, identity=identity)
    log_start(terms, "pages", store.count(), server)
    return store


class ServerPageStore(SizedPages):
    """Pages of bytes in the host memory of an engine, in the store of a server.

    Args:
        terms: where pages are stored, with a folder and ``shared``, without an encoding. Each
            process has equal terms.
        model: the name of the model.
        sizes: of the pages, equal in all processes.
        identity: what else fixes the bytes of a page; see `PageStore`.
        patience: seconds to wait for a server. Without one, pages are missing until one serves.

    Raises:
        InvalidTerms: wrong terms, or pages that a server of the folder refuses, such as those of
            another model.
        StoreError: a folder that cannot be used.
    """

    def __init__(
        self,
        terms: StoreTerms,
        model: str,
        sizes: Sequence[PageSize],
        identity: str = "",
        patience: float = 10.0,
    ) -> None:
        super().__init__(terms)
        check_shared(terms)
        check_raw(terms)
        forms = [size.form(model, identity) for size in sizes]
        engine = token_hex(16)  # its own: a save waits for no other process
        place = place_of(terms, engine)
        self._store_server = StoreServer(terms, engine)
        self._client = StoreClient(place, forms, engine)
        self._index = ServerIndex(place, engine, len(forms))
        for number, size in enumerate(sizes):
            blocks = ServerPageBlocks(self._client.blocks[number], self._index, number)
            self._sizes[size] = Pages(self, size, forms[number], blocks)
        try:
            if self._client.wait(patience):
                self._index.wait(patience)
        except BaseException:
            self.close()
            raise

    def pages(self, nbytes: int, runs: int = 1) -> Pages:
        """Return the pages of a size. Raises `InvalidTerms` for a size that the store lacks."""
        size = PageSize(nbytes, runs)
        if size not in self._sizes:
            raise InvalidTerms(
                f"Expected a size of {[*self._sizes]}, got {size}. Pass all sizes when the store "
                f"is made."
            )
        return self._sizes[size]

    def changes(self) -> list[Change]:
        """Return the pages that were stored or lost since the last call, by any process.

        The first call returns none. Their keys are those of `page_key`.
        """
        self._index.record(every=True)
        return self._index.take_events()

    @property
    def serves(self) -> bool:
        """Return whether this process serves the store; others may."""
        return self._store_server.serves

    def count(self) -> int:
        """Return the pages that the server has of these sizes."""
        return sum(self._index.counts())

    def usage(self) -> Usage:
        """Return how full the store is, by the pages that the server has of these sizes."""
        counts = self._index.counts()
        sizes = [pages.form.image_bytes for pages in self.every()]
        used = sum(count * nbytes for count, nbytes in zip(counts, sizes, strict=False))
        return Usage(used, self.terms.capacity)

    def clear(self) -> bool:
        """Return False: other processes use the pages. `portakv store wipe` removes them."""
        return False

    def close(self, timeout: float = 10.0) -> None:
        """End the jobs in flight within so many seconds, and leave the store to the others."""
        self._index.close()
        self._client.close(timeout)
        self._store_server.close(timeout)
        self.ended.close()


# ------------------------------------------------------------------------------------------------
# The pages of a pool of host memory, for an engine whose threads wait for them.

_log = RateLimitedLog(logging.getLogger(__name__))
#: The most runs of a page: more are too short to be copied one by one.
MOST_RUNS = 4096
#: Seconds between two lines of the log about a load that does not end.
POOL_GRACE = 5.0


class PagePool:
    """The pages of one pool of an engine's host memory, in a `PageStore` or a `ServerPageStore`.

    A page has pieces of any lengths, each at a separate address: one for keys and one for values,
    or two for each layer. A piece is cut into runs, which have equal lengths in all pieces.

    Its calls wait until nothing uses the memory any more, and raise nothing for a store that fails:
    a page that did not come, or was not stored, is False in the result. Any thread may call.

    Args:
        pieces: bytes of each piece of a page, in their order.
        identity: what tells the pages from those of other pools that have equal keys.

    Raises `InvalidTerms` for pieces that no page has.

    Attributes:
        size: of the pages.
    """

    def __init__(self, pieces: Sequence[int], identity: bytes = b"") -> None:
        sizes = [whole("pieces", size, 1) for size in items("pieces", pieces, "bytes of pieces")]
        if not sizes:
            raise invalid("pieces", "bytes of pieces", pieces)
        run = gcd(*sizes)
        counts = [size // run for size in sizes]
        if sum(counts) > MOST_RUNS:
            expected = f"pieces of at most {MOST_RUNS} equal runs together"
            raise invalid("pieces", expected, pieces)
        self.size = PageSize(sum(sizes), sum(counts))
        self._identity = octets("identity", identity)
        # Of each run: the number of its piece, and its place in the piece.
        self._piece = np.repeat(np.arange(len(sizes)), counts)
        self._offset = np.concatenate([np.arange(count) for count in counts]) * run
        #: Of each piece, its place in a page whose pieces lie one after the other.
        self._places = np.cumsum([0, *sizes[:-1]])
        self._pages: Pages | None = None
        self._deadline = 0.0
        self._unread = Finished[PageJob]()  # was not started, and so keeps no job

    def open(self, store: PageStore | ServerPageStore) -> None:
        """Use a store from now on. Raises as `PageStore.pages` does."""
        self._pages = store.pages(*self.size)
        self._deadline = store.terms.deadline

    def lookup(self, keys: Keys) -> int:
        """Return the number of leading pages that can be loaded; a bucket has a second to
        answer."""
        pages = self._pages
        return 0 if pages is None else pages.lookup(self._names(keys))

    def holds(self, keys: Keys) -> Mask:
        """Return which pages can be loaded, as far as is known here, bool ``[keys]``."""
        pages = self._pages
        if pages is None:
            return np.zeros(len(keys), np.bool_)
        return pages.holds(self._names(keys))

    def restorable(self, keys: Keys, trailing: int | None = None) -> Mask:
        """Return for each number of leading pages, less one, whether it can be restored, bool
        ``[keys]``.

        ``trailing``: the number of last pages that this needs; None: all of them.
        """
        count = len(keys)
        if trailing is None:
            return np.arange(count) < self.lookup(keys)
        self.lookup(keys[-trailing:])  # a bucket is asked about the last pages
        missing = np.cumsum(np.r_[0, ~self.holds(keys)])
        first = np.maximum(0, np.arange(1, count + 1) - trailing)
        able: Mask = missing[1:] == missing[first]
        return able

    def save(self, keys: Keys, addresses: npt.ArrayLike, after: bytes | None = None) -> Mask:
        """Store pages; return which of them are stored now, bool ``[keys]``.

        Args:
            keys: of the pages, each of which follows the one before it.
            addresses: of the pieces of each page, int ``[keys, pieces]``; for pages whose pieces
                lie one after the other ``[keys, 1]``.
            after: the key that the first page follows; None: it begins a prompt.
        """
        names = self._names(keys)
        first = None if after is None else self._names([after])[0]
        follows = [first, *names[:-1]][: len(names)]
        return self._moved("save", names, addresses, after=follows)

    def load(self, keys: Keys, addresses: npt.ArrayLike) -> Mask:
        """Load pages; return which of them have come, with verified bytes, bool ``[keys]``.

        The others are not written. The arguments are those of `save`.
        """
        return self._moved("load", self._names(keys), addresses)

    def _moved(self, kind: Kind, names: Keys, addresses: npt.ArrayLike, **terms: Any) -> Mask:
        """Save or load pages; return which of them landed."""
        pages = self._pages
        if pages is None or not names:
            return np.zeros(len(names), np.bool_)
        call: Callable[..., PageJob] = pages.save if kind == "save" else pages.load
        view = pages.at(self._runs(addresses))
        job = call(names, view, deadline=self._deadline, ended=self._unread, **terms)
        return self._landed(job)

    def _names(self, keys: Keys) -> list[bytes]:
        """Return keys that no other pool has."""
        return [key + self._identity for key in keys] if self._identity else [*keys]

    def _runs(self, addresses: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return the addresses of the runs of pages, int64 ``[pages, runs]``."""
        given = np.asarray(addresses, np.int64)
        pieces = len(self._places)
        if given.ndim != 2 or given.shape[1] not in (1, pieces):
            expected = f"numbers [pages, {pieces}]"
            raise invalid("addresses", expected, addresses)
        if given.shape[1] < pieces:
            given = given + self._places
        runs: npt.NDArray[Any] = given[:, self._piece] + self._offset
        return runs

    def _landed(self, job: PageJob) -> Mask:
        """Return which pages landed, once nothing uses the memory any more."""
        if job.wait(self._deadline):
            return job.landed
        job.cancel()
        released = None if job.handle is None else job.handle.released
        if released is not None:  # of a save: only a tier is slow, which has copies of the pages
            released.wait()
            line = "A save of pages was given up: a tier is slow, or hangs. %s"
            _log.warning("save", line, SLOW_DEVICE)
            return job.landed
        while not job.wait(POOL_GRACE):
            line = "A load of pages takes too long, and still uses its memory. %s"
            _log.warning("load", line, SLOW_DEVICE)
        return job.landed


#: Seconds between two looks for tasks that are late while all workers hang: while a load is under
#: way, whose caller waits, and else.
SOON = 0.1
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
    """

    def __init__(self, kind: Kind, keys: Keys, buffers: Sequence[Buffer], tag: Hashable) -> None:
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
        self._wait = Wait(store.fileno())  # of the coroutine
        # Tasks until the store has opened for their sizes, and the times by which they end.
        self._waiting = dict[PageTask, float]()
        self._opens = False  # a call of `_open_for_waiting` follows
        self._changes = deque[Change]()  # that an opening has seen, until the thread takes them
        self._deleted = deque[bytes](maxlen=DELETED)  # while the store was closed
        self._next_try = dict[int, float]()  # of sizes for which the store could not be opened
        self._loads = set[PageTask]()  # under way
        self._closing = False
        # The locks of pages add up. A batch of pins ends with the last lock of its pages.
        self._locks = dict[bytes, list[Pins]]()
        self._locks_of = Counter[Pins]()
        self._calls = Calls()
        store.changes()  # later changes are kept
        self._running = self._runtime.start(self._run())

    @property
    def alive(self) -> bool:
        """Return whether tasks are carried out."""
        return not (self._running.done() or self._closing)

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
            limit = SAVE if kind == "save" else self.store.terms.deadline
            self._waiting[task] = time.monotonic() + limit
            self._open_later()
        else:
            self._begin(task)
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
        if isinstance(self.store, ServerPageStore):
            return task.landed
        return self.holds(task.keys)

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
        """Lock pages, and call with what `lock` returns: within this call, or in a thread if the
        store is that of a server."""
        call = partial(self._lock_then, keys, locked)
        if not isinstance(self.store, ServerPageStore) or not self._calls.add(call):
            call()

    def _lock_then(self, keys: Keys, locked: Callable[[npt.NDArray[np.int64]], object]) -> None:
        sizes = np.zeros(len(keys), np.int64)
        try:
            sizes = self.lock(keys)
        finally:  # the engine waits for the call
            locked(sizes)

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
            self._open_later()
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
        self._look_soon()
        try:
            with suppress(TransferTimeout):
                self._running.synchronize(timeout)
            self.store.close(timeout)
        finally:
            self._calls.close(timeout)

    # --- the helper that opens the store

    def _open_later(self) -> None:
        """Have the store opened for the tasks that wait, and deletions made."""
        if not self._opens:
            self._opens = True
            self._calls.add(self._open_for_waiting)

    def _open_for_waiting(self) -> None:
        """Open the store for the tasks that wait, and begin them; close it again if it was closed
        meanwhile."""
        self._opens = False  # tasks that come from here on have another call
        for task in [*self._waiting]:
            for nbytes in self._closed_sizes(task):
                if not self._closing:
                    self._open(nbytes)
            self._delete_again()
            if self._waiting.pop(task, None) is not None:
                self._begin(task)
        self._delete_again()
        self._look_soon()
        if self._closing:
            try:
                self.store.close()
            except TransferTimeout as error:
                _log.warning("close", "A store of pages was left open: %s", error)

    def _open(self, nbytes: int) -> None:
        """Open the store for a size; after a failure, not again for `PAUSE` seconds."""
        if time.monotonic() < self._next_try.get(nbytes, 0.0):
            return
        try:
            self.store.pages(nbytes)
            self._changes.extend(self.store.changes())  # later changes are kept
        except PortaKVError as error:
            _log.warning("open", "Pages are not stored or loaded: %s", error)
            self._next_try[nbytes] = time.monotonic() + PAUSE

    def _delete_again(self) -> None:
        """Delete the pages whose deletion came while the store was closed."""
        if self._deleted and None not in self._opened():
            keys = [self._deleted.popleft() for _ in range(len(self._deleted))]
            self.delete(keys)

    # --- the coroutine, and the helper that reports

    async def _run(self) -> None:
        """Have helpers report what ends, and end late tasks, until the store is closed."""
        while not self._closing:
            self._wait.until = self._runtime.time() + (SOON if self._loads else LOOK)
            await self._wait
            self._wait = Wait(self._wait.fd)  # before the look, which may miss what comes from here
            with self._runtime.released():
                ended = self._ended_tasks()
                lost = self._lost_pages()
                self._end_late()
            if (ended or lost) and not self._closing:
                await Work(self._report, ended, lost)

    def _look_soon(self) -> None:
        """Have the coroutine look now for what ends."""
        with self._runtime.lock:
            self._wait.wake()

    def _ended_tasks(self) -> list[PageTask]:
        """Return the tasks that have ended."""
        ended = list[PageTask]()
        for job in self.store.finished():
            task, part = _of(job)
            task.landed[part] = job.landed
            task.left -= 1
            if not task.left:
                ended.append(task)
        self._loads.difference_update(ended)
        return ended

    def _lost_pages(self) -> list[bytes]:
        """Return the keys of pages that were lost, and not stored again."""
        changes = [self._changes.popleft() for _ in range(len(self._changes))]
        changes += self.store.changes()
        gone = [change.key for change in changes if not change.stored]
        return [*compress(gone, ~self.holds(gone))]

    def _end_late(self) -> None:
        """End the tasks for which the store does not open in time."""
        now = time.monotonic()
        for task, until in [*self._waiting.items()]:
            if now >= until and self._waiting.pop(task, None) is not None:
                line = "Pages are not stored or loaded: their folder does not open. %s"
                _log.warning("late", line, SLOW_DEVICE)
                self._begin(task, late=True)

    def _report(self, ended: Sequence[PageTask], lost: list[bytes]) -> None:
        """Report tasks and pages to the engine; its errors end no other report."""
        reports = [partial(self._ended, task) for task in ended]
        if lost:
            reports.append(partial(self._lost, lost))
        for report in reports:
            try:
                report()
            except Exception as error:  # of the engine's own code, which may raise anything
                line = "A report of pages failed: %r. Look at the engine's log."
                _log.warning("report", line, error)

    def _closed_sizes(self, task: PageTask) -> set[int]:
        """Return the sizes of a task for which the store is to be opened.

        Of a size that no save had yet, there is no page to load.
        """
        every = {pages.size.nbytes: pages for pages in self.store.every()}
        sizes = {buffer.nbytes for buffer in task.buffers}
        known = {nbytes for nbytes in sizes if nbytes in every}
        closed = {nbytes for nbytes in known if every[nbytes].blocks is None}
        return closed | (sizes - known if task.kind == "save" else set())

    def _begin(self, task: PageTask, late: bool = False) -> None:
        """Begin the jobs of a task; each ends by the queue of the store.

        ``late``: all jobs fail.
        """
        by_size = {pages.size.nbytes: pages for pages in self.store.every() if not late}
        parts = task.parts()
        task.left = len(parts)
        if task.kind == "load":
            self._loads.add(task)
            if self.store.terms.deadline < LOOK:  # it ends before the present pause
                self._look_soon()
        for nbytes, part in parts:
            try:
                self._begin_part(task, part, by_size.get(nbytes))
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
