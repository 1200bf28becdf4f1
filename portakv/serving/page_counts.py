# SPDX-License-Identifier: Apache-2.0
"""The pages of a store that an engine counts, and lookups whose answers it has not fetched."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

Key = TypeVar("Key")
Answer = TypeVar("Answer")

#: The most lookups whose answers wait to be fetched; the locks of older ones end.
UNFETCHED = 4096


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
    locked: Sequence[bytes]


class Lookups(Generic[Answer]):
    """The answers of lookups, until they are fetched, with the names of the pages they locked."""

    def __init__(self, most: int = UNFETCHED) -> None:
        self._lock = threading.Lock()
        self._most = most
        self._open = OrderedDict[int, _Lookup[Answer]]()

    def add(self, number: int, answer: Answer, locked: Sequence[bytes]) -> Sequence[bytes]:
        """Keep the answer of a lookup; return the names whose locks are to end, since the answer of
        another lookup was not fetched in time."""
        with self._lock:
            self._open[number] = _Lookup(answer, locked)
            if len(self._open) <= self._most:
                return ()
            _, oldest = self._open.popitem(last=False)
        return oldest.locked

    def fetch(self, number: int) -> Answer | None:
        """Return the answer of a lookup, once; None if there is none."""
        with self._lock:
            found = self._open.pop(number, None)
        return None if found is None else found.answer
