# SPDX-License-Identifier: Apache-2.0
"""Runs: a plan expanded on the host into contiguous pieces, for copy engines, files, networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import SlotError
from .nests import Nest, Side

if TYPE_CHECKING:
    from .index import Index
    from .view import KVView

Int64 = npt.NDArray[np.int64]


class Runs(NamedTuple):
    """Contiguous pieces: three int64 arrays of equal length, addresses and bytes."""

    src: Int64
    dst: Int64
    nbytes: Int64


def expand(
    nests: Sequence[Nest],
    unit: int,
    src: KVView,
    dst: KVView,
    src_index: Index,
    dst_index: Index,
    count: int,
) -> Runs:
    """Every run of ``count`` tokens, neighbours merged, in the order of the source.

    Raises:
        SlotError: an id past the end of its view, a range past the list, or one that does not
            consist of whole units.
    """
    if count < 0 or count % unit:
        raise SlotError(
            f"Runs of {count} tokens were asked for, which are no multiple of the plan's unit "
            f"{unit}; give head and tail to a plan with unit=1."
        )
    for index, view, side in ((src_index, src, "source"), (dst_index, dst, "destination")):
        index.check_length(count, view.slots, side)
        if index.ids is not None:
            index.judge(count, view.slots, False, side)
    src_slots = src_index.slots(count)[::unit]
    dst_slots = dst_index.slots(count)[::unit]
    moved = (src_slots >= 0) & (dst_slots >= 0)
    pieces = [
        _expand_nest(nest, unit, src, dst, src_slots[moved], dst_slots[moved]) for nest in nests
    ]
    return _merge(*(np.concatenate(column) for column in zip(*pieces, strict=True)))


def _expand_nest(
    nest: Nest, unit: int, src: KVView, dst: KVView, src_slots: Int64, dst_slots: Int64
) -> tuple[Int64, Int64, Int64]:
    src_entry, src_byte = _place(nest.src, src_slots, unit)
    dst_entry, dst_byte = _place(nest.dst, dst_slots, unit)
    for loop in nest.loops:
        at = np.arange(loop.extent, dtype=np.int64)
        src_entry = _outer(src_entry, at * loop.src_table)
        src_byte = _outer(src_byte, at * loop.src_stride)
        dst_entry = _outer(dst_entry, at * loop.dst_table)
        dst_byte = _outer(dst_byte, at * loop.dst_stride)
    sources = src.addresses[src_entry] + src_byte
    targets = dst.addresses[dst_entry] + dst_byte
    return sources, targets, np.full(sources.shape, nest.run, dtype=np.int64)


def _outer(base: Int64, steps: Int64) -> Int64:
    return np.asarray((base[:, None] + steps[None, :]).reshape(-1))


def _place(side: Side, slots: Int64, unit: int) -> tuple[Int64, Int64]:
    """Table entry and byte offset of each unit that begins at a slot."""
    number, rest = slots // unit, slots % unit
    entry = np.full(slots.shape, side.table, dtype=np.int64)
    offset = np.full(slots.shape, side.offset, dtype=np.int64)
    for i, step in enumerate(reversed(side.units)):
        at = number % step.extent if step.extent else number
        number = number // step.extent if step.extent else number
        entry += at * step.table
        offset += at * step.stride
        if i == 0:
            # Only where tokens lie at one stride may a unit begin between multiples.
            offset += rest * (step.stride // unit)
    return entry, offset


def _merge(src: Int64, dst: Int64, nbytes: Int64) -> Runs:
    order = np.lexsort((dst, src))
    src, dst, nbytes = src[order], dst[order], nbytes[order]
    if not src.size:
        return Runs(src, dst, nbytes)
    joins = (src[:-1] + nbytes[:-1] == src[1:]) & (dst[:-1] + nbytes[:-1] == dst[1:])
    first = np.nonzero(np.concatenate(([True], ~joins)))[0]
    return Runs(src[first], dst[first], np.add.reduceat(nbytes, first))
