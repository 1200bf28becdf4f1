# SPDX-License-Identifier: Apache-2.0
"""Streams that are nobody else's.

Torch hands out 32 streams of a priority in turns: one that it gives to the library may be a
caller's as well, whose copies then stand behind every transfer, or serve the library twice, so that
both directions of the link wait for each other. On an NVIDIA device the library makes its own by
the driver, and uses one again when whoever had it is gone.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from functools import cache
from typing import Any

import torch

from portakv.errors import TransferError
from portakv.runtime import _libcuda
from portakv.runtime import cuda as _cuda_driver

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it does not wait for the legacy default stream

# Handles that nobody has. The one that was given back last comes first, since staging is kept for
# it. No lock: what gives one back may run wherever memory is collected.
_free: defaultdict[tuple[torch.device, int], list[int]] = defaultdict(list)


def own_stream(device: torch.device, priority: int = 0) -> Any:
    """A stream of the device's own kind, which nobody else has for as long as this object lives.

    On devices that the CUDA driver does not serve, or whose driver's library cannot be used, it is
    one of torch's.

    Args:
        device: with its index.
        priority: as torch takes it; -1 is above 0.

    Raises:
        TransferError: the driver makes no more.
    """
    create = _create_function() if _cuda_driver.no_cuda(device) is None else None
    if create is None:
        make = getattr(torch.get_device_module(device), "Stream", torch.Stream)
        return make(device, priority=priority) if priority else make(device)
    free = _free[device, priority]
    try:
        handle = free.pop()
    except IndexError:
        handle = 0
    return _wrapped(handle or _new(create, device, priority), device, free)


class _Own(torch.cuda.ExternalStream):
    """Gives its handle back with its end. (Not by a weak reference: of those torch 2.11's streams
    know nothing when they end, and the interpreter falls over them.)"""

    lent: tuple[list[int], int]

    def __del__(self) -> None:
        free, handle = self.lent
        free.append(handle)


def _wrapped(handle: int, device: torch.device, free: list[int]) -> Any:
    make: Any = _Own
    stream = make(handle, device=device)
    stream.lent = free, handle
    return stream


@cache
def _create_function() -> Any:
    """The driver's function; None where it cannot be had."""
    arguments = ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint, ctypes.c_int
    try:
        return _libcuda.function(_libcuda.library(), "cuStreamCreateWithPriority", *arguments)
    except (OSError, AttributeError):
        return None


def _new(create: Any, device: torch.device, priority: int) -> int:
    handle = ctypes.c_void_p()
    _cuda_driver.adopt(device)
    with torch.cuda.device(device):
        error = create(ctypes.byref(handle), _NON_BLOCKING, priority)
    if error:
        name = _libcuda.error_name(error, _libcuda.library())
        raise TransferError(
            f"A stream of {device} was asked of the CUDA driver, which answered {name}; one was "
            f"expected. Check earlier errors, and the memory that the device has left."
        )
    return handle.value or 0
