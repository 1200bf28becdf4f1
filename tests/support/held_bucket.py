# SPDX-License-Identifier: Apache-2.0
"""A bucket whose requests wait for an event, for tests of what must not wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from portakv.serving.local import StoreTerms
from portakv.storage import Remote
from portakv.storage.tiers.base import Tier
from support.waits import LIMIT


class HeldBucket(Remote):
    """A bucket in memory whose requests wait while it is held.

    Attributes:
        waiting: how many requests wait.
        requests: how many there have been.
    """

    def __init__(self, url: str = "memory://", workers: int = 8) -> None:
        super().__init__(url, workers=workers)
        self.waiting = 0
        self.requests = 0
        self._free = threading.Event()
        self._free.set()
        self._counting = threading.Lock()

    def hold(self) -> None:
        """Let later requests wait."""
        self._free.clear()

    def release(self) -> None:
        """Let all requests go on."""
        self._free.set()

    def attempt(self, work: Callable[..., Any], *terms: Any, miss: Any = None) -> Any:
        with self._counting:
            self.requests += 1
            self.waiting += 1
        assert self._free.wait(LIMIT), "a request was held for too long"
        with self._counting:
            self.waiting -= 1
        return super().attempt(work, *terms, miss=miss)


class TermsWith(StoreTerms):
    """Terms of a store whose bucket a test has made. Set ``made`` before ``tiers`` is called."""

    made: Remote

    @classmethod
    def a_bucket(cls, made: Remote, **terms: Any) -> TermsWith:
        """Return terms with a bucket."""
        result = cls(bucket=made.url, **terms)
        object.__setattr__(result, "made", made)
        return result

    def tiers(self) -> list[Tier]:
        *nearer, _ = super().tiers()
        return [*nearer, self.made]
