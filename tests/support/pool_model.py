# SPDX-License-Identifier: Apache-2.0
"""Predict the blocks of a pinned pool, and call it from threads that wait."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from portakv.host import pinned
from portakv.host.pinned import HostMemoryError, PinnedMemory
from portakv.host.pool import Block, Pool, PoolExhausted

LIMIT = 10.0  # seconds after which a caller that is not served counts as a deadlock


class Work:
    """Work that may still use a block; the machine ends it, well or with an error."""

    def __init__(self) -> None:
        self.ended = False
        self.fails = False

    def done(self) -> bool:
        """Return True if it has ended."""
        if self.ended and self.fails:
            raise ValueError("as planned")
        return self.ended


class Waiter(threading.Thread):
    """A thread that waits for blocks; it has either blocks or an error at its end."""

    def __init__(self, pool: Pool, count: int, owner: str) -> None:
        super().__init__(daemon=True)
        self.pool = pool
        self.count = count
        self.owner = owner
        self.blocks = list[Block]()
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Wait for the blocks."""
        try:
            self.blocks = self.pool.acquire_many(self.count, self.owner, wait=True, timeout=LIMIT)
        except Exception as error:
            self.error = error


class Memory:
    """Replace `pinned.allocate`: an allocation has at most ``most`` bytes; None: no limit."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.most: int | None = None
        self._allocate = pinned.allocate
        patch.setattr(pinned, "allocate", self)

    def __call__(self, nbytes: int, **options: Any) -> PinnedMemory:
        if self.most is not None and nbytes > self.most:
            raise HostMemoryError("as planned")
        return self._allocate(nbytes, **options)


class Used:
    """A block in the hands of a caller, with the byte that fills it."""

    def __init__(self, block: Block, owner: str, fill: int) -> None:
        self.block = block
        self.owner = owner
        self.fill = fill
        block.tensor.fill_(fill)

    def check(self) -> None:
        """Check that no one else wrote to the block."""
        assert bool((self.block.tensor == self.fill).all()), "a block is in two hands"


class PoolModel:
    """The blocks of one pool: who has each, and how many the pool may have."""

    def __init__(self, pool: Any, memory: Memory, grow: int, alignment: int) -> None:
        self.pool = pool
        self.memory = memory
        self.grow = grow
        self.alignment = alignment
        self.blocks: int = pool.blocks
        self.limit: int = pool.limit
        self.used = list[Used]()
        self.busy = dict[int, Work]()  # by the number of the block
        self.waiters = list[Waiter]()  # all need the same number of blocks
        self.high_water = 0
        self.fills = 0

    def free(self) -> int:
        """Return the number of free blocks."""
        return self.blocks - len(self.used) - sum(not x.ended for x in self.busy.values())

    def growth(self, count: int) -> int | None:
        """Return by how many blocks the pool grows for a request; None if it cannot serve it."""
        missing = count - self.free()
        if missing <= 0:
            return 0
        space = self.limit - self.blocks
        if missing > space:
            return None
        for more in (min(max(self.grow, missing), space), missing):
            if self.memory.most is None or more * self.pool.block_bytes <= self.memory.most:
                return more
        return None

    def acquired(self, blocks: list[Block], owner: str, count: int, changing: bool = False) -> None:
        """Check and record blocks that a caller got, perhaps while the memory changed."""
        growth = self.growth(count)
        assert growth is not None, "more blocks than there are"
        # A caller may look for memory for many blocks before the change, and for few after it.
        self.blocks = self.pool.blocks if changing else self.blocks + growth
        assert len(blocks) == count
        self.busy = {index: work for index, work in self.busy.items() if not work.ended}
        taken = {x.block.index for x in self.used} | {*self.busy}
        for block in blocks:
            assert block.index not in taken, "a block is in two hands, or work still uses it"
            assert 0 <= block.index < self.blocks
            taken.add(block.index)
            self.fills = self.fills % 250 + 1
            self.used.append(Used(block, owner, self.fills))
        if count:
            used = self.blocks - self.free()
            self.high_water = max(self.high_water, used)

    def acquire(self, count: int, owner: str) -> None:
        """Acquire blocks without waiting, and compare what the pool does."""
        if self.growth(count) is None:
            with pytest.raises(PoolExhausted):
                self.pool.acquire_many(count, owner)
        else:
            self.acquired(self.pool.acquire_many(count, owner), owner, count)

    def settle(self, changing: bool = False) -> None:
        """Wait until every caller that can be served is served, and compare the pool."""
        until = time.monotonic() + LIMIT / 2
        while any(self.growth(x.count) is not None for x in self.waiters):
            served = [x for x in self.waiters if not x.is_alive()]
            for waiter in served:
                assert waiter.error is None, waiter.error
                self.acquired(waiter.blocks, waiter.owner, waiter.count, changing)
                self.waiters.remove(waiter)
            if not served:
                assert time.monotonic() < until, "a caller waits for free blocks"
                time.sleep(0.0002)
        self.compare()

    def compare(self) -> None:
        """Compare the figures of the pool, its owners, and the bytes of each block."""
        pool = self.pool
        assert (pool.blocks, pool.free) == (self.blocks, self.free())
        assert pool.high_water == self.high_water
        assert pool.blocks <= self.limit
        assert all(waiter.is_alive() for waiter in self.waiters)
        for used in self.used:
            used.check()
        assert all(x.block.address % self.alignment == 0 for x in self.used)
        spans = sorted(x.block.address for x in self.used)
        distances = [after - before for before, after in itertools.pairwise(spans)]
        assert all(distance >= pool.block_bytes for distance in distances), "blocks overlap"
        leaks = pool.leaks()
        assert len(leaks) == len(self.used)
        for used in self.used:
            assert sum(used.owner in str(leak) for leak in leaks) >= 1, "an owner is missing"

    def end(self, call: Callable[[], object]) -> None:
        """Close the pool; callers that wait get an error, and blocks keep their bytes."""
        tensors = [used.block.tensor for used in self.used]
        call()
        for waiter in self.waiters:
            waiter.join(LIMIT)
            assert isinstance(waiter.error, HostMemoryError), "a caller waits for a closed pool"
        with pytest.raises(HostMemoryError, match="closed"):
            self.pool.acquire()
        for used, tensor in zip(self.used, tensors, strict=True):
            assert bool((tensor == used.fill).all())
