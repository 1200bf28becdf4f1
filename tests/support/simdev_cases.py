# SPDX-License-Identifier: Apache-2.0
"""The simulated device in tests: its two devices, and caches on them.

Tests marked ``simdev`` find it loaded. It is ``simdev`` unless the environment variable
``SIMDEV_NAME`` says otherwise, in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from portakv_conformance import simdev
from support.device_cases import host_bytes
from support.guarded_memory import filled

#: The name that the device carries in this process once it is loaded.
NAME = os.environ.get("SIMDEV_NAME", "simdev")
# torch's own name for the kind of device, which holds before and after it has another one.
DEVICE = torch.device("privateuseone", 0)
OTHER = torch.device("privateuseone", 1)
if "SIMDEV_NAME" in os.environ:
    simdev.load(NAME)
LAYERS, BLOCKS, SIZE, HEADS, DIM = 3, 6, 4, 2, 16
SLOTS = BLOCKS * SIZE
IDS = [9, 2, 17, 6, 0]


def current(device: torch.device = DEVICE) -> torch.Stream:
    """The current stream of a device."""
    return torch.accelerator.current_stream(device)


def on(stream: torch.Stream) -> Any:
    """Inside, a stream is the current one."""
    return torch.get_device_module(stream.device).stream(stream)


def make_caches(device: torch.device = DEVICE) -> list[torch.Tensor]:
    """A list over layers of ``(2, BLOCKS, SIZE, HEADS, DIM)``."""
    shape = (2, BLOCKS, SIZE, HEADS, DIM)
    return [filled(shape, torch.float16, device=device) for _ in range(LAYERS)]


def make_chunk(tokens: int, device: torch.device | str = DEVICE) -> torch.Tensor:
    """A chunk ``[2, LAYERS, tokens, HEADS * DIM]``."""
    return filled((2, LAYERS, tokens, HEADS * DIM), torch.float16, device=device)


def fresh_caches(device: torch.device = DEVICE) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Caches, and others with the bytes that a producer will give them."""
    return make_caches(device), make_caches(device)


def produce(caches: Sequence[torch.Tensor], fresh: Sequence[torch.Tensor]) -> None:
    """Give caches other bytes, on the current stream."""
    for cache, new in zip(caches, fresh, strict=True):
        cache.copy_(new)


def differ(tensor: torch.Tensor, wanted: torch.Tensor) -> bool:
    """True where a tensor does not hold the wanted bytes."""
    return not torch.equal(host_bytes(tensor), wanted)
