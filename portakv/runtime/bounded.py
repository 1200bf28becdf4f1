# SPDX-License-Identifier: Apache-2.0
"""The one mapping for everything in the library that remembers: with a name and a limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakSet

Key = TypeVar("Key")
Value = TypeVar("Value")


class Bounded(Generic[Key, Value]):
    """A mapping of at most ``limit`` entries, which `caches` lists under ``name`` (in the plural);
    the entry that was inserted first goes first.

    Looking an entry up (``get`` is `dict.get`) does not make it younger, so that a hit costs what a
    dictionary's does. Any number of threads may use one at once: each step is one operation of a
    dictionary, no lock is held, and what goes out is released with no lock held either.
    """

    __slots__ = ("__weakref__", "_entries", "get", "limit", "name")

    get: Callable[..., Value | None]

    def __init__(self, name: str, limit: int) -> None:
        self.name, self.limit = name, limit
        self._entries: dict[Key, Value] = {}
        self.get = self._entries.get
        _caches.add(self)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __setitem__(self, key: Key, value: Value) -> None:
        self._entries[key] = value
        self._shrink()

    def setdefault(self, key: Key, value: Value) -> Value:
        """The value of ``key``, which is ``value`` if there was none: of several threads, the value
        of the first."""
        value = self._entries.setdefault(key, value)
        self._shrink()
        return value

    def get_or_make(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made if there is none. Several threads may make it at once; all get
        the first one. Errors of ``make`` pass through, and nothing is remembered."""
        try:
            return self._entries[key]
        except KeyError:
            return self.setdefault(key, make())

    def pop(self, key: Key) -> Value | None:
        """Forget an entry; returns its value, or None if there was none."""
        return self._entries.pop(key, None)

    def values(self) -> list[Value]:
        """The values of now, the oldest first."""
        return list(self._entries.values())

    def clear(self) -> None:
        """Forget all entries."""
        self._entries.clear()

    def _shrink(self) -> None:
        entries = self._entries
        while len(entries) > self.limit:
            try:
                entries.pop(next(iter(entries)), None)
            except (RuntimeError, StopIteration):  # another thread changed it in between
                continue


_caches: WeakSet[Bounded[Any, Any]] = WeakSet()


def caches() -> list[Bounded[Any, Any]]:
    """Every bounded mapping that exists now, by name; several may have one name."""
    return sorted(_caches, key=lambda cache: cache.name)
