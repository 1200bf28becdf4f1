# SPDX-License-Identifier: Apache-2.0
"""Keep short lists of pinned memory, from which kernels read the ids of one launch.

To allocate and to slice such memory by torch for each call takes the host longer than to fill it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from threading import Lock
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

_LISTS = 64  # that a process has; 512 KiB


class PinnedIds:
    """Pinned memory for the ids of one launch, int64.

    Attributes:
        MOST: the most ids of a list.
        address: of the first id, for the host and for kernels.
    """

    MOST: ClassVar = 1024
    #: Lists return here only after everything that may read them has ended.
    _free: ClassVar[deque[PinnedIds]] = deque()
    _reserved: ClassVar = False
    _reserving: ClassVar = Lock()

    __slots__ = ("_memory", "_values", "address")

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self.address = memory.data_ptr()
        # A memoryview, since a slice of it is written in a fifth of an array's time.
        self._values: memoryview = memory.numpy().data

    @classmethod
    def reserve(cls) -> None:
        """Allocate all lists, once. The host may wait for the device: drivers allocate so.

        Without pinned memory there are no lists, and ids are sent.
        """
        with cls._reserving, suppress(RuntimeError):
            if not cls._reserved:
                shape = _LISTS, cls.MOST
                memory = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=True)
                cls._free.extend(cls(each) for each in memory.unbind())
                cls._reserved = True

    @classmethod
    def acquire(cls) -> PinnedIds | None:
        """Return a list that no launch reads; None: all are in use, or none was reserved."""
        try:
            return cls._free.pop()
        except IndexError:
            return None

    def write(self, lists: Iterable[npt.NDArray[np.int64]]) -> None:
        """Write contiguous ids, one list after the other."""
        first = 0
        for ids in lists:
            past = first + ids.size
            self._values[first:past] = ids.data
            first = past

    def release(self) -> None:
        """Let another launch have the memory. Nothing reads it any more."""
        self._free.append(self)
