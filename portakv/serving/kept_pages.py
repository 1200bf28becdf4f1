# SPDX-License-Identifier: Apache-2.0
"""`KeptPageStore`: pages of an engine's host memory in the store of a host's keeper.

It stands for a `PageStore` where several processes have the same pages: the ranks of an engine, or
several engines of a host. One of the processes serves the store; if it ends, another one does.
"""

from __future__ import annotations

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
from portakv.serving.known import KeeperIndex
from portakv.serving.local import StoreTerms
from portakv.serving.page_sizes import check_raw
from portakv.serving.pages import PageJob, Pages, PageSize, page_key
from portakv.view import IdList, KVView


class KeptPageStore:
    """Pages of bytes in the host memory of an engine, in the store of a keeper.

    Args:
        terms: where pages are stored, with a folder and ``shared``, without an encoding. Each
            process has equal terms.
        model: the name of the model.
        sizes: of the pages, equal in all processes.
        patience: seconds to wait for a keeper. Without one, pages are missing until one serves.

    Raises:
        InvalidTerms: wrong terms, or pages that a keeper of the folder refuses, such as those of
            another model.
        StoreError: a folder that cannot be used.
    """

    def __init__(
        self,
        terms: StoreTerms,
        model: str,
        sizes: Sequence[PageSize],
        patience: float = 10.0,
    ) -> None:
        self.terms = instance("terms", terms, StoreTerms)
        self.ended = Finished[PageJob]()  # was not started, and keeps no job
        if not terms.shared or not terms.folders or terms.bucket is not None:
            raise InvalidTerms(
                "Expected terms with shared and a folder, and without a bucket, which processes "
                "share anyway, got others. Correct them."
            )
        check_raw(terms)
        forms = [size.form(model) for size in sizes]
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

    def clear(self) -> bool:
        """Return False: other processes use the pages. `portakv store wipe` removes them."""
        return False

    def close(self, timeout: float = 10.0) -> None:
        """End the jobs in flight within so many seconds, and leave the store to the others."""
        self._index.close()
        self._client.close(timeout)
        self._keeper.close(timeout)


class KeptPages(Pages):
    """The pages of one size of a `KeptPageStore`, which makes it."""

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
        return bool(self.holds([key])[0])

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
        deadline: float | None = None,
        tag: Hashable = None,
        ended: Finished[PageJob] | None = None,
    ) -> PageJob:
        """Save pages as `Pages.save` does. A page that finds no free staging is dropped."""
        job = PageJob("save", keys, self.size.nbytes, tag)
        follows = [None if each is None else page_key(each) for each in after or [None] * len(keys)]
        names = [*map(page_key, keys)]
        places = range(view.slots) if slots is None else slots
        job.moved_by(self._kept.save(view, places, names, after=follows, priority=priority))
        return job

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
        job.moved_by(self._kept.load(view, places, names, priority=priority, deadline=deadline))
        return job
