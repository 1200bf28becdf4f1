# SPDX-License-Identifier: Apache-2.0
"""A pool of pinned blocks that processes share by name.

Its memory and its tables lie in one file of POSIX shared memory; each process registers the memory
again, as a registration is not inherited. A block belongs to a process. One that dies, at whatever
moment, leaves tables that the next can use, and its blocks are taken back.
"""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections import Counter
from typing import Any

import numpy as np
import torch

from portakv.errors import HostMemoryError, PoolExhausted
from portakv.host import _pages, pinned
from portakv.host._shared_file import SharedFile, names, remove
from portakv.host.pool import Block, check_block, deadline

__all__ = ["PoolExhausted", "SharedPool", "names", "remove"]

_ASK_AGAIN = 0.002  # seconds between two looks at what other processes released


class SharedPool:
    """Blocks of one size, shared by name. A context manager; `close` may be called again.

    The first process that names it makes it, the last that closes it removes it, unless it
    was made with ``keep``. Use it in the process that opened it; a forked one opens its own.

    Args:
        name: letters, digits, dots, dashes and underscores.
        block_bytes, blocks: how large; None: as it is, which must then exist.
        alignment: in bytes, of each block.
        label: what other processes call this one.
        keep: leave it behind when the last process has closed it; see `remove`.
        fallback: pageable memory, and one warning, if it cannot be pinned.

    Raises:
        HostMemoryError: it is another size, another user's, too large for the machine's shared
            memory, or not there; or too many processes are attached.
    """

    def __init__(
        self,
        name: str,
        block_bytes: int | None = None,
        blocks: int | None = None,
        *,
        alignment: int = 64,
        label: str = "",
        keep: bool = False,
        fallback: bool = True,
    ) -> None:
        self._file = SharedFile(name, block_bytes, blocks, alignment, label)
        self.name, self.block_bytes, self.blocks = name, self._file.block_bytes, self._file.blocks
        try:
            self._memory = pinned.register_address(
                self._file.address, self._file.nbytes, held=self._file.mapping,
                unit=self._file.stride, fallback=fallback,
            )  # fmt: skip
        except BaseException:
            self._file.leave(keep)
            raise
        self._process = os.getpid()
        self._held: dict[int, Block] = {}
        self._leave = weakref.finalize(
            self, _leave, self._file, self._memory, self._held, keep, self._process
        )

    @property
    def pinned(self) -> bool:
        """False if this process has it pageable after all."""
        return self._memory.pinned

    @property
    def free(self) -> int:
        """How many blocks are free."""
        self._refuse()
        return int(np.count_nonzero(self._file.tables["owners"] == 0))

    @property
    def high_water(self) -> int:
        """Most blocks that were out at once, in all processes."""
        self._refuse()
        return int(self._file.tables["high_water"][0])

    def acquire(
        self,
        owner: str = "",
        *,
        wait: bool = False,
        timeout: float | None = None,
    ) -> Block:
        """A block that no process has; blocks of dead processes are taken back if need be.

        Arguments and errors as `PinnedPool.acquire`; every process sees 40 bytes of ``owner``.
        """
        until = deadline(timeout)
        while True:
            index = self._take(owner)
            if index is not None:
                return self._hand_out(index)
            left = until - time.monotonic()
            if not wait or left <= 0:
                how = f" within {timeout:g} s" if wait and timeout is not None else ""
                raise PoolExhausted(
                    f"A block was asked of the shared pool {self.name!r}, and none of its "
                    f"{self.blocks} was free{how}. They are out to {self._owners()}. Release "
                    f"some, wait longer, or make a larger pool."
                )
            time.sleep(min(_ASK_AGAIN, left))

    def release(self, block: Block, after: Any = None) -> None:
        """Give a block back.

        Args:
            block: one that this pool handed out in this process.
            after: work that must have ended: the host waits for it here (``synchronize()``).

        Raises:
            HostMemoryError: released before, another pool's, or adopted by another process.
        """
        self._refuse()
        check_block(self, block, repr(self.name))
        if after is not None:
            after.synchronize()
        with self._file.exclusive():
            check_block(self, block, repr(self.name))  # another thread may have released it
            del self._held[block.index]
            block.drop()
            if self._file.tables["generations"][block.index] != block.generation:
                raise HostMemoryError(
                    f"Block {block.index} of {self.name!r} was released here after another process "
                    f"adopted it; whoever adopts a block releases it."
                )
            self._file.tables["owners"][block.index] = 0

    def adopt(self, index: int, generation: int | None = None) -> Block:
        """Take over a block that another process acquired and told this one of.

        From then on it is this process's to release, and outlives the other.

        Args:
            index: the block's.
            generation: the block's as well; refuses one that has changed hands since.

        Raises:
            SlotError: no such block.
            HostMemoryError: it is free, or was handed out again since.
        """
        self._refuse()
        self._file.check(index)
        with self._file.exclusive():
            tables = self._file.tables
            now = tables["generations"][index]
            if tables["owners"][index] == 0 or generation not in (None, now):
                raise HostMemoryError(
                    f"Block {index} of {self.name!r} was asked to be adopted, and nobody has it, "
                    f"or somebody else by now; adopt it before whoever acquired it releases it or "
                    f"dies."
                )
            self._file.assign(index)
            mine = self._held.pop(index, None)
            if mine is not None:
                mine.drop()
        return self._hand_out(index)

    def bytes_of(self, index: int) -> torch.Tensor:
        """The bytes of any block, uint8 ``[block_bytes]``, free or not.

        Raises `SlotError` if there is no such block.
        """
        self._refuse()
        self._file.check(index)
        start = index * self._file.stride
        return self._memory.tensor[start : start + self.block_bytes]

    def reclaim(self) -> list[str]:
        """Take back the blocks of processes that died; names each, and how many."""
        self._refuse()
        with self._file.exclusive():
            return self._file.reclaim()

    def leaks(self) -> list[str]:
        """Every block that is out: its index, the process, what for and since when."""
        self._refuse()
        tables, now = self._file.tables, time.monotonic()
        return [
            f"block {index}: {self._file.describe(tables['owners'][index] - 1)}, for "
            f"{tables['labels'][index].decode(errors='replace') or 'nothing named'}, "
            f"{now - tables['since'][index]:.1f} s"
            for index in np.flatnonzero(tables["owners"]).tolist()
        ]

    def close(self) -> None:
        """Leave the pool. Blocks that this process has are given back, with a `ResourceWarning`,
        once its devices touch them no more."""
        left = ", ".join(map(str, self._held)) if self._leave.alive else ""
        self._leave()
        if left and self._process == os.getpid():
            told = f"The shared pool {self.name!r} was closed with blocks {left} out."
            warnings.warn(told, ResourceWarning, stacklevel=2)

    def __enter__(self) -> SharedPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse(self) -> None:
        if self._process != os.getpid():
            raise HostMemoryError(
                f"The shared pool {self.name!r} that process {self._process} opened was used in "
                f"process {os.getpid()}, forked from it; open it there by its name."
            )
        if not self._leave.alive:
            raise HostMemoryError(
                f"The shared pool {self.name!r} was used after it was closed; open it again."
            )

    def _take(self, owner: str) -> int | None:
        self._refuse()
        file, tables = self._file, self._file.tables
        with file.exclusive():
            free = np.flatnonzero(tables["owners"] == 0)
            if not free.size and file.reclaim():
                free = np.flatnonzero(tables["owners"] == 0)
            if not free.size:
                return None
            index = int(free[0])
            tables["labels"][index] = str(owner).encode()[:40]
            file.assign(index)
            used = self.blocks - free.size + 1
            tables["high_water"][0] = max(tables["high_water"][0], used)
            return index

    def _hand_out(self, index: int) -> Block:
        generation = int(self._file.tables["generations"][index])
        self._held[index] = block = Block(self, index, self.bytes_of(index), generation)
        return block

    def _owners(self) -> str:
        places = Counter(self._file.tables["owners"].tolist())
        del places[0]  # the free ones
        describe = self._file.describe
        return ", ".join(f"{describe(place - 1)}: {count}" for place, count in places.items())


def _leave(
    file: SharedFile, memory: pinned.PinnedMemory, held: dict[int, Block], keep: bool, process: int
) -> None:
    """Also at interpreter exit. A forked process has nothing to leave."""
    if process != os.getpid():
        return
    if held:
        _pages.quiesce()  # others may write these blocks as soon as they are free
        for block in held.values():
            block.drop()
        held.clear()
    file.leave(keep)
    memory.close()
