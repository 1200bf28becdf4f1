# SPDX-License-Identifier: Apache-2.0
"""What pools hand out, take back, wait for and complain of."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch

from portakv.errors import HostMemoryError


class Owner(Protocol):
    """Whoever takes blocks back."""

    def release(self, block: Block, after: Any = None) -> None: ...


class Block:
    """A block in somebody's hands. A context manager that releases it.

    Attributes:
        index: which one of its pool.
        nbytes: how many it has.
        generation: counts who had it, of all processes in a shared pool.
    """

    __slots__ = ("__weakref__", "_pool", "_tensor", "generation", "index", "nbytes")

    def __init__(self, pool: Owner, index: int, tensor: torch.Tensor, generation: int) -> None:
        self._pool, self._tensor = pool, tensor
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
        self._pool.release(self, after)

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
        dropped: nobody holds the `Block` any more, so that nobody can release it.
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


class Cooling:
    """Blocks that were given back while something may still read or write them."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Callable[[], bool], Any]] = []

    def add(self, index: int, after: Any) -> None:
        """Keep a block until ``after`` has ended; what that needs is held as well."""
        ask = getattr(after, "query", None) or getattr(after, "done", None)
        if ask is None:
            raise HostMemoryError(
                f"A block was released after a {type(after).__name__}, which does not say when it "
                f"ends; pass a transfer, an event, or anything with done() or query()."
            )
        self._waiting.append((index, ask, after))

    def ended(self) -> list[int]:
        """The blocks that nothing touches any more, once."""
        asked = [(entry, _has_ended(entry[1])) for entry in self._waiting]
        self._waiting = [entry for entry, over in asked if not over]
        return [entry[0] for entry, over in asked if over]

    def __len__(self) -> int:
        return len(self._waiting)


def _has_ended(ask: Callable[[], bool]) -> bool:
    try:
        return bool(ask())
    except Exception:  # it ended badly, which its owner is told; no byte moves any more
        return True


def stride(block_bytes: int, blocks: int, alignment: int) -> int:
    """Bytes from one block to the next.

    Raises:
        HostMemoryError: numbers that make no pool.
    """
    whole = all(isinstance(number, int) and number > 0 for number in (block_bytes, blocks))
    if not whole or alignment not in {1 << bit for bit in range(13)}:
        raise HostMemoryError(
            f"A pool of {blocks!r} blocks of {block_bytes!r} bytes, aligned to {alignment!r}, was "
            f"asked for; expected one or more of each, and a power of two up to 4096."
        )
    return -(-block_bytes // alignment) * alignment


def told(sentence: str, leaks: list[Leak]) -> str:
    """A sentence, and who has which block; of many, the oldest."""
    if not leaks:
        return f"{sentence}."
    shown = [f"  {leak}" for leak in leaks[:8]]
    more = [f"  and {len(leaks) - 8} more"] if len(leaks) > 8 else []
    return "\n".join([f"{sentence}. Out are {len(leaks)} blocks:", *shown, *more])


def ends(timeout: float | None) -> float | None:
    """When a wait of so many seconds ends, by the monotonic clock.

    Raises:
        HostMemoryError: no number of seconds.
    """
    if timeout is None or timeout == math.inf:
        return None
    if not isinstance(timeout, Real) or math.isnan(timeout):
        raise HostMemoryError(
            f"A block was asked for with timeout={timeout!r}; expected seconds: pass a number, or "
            f"None to wait without end."
        )
    return time.monotonic() + min(timeout, threading.TIMEOUT_MAX)
