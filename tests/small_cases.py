# SPDX-License-Identifier: Apache-2.0
"""What tests of small copies send, and whether it arrived."""

from __future__ import annotations

import numpy as np
import torch
from device_cases import DEVICE

from portakv.host import _cuda_driver, _small_inline

INTEGERS = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32,
    torch.int64, torch.uint64,
)  # fmt: skip


def lacking(way: str) -> str | None:
    """What keeps the first CUDA device from having a way."""
    if way == "inline":
        return _small_inline.why_not(DEVICE)
    return None if way == "copy" else _cuda_driver.why_not(DEVICE)


def drawn(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Elements with any bits, on the host."""
    if dtype == torch.bool:
        return torch.arange(count) % 3 == 0
    if not count:
        return torch.empty(0, dtype=dtype)  # numpy's empty array has stride 0, of which no view is
    wide = np.random.default_rng(count).integers(0, 256, count * dtype.itemsize, np.uint8)
    return torch.from_numpy(wide).view(dtype)


def same_bits(landed: torch.Tensor, values: torch.Tensor) -> bool:
    """True where a tensor holds the dtype and the bits of values on the host."""
    return landed.dtype == values.dtype and torch.equal(
        landed.cpu().view(torch.uint8), values.view(torch.uint8)
    )
