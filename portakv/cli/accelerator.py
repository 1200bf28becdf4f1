# SPDX-License-Identifier: Apache-2.0
"""The accelerator that a command was asked about."""

from __future__ import annotations

import torch

from portakv.errors import DeviceMismatch
from portakv.runtime.devices import usable_device, usual_device


def accelerator_asked(name: str | None) -> torch.device | None:
    """The accelerator of that name, with its index; by default this machine's. None: the CPU.

    Raises:
        DeviceMismatch: torch cannot use it, or it has no memory to copy from.
    """
    device = usual_device() if name is None else usable_device(name)
    if device.type == "cpu":
        return None
    if device.index is not None:
        return device
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if present is None or present.type != device.type:
        raise DeviceMismatch(
            f"Device {name!r} was asked about copies between it and the host, but torch does not "
            f"take it for an accelerator here; name one that torch.accelerator lists."
        )
    return torch.device(device.type, torch.accelerator.current_device_index())
