# SPDX-License-Identifier: Apache-2.0
"""Whether work is being captured into a graph just now."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

_HOST = torch.device("cpu")


def capturing(device: torch.device) -> bool:
    """True while the current stream of ``device`` is captured into a graph."""
    if device == _HOST or torch.accelerator.current_device_index() == device.index:
        return capture_question(device)()
    with torch.get_device_module(device).device(device):
        return capture_question(device)()


@cache
def capture_question(device: torch.device) -> Callable[[], bool]:
    """What answers `capturing` for a device while it is the current one."""
    if device.type == "cuda":
        # What torch.cuda's function of that name calls, at a third of its cost.
        return torch._C._cuda_isCurrentStreamCapturing
    module = None if device == _HOST else torch.get_device_module(device)
    return getattr(module, "is_current_stream_capturing", None) or _never


def ignore_captures_elsewhere(device: torch.device) -> None:
    """Let this thread work while another one captures a graph; for as long as the thread lives.

    CUDA forbids other threads much, `torch.cuda.Event.query` for one, and ends the capture where
    one of them does it. Of other devices no such way is known here.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return
    try:
        exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return
    exchange(ctypes.byref(ctypes.c_int(1)))  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


def _never() -> bool:
    return False
