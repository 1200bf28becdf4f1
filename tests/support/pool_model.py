# SPDX-License-Identifier: Apache-2.0
"""Predict the blocks of a pinned pool, and call it from threads that wait."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from portakv.errors import PoolExhausted
from portakv.host import pinned
from portakv.host.pinned import HostMemoryError, PinnedMemory
from portakv.host.pool import Block, PinnedPool
from support.waits import LIMIT


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

    def __init__(self, pool: PinnedPool, count: int, size: int | None, owner: str) -> None:
        super().__init__(daemon=True)
        self.pool = pool
        self.count = count
        self.size = size
        self.owner = owner
        self.blocks = list[Block]()
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Wait for the blocks."""
        try:
            terms: dict[str, Any] = {"nbytes": self.size, "wait": True, "timeout": LIMIT}
            self.blocks = self.pool.acquire_many(self.count, self.owner, **terms)
        except Exception as error:
            self.error = error


class Memory:
    """Replace `pinned.allocate`: an allocation has at most ``most`` bytes; None: no limit."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.most: int | None = None
        self.pieces = list[int]()  # the bytes of each allocation
        self._allocate = pinned.allocate
        patch.setattr(pinned, "allocate", self)

    def __call__(self, nbytes: int, **options: Any) -> PinnedMemory:
        if self.most is not None and nbytes > self.most:
            raise HostMemoryError("as planned")
        memory = self._allocate(nbytes, **options)
        self.pieces.append(nbytes)
        return memory


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
    """The blocks of one pool: who has each, and how many the pool may have.

    A block of any size takes neighbouring units; a unit is a block of the pool's own size.
    """

    def __init__(self, pool: Any, memory: Memory, grow: int, alignment: int) -> None:
        self.pool = pool
        self.memory = memory
        self.grow = grow
        self.alignment = alignment
        self.stride = -(-pool.block_bytes // alignment) * alignment
        self.pieces: list[int] = [pool.blocks]  # the units of each growth
        self.limit: int = pool.limit
        self.used = list[Used]()
        self.busy = list[tuple[Block, Work]]()
        self.waiters = list[Waiter]()
        self.high_water = 0
        self.fills = 0

    @property
    def blocks(self) -> int:
        """Return the number of units that the pool has."""
        return sum(self.pieces)

    def units(self, size: int | None) -> int:
        """Return how many units a block takes."""
        units = 1
        while size is not None and size > (units - 1) * self.stride + self.pool.block_bytes:
            units += 1
        return units

    def taken(self) -> list[int]:
        """Return the numbers of the units that no one else may get."""
        blocks = [used.block for used in self.used]
        blocks += [block for block, work in self.busy if not work.ended]
        return [
            unit
            for block in blocks
            for unit in range(block.index, block.index + self.units(block.nbytes))
        ]

    def free(self) -> int:
        """Return the number of free units."""
        return self.blocks - len(self.taken())

    def runs(self) -> list[int]:
        """Return the lengths of the runs of free units, as a walk over all units finds them."""
        taken = {*self.taken()}
        runs = list[int]()
        unit = 0
        for piece in self.pieces:
            runs.append(0)
            for _ in range(piece):
                if unit in taken:
                    runs.append(0)
                else:
                    runs[-1] += 1
                unit += 1
        return runs

    def possible(self, count: int, units: int) -> bool:
        """Return True if the pool can serve a request once all else is released."""
        room = (self.limit - self.blocks) // units
        return count <= sum(piece // units for piece in self.pieces) + room

    def growth(self, count: int, units: int) -> int | None:
        """Return by how many units the pool grows for a request; None if it cannot serve it."""
        missing = (count - sum(run // units for run in self.runs())) * units
        if missing <= 0:
            return 0
        space = self.limit - self.blocks
        if missing > space:
            return None
        for more in (min(max(self.grow, missing), space), missing):
            nbytes = (more - 1) * self.stride + self.pool.block_bytes
            if self.memory.most is None or nbytes <= self.memory.most:
                return more
        return None

    def acquired(
        self, blocks: list[Block], owner: str, count: int, size: int | None, changing: bool = False
    ) -> None:
        """Check and record blocks that a caller got, perhaps while the memory changed."""
        growth = self.growth(count, self.units(size))
        assert growth is not None, "more blocks than there are"
        if changing and growth:
            # A caller may look for memory for many blocks before the change, and for few after it.
            nbytes = self.memory.pieces[len(self.pieces)]
            growth = (nbytes - self.pool.block_bytes) // self.stride + 1
        if growth:
            self.pieces.append(growth)
        assert len(blocks) == count
        self.busy = [(block, work) for block, work in self.busy if not work.ended]
        for block in blocks:
            units = range(block.index, block.index + self.units(size))
            assert not {*units} & {*self.taken()}, "a block is in two hands, or work still uses it"
            assert 0 <= block.index < units.stop <= self.blocks
            assert block.nbytes == (size or self.pool.block_bytes) == block.tensor.numel()
            self.fills = self.fills % 250 + 1
            self.used.append(Used(block, owner, self.fills))
        if count:
            self.high_water = max(self.high_water, self.blocks - self.free())

    def acquire(self, count: int, size: int | None, owner: str) -> None:
        """Acquire blocks without waiting, and compare what the pool does."""
        units = self.units(size)
        if not self.possible(count, units):
            with pytest.raises(PoolExhausted, match="at most"):  # without a wait
                self.pool.acquire_many(count, owner, nbytes=size, wait=True, timeout=LIMIT)
        elif self.growth(count, units) is None:
            with pytest.raises(PoolExhausted, match="free blocks"):
                self.pool.acquire_many(count, owner, nbytes=size)
        else:
            blocks = self.pool.acquire_many(count, owner, nbytes=size)
            self.acquired(blocks, owner, count, size)

    def settle(self, changing: bool = False) -> None:
        """Wait until the callers that can be served are served in their order, and compare the
        pool."""
        while self.waiters:
            first = self.waiters[0]
            units = self.units(first.size)
            hopeless = [x for x in self.waiters if not self.possible(x.count, self.units(x.size))]
            for waiter in hopeless:
                waiter.join(LIMIT / 2)
                assert isinstance(waiter.error, PoolExhausted), "a caller waits for ever"
                self.waiters.remove(waiter)
            if hopeless:
                continue
            if self.growth(first.count, units) is None:
                break
            first.join(LIMIT / 2)
            assert not first.is_alive(), "a caller waits for free blocks"
            assert first.error is None, first.error
            self.acquired(first.blocks, first.owner, first.count, first.size, changing)
            self.waiters.remove(first)
        until = time.monotonic() + LIMIT / 2
        # A new caller is on its way.
        while self.pool.waiting < len(self.waiters) and all(x.is_alive() for x in self.waiters):
            assert time.monotonic() < until, "a caller does not wait"
            time.sleep(0.0002)
        self.compare()

    def compare(self) -> None:
        """Compare the figures of the pool, its owners, and the bytes of each block."""
        pool = self.pool
        assert (pool.blocks, pool.free) == (self.blocks, self.free())
        assert pool.bytes_free == self.free() * self.stride
        assert pool.bytes_used + pool.bytes_free == self.blocks * self.stride
        longest = max(self.runs())
        larger = (longest - 1) * self.stride
        assert pool.largest_free == (larger + pool.block_bytes if longest else 0)
        assert pool.high_water == self.high_water
        assert pool.blocks <= self.limit
        assert all(waiter.is_alive() for waiter in self.waiters)
        for used in self.used:
            used.check()
        assert all(x.block.address % self.alignment == 0 for x in self.used)
        spans = sorted((x.block.address, x.block.address + x.block.nbytes) for x in self.used)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "blocks overlap"
        leaks = pool.leaks()
        assert len(leaks) == len(self.used)
        for used in self.used:
            assert sum(used.owner in str(leak) for leak in leaks) >= 1, "an owner is missing"

    def release_all(self) -> None:
        """Release everything: all neighbours are together again."""
        for used in self.used:
            used.block.release()
        self.used.clear()
        for _, work in self.busy:
            work.ended = True
        self.settle()

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
