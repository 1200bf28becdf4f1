# SPDX-License-Identifier: Apache-2.0
"""Streams that are nobody else's.

Torch hands out 32 streams of a priority in turns: one that it gives to the library may be a
caller's as well, whose copies then stand behind every transfer, or serve the library twice, so that
both directions of the link wait for each other. On an NVIDIA device the library makes its own by
the driver, and uses one again when whoever had it is gone.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict, deque
from typing import Any

import torch

from . import _cuda_driver, _libcuda

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it does not wait for the legacy default stream

# Handles that nobody has; the one that was given back first comes first. No lock: what gives one
# back may run wherever memory is collected.
_free: defaultdict[tuple[torch.device, int], deque[int]] = defaultdict(deque)


def own_stream(device: torch.device, priority: int = 0) -> Any:
    """A stream of the device's own kind, which nobody else has for as long as this object lives.

    On devices that the CUDA driver does not serve it is one of torch's.

    Args:
        device: with its index.
        priority: as torch takes it; -1 is above 0.
    """
    if _cuda_driver.no_cuda(device) is not None:
        module = torch.get_device_module(device)
        return module.Stream(device, priority=priority) if priority else module.Stream(device)
    free = _free[device, priority]
    try:
        handle = free.popleft()
    except IndexError:
        handle = _new(device, priority)
    make: Any = _Own
    stream = make(handle, device=device)
    stream.free = free
    return stream


class _Own(torch.cuda.ExternalStream):
    """Gives its handle back with its end. (Not by a weak reference: of those torch 2.11's streams
    know nothing when they end, and the interpreter falls over them.)"""

    free: deque[int]

    def __del__(self) -> None:
        self.free.append(self.cuda_stream)


def _new(device: torch.device, priority: int) -> int:
    handle = ctypes.c_void_p()
    create = _libcuda.function(
        _libcuda.library(), "cuStreamCreateWithPriority",
        ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint, ctypes.c_int,
    )  # fmt: skip
    _cuda_driver.adopt(device)
    with torch.cuda.device(device):
        error = create(ctypes.byref(handle), _NON_BLOCKING, priority)
    if error:
        name = _libcuda.error_name(error, _libcuda.library())
        raise _cuda_driver.refused(name, "A stream")
    return handle.value or 0
