# SPDX-License-Identifier: Apache-2.0
"""Decide how the rows of a step cross in staging buffers: raw, or as slots of `pack`.

The owner packs inside the gather into its staging buffer, and the reader unpacks inside the scatter
from its own. Slots have the owner's blocks. Tokens outside of whole blocks cross raw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from portakv.copy.handle import BlockTransfer
from portakv.errors import PackOverflow, Unsupported
from portakv.layout.encodings import PACK, PACKED_DTYPE, Pack
from portakv.migrate.plan import Step, copy_checked
from portakv.migrate.staging import Slots, rows_bytes
from portakv.view import Index, KVView


class Crossing(NamedTuple):
    """A step, or a part of one, and the slots that it crosses in; None: it crosses raw."""

    step: Step
    slots: Slots | None


def crossings(step: Step, pack: Pack | None) -> tuple[list[Crossing], str]:
    """Return the parts of a step with how each crosses, and why a part crosses raw although
    ``pack`` was requested (empty if none does).

    ``pack``: what the caller requested; None: raw rows, unless a side is packed.

    Raises `InvalidTerms` for parameters that the rows' planes cannot have.
    """
    if step.cut.packed:
        return [Crossing(step, _slots_of_sides(step))], ""
    if pack is None:
        return [Crossing(step, None)], ""
    slots = _slots(step, pack)
    if isinstance(slots, str):
        return [Crossing(step, None)], slots

    # Whole blocks of the owner are packed; what stands before and after them crosses raw.
    unit = slots.unit
    before = min(-step.src_index.offset % unit, step.tokens)
    whole = (step.tokens - before) // unit * unit
    after = step.tokens - before - whole
    layers = range(step.cut.dst.layers)
    ends = ((0, before, None), (before, whole, slots), (before + whole, after, None))
    made = [Crossing(step.part(layers, at, n), how) for at, n, how in ends if n]
    why = ""
    if before or after:
        why = f"a part of a block of {unit} tokens cannot be packed"
    return made, why


def _slots(step: Step, pack: Pack) -> Slots | str:
    """Return the slots for the owner's blocks of raw rows, or why there are none, as a clause."""
    dst = step.cut.dst
    described = step.owner.handshake.described[step.cut.group]
    unit = described.block_size
    numbers = {*described.group.numbers, *dst.form.dtypes}
    if described.group.page:
        return f"{PACK!r} takes rows, not opaque pages"
    if numbers != {PACKED_DTYPE} or not (described.group.numbers and dst.form.dtypes):
        return f"{PACK!r} takes rows of {PACKED_DTYPE} alone"
    if not unit:
        return "the owner's view has no blocks"
    if step.ticket.steps[step.cut.group] != unit:
        return f"the offer does not name blocks of {unit} tokens"
    slots = Slots(pack, unit)
    try:
        planes = slots.planes(dst)
    except Unsupported as error:
        return error.why
    if any(plane.slot_bytes >= plane.raw_bytes for plane in planes):
        return "its slots are not smaller than its rows"
    # A buffer has space for the raw rows of its blocks, because some may not fit into slots.
    if rows_bytes(dst, 1, unit, dst.heads) > step.owner.handshake.slot_bytes:
        return f"a staging buffer holds no block of {unit} tokens of a layer"
    return slots


def _slots_of_sides(step: Step) -> Slots:
    """Return the slots of packed sides."""
    form = step.cut.dst.form
    described = step.owner.handshake.described[step.cut.group]
    text = described.group.encoding
    if form.encoding and not text:
        raise Unsupported(
            f"Pulling raw rows of {step.owner.address} into a packed view through staging",
            "blocks that do not fit would be lost; pull into a raw view, and pack them there",
        )
    slots = Slots(Pack.of_text(text), described.block_size)
    large = any(plane.slot_bytes > plane.raw_bytes for plane in slots.planes(step.cut.dst))
    if large and not form.encoding:  # slices are cut by the bytes of the reader's rows
        what = f"Pulling packed blocks of {step.owner.address} through staging into a raw view"
        raise Unsupported(what, "its slots are larger than its rows; pull into a packed view")
    return slots


def scattered(src: KVView, dst: KVView, dst_index: Index, count: int) -> BlockTransfer:
    """Copy a packed chunk to a reader's rows, raw or packed.

    If the rows have other blocks, they are unpacked into memory between.
    """
    size = src.form.block_size
    alike = dst.form.block_size in (0, size) and dst_index.plan_step in (0, size)
    if alike and dst_index.offset % size == 0:
        return copy_checked(src, dst, None, dst_index, count)
    rows = _dense(dst, count)
    unpacked = copy_checked(src, rows, None, None, count)
    return BlockTransfer.together([unpacked, copy_checked(rows, dst, None, dst_index, count)])


def _dense(view: KVView, count: int) -> KVView:
    """Return new memory for ``count`` tokens of a view, on its device."""
    with torch.inference_mode(False):
        made = [
            torch.empty(
                (view.layers, count, view.heads * width // 2),
                dtype=torch.bfloat16,
                device=view.device,
            )
            for width in view.widths
        ]
    return KVView(made, "kv | layer token (head dim)", kv=view.kv, heads=view.heads)


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the runs of sorted numbers, as the first and how many."""
    first = 0
    for at, number in enumerate(numbers):
        if at + 1 == len(numbers) or numbers[at + 1] != number + 1:
            yield numbers[first], at + 1 - first
            first = at + 1


def flagged(step: Step, positions: Sequence[int]) -> PackOverflow:
    """Return the error of packed blocks of a step that hold no rows, by their sorted positions."""
    size = step.page
    count = (positions[-1] + 1) * size
    numbers = []
    for index in (step.src_index, step.dst_index):
        slots = index.to_host().slots(count, size)
        numbers.append(tuple([int(slots[at]) // size for at in positions]))
    shown = ", ".join(map(str, numbers[0][:8])) + (", ..." if len(positions) > 8 else "")
    return PackOverflow(
        f"Expected packed blocks, got {len(positions)} that did not fit into slots of {PACK!r}, "
        f"blocks {shown} of {step.owner.address}. Pull these blocks from a raw view.",
        *numbers,
    )
