# SPDX-License-Identifier: Apache-2.0
"""How far each backend was verified, for `portakv backends`: from the suite's ladder."""

from __future__ import annotations

import platform
from collections.abc import Iterable

import torch

from portakv.runtime.devices import device_name


def verified(names: Iterable[str], device: torch.device | str) -> dict[str, str]:
    """For each backend of that name how far it was verified, on ``device`` or elsewhere; a device
    that is not here is a name.

    ``R6``, ``R3 on mlu, emulated``, ``expired R6 on NVIDIA H200``. Empty without the suite, which a
    bare installation on Python 3.10 cannot read.
    """
    try:
        from portakv_conformance.evidence import ladder
    except ImportError:
        return {}
    rungs = ladder.read()
    return {name: ladder.told(name, _listed(device), rungs) for name in names}


def _listed(device: torch.device | str) -> str:
    """A device as the ladder names it."""
    from portakv_conformance.evidence.ladder import cpu_name

    if isinstance(device, str):
        return device
    if device.type == "cpu":
        return cpu_name(platform.machine())
    if getattr(torch.get_device_module(device), "EMULATED", False):
        return f"{device.type}, emulated"
    return device_name(device)
