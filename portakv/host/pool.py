# SPDX-License-Identifier: Apache-2.0
"""A pool of pinned blocks of one size, for any number of threads of one process."""

from __future__ import annotations

import inspect
import math
import os
import threading
import time
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch

from portakv.errors import HostMemoryError, PoolExhausted
from portakv.host import _pages, pinned
from portakv.host._pages import LARGEST
from portakv.host.pinned import PinnedMemory

__all__ = ["Block", "Leak", "PinnedPool", "PoolExhausted"]

_ASK_AGAIN = 0.0005  # seconds between two looks at work that only tells when asked
_CENTURY = 3e9  # seconds, as long as the system can wait
_GROW_AGAIN = 0.1  # seconds until a waiting caller asks again for memory that could not be had


class Pool(Protocol):
    """What a block is given back to."""

    def release(self, block: Block, after: Any = None) -> None: ...


class Block:
    """A block that a caller acquired. A context manager that releases it.

    Attributes:
        pool: the pool that it came from.
        index: which one of its pool.
        nbytes: how many it has.
        generation: counts how often blocks were handed out, by all processes in a shared pool.
    """

    __slots__ = ("__weakref__", "_tensor", "generation", "index", "nbytes", "pool")

    def __init__(self, pool: Pool, index: int, tensor: torch.Tensor, generation: int) -> None:
        self.pool, self._tensor = pool, tensor
        self.index, self.nbytes, self.generation = index, tensor.numel(), generation

    @property
    def tensor(self) -> torch.Tensor:
        """Its bytes, uint8 ``[nbytes]``. Raises `HostMemoryError` once it was released."""
        if self._tensor is None:
            raise HostMemoryError(
                f"Block {self.index} was asked for its bytes after it had been released, and "
                f"somebody else may have them; release it once nobody reads or writes it."
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
        self._tensor = None  # type: ignore[assignment]

    def __enter__(self) -> Block:
        return self

    def __exit__(self, *_: object) -> None:
        if self.held:
            self.release()


@dataclass(frozen=True)
class Leak:
    """A block that is out.

    Attributes:
        index: which one.
        owner: the name that was given to `acquire`.
        thread: the name of the thread that acquired it.
        seconds: for how long it has been out.
        dropped: the `Block` was garbage collected, so that it cannot be released any more.
        stack: where it was acquired, in a pool made with ``stacks=True``.
    """

    index: int
    owner: str
    thread: str
    seconds: float
    dropped: bool
    stack: str

    def __str__(self) -> str:
        how = ", dropped without release" if self.dropped else ""
        who = f"{self.owner or 'nobody named'} in thread {self.thread}"
        where = f"\n{self.stack}" if self.stack else ""
        return f"block {self.index}: {who}, for {self.seconds:.1f} s{how}{where}"


class PinnedPool:
    """Blocks of one size in pinned memory. A context manager; `close` may be called again.

    Args:
        block_bytes: of each block, exactly.
        blocks: how many it begins with.
        limit: how many it may have; it grows when none is free. None: ``blocks``.
        grow: how many it grows by, or by what is missing if there is no memory for more; None:
            as many as it began with.
        alignment: in bytes, of each block: 1, 2, 4 ... up to a page.
        stacks: remember where each block was acquired, for `leaks`; some 50 us each.
        options: of `pinned.allocate`, but for ``unit``.

    Raises:
        HostMemoryError: numbers that make no pool, an option that there is not; or as
            `pinned.allocate` does.

    Attributes:
        blocks: how many it has now, free or out.
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
        known = inspect.signature(pinned.allocate).parameters.keys() - {"nbytes", "unit"}
        if unknown := sorted(options.keys() - known):
            raise HostMemoryError(
                f"A pool was asked for with {', '.join(unknown)}, which it does not take; expected "
                f"its own arguments or {', '.join(sorted(known))}, which pinned.allocate takes."
            )
        self._stacks, self._options = stacks, options
        self._changed = threading.Condition(threading.RLock())
        self._segments: list[tuple[int, PinnedMemory]] = []  # number of its first block, memory
        self.blocks = self.high_water = self._generation = 0
        self._free: deque[int] = deque()
        # Blocks that are out: since when, the owner and its thread, and the stack.
        self._out: dict[int, tuple[weakref.ref[Block], float, str, str, str]] = {}
        # Blocks that were released after work that has not ended, and what tells when it has.
        self._in_use: dict[int, Callable[[], bool]] = {}
        self._process, self._closed = os.getpid(), False
        self._add(blocks)

    @property
    def free(self) -> int:
        """How many can be acquired at once, without growing."""
        with self._changed:
            self._sweep()
            return len(self._free)

    @property
    def pinned(self) -> bool:
        """False if some of it is pageable after all."""
        return all(memory.pinned for _, memory in self._segments)

    def acquire(self, owner: str = "", *, wait: bool = False, timeout: float | None = None,
                ) -> Block:  # fmt: skip
        """A block; what it holds is whatever it held.

        Args:
            owner: what it is for, shown by `leaks`.
            wait: wait for one if none is free; otherwise that is an error at once.
            timeout: seconds to wait at most; None: without end.

        Raises:
            PoolExhausted: none is free, or was in time, and the pool has its limit or no memory to
                grow, which its cause says then; names the owners of all blocks.
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
        asked, do = f"{count!r} blocks were asked of a pool", "say how many are needed"
        count = _pages.whole(count, 0, asked, do)
        if count > self.limit:
            raise PoolExhausted(
                f"{count} blocks were asked of a pool that may have {self.limit}; ask for fewer, "
                f"or make it with a higher limit."
            )
        self._refuse_fork()
        with self._changed:
            until, grow_at = deadline(timeout), 0.0
            refused: HostMemoryError | None = None
            while True:
                if self._closed:
                    asked = "A block was asked of a pool that is closed"
                    raise HostMemoryError(f"{asked}; make another one.")
                self._sweep()
                missing = count - len(self._free)
                if missing <= 0:
                    return [self._hand_out(owner) for _ in range(count)]
                now, room = time.monotonic(), self.limit - self.blocks >= missing
                if room and now >= grow_at:
                    refused, grow_at = self._grown(missing), time.monotonic() + _GROW_AGAIN
                    continue
                if not wait or now >= until:
                    raise self._exhausted(count, timeout if wait else None, refused) from refused
                pauses = [_ASK_AGAIN] * bool(self._in_use) + [grow_at - now] * room
                self._changed.wait(min([until - now, *pauses]))

    def release(self, block: Block, after: Any = None) -> None:
        """Give a block back.

        Args:
            block: one that this pool handed out.
            after: a `Transfer`, an event, or anything else with ``done()`` or ``query()``: the
                block is handed out again only once that is true. Ask a transfer for its own
                errors: here it merely has to have ended.

        Raises:
            HostMemoryError: released before, another pool's, no block, or in a forked process.
        """
        self._refuse_fork()
        with self._changed:
            check_block(self, block, "this pool")
            ask = getattr(after, "query", None) or getattr(after, "done", None)
            if after is None:
                self._free.append(block.index)
            elif ask is not None:
                self._in_use[block.index] = ask
            else:
                raise HostMemoryError(
                    f"A block was released after a {type(after).__name__}, which does not say "
                    f"when it ends; pass a transfer, an event, or anything with done() or query()."
                )
            del self._out[block.index]
            block.drop()
            self._changed.notify_all()

    def leaks(self) -> list[Leak]:
        """Every block that is out and its owner, the oldest first."""
        now = time.monotonic()
        with self._changed:
            out = sorted(self._out.items(), key=lambda item: item[1][1])
        return [
            Leak(index, owner, thread, now - since, block() is None, stack)
            for index, (block, since, owner, thread, stack) in out
        ]

    def close(self) -> None:
        """Let go of the memory; tensors of blocks that are out still hold theirs.

        Warns of blocks that are out (`ResourceWarning`), and names their owners.
        """
        with self._changed:
            left = [] if self._closed or self._process != os.getpid() else self.leaks()
            self._closed = True
            for _, memory in self._segments:
                memory.close()
            self._segments.clear()
            self._free.clear()
            self._changed.notify_all()
        if left:
            warnings.warn(_listed("A pool was closed", left), ResourceWarning, stacklevel=2)

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
        for done in range(0, blocks, most):
            count = min(blocks - done, most)
            nbytes = (count - 1) * self._stride + self.block_bytes
            memory = pinned.allocate(nbytes, unit=self._stride, **self._options)
            self._segments.append((self.blocks, memory))
            self._free.extend(range(self.blocks, self.blocks + count))
            self.blocks += count

    def _grown(self, missing: int) -> HostMemoryError | None:
        """Grow by `grow` blocks, or else by as many as are missing; or why not even by these."""
        refused = None
        most = min(max(self._grow, missing), self.limit - self.blocks)
        for count in dict.fromkeys((most, missing)):
            try:
                self._add(count)
                return None
            except HostMemoryError as error:
                # Its frames hold the very memory that there is too little of.
                traceback.clear_frames(error.__traceback__)
                refused = error
        return refused

    def _sweep(self) -> None:
        """Make blocks free if the work after which they were released has ended."""
        for index in [index for index, ask in self._in_use.items() if _ended(ask)]:
            del self._in_use[index]
            self._free.append(index)

    def _hand_out(self, owner: str) -> Block:
        index = self._free.popleft()
        first, memory = next(one for one in reversed(self._segments) if one[0] <= index)
        start = (index - first) * self._stride
        self._generation += 1
        tensor = memory.tensor[start : start + self.block_bytes]
        block = Block(self, index, tensor, self._generation)
        stack = "".join(traceback.format_stack()[:-3]) if self._stacks else ""
        thread = threading.current_thread().name
        self._out[index] = weakref.ref(block), time.monotonic(), owner, thread, stack
        self.high_water = max(self.high_water, len(self._out) + len(self._in_use))
        return block

    def _exhausted(
        self, count: int, waited: float | None, refused: HostMemoryError | None
    ) -> PoolExhausted:
        how, do = "" if waited is None else f" within {waited:g} s", "raise the limit"
        if refused is not None:
            how += f", as it has {self.blocks} and there was no memory for more"
            do = "free some of the machine's memory"
        sentence = (
            f"{count} blocks of {self.block_bytes} bytes were asked of a pool, and "
            f"{len(self._free)} of {self.limit} were free{how}; release some, wait longer, or {do}"
        )
        return PoolExhausted(_listed(sentence, self.leaks()))


def _ended(ask: Callable[[], bool]) -> bool:
    """Also if the work failed, which its own handle tells: no byte moves any more."""
    try:
        return bool(ask())
    except Exception:
        return True


def stride(block_bytes: int, blocks: int, alignment: int) -> int:
    """Bytes from one block to the next; raises `HostMemoryError` for numbers that make no pool."""
    whole = all(isinstance(number, int) and number > 0 for number in (block_bytes, blocks))
    if not whole or alignment not in [1 << bit for bit in range(13)]:
        raise HostMemoryError(
            f"A pool of {blocks!r} blocks of {block_bytes!r} bytes, aligned to {alignment!r}, was "
            f"asked for; expected one or more of each, and a power of two up to 4096."
        )
    return -(-block_bytes // alignment) * alignment


def deadline(timeout: float | None) -> float:
    """When a wait of so many seconds ends, by the monotonic clock; None: in a century. Raises
    `HostMemoryError` for what is no number."""
    seconds = _CENTURY if timeout is None else timeout
    if not isinstance(seconds, Real) or math.isnan(seconds):
        raise HostMemoryError(
            f"A block was asked for with timeout={timeout!r}; expected seconds: pass a number, or "
            f"None to wait without end."
        )
    return time.monotonic() + min(seconds, _CENTURY)


def check_block(pool: Pool, block: Block, name: str) -> None:
    """Raise `HostMemoryError`, which calls the pool so, unless the block is one that is out."""
    if not isinstance(block, Block):
        raise HostMemoryError(
            f"A {type(block).__name__} was given back to {name}; release a Block that it handed "
            f"out: block.release()."
        )
    if block.pool is not pool:
        raise HostMemoryError(
            f"Block {block.index} of another pool was given back to {name}; release it to the "
            f"pool that it came from: block.release()."
        )
    if not block.held:
        raise HostMemoryError(
            f"Block {block.index} of {name} was released twice; it may be somebody else's by now. "
            f"Release each block once."
        )


def _listed(sentence: str, leaks: list[Leak]) -> str:
    """A sentence, and the owner of each block; of many blocks, the oldest."""
    if not leaks:
        return f"{sentence}."
    shown = [f"  {leak}" for leak in leaks[:8]]
    more = [f"  and {len(leaks) - 8} more"] if len(leaks) > 8 else []
    return "\n".join([f"{sentence}. Out are {len(leaks)} blocks:", *shown, *more])
