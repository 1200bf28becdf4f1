# SPDX-License-Identifier: Apache-2.0
"""`KeptPages`: the pages of one size in the store of a host's keeper."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from portakv.graph import Mask, Priority
from portakv.runtime.finished import Finished
from portakv.serving.keeper_blocks import KeptBlocks
from portakv.serving.keeper_locks import KeptLocks
from portakv.serving.keeper_transfer import GRACE, KeptTransfer
from portakv.serving.known import KeeperIndex
from portakv.serving.pages import SAVE, HasTerms, PageJob, Pages, PageSize, page_key
from portakv.storage.pins import Pins
from portakv.view import IdList, KVView


class KeptPages(Pages):
    """The pages of one size of a `KeptPageStore`, which makes it.

    ``saves`` has the loads in flight, too: `KeptPageStore.finished` cancels those that are late.
    """

    def __init__(
        self,
        store: HasTerms,
        size: PageSize,
        kept: KeptBlocks,
        locks: KeptLocks,
        index: KeeperIndex,
        number: int,
    ) -> None:
        super().__init__(store, size, kept.form)
        self._kept = kept
        self._locks = locks
        self._index = index
        self._number = number

    def holds(self, keys: Sequence[bytes]) -> Mask:
        """Return which pages can be loaded, as far as is known here, bool ``[keys]``."""
        return np.array(self._index.holds(self._number, [*map(page_key, keys)]), np.bool_)

    def has(self, key: bytes) -> bool:
        """Return whether a page can be loaded, as far as is known here."""
        return self._index.holds(self._number, (page_key(key),))[0]

    def lookup(self, keys: Sequence[bytes], timeout: float | None = 1.0) -> int:
        """Return the number of leading pages that can be loaded; waits for nothing."""
        return int(self.holds(keys).cumprod().sum())

    def save(
        self,
        keys: Sequence[bytes],
        view: KVView,
        slots: IdList | None = None,
        *,
        after: Sequence[bytes | None] | None = None,
        priority: Priority = "background",
        deadline: float | None = SAVE,
        tag: Hashable = None,
        ended: Finished[PageJob] | None = None,
    ) -> PageJob:
        """Save pages as `Pages.save` does. A page that finds no free staging is dropped."""
        job = PageJob("save", keys, self.size.nbytes, tag)
        follows = [None if each is None else page_key(each) for each in after or [None] * len(keys)]
        names = [*map(page_key, keys)]
        places = range(view.slots) if slots is None else slots
        transfer = self._kept.save(view, places, names, after=follows, priority=priority)
        return self._followed(job, transfer, ended, deadline)

    def load(
        self,
        keys: Sequence[bytes],
        view: KVView,
        slots: IdList | None = None,
        *,
        priority: Priority = "urgent",
        deadline: float | None = None,
        tag: Hashable = None,
        ended: Finished[PageJob] | None = None,
    ) -> PageJob:
        """Load pages as `Pages.load` does."""
        job = PageJob("load", keys, self.size.nbytes, tag)
        places = range(view.slots) if slots is None else slots
        names = [*map(page_key, keys)]
        until = self._store.terms.deadline if deadline is None else deadline
        transfer = self._kept.load(view, places, names, priority=priority, deadline=until)
        return self._followed(job, transfer, ended, until + GRACE)

    def pin(self, keys: Sequence[bytes]) -> Pins:
        """Keep pages from eviction until `Pins.release`, as far as they are there.

        Waits for the keeper's answer, two seconds at most, if one is known to have a page.
        """
        there = np.flatnonzero(self.holds(keys)).tolist()
        pins = Pins(len(keys))
        if there:
            made = self._locks.pin([page_key(keys[at]) for at in there])
            for place in np.flatnonzero(made.held).tolist():
                pins.add(there[place], made.release)
        return pins

    def delete(self, keys: Sequence[bytes]) -> Mask:
        """Forget pages, for all processes; return which were there, bool ``[keys]``.

        Waits for the keeper's answer, two seconds at most.
        """
        return self._locks.delete([*map(page_key, keys)])

    @property
    def opened(self) -> object | None:
        """Return what tells this store from one that was opened later: there is no later one."""
        return self

    def _followed(
        self,
        job: PageJob,
        transfer: KeptTransfer,
        ended: Finished[PageJob] | None,
        limit: float | None,
    ) -> PageJob:
        """Have a queue take a job at its end; it is late after so many seconds."""
        overdue = None
        if limit is not None:
            overdue = self.saves
            overdue.add(job, job.began + limit)
        job._follow(transfer, self._store.ended if ended is None else ended, overdue)
        return job
