# SPDX-License-Identifier: Apache-2.0
"""`Pins`: blocks that stay where they are until a caller releases them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from portakv.graph import Mask
from portakv.runtime.interrupts import uninterrupted


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
    """

    def __init__(self, count: int) -> None:
        self.held: Mask = np.zeros(count, np.bool_)
        self._releases = list[Callable[[], object]]()

    def add(self, place: int, release: Callable[[], object]) -> None:
        """Note that the block at a place stays until ``release`` is called."""
        self.held[place] = True
        self._releases.append(release)

    def add_all(self, places: Sequence[int], pins: Sequence[Pinned | None]) -> None:
        """Add the pins of blocks at places."""
        for place, pin in zip(places, pins, strict=True):
            if pin is not None:
                self.add(place, pin.release)

    def release(self) -> None:
        """Let the blocks go in their turn, in any thread. A second call does nothing."""
        uninterrupted(self._release)

    def _release(self) -> None:
        while self._releases:
            self._releases.pop()()
