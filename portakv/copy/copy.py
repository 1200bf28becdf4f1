# SPDX-License-Identifier: Apache-2.0
"""Check, cut and order one copy: the primitive that every call becomes."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, inf
from operator import index as whole_number
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch

from portakv.arguments import flag, one_of
from portakv.copy.between import carrier
from portakv.errors import DeviceMismatch, LayoutError, SlotError
from portakv.plan.plan import Move, check_disjoint
from portakv.registry.prepared import Prepared, bring_table, prepared
from portakv.registry.registry import Choice, choose
from portakv.runtime import streams
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.transfer import (
    NOTHING,
    Completion,
    Pending,
    StatusWord,
    Transfer,
    acquire_word,
    bad_slot,
    event_pool,
    hold,
    hold_memory,
)
from portakv.view.index import Ids as Ids
from portakv.view.index import Index
from portakv.view.view import KVView
from portakv.view.view import Tensors as Tensors


class HasTensor(Protocol):
    """A memory object of an engine, with its tensors in ``.tensor``."""

    @property
    def tensor(self) -> Any:
        """`Tensors`; anything else is refused when it is used."""


#: How ids on a device are checked.
Check: TypeAlias = Literal["usual", "strict"]
CHECKS: tuple[str, ...] = get_args(Check)
UNCHECKED = "its ids have to be checked before they are used"  # inside graph capture
#: What executes a part of a copy, the first position of the part, and its tokens.
Piece: TypeAlias = tuple[Prepared, int, int]
#: A chunk.
MemoryObject: TypeAlias = "Tensors | HasTensor"


def checked(
    src: KVView, dst: KVView, src_index: Index, dst_index: Index, count: object, backend: str | None
) -> tuple[Move, Choice]:
    """Return a caller's copy and the chosen backend, after all checks but those of the stream and
    of ids.

    ``count`` None: the tokens that the indices cover. Raises as `copy_rows`.
    """
    if count is None:
        tokens = covered(src, dst, src_index, dst_index)
    else:
        tokens = whole("count", count, "a whole number of at least 0", 0)
    src_index.check_length(tokens, src.slots, "source")
    dst_index.check_length(tokens, dst.slots, "destination")
    choice = choose(common_device(src, dst), backend)
    return Move(src, dst, src_index, dst_index, tokens), choice


def is_strict(check: object) -> bool:
    """Return True for 'strict'; raise `InvalidTerms` for anything but that and 'usual'."""
    if isinstance(check, str) and check == "usual":  # the usual case, without a call
        return False
    return one_of("check", check, CHECKS) == "strict"


def source_of(src: KVView, dst: KVView, reinterpret: bool) -> KVView:
    """Return the source of a copy as it is read; raise `LayoutError` if one side is not a view."""
    if not (isinstance(src, KVView) and isinstance(dst, KVView)):
        kind = type(dst if isinstance(src, KVView) else src).__name__
        raise LayoutError(
            f"Expected two views, got a {kind}. Read tensors through a layout: "
            f"KVView(tensors, layout)."
        )
    return src if reinterpret is False or not flag("reinterpret", reinterpret) else src.as_bytes()


def common_device(src: KVView, dst: KVView) -> torch.device:
    """Return the device that executes a copy: the accelerator if one side is on it."""
    if src.device == dst.device or dst.device.type == "cpu":
        return src.device
    if src.device.type == "cpu":
        return dst.device
    raise DeviceMismatch(
        f"Expected a copy on one device, between it and the host, or between two devices of one "
        f"type, got {src.device} as source and {dst.device} as destination. Go through a host "
        f"buffer."
    )


def covered(src: KVView, dst: KVView, src_index: Index, dst_index: Index) -> int:
    """Return the tokens that both indices cover; raise `SlotError` if they differ."""
    src_tokens = src_index.length
    dst_tokens = dst_index.length
    if src_tokens is None and dst_tokens is None:
        src_tokens = src.slots - src_index.offset
        dst_tokens = dst.slots - dst_index.offset
    tokens = dst_tokens if src_tokens is None else src_tokens
    assert tokens is not None
    if dst_tokens not in (None, tokens):
        raise SlotError(
            f"Expected equally many tokens on both sides, got a source that covers {tokens} and a "
            f"destination of {dst_tokens}. Make them equal, or pass count."
        )
    if tokens < 0:
        raise SlotError(
            f"Expected an index that begins before its end, got one that begins {-tokens} tokens "
            f"after it. Lower its offset."
        )
    return tokens


def whole(name: str, value: object, expected: str, least: float = -inf) -> int:
    """Return an argument that is a whole number; raise `SlotError` if it is not one."""
    try:
        number = whole_number(value)  # type: ignore[arg-type]
        if number >= least and not isinstance(value, bool):
            return number
    except TypeError:
        pass
    raise SlotError(f"Expected {name} to be {expected}, got {value!r}. Pass one.")


def copy_move(
    move: Move,
    choice: Choice,
    stream: torch.Stream | None,
    *,
    known_good: bool = False,
    strict: bool = False,
) -> Transfer:
    """Execute a copy that its indices and views cover, by the chosen backend or a strategy over it.

    Args:
        stream: where to order the work; it first waits for the current stream.
        known_good: the memory of the views was checked just now: it exists, and no byte is shared.
        strict: check ids on a device before anything is moved, which waits for them.

    Raises as `copy_rows`.
    """
    src = move.src
    dst = move.dst
    if stream is not None:
        streams.check_stream(stream, choice.backend.device)
    dst.check_writable()
    if not known_good:
        src.check_memory()
        dst.check_memory()
    if not src.device == dst.device == choice.backend.device:
        choice = carrier(src, dst, choice, None)
    ready = prepared(src.form, dst.form, *move.steps, None, choice)
    if move.count == 0:
        return Transfer()
    skips = check_ids(move, strict)
    error = None
    pieces = _pieces(ready, move, choice)
    src_index = move.src_index
    dst_index = move.dst_index
    clean = (src_index.on_host or src_index.is_clean(move.count, src.slots)) and (
        dst_index.on_host or dst_index.is_clean(move.count, dst.slots)
    )
    guarded = skips or not clean
    if guarded and not _take(pieces, move, clean):
        guarded = False
        check_not_captured(choice.backend.device, UNCHECKED)
        move, error = drop_bad_ids(move, max(ready.plan.unit for ready, _, _ in pieces))
        if move.count == 0:
            return Transfer((Completion(error=error),))
        pieces = _pieces(prepared(src.form, dst.form, *move.steps, None, choice), move, choice)
    if not known_good:
        check_disjoint(move)
    return _launch(pieces, move, stream, error, guarded)


def _pieces(ready: Prepared, move: Move, choice: Choice) -> list[Piece]:
    """Return the body of a copy in the largest units, and its head and tail by token."""
    pieces = []
    for first, tokens, unit in ready.plan.split(move):
        part = ready
        if unit != ready.plan.unit:
            part = prepared(move.src.form, move.dst.form, *move.steps, unit, choice)
        pieces.append((part, first, tokens))
    return pieces


def _take(pieces: list[Piece], move: Move, clean: bool) -> bool:
    """Return whether the backends of a copy accept negative ids, and ids that are not clean."""
    for ready, first, tokens in pieces:
        can = ready.claims(move.part(first, tokens))
        if not can.skips_negative or not (clean or can.guards):
            return False
    return True


def check_ids(move: Move, strict: bool) -> bool:
    """Return True if ids on the host skip positions; with ``strict``, wait for ids on a device and
    check them in the same way.

    Raises:
        SlotError: a slot past the end, or a destination that occurs twice.
        Unsupported: inside graph capture, if it had to wait.
    """
    src_index = move.src_index
    dst_index = move.dst_index
    if strict and not (src_index.on_host and dst_index.on_host):
        check_not_captured(common_device(move.src, move.dst), UNCHECKED)
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
    return Move(move.src, move.dst, src_index, dst_index, usable_tokens), error


def _launch(
    pieces: Sequence[Piece],
    move: Move,
    stream: torch.Stream | None,
    error: SlotError | None,
    guarded: bool,
) -> Transfer:
    """Launch every piece after the current stream's work, or on ``stream`` after that.

    Inside graph capture with ``stream`` the capture forks there, and `Transfer.wait` joins it. A
    backend that executes ids which are to be ``guarded`` gets a status word; a strategy is picked
    that takes one.
    """
    device = pieces[0][0].choice.backend.device
    on_device = move.src.form.place == "device" or move.dst.form.place == "device"
    captured = on_device and capturing(device)
    if captured:
        _check_capture(pieces, move)
    parts = [
        (ready, first, ready.place_both(move).part(first, tokens))
        for ready, first, tokens in pieces
    ]
    if on_device and not captured:
        for view, read in zip((move.src, move.dst), pieces[0][0].tables, strict=True):
            if read and view.device == device:
                bring_table(view, device)
    if captured:  # a graph's memory belongs to its owner, so no allocator records it
        streams.follow_current(stream)
    elif stream is not None:
        follow_current(stream, [part for *_, part in parts])
    pendings: list[Pending] = []
    status: list[tuple[StatusWord, int]] = []
    carried = NOTHING
    for ready, first, part in parts:
        word = None
        if on_device and (ready.can.guards or guarded):
            status_word = acquire_word()
            status.append((status_word, first))  # it counts from its own start
            word = status_word.tensor
        pending = ready.launch(*part, stream, word)
        if carried is NOTHING:
            carried = ready.carried
        if pending is not None:
            pendings.append(pending)
    if captured:
        # The graph may write these words at every replay, so they are never given back.
        return streams.captured(device, stream, move, status, carried)
    event = None
    pool = None
    retained = (move.src, move.dst, parts)
    if on_device:
        pool = event_pool(device)
        event = pool.recorded(stream)
    elif not pendings and error is None:
        return Transfer((), None, carried)
    # No allocator keeps a peer's memory while this device reads it, or while its own device sends.
    peer = move.src.form.place == "peer"
    in_use = retained if pendings or peer else None
    completion = Completion(event, pendings, status, error, in_use, pool)
    if peer:
        hold_memory(completion)
    if pendings or status:
        hold(completion)
    return Transfer((completion,), retained, carried)


def follow_current(stream: torch.Stream, moves: Sequence[Move]) -> None:
    """Make ``stream`` wait for the current stream, and tell the allocator which memory of two views
    it uses."""
    src = moves[0].src
    dst = moves[0].dst
    tables = [table for view in (src, dst) if (table := view.table_on(stream.device)) is not None]
    indices = [index for move in moves for index in (move.src_index, move.dst_index)]
    ids = [index.ids for index in indices if index.ids is not None]
    streams.follow_current(stream, *src.retained, *dst.retained, *ids, *tables)


def check_not_captured(device: torch.device, why: str) -> None:
    """Raise `Unsupported` inside graph capture, before anything is enqueued."""
    if capturing(device):
        todo = "capture a copy with a capturable backend and contiguous device ids of a dtype"
        raise refuse_capture("A copy", f"{why}; {todo} that it reads")


def _check_capture(pieces: Sequence[Piece], move: Move) -> None:
    for ready, _, _ in pieces:
        device = ready.choice.backend.device
        if not ready.can.capturable:
            check_not_captured(device, f"backend {ready.choice.name!r} cannot be captured")
        for index in (move.src_index, move.dst_index):
            if not index.has_ids_on(ready.ids_device, ready.can.index_dtypes):
                check_not_captured(device, "its ids would have to be copied first")
