# SPDX-License-Identifier: Apache-2.0
"""Settle a copy once: check it, and decide who executes which part of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple, TypeAlias

import torch

from portakv.copy.context import Context
from portakv.errors import SlotError
from portakv.plan.plan import CopyPlan, Move, check_disjoint
from portakv.registry.prepared import Prepared, prepared
from portakv.registry.registry import Choice
from portakv.runtime.transfer import bad_slot
from portakv.view.destination import check_writable
from portakv.view.index import Index

UNCHECKED = "its ids have to be checked before they are used"  # inside graph capture
#: What executes a part of a copy, the first position of the part, and its tokens.
Piece: TypeAlias = tuple[Prepared, int, int]


class Passed(NamedTuple):
    """The checks of memory and ids that a copy passed. Each part of the copy passes them, too.

    Attributes:
        skips: ids on the host skip positions.
        error: the error of ids that were left out of the copy.
        context: the surroundings of a plain copy that is a part. None: its call determines them.
    """

    skips: bool
    error: SlotError | None = None
    context: Context | None = None


def context_of(passed: Passed | None, device: torch.device, stream: torch.Stream | None) -> Context:
    """Return the surroundings that a part of a copy was given, or else those of its call.

    Raises as `Context.of`.
    """
    known = None if passed is None else passed.context
    return Context.of(device, stream) if known is None else known


class Settled(NamedTuple):
    """A copy with all decisions about it.

    Attributes:
        move: the copy, without units that have bad ids.
        pieces: who executes which part; none if nothing is left to move.
        error: the error that the transfer raises for ids that were left out.
        guarded: ids are to be checked where they are read.
        whole: the backend with the plan of the largest units.
    """

    move: Move
    pieces: Sequence[Piece]
    error: SlotError | None = None
    guarded: bool = False
    whole: Prepared | None = None


def settle(
    move: Move,
    choice: Choice,
    context: Context,
    *,
    passed: Passed | None = None,
    strict: bool = False,
) -> Settled:
    """Decide how a copy that its indices and views cover is made; move nothing.

    Args:
        choice: what executes it, as `executor_of` decides.
        passed: the checks that the copy passed just now, alone or as a part. None: check it.
        strict: check ids on a device before anything is moved, which waits for them.

    Raises as `copy_rows`.
    """
    src = move.src
    dst = move.dst
    if passed is None:
        check_views(move)
    ready = prepared(src.form, dst.form, *move.steps, None, choice)
    error = None if passed is None else passed.error
    if move.count == 0:
        return Settled(move, (), error)
    skips = check_ids(move, context, strict) if passed is None else passed.skips
    pieces = _pieces(ready, move, choice)
    src_index = move.src_index
    dst_index = move.dst_index
    clean = src_index.is_clean(move.count, src.slots) and dst_index.is_clean(move.count, dst.slots)
    guarded = skips or not clean
    if guarded and not _take(pieces, move, clean, context.captured):
        guarded = False
        context.check_not_captured(UNCHECKED)
        move, found = drop_bad_ids(move, max(ready.plan.unit for ready, _, _ in pieces))
        error = error or found
        if move.count == 0:
            return Settled(move, (), error)
        pieces = _pieces(prepared(src.form, dst.form, *move.steps, None, choice), move, choice)
    if passed is None:
        check_disjoint(move)
    if context.captured:
        _check_capture(pieces, move, context)
    return Settled(move, pieces, error, guarded, ready)


def check_executable(move: Move, choice: Choice, context: Context) -> None:
    """Raise what `settle` raises for a copy that its choice does not execute; move nothing."""
    settle(move._replace(count=0), choice, context, passed=Passed(skips=False))


def _pieces(ready: Prepared, move: Move, choice: Choice) -> list[Piece]:
    """Return the body of a copy in the largest units, and its head and tail by token."""
    pieces = []
    for first, tokens, unit in ready.plan.split(move):
        part = ready
        if unit != ready.plan.unit:
            part = prepared(move.src.form, move.dst.form, *move.steps, unit, choice)
        pieces.append((part, first, tokens))
    return pieces


def _take(pieces: list[Piece], move: Move, clean: bool, captured: bool) -> bool:
    """Return whether the backends of a copy accept negative ids, and ids that are not clean."""
    for ready, first, tokens in pieces:
        can = ready.claims(move.part(first, tokens), captured)
        if not can.skips_negative or not (clean or can.guards):
            return False
    return True


def check_ids(move: Move, context: Context, strict: bool) -> bool:
    """Return True if ids on the host skip positions; with ``strict``, wait for ids on a device and
    check them in the same way.

    Raises:
        SlotError: a slot past the end, or a destination that occurs twice.
        Unsupported: inside graph capture, if it had to wait.
    """
    src_index = move.src_index
    dst_index = move.dst_index
    if strict and not (src_index.on_host and dst_index.on_host):
        context.check_not_captured(UNCHECKED)
        src_index = src_index.to_host()
        dst_index = dst_index.to_host()
    skips = src_index.check(move.count, move.src.slots, "source")
    return dst_index.check(move.count, move.dst.slots, "destination", distinct=True) or skips


def drop_bad_ids(move: Move, unit: int) -> tuple[Move, SlotError | None]:
    """Return a copy without the units that have a negative id or one past the end on either side,
    and the error that names the first id past the end.

    It waits once for the device if ids are there. If nothing is dropped, no later check is needed.
    """
    views = (move.src, move.dst)
    indices = (move.src_index, move.dst_index)
    count = move.count

    # Units divide the offsets and the count, so that none is cut.
    unit = gcd(unit, *(index.offset for index in indices), count)
    device = next((x.ids.device for x in indices if x.ids is not None), move.src.device)

    # An index without ids is a range, whose length was checked.
    listed = [
        (x.units(count, unit, device), view.slots // unit)
        for x, view in zip(indices, views, strict=True)
        if x.ids is not None
    ]
    good = [(number >= 0) & (number < slots) for number, slots in listed]
    usable = (good[0] & good[1] if len(good) == 2 else good[0]).nonzero()[:, 0]
    if usable.numel() * unit == count:
        for index, view in zip(indices, views, strict=True):
            index.mark_clean(count, view.slots)
        return move, None

    # Negative ids are padding: only an id past the end is an error.
    numbers = [x.units(count, unit, device) for x in indices]
    bad = [number >= view.slots // unit for number, view in zip(numbers, views, strict=True)]
    error = None
    at = (bad[0] | bad[1]).nonzero()[:, 0]
    if at.numel():
        first = int(at[0])
        side = 0 if bool(bad[0][first]) else 1
        slot = int(numbers[side][first]) * unit
        view = views[side]
        error = bad_slot(first * unit, slot, view.slots)

    src_index, dst_index = (Index(number[usable], step=unit) for number in numbers)
    usable_tokens = usable.numel() * unit
    src_index.mark_clean(usable_tokens, move.src.slots)
    dst_index.mark_clean(usable_tokens, move.dst.slots)
    return Move(move.src, move.dst, src_index, dst_index, usable_tokens), error


def without_left_out(
    move: Move, passed: Passed, done: Move, error: SlotError | None
) -> tuple[Move, Passed]:
    """Return a copy and its checks without the positions that one of its layers left out.

    All layers have the same bad ids, which are read once.

    Args:
        done: the layer, without its bad ids.
        error: the error of ids that were left out.
    """
    if done.count == move.count:
        return move, passed
    rest = Move(move.src, move.dst, done.src_index, done.dst_index, done.count)
    return rest, passed._replace(skips=False, error=error)


def note_clean(part: Move) -> None:
    """Remember that ids on a device are those of a part of a copy without bad ids."""
    for index, view in ((part.src_index, part.src), (part.dst_index, part.dst)):
        if not index.on_host:
            index.mark_clean(part.count, view.slots)


def _check_capture(pieces: Sequence[Piece], move: Move, context: Context) -> None:
    for ready, _, _ in pieces:
        if not ready.can.capturable:
            context.check_not_captured(f"backend {ready.choice.name!r} cannot be captured")
        for index in (move.src_index, move.dst_index):
            if not index.has_ids_on(ready.ids_device, ready.can.index_dtypes):
                context.check_not_captured("its ids would have to be copied first")


def layer_of(move: Move, layer: int) -> Move:
    """Return one layer of a copy; raise as the whole copy if the sides have different numbers."""
    if move.src.layers != move.dst.layers:
        CopyPlan(move.src.form, move.dst.form, *move.steps)
    return move.layer(layer)


def check(move: Move, context: Context, strict: bool) -> Passed:
    """Check the memory and the ids of a copy whose parts are settled one by one.

    Raises as `settle`.
    """
    check_memory(move)
    return Passed(bool(move.count) and check_ids(move, context, strict))


def check_rows(move: Move, context: Context, strict: bool) -> Passed:
    """Check the destination and the ids of a copy between views whose memory exists and is not
    shared, which the caller knows.

    Raises as `settle`.
    """
    skips = bool(move.count) and check_ids(move, context, strict)
    check_writable(move.dst)
    return Passed(skips)


def check_memory(move: Move) -> None:
    """Raise if memory was replaced or cannot be written, or if a row is both read and written."""
    check_views(move)
    check_disjoint(move)


def check_views(move: Move) -> None:
    """Raise if memory was replaced, or cannot be written."""
    check_writable(move.dst)
    move.src.check_memory()
    move.dst.check_memory()
