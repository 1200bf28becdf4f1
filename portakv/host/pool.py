# SPDX-License-Identifier: Apache-2.0
"""A pool of pinned blocks of one size, for any number of threads."""

from __future__ import annotations

import os
import threading
import time
import traceback
import warnings
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

from portakv.errors import HostMemoryError, PoolExhausted
from portakv.host import _pages, pinned
from portakv.host._blocks import Block, Cooling, Leak, ends, stride, told
from portakv.host._registrations import LARGEST
from portakv.host.pinned import PinnedMemory

__all__ = ["Block", "Leak", "PinnedPool", "PoolExhausted"]

_ASK_AGAIN = 0.0005  # seconds between two looks at work that only tells when asked
_GROW_AGAIN = 0.1  # seconds until who waits asks again for memory that could not be had


@dataclass
class _Out:
    block: weakref.ref[Block]
    owner: str
    thread: str
    since: float
    stack: str


class PinnedPool:
    """Blocks of one size in pinned memory. A context manager; `close` may be called again.

    Args:
        block_bytes: of each block, exactly.
        blocks: how many it begins with.
        limit: how many it may have; it grows when none is free. None: ``blocks``.
        grow: how many it grows by, or by what is missing where there is no memory for more; None:
            as many as it began with.
        alignment: in bytes, of each block: 1, 2, 4 ... up to a page.
        stacks: remember where each block was acquired, for `leaks`; some 50 us each.
        options: of `pinned.allocate`.

    Raises:
        HostMemoryError: numbers that make no pool; or as `pinned.allocate` does.

    Attributes:
        high_water: most blocks that were out at once.
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
        self.block_bytes, self._stride = block_bytes, stride(block_bytes, blocks, alignment)
        most, each = (blocks if number is None else number for number in (limit, grow))
        asked = f"A pool of {blocks} blocks was asked to grow by {each!r} up to {most!r}"
        self.limit = _pages.whole(most, blocks, asked, "set a limit of what it begins with or more")
        self._grow = _pages.whole(each, 1, asked, "let it grow by one block or more")
        self._stacks, self._options = stacks, options
        self._changed = threading.Condition(threading.RLock())
        self._segments: list[tuple[int, PinnedMemory]] = []  # number of its first block, memory
        self._size, self._generation, self.high_water = 0, 0, 0
        self._free: deque[int] = deque()
        self._out: dict[int, _Out] = {}
        self._cooling = Cooling()
        self._process, self._closed = os.getpid(), False
        self._add(blocks)

    @property
    def blocks(self) -> int:
        """How many it has now, free or out."""
        return self._size

    @property
    def free(self) -> int:
        """How many can be acquired at once, without growing."""
        with self._changed:
            self._sweep()
            return len(self._free)

    @property
    def pinned(self) -> bool:
        """False where some of it is pageable after all."""
        return all(memory.pinned for _, memory in self._segments)

    def acquire(self, owner: str = "", *, wait: bool = False, timeout: float | None = None,
                ) -> Block:  # fmt: skip
        """A block; what it holds is whatever it held.

        Args:
            owner: who has it, for `leaks`.
            wait: wait for one where none is free; otherwise that is an error at once.
            timeout: seconds to wait at most; None: without end.

        Raises:
            PoolExhausted: none is free, or was in time, and the pool has its limit or no memory to
                grow, which its cause says then; says who has them.
            HostMemoryError: the pool is closed, or this process was forked from its maker.
        """
        return self.acquire_many(1, owner, wait=wait, timeout=timeout)[0]

    def acquire_many(
        self, count: int, owner: str = "", *, wait: bool = False, timeout: float | None = None
    ) -> list[Block]:
        """Several blocks, all or none, so that two callers cannot each wait for the other's half.

        Args and errors: as `acquire`.

        Raises:
            HostMemoryError: a count that is no whole number, or below 0.
        """
        count = _pages.whole(
            count, 0, f"{count!r} blocks were asked of a pool", "say how many are needed"
        )
        if count > self.limit:
            raise PoolExhausted(
                f"{count} blocks were asked of a pool that may have {self.limit}; ask for fewer, "
                f"or make it with a higher limit."
            )
        self._refuse_fork()
        with self._changed:
            until = ends(timeout)
            refused: HostMemoryError | None = None
            grow_at = 0.0
            while (missing := self._missing(count)) > 0:
                now, room = time.monotonic(), self.limit - self._size >= missing
                if room and now >= grow_at:
                    refused, grow_at = self._grown(missing), time.monotonic() + _GROW_AGAIN
                    continue
                left = None if until is None else until - now
                if not wait or (left is not None and left <= 0):
                    raise self._exhausted(count, timeout if wait else None, refused) from refused
                pauses = [left] if left is not None else []
                pauses += [_ASK_AGAIN] * bool(self._cooling) + [grow_at - now] * room
                self._changed.wait(min(pauses, default=None))
            return [self._hand_out(owner) for _ in range(count)]

    def release(self, block: Block, after: Any = None) -> None:
        """Give a block back.

        Args:
            block: one that this pool handed out.
            after: a `Transfer`, an event, or anything else with ``done()`` or ``query()``: the
                block is handed out again only once that is true. Ask a transfer for its own
                errors: here it merely has to have ended.

        Raises:
            HostMemoryError: released before, another pool's, or in a forked process.
        """
        self._refuse_fork()
        with self._changed:
            out = self._out.get(block.index)
            if block._pool is not self:
                raise HostMemoryError(
                    f"Block {block.index} of another pool was given back to this one; release it "
                    f"to the pool that it came from: block.release()."
                )
            if out is None or out.block() is not block:
                raise HostMemoryError(
                    f"Block {block.index} was released twice; it may be somebody else's by now. "
                    f"Release each block once."
                )
            if after is not None:
                self._cooling.add(block.index, after)
            else:
                self._free.append(block.index)
            del self._out[block.index]
            block.drop()
            self._changed.notify_all()

    def leaks(self) -> list[Leak]:
        """Every block that is out and who acquired it, the oldest first."""
        now = time.monotonic()
        with self._changed:
            out = sorted(self._out.items(), key=lambda item: item[1].since)
        return [
            Leak(index, one.owner, one.thread, now - one.since, one.block() is None, one.stack)
            for index, one in out
        ]

    def close(self) -> None:
        """Let go of the memory; tensors of blocks that are out still hold theirs.

        Warns of blocks that are out (`ResourceWarning`), and names who acquired them.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            left = [] if self._process != os.getpid() else self.leaks()
            for _, memory in self._segments:
                memory.close()
            self._segments.clear()
            self._free.clear()
            self._changed.notify_all()
        if left:
            warnings.warn(told("A pool was closed", left), ResourceWarning, stacklevel=2)

    def __enter__(self) -> PinnedPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_fork(self) -> None:
        if self._process != os.getpid():
            raise HostMemoryError(
                f"A pool that process {self._process} made was used in process {os.getpid()}, "
                f"forked from it, where its memory is a copy and not pinned; make a pool there, "
                f"or use a SharedPool in processes that were spawned."
            )

    def _add(self, blocks: int) -> None:
        # Each in one registration: no block crosses a seam.
        most = max(1, LARGEST // self._stride)
        while blocks > 0:
            count = min(blocks, most)
            nbytes = (count - 1) * self._stride + self.block_bytes
            memory = pinned.allocate(nbytes, unit=self._stride, **self._options)
            self._segments.append((self._size, memory))
            self._free.extend(range(self._size, self._size + count))
            self._size += count
            blocks -= count

    def _missing(self, count: int) -> int:
        """How many are not free of so many."""
        if self._closed:
            raise HostMemoryError("A block was asked of a pool that is closed; make another one.")
        self._sweep()
        return count - len(self._free)

    def _grown(self, missing: int) -> HostMemoryError | None:
        """By `grow` blocks, or else by as many as are missing; or why not even by these."""
        refused, least = None, self._size + missing
        for size in dict.fromkeys((min(self.limit, self._size + max(self._grow, missing)), least)):
            refused = self._grown_to(size)
            if refused is None:
                break
        return refused

    def _grown_to(self, size: int) -> HostMemoryError | None:
        try:
            self._add(size - self._size)
        except HostMemoryError as refused:
            # Its frames hold the very memory that there is too little of.
            traceback.clear_frames(refused.__traceback__)
            return refused
        return None

    def _sweep(self) -> None:
        if self._cooling:
            self._free.extend(self._cooling.ended())

    def _hand_out(self, owner: str) -> Block:
        index = self._free.popleft()
        first, memory = next(one for one in reversed(self._segments) if one[0] <= index)
        start = (index - first) * self._stride
        self._generation += 1
        block = Block(
            self, index, memory.tensor[start : start + self.block_bytes], self._generation
        )
        stack = "".join(traceback.format_stack()[:-3]) if self._stacks else ""
        self._out[index] = _Out(
            weakref.ref(block), owner, threading.current_thread().name, time.monotonic(), stack
        )
        self.high_water = max(self.high_water, len(self._out) + len(self._cooling))
        return block

    def _exhausted(
        self, count: int, waited: float | None, refused: HostMemoryError | None
    ) -> PoolExhausted:
        how, do = "" if waited is None else f" within {waited:g} s", "raise the limit"
        if refused is not None:
            how += f", as it has {self._size} and there was no memory for more"
            do = "free some of the machine's memory"
        return PoolExhausted(
            told(
                f"{count} blocks of {self.block_bytes} bytes were asked of a pool, and "
                f"{len(self._free)} of {self.limit} were free{how}; release some, wait longer, or "
                f"{do}", self.leaks(),
            )
        )  # fmt: skip
