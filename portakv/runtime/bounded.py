# SPDX-License-Identifier: Apache-2.0
"""The one mapping for everything in the library that remembers: with a name and a limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakSet

Key = TypeVar("Key")
Value = TypeVar("Value")


class Bounded(dict[Key, Value]):
    """A mapping of at most ``limit`` entries, which `caches` lists under ``name`` (in the plural);
    the entry that was inserted first goes first, so that a hit costs what a dictionary's does. Any
    number of threads may use one at once: each step is one operation of a dictionary, no lock is
    held, and what goes out is released with no lock held either.
    """

    __slots__ = ("__weakref__", "limit", "name")
    __hash__ = object.__hash__  # type: ignore[assignment]  # each is one of its own, as in `caches`

    def __init__(self, name: str, limit: int) -> None:
        super().__init__()
        self.name = name
        self.limit = limit
        _caches.add(self)

    def __setitem__(self, key: Key, value: Value) -> None:
        super().__setitem__(key, value)
        self._shrink()

    def setdefault(self, key: Key, value: Value) -> Value:
        """The value of ``key``; ``value`` if there was none, of several threads the first's."""
        value = super().setdefault(key, value)
        self._shrink()
        return value

    def get_or_make(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made if there is none. Several threads may make it at once; all get
        the first one. Errors of ``make`` pass through, and nothing is remembered."""
        try:
            return self[key]
        except KeyError:
            return self.setdefault(key, make())

    def _shrink(self) -> None:
        while len(self) > self.limit:
            try:
                self.pop(next(iter(self)), None)
            except (RuntimeError, StopIteration):  # another thread changed it in between
                continue


_caches: WeakSet[Bounded[Any, Any]] = WeakSet()


def caches() -> list[Bounded[Any, Any]]:
    """Every bounded mapping that exists now, by name; several may have one name."""
    return sorted(_caches, key=lambda cache: cache.name)
