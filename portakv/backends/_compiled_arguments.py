# SPDX-License-Identifier: Apache-2.0
"""What `compiled` gives its programs for a plan: shapes that a model fixes, arguments that a
request changes."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..loops import Loop
from ..plan import CopyPlan, Nest, Side
from ._compiled_rows import ALIGNMENT, Argument, CopyShape, SideShape, memory_from
from .reference import ELEMENTS

if TYPE_CHECKING:
    from ..index import Index
    from ..view import KVView

# Loops are joined to one table of offsets as long as it stays this short (entries): a look-up
# costs less than a division, but a long table is memory that has to be read too.
_LONGEST = 4096


class Walk(NamedTuple):
    """One loop as one side walks it: steps, bytes and table entries of a step."""

    extent: int
    stride: int
    table: int


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
        groups = _groups(nest.loops)
        src = [[Walk(x.extent, x.src_stride, x.src_table) for x in group] for group in groups]
        dst = [[Walk(x.extent, x.dst_stride, x.dst_table) for x in group] for group in groups]
        width = min(nest.vector, 8)
        self.shape = CopyShape(
            ELEMENTS[width],
            nest.run // width,
            nest.vector // width,
            tuple(prod(x.extent for x in group) for group in groups),
            _side_shape(nest.src, plan.src_step // plan.unit, src),
            _side_shape(nest.dst, plan.dst_step // plan.unit, dst),
        )
        self._src = _SideArguments(nest.src, self.shape, self.shape.src, plan.unit, ())
        self._dst = _SideArguments(
            nest.dst, self.shape, self.shape.dst, plan.unit, (lost.data_ptr(),)
        )
        self._src.walk(src, lost.device)
        self._dst.walk(dst, lost.device)
        self._lost = lost  # held here: arguments only know its address

    def launch(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index, units: int
    ) -> list[Argument]:
        """The arguments of one launch."""
        mine, _ = self._src.arguments(src, src_index)
        theirs, low = self._dst.arguments(dst, dst_index)
        return [units, (self._lost.data_ptr() - low) // self.shape.grain, *mine, *theirs]


class _SideArguments:
    """One side of a nest; ``reached`` are addresses that its memory must reach beside a view's."""

    def __init__(
        self, side: Side, shape: CopyShape, mine: SideShape, unit: int, reached: tuple[int, ...]
    ) -> None:
        self.side, self.shape, self.mine, self.unit, self.reached = side, shape, mine, unit, reached
        self.flat = mine.unit_entries == (False,)
        self.steps = [x.table or x.stride // shape.grain for x in side.units]
        self.walks: list[torch.Tensor] = []

    def walk(self, groups: list[list[Walk]], device: torch.device) -> None:
        """Work out how far each step of each group of loops goes."""
        tables = [_sums([(x.extent, x.stride // self.shape.grain) for x in g]) for g in groups]
        if self.mine.loop_entries:
            tables += [_sums([(x.extent, x.table) for x in group]) for group in groups]
        self.walks = [torch.tensor(table, device=device) for table in tables]

    def arguments(self, view: KVView, index: Index) -> tuple[list[Argument], int]:
        """The arguments of this side, and the address that its memory begins at."""
        side, grain = self.side, self.shape.grain
        memory, table, low = self._kept(view)
        given: list[Argument] = [memory]
        start = side.offset - low + (view.origins[side.table] if table is None else 0)
        if self.mine.per_id:
            ids, first, rest = id_arguments(index, view.device, self.unit, self.mine.per_id)
            given.append(ids)
            numbers = [first, rest, view.slots // self.unit]
        elif self.flat:
            # A flat side may start anywhere, also between two units.
            first, rest = divmod(index.offset, self.unit)
            stride = side.units[0].stride
            start += first * stride + rest * (stride // self.unit)
            numbers = [0]
        else:
            numbers = [index.offset // self.unit]
        if table is not None:
            given.append(table)
            numbers.append(side.table)
        return [*given, *self.walks, start // grain, *numbers, *self.steps], low

    def _kept(self, view: KVView) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """A view's memory, its table of addresses, and the address that the memory begins at."""
        known = view.kept.get(self)
        if known is None:
            low = min(*view.origins, *self.reached, view.origins[0]) // ALIGNMENT * ALIGNMENT
            shape, device, table = self.shape, view.device, None
            memory = memory_from(low, device, shape.dtype, shape.run, shape.ratio)
            if self.mine.tabled:
                table = memory_from(view.table.data_ptr(), device, torch.int64)
            known = view.kept[self] = (memory, table, low)
        return known  # type: ignore[no-any-return]


def id_arguments(
    index: Index, device: torch.device, unit: int, per_id: int
) -> tuple[torch.Tensor, int, int]:
    """Memory that the ids lie in, the first of them, and how many of its units are passed over."""
    ids = index.on(device)
    low = ids.data_ptr() // ALIGNMENT * ALIGNMENT
    first, rest = divmod(index.offset // unit, per_id)
    return memory_from(low, device, ids.dtype), (ids.data_ptr() - low) // 8 + first, rest


def _groups(loops: tuple[Loop, ...]) -> list[list[Loop]]:
    """Loops, outermost first, in as few groups as short tables allow."""
    groups: list[list[Loop]] = []
    entries = 0
    for loop in loops:
        entries *= loop.extent
        if not groups or entries > _LONGEST:
            groups.append([])
            entries = loop.extent
        groups[-1].append(loop)
    return groups


def _sums(steps: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """How far each round of nested loops goes, by (extent, distance) of each, outermost first."""
    far = np.zeros(1, dtype=np.int64)
    for extent, distance in steps:
        far = np.add.outer(far, np.arange(extent, dtype=np.int64) * distance).ravel()
    return far


def _side_shape(side: Side, per_id: int, groups: list[list[Walk]]) -> SideShape:
    return SideShape(
        per_id,
        tuple(step.extent for step in side.units),
        tuple(step.table != 0 for step in side.units),
        any(walk.table for group in groups for walk in group),
    )
