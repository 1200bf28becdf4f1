# SPDX-License-Identifier: Apache-2.0
"""Keep short lists in pinned memory, from which kernels read the ids of one launch.

To allocate and to slice such memory by torch for each call takes the host longer than to fill it.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from portakv.runtime.once import making

_LAUNCHES = 64  # whose ids a process has memory for; 1 MiB


class PinnedIds:
    """Pinned memory for the ids of both sides of one launch, int64.

    Attributes:
        MOST: the most ids of a side.
        address: of the memory of both sides, which follow each other.
    """

    MOST: ClassVar = 1024
    #: Memory returns here only after everything that may read it has ended.
    _free: ClassVar[deque[PinnedIds]] = deque()
    _reserved: ClassVar = False

    __slots__ = ("_sides", "address")

    def __init__(self, memory: torch.Tensor) -> None:
        self.address = memory.data_ptr()
        # With each tensor a memoryview, since a slice of it is written in a fifth of an array's
        # time.
        self._sides = [(each, each.numpy().data) for each in memory.unbind()]

    @classmethod
    def reserve(cls) -> None:
        """Allocate all memory, once. The host may wait for the device: drivers allocate so.

        Without pinned memory ids are sent.
        """
        with making(), suppress(RuntimeError):
            if not cls._reserved:
                shape = _LAUNCHES, 2, cls.MOST
                memory = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=True)
                cls._free.extend(cls(each) for each in memory.unbind())
                cls._reserved = True

    @classmethod
    def acquire(cls) -> PinnedIds | None:
        """Return memory that no launch reads; None: all is in use, or none was reserved."""
        try:
            return cls._free.pop()
        except IndexError:
            return None

    def write(self, side: int, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """Write the contiguous ids of a side, 0 or 1, and return a tensor that begins with them."""
        memory, values = self._sides[side]
        values[: ids.size] = ids.data
        return memory

    def release(self) -> None:
        """Let another launch have the memory. Nothing reads it any more."""
        self._free.append(self)
