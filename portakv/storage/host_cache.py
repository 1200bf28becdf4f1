# SPDX-License-Identifier: Apache-2.0
"""The keys of the host tier with their rows: which go next, which stay, and who listens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from portakv.storage.chains import FIRST, UNKNOWN, Chains, Changed, marks_of
from portakv.storage.loans import Loans

# The groups of cached rows.
USED = "used"
UNUSED = "prefetched and not used"
#: A position before all keys of a call; those that its first blocks follow have -1.
BEFORE = -2


class New:
    """Keys that got a row and are in no chain yet, of a group, with the marks that they follow."""

    def __init__(self, group: Hashable) -> None:
        self.group = group
        self.keys = list[bytes]()
        self.follows = list[Hashable]()
        self.leading = set[Hashable]()  # the same marks

    def add(self, key: bytes, follows: int) -> None:
        """Add a key that follows a mark."""
        mark = mark_in_form(key, follows)
        self.keys.append(key)
        self.follows.append(mark)
        self.leading.add(mark)


class Cache:
    """The rows of the host tier, by their keys. Callers hold the lock of ``chains``."""

    def __init__(self) -> None:
        self.chains = Chains[bytes]()  # the keys that have a row, in two groups
        self.rows = dict[bytes, int]()
        self.unused = set[bytes]()  # keys of rows that were prefetched and not used since
        self.pins: Counter[int] = Counter()  # by row
        self.loans = Loans()
        self.listeners = dict[bytes, Changed]()  # by the checksum of a form
        self._names = dict[int, bytes]()  # keys of pinned rows
        self._passed = set[bytes]()  # keys of loans that `next` passed over

    def report(self, key: bytes, stored: bool, why: str) -> None:
        """Report a key that gets a row, or loses it, to the listener of its form."""
        changed = self.listeners.get(key[:-32])
        if changed is not None:
            changed(key[-32:], stored, why)

    def let_go(self, new: New) -> None:
        """Let rows go in their turn that got their keys, and forget that they are new."""
        if not new.keys:
            return
        marks = map(mark_in_form, new.keys, marks_of([key[-32:] for key in new.keys]))
        self.chains.add_all(new.keys, [*marks], new.follows, new.group)
        new.keys.clear()
        new.follows.clear()
        new.leading.clear()

    def pin(self, key: bytes, row: int) -> None:
        """Retain the row of a key until `unpin`; the key is used now."""
        self.use(key)
        self.pins[row] += 1
        self._names[row] = key
        self.chains.pin(key)

    def unpin(self, row: int) -> None:
        """Release a pin of a row."""
        self.pins[row] -= 1
        if not self.pins[row]:
            del self.pins[row]
            self.chains.unpin(self._names.pop(row))

    def use(self, key: bytes) -> None:
        """Count a prefetched key as used."""
        if key in self.unused:
            self.unused.remove(key)
            self.chains.move(key, USED)

    def next(self, group: Hashable | None = None) -> bytes | None:
        """Return the key that goes next, of a group or of all; None if none can go."""
        if self._passed:
            self.loans.forget_ended()
            for key in {x for x in self._passed if x not in self.loans}:
                self._passed.remove(key)
                if key in self.rows and self.rows[key] not in self.pins:
                    self.chains.unpin(key)
        following = self.chains.next(group)
        while following is not None and following in self.loans:
            self.loans.forget_ended()
            if following in self.loans:
                self._passed.add(following)
                self.chains.pin(following)
            following = self.chains.next(group)
        return following

    def choose(self, count: int, may_go: Callable[[bytes], bool]) -> list[bytes]:
        """Return the keys that go next, so many, one after the other; fewer if one may not go."""
        chosen = list[bytes]()
        try:
            while len(chosen) < count:
                key = self.next()
                if key is None or not may_go(key):
                    break
                self.chains.set_aside(key)
                chosen.append(key)
        finally:
            for key in reversed(chosen):
                self.chains.put_back(key)
        return chosen

    def evict_next(
        self, goes: Callable[[bytes], bool], group: Hashable | None, evicted: Callable[[int], bool]
    ) -> None:
        """Take the keys that go next, of a group or of all, from their rows, one after the other.

        Ends before a key for which ``goes(key)`` returns False, or that a load reads since `next`;
        and after a row for which ``evicted(row)`` returns False.
        """
        rows = self.rows
        unused = self.unused
        loans = self.loans
        more = True

        def leaves(key: bytes) -> bool:
            nonlocal more
            if not more or not goes(key):
                return False
            row = rows.pop(key)  # no load finds it from here on
            if key in loans:
                rows[key] = row
                return False
            unused.discard(key)
            more = evicted(row)
            return True

        while more:
            count = len(rows)
            if self.next(group) is None:  # passes over the keys of loans
                return
            self.chains.remove_next(leaves, group)
            if len(rows) == count:
                return

    def evict(self, keys: Sequence[bytes]) -> list[int]:
        """Take keys from their rows, in the order in which they go, and return the rows; none if a
        load reads one of them since `next`."""
        rows = [self.rows.pop(key) for key in keys]  # no load finds them from here on
        if any(key in self.loans for key in keys):
            self.rows.update(zip(keys, rows, strict=True))
            return []
        for key in keys:
            self.chains.remove(key)
            self.unused.discard(key)
        return rows


class Claim(NamedTuple):
    """The cached rows that the blocks of a call may evict.

    Attributes:
        own: positions of the call's keys, by the last 32 bytes. No block evicts an earlier one.
        apart: the forms (all bytes of a key before these) whose rows are not the call's.
        evict: False if the blocks may evict none.
    """

    own: Mapping[bytes, int] = MappingProxyType({})
    apart: Collection[bytes] = ()
    evict: bool = True

    def place_of(self, key: bytes) -> int:
        """Return the position of a cached key in the call, past all if it has none."""
        if key[:-32] in self.apart:
            return len(self.own)
        return self.own.get(key[-32:], len(self.own))


#: Of rows without a call: they may evict any.
ANY = Claim()


class Want(NamedTuple):
    """What a transfer needs rows for.

    Attributes:
        nbytes: bytes of an image, a multiple of 4,096.
        store: the transfer is a save.
        claim: the cached rows that its blocks may evict.
        place: the position of the last block in the call.
        prefetched: the transfer is a prefetch.
        passing: the rows serve the transfer alone, if staging has them: their blocks are not
            cached, or only after `SizedRows.settle` moved them.
    """

    nbytes: int
    store: bool
    claim: Claim = ANY
    place: int = BEFORE
    prefetched: bool = False
    passing: bool = False


class HostIndex:
    """The keys of the host tier of one form, by its checksum; see `changes.Listed`."""

    tier = "host"

    def __init__(self, cache: Cache, form: bytes) -> None:
        self._cache = cache
        self._form = form

    def keys(self) -> list[bytes]:
        """Return the keys that have a row."""
        past = len(self._form)
        with self._cache.chains.lock:  # a row that a load reads may leave for a moment
            names = self._cache.rows.copy()
        return [name[past:] for name in names if name[:past] == self._form]

    def announce(self, changed: Changed) -> None:
        """Report from now on each key that gets a row, or loses it."""
        self._cache.listeners[self._form] = changed
        self._cache.chains.changed = self._cache.report


def mark_in_form(key: bytes, mark: int) -> Hashable:
    """Return the mark of a block among those of all forms.

    A block without a predecessor begins a prompt: rows exist only in releases that note
    predecessors.
    """
    return FIRST if mark in (FIRST, UNKNOWN) else (key[:-32], mark)
