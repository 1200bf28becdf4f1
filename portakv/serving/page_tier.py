# SPDX-License-Identifier: Apache-2.0
"""`PageTier`: a tier of pages below an engine's own tier of host memory.

The engine decides which pages move. Its scheduler calls; no call waits for a disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import NamedTuple

from portakv.errors import PortaKVError
from portakv.runtime.bounded import Bounded
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.pages import SAVE, PageJob, Pages, PageStore, page_key
from portakv.view import IdList

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
        self._chain_of = chain_of
        self._now = now
        self._jobs = dict[Hashable, PageJob]()  # that have not been reported
        self._lasts = dict[Hashable, dict[Hashable, bytes]]()  # by request and chain the last page
        self._failed: Bounded[bytes, float] = Bounded("pages that did not land", REMEMBERED)
        self._touched = dict[bytes, None]()
        self._stepped = now()
        self._reports = reports
        self._stored = list[bytes]()
        self._names: Bounded[bytes, bytes] = Bounded("keys of stored pages", REMEMBERED)
        if reports:
            store.changes()  # later ones are kept

    @property
    def busy(self) -> bool:
        """Return whether a job has not been reported."""
        return bool(self._jobs)

    def has(self, key: bytes) -> bool:
        """Return whether a page can be loaded: a look into the index of this process."""
        if not self._pages.has(key):
            return False
        return not self._failed or self._failed.get(key, 0.0) <= self._now()

    def save(
        self, number: Hashable, keys: Sequence[bytes], slots: IdList, request: Hashable
    ) -> None:
        """Begin to save slots under keys, which are of a request and in its order."""
        after = list[bytes | None]()
        lasts = self._lasts.setdefault(request, {})
        for key in keys:
            chain = self._chain_of(key)
            after.append(lasts.get(chain))
            lasts[chain] = key
        self._begin(
            number,
            PageJob("save", keys, self._pages.size.nbytes, number),
            lambda: self._pages.save(keys, self._view, slots, after=after, tag=number),
        )

    def load(self, number: Hashable, keys: Sequence[bytes], slots: IdList) -> None:
        """Begin to load pages into slots."""
        self._begin(
            number,
            PageJob("load", keys, self._pages.size.nbytes, number),
            lambda: self._pages.load(keys, self._view, slots, tag=number),
        )

    def _begin(self, number: Hashable, refused: PageJob, call: Callable[[], PageJob]) -> None:
        """Begin a job. One that is refused ends without a page, and an engine goes on."""
        try:
            self._jobs[number] = call()
        except PortaKVError as error:
            text = "A %s of %d pages of an engine is refused: %s"
            _log.warning("refused", text, refused.kind, len(refused.keys), error)
            self._jobs[number] = refused
            self._store.ended.add(refused)

    def ended(self) -> list[PageJob]:
        """Return the jobs that have ended since the last call."""
        jobs = [job for job in self._store.finished() if self._jobs.pop(job.tag, None) is job]
        for job in jobs:
            self._note(job)
        return jobs

    def drain(self) -> None:
        """Wait until all jobs have ended; `ended` returns them then.

        Jobs that hang are cancelled after a minute.
        """
        jobs = [*self._jobs.values()]
        until = self._now() + SAVE
        for job in jobs:
            if not job.wait(max(0.0, until - self._now())):
                job.cancel()
        for job in jobs:
            job.wait()
            self._store.ended.add(job)  # the end may be reported a moment later

    def touch(self, keys: Collection[bytes]) -> None:
        """Note that pages are used, in the order of their chains. `step` records it."""
        if len(self._touched) < TOUCHED:
            self._touched.update(dict.fromkeys(keys))

    def step(self) -> None:
        """Record the use of pages, once in a while."""
        if not self._touched or self._now() < self._stepped + PACE:
            return
        self._stepped = self._now()
        keys = [*self._touched]
        self._touched.clear()
        self._pages.touch(keys)

    def forget(self, request: Hashable) -> None:
        """Forget a request that has ended."""
        self._lasts.pop(request, None)

    def events(self) -> TierEvents:
        """Return what was stored and lost since the last call; nothing without ``reports``."""
        events = TierEvents([*self._stored], [])
        self._stored.clear()
        for change in self._store.changes() if self._reports else ():
            key = None if change.stored else self._names.get(change.key)
            if key is not None and not self._pages.has(key):
                del self._names[change.key]
                events.lost.append(key)
        return events

    def close(self, timeout: float = 10.0) -> None:
        """Close the store, as `PageStore.close` does."""
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
        if self._reports:
            self._stored += there
            for key in there:
                self._names[page_key(key)] = key
