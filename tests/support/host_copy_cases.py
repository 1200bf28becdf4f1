# SPDX-License-Identifier: Apache-2.0
"""Plain copies on the simulated device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from portakv_conformance import simdev
from support.guarded_memory import filled
from support.simdev_cases import DEVICE, OTHER

REPEATS = 20


@pytest.fixture(autouse=True)
def _no_faults_left() -> Any:
    yield
    torch.accelerator.synchronize(DEVICE)
    torch.accelerator.synchronize(OTHER)
    assert not simdev.take_faults()


def device_tensor(*shape: int, device: torch.device = DEVICE) -> torch.Tensor:
    return filled(shape, torch.int32, device=device)
