# SPDX-License-Identifier: Apache-2.0
"""Whole blocks of a copy with a packed side, and copies between two packed sides as rows of
bytes."""

from __future__ import annotations

from portakv.errors import Unsupported
from portakv.plan.move import Move
from portakv.view.form import Form


def slots_of(move: Move) -> Move:
    """Return a copy between two packed sides as a copy of rows of bytes, one for each slot.

    Raises:
        Unsupported: other parameters or block sizes, or a part of a block.
    """
    src = move.src.form
    dst = move.dst.form
    if src.encoding != dst.encoding or src.block_size != dst.block_size:
        raise Unsupported(
            f"A copy from {_described(src)} to {_described(dst)}",
            "packed blocks are copied as they are; unpack them to a raw view and pack them again",
        )
    size = src.block_size
    check_whole(move, size)
    indices = (move.src_index, move.dst_index)
    src_index, dst_index = (each.of_blocks(size) for each in indices)
    rows = Move(move.src.as_slots(), move.dst.as_slots(), src_index, dst_index, move.count // size)

    # Ids on a device that passed a check are not read again.
    sides = ((move.src, rows.src, src_index), (move.dst, rows.dst, dst_index))
    for index, (view, slots, made) in zip(indices, sides, strict=True):
        if not index.on_host and index.is_clean(move.count, view.slots):
            made.mark_clean(rows.count, slots.slots)
    return rows


def check_whole(move: Move, size: int) -> None:
    """Raise `Unsupported` unless a copy moves whole blocks of ``size`` tokens."""
    for form in (move.src.form, move.dst.form):
        if form.paged and form.block_size != size:
            raise Unsupported(
                f"A copy between packed blocks of {size} tokens and blocks of {form.block_size}",
                "a packed block moves only whole; make the block sizes equal",
            )
    tokens = [move.count, move.src_index.offset, move.dst_index.offset]
    steps = [step for step in move.steps if step]
    if any(number % size for number in tokens) or any(step != size for step in steps):
        raise Unsupported(
            f"A copy of {move.count} tokens with a packed side, by ids of "
            f"{' and '.join(map(str, move.steps))} tokens",
            f"a packed block moves only whole; ask for whole blocks of {size} tokens by "
            "copy_blocks",
        )


def _described(form: Form) -> str:
    planes = sorted({str(plane) for plane in form.encoding})
    name = form.encoding[0].encoding
    return f"blocks of {form.block_size} tokens packed by {name!r}, {', '.join(planes)}"
