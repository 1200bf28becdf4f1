# SPDX-License-Identifier: Apache-2.0
"""Runs: a plan expanded on the host into contiguous bytes, for copy engines, files, networks.

The core expands; this module describes plans and copies to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from portakv.core.runs import list_runs, pointer_to
from portakv.errors import SlotError
from portakv.plan.loops import Nest, Side
from portakv.plan.move import Move
from portakv.view.index import Index
from portakv.view.view import KVView

Int64 = npt.NDArray[np.int64]


class Runs(NamedTuple):
    """Contiguous pieces: int64 arrays of equal length; ``src`` and ``dst`` hold addresses."""

    src: Int64
    dst: Int64
    nbytes: Int64


def plan_words(unit: int, nests: Sequence[Nest]) -> bytes:
    """Return a plan as the core reads it; the names of axes are left out."""
    words = [unit, len(nests)]
    for nest in nests:
        words += [*_side_words(nest.src), *_side_words(nest.dst), len(nest.loops)]
        for loop in nest.loops:
            words += [0, loop.extent]
            words += [loop.src_table, loop.src_stride, loop.dst_table, loop.dst_stride]
        words += [nest.run, nest.vector]
    return np.array([*words, 0, 0], dtype=np.int64).tobytes()


def _side_words(side: Side) -> list[int]:
    words = [side.table, side.offset, len(side.units)]
    for step in side.units:
        words += [step.extent, step.table, step.stride]
    return words


def side_words(view: KVView, index: Index) -> tuple[int, ...]:
    """Return a side of a copy as the core reads it; ids on a device are read back."""
    entries = view.entries
    addresses = view.origins[0] if entries == 1 else pointer_to(view.addresses)
    return addresses, entries, *index_words(index), view.slots


def index_words(index: Index) -> tuple[int, ...]:
    """Return an index as the core reads it; ids on a device are read back."""
    ids = index.ids
    if ids is None:
        return 0, 0, 0, 1, index.offset
    if index.on_host and ids.is_contiguous():
        return ids.data_ptr(), ids.element_size(), ids.numel(), index.step, index.offset
    array = index.host_ids()
    return pointer_to(array), 8, array.size, index.step, index.offset


def check_count(unit: int, count: object) -> None:
    """Raise `SlotError` unless a number of tokens is a multiple of the plan's unit."""
    if not isinstance(count, (int, np.integer)) or count < 0 or count % unit:
        raise SlotError(
            f"Expected runs of a multiple of the plan's unit {unit}, got {count!r} tokens. Pass "
            f"head and tail to a plan with unit=1."
        )


def outside(move: Move) -> SlotError:
    """Return the error of a copy with positions outside of a list or a view."""
    try:
        for index, view, side in (
            (move.src_index, move.src, "source"),
            (move.dst_index, move.dst, "destination"),
        ):
            index.check_length(move.count, view.slots, side)
            index.to_host().check(move.count, view.slots, side)
    except SlotError as error:
        return error
    return SlotError(
        "Expected ids that do not change during a call, got others. Pass a copy of the ids."
    )


def runs_of(words: bytes, move: Move, room: int) -> Runs:
    """Return the runs of a copy; raise as `CopyPlan.runs` does.

    ``room``: the most runs that the copy has.
    """
    src, dst, src_index, dst_index, count = move
    copy = (*side_words(src, src_index), *side_words(dst, dst_index), count)
    columns = list_runs(words, copy, room)
    if columns is None:
        raise outside(move)
    return Runs(*columns)
