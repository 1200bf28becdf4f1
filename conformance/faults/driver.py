# SPDX-License-Identifier: Apache-2.0
"""Drive a tier of any family as its engine does: store, look up and load blocks by key.

A driver lives in the process of the tier. Its blocks lie in slots of host memory, as they do in
every engine; a subclass for each family passes the slots to the tier.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from mmap import mmap
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Result = TypeVar("Result")
#: Slots of host memory.
SLOTS = 32
#: Seconds between two looks for the end of a job.
PAUSE = 5e-4


class NoSuchCall(Exception):
    """A family has no call for what a fault needs; the text names it."""


class Driver(ABC):
    """A tier, opened again and again over one folder, and memory for its blocks.

    Args:
        make: the class of the tier, or what makes it.
        terms: of its constructor.
        nbytes: of a block.
    """

    #: The name of the family.
    family = ""
    #: Packages whose versions the report names.
    packages: tuple[str, ...] = ()

    def __init__(self, make: Callable[..., Any], terms: Mapping[str, Any], nbytes: int) -> None:
        self.make = make
        self.terms = terms
        self.nbytes = nbytes
        self.buffer = mmap(-1, SLOTS * nbytes)
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(self.buffer, np.uint8).reshape(
            SLOTS, nbytes
        )
        self.tier: Any = None

    @abstractmethod
    def open(self, model: str) -> None:
        """Make the tier for a model."""

    @abstractmethod
    def close(self) -> None:
        """Close the tier as an engine does that ends."""

    @abstractmethod
    def store(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        """Store slots under keys, and wait for the end; return which the tier reports as stored."""

    @abstractmethod
    def look(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks the tier reports as there."""

    @abstractmethod
    def load(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        """Load blocks into slots, and wait for the end; return which the tier reports as loaded."""

    def begin(self, loads: bool, keys: Sequence[bytes], slots: Sequence[int]) -> None:
        """Begin a load or a store without waiting for it."""
        raise NoSuchCall(f"calls of a {self.family} return at their end")

    def release_memory(self) -> None:
        """Make the call after which the engine uses the memory for something else."""
        self.close()

    def lease(self, keys: Sequence[bytes]) -> list[bool]:
        """Look blocks up and pin them until a load."""
        raise NoSuchCall(f"{self.family} has no leases")

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove blocks."""
        raise NoSuchCall(f"{self.family} has no call that removes blocks")


def wait_for(find: Callable[[], Result | None]) -> Result:
    """Call a function until it returns a value; the caller's process ends a wait that hangs."""
    while (result := find()) is None:
        time.sleep(PAUSE)
    return result
