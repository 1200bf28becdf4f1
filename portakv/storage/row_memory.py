# SPDX-License-Identifier: Apache-2.0
"""The memory of a block store's rows: pinned where a device is there, private or shared."""

from __future__ import annotations

import numpy as np
import torch

from portakv.host import pinned
from portakv.host.shared import unnamed
from portakv.runtime.linux import require_linux

PAGE = 4096  # bytes; O_DIRECT reads to multiples of it


def row_memory(count: int, row_bytes: int, pin: bool, shared: bool) -> tuple[torch.Tensor, bool]:
    """Return rows, uint8 ``[count, row_bytes]``, at a multiple of `PAGE`, and True if they are
    pinned.

    ``shared``: other processes can map them, as `portakv.host.shared.unnamed` describes. Raises
    `HostMemoryError` if there is not enough memory, and `Unsupported` on another system than Linux.
    """
    require_linux("a block store")
    nbytes = count * row_bytes
    pin = pin and pinned.why_not() is None
    with torch.inference_mode(False):  # transfers write it in any mode
        if shared:
            space, pin = _shared(nbytes, row_bytes, pin)
        elif pin:
            buffer = pinned.allocate(nbytes + PAGE, unit=row_bytes)
            pin = buffer.pinned
            space = buffer.tensor
        else:  # numpy asks for large pages, which make the requests of a disk fewer
            space = torch.from_numpy(np.empty(nbytes + PAGE, np.uint8))
        first = -space.data_ptr() % PAGE
        return space[first : first + nbytes].view(-1, row_bytes), pin


def _shared(nbytes: int, unit: int, pin: bool) -> tuple[torch.Tensor, bool]:
    """Return shared memory, uint8 ``[nbytes]``, and True if it is registered with a device."""
    mapping = unnamed(nbytes)  # begins with a page
    if not pin:
        return torch.frombuffer(mapping, dtype=torch.uint8), False
    with pinned.register(mapping, unit=unit) as buffer:
        return buffer.tensor, buffer.pinned  # the tensor retains the registration
