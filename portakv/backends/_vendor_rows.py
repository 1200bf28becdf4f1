# SPDX-License-Identifier: Apache-2.0
"""Helpers for vendors' ops, which take whole planes, and guard ids in part or not at all.

They check that a plane is in the order that an op takes, without gaps, and guard ids by torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from portakv.backends.strided import Ops, StridedCopy
from portakv.plan.plan import CopyPlan, Move
from portakv.view.form import Form, KVRows
from portakv.view.index import Index
from portakv.view.view import KVView

#: Orders of a plane's axes, outermost first. With ``kv``, keys and values alternate.
HND = ("block", "head", "token", "dim")
HND_IN_BLOCKS = ("block", "kv", "head", "token", "dim")
TOKENS = ("token", "head", "dim")


def packed(form: Form, order: Sequence[str]) -> bool:
    """Return True if each plane of ``form`` has its axes in ``order``, without a gap.

    Layers may lie anywhere.
    """
    if form.opaque or form.paged != ("block" in order):
        return False
    extents = {"block": 0, "kv": form.kv, "head": form.heads, "token": form.block_size}
    for part, width in zip(form.parts, form.widths, strict=True):
        stride = 1
        for name in reversed(order):
            extent = extents.get(name, width)
            if name != "kv" and steps(part, name) != [(extent, 0, stride)] * (extent != 1):
                return False
            stride *= extent
    return True


def steps(part: KVRows, axis: str) -> list[tuple[int, int, int]]:
    """Return the steps of an axis as (extent, entries of the table, bytes), outermost first."""
    return [(step.extent, step.table, step.stride) for step in part.axis(axis)]


def by_ids_first(move: Move) -> tuple[KVView, Index, KVView, Index]:
    """Return the side of a copy that has ids and its index, then the other side and its index."""
    src, dst, src_index, dst_index, _ = move
    if src_index.ids is None:
        return dst, dst_index, src, src_index
    return src, src_index, dst, dst_index


def apart(form: Form) -> int | None:
    """Return the bytes from key to value, if one address leads to both; else None."""
    if form.kv != 2:
        return None
    first, second = form.parts
    alike = (first.table, first.layer) == (second.table, second.layer)
    return second.offset - first.offset if alike else None


def planes(view: KVView, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Return for each layer the planes of each kv, as `KVView.plane` makes them; cached in the
    view."""
    key = (planes, dtype)
    if key not in view.derived:
        with torch.inference_mode(False):  # an inference tensor could not be written elsewhere
            view.derived[key] = [
                [view.plane(layer, kv, dtype) for kv in range(view.kv)]
                for layer in range(view.layers)
            ]
    return view.derived[key]  # type: ignore[no-any-return]


def guarded_slots(
    view: KVView, index: Index, count: int, device: torch.device, status: torch.Tensor | None
) -> torch.Tensor:
    """Return the slot of each position, int32 ``[count]`` on ``device``; -1 for an id past the end.

    The first bad id is reported in the status word. For ops that skip negative slots; the host does
    not wait. ``view`` has at most 2**31 - 1 slots.
    """
    slots = index.units(count, 1, device)
    bad = slots >= view.slots
    _report(bad, 1, status)
    # Clamp before narrowing, which keeps only the low bits of a large negative number.
    return torch.where(bad, -1, slots.clamp(-1)).to(torch.int32)


class GuardedRows:
    """Execute any plan by torch indexing of whole rows, in elements of at most ``element`` bytes.

    Indexing skips nothing: negative and bad ids are removed before it. The host waits for the
    device, since the number of tokens depends on the ids.
    """

    def __init__(self, plan: CopyPlan, device: torch.device, element: int) -> None:
        self._device = device
        ops = Ops(element, by_plane=True, holes=False)
        # If ids are bad, the remaining rows go by token: units may begin anywhere.
        self._unit = plan.src.block_size if plan.src.opaque else 1
        pieces = CopyPlan(plan.src, plan.dst, self._unit, self._unit, self._unit)
        self._whole, self._pieces = (
            [StridedCopy(nest, x.unit, ops) for nest in x.nests] for x in (plan, pieces)
        )

    def __call__(self, move: Move, status: torch.Tensor | None) -> None:
        copies = self._whole
        indices = (move.src_index, move.dst_index)
        if any(index.ids is not None for index in indices):
            numbers = [index.units(move.count, self._unit, self._device) for index in indices]
            ends = move.src.slots // self._unit, move.dst.slots // self._unit
            bad = (numbers[0] >= ends[0]) | (numbers[1] >= ends[1])
            good = (~bad & (numbers[0] >= 0) & (numbers[1] >= 0)).nonzero()[:, 0]
            if good.numel() < bad.numel():
                _report(bad, self._unit, status)
                src_index, dst_index = (Index(x[good], self._unit) for x in numbers)
                tokens = good.numel() * self._unit
                copies = self._pieces
                move = Move(move.src, move.dst, src_index, dst_index, tokens)
        for copy in copies:
            copy(move)


def _report(bad: torch.Tensor, unit: int, status: torch.Tensor | None) -> None:
    """Write position + 1 of the first bad unit to the status word, ordered on the stream."""
    if status is not None:
        first = bad.to(torch.int32).argmax() * unit + 1
        status.copy_(torch.where(bad.any(), first, 0).view(1), non_blocking=True)
