# SPDX-License-Identifier: Apache-2.0
"""Pools of pinned blocks of one size: the common part of all pools, and the pool for a process's
threads."""

from __future__ import annotations

import os
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch

from portakv.arguments import flag, seconds
from portakv.deprecation import warn_former
from portakv.errors import HostMemoryError, PoolExhausted
from portakv.host import _pages, _registration, pinned
from portakv.runtime.devices import this_process

__all__ = ["Block", "Leak", "PinnedPool", "PoolExhausted"]

_ASK_AGAIN = 0.0005  # seconds between two queries of work that does not notify
GROW_AGAIN = 0.1  # seconds until a waiting caller requests memory again
_Pool = TypeVar("_Pool", bound="Pool")


@dataclass(eq=False)
class Block:
    """A block that a caller acquired. A context manager that releases it."""

    pool: Pool  # its pool
    index: int  # its number in the pool
    nbytes: int
    generation: int  # counts acquisitions of blocks, by all processes in a shared pool
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

    @property
    def held(self) -> bool:
        """The former name of `in_use`."""
        warn_former("Block.held", "Block.in_use")
        return self.in_use

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

    def __str__(self) -> str:
        how = ", dropped without release" if self.dropped else ""
        who = f"{self.owner or 'an unnamed owner'} in thread {self.thread}"
        where = f"\n{self.stack}" if self.stack else ""
        return f"block {self.index}: {who}, for {self.seconds:.1f} s{how}{where}"


class Pool:
    """The common part of all pools; a kind of pool adds the annotated members."""

    block_bytes: int
    blocks: int  # the present number
    limit: int  # the most
    _stride: int  # bytes from one to the next
    release: Callable[..., None]
    _find: Callable[[], Sized]  # the blocks that are free
    _take: Callable[[int, str, bool], list[Block] | HostMemoryError | None]  # or why it cannot grow
    _out_to: Callable[[], Sequence[object]]  # a line for each owner of blocks
    _end: Callable[[], Sequence[object]]  # release the memory; a line for each block in use

    def __init__(self, name: str, in_child: str) -> None:
        """Set the pool's name in sentences, and the advice for a forked child."""
        self._name = name
        self._in_child = in_child
        self._process = this_process()
        self._pid = os.getpid()
        self._closed = False
        self._changed = threading.Condition()
        self._handles: WeakValueDictionary[int, Block] = WeakValueDictionary()
        self._pause = 0.002  # seconds between two looks at changes that do not notify

    @property
    def free(self) -> int:
        """Return how many blocks can be acquired immediately, without growing."""
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
        """Return a block with arbitrary contents.

        Args:
            owner: its purpose, shown by `leaks`; other processes see 40 bytes of it.
            wait: wait for a block if none is free, at most ``timeout`` seconds; None: without end.

        Raises:
            PoolExhausted: no block was free, and the pool is at its limit or, as the cause says,
                had no memory to grow; names the owners of the blocks.
            HostMemoryError: the pool is closed, or this process was forked from its maker.
        """
        return self.acquire_many(1, owner, wait=wait, timeout=timeout)[0]

    def acquire_many(
        self, count: int, owner: str = "", *, wait: bool = False, timeout: float | None = None
    ) -> list[Block]:
        """Return several blocks, all or none, so that two callers cannot each wait for the other's
        half.

        Otherwise as `acquire`; also raises `HostMemoryError` for a count that is negative or not a
        whole number.
        """
        if _pages.whole("count", count) > self.limit:
            raise PoolExhausted(
                f"Expected at most {self.limit} blocks of {self._name}, got a request for {count}. "
                f"Request fewer, or make it with a higher limit."
            )
        flag("wait", wait)
        limit = seconds("timeout", timeout, optional=True)
        within = "" if timeout is None or not wait else f" within {limit:g} s"
        until = time.monotonic() + limit if wait else 0.0
        grow_at = 0.0
        refused = None
        self._refuse()  # before the lock, which a forked child may never get
        with self._changed:
            while True:
                self._refuse()
                grow = time.monotonic() >= grow_at
                blocks = self._take(count, owner, grow)
                if isinstance(blocks, list):
                    return blocks
                now = time.monotonic()
                if grow:
                    refused = blocks
                    grow_at = now + GROW_AGAIN
                if now >= until:
                    raise self._exhausted(count, within, refused) from refused
                self._changed.wait(min(until - now, self._pause))

    def close(self) -> None:
        """Release the memory; tensors of blocks in use still retain their memory.

        Warns of these blocks (`ResourceWarning`), and names their owners.
        """
        if self._process.forked:
            return
        with self._changed:
            left = [] if self._closed else self._end()
            self._closed = True
            self._changed.notify_all()
        if left:
            text = f"Blocks were in use when {self._name} was closed"
            warnings.warn(_listed(text, left), ResourceWarning, stacklevel=2)

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
            f"Expected {count} free blocks of {self.block_bytes} bytes in {self._name}, got "
            f"{self.free} of {self.limit}{within}. Release some, wait longer, or {do}"
        )
        return PoolExhausted(_listed(sentence, self._out_to()))

    def _refuse(self, closed: bool = True) -> None:
        """Raise `HostMemoryError` in a forked child and, if ``closed``, in a closed pool."""
        if self._process.forked:
            raise HostMemoryError(
                f"Expected {self._name} to be used by process {self._pid}, which opened it, got "
                f"process {os.getpid()}, forked from it, where its memory is not pinned. In the "
                f"child {self._in_child}."
            )
        if closed and self._closed:
            raise HostMemoryError(
                f"Expected an open pool, got {self._name} after it was closed. Open another one."
            )

    def _check(self, block: Block) -> None:
        """Raise `HostMemoryError` unless this is a block of this pool in use."""
        if not isinstance(block, Block):
            why = f"a {type(block).__name__}; release a Block that it handed out"
        elif block.pool is not self:
            why = f"block {block.index} of another pool; release it to the pool that it came from"
        elif not block.in_use:
            why = f"block {block.index}, released twice and maybe another caller's; do it once"
        else:
            return
        raise HostMemoryError(
            f"Expected a block in use of {self._name}, got {why}: block.release()."
        )


class _Settings(NamedTuple):
    """The arguments of a pool that later growth and acquisitions read."""

    grow: int
    stacks: bool
    options: Mapping[str, Any]


class PinnedPool(Pool):
    """Blocks of one size in pinned memory. A context manager; `close` may be called again.

    Args:
        block_bytes: the exact bytes of each block.
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
        high_water: the most blocks in use at a time.
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
        super().__init__("the pool", "make one there, or use a SharedPool in spawned processes")
        self.block_bytes = block_bytes
        self._stride = stride(block_bytes, blocks, alignment)
        most, each = (blocks if number is None else number for number in (limit, grow))
        self.limit = _pages.whole("limit", most, blocks, "it begins with so many blocks")
        grow = _pages.whole("grow", each, 1)
        known = {"huge_pages", "numa", "threads", *vars(_registration.Options())} - {"unit"}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise HostMemoryError(
                f"Expected options of a pool among {', '.join(sorted(known))}, got "
                f"{', '.join(unknown)}. Leave them out."
            )
        self.pinned = True
        self._settings = _Settings(grow, stacks, options)
        self.blocks = 0
        self.high_water = 0
        self._generation = 0
        self._segments: list[tuple[int, torch.Tensor]] = []  # number of the first block, all bytes
        self._ready: deque[int] = deque()
        # Blocks in use: the owner, its thread, the time, and the stack.
        self._out: dict[int, tuple[str, str, float, str]] = {}
        # Blocks that were released after work that has not ended, and the function that reports its
        # end.
        self._in_use: dict[int, Callable[[], bool]] = {}
        self._add(blocks)

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
            if after is None:
                self._ready.append(block.index)
            else:
                self._in_use[block.index] = ending(after, "query", "done")
            del self._out[block.index]
            block.drop()
            self._changed.notify_all()

    def leaks(self) -> list[Leak]:
        """Return every block in use and its owner, the oldest first."""
        now = time.monotonic()
        with self._changed:
            return [
                Leak(index, owner, thread, now - since, index not in self._handles, stack)
                for index, (owner, thread, since, stack) in self._out.items()
            ]

    def _take(self, count: int, owner: str, grow: bool) -> list[Block] | HostMemoryError | None:
        missing = count - len(self._find())
        if missing > 0:
            if not grow or missing > self.limit - self.blocks:
                return None
            refused = self._grown(missing)
            if refused is not None:
                return refused
        thread = threading.current_thread().name
        since = time.monotonic()
        stack = "".join(traceback.format_stack()[:-2]) if self._settings.stacks else ""
        blocks = []
        for _ in range(count):
            index = self._ready.popleft()
            first, data = next(one for one in reversed(self._segments) if one[0] <= index)
            start = (index - first) * self._stride
            tensor = data[start : start + self.block_bytes]
            self._generation += 1
            block = Block(self, index, self.block_bytes, self._generation, tensor)
            self._handles[index] = block
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
        # The most blocks of one registration, which cuts no block.
        most = max(1, _registration.LARGEST // self._stride)
        for done in range(0, blocks, most):
            count = min(blocks - done, most)
            nbytes = (count - 1) * self._stride + self.block_bytes
            memory = pinned.allocate(nbytes, unit=self._stride, **self._settings.options)
            self.pinned &= memory.pinned
            self._segments.append((self.blocks, memory.tensor))
            self._ready.extend(range(self.blocks, self.blocks + count))
            self.blocks += count

    def _grown(self, missing: int) -> HostMemoryError | None:
        """Grow by `grow` blocks, or else by the missing ones; return why even these fail."""
        refused = None
        most = min(max(self._settings.grow, missing), self.limit - self.blocks)
        for count in dict.fromkeys((most, missing)):
            try:
                self._add(min(count, self.limit - self.blocks))
                return None
            except HostMemoryError as error:
                # Its frames retain the memory that is needed.
                traceback.clear_frames(error.__traceback__)
                refused = error
        return refused

    def _find(self) -> deque[int]:
        """Return the free blocks; add those whose release waited for work that has ended."""
        for index, ask in list(self._in_use.items()):
            ended = True  # failed work also moves no more bytes; its own handle reports the error
            with suppress(Exception):  # the caller's own work may raise anything
                ended = bool(ask())
            if ended:
                del self._in_use[index]
                self._ready.append(index)
        self._pause = _ASK_AGAIN if self._in_use else GROW_AGAIN
        return self._ready


def ending(after: object, *names: str) -> Callable[[], Any]:
    """Return the first of these methods of ``after``, which reports its end."""
    queries = filter(callable, (getattr(after, x, None) for x in names))
    query = None if isinstance(after, type) else next(queries, None)
    if query is not None:
        return query
    raise HostMemoryError(
        f"Expected work that reports its end, got a {type(after).__name__}. Pass a transfer, an "
        f"event, or an object with {'() or '.join(names)}()."
    )


def stride(block_bytes: int, blocks: int, alignment: int) -> int:
    """Return the bytes from one block to the next; raise `HostMemoryError` for numbers that make no
    pool."""
    numbers = block_bytes, blocks, alignment
    whole = all(isinstance(number, int) and number > 0 for number in numbers)
    if not whole or alignment not in [1 << bit for bit in range(13)]:
        raise HostMemoryError(
            f"Expected one or more blocks of one or more bytes, aligned to a power of two up to "
            f"4096, got {blocks!r} blocks of {block_bytes!r} bytes, aligned to {alignment!r}. Pass "
            f"such numbers."
        )
    return -(-block_bytes // alignment) * alignment


def _listed(sentence: str, out: Sequence[object]) -> str:
    """Return a sentence, and a line for each block or process; of many, the first lines."""
    if not out:
        return f"{sentence}."
    more = [f"  and {len(out) - 8} more"] if len(out) > 8 else []
    return "\n".join([f"{sentence}. In use:", *(f"  {one}" for one in out[:8]), *more])
