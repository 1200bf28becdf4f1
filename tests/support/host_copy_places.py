# SPDX-License-Identifier: Apache-2.0
"""Tensors of one shape by what holds them, for tests of plain copies on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from support.guarded_memory import filled

Make = Callable[[], torch.Tensor]


class Places(NamedTuple):
    """Makers of tensors by name, and the pairs (destination, source) with a device among them."""

    hosts: dict[str, Make]
    devices: dict[str, Make]
    pairs: list[tuple[str, str]]

    @property
    def all(self) -> dict[str, Make]:
        return self.hosts | self.devices


def places(
    rows: int,
    width: int,
    pinned: Callable[..., torch.Tensor],
    there: Callable[..., torch.Tensor],
) -> Places:
    """int32 tensors of shape (rows, width); ``pinned`` and ``there`` make one of a shape in pinned
    memory and on the device."""
    hosts: dict[str, Make] = {
        "pageable": lambda: filled((rows, width), torch.int32),
        "pageable rows": lambda: filled((rows, 2 * width), torch.int32)[:, :width],
        "pinned": lambda: pinned(rows, width),
        "pinned rows": lambda: pinned(rows, 2 * width)[:, width:],
        "pinned columns": lambda: pinned(width, rows).t(),
        "pinned elements": lambda: pinned(rows, 2 * width)[:, ::2],
    }
    devices: dict[str, Make] = {
        "device": lambda: there(rows, width),
        "device rows": lambda: there(rows, 2 * width)[:, :width],
        "device columns": lambda: there(width, rows).t(),
        "device elements": lambda: there(rows, 2 * width)[:, 1::2],
    }
    either = [*hosts, *devices]
    pairs = [(dst, src) for dst in either for src in either if dst in devices or src in devices]
    return Places(hosts, devices, pairs)


def rest_of(view: torch.Tensor) -> torch.Tensor:
    """All bytes of a view's storage with its own elements cleared."""
    whole = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    there = whole.cpu().clone()
    there.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
    return there
