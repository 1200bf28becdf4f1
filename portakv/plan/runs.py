# SPDX-License-Identifier: Apache-2.0
"""Runs: a plan expanded on the host into contiguous bytes, for copy engines, files, networks.

The core expands plans; this module describes copies to it.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from portakv.core.runs import list_runs, pointer_to
from portakv.errors import SlotError
from portakv.plan.move import Move
from portakv.view.index import Index
from portakv.view.view import KVView

Int64 = npt.NDArray[np.int64]


class Runs(NamedTuple):
    """Contiguous pieces: int64 arrays of equal length; ``src`` and ``dst`` hold addresses."""

    src: Int64
    dst: Int64
    nbytes: Int64


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


def runs_of(words: array[int], move: Move, room: int) -> Runs:
    """Return the runs of a copy; raise as `CopyPlan.runs` does.

    ``words``: of the plan. ``room``: the most runs that the copy has.
    """
    src, dst, src_index, dst_index, count = move
    copy = (*side_words(src, src_index), *side_words(dst, dst_index), count)
    columns = list_runs(words.buffer_info()[0], copy, room)
    if columns is None:
        raise outside(move)
    return Runs(*columns)
