# SPDX-License-Identifier: Apache-2.0
"""Streams that are nobody else's.

Torch hands out 32 streams of a priority in turns: one that it gives to the library may be a
caller's as well, whose copies then stand behind every transfer. On an NVIDIA device the library
makes streams of its own by the driver, as many at most, and takes those in turns.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch

from . import _cuda_driver, _libcuda

_MOST = 32  # of a device and priority
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it does not wait for the legacy default stream

_lock = threading.Lock()
_made: dict[tuple[torch.device, int], list[Any]] = {}
_turns: dict[tuple[torch.device, int], int] = {}


def own_stream(device: torch.device, priority: int = 0) -> Any:
    """A stream of the device's own kind, which torch gives to nobody else.

    On devices that the CUDA driver does not serve it is one of torch's.

    Args:
        device: with its index.
        priority: as torch takes it; -1 is above 0.
    """
    if _cuda_driver.no_cuda(device) is not None:
        module = torch.get_device_module(device)
        return module.Stream(device, priority=priority) if priority else module.Stream(device)
    key = device, priority
    with _lock:
        made = _made.setdefault(key, [])
        if len(made) < _MOST:
            made.append(_new(device, priority))
            return made[-1]
        _turns[key] = turn = (_turns.get(key, -1) + 1) % _MOST
        return made[turn]


def _new(device: torch.device, priority: int) -> Any:
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
    return torch.cuda.ExternalStream(handle.value, device=device)
