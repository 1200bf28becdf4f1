# SPDX-License-Identifier: Apache-2.0
"""What `compiled` gives its programs for a plan: shapes that a model fixes, arguments that a
request changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from portakv.backends._compiled_program import (
    ALIGNMENT,
    Argument,
    CopyShape,
    SideShape,
    memory_from,
)
from portakv.backends.strided import ELEMENTS
from portakv.plan.plan import CopyPlan, Nest, Side

if TYPE_CHECKING:
    from portakv.plan.plan import Move
    from portakv.view.index import Index
    from portakv.view.view import KVView


class NestArguments:
    """One nest: the shape of its program, and the arguments of its launches.

    Args:
        nest: the loop nest.
        plan: the plan that it belongs to.
        lost: memory of one run, on the device, for what is not to be moved.

    Attributes:
        shape: nests of equal shape share a program.
    """

    def __init__(self, nest: Nest, plan: CopyPlan, lost: torch.Tensor) -> None:
        width = min(nest.vector, 8)
        self._src = _SideArguments(nest, plan, "src", ())
        self._dst = _SideArguments(nest, plan, "dst", (lost.data_ptr(),))
        self.shape = self._src.copy = self._dst.copy = CopyShape(
            ELEMENTS[width],
            nest.run // width,
            nest.vector // width,
            tuple(x.extent for x in nest.loops),
            self._src.shape,
            self._dst.shape,
        )
        self._lost = lost  # held here: arguments only know its address

    def launch(self, move: Move, units: int) -> list[Argument]:
        """The arguments of one launch."""
        mine, _ = self._src.arguments(move.src, move.src_index)
        theirs, low = self._dst.arguments(move.dst, move.dst_index)
        given = [units, *mine, *theirs]
        if self.shape.src.per_id or self.shape.dst.per_id:
            given.append((self._lost.data_ptr() - low) // self.shape.grain)
        return given


class _SideArguments:
    """One side of a nest; ``reached`` are addresses that its memory must reach beside a view's."""

    copy: CopyShape

    def __init__(self, nest: Nest, plan: CopyPlan, name: str, reached: tuple[int, ...]) -> None:
        side: Side = getattr(nest, name)
        self.side, self.unit, self.grain, self.reached = side, plan.unit, nest.vector, reached
        walks = [(getattr(x, f"{name}_stride"), getattr(x, f"{name}_table")) for x in nest.loops]
        self.shape = SideShape(
            getattr(plan, f"{name}_step") // plan.unit,
            tuple(step.extent for step in side.units),
            tuple(step.table != 0 for step in side.units),
            tuple(table != 0 for _, table in walks),
        )
        self.steps = [x.table or x.stride // self.grain for x in side.units]
        for stride, table in walks:
            self.steps += [stride // self.grain, *([table] if table else [])]

    def arguments(self, view: KVView, index: Index) -> tuple[list[Argument], int]:
        """The arguments of this side, and the address that its memory begins at."""
        side, unit, per_id = self.side, self.unit, self.shape.per_id
        memory, table, low = self._kept(view)
        given: list[Argument] = [memory]
        start = side.offset - low + (view.origins[side.table] if table is None else 0)
        if per_id:
            ids, first, rest = id_arguments(index, view.device, unit, per_id)
            given.append(ids)
            numbers = [first, view.slots // unit, *([rest] if per_id > 1 else [])]
        else:
            first, rest = divmod(index.offset, unit)
            # A flat side may start anywhere, also between two units.
            start += rest * (side.units[-1].stride // unit)
            numbers = [first]
        if table is not None:
            given.append(table)
            numbers.append(side.table)
        return [*given, start // self.grain, *numbers, *self.steps], low

    def _kept(self, view: KVView) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """A view's memory, its table of addresses, and the address that the memory begins at."""
        known: tuple[torch.Tensor, torch.Tensor | None, int] | None = view.derived.get(self)
        if known is None:
            low = min((*view.origins, *self.reached)) // ALIGNMENT * ALIGNMENT
            copy, device, table = self.copy, view.device, None
            memory = memory_from(low, device, copy.dtype, copy.run, copy.ratio)
            if self.shape.tabled:
                table = memory_from(view.table.data_ptr(), device, torch.int64)
            known = view.derived[self] = (memory, table, low)
        return known


def id_arguments(
    index: Index, device: torch.device, unit: int, per_id: int
) -> tuple[torch.Tensor, int, int]:
    """Memory that the ids lie in, the first of them, and how many of its units are passed over."""
    ids = index.ids_on(device)
    low = ids.data_ptr() // ALIGNMENT * ALIGNMENT
    first, rest = divmod(index.offset // unit, per_id)
    return memory_from(low, device, ids.dtype), (ids.data_ptr() - low) // 8 + first, rest
