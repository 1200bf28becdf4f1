# SPDX-License-Identifier: Apache-2.0
"""The devices of this machine, as the command line names them."""

from __future__ import annotations

import platform

import torch

from portakv.errors import DeviceMismatch


def devices_present() -> list[torch.device]:
    """One device of each type that this machine has: the CPU, then the accelerator, if any."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        if kind is not None:
            found.append(torch.device(kind.type, torch.accelerator.current_device_index()))
    return found


def usual_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return devices_present()[-1]


def usable_device(text: str) -> torch.device:
    """The device of that name, after asking torch for memory on it.

    Raises:
        DeviceMismatch: torch does not know the device, or cannot use it here.
    """
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except Exception as error:  # torch says it in a different type for each device
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        present = ", ".join(map(str, devices_present()))
        raise DeviceMismatch(
            f"Device {text!r} was asked, but torch cannot use it here ({why}); this machine has "
            f"{present}."
        ) from error
    return device


def device_count(device: torch.device) -> int:
    """How many devices of that type there are."""
    return 1 if device.type == "cpu" else torch.accelerator.device_count()


def device_name(device: torch.device) -> str:
    """The model's name where torch tells it, else the machine's architecture or nothing."""
    if device.type == "cpu":
        return platform.machine()
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(ask(device)) if ask else ""
