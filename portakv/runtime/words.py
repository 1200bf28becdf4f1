# SPDX-License-Identifier: Apache-2.0
"""Status words: pinned int64, one for each transfer in flight, written only on error."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_BATCH = 64  # words allocated at once


class Word:
    """One status word: 0, or the position + 1 of a bad id. Read without synchronising."""

    __slots__ = ("_values", "address", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.address = tensor, tensor.data_ptr()
        values: Any = tensor.numpy()
        self._values = memoryview(values)  # a third of the cost of asking the array

    def read(self) -> int:
        """What stands in the word now."""
        return int(self._values[0])

    def clear(self) -> None:
        """Put 0 back."""
        self._values[0] = 0

    def release(self) -> None:
        """Give the word back; only after everything that may write it has ended."""
        if self._values[0]:
            self._values[0] = 0
        _free.append(self)


_free: deque[Word] = deque()
# Never freed: a launch may still write a word whose transfer was dropped.
_batches: list[torch.Tensor] = []
_bytes: list[npt.NDArray[np.int64]] = []  # the same memory
_CLEAR = bytes(8 * _BATCH)


def acquire() -> Word:
    """A word that holds 0."""
    try:
        return _free.pop()
    except IndexError:
        batch = torch.zeros(_BATCH, dtype=torch.int64, device="cpu").pin_memory()
        _batches.append(batch)
        _bytes.append(batch.numpy())
        words = [Word(batch[i : i + 1]) for i in range(_BATCH)]
        _free.extend(words[1:])
        return words[0]


def any_set() -> bool:
    """True where any word, in use by anybody, does not hold 0; reads them all at once."""
    for batch in _bytes:  # noqa: SIM110 - every transfer asks; a generator is twice as dear
        if batch.tobytes() != _CLEAR:
            return True
    return False
