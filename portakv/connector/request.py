# SPDX-License-Identifier: Apache-2.0
"""What one transfer of a connector asks for: its range of the slot mapping, and whether its sides
can be what they are."""

from __future__ import annotations

from collections.abc import Sized
from itertools import pairwise
from operator import index as whole_number
from typing import Any

from portakv.errors import LayoutError, SlotError
from portakv.view.index import Index
from portakv.view.view import KVView


def slot_range(slot_mapping: Any, start: int, end: int | None) -> tuple[Index, int]:
    """``slot_mapping[start:end]`` as an index, and its tokens; `SlotError` where it has no such."""
    if slot_mapping is None:
        raise SlotError("No slot_mapping was passed; pass the slots of the tokens to move.")
    index = Index.of(slot_mapping)
    length = index.length or 0
    if type(start) is not int or (end is not None and type(end) is not int):
        start, end = _whole("start", start), None if end is None else _whole("end", end)
    stop = length if end is None else end
    if not 0 <= start <= stop <= length:
        raise SlotError(
            f"slot_mapping[{start}:{stop}] was asked of {length} slots; expected 0 <= start <= end "
            f"<= {length}."
        )
    return (index.shifted(start) if start else index), stop - start


def _whole(name: str, value: Any) -> int:
    try:
        return whole_number(value)
    except TypeError:
        raise SlotError(
            f"{name}={value!r} was asked; expected an integer, a position in the slot_mapping."
        ) from None


def check_paired(memory_objs: Sized, starts: Sized, ends: Sized) -> None:
    """Refuse a batch whose memory objects have not one start and one end each."""
    if not len(memory_objs) == len(starts) == len(ends):
        raise SlotError(
            f"{len(memory_objs)} memory objects came with {len(starts)} starts and {len(ends)} "
            f"ends; pass one start and one end for each."
        )


def check_batch(copies: list[tuple[KVView, KVView, Index, Index, int]]) -> None:
    """Refuse the whole batch before its first launch where one of its copies is bad."""
    for src, dst, src_index, dst_index, count in copies:
        dst.check_writable()
        src_index.check(count, src.slots, "source")
        dst_index.check(count, dst.slots, "destination", distinct=True)
    if len(copies) < 2:
        return
    # Sets of one batch share the cache; destinations must be distinct across them as well.
    ids = [(dst_index, count) for _, _, _, dst_index, count in copies if dst_index.ids is not None]
    if len(ids) == len(copies) and all(index.on_host for index, _ in ids):
        total = sum(count for _, count in ids)
        Index.joined(ids).check(total, copies[0][1].slots, "destination", distinct=True)


def check_apart(chunks: list[KVView]) -> None:
    """Refuse memory objects of one batch that overlap where they are written."""
    spans = sorted(span for chunk in chunks for span in chunk.spans)
    for (_, past), (first, _) in pairwise(spans):
        if first < past:
            raise LayoutError(
                "Two memory objects of one batch lie in the same memory, so that one would "
                "overwrite the other; pass buffers that do not overlap."
            )


def check_chunk(cache: KVView, chunk: KVView, count: int) -> None:
    """Refuse a memory object that is too small, or that lies in the caches."""
    if chunk.slots < count:
        raise SlotError(
            f"{count} tokens were asked, but the memory_obj holds {chunk.slots}; pass a larger "
            f"one or a smaller range."
        )
    if chunk.overlaps(cache):
        raise LayoutError(
            "The memory_obj lies in the memory of the kv_caches; pass a buffer of its own."
        )
