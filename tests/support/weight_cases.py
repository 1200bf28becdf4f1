# SPDX-License-Identifier: Apache-2.0
"""Tensors of a model's weights, and the parts of them that ranks have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


def whole_of(shape: Sequence[int]) -> Array:
    """Return a tensor whose elements are all different."""
    return np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.int32).reshape(shape)


def rank_of(part: Array, axis: int, rank: int, size: int, unit: int) -> Array:
    """Return a rank's share of one part: whole units, shared if there are fewer than ranks."""
    units = part.shape[axis] // unit
    first = units * rank // size
    past = max(first + 1, units * (rank + 1) // size)
    return part.take(range(first * unit, past * unit), axis)


def local_of(
    whole: Array, axis: int, parts: Sequence[int], rank: int, size: int, unit: int
) -> Array:
    """Return a rank's part of a fused tensor: its share of each part, one after the other."""
    cut = np.split(whole, np.cumsum(parts)[:-1], axis)
    return np.concatenate([rank_of(part, axis, rank, size, unit) for part in cut], axis)
