# SPDX-License-Identifier: Apache-2.0
"""`PagePool`: the pages of a pool of host memory, for an engine whose threads wait for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

from portakv.arguments import invalid, items, octets, whole
from portakv.graph import Mask
from portakv.runtime.finished import Finished
from portakv.runtime.rate_limited_log import SLOW_DEVICE, RateLimitedLog
from portakv.serving.kept_page_store import KeptPageStore
from portakv.serving.pages import PageJob, Pages, PageSize, PageStore

_log = RateLimitedLog(logging.getLogger(__name__))
#: The most runs of a page: more are too short to be copied one by one.
MOST_RUNS = 4096
#: Seconds between two lines of the log about a load that does not end.
GRACE = 5.0


class PagePool:
    """The pages of one pool of an engine's host memory, in a `PageStore` or a `KeptPageStore`.

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

    def open(self, store: PageStore | KeptPageStore) -> None:
        """Use a store from now on. Raises as `PageStore.pages` does."""
        self._pages = store.pages(*self.size)
        self._deadline = store.terms.deadline

    def lookup(self, keys: Sequence[bytes]) -> int:
        """Return the number of leading pages that can be loaded; a bucket has a second to
        answer."""
        pages = self._pages
        return 0 if pages is None else pages.lookup(self._names(keys))

    def holds(self, keys: Sequence[bytes]) -> Mask:
        """Return which pages can be loaded, as far as is known here, bool ``[keys]``."""
        pages = self._pages
        if pages is None:
            return np.zeros(len(keys), np.bool_)
        return pages.holds(self._names(keys))

    def restorable(self, keys: Sequence[bytes], trailing: int | None = None) -> Mask:
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

    def save(
        self, keys: Sequence[bytes], addresses: npt.ArrayLike, after: bytes | None = None
    ) -> Mask:
        """Store pages; return which of them are stored now, bool ``[keys]``.

        Args:
            keys: of the pages, each of which follows the one before it.
            addresses: of the pieces of each page, int ``[keys, pieces]``; for pages whose pieces
                lie one after the other ``[keys, 1]``.
            after: the key that the first page follows; None: it begins a prompt.
        """
        pages = self._pages
        if pages is None or not keys:
            return np.zeros(len(keys), np.bool_)
        names = self._names(keys)
        first = None if after is None else self._names([after])[0]
        view = pages.at(self._runs(addresses))
        job = pages.save(
            names,
            view,
            after=[first, *names[:-1]],
            deadline=self._deadline,
            ended=self._unread,
        )
        return self._landed(job)

    def load(self, keys: Sequence[bytes], addresses: npt.ArrayLike) -> Mask:
        """Load pages; return which of them have come, with verified bytes, bool ``[keys]``.

        The others are not written. The arguments are those of `save`.
        """
        pages = self._pages
        if pages is None or not keys:
            return np.zeros(len(keys), np.bool_)
        view = pages.at(self._runs(addresses))
        job = pages.load(self._names(keys), view, deadline=self._deadline, ended=self._unread)
        return self._landed(job)

    def _names(self, keys: Sequence[bytes]) -> list[bytes]:
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
        while not job.wait(GRACE):
            line = "A load of pages takes too long, and still uses its memory. %s"
            _log.warning("load", line, SLOW_DEVICE)
        return job.landed
