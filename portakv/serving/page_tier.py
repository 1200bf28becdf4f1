# SPDX-License-Identifier: Apache-2.0
"""`PageTier`: a tier of pages below an engine's own tier of host memory.

The engine decides which pages move. Its scheduler calls; no call waits for a disk, nor for the plan
of a transfer, which a helper makes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from portakv.runtime.bounded import Bounded, Until
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.bucket import MISSING, look_up
from portakv.serving.groups import Validity
from portakv.serving.pages import PageJob, Pages, PageStore, page_key
from portakv.serving.worker import Calls
from portakv.storage.store import FormStore
from portakv.storage.tiers.base import Keys

_log = RateLimitedLog(logging.getLogger(__name__))
#: Seconds for which a page that did not land is not offered again, unless it is saved meanwhile.
#: An engine would request it again immediately, and get no further.
FAILED = 60.0
#: The most pages that wait for `PageTier.step` to record their use, and the seconds between two.
TOUCHED = 4096
PACE = 1.0
#: The most keys that are remembered to report their loss, and those of pages that did not land.
REMEMBERED = 1 << 20


#: The most keys of a lookup in a bucket.
BATCH = 256
#: Seconds after which a lookup that has not ended counts as one that found nothing: its worker may
#: be gone, and the scheduler must not wait for ever. An answer comes within two seconds.
PENDING = 10.0


class TierEvents(NamedTuple):
    """The keys of pages that were stored, and of pages that no tier has any longer."""

    stored: list[bytes]
    lost: list[bytes]


class _Lookups:
    """The lookups in a bucket that were made for a scheduler, which waits for none of them."""

    def __init__(self, pages: Pages, now: Callable[[], float]) -> None:
        self._pages = pages
        self._wanted = dict[Hashable, list[bytes]]()  # by chain of a request
        #: True: a lookup is expected to end, which is wanted or has begun; False: the bucket lacks
        #: the page.
        self._beliefs: Until[bytes] = Until("beliefs about pages of a bucket", REMEMBERED, now)
        self._answers = True  # the bucket answered the last lookup in time

    def look(self, key: bytes, chain: Hashable) -> bool | None:
        """Return None if a lookup will show whether a bucket has a page, else False."""
        belief = self._beliefs.held(key)
        if belief is None and self._beliefs.get(key, (False, 0.0))[0]:  # its worker may be gone
            self._end([key], 0, self._answers)
            return False
        if belief is False:
            return False
        if belief is None:
            self._wanted.setdefault(chain, []).append(key)
            self._beliefs.hold(key, PENDING)
        return None if self._answers else False

    def begin(self) -> None:
        """Begin lookups of the pages that are wanted, the first ones of each chain together."""
        wanted = self._wanted
        self._wanted = {}
        blocks = self._pages.blocks
        for keys in wanted.values():
            for first in range(0, len(keys), BATCH):
                some = keys[first : first + BATCH]
                if isinstance(blocks, FormStore):
                    ended = partial(self._end, some)
                    look_up([[blocks]], [*map(page_key, some)], ended, Validity.of_rows(1))
                else:  # it was closed
                    self._end(some, 0, self._answers)

    def _end(self, keys: Keys, count: int, answers: bool) -> None:
        """Note the end of a lookup, of which so many leading pages are there."""
        for key in keys[:count]:
            self._beliefs.pop(key, None)
        for key in keys[count:]:
            self._beliefs.hold(key, MISSING, False)
        self._answers = answers


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

    Jobs that come after `close` end without a page.

    Raises `InvalidTerms` for other memory.

    Attributes:
        counts: pages that were loaded and stored, and those that did not land.
        pages: of the store.
        reports: `events` are kept.
        view: of the engine's tier of host memory.
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
        self.pages = pages
        self.view = pages.over(memory)
        self._now = now
        self._chain_of = chain_of
        # The jobs that have not been reported, by their numbers; None: it has not begun.
        self._jobs = dict[Hashable, PageJob | None]()
        # The last page of each chain of each request, which the next one follows.
        self._lasts = dict[Hashable, dict[Hashable, bytes]]()
        self._failed: Until[bytes] = Until("pages that did not land", REMEMBERED, now)
        self._touched = dict[bytes, float]()  # with the time of their first use since `step`
        self._lookups = None if store.terms.bucket is None else _Lookups(pages, now)
        self.reports = reports
        self._stored = list[bytes]()  # since the last `events`
        self._names: Bounded[bytes, bytes] = Bounded("keys of stored pages", REMEMBERED)
        if reports:
            store.changes()  # later ones are kept
        self._calls = Calls()

    @property
    def busy(self) -> bool:
        """Return whether a job has not been reported."""
        return bool(self._jobs)

    def has(self, key: bytes) -> bool:
        """Return whether a page can be loaded: a look into the index of this process."""
        if not self.pages.has(key):
            return False
        return not self._failed.holds(key)

    def look(self, key: bytes, request: Hashable) -> bool | None:
        """Return whether a page can be loaded; None if a bucket has yet to answer.

        Answers as `has` does for other tiers. `step` begins the lookups in a bucket, whose answers
        come within two seconds.
        """
        if self.has(key):
            return True
        if self._lookups is None or self._failed.holds(key):
            return False
        return self._lookups.look(key, (request, self._chain_of(key)))

    def save(self, number: Hashable, keys: Keys, slots: Sequence[int], request: Hashable) -> None:
        """Begin to save slots under keys, which are of a request and in its order."""
        after = list[bytes | None]()
        lasts = self._lasts.setdefault(request, {})
        for key in keys:
            chain = self._chain_of(key)
            after.append(lasts.get(chain))
            lasts[chain] = key
        self._submit("save", number, keys, partial(self.pages.save, after=after), slots)

    def load(self, number: Hashable, keys: Keys, slots: Sequence[int]) -> None:
        """Begin to load pages into slots."""
        self._submit("load", number, keys, self.pages.load, slots)

    def _submit(
        self,
        kind: Literal["save", "load"],
        number: Hashable,
        keys: Keys,
        call: Callable[..., PageJob],
        slots: Sequence[int],
    ) -> None:
        """Have a helper begin a job. It ends without a page if the store refuses it."""

        def begin() -> None:
            try:
                self._jobs[number] = call(keys, self.view, slots, tag=number)
            except Exception as error:  # class 4: the engine waits for the end of each job
                refuse(error)

        def refuse(why: object) -> None:
            text = "A %s of %d pages of an engine is refused: %s"
            _log.warning("refused", text, kind, len(keys), why)
            self._jobs[number] = PageJob(kind, keys, self.pages.size.nbytes, number).follow(None)

        self._jobs[number] = None
        if not self._calls.add(begin):
            refuse("Expected a tier that is open, got one that was closed.")

    def ended(self) -> list[PageJob]:
        """Return the jobs that have ended since the last call."""
        ended = [job for job in self._begun() if job.done()]
        for job in ended:
            del self._jobs[job.tag]
            self._note(job)
        return ended

    def _begun(self) -> list[PageJob]:
        """Return the jobs that have begun and were not reported, in order."""
        return [job for job in [*self._jobs.values()] if job is not None]

    def drain(self) -> None:
        """Wait until all jobs have ended; `ended` returns them then.

        Jobs that hang are cancelled at their deadline, a minute for saves, which end then: a tier
        has copies of their pages.
        """
        self._calls.wait()
        for job in self._begun():
            job.wait()

    def touch(self, keys: Collection[bytes]) -> None:
        """Note that pages are used, in the order of their chains. `step` records it."""
        now = self._now()
        for key in keys if len(self._touched) < TOUCHED else ():
            self._touched.setdefault(key, now)

    def step(self) -> None:
        """Begin lookups in a bucket, and record the use of pages once in a while."""
        if self._lookups is not None:
            self._lookups.begin()
        first = next(iter(self._touched.values()), None)
        if first is None or self._now() < first + PACE:
            return
        keys = [*self._touched]
        self._touched.clear()
        self._calls.add(partial(self.pages.touch, keys))

    def forget(self, request: Hashable) -> None:
        """Forget a request that has ended."""
        self._lasts.pop(request, None)

    def events(self) -> TierEvents:
        """Return what was stored and lost since the last call; nothing without ``reports``."""
        events = TierEvents(self._stored, [])
        self._stored = []
        for change in self._store.changes() if self.reports else ():
            key = None if change.stored else self._names.get(change.key)
            if key is not None and not self.pages.has(key):
                del self._names[change.key]
                events.lost.append(key)
        return events

    def close(self, timeout: float = 10.0) -> None:
        """Close the store, as `PageStore.close` does. `ended` then reports the jobs in flight."""
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
            for key in {*job.keys}.difference(there) if missing else ():
                self._failed.hold(key, FAILED)
            return
        for key in there if self._failed else ():
            self._failed.pop(key, None)
        if self.reports:
            self._stored += there
            for key in there:
                self._names[page_key(key)] = key
