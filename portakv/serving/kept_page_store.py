# SPDX-License-Identifier: Apache-2.0
"""`KeptPageStore`: pages of an engine's host memory in the store of a host's keeper.

It stands for a `PageStore` where several processes have the same pages: the ranks of an engine, or
several engines of a host. One of the processes serves the store; if it ends, another one does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from secrets import token_hex

from portakv.arguments import instance
from portakv.errors import InvalidTerms
from portakv.runtime.finished import Finished
from portakv.serving.keeper_client import KeeperClient
from portakv.serving.keeper_server import Keeper, place_of
from portakv.serving.kept_pages import KeptPages
from portakv.serving.known import KeeperIndex
from portakv.serving.local import StoreTerms, log_start
from portakv.serving.page_sizes import check_raw, check_shared
from portakv.serving.pages import PageJob, PageSize, PageStore, Usage
from portakv.storage.changes import Change


def page_store(
    terms: StoreTerms, model: str, sizes: Sequence[PageSize], identity: str = ""
) -> PageStore | KeptPageStore:
    """Return a store of pages by its terms: that of a keeper if they have ``shared``.

    The log has a line about it. Raises `InvalidTerms` for a folder that cannot be made or written,
    and as `PageStore` and `KeptPageStore` do.
    """
    terms.check_usable()
    store: PageStore | KeptPageStore
    server = "This process"
    if terms.shared:
        store = KeptPageStore(terms, model, sizes, identity)
        if not store.serves:
            server = "Another process of this host"
    else:
        store = PageStore(terms, model, sizes, identity=identity)
    log_start(terms, "pages", store.count(), server)
    return store


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
            locks = self._client.locks[number]
            self._pages[size] = KeptPages(self, size, blocks, locks, self._index, number)
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

    @property
    def serves(self) -> bool:
        """Return whether this process serves the store; others may."""
        return self._keeper.serves

    def count(self) -> int:
        """Return the pages that the keeper has of these sizes."""
        return sum(self._index.counts())

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
