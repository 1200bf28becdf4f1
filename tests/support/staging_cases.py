# SPDX-License-Identifier: Apache-2.0
"""Engines on the simulated device with small slices, and with staging that breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from portakv import KVView
from portakv.engines import slices as schedule
from support.engine_cases import leaves, mapped, tensors_of, view_of
from support.simdev_cases import DEVICE

PAGED, CHUNK = "layer | kv block token head dim", "kv layer token (head dim)"

TOKENS, FIRST = 40, 100


def sides(tokens: int = TOKENS) -> tuple[KVView, KVView]:
    """Rows of the device, and of pinned memory."""
    there = mapped(tensors_of(PAGED, 0, 1), lambda tensor: tensor.to(DEVICE))
    return view_of(there, PAGED), view_of(tensors_of(CHUNK, tokens, 2).pin_memory(), CHUNK)


def moved(rows: KVView, tokens: int = TOKENS) -> torch.Tensor:
    """The device's rows that the transfers of this file read or write, as a chunk."""
    last = FIRST + tokens
    flat = [layer.cpu().flatten(1, 2)[:, FIRST:last].flatten(2) for layer in leaves(rows.tensors)]
    return torch.stack(flat, 1)


def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("LARGEST", 2048), ("SMALLEST", 512), ("WHOLE", 0)):
        monkeypatch.setattr(schedule, name, size)


def broken_at(nth: int, copy: Callable[..., None]) -> Callable[..., None]:
    """A copy across the link whose ``nth`` call fails."""
    calls = list[None]()

    def failing(*arguments: Any) -> None:
        calls.append(None)
        if len(calls) == nth:
            raise RuntimeError("the link is down")
        copy(*arguments)

    return failing


def full(*_sizes: Any, **_how: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("the device is full")
