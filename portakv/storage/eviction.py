# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a tier stay, and which one goes next.

`Chains` lets no block go before the blocks that follow from it.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import compress, count
from operator import add
from typing import Generic, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np

from portakv.core.xxh3 import checksum, checksums
from portakv.graph import Mask
from portakv.runtime.interrupts import Condition, uninterrupted
from portakv.storage.reasons import EVICTED

# ------------------------------------------------------------------------------------------------
# Blocks that stay where they are until a caller releases them.


class Pinned(Protocol):
    """A block that stays until `release`."""

    def release(self) -> object: ...


@runtime_checkable
class Pinning(Protocol):
    """A tier store that can keep blocks, and delete them.

    A `TierStore` need not be one: that of an object store evicts nothing.
    """

    def pin(self, keys: Sequence[bytes], /) -> Sequence[Pinned | None]:
        """Return the pin of each block; None for one that is not there."""

    def delete(self, keys: Sequence[bytes], /) -> list[bool]:
        """Forget blocks; return which were there."""


class Pins:
    """Blocks that no other block evicts before `release`.

    Attributes:
        held: the blocks that stay, bool ``[keys]``.
    """

    def __init__(self, count: int) -> None:
        self.held: Mask = np.zeros(count, np.bool_)
        self._releases = list[Callable[[], object]]()

    def add(self, place: int, release: Callable[[], object]) -> None:
        """Note that the block at a place stays until ``release`` is called."""
        self.held[place] = True
        self._releases.append(release)

    def add_all(self, places: Sequence[int], pins: Sequence[Pinned | None]) -> None:
        """Add the pins of blocks at places."""
        for place, pin in zip(places, pins, strict=True):
            if pin is not None:
                self.add(place, pin.release)

    def release(self) -> None:
        """Let the blocks go in their turn, in any thread. A second call does nothing."""
        uninterrupted(self._release)

    def _release(self) -> None:
        while self._releases:
            self._releases.pop()()


#: Marks in place of a predecessor: no release noted it; the block begins a prompt.
UNKNOWN = 0
FIRST = (1 << 64) - 1

Mark = Hashable  # the name of a block in records and headers, or a value that a tier makes from it
Key = TypeVar("Key", bound=Hashable)
#: Takes a key, whether its block was stored, and why it was lost.
Changed: TypeAlias = Callable[[bytes, bool, str], object]

_KNOWN = 1 << 62  # added to the priority of a block whose predecessor is known
_START = 1 << 40  # the number of the first use in this process; blocks that were there have lower
#: The numbers of uses, which order the blocks of all tiers and forms.
_uses = count(_START)
_SPARE = 64  # entries that a queue may have above twice the number of blocks


def unheard(key: object, stored: bool, why: str) -> None:
    """Ignore a change."""


def mark_of(key: bytes) -> int:
    """Return the u64 by which records and headers name the block of a key."""
    mark = checksum(key)
    return mark if mark not in (UNKNOWN, FIRST) else 1


def marks_of(keys: Iterable[bytes]) -> list[int]:
    """Return `mark_of` each key, in one pass."""
    marks = checksums([*keys])
    if UNKNOWN in marks or FIRST in marks:
        marks = [mark if mark not in (UNKNOWN, FIRST) else 1 for mark in marks]
    return marks


class _Columns(Generic[Key]):
    """The properties of blocks, whose numbers are the places in these lists.

    An object for each block took a second at a start.
    """

    def __init__(self) -> None:
        self.keys = list[Key | None]()  # None: no block has the number
        self.marks = list[Mark]()
        self.follows = list[Mark | None]()
        self.groups = list[Hashable]()
        self.priorities = list[int]()
        self.pinned = list[bool]()
        self.queued = list[bool]()  # whether a queue has an entry, maybe with an older priority
        self.unused = list[int]()  # numbers without a block

    def extend(self, count: int) -> None:
        """Append numbers without a block."""
        first = len(self.keys)
        self.keys += [None] * count
        self.marks += [None] * count
        self.follows += [None] * count
        self.groups += [None] * count
        self.priorities += [0] * count
        self.pinned += [False] * count
        self.queued += [False] * count
        self.unused += range(first, first + count)

    def clear(self, number: int) -> None:
        """Take the block from a number."""
        self.keys[number] = None
        self.follows[number] = None
        self.pinned[number] = False
        self.queued[number] = False
        self.unused.append(number)

    def in_group(self, number: int, group: Hashable) -> bool:
        """Return whether a number has a block, of a group."""
        return self.keys[number] is not None and self.groups[number] == group


class Chains(Generic[Key]):
    """The stored blocks of a tier, in groups, with their order of use and their predecessors.

    The next block to evict is the least recently used block without a successor in the tier and
    without a pin. Blocks with an unknown predecessor go before all other blocks. The first
    predecessor that a call names for a block stays. A predecessor that would close a circle is
    ignored.

    Each change costs O(log n) on average, for chains of any length. After the removal of a block
    with successors, the next block that arrives after its successor costs the length of its chain.
    Callers hold ``lock`` around every call; several chains may share it.
    """

    def __init__(self, lock: threading.Lock | None = None) -> None:
        self.lock = lock or threading.Lock()
        self.written = Condition(self.lock)  # for tiers: notified when a write ends
        self._blocks = _Columns[Key]()
        self._by_key = dict[Key, int]()
        self._by_mark = dict[Mark, int]()
        # By mark: successors that are stored, also of a mark that is not stored.
        self._successors = dict[Mark, int]()
        self._expected = dict[Mark, int]()  # the same of successors that are being written
        # For some blocks, by number: the first block of the chain, or one on the way to it.
        self._earlier = dict[int, int]()
        # By group: (priority, number) of all blocks that may go, and of some blocks that may not.
        self._queues = dict[Hashable, list[tuple[int, int]]]()
        self._last_call: object = None  # see `_use_in_order`
        self.changed: Callable[[Key, bool, str], object] = unheard

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def mark(self, key: Key) -> Mark:
        """Return the mark of a stored block."""
        return self._blocks.marks[self._by_key[key]]

    def add(self, key: Key, mark: Mark, follows: Mark, group: Hashable) -> None:
        """Add a block as the most recently used one.

        ``follows``: the mark of its predecessor, `UNKNOWN` or `FIRST`.
        """
        self.add_all((key,), (mark,), (follows,), group)

    def add_all(
        self, keys: Sequence[Key], marks: Sequence[Mark], follows: Sequence[Mark], group: Hashable
    ) -> None:
        """Add blocks in their order, as `add` does, in one pass."""
        blocks = self._blocks
        self._last_call = None
        lacking = len(keys) - len(blocks.unused)
        if lacking > 0:
            blocks.extend(lacking)
        numbers = [blocks.unused.pop() for _ in keys]
        for number, key, mark, before in zip(numbers, keys, marks, follows, strict=True):
            self._by_key[key] = number
            self._name(number, key, mark)
            blocks.keys[number] = key
            blocks.groups[number] = group
            blocks.priorities[number] = next(_uses)
            self._follow(number, before)
        for number in numbers:  # not before: of a chain only the last block may go
            self._queue(number)
        if self.changed is not unheard:
            for key in keys:
                self.changed(key, True, "")

    def fill(
        self, keys: Sequence[Key], marks: Sequence[Mark], follows: Sequence[Mark], group: Hashable
    ) -> None:
        """Add many blocks that were there before this process, the most recently used one last.

        They go before blocks that this process has used. Costs O(n) for n blocks, in any order.
        """
        blocks = self._blocks
        first = len(blocks.keys)
        many = len(keys)
        uses = range(_START - many, _START)
        numbers = range(first, first + many)
        blocks.extend(many)
        del blocks.unused[len(blocks.unused) - many :]
        blocks.keys[first:] = keys
        blocks.groups[first:] = [group] * many
        self._by_key.update(zip(keys, numbers, strict=True))

        # Whole lists: a step for each block, as in `add`, took half a second for 250,000.
        known = [before not in (UNKNOWN, FIRST) for before in follows]
        blocks.follows[first:] = [
            x if real else None for x, real in zip(follows, known, strict=True)
        ]
        for mark, followers in Counter(compress(follows, known)).items():
            self._successors[mark] = self._successors.get(mark, 0) + followers
        ranks = [0 if before == UNKNOWN else _KNOWN for before in follows]
        blocks.priorities[first:] = map(add, uses, ranks)
        if len({*marks}) == many and self._by_mark.keys().isdisjoint(marks):
            blocks.marks[first:] = marks
            self._by_mark.update(zip(marks, numbers, strict=True))
        else:
            for number, key, mark in zip(numbers, keys, marks, strict=True):
                self._name(number, key, mark)

        self._cut_circles(numbers)
        for number, mark in zip(numbers, blocks.marks[first:], strict=True):
            if mark not in self._successors:
                self._queue(number)  # which looks at more, and takes longer

    def learn(self, key: Key, follows: Mark) -> bool:
        """Note the predecessor of a stored block that has none so far; return whether it is new."""
        blocks = self._blocks
        number = self._by_key[key]
        if blocks.follows[number] is not None:
            return False
        before = blocks.priorities[number]
        self._follow(number, follows)
        return blocks.follows[number] is not None or blocks.priorities[number] != before

    def touch(self, *keys: Key) -> None:
        """Make stored blocks the most recently used ones, the last key last."""
        self._last_call = None
        by_key = self._by_key
        priorities = self._blocks.priorities
        for key in keys:
            number = by_key[key]
            priorities[number] = next(_uses) + (priorities[number] & _KNOWN)

    def move(self, key: Key, group: Hashable) -> None:
        """Put a stored block into another group."""
        blocks = self._blocks
        number = self._by_key[key]
        if blocks.groups[number] != group:
            blocks.groups[number] = group
            blocks.queued[number] = False
            self._queue(number)

    def pin(self, key: Key) -> None:
        """Keep a stored block until `unpin`."""
        self._blocks.pinned[self._by_key[key]] = True

    def unpin(self, key: Key) -> None:
        """Let a stored block go in its turn."""
        number = self._by_key[key]
        self._blocks.pinned[number] = False
        self._queue(number)

    def set_aside(self, key: Key) -> None:
        """Count a block that may go as gone, until `put_back`: `next` returns others."""
        number = self._by_key[key]
        self._blocks.pinned[number] = True
        before = self._blocks.follows[number]
        if before is not None:
            self._drop(self._successors, before)

    def put_back(self, key: Key) -> None:
        """End a `set_aside`; the block has its place in the order as before."""
        blocks = self._blocks
        number = self._by_key[key]
        blocks.pinned[number] = False
        before = blocks.follows[number]
        if before is not None:
            self._successors[before] = self._successors.get(before, 0) + 1
        self._queue(number)

    def expect(self, follows: Mark) -> None:
        """Keep the predecessor of a block that is being written, until `unexpect`."""
        if follows not in (UNKNOWN, FIRST):
            self._expected[follows] = self._expected.get(follows, 0) + 1

    def unexpect(self, follows: Mark) -> None:
        """End an `expect`."""
        if follows not in (UNKNOWN, FIRST):
            self._drop(self._expected, follows)

    def remove(self, key: Key, why: str = EVICTED) -> None:
        """Forget a stored block, for a reason."""
        blocks = self._blocks
        number = self._by_key.pop(key)
        mark = blocks.marks[number]
        del self._by_mark[mark]
        if mark in self._successors:
            self._earlier.clear()  # the block may lie on the way of any of them
        else:
            self._earlier.pop(number, None)
        before = blocks.follows[number]
        if before is not None:
            self._drop(self._successors, before)
        blocks.clear(number)
        self.changed(key, False, why)

    def remove_next(
        self, goes: Callable[[Key], bool], group: Hashable | None = None, why: str = EVICTED
    ) -> None:
        """Forget the blocks that go next, of a group or of all, one after the other, until
        ``goes(key)`` returns False for one, which stays."""
        number = self._next(group)
        while number is not None:
            key = self._blocks.keys[number]
            assert key is not None  # a queue has an entry of it
            if not goes(key):
                return
            self.remove(key, why)
            number = self._next(group)

    def next(self, group: Hashable | None = None) -> Key | None:
        """Return the block that goes next, of a group or of all; None if none can go."""
        number = self._next(group)
        return None if number is None else self._blocks.keys[number]

    def next_for(self, key: Key, call: Mapping[Key, int], group: Hashable) -> Key | None:
        """Return the block of a group that goes next for a block of a call; None if none can go.

        ``call``: the positions of its blocks. They go after all other blocks, the last one of all
        groups first, and none goes for a later one.
        """
        victim = self.next(group)
        if victim is None or victim not in call:
            return victim
        # Writes that run together add the blocks in any order.
        self._use_in_order(call)
        victim = self.next(group)
        if victim is None or victim not in call:
            return victim
        return victim if call[victim] > call[key] and victim == self.next() else None

    def _use_in_order(self, call: Mapping[Key, int]) -> None:
        """Make the stored blocks of a call the most recently used ones, the first one last.

        Costs O(1) if no block was added or used since the same was done.
        """
        if self._last_call is not call:
            self.touch(*[key for key in reversed([*call]) if key in self._by_key])
            self._last_call = call

    def _next(self, group: Hashable | None) -> int | None:
        """Return the number of the block that goes next; None if none can go."""
        if group is not None:
            return self._top(group)
        if len(self._queues) == 1:
            return self._top(next(iter(self._queues)))
        tops = [self._top(each) for each, queue in self._queues.items() if queue]
        there = [top for top in tops if top is not None]
        if len(there) < 2:
            return there[0] if there else None
        return min(there, key=self._blocks.priorities.__getitem__)

    def age(self, group: Hashable | None = None) -> int:
        """Return the uses of all blocks, of any chains, since the last use of the block that goes
        next, of a group or of all; 0 if none can go. Blocks that the process has not used count
        from its start.
        """
        number = self._next(group)
        if number is None:
            return 0
        used = self._blocks.priorities[number] % _KNOWN
        return next(_uses) - max(used, _START - 1)

    def by_use(self, group: Hashable | None = None) -> list[Key]:
        """Return the keys of a group, or of all groups, the least recently used first.

        Blocks with an unknown predecessor come before all others.
        """
        blocks = self._blocks
        by_priority = [
            (blocks.priorities[number], key)
            for key, number in self._by_key.items()
            if group is None or blocks.groups[number] == group
        ]
        by_priority.sort()
        return [key for _, key in by_priority]

    def _name(self, number: int, key: Key, mark: Mark) -> None:
        """Give a block its mark; if another key has it by chance, a mark that nothing follows."""
        if mark in self._by_mark:
            mark = ("a mark of two keys", key)
        self._blocks.marks[number] = mark
        self._by_mark[mark] = number

    def _follow(self, number: int, follows: Mark) -> None:
        """Note the predecessor of a block that has none."""
        if follows == UNKNOWN:
            return
        blocks = self._blocks
        blocks.priorities[number] |= _KNOWN
        if follows != FIRST and not self._leads_to(follows, blocks.marks[number]):
            blocks.follows[number] = follows
            self._successors[follows] = self._successors.get(follows, 0) + 1

    def _leads_to(self, mark: Mark | None, goal: Mark) -> bool:
        """Return whether a walk from ``mark`` meets ``goal``, the mark of the first block of a
        chain.

        Writes that run together add blocks after their successors. So a walk notes for each of its
        blocks where it ended, and the next walk begins there: each step is taken once.
        """
        if mark == goal:
            return True
        number = self._by_mark.get(mark)
        if number is None or goal not in self._successors:  # no walk can come by it
            return False
        walked = list[int]()
        following = self._before(number)
        while following is not None:
            walked.append(number)
            number = following
            following = self._before(number)
        self._earlier.update(dict.fromkeys(walked, number))
        return self._blocks.marks[number] == goal

    def _before(self, number: int) -> int | None:
        """Return an earlier block of a block's chain; None for the first block."""
        earlier = self._earlier.get(number)
        return self._by_mark.get(self._blocks.follows[number]) if earlier is None else earlier

    def _drop(self, successors: dict[Mark, int], mark: Mark) -> None:
        """Take a successor from a mark; its block may go once it has none."""
        left = successors[mark] - 1
        if left:
            successors[mark] = left
            return
        del successors[mark]
        number = self._by_mark.get(mark)
        if number is not None:
            self._queue(number)

    def _is_followed(self, number: int) -> bool:
        """Return whether a block has a successor that is stored or being written."""
        mark = self._blocks.marks[number]
        return mark in self._successors or mark in self._expected

    def _cut_circles(self, new: range) -> None:
        """Open every circle through new blocks, each at the place that a walk comes to first."""
        blocks = self._blocks
        walks = [-1] * len(blocks.keys)  # the number of the walk that came by
        for start in new:
            number: int | None = start
            while number is not None and walks[number] < 0:
                walks[number] = start
                number = self._by_mark.get(blocks.follows[number])
            if number is not None and walks[number] == start:
                follows = blocks.follows[number]
                blocks.follows[number] = None
                self._drop(self._successors, follows)
                self._earlier.clear()

    def _queue(self, number: int) -> None:
        """Give a block that may go an entry in the queue of its group."""
        blocks = self._blocks
        if blocks.queued[number] or blocks.pinned[number]:
            return
        if self._is_followed(number):
            return

        group = blocks.groups[number]
        queue = self._queues.setdefault(group, [])
        if len(queue) > 2 * len(self._by_key) + _SPARE:  # most are of blocks that are gone
            live = {each for _, each in queue if blocks.in_group(each, group)}
            queue[:] = [(blocks.priorities[each], each) for each in live]
            heapify(queue)
        heappush(queue, (blocks.priorities[number], number))
        blocks.queued[number] = True

    def _top(self, group: Hashable) -> int | None:
        """Return the block of a group that goes next; drop and correct entries until it is first.

        Priorities only rise, so that no entry comes too late.
        """
        blocks = self._blocks
        queue = self._queues.get(group, [])
        while queue:
            priority, number = queue[0]
            if not blocks.in_group(number, group):
                heappop(queue)
            elif blocks.pinned[number] or self._is_followed(number):
                heappop(queue)
                blocks.queued[number] = False
            elif blocks.priorities[number] != priority:
                heapreplace(queue, (blocks.priorities[number], number))
            else:
                return number
        return None


# ------------------------------------------------------------------------------------------------
# `Occupancy` records which slots of a folder are free, pinned, or being written.

#: Seconds in which a write of several ends, or blocks wait for none of them any more.
PATIENCE = 2.0


class Write(NamedTuple):
    """A block that is being written, and the mark that it follows."""

    key: bytes
    follows: int


NO_WRITE = Write(b"", UNKNOWN)


class Occupancy:
    """The slots that are free, pinned, or being written, and the number of losses.

    Attributes:
        free: slots without a block.
        pins: the number of pins of each pinned slot.
        writes: the blocks that are being written, by slot.
        late: slots of writes for which no block waits any more.
        written: notified when a write ends in any folder of the form.
        broken: the number of faulty slots, which are not used again.
        evicted: the number of evicted blocks.
    """

    def __init__(self, written: threading.Condition) -> None:
        self.free = deque[int]()
        self.pins: Counter[int] = Counter()
        self.writes = dict[int, Write]()
        self.late = set[int]()
        self.written = written
        self.broken = 0
        self.evicted = 0

    def past_free(self, count: int) -> int:
        """Return the number of the slot after the last slot, of ``count``, that is not free."""
        free = {*self.free}
        past = count
        while past - 1 in free:
            past -= 1
        return past

    def writes_after(self, key: bytes, call: Mapping[bytes, int], others: bool) -> bool:
        """Return True if blocks are being written, and are not late, that come after a block in its
        call; with ``others``, also if these belong to other calls."""
        past = len(call)
        place = call.get(key, past)
        other = past if others else -1
        writes = self.writes.items()
        return any(call.get(x.key, other) > place for slot, x in writes if slot not in self.late)

    def wait(self, folders: Sequence[Occupancy]) -> None:
        """Wait for the end of a write, under the lock. If none ends in time, all writes of the
        folders are late: else each of the next blocks would wait as long."""
        if not self.written.wait(PATIENCE):
            for each in folders:
                each.late.update(each.writes)
