# SPDX-License-Identifier: Apache-2.0
"""Guarding ids with torch operations, for launches whose copy does it in part or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from portakv.backends.strided import Ops, StridedCopy
from portakv.plan.plan import CopyPlan, Move
from portakv.view.index import Index

if TYPE_CHECKING:
    from portakv.view.view import KVView


def guarded_slots(
    view: KVView, index: Index, count: int, device: torch.device, status: torch.Tensor | None
) -> torch.Tensor:
    """The slot of each position, int32 ``[count]`` on ``device``; -1 where an id is past the end,
    which the status word then tells. For ops that skip negative slots; nothing here waits.

    ``view`` has at most 2**31 - 1 slots.
    """
    slots = index.units(count, 1, device)
    bad = slots >= view.slots
    _report(bad, 1, status)
    # Clamped before it is narrowed: of a wild negative number only the low bits would be left.
    return torch.where(bad, -1, slots.clamp(-1)).to(torch.int32)


class GuardedRows:
    """Any plan by torch indexing of whole rows, which can skip nothing: negative and bad ids are
    taken out before. That waits for the device, since a number of tokens depends on it.

    Args:
        element: the widest element to index, in bytes.
    """

    def __init__(self, plan: CopyPlan, device: torch.device, element: int) -> None:
        self._device, ops = device, Ops(element, by_plane=True, holes=False)
        # Where ids are bad, what is left goes by token: units may begin anywhere.
        self._unit = plan.src.block_size if plan.src.opaque else 1
        pieces = CopyPlan(plan.src, plan.dst, self._unit, self._unit, self._unit)
        self._whole, self._pieces = (
            [StridedCopy(nest, x.unit, ops) for nest in x.nests] for x in (plan, pieces)
        )

    def __call__(self, move: Move, status: torch.Tensor | None) -> None:
        copies, indices = self._whole, move[2:4]
        if any(index.ids is not None for index in indices):
            numbers = [index.units(move.count, self._unit, self._device) for index in indices]
            ends = move.src.slots // self._unit, move.dst.slots // self._unit
            bad = (numbers[0] >= ends[0]) | (numbers[1] >= ends[1])
            kept = (~bad & (numbers[0] >= 0) & (numbers[1] >= 0)).nonzero()[:, 0]
            if kept.numel() < bad.numel():
                _report(bad, self._unit, status)
                mine, theirs = (Index(x[kept], self._unit) for x in numbers)
                left = kept.numel() * self._unit
                copies, move = self._pieces, Move(move.src, move.dst, mine, theirs, left)
        for copy in copies:
            copy(move)


def _report(bad: torch.Tensor, unit: int, status: torch.Tensor | None) -> None:
    """Write position + 1 of the first bad unit to the status word, ordered on the stream."""
    if status is not None:
        first = bad.to(torch.int32).argmax() * unit + 1
        status.copy_(torch.where(bad.any(), first, 0).view(1), non_blocking=True)
