# SPDX-License-Identifier: Apache-2.0
"""Pools of pinned blocks of one size: what any pool does, and the one for a process's threads."""

from __future__ import annotations

import os
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch

from portakv.arguments import flag, seconds
from portakv.errors import HostMemoryError, PoolExhausted
from portakv.host import _pages, _registration, pinned
from portakv.runtime.devices import this_process

__all__ = ["Block", "Leak", "PinnedPool", "PoolExhausted"]

_ASK_AGAIN = 0.0005  # seconds between two looks at work that only tells when asked
GROW_AGAIN = 0.1  # seconds until a waiting caller asks again for memory that could not be had
_Pool = TypeVar("_Pool", bound="Pool")


@dataclass(eq=False)
class Block:
    """A block that a caller acquired. A context manager that releases it."""

    pool: Pool  # that it came from
    index: int  # which one of its pool
    nbytes: int
    generation: int  # counts how often blocks were handed out, by all processes in a shared pool
    _tensor: torch.Tensor | None = field(repr=False)

    @property
    def tensor(self) -> torch.Tensor:
        """Its bytes, uint8 ``[nbytes]``. Raises `HostMemoryError` once it was released."""
        if self._tensor is None:
            raise HostMemoryError(
                f"Block {self.index} was asked for its bytes after it had been released, and "
                f"another caller may have them; release it after its last read or write."
            )
        return self._tensor

    @property
    def address(self) -> int:
        """Of its first byte."""
        return self.tensor.data_ptr()

    @property
    def held(self) -> bool:
        """False once it was released."""
        return self._tensor is not None

    def release(self, after: Any = None) -> None:
        """Give it back; see `PinnedPool.release`."""
        self.pool.release(self, after)

    def drop(self) -> None:
        """Called by the pool that took it back."""
        self._tensor = None

    def __enter__(self) -> Block:
        return self

    def __exit__(self, *_: object) -> None:
        if self.held:
            self.release()


@dataclass(frozen=True)
class Leak:
    """A block that is out."""

    index: int
    owner: str  # the name that was given to `acquire`
    thread: str  # the name of the thread that acquired it
    seconds: float  # for how long it has been out
    dropped: bool  # the `Block` was garbage collected, so that it cannot be released any more
    stack: str  # where it was acquired, in a pool made with ``stacks=True``

    def __str__(self) -> str:
        how = ", dropped without release" if self.dropped else ""
        who = f"{self.owner or 'nobody named'} in thread {self.thread}"
        where = f"\n{self.stack}" if self.stack else ""
        return f"block {self.index}: {who}, for {self.seconds:.1f} s{how}{where}"


class Pool:
    """What callers do with any pool; a kind of pool adds what the annotations name."""

    block_bytes: int
    blocks: int  # how many it has
    limit: int  # how many it may have
    _stride: int  # bytes from one to the next
    release: Callable[..., None]
    _find: Callable[[], Sized]  # the blocks that are free
    _take: Callable[[int, str, bool], list[Block] | HostMemoryError | None]  # why it cannot grow
    _out_to: Callable[[], Sequence[object]]  # a line for each that has blocks
    _end: Callable[[], Sequence[object]]  # of the memory; a line for each block that was out

    def __init__(self, name: str, in_child: str) -> None:
        """How sentences name the pool, and what a forked child is to do without it."""
        self._name = name
        self._in_child = in_child
        self._process = this_process()
        self._pid = os.getpid()
        self._closed = False
        self._changed = threading.Condition()
        self._held: WeakValueDictionary[int, Block] = WeakValueDictionary()
        self._pause = 0.002  # seconds between two looks at what nothing here tells of

    @property
    def free(self) -> int:
        """How many can be acquired at once, without growing."""
        self._refuse()
        with self._changed:
            return len(self._find())

    def acquire(
        self,
        owner: str = "",
        *,
        wait: bool = False,
        timeout: float | None = None,
    ) -> Block:
        """A block; what it holds is whatever it held.

        Args:
            owner: what it is for, shown by `leaks`; other processes see 40 bytes of it.
            wait: wait for one if none is free, at most ``timeout`` seconds; None: without end.

        Raises:
            PoolExhausted: none was free, and the pool has its limit or, as the cause says, no
                memory to grow; names the owners of the blocks.
            HostMemoryError: the pool is closed, or this process was forked from its maker.
        """
        return self.acquire_many(1, owner, wait=wait, timeout=timeout)[0]

    def acquire_many(
        self, count: int, owner: str = "", *, wait: bool = False, timeout: float | None = None
    ) -> list[Block]:
        """Several blocks, all or none, so that two callers cannot each wait for the other's half.

        Else as `acquire`; `HostMemoryError` also for a count below 0 or of no whole number."""
        if _pages.whole("count", count) > self.limit:
            raise PoolExhausted(
                f"{self._name} was asked for {count} blocks, and it may have {self.limit}; ask for "
                f"fewer, or make it with a higher limit."
            )
        flag("wait", wait)
        limit = seconds("timeout", timeout, optional=True)
        within = "" if timeout is None or not wait else f" within {limit:g} s"
        until = time.monotonic() + limit if wait else 0.0
        grow_at = 0.0
        refused = None
        self._refuse()  # before the lock, which a forked child may find taken for ever
        with self._changed:
            while True:
                self._refuse()
                grow = time.monotonic() >= grow_at
                found = self._take(count, owner, grow)
                if isinstance(found, list):
                    return found
                now = time.monotonic()
                if grow:
                    refused = found
                    grow_at = now + GROW_AGAIN
                if now >= until:
                    raise self._exhausted(count, within, refused) from refused
                self._changed.wait(min(until - now, self._pause))

    def close(self) -> None:
        """Let go of the memory; tensors of blocks that are out still hold theirs. Warns of these
        (`ResourceWarning`), and names their owners."""
        if self._process.forked:
            return
        with self._changed:
            left = [] if self._closed else self._end()
            self._closed = True
            self._changed.notify_all()
        if left:
            warnings.warn(_listed(f"{self._name} was closed", left), ResourceWarning, stacklevel=2)

    def __enter__(self: _Pool) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exhausted(self, count: int, within: str, refused: Exception | None) -> PoolExhausted:
        do = "make the pool larger"
        if refused is not None:
            within += f", as it has {self.blocks} and there was no memory for more"
            do = "free some of the machine's memory"
        sentence = (
            f"{self._name} was asked for {count} blocks of {self.block_bytes} bytes, and "
            f"{self.free} of {self.limit} were free{within}; release some, wait longer, or {do}"
        )
        return PoolExhausted(_listed(sentence, self._out_to()))

    def _refuse(self, closed: bool = True) -> None:
        """Raise `HostMemoryError` in a forked child and, if that matters, in a closed pool."""
        if self._process.forked:
            raise HostMemoryError(
                f"{self._name} that process {self._pid} opened was used in process "
                f"{os.getpid()}, forked from it, where its memory is not pinned; {self._in_child}."
            )
        if closed and self._closed:
            raise HostMemoryError(f"{self._name} was used after it was closed; open another one.")

    def _check(self, block: Block) -> None:
        """Raise `HostMemoryError` unless this is a block of this pool that is out."""
        if not isinstance(block, Block):
            why = f"a {type(block).__name__}; release a Block that it handed out"
        elif block.pool is not self:
            why = f"block {block.index} of another pool; release it to the pool that it came from"
        elif not block.held:
            why = f"block {block.index}, released twice and maybe another caller's; do it once"
        else:
            return
        raise HostMemoryError(f"{self._name} was given back {why}: block.release().")


class PinnedPool(Pool):
    """Blocks of one size in pinned memory. A context manager; `close` may be called again.

    Args:
        block_bytes: of each block, exactly; blocks: how many it begins with.
        limit: how many it may have; it grows when none is free. None: ``blocks``.
        grow: how many it grows by, or by what is missing if there is no memory for more; None:
            ``blocks``.
        alignment: in bytes, of each block: 1, 2, 4 ... up to a page.
        stacks: remember where each block was acquired, for `leaks`; some 50 us each.
        options: of `pinned.allocate`, but for ``unit``.

    Raises:
        HostMemoryError: numbers that make no pool, an unknown option; or as `pinned.allocate`.

    Attributes:
        blocks: how many it has now, free or out; high_water: most that were out at once.
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
        super().__init__("The pool", "make one there, or use a SharedPool in spawned processes")
        self.block_bytes = block_bytes
        self._stride = stride(block_bytes, blocks, alignment)
        most, each = (blocks if number is None else number for number in (limit, grow))
        self.limit = _pages.whole("limit", most, blocks, "it begins with so many blocks")
        self._grow = _pages.whole("grow", each, 1)
        known = {"huge_pages", "numa", "threads", *vars(_registration.Options())} - {"unit"}
        if unknown := sorted(options.keys() - known):
            raise HostMemoryError(
                f"A pool was asked for with {', '.join(unknown)}, which it does not take; expected "
                f"its own arguments or {', '.join(sorted(known))}, which pinned.allocate takes."
            )
        self.pinned = True
        self._stacks = stacks
        self._options = options
        self.blocks = self.high_water = self._generation = 0
        self._segments: list[tuple[int, torch.Tensor]] = []  # number of the first block, all bytes
        self._ready: deque[int] = deque()
        # Blocks that are out: the owner, its thread, since when, and the stack.
        self._out: dict[int, tuple[str, str, float, str]] = {}
        # Blocks that were released after work that has not ended, and what tells when it has.
        self._in_use: dict[int, Callable[[], bool]] = {}
        self._add(blocks)

    def release(self, block: Block, after: Any = None) -> None:
        """Give a block back. It is handed out again once ``after`` has ended: a `Transfer`, an
        event, or anything else with ``done()`` or ``query()``, which tells its errors itself.

        Raises:
            HostMemoryError: released before, another pool's, no block, or in a forked process.
        """
        self._refuse(closed=False)
        with self._changed:
            self._check(block)
            if after is None:
                self._ready.append(block.index)
            else:
                self._in_use[block.index] = ending(after, "query", "done")
            del self._out[block.index]
            block.drop()
            self._changed.notify_all()

    def leaks(self) -> list[Leak]:
        """Every block that is out and its owner, the oldest first."""
        now = time.monotonic()
        with self._changed:
            return [
                Leak(index, owner, thread, now - since, index not in self._held, stack)
                for index, (owner, thread, since, stack) in self._out.items()
            ]

    def _take(self, count: int, owner: str, grow: bool) -> list[Block] | HostMemoryError | None:
        missing = count - len(self._find())
        if missing > 0:
            if not grow or missing > self.limit - self.blocks:
                return None
            if refused := self._grown(missing):
                return refused
        thread = threading.current_thread().name
        since = time.monotonic()
        stack = "".join(traceback.format_stack()[:-2]) if self._stacks else ""
        blocks = []
        for _ in range(count):
            index = self._ready.popleft()
            first, data = next(one for one in reversed(self._segments) if one[0] <= index)
            start = (index - first) * self._stride
            tensor = data[start : start + self.block_bytes]
            self._generation += 1
            block = Block(self, index, self.block_bytes, self._generation, tensor)
            self._held[index] = block
            self._out[index] = owner, thread, since, stack
            blocks.append(block)
        self.high_water = max(self.high_water, self.blocks - len(self._ready))
        return blocks

    _out_to = leaks

    def _end(self) -> list[Leak]:
        self._segments.clear()
        self._ready.clear()
        return self.leaks()

    def _add(self, blocks: int) -> None:
        # One registration holds so many: it cuts no block.
        most = max(1, _registration.LARGEST // self._stride)
        for done in range(0, blocks, most):
            count = min(blocks - done, most)
            nbytes = (count - 1) * self._stride + self.block_bytes
            memory = pinned.allocate(nbytes, unit=self._stride, **self._options)
            self.pinned &= memory.pinned
            self._segments.append((self.blocks, memory.tensor))
            self._ready.extend(range(self.blocks, self.blocks + count))
            self.blocks += count

    def _grown(self, missing: int) -> HostMemoryError | None:
        """Grow by `grow` blocks, or else by as many as are missing; or why not even by these."""
        refused = None
        most = min(max(self._grow, missing), self.limit - self.blocks)
        for count in dict.fromkeys((most, missing)):
            try:
                self._add(min(count, self.limit - self.blocks))
                return None
            except HostMemoryError as error:
                # Its frames hold the very memory that there is too little of.
                traceback.clear_frames(error.__traceback__)
                refused = error
        return refused

    def _find(self) -> deque[int]:
        """Those too whose release waited for work that has ended by now."""
        for index, ask in list(self._in_use.items()):
            ended = True  # also if it failed, which its own handle tells: no byte moves any more
            with suppress(Exception):
                ended = bool(ask())
            if ended:
                del self._in_use[index]
                self._ready.append(index)
        self._pause = _ASK_AGAIN if self._in_use else GROW_AGAIN
        return self._ready


def ending(after: Any, *names: str) -> Callable[[], Any]:
    """The first of these methods of what a block is released after, which tells its end."""
    asks: Iterator[Callable[[], Any]] = filter(callable, (getattr(after, x, None) for x in names))
    if not isinstance(after, type) and (ask := next(asks, None)) is not None:
        return ask
    raise HostMemoryError(
        f"A block was released after a {type(after).__name__}, which does not say when it ends; "
        f"pass a transfer, an event, or anything with {'() or '.join(names)}()."
    )


def stride(block_bytes: int, blocks: int, alignment: int) -> int:
    """Bytes from one block to the next; raises `HostMemoryError` for numbers that make no pool."""
    numbers = block_bytes, blocks, alignment
    whole = all(isinstance(number, int) and number > 0 for number in numbers)
    if not whole or alignment not in [1 << bit for bit in range(13)]:
        raise HostMemoryError(
            f"A pool of {blocks!r} blocks of {block_bytes!r} bytes, aligned to {alignment!r}, was "
            f"asked for; expected one or more of each, and a power of two up to 4096."
        )
    return -(-block_bytes // alignment) * alignment


def _listed(sentence: str, out: Sequence[object]) -> str:
    """A sentence, and a line for each block or process; of many, the first."""
    if not out:
        return f"{sentence}."
    more = [f"  and {len(out) - 8} more"] if len(out) > 8 else []
    return "\n".join([f"{sentence}. Out are:", *(f"  {one}" for one in out[:8]), *more])
