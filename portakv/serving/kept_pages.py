# SPDX-License-Identifier: Apache-2.0
"""`KeptPageStore`: pages of an engine's host memory in the store of a host's keeper.

It stands for a `PageStore` where several processes have the same pages: the ranks of an engine, or
several engines of a host. One of the processes serves the store; if it ends, another one does.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from secrets import token_hex

import numpy as np

from portakv.arguments import instance
from portakv.errors import InvalidTerms
from portakv.graph import Mask, Priority
from portakv.runtime.finished import Finished
from portakv.serving.keeper_blocks import KeptBlocks
from portakv.serving.keeper_client import KeeperClient
from portakv.serving.keeper_server import Keeper, place_of
from portakv.serving.keeper_transfer import GRACE, KeptTransfer
from portakv.serving.known import KeeperIndex
from portakv.serving.local import StoreTerms
from portakv.serving.page_sizes import check_raw, check_shared
from portakv.serving.pages import SAVE, PageJob, Pages, PageSize, PageStore, Usage, page_key
from portakv.storage.changes import Change
from portakv.storage.pins import Pins
from portakv.view import IdList, KVView


def page_store(
    terms: StoreTerms, model: str, sizes: Sequence[PageSize], identity: str = ""
) -> PageStore | KeptPageStore:
    """Return a store of pages by its terms: that of a keeper if they have ``shared``.

    Raises as `PageStore` and `KeptPageStore` do.
    """
    if terms.shared:
        return KeptPageStore(terms, model, sizes, identity)
    return PageStore(terms, model, sizes, identity=identity)


class KeptPageStore:
    """Pages of bytes in the host memory of an engine, in the store of a keeper.

    Args:
        terms: where pages are stored, with a folder and ``shared``, without an encoding. Each
            process has equal terms.
        model: the name of the model.
        sizes: of the pages, equal in all processes.
        identity: what else fixes the bytes of a page; see `PageStore`.
        patience: seconds to wait for a keeper. Without one, pages are missing until one serves.

    Raises:
        InvalidTerms: wrong terms, or pages that a keeper of the folder refuses, such as those of
            another model.
        StoreError: a folder that cannot be used.

    Attributes:
        ended: the jobs that have ended, unless a call names another queue.
    """

    def __init__(
        self,
        terms: StoreTerms,
        model: str,
        sizes: Sequence[PageSize],
        identity: str = "",
        patience: float = 10.0,
    ) -> None:
        self.terms = instance("terms", terms, StoreTerms)
        self.ended = Finished[PageJob]()
        self.ended.start()
        check_shared(terms)
        check_raw(terms)
        forms = [size.form(model, identity) for size in sizes]
        engine = token_hex(16)  # its own: a save waits for no other process
        place = place_of(terms, engine)
        self._keeper = Keeper(terms, engine)
        self._client = KeeperClient(place, forms, engine)
        self._index = KeeperIndex(place, engine, len(forms))
        self._pages = dict[PageSize, KeptPages]()
        for number, size in enumerate(sizes):
            blocks = self._client.blocks[number]
            self._pages[size] = KeptPages(self, size, blocks, self._index, number)
        try:
            if self._client.wait(patience):
                self._index.wait(patience)
        except BaseException:
            self.close()
            raise

    def pages(self, nbytes: int, runs: int = 1) -> KeptPages:
        """Return the pages of a size. Raises `InvalidTerms` for a size that the store lacks."""
        size = PageSize(nbytes, runs)
        if size not in self._pages:
            raise InvalidTerms(
                f"Expected a size of {[*self._pages]}, got {size}. Pass all sizes when the store "
                f"is made."
            )
        return self._pages[size]

    def every(self) -> list[KeptPages]:
        """Return the pages of each size."""
        return [*self._pages.values()]

    def finished(self) -> list[PageJob]:
        """Return the jobs that have ended since the last call. There is one consumer.

        Jobs that are late are cancelled in this call: a consumer that sleeps on `fileno` makes it
        now and then, too.
        """
        now = time.monotonic()
        for pages in self.every():
            for job in pages.saves.due(now):
                job.cancel()
        return self.ended.take()

    def fileno(self) -> int:
        """Return a descriptor that is readable while `finished` has jobs; -1 after `close`.

        Raises `HostMemoryError` without a free descriptor.
        """
        return self.ended.fileno()

    def changes(self) -> list[Change]:
        """Return the pages that were stored or lost since the last call, by any process.

        The first call returns none. Their keys are those of `page_key`.
        """
        self._index.record(every=True)
        return self._index.take_events()

    def usage(self) -> Usage:
        """Return how full the store is, by the pages that the keeper has of these sizes."""
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
        self._keeper.close(timeout)
        self.ended.close()


class KeptPages(Pages):
    """The pages of one size of a `KeptPageStore`, which makes it.

    ``saves`` has the loads in flight, too: `KeptPageStore.finished` cancels those that are late.
    """

    def __init__(
        self,
        store: KeptPageStore,
        size: PageSize,
        kept: KeptBlocks,
        index: KeeperIndex,
        number: int,
    ) -> None:
        super().__init__(store, size, kept.form)
        self._kept = kept
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
            made = self._kept.pin([page_key(keys[at]) for at in there])
            for place in np.flatnonzero(made.held).tolist():
                pins.add(there[place], made.release)
        return pins

    def delete(self, keys: Sequence[bytes]) -> Mask:
        """Forget pages, for all processes; return which were there, bool ``[keys]``.

        Waits for the keeper's answer, two seconds at most.
        """
        return self._kept.delete([*map(page_key, keys)])

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
