# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a tier stay, and which one goes next.

`Chains` lets no block go before the blocks that follow from it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count, repeat
from operator import attrgetter
from typing import Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np

from portakv.core.xxh3 import checksum, checksums
from portakv.runtime.interrupts import Condition, uninterrupted
from portakv.storage.reasons import EVICTED
from portakv.storage.work import Mask

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
        here: those of them that stay in the host tier.
    """

    def __init__(self, count: int) -> None:
        self.held: Mask = np.zeros(count, np.bool_)
        self.here: Mask = np.zeros(count, np.bool_)
        self._releases = list[Callable[[], object]]()

    def add(self, places: Sequence[int], release: Callable[[], object]) -> None:
        """Note that the blocks at places stay until ``release`` is called."""
        self.held[places] = True
        self._releases.append(release)

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


class _Block(Generic[Key]):
    """A stored block.

    Attributes:
        follows: the mark of its predecessor; None for a block without one, or of an unknown one.
        group: its group; None after its removal.
        priority: orders the blocks; the lowest goes first.
        queued: whether a queue has an entry, maybe with an older priority.
    """

    __slots__ = ("follows", "group", "key", "mark", "pinned", "priority", "queued")

    def __init__(self, key: Key, mark: Mark, group: Hashable, priority: int) -> None:
        self.key = key
        self.mark = mark
        self.follows: Mark | None = None
        self.group = group
        self.priority = priority
        self.pinned = False
        self.queued = False

    def __lt__(self, other: object) -> bool:
        return False  # entries of one block in a queue are equal


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
        self.renew(lock)
        self._blocks = dict[Key, _Block[Key]]()
        self._by_mark = dict[Mark | None, _Block[Key]]()
        # By mark: successors that are stored or being written, also of a mark that is not stored.
        self._successors = dict[Mark, int]()
        # For some blocks: the first block of the chain, or one on the way to it.
        self._earlier = dict[_Block[Key], _Block[Key]]()
        # By group: (priority, block) of all blocks that may go, and of some blocks that may not.
        self._queues = dict[Hashable, list[tuple[int, _Block[Key]]]]()
        self._last_call: object = None  # see `_use_in_order`
        self.changed: Callable[[Key, bool, str], object] = unheard

    def renew(self, lock: threading.Lock | None = None) -> None:
        """Begin with this lock, or with a new one in a forked process, which lacks the thread that
        may have it."""
        self.lock = lock or threading.Lock()
        self.written = Condition(self.lock)  # for tiers: notified when a write ends

    def __contains__(self, key: object) -> bool:
        return key in self._blocks

    def add(self, key: Key, mark: Mark, follows: Mark, group: Hashable) -> None:
        """Add a block as the most recently used one.

        ``follows``: the mark of its predecessor, `UNKNOWN` or `FIRST`.
        """
        self._last_call = None
        block = _Block(key, mark, group, next(_uses))
        self._blocks[key] = block
        self._name(block)
        self._follow(block, follows)
        self._queue(block)
        self.changed(key, True, "")

    def fill(
        self, keys: Sequence[Key], marks: Sequence[Mark], follows: Sequence[Mark], group: Hashable
    ) -> None:
        """Add many blocks that were there before this process, the most recently used one last.

        They go before blocks that this process has used. Costs O(n) for n blocks, in any order.
        """
        uses = range(_START - len(keys), _START)
        new = [*map(_Block, keys, marks, repeat(group), uses)]
        self._blocks.update(zip(keys, new, strict=True))
        successors = self._successors
        for block, before in zip(new, follows, strict=True):
            self._name(block)
            if before != UNKNOWN:
                block.priority += _KNOWN
            if before not in (UNKNOWN, FIRST):
                block.follows = before
                successors[before] = successors.get(before, 0) + 1
        self._cut_circles(new)
        for block in new:
            if block.mark not in successors:
                self._queue(block)  # which looks at more, and takes longer

    def learn(self, key: Key, follows: Mark) -> bool:
        """Note the predecessor of a stored block that has none so far; return whether it is new."""
        block = self._blocks[key]
        if block.follows is not None:
            return False
        before = block.priority
        self._follow(block, follows)
        return block.follows is not None or block.priority != before

    def touch(self, *keys: Key) -> None:
        """Make stored blocks the most recently used ones, the last key last."""
        self._last_call = None
        for key in keys:
            block = self._blocks[key]
            block.priority = next(_uses) + (block.priority & _KNOWN)

    def move(self, key: Key, group: Hashable) -> None:
        """Put a stored block into another group."""
        block = self._blocks[key]
        if block.group != group:
            block.group = group
            block.queued = False
            self._queue(block)

    def pin(self, key: Key) -> None:
        """Keep a stored block until `unpin`."""
        self._blocks[key].pinned = True

    def unpin(self, key: Key) -> None:
        """Let a stored block go in its turn."""
        block = self._blocks[key]
        block.pinned = False
        self._queue(block)

    def set_aside(self, key: Key) -> None:
        """Count a block that may go as gone, until `put_back`: `next` returns others."""
        block = self._blocks[key]
        self.expect(block.mark)  # so it may not go
        if block.follows is not None:
            self.unexpect(block.follows)

    def put_back(self, key: Key) -> None:
        """End a `set_aside`; the block has its place in the order as before."""
        block = self._blocks[key]
        if block.follows is not None:
            self.expect(block.follows)
        self.unexpect(block.mark)

    def expect(self, follows: Mark) -> None:
        """Keep the predecessor of a block that is being written, until `unexpect`."""
        if follows not in (UNKNOWN, FIRST):
            self._successors[follows] = self._successors.get(follows, 0) + 1

    def unexpect(self, follows: Mark) -> None:
        """End an `expect`. The predecessor may go once it has no successor."""
        if follows in (UNKNOWN, FIRST):
            return
        left = self._successors[follows] - 1
        if left:
            self._successors[follows] = left
            return
        del self._successors[follows]
        block = self._by_mark.get(follows)
        if block is not None:
            self._queue(block)

    def remove(self, key: Key, why: str = EVICTED) -> None:
        """Forget a stored block, for a reason."""
        block = self._blocks.pop(key)
        del self._by_mark[block.mark]
        if block.mark in self._successors:
            self._earlier.clear()  # the block may lie on the way of any of them
        else:
            self._earlier.pop(block, None)
        if block.follows is not None:
            self.unexpect(block.follows)
        block.group = None
        self.changed(key, False, why)

    def leading(self, mark: Mark) -> Iterator[Key]:
        """Yield the stored block of a mark, its predecessor, and so on up to the first block."""
        block = self._by_mark.get(mark)
        while block is not None:
            yield block.key
            block = self._by_mark.get(block.follows)

    def with_successors(self, keys: Iterable[Key]) -> list[Key]:
        """Return stored blocks and all of their successors, each before its predecessor."""
        following = dict[Mark, list[Key]]()
        for block in self._blocks.values():
            following.setdefault(block.follows, []).append(block.key)
        pending = [*keys]
        found = set[Key]()
        in_order = dict[Key, None]()
        while pending:
            key = pending.pop()
            if key in found:  # all of its successors are in order
                in_order[key] = None
                continue
            found.add(key)
            after = following.get(self._blocks[key].mark, ())
            pending += [key, *(x for x in after if x not in found)]
        return [*in_order]

    def next(self, group: Hashable | None = None) -> Key | None:
        """Return the block that goes next, of a group or of all; None if none can go."""
        block = self._next(group)
        return None if block is None else block.key

    def next_for(self, key: Key, call: Mapping[Key, int], group: Hashable) -> Key | None:
        """Return the block of a group that goes next for a block of a call; None if none can go.

        ``call``: the positions of its blocks. They go after all other blocks, the last one of all
        groups first, and none goes for a later one.
        """
        victim = self.next(group)
        if victim in call:  # writes that run together add the blocks in any order
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
            self.touch(*[key for key in reversed([*call]) if key in self._blocks])
            self._last_call = call

    def _next(self, group: Hashable | None) -> _Block[Key] | None:
        """Return the block that goes next; None if none can go."""
        if group is not None:
            return self._top(group)
        if len(self._queues) == 1:
            return self._top(next(iter(self._queues)))
        tops = [self._top(each) for each, queue in self._queues.items() if queue]
        there = [top for top in tops if top is not None]
        return min(there, key=attrgetter("priority"), default=None)

    def age(self, group: Hashable | None = None) -> int:
        """Return the uses of all blocks, of any chains, since the last use of the block that goes
        next, of a group or of all; 0 if none can go. Blocks that the process has not used count
        from its start.
        """
        block = self._next(group)
        if block is None:
            return 0
        used = block.priority % _KNOWN
        return next(_uses) - max(used, _START - 1)

    def by_use(self, group: Hashable | None = None) -> list[Key]:
        """Return the keys of a group, or of all groups, the least recently used first.

        Blocks with an unknown predecessor come before all others.
        """
        blocks = [x for x in self._blocks.values() if group is None or x.group == group]
        blocks.sort(key=attrgetter("priority"))
        return [block.key for block in blocks]

    def _name(self, block: _Block[Key]) -> None:
        """Enter the mark of a block; if another key has it by chance, a mark that nothing
        follows."""
        if block.mark in self._by_mark:
            block.mark = ("a mark of two keys", block.key)
        self._by_mark[block.mark] = block

    def _follow(self, block: _Block[Key], follows: Mark) -> None:
        """Note the predecessor of a block that has none."""
        if follows == UNKNOWN:
            return
        block.priority |= _KNOWN
        if follows != FIRST and not self._leads_to(follows, block.mark):
            block.follows = follows
            self.expect(follows)

    def _leads_to(self, mark: Mark, goal: Mark) -> bool:
        """Return whether a walk from ``mark`` meets ``goal``, the mark of the first block of a
        chain.

        Writes that run together add blocks after their successors. So a walk notes for each of its
        blocks where it ended, and the next walk begins there: each step is taken once.
        """
        if mark == goal:
            return True
        block = self._by_mark.get(mark)
        if block is None or goal not in self._successors:  # no walk can come by it
            return False
        walked = list[_Block[Key]]()
        following = self._before(block)
        while following is not None:
            walked.append(block)
            block = following
            following = self._before(block)
        self._earlier.update(dict.fromkeys(walked, block))
        return block.mark == goal

    def _before(self, block: _Block[Key]) -> _Block[Key] | None:
        """Return an earlier block of a block's chain; None for the first block."""
        return self._earlier.get(block) or self._by_mark.get(block.follows)

    def _cut_circles(self, new: Sequence[_Block[Key]]) -> None:
        """Open every circle through new blocks, each at the place that a walk comes to first."""
        walks = dict[_Block[Key], _Block[Key]]()  # the start of the walk that came by
        for start in new:
            block: _Block[Key] | None = start
            while block is not None and block not in walks:
                walks[block] = start
                block = self._by_mark.get(block.follows)
            if block is not None and walks[block] is start:
                follows = block.follows
                block.follows = None
                self.unexpect(follows)
                self._earlier.clear()

    def _queue(self, block: _Block[Key]) -> None:
        """Give a block that may go an entry in the queue of its group."""
        if block.queued or block.pinned or block.mark in self._successors:
            return
        group = block.group
        queue = self._queues.setdefault(group, [])
        if len(queue) > 2 * len(self._blocks) + _SPARE:  # most are of blocks that are gone
            live = dict.fromkeys(each for _, each in queue if each.group == group)
            queue[:] = [(each.priority, each) for each in live]
            heapify(queue)
        heappush(queue, (block.priority, block))
        block.queued = True

    def _top(self, group: Hashable) -> _Block[Key] | None:
        """Return the block of a group that goes next; drop and correct entries until it is first.

        Priorities only rise, so that no entry comes too late.
        """
        queue = self._queues.get(group, [])
        while queue:
            priority, block = queue[0]
            if block.group != group:
                heappop(queue)
            elif block.pinned or block.mark in self._successors:
                heappop(queue)
                block.queued = False
            elif block.priority != priority:
                heapreplace(queue, (block.priority, block))
            else:
                return block
        return None
