# SPDX-License-Identifier: Apache-2.0
"""The pages of a store that an engine counts, and lookups whose answers it has not fetched."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from portakv.runtime.bounded import Bounded
from portakv.runtime.rate_limited_log import RateLimitedLog

_logger = logging.getLogger(__name__)
Key = TypeVar("Key")
Answer = TypeVar("Answer")

#: The most lookups whose answers wait to be fetched. The locks of older ones end, and their answers
#: find nothing: so many of these wait.
UNFETCHED = 4096
EMPTY = 1 << 16


class Counted(Generic[Key]):
    """The pages that an engine counts, by their names, with its own keys and their bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
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


class _Lookup(NamedTuple, Generic[Answer]):
    answer: Answer
    keys: int
    locked: Sequence[bytes]


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
        self._lock = threading.Lock()
        self._nothing = nothing
        self._most = most
        self._open = OrderedDict[int, _Lookup[Answer]]()
        # The numbers of keys of lookups whose answers find nothing now.
        self._empty: Bounded[int, int] = Bounded("lookups without an answer", EMPTY)

    def add(
        self, number: int, answer: Answer, keys: int, locked: Sequence[bytes]
    ) -> Sequence[bytes]:
        """Keep the answer of a lookup of so many keys.

        Returns the names whose locks are to end, since the answer of another lookup was not fetched
        in time.
        """
        with self._lock:
            self._open[number] = _Lookup(answer, keys, locked)
            if len(self._open) <= self._most:
                return ()
            late, oldest = self._open.popitem(last=False)
            self._empty[late] = oldest.keys
        self._log.warning(
            "unfetched",
            "A lookup of %d pages finds none: %d later ones came before its answer was fetched. "
            "Look at the engine's log.",
            oldest.keys,
            self._most,
            lines=1,
        )
        return oldest.locked

    def fetch(self, number: int) -> Answer | None:
        """Return the answer of a lookup, once; None if there is none."""
        with self._lock:
            found = self._open.pop(number, None)
            keys = self._empty.pop(number, None)
        if found is not None:
            return found.answer
        return None if keys is None else self._nothing(keys)
