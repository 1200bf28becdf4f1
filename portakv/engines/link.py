# SPDX-License-Identifier: Apache-2.0
"""Crossings: what puts pieces of memory on the link between a device and the host."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch

from portakv.engines import link_cuda as _crossing_cuda
from portakv.engines._crossing_torch import TorchCrossing
from portakv.engines.pieces import Pieces, fold
from portakv.view.view import KVView

__all__ = ["Crossing", "Pieces", "by_torch", "crossing", "fold"]


class Crossing(Protocol):
    """Puts pieces on the link of one device; any thread may call it.

    Attributes:
        fold_below: bytes; narrower rows are worth folding into 2-D copies, wider ones only where
            they are many: they cross faster as copies of their own.
    """

    fold_below: int

    def copy(
        self, pieces: Pieces, src: KVView, dst: KVView, stream: torch.Stream | None = None
    ) -> None:
        """Copy the pieces, ordered on ``stream`` (None: the device's current one).

        The host does not wait, except where memory is pageable or a device's torch knows no other
        way. Who calls holds the memory of both views until the copy has ended.

        Raises:
            TransferError: the driver refuses; some of the pieces may have been moved.
        """


def by_torch(device: torch.device) -> bool:
    """True where runs cross the link of a device by calls of its torch, each at a call's cost."""
    return _crossing_cuda.why_not(device) is not None


@cache
def crossing(device: torch.device) -> Crossing:
    """What crosses the link of a device: CUDA's driver by itself, else the device's torch."""
    return TorchCrossing(device) if by_torch(device) else _crossing_cuda.CudaCrossing(device)
