# SPDX-License-Identifier: Apache-2.0
"""Block transfers between the simulated device and the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from portakv_conformance import simdev
from support.block_cases import (
    WAYS,
    Cache,
    block_first,
    layered,
)
from support.simdev_cases import DEVICE, OTHER

SRC, DST = [5, 0, 7, 2, 3], [1, 6, 0, 4, 2]

ORDERED = ["at once", "by layer"]


@pytest.fixture(autouse=True)
def _no_faults_left() -> Any:
    yield
    torch.accelerator.synchronize(DEVICE)
    torch.accelerator.synchronize(OTHER)
    assert not simdev.take_faults()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def settled(*caches: Cache) -> None:
    """Let everything that made the caches end, so that only what a test does is under way."""
    torch.accelerator.synchronize(DEVICE)
    torch.accelerator.synchronize(OTHER)


def pair(store: bool, pin: bool = True, device: torch.device = DEVICE) -> tuple[Cache, Cache]:
    """A source and a destination, in different layouts, one of them on the host."""
    there, here = layered(device), block_first(pin=pin)
    settled()
    return (there, here) if store else (here, there)
