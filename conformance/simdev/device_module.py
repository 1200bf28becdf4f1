# SPDX-License-Identifier: Apache-2.0
"""What torch shows as ``torch.simdev`` (or ``torch.npu``, ``torch.mlu``): emulated, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

EMULATED = True

Event = torch.Event


def Stream(device: Any = None, priority: int = 0) -> torch.Stream:
    """A new stream of a device, by default of the current one."""
    return torch.Stream(device=_device(device), priority=priority)


def is_available() -> bool:
    """True: who can ask has loaded it."""
    return True


def is_initialized() -> bool:
    """True: there is nothing to initialise."""
    return True


def device_count() -> int:
    """The number of simulated devices."""
    return int(torch.ops.portakv_simdev.device_count())


def current_device() -> int:
    """The index of the current device."""
    return torch.accelerator.current_device_index()


def set_device(device: Any) -> None:
    """Make a device the current one."""
    torch.accelerator.set_device_index(_device(device).index)


@contextmanager
def device(device: Any) -> Iterator[None]:
    """Inside, a device is the current one."""
    before = current_device()
    set_device(device)
    try:
        yield
    finally:
        torch.accelerator.set_device_index(before)


def get_device_name(device: Any = None) -> str:
    """A name that says what it is."""
    return f"simulated accelerator {_device(device)} (emulated on the CPU)"


def synchronize(device: Any = None) -> None:
    """Wait for all streams of a device."""
    torch.accelerator.synchronize(_device(device))


def current_stream(device: Any = None) -> torch.Stream:
    """The current stream of a device."""
    return torch.accelerator.current_stream(_device(device))


def default_stream(device: Any = None) -> torch.Stream:
    """Stream 0 of a device."""
    where = _device(device)
    kind = current_stream(where).device_type
    return torch.Stream(stream_id=0, device_index=where.index, device_type=kind)


def set_stream(stream: torch.Stream) -> None:
    """Make a stream, and its device, the current ones."""
    torch.accelerator.set_stream(stream)


@contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Inside, a stream and its device are the current ones; None changes nothing."""
    if stream is None:
        yield
        return
    there = torch.accelerator.current_stream(stream.device)
    before = current_device()
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(there)
        torch.accelerator.set_device_index(before)


def manual_seed(seed: int) -> None:
    """Nothing: random numbers come from the CPU's generator."""


def manual_seed_all(seed: int) -> None:
    """Nothing: random numbers come from the CPU's generator."""


def _is_in_bad_fork() -> bool:
    return False


def _device(device: Any) -> torch.device:
    kind = torch._C._get_privateuse1_backend_name()
    if device is None:
        return torch.device(kind, current_device())
    found = torch.device(kind, device) if isinstance(device, int) else torch.device(device)
    return found if found.index is not None else torch.device(found.type, current_device())
