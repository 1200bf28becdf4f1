# SPDX-License-Identifier: Apache-2.0
"""What the library remembers in a process: the one mapping for all caches, with a name and a limit,
and the lock of what exists once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any, TypeVar
from weakref import WeakSet

Key = TypeVar("Key")
Value = TypeVar("Value")


class Bounded(dict[Key, Value]):
    """A mapping of at most ``limit`` entries; `caches` lists it under ``name`` (in the plural).

    The oldest entry is evicted first, so that a hit costs as little as a dictionary's. Any number
    of threads may use one: each step is one operation of a dictionary. No lock is held, also while
    an evicted value is released.
    """

    __slots__ = ("__weakref__", "limit", "name")
    __hash__ = object.__hash__  # type: ignore[assignment]  # by identity, as in `caches`

    def __init__(self, name: str, limit: int) -> None:
        super().__init__()
        self.name = name
        self.limit = limit
        _caches.add(self)

    def __setitem__(self, key: Key, value: Value) -> None:
        super().__setitem__(key, value)
        self._shrink()

    def setdefault(self, key: Key, value: Value) -> Value:
        """Return the value of ``key``, after setting it to ``value`` if it has none. The first
        thread wins."""
        value = super().setdefault(key, value)
        self._shrink()
        return value

    def get_or_make(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of ``key``, made if there is none.

        Several threads may make it concurrently; all get the first value. Errors of ``make`` pass
        through, and nothing is cached.
        """
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


_NOTHING = None, 0.0


class Until(Bounded[Key, tuple[Any, float]]):
    """What holds for a while, such as that a place lacks something, and is not asked again.

    Each entry is a value, and the time until which it holds.

    Args:
        now: returns the time in seconds.
    """

    __slots__ = ("_now",)

    def __init__(self, name: str, limit: int, now: Callable[[], float] = monotonic) -> None:
        super().__init__(name, limit)
        self._now = now

    def hold(self, key: Key, seconds: float, value: object = True) -> None:
        """Let the value of a key hold for some seconds from now on. It is the newest entry."""
        self.pop(key, None)
        self[key] = value, self._now() + seconds

    def held(self, key: Key) -> Any:
        """Return the value of a key if it holds now, else None."""
        value, until = self.get(key, _NOTHING)
        return value if until > self._now() else None

    def holds(self, key: Key) -> bool:
        """Return True if a key holds now."""
        return self.held(key) is not None


_caches: WeakSet[Bounded[Any, Any]] = WeakSet()


def caches() -> list[Bounded[Any, Any]]:
    """Return every existing bounded mapping, by name; several may have one name."""
    return sorted(_caches, key=lambda cache: cache.name)


# ------------------------------------------------------------------------------------------------
# The lock of a process for what exists once: choices of backends, kernels, tables of costs.
#
# A thread that needs such an object waits for the thread that makes it. They have one lock, since
# making one object makes others: a choice tests kernels, and to load these reserves pinned
# memory. With several locks two threads could wait for each other.

_lock: AbstractContextManager[bool]


def making() -> AbstractContextManager[bool]:
    """Return the lock as a context, which a thread that has it may enter again.

    Nothing takes it for a copy of forms that are known.
    """
    return _lock


def _renew() -> None:
    """Begin with a free lock: a forked process lacks the thread of its parent that may have it."""
    global _lock
    _lock = threading.RLock()


_renew()
os.register_at_fork(after_in_child=_renew)
