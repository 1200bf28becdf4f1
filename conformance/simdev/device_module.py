# SPDX-License-Identifier: Apache-2.0
"""The module that torch shows as ``torch.simdev`` (or ``torch.npu``, ``torch.mlu``); it reports
that it is emulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import accelerator

EMULATED = True
Event = torch.Event
current_device = accelerator.current_device_index
current_stream = accelerator.current_stream
set_stream = accelerator.set_stream
synchronize = accelerator.synchronize


def Stream(device: object = None, priority: int = 0) -> torch.Stream:
    """A new stream of a device, by default of the current one."""
    return torch.Stream(device=_device(device), priority=priority)


def is_available() -> bool:
    """Return True: a caller has loaded the device, and there is nothing to initialise."""
    return True


is_initialized = is_available


def device_count() -> int:
    """Return the number of simulated devices."""
    return int(torch.ops.portakv_simdev.device_count())


def set_device(device: object) -> None:
    """Make a device the current one."""
    accelerator.set_device_index(_device(device).index)


@contextmanager
def device(device: object) -> Iterator[None]:
    """Make a device the current one in a block."""
    before = current_device()
    set_device(device)
    try:
        yield
    finally:
        accelerator.set_device_index(before)


def get_device_name(device: object = None) -> str:
    """Return a name that says that the device is simulated."""
    return f"simulated accelerator {_device(device)} (emulated on the CPU)"


def default_stream(device: object = None) -> torch.Stream:
    """Return stream 0 of a device."""
    where = _device(device)
    kind = accelerator.current_stream(where).device_type
    return torch.Stream(stream_id=0, device_index=where.index, device_type=kind)


@contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Make a stream and its device the current ones in a block; None changes nothing."""
    if stream is None:
        yield
        return
    there = accelerator.current_stream(stream.device)
    before = current_device()
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(there)
        accelerator.set_device_index(before)


def manual_seed(seed: int) -> None:
    """Do nothing: random numbers come from the CPU's generator."""


manual_seed_all = manual_seed


def _is_in_bad_fork() -> bool:
    return False


def _device(device: Any) -> torch.device:
    kind = torch._C._get_privateuse1_backend_name()
    if device is None:
        return torch.device(kind, current_device())
    result = torch.device(kind, device) if isinstance(device, int) else torch.device(device)
    return result if result.index is not None else torch.device(result.type, current_device())
