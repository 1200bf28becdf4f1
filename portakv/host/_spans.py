# SPDX-License-Identifier: Apache-2.0
"""Which bytes a tensor, an array or another buffer covers, and who holds them."""

from __future__ import annotations

from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import torch

from portakv.errors import DeviceMismatch, HostMemoryError
from portakv.host._pages import Span


def span(memory: Any) -> tuple[int, int, bool, Any]:
    """The address, the bytes from the first to behind the last, whether they can only be read,
    and what to hold so that they stay.

    Raises:
        HostMemoryError: freed, empty, pinned already, or no memory at all.
        DeviceMismatch: a tensor that is not on the host.
    """
    if isinstance(memory, torch.Tensor):
        return _of_tensor(memory)
    if isinstance(memory, np.ndarray):
        return _of_array(memory, memory)
    # Both ask the owner for a buffer, which it cannot close while that is held.
    buffer = memory.buf if isinstance(memory, SharedMemory) else memory
    try:
        if buffer is None:
            raise ValueError("it is closed")
        view = memoryview(buffer)
    except ValueError as error:
        raise HostMemoryError(
            f"A {type(memory).__name__} was asked to be registered, and it was freed before "
            f"({error}); register memory before it is closed."
        ) from None
    except TypeError:
        raise HostMemoryError(
            f"A {type(memory).__name__} was asked to be registered; expected a tensor, an array, "
            f"an mmap, shared memory or anything else with a buffer."
        ) from None
    return _of_array(np.asarray(view), view)


def as_tensor(given: Span) -> torch.Tensor:
    """The bytes as a tensor, uint8 ``[nbytes]``, that holds the span."""
    return torch.from_numpy(given.array())


def _of_tensor(tensor: torch.Tensor) -> tuple[int, int, bool, Any]:
    if tensor.device.type != "cpu":
        raise DeviceMismatch(
            f"A tensor on {tensor.device} was asked to be registered; expected memory of the host. "
            f"Copy it there first."
        )
    if tensor.layout != torch.strided:
        raise HostMemoryError(
            f"A tensor of layout {tensor.layout} was asked to be registered; expected a strided "
            f"one. Register its parts."
        )
    _refuse_empty(tensor.numel())
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    if tensor.untyped_storage().nbytes() < needed:
        raise HostMemoryError(
            f"A tensor of {needed} bytes was asked to be registered, and its storage holds "
            f"{tensor.untyped_storage().nbytes()}: it was freed before. Register it earlier."
        )
    if tensor.is_pinned():
        raise HostMemoryError(
            f"{needed} bytes at {tensor.data_ptr():#x} were asked to be registered, and they are "
            f"pinned already, here or by torch; use them as they are."
        )
    return tensor.data_ptr(), (last + 1) * tensor.element_size(), False, tensor


def _of_array(array: Any, held: Any) -> tuple[int, int, bool, Any]:
    _refuse_empty(array.nbytes)
    reach = [(size - 1) * step for size, step in zip(array.shape, array.strides, strict=True)]
    low = sum(step for step in reach if step < 0)
    high = sum(step for step in reach if step > 0) + array.itemsize
    return array.ctypes.data + low, high - low, not array.flags.writeable, held


def _refuse_empty(size: int) -> None:
    if size == 0:
        raise HostMemoryError(
            "Memory of 0 bytes was asked to be registered; there is nothing to pin. Leave it out."
        )
