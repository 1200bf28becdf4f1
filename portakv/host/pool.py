# SPDX-License-Identifier: Apache-2.0
"""A pool of pinned blocks for the threads of a process, in runs of free units."""

from __future__ import annotations

import os
import threading
import time
import traceback
import warnings
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from portakv.arguments import flag, kind_of, seconds
from portakv.errors import HostMemoryError, PoolExhausted
from portakv.host import _registration, pinned
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import Condition

__all__ = ["Block", "Leak", "PinnedPool", "PoolExhausted"]

_ASK_AGAIN = 0.0005  # seconds between two queries of work that does not notify
GROW_AGAIN = 0.1  # seconds until a waiting caller requests memory again


@dataclass(eq=False)
class Block:
    """A block that a caller acquired. A context manager that releases it."""

    pool: PinnedPool  # its pool
    index: int  # its number in the pool; of a larger block the first number
    nbytes: int
    _tensor: torch.Tensor | None = field(repr=False)

    @property
    def tensor(self) -> torch.Tensor:
        """Return its bytes, uint8 ``[nbytes]``. Raises `HostMemoryError` after it was released."""
        if self._tensor is None:
            raise HostMemoryError(
                f"Expected a block in use, got block {self.index} after its release: another "
                "caller may have it. Release it after its last read or write."
            )
        return self._tensor

    @property
    def address(self) -> int:
        """Return the address of its first byte."""
        return self.tensor.data_ptr()

    @property
    def in_use(self) -> bool:
        """Return False after it was released."""
        return self._tensor is not None

    def release(self, after: object = None) -> None:
        """Release the block; see `PinnedPool.release`."""
        self.pool.release(self, after)

    def drop(self) -> None:
        """Drop the bytes; the pool calls it when it takes the block back."""
        self._tensor = None

    def __enter__(self) -> Block:
        return self

    def __exit__(self, *_: object) -> None:
        if self.in_use:
            self.release()


@dataclass(frozen=True)
class Leak:
    """A block that is in use."""

    index: int
    owner: str  # the name that was passed to `acquire`
    thread: str  # the name of the thread that acquired it
    seconds: float  # how long it has been in use
    dropped: bool  # the `Block` was garbage collected and cannot be released
    stack: str  # where it was acquired, in a pool made with ``stacks=True``
    nbytes: int = 0

    def __str__(self) -> str:
        how = ", dropped without release" if self.dropped else ""
        who = f"{self.owner or 'an unnamed owner'} in thread {self.thread}"
        where = f"\n{self.stack}" if self.stack else ""
        size = f"{self.nbytes} bytes"
        return f"block {self.index}: {who}, for {self.seconds:.1f} s, {size}{how}{where}"


class _Caller:
    """A caller of `Pool.acquire`, and its place among those that wait."""

    __slots__ = ("__weakref__", "grow_at", "refused")

    def __init__(self) -> None:
        self.grow_at = 0.0  # when it requests memory again
        self.refused: HostMemoryError | None = None  # why it got none


class _Use(NamedTuple):
    """The use of a block: who acquired it, when, its size and how many units it takes."""

    owner: str
    thread: str
    since: float
    stack: str
    nbytes: int
    units: int


class PinnedPool:
    """Blocks in pinned memory, of one size or of any. A context manager; `close` may be called
    again.

    Args:
        block_bytes: the exact bytes of a block. For blocks of any size (``acquire(nbytes=)``) it is
            the unit in which they take memory: a page, for example.
        blocks: the number of blocks at the start.
        limit: the most blocks; the pool grows when none is free. None: ``blocks``.
        grow: the blocks of each growth, or only the missing ones if there is no memory for more;
            None: ``blocks``.
        alignment: in bytes, of each block: 1, 2, 4 ... up to a page.
        stacks: record where each block was acquired, for `leaks`; some 50 us each.
        options: of `pinned.allocate`, except ``unit``.

    Raises:
        HostMemoryError: numbers that make no pool, an unknown option; or as `pinned.allocate`.

    Attributes:
        blocks: the present number of blocks, free or in use.
        high_water: the most blocks in use at a time; a larger block counts as all that it takes.
        pinned: False if some of it is pageable after all.
    """

    def __init__(
        self,
        block_bytes: int,
        blocks: int,
        *,
        limit: int | None = None,
        grow: int | None = None,
        alignment: int = 64,
        stacks: bool = False,
        **options: Any,
    ) -> None:
        self._process = this_process()
        self._pid = os.getpid()
        self._closed = False
        self._changed = Condition()
        self._pause = GROW_AGAIN  # seconds between two looks at changes that do not notify
        self._handles: WeakValueDictionary[int, Block] = WeakValueDictionary()
        # The callers that wait, in their order, by `id`; interrupted callers vanish by themselves.
        self._waiting: WeakValueDictionary[int, _Caller] = WeakValueDictionary()
        numbers = block_bytes, blocks, alignment
        whole = all(type(number) is int and number > 0 for number in numbers)
        if not whole or alignment not in [1 << bit for bit in range(13)]:
            raise HostMemoryError(
                f"Expected one or more blocks of one or more bytes, aligned to a power of two up "
                f"to 4096, got {blocks!r} blocks of {block_bytes!r} bytes, aligned to "
                f"{alignment!r}. Pass such numbers."
            )
        self.block_bytes = block_bytes
        self._stride = -(-block_bytes // alignment) * alignment  # from one block to the next
        flag("stacks", stacks)
        most, each = (blocks if number is None else number for number in (limit, grow))
        self.limit = _registration.whole("limit", most, blocks, "it begins with so many blocks")
        grow = _registration.whole("grow", each, 1)
        known = {"huge_pages", "numa", "threads", *vars(_registration.Options())} - {"unit"}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise HostMemoryError(
                f"Expected options of a pool among {', '.join(sorted(known))}, got "
                f"{', '.join(unknown)}. Leave them out."
            )
        self.pinned = True
        self._grow = grow
        self._stacks = stacks
        self._options = options
        self.blocks = 0
        self.high_water = 0
        # Of each piece of memory the number of the first block, that past the last one, all bytes.
        self._segments: list[tuple[int, int, torch.Tensor]] = []
        self._units = Extents()  # those that are free
        self._changing = False  # during a change, and after one that an interrupt stopped
        self._out: dict[int, _Use] = {}  # blocks in use
        # Blocks that were released after work that has not ended: their units, and the function
        # that reports its end.
        self._in_use: dict[int, tuple[int, Callable[[], bool]]] = {}
        self._add(blocks)

    @property
    def free(self) -> int:
        """Return how many blocks of `block_bytes` can be acquired immediately, without growing."""
        self._refuse()
        with self._changed:
            return self._find().free

    @property
    def bytes_free(self) -> int:
        """Return the free bytes, which need not lie together. Bytes that align blocks count."""
        return self.free * self._stride

    @property
    def bytes_used(self) -> int:
        """Return the bytes of blocks in use, and of blocks whose release waits for work.

        `bytes_used` and `bytes_free` are all bytes of the present blocks.
        """
        self._refuse()
        with self._changed:
            return (self.blocks - self._find().free) * self._stride

    @property
    def waiting(self) -> int:
        """Return how many callers of this process wait for blocks."""
        self._refuse()
        with self._changed:
            return len(self._waiting)

    def acquire(
        self,
        owner: str = "",
        *,
        nbytes: int | None = None,
        wait: bool = False,
        timeout: float | None = None,
    ) -> Block:
        """Return a block with arbitrary contents.

        The callers of a process that wait get blocks in their order, so that small blocks never
        delay a large one forever. A caller that has a block and waits for another one may wait for
        a caller that waits for the first: acquire both together by `acquire_many`.

        Args:
            owner: its purpose, shown by `leaks`.
            nbytes: its exact size; None: ``block_bytes``. A larger block takes as many neighbouring
                blocks as it needs, a smaller block takes one.
            wait: wait for a block if none is free, at most ``timeout`` seconds; None: without end.

        Raises:
            PoolExhausted: no block was free, and the pool is at its limit or, as the cause says,
                had no memory to grow; names the owners of the blocks. Or the pool can never have
                such a block.
            HostMemoryError: the pool is closed, or this process was forked from its maker; or a
                wrong size.
        """
        return self._acquire(1, owner, nbytes, wait, timeout)[0]

    def acquire_many(
        self,
        count: int,
        owner: str = "",
        *,
        nbytes: int | None = None,
        wait: bool = False,
        timeout: float | None = None,
    ) -> list[Block]:
        """Return several blocks of one size, all or none, so that two callers cannot each wait for
        the other's half.

        Otherwise as `acquire`; also raises `HostMemoryError` for a count that is negative or not a
        whole number.
        """
        return self._acquire(_registration.whole("count", count), owner, nbytes, wait, timeout)

    def _acquire(
        self, count: int, owner: str, nbytes: int | None, wait: bool, timeout: float | None
    ) -> list[Block]:
        size = self.block_bytes if nbytes is None else _registration.whole("nbytes", nbytes, 1)
        flag("wait", wait)
        limit = seconds("timeout", timeout, optional=True)
        within = "" if timeout is None or not wait else f" within {limit:g} s"
        self._refuse()  # before the lock, which a forked child may never get
        until = time.monotonic() + limit if wait else 0.0
        caller = _Caller()
        with self._changed:
            try:
                while True:
                    self._refuse()
                    self._check_possible(count, size)  # each time, as growth is in pieces
                    if not wait or self._is_first(caller):
                        grow = time.monotonic() >= caller.grow_at
                        blocks = self._take(count, size, owner, grow)
                        if isinstance(blocks, list):
                            return blocks
                        if grow:
                            caller.refused = blocks
                            caller.grow_at = time.monotonic() + GROW_AGAIN
                    now = time.monotonic()
                    if now >= until:
                        raise self._exhausted(caller, count, size, within) from caller.refused
                    self._waiting[id(caller)] = caller
                    self._changed.wait(min(until - now, self._pause))
            finally:
                if self._waiting.pop(id(caller), None) is not None:
                    self._changed.notify_all()

    def close(self) -> None:
        """Release the memory; tensors of blocks in use still retain their memory.

        Warns of these blocks (`ResourceWarning`), and names their owners.
        """
        if self._process.forked:
            return
        left = list[Leak]()
        with self._changed:
            if not self._closed:
                self._segments.clear()
                self._units = Extents()
                self._changing = False
                left = self.leaks()
            self._closed = True
            self._changed.notify_all()
        if left:
            text = "Blocks were in use when the pool was closed"
            warnings.warn(_listed(text, left), ResourceWarning, stacklevel=2)

    def __enter__(self) -> PinnedPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_possible(self, count: int, size: int) -> None:
        """Raise `PoolExhausted` for blocks that the pool cannot have even if all are free."""
        if count <= 1 and size == self.block_bytes:
            return
        most = self._most(size)
        if count and not most:
            later = min(self.limit - self.blocks, self._most_together())
            largest = self._bytes_together(max(*self._segment_blocks(), later))
            raise PoolExhausted(
                f"Expected blocks of at most {largest} bytes in the pool, which has "
                f"at most {self.limit * self._stride} bytes ({self.bytes_free} free now, "
                f"{self.largest_free} of them together), got a request for {size}. Request smaller "
                f"blocks, or make a pool of more or larger blocks."
            )
        if count > most:
            raise PoolExhausted(
                f"Expected at most {most} blocks of {size} bytes in the pool, got a request "
                f"for {count}. Request fewer or smaller blocks, or make it with a higher limit."
            )

    def _is_first(self, caller: _Caller) -> bool:
        """Return True if no other caller has waited for longer."""
        return not self._waiting or next(self._waiting.values(), caller) is caller

    def _exhausted(self, caller: _Caller, count: int, size: int, within: str) -> PoolExhausted:
        do = "make the pool larger"
        if not self._is_first(caller):
            within += ", while others have waited for longer"
        if caller.refused is not None:
            within += f", as it has {self.blocks} and there was no memory for more"
            do = "free some of the machine's memory"
        has = f"{self.free} of {self.limit}"
        if size != self.block_bytes:
            most = self.limit * self._stride
            has = f"{self.bytes_free} of {most} bytes, {self.largest_free} of them together"
        sentence = (
            f"Expected {count} free blocks of {size} bytes in the pool, got {has}{within}. "
            f"Release some, wait longer, or {do}"
        )
        return PoolExhausted(_listed(sentence, self.leaks()))

    def _refuse(self, closed: bool = True) -> None:
        """Raise `HostMemoryError` in a forked child and, if ``closed``, in a closed pool."""
        if self._process.forked:
            raise HostMemoryError(
                f"Expected the pool to be used by process {self._pid}, which opened it, got "
                f"process {os.getpid()}, forked from it, where its memory is not pinned. In the "
                f"child make one there."
            )
        if closed and self._closed:
            raise HostMemoryError(
                "Expected an open pool, got the pool after it was closed. Open another one."
            )

    def _check(self, block: Block) -> None:
        """Raise `HostMemoryError` unless this is a block of this pool in use."""
        if not isinstance(block, Block):
            why = f"{kind_of(block)}; release a Block that it handed out"
        elif block.pool is not self:
            why = f"block {block.index} of another pool; release it to the pool that it came from"
        elif not block.in_use:
            why = f"block {block.index}, released twice and maybe another caller's; do it once"
        else:
            return
        raise HostMemoryError(f"Expected a block in use of the pool, got {why}: block.release().")

    def release(self, block: Block, after: object = None) -> None:
        """Release a block. It is handed out again after ``after`` has ended.

        ``after``: a `Transfer`, an event, or another object with ``done()`` or ``query()``, which
        reports its errors itself.

        Raises:
            HostMemoryError: released before, another pool's, not a block, or in a forked process.
        """
        self._refuse(closed=False)
        with self._changed:
            self._check(block)
            work: Callable[[], Any] | None = None
            if after is not None:
                # The method that reports its end.
                methods = (getattr(after, name, None) for name in ("query", "done"))
                work = next(filter(callable, methods), None)
                if work is None or isinstance(after, type):
                    raise HostMemoryError(
                        f"Expected work that reports its end, got {kind_of(after)}. Pass a "
                        "transfer, an event, or an object with query() or done()."
                    )
            free = self._intact_units()
            index = block.index
            units = self._out[index].units
            # In this order, so that an interrupt loses no block: see `_intact_units`.
            self._changing = True
            if work is not None:
                self._in_use[index] = units, work
            block.drop()
            del self._out[index]
            if work is None:
                free.give(index, units)
            self._changing = False
            self._changed.notify_all()

    @property
    def largest_free(self) -> int:
        """Return the bytes of the largest block that can be acquired immediately, without growing;
        0 if none can."""
        self._refuse()
        with self._changed:
            longest = self._find().longest()
        return self._bytes_together(longest) if longest else 0

    def leaks(self) -> list[Leak]:
        """Return every block in use and its owner, the oldest first."""
        now = time.monotonic()
        with self._changed:
            self._intact_units()
            leaks = []
            for index, use in self._out.items():
                dropped = index not in self._handles
                age = now - use.since
                leak = Leak(index, use.owner, use.thread, age, dropped, use.stack, use.nbytes)
                leaks.append(leak)
            return leaks

    def _units_of(self, nbytes: int) -> int:
        """Return how many neighbouring blocks a block of so many bytes takes."""
        more = nbytes - self.block_bytes
        return 1 if more <= 0 else 1 - -more // self._stride

    def _segment_blocks(self) -> list[int]:
        """Return the number of blocks of each segment."""
        return [past - first for first, past, _ in self._segments]

    def _bytes_together(self, blocks: int) -> int:
        """Return the bytes of a block that takes so many neighbouring ones, one or more."""
        return (blocks - 1) * self._stride + self.block_bytes

    def _most(self, nbytes: int) -> int:
        units = self._units_of(nbytes)
        if units == 1:
            return self.limit
        present = sum(blocks // units for blocks in self._segment_blocks())
        later = 0
        if units <= self._most_together():
            later = (self.limit - self.blocks) // units
        return present + later

    def _take(
        self, count: int, nbytes: int, owner: str, grow: bool
    ) -> list[Block] | HostMemoryError | None:
        """Return blocks, with ``grow`` perhaps of new memory; None if there are not enough now, or
        why there was no memory for more."""
        units = self._units_of(nbytes)
        free = self._find()
        missing = (count - free.count(units)) * units
        if missing > 0:
            if not grow or missing > self.limit - self.blocks:
                return None
            refused = self._grown(missing, units)
            if refused is not None:
                return refused
            if free.count(units) < count:
                return None  # the new memory is in several pieces

        stack = "".join(traceback.format_stack()[:-2]) if self._stacks else ""
        use = _Use(owner, threading.current_thread().name, time.monotonic(), stack, nbytes, units)
        blocks = []
        self._changing = True
        for index in free.take(units, count):
            block = Block(self, index, nbytes, self._bytes_of(index, nbytes))
            self._handles[index] = block
            blocks.append(block)
        self._out.update({block.index: use for block in blocks})
        self._changing = False
        self.high_water = max(self.high_water, self.blocks - free.free)
        return blocks

    def _bytes_of(self, index: int, nbytes: int) -> torch.Tensor:
        """Return the bytes from a unit on."""
        place = -1
        while self._segments[place][0] > index:
            place -= 1
        first, _, data = self._segments[place]
        start = (index - first) * self._stride
        return data[start : start + nbytes]

    def _add(self, blocks: int, units: int = 1) -> None:
        """Add blocks, in pieces that waste nothing for larger blocks of so many units."""
        most = self._most_together() // units * units
        for done in range(0, blocks, most):
            count = min(blocks - done, most)
            nbytes = self._bytes_together(count)
            memory = pinned.allocate(nbytes, unit=self._stride, **self._options)
            self.pinned &= memory.pinned
            first = self.blocks
            self._changing = True
            self._segments.append((first, first + count, memory.tensor))
            self.blocks += count
            self._units.add(first, first + count)
            self._changing = False

    def _most_together(self) -> int:
        """Return the most blocks of one registration, which cuts no block."""
        largest = self._options.get("largest", _registration.LARGEST)
        nbytes = _registration.whole(
            "largest", largest, _registration.PAGE, "ask for pieces of whole pages"
        )
        return max(1, min(nbytes, _registration.LARGEST) // self._stride)

    def _grown(self, missing: int, units: int) -> HostMemoryError | None:
        """Grow by `grow` blocks, or else by the missing ones, for larger blocks of so many units;
        return why even these fail."""
        refused = None
        most = min(max(self._grow, missing), self.limit - self.blocks)
        for count in dict.fromkeys((most, missing)):
            try:
                self._add(min(count, self.limit - self.blocks), units)
                return None
            except HostMemoryError as error:
                # Its frames retain the memory that is needed.
                traceback.clear_frames(error.__traceback__)
                refused = error
        return refused

    def _find(self) -> Extents:
        """Return the free blocks; add those whose release waited for work that has ended."""
        free = self._intact_units()
        for index, (units, ask) in list(self._in_use.items()):
            ended = True  # failed work also moves no more bytes; its own handle reports the error
            with suppress(Exception):  # the caller's own work may raise anything
                ended = bool(ask())
            if ended:
                self._changing = True
                del self._in_use[index]
                free.give(index, units)
                self._changing = False
        self._pause = _ASK_AGAIN if self._in_use else GROW_AGAIN
        return free

    def _intact_units(self) -> Extents:
        """Return the free blocks; if an interrupt stopped a change, as the blocks in use show."""
        if self._changing:
            for index, block in self._handles.items():
                if block.in_use:  # its release had not come so far
                    self._in_use.pop(index, None)
                else:
                    self._out.pop(index, None)
            used = [(index, use.units) for index, use in self._out.items()]
            used += [(index, units) for index, (units, _) in self._in_use.items()]
            free = Extents((first, past) for first, past, _ in self._segments)
            for run in used:
                free.take_at(*run)
            self._units = free
            self.blocks = self._segments[-1][1]
            self._changing = False
        return self._units


def _listed(sentence: str, out: Sequence[object]) -> str:
    """Return a sentence, and a line for each block or process; of many, the first lines."""
    if not out:
        return f"{sentence}."
    more = [f"  and {len(out) - 8} more"] if len(out) > 8 else []
    return "\n".join([f"{sentence}. In use:", *(f"  {one}" for one in out[:8]), *more])


# ------------------------------------------------------------------------------------------------
# Free units of memory, such as pages, in runs of any length.


class Extents:
    """The free units of some memory, from which runs of units are taken and to which they return.

    A run is taken from the shortest extent that has room for it, so that runs of one size fill the
    holes that they leave. Callers hold a lock.

    Runs that lie next to each other are often evicted one after the other: a chain from its end, or
    single blocks as they came. So a run takes the end of its extent that is farther from the run
    that goes next, and what is left of the extent grows by that one.

    Args:
        pieces: as for `add`.

    Attributes:
        free: the number of free units.
    """

    def __init__(self, pieces: Iterable[tuple[int, int]] = ()) -> None:
        self.free = 0
        self._ends = dict[int, int]()  # the unit past each extent, by its first unit
        self._starts = dict[int, int]()  # the first unit of each extent, by the unit past it
        self._sizes = dict[int, dict[int, None]]()  # the first units of the extents of each length
        self._lengths = list[int]()  # the lengths that extents have, in order
        self._cuts = set[int]()  # the ends of pieces
        self._evicted = range(0)  # the last units that were evicted
        self._descends = False  # the last evicted units lie before those evicted before them
        for first, past in pieces:
            self.add(first, past)

    def add(self, first: int, past: int) -> None:
        """Add a piece of memory, from its first unit to the unit past it. No run crosses its
        end."""
        self._cuts.add(past)
        if first < past:
            self._add(first, past)
            self.free += past - first

    def longest(self) -> int:
        """Return the units of the longest run."""
        return self._lengths[-1] if self._lengths else 0

    def count(self, length: int) -> int:
        """Return how many runs of a length can be taken."""
        return sum(each // length * len(alike) for each, alike in self._sizes.items())

    def take(self, count: int, most: int) -> list[int]:
        """Return the first units of at most ``most`` runs of so many units; fewer if no extent has
        room for more.

        What is left of the shortest extent with room is the shortest one again. So all runs of an
        extent are taken together.
        """
        runs = list[int]()
        while len(runs) < most:
            at = bisect_left(self._lengths, count)
            if at == len(self._lengths):
                break
            length = self._lengths[at]
            first = next(iter(self._sizes[length]))
            past = first + length
            units = count * min(length // count, most - len(runs))
            self._remove(first, past)
            if self._descends:
                runs += range(past - count, past - units - 1, -count)
                past -= units
            else:
                runs += range(first, first + units, count)
                first += units
            if first < past:
                self._add(first, past)
            self.free -= units
        return runs

    def take_at(self, first: int, count: int) -> None:
        """Take free units from a certain one on."""
        begin = max(each for each in self._ends if each <= first)
        past = self._ends[begin]
        self._remove(begin, past)
        for extent in ((begin, first), (first + count, past)):
            if extent[0] < extent[1]:
                self._add(*extent)
        self.free -= count

    def give(self, first: int, count: int, evicted: bool = False) -> None:
        """Return units, which join the free ones next to them; ``evicted``: in the order in which
        others go."""
        self.free += count
        past = first + count
        if evicted:
            before = self._evicted
            if first == before.stop or past == before.start:
                self._descends = past == before.start
            self._evicted = range(first, past)
        if first in self._starts and first not in self._cuts:
            start = self._starts[first]
            self._remove(start, first)
            first = start
        if past in self._ends and past not in self._cuts:
            after = self._ends[past]
            self._remove(past, after)
            past = after
        self._add(first, past)

    def _add(self, first: int, past: int) -> None:
        length = past - first
        self._ends[first] = past
        self._starts[past] = first
        if length not in self._sizes:
            self._sizes[length] = {}
            insort(self._lengths, length)
        self._sizes[length][first] = None

    def _remove(self, first: int, past: int) -> None:
        length = past - first
        del self._ends[first]
        del self._starts[past]
        alike = self._sizes[length]
        del alike[first]
        if not alike:
            del self._sizes[length]
            del self._lengths[bisect_left(self._lengths, length)]
