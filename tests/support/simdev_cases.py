# SPDX-License-Identifier: Apache-2.0
"""The simulated device for tests that need nothing else: its two devices and their streams.

Tests marked ``simdev`` find it loaded. It is ``simdev`` unless the environment variable
``SIMDEV_NAME`` has another name, in a separate process.
"""

from __future__ import annotations

import os

import torch

from portakv_conformance import simdev

#: The name that the device carries in this process once it is loaded.
NAME = os.environ.get("SIMDEV_NAME", "simdev")
# torch's own name for the kind of device, which holds before and after it has another one.
DEVICE = torch.device("privateuseone", 0)
OTHER = torch.device("privateuseone", 1)
if "SIMDEV_NAME" in os.environ:
    simdev.load(NAME)


def current(device: torch.device = DEVICE) -> torch.Stream:
    """Return the current stream of a device."""
    return torch.accelerator.current_stream(device)
