# SPDX-License-Identifier: Apache-2.0
"""`reference` packs and unpacks: rows to dense planes, planes to slots, and slots to their places.

The copies to and from dense memory are those of rows, so that every layout works on the raw side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from portakv.backends.base import MoveLaunch
from portakv.backends.pack_planes import pack_planes, unpack_planes
from portakv.plan.packing import PackPlan
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.devices import inside
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

#: The most values that are packed together, which bounds the temporary memory.
MOST_VALUES = 4 << 20
#: Return the launch of a plan of rows.
RowsLaunch = Callable[[CopyPlan], MoveLaunch]


class ReferencePack:
    """The launch of a plan that packs or unpacks; see `base.PackLaunch`."""

    tables = False, False

    def __init__(self, plan: PackPlan, device: torch.device, launch_of: RowsLaunch) -> None:
        self._plan = plan
        self._device = device
        self._launch_of = launch_of
        self._launches: dict[tuple[Form, Form, int, int, int], MoveLaunch] = {}
        raw = plan.raw
        self._planes = plan.packed.encoding
        self._planes_of_block = raw.layers * raw.heads
        values = self._planes_of_block * sum(plane.values for plane in self._planes)
        self._most_blocks = max(1, MOST_VALUES // values)

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
        overflow: torch.Tensor,
    ) -> None:
        """See `base.PackLaunch`. Ids must be clean; ``status`` is not written."""
        move = Move(src, dst, src_index, dst_index, count)
        unit = self._plan.unit
        execute = self._pack if self._plan.packs else self._unpack
        with inside(self._device if stream is None else stream):
            for first in range(0, count // unit, self._most_blocks):
                blocks = min(self._most_blocks, count // unit - first)
                flags = execute(move.part(first * unit, blocks * unit), blocks)
                overflow[first : first + blocks] |= flags.to(torch.int32)

    def _pack(self, move: Move, blocks: int) -> torch.Tensor:
        """Pack blocks; return for each True if a plane overflowed."""
        rows = self._dense_rows(blocks)
        slots = self._dense_slots(blocks)
        self._copy(Move(move.src, rows, move.src_index, Index(), move.count))
        flags = []
        for plane, values, packed in zip(self._planes, rows.tensors, slots.tensors, strict=True):
            made = pack_planes(values.view(torch.int16).view(-1, plane.values), plane)
            packed.view(-1, plane.slot_bytes).copy_(made.slots)
            flags.append(made.overflow.view(blocks, -1).any(1))
        dst_index = move.dst_index.of_blocks(self._plan.unit)
        self._copy(Move(slots, move.dst.as_slots(), Index(), dst_index, blocks))
        return torch.stack(flags).any(0)

    def _unpack(self, move: Move, blocks: int) -> torch.Tensor:
        """Unpack blocks; return for each True if a slot has the flag of a plane that did not
        fit."""
        rows = self._dense_rows(blocks)
        slots = self._dense_slots(blocks)
        src_index = move.src_index.of_blocks(self._plan.unit)
        self._copy(Move(move.src.as_slots(), slots, src_index, Index(), blocks))
        refused = []
        for plane, values, packed in zip(self._planes, rows.tensors, slots.tensors, strict=True):
            made, flagged = unpack_planes(packed.view(-1, plane.slot_bytes), plane)
            values.view(torch.int16).view(-1, plane.values).copy_(made)
            refused.append(flagged)
        flags = torch.stack([each.view(blocks, -1).any(1) for each in refused]).any(0)
        if bool(flags.any()):
            self._put_back(move, rows, refused, blocks)
        self._copy(Move(rows, move.dst, Index(), move.dst_index, move.count))
        return flags

    def _put_back(self, move: Move, rows: KVView, refused: list[torch.Tensor], blocks: int) -> None:
        """Replace the planes of flagged slots by the rows that the destination has."""
        present = self._dense_rows(blocks)
        self._copy(Move(move.dst, present, move.dst_index, Index(), move.count))
        for plane, values, old, flagged in zip(
            self._planes, rows.tensors, present.tensors, refused, strict=True
        ):
            new = values.view(torch.int16).view(-1, plane.values)
            former = old.view(torch.int16).view(-1, plane.values)
            new.copy_(torch.where(flagged[:, None], former, new))

    def _dense_rows(self, blocks: int) -> KVView:
        """Return dense memory for the raw rows of blocks, a tensor for each kv."""
        raw = self._plan.raw
        unit = self._plan.unit
        dims = [plane.values // unit for plane in self._planes]
        tensors = [
            self._empty((blocks, raw.layers, raw.heads, unit, dim), torch.bfloat16) for dim in dims
        ]
        layout = "kv | block layer head token dim"
        return KVView(tensors, layout, kv=raw.kv, block_size=unit, dim=dims)

    def _dense_slots(self, blocks: int) -> KVView:
        """Return dense memory for the slots of blocks as rows of bytes, a tensor for each kv."""
        raw = self._plan.raw
        sizes = [plane.slot_bytes for plane in self._planes]
        tensors = [
            self._empty((blocks, raw.layers, raw.heads, 1, size), torch.uint8) for size in sizes
        ]
        layout = "kv | block layer head token dim"
        return KVView(tensors, layout, kv=raw.kv, block_size=1, dim=sizes)

    def _empty(self, size: tuple[int, ...], dtype: torch.dtype) -> Any:
        return torch.empty(size, dtype=dtype, device=self._device)

    def _copy(self, move: Move) -> None:
        """Copy rows by plain indexing, on the current stream."""
        src = move.src.form
        dst = move.dst.form
        plan = CopyPlan(src, dst, *move.steps)
        for first, tokens, unit in plan.split(move):
            key = (src, dst, *move.steps, unit)
            launch = self._launches.get(key)
            if launch is None:
                part = plan if unit == plan.unit else CopyPlan(src, dst, *move.steps, unit)
                launch = self._launches[key] = self._launch_of(part)
            launch.carry(move.part(first, tokens), None)
