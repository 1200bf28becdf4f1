# SPDX-License-Identifier: Apache-2.0
"""`PageTier`: a tier of pages below an engine's own tier of host memory.

The engine decides which pages move. Its scheduler calls; no call waits for a disk, nor for the plan
of a transfer, which a thread makes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

from portakv.errors import PortaKVError
from portakv.runtime.bounded import Bounded
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.pages import SAVE, PageJob, Pages, PageStore, page_key

_log = RateLimitedLog(logging.getLogger(__name__))
#: Seconds for which a page that did not land is not offered again, unless it is saved meanwhile.
#: An engine would ask for it again at once, and get no further.
FAILED = 60.0
#: The most pages that wait for `PageTier.step` to record their use, and the seconds between two.
TOUCHED = 4096
PACE = 1.0
#: The most keys that are remembered to report their loss, and those of pages that did not land.
REMEMBERED = 1 << 20


class TierEvents(NamedTuple):
    """The keys of pages that were stored, and of pages that no tier has any longer."""

    stored: list[bytes]
    lost: list[bytes]


class _Calls:
    """Makes calls in their order, in a thread."""

    def __init__(self) -> None:
        self._queue = SimpleQueue[Callable[[], object] | None]()
        self._thread = threading.Thread(target=self._run, name="portakv tier", daemon=True)
        self._thread.start()

    def add(self, call: Callable[[], object]) -> None:
        """Have a call made."""
        self._queue.put(call)

    def wait(self) -> None:
        """Wait until the calls that were added have been made."""
        made = threading.Event()
        self.add(made.set)
        made.wait()

    def close(self, timeout: float) -> None:
        """Make the calls that were added, at most for so many seconds, and end the thread."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except Exception as error:  # the next calls must be made
                _log.warning("call", "A call of a tier of pages failed: %r", error)


class _Followed:
    """The last page of each chain of each request, which the next one follows."""

    def __init__(self, chain_of: Callable[[bytes], Hashable]) -> None:
        self._chain_of = chain_of
        self._lasts = dict[Hashable, dict[Hashable, bytes]]()

    def after(self, request: Hashable, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return for each page of a request the page that it follows, and note the last ones."""
        result = list[bytes | None]()
        lasts = self._lasts.setdefault(request, {})
        for key in keys:
            chain = self._chain_of(key)
            result.append(lasts.get(chain))
            lasts[chain] = key
        return result

    def forget(self, request: Hashable) -> None:
        """Forget a request."""
        self._lasts.pop(request, None)


class _Events:
    """The pages that were stored and lost; kept from the first call of `store.changes` on."""

    def __init__(self, store: PageStore) -> None:
        self._store = store
        self._stored = list[bytes]()
        self._names: Bounded[bytes, bytes] = Bounded("keys of stored pages", REMEMBERED)
        store.changes()

    def add(self, keys: Sequence[bytes]) -> None:
        """Note pages that were stored."""
        self._stored += keys
        for key in keys:
            self._names[page_key(key)] = key

    def take(self, has: Callable[[bytes], bool]) -> TierEvents:
        """Return what was stored and lost since the last call."""
        events = TierEvents([*self._stored], [])
        self._stored.clear()
        for change in self._store.changes():
            key = None if change.stored else self._names.get(change.key)
            if key is not None and not has(key):
                del self._names[change.key]
                events.lost.append(key)
        return events


class PageTier:
    """The pages of one size below an engine's tier of host memory.

    Args:
        store: has the pages.
        pages: of the store.
        memory: the engine's tier of host memory, bytes ``[slots, bytes]``, which stays until
            `close` has returned.
        chain_of: returns what tells the chains of a request apart, such as groups of layers, from
            a key.
        reports: keep `events`.
        now: returns the time in seconds.

    Raises `InvalidTerms` for other memory.

    Attributes:
        counts: pages that were loaded, stored, or asked for and not there.
    """

    def __init__(
        self,
        store: PageStore,
        pages: Pages,
        memory: object,
        *,
        chain_of: Callable[[bytes], Hashable] = bool,
        reports: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = {"loaded": 0, "load_failed": 0, "stored": 0, "store_failed": 0}
        self._store = store
        self._pages = pages
        self._view = pages.over(memory)
        self._now = now
        self._lock = threading.Lock()
        self._open = dict[Hashable, PageJob | None]()  # the jobs that have not been reported
        self._followed = _Followed(chain_of)
        self._failed: Bounded[bytes, float] = Bounded("pages that did not land", REMEMBERED)
        self._touched = dict[bytes, float]()  # with the time of their first use since `step`
        self._events = _Events(store) if reports else None
        self._calls = _Calls()

    @property
    def busy(self) -> bool:
        """Return whether a job has not been reported."""
        return bool(self._open)

    def has(self, key: bytes) -> bool:
        """Return whether a page can be loaded: a look into the index of this process."""
        if not self._pages.has(key):
            return False
        return not self._failed or self._failed.get(key, 0.0) <= self._now()

    def save(
        self, number: Hashable, keys: Sequence[bytes], slots: Sequence[int], request: Hashable
    ) -> None:
        """Begin to save slots under keys, which are of a request and in its order."""
        after = self._followed.after(request, keys)
        save = partial(self._pages.save, keys, self._view, slots, after=after, tag=number)
        self._submit(PageJob("save", keys, self._pages.size.nbytes, number), save)

    def load(self, number: Hashable, keys: Sequence[bytes], slots: Sequence[int]) -> None:
        """Begin to load pages into slots."""
        load = partial(self._pages.load, keys, self._view, slots, tag=number)
        self._submit(PageJob("load", keys, self._pages.size.nbytes, number), load)

    def _submit(self, refused: PageJob, call: Callable[[], PageJob]) -> None:
        """Have the thread begin a job. ``refused`` ends in its place if the store refuses it."""
        self._open[refused.tag] = None
        self._calls.add(partial(self._begin, refused, call))

    def _begin(self, refused: PageJob, call: Callable[[], PageJob]) -> None:
        """Begin a job, in the thread."""
        try:
            job = call()
        except PortaKVError as error:
            text = "A %s of %d pages of an engine is refused: %s"
            _log.warning("refused", text, refused.kind, len(refused.keys), error)
            self._store.ended.add(refused)
            return
        with self._lock:
            if job.tag in self._open:
                self._open[job.tag] = job

    def ended(self) -> list[PageJob]:
        """Return the jobs that have ended since the last call."""
        jobs = list[PageJob]()
        for job in self._store.finished():
            with self._lock:
                if job.tag in self._open:
                    del self._open[job.tag]
                    jobs.append(job)
        for job in jobs:
            self._note(job)
        return jobs

    def drain(self) -> None:
        """Wait until all jobs have ended; `ended` returns them then.

        Jobs that hang are cancelled after a minute.
        """
        self._calls.wait()
        jobs = [job for job in self._open.values() if job is not None]
        until = time.monotonic() + SAVE
        for job in jobs:
            if not job.wait(max(0.0, until - time.monotonic())):
                job.cancel()
        for job in jobs:
            job.wait()
            self._store.ended.add(job)  # its end may be reported a moment later

    def touch(self, keys: Collection[bytes]) -> None:
        """Note that pages are used, in the order of their chains. `step` records it."""
        now = self._now()
        for key in keys if len(self._touched) < TOUCHED else ():
            self._touched.setdefault(key, now)

    def step(self) -> None:
        """Record the use of pages, once in a while."""
        first = next(iter(self._touched.values()), None)
        if first is None or self._now() < first + PACE:
            return
        keys = [*self._touched]
        self._touched.clear()
        self._calls.add(partial(self._pages.touch, keys))

    def forget(self, request: Hashable) -> None:
        """Forget a request that has ended."""
        self._followed.forget(request)

    def events(self) -> TierEvents:
        """Return what was stored and lost since the last call; nothing without ``reports``."""
        return TierEvents([], []) if self._events is None else self._events.take(self._pages.has)

    def close(self, timeout: float = 10.0) -> None:
        """Close the store, as `PageStore.close` does."""
        self._calls.close(timeout)
        self._store.close(timeout)

    def _note(self, job: PageJob) -> None:
        """Note which pages of a job landed."""
        landed = job.landed.tolist()
        there = [key for key, good in zip(job.keys, landed, strict=True) if good]
        missing = len(landed) - len(there)
        verb = "stored" if job.kind == "save" else "loaded"
        self.counts[verb] += len(there)
        self.counts["store_failed" if job.kind == "save" else "load_failed"] += missing
        if job.kind == "load":
            until = self._now() + FAILED
            for key in {*job.keys}.difference(there) if missing else ():
                self._failed[key] = until
            return
        for key in there if self._failed else ():
            self._failed.pop(key, None)
        if self._events is not None:
            self._events.add(there)
