# SPDX-License-Identifier: Apache-2.0
"""The arguments of the AscendC kernel, as ``native/ascend/copy.h`` lays them out.

For each nest of a plan a ``Nest``, which is uploaded once, and for each request a ``Copy``, which
travels as scalars. All members are 64-bit integers; strides and offsets are bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from portakv.errors import Unsupported
from portakv.plan.plan import CopyPlan, Nest, Side

if TYPE_CHECKING:
    import torch

    from portakv.plan.loops import Loop
    from portakv.view.index import Index
    from portakv.view.view import KVView

MAX_UNITS, MAX_LOOPS = 4, 8  # lengths of arrays in copy.h
_MOST_GAP = 2**32  # bytes between rows of one transfer
_COPY = struct.Struct("<15q")
#: What a launch may touch: its first address, its bytes, and whether it may be written.
Memory = tuple[int, int, bool]


class Arguments:
    """What the kernel is launched with to carry one plan out.

    Raises:
        Unsupported: the plan is more than the kernel takes.
    """

    def __init__(self, plan: CopyPlan) -> None:
        why = refusal(plan)
        if why is not None:
            raise Unsupported("A copy by the AscendC kernel", f"{why}; use backend 'reference'")
        self.nests = [_nest(nest, plan) for nest in plan.nests]
        self._unit = plan.unit
        self._sides = [
            (_SideRequest(nest.src, plan.unit), _SideRequest(nest.dst, plan.unit))
            for nest in plan.nests
        ]

    def copies(
        self,
        nests: Sequence[int],
        src: tuple[KVView, Index],
        dst: tuple[KVView, Index],
        count: int,
        status: int,
    ) -> Iterator[bytes]:
        """A ``portakv::Copy`` for each nest, whose addresses are ``nests``; ``status``: the address
        of the status word, or 0."""
        for nest, (mine, theirs) in zip(nests, self._sides, strict=True):
            yield _COPY.pack(
                nest, *mine.pack(*src), *theirs.pack(*dst), count // self._unit, status
            )


def refusal(plan: CopyPlan) -> str | None:
    """Why the kernel does not take a plan, as a clause; None where it does."""
    for nest in plan.nests:
        loops = len(_split_rows(nest)[0])
        steps = max(len(side.units) for side in (nest.src, nest.dst))
        if loops > MAX_LOOPS or steps > MAX_UNITS:
            return (
                f"the AscendC kernel takes {MAX_LOOPS} loops beside the rows and {MAX_UNITS} steps "
                f"of a unit, and the plan has {loops} and {steps}"
            )
    return None


def reached(
    src: tuple[KVView, Index], dst: tuple[KVView, Index], further: Sequence[Memory]
) -> list[Memory]:
    """All memory that a launch may touch, for an emulation; ``further``: nests and status word."""
    held = [*_spans(src[0], False), *_spans(dst[0], True)]
    for _, index in (src, dst):
        held += [] if index.ids is None else [_read_only(index.ids)]
    return [*held, *further]


def _spans(view: KVView, writable: bool) -> list[Memory]:
    """What a view's tensors cover; those that touch are one run to a plan, and so one piece."""
    joined: list[list[int]] = []
    for first, past in view.spans:
        if joined and joined[-1][1] == first:
            joined[-1][1] = past
        else:
            joined.append([first, past])
    held = [(first, past - first, writable) for first, past in joined]
    return held + ([_read_only(view.table)] if len(view.origins) > 1 else [])


def _read_only(tensor: torch.Tensor) -> Memory:
    return tensor.data_ptr(), tensor.nbytes, False


def _nest(nest: Nest, plan: CopyPlan) -> bytes:
    """A nest as ``portakv::Nest``."""
    loops, rows, src_stride, dst_stride = _split_rows(nest)
    numbers = [*_side(nest.src, plan.src_step // plan.unit)]
    numbers += _side(nest.dst, plan.dst_step // plan.unit)
    numbers += [plan.unit, nest.run, rows, src_stride, dst_stride, len(loops)]
    for loop in loops:
        numbers += [loop.extent, loop.src_table, loop.src_stride, loop.dst_table, loop.dst_stride]
    numbers += [0] * (5 * (MAX_LOOPS - len(loops)))
    return struct.pack(f"<{len(numbers)}q", *numbers)


def _split_rows(nest: Nest) -> tuple[tuple[Loop, ...], int, int, int]:
    """The loops above the rows, how many rows a transfer can take, and their strides."""
    if nest.loops:
        last = nest.loops[-1]
        gaps = (last.src_stride - nest.run, last.dst_stride - nest.run)
        # A transfer walks upwards and leaves gaps: neither tables, nor overlaps, nor steps back.
        if not last.tabled and all(0 <= gap < _MOST_GAP for gap in gaps):
            return nest.loops[:-1], last.extent, last.src_stride, last.dst_stride
    return nest.loops, 1, nest.run, nest.run


def _side(side: Side, per_id: int) -> list[int]:
    numbers = [side.table, side.offset, per_id, len(side.units)]
    for step in side.units:
        numbers += [step.extent, step.table, step.stride]
    return numbers + [0] * (3 * (MAX_UNITS - len(side.units)))


class _SideRequest:
    """Packs what a request fixes about one side, as ``portakv::Request``."""

    def __init__(self, side: Side, unit: int) -> None:
        self._unit = unit
        self._token = side.units[-1].stride // unit

    def pack(self, view: KVView, index: Index) -> tuple[int, int, int, int, int, int]:
        """table, base, ids, whether they are int64, first, limit."""
        tabled = len(view.origins) > 1
        table, base = (view.table.data_ptr(), 0) if tabled else (0, view.origins[0])
        first, rest = divmod(index.offset, self._unit)
        limit = view.slots // self._unit
        if index.ids is not None:
            return table, base, index.ids.data_ptr(), index.ids.itemsize == 8, first, limit
        # Without ids a flat side may start anywhere, also between two units.
        return table, base + rest * self._token, 0, 0, first, limit
