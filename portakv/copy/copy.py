# SPDX-License-Identifier: Apache-2.0
"""The one primitive: copy rows from one view to another, under an index on either side."""

from __future__ import annotations

from operator import index as whole_number
from typing import Any

import torch

from portakv.copy.clean import clean
from portakv.copy.enqueue import Piece, launch, refuse_capture
from portakv.engines.choose import across
from portakv.engines.engine import Terms
from portakv.errors import DeviceMismatch, LayoutError, PortaKVError, SlotError
from portakv.plan.move import Move
from portakv.plan.plan import check_disjoint
from portakv.registry.prepared import Route, route
from portakv.registry.registry import Choice, choose
from portakv.runtime.transfer import Completion, Transfer
from portakv.view.index import Index
from portakv.view.view import KVView

_KEPT = 16  # kinds of copies that an index remembers


def copy_rows(
    src: KVView,
    dst: KVView,
    src_index: Any = None,
    dst_index: Any = None,
    *,
    count: int | None = None,
    backend: str | None = None,
    stream: torch.Stream | None = None,
    reinterpret: bool = False,
) -> Transfer:
    """Copy rows between views.

    Args:
        src, dst: views of equal extents and widths in bytes, of any layouts.
        src_index, dst_index: an `Index`, or ids as a slot mapping (step 1); None: consecutive.
        count: tokens to move; by default what the indices cover.
        backend: a backend's name, which then must carry the copy out.
        stream: where to order the work; it first waits for the current stream.
        reinterpret: rows of one number type may go to rows of another: their bits are moved.

    Raises:
        LayoutError: the views cannot hold each other's rows, or the destination cannot be written.
        SlotError: a bad index on the host; bad device ids are raised by the transfer.
        DeviceMismatch, BackendUnavailable, Unsupported: nobody can carry it out; with the trace.
    """
    check_views(src, dst)
    src = src.as_bytes() if reinterpret else src
    mine, theirs = Index.of(src_index), Index.of(dst_index)
    tokens = covered(src, dst, mine, theirs) if count is None else _count(count)
    mine.check_length(tokens, src.slots, "source")
    theirs.check_length(tokens, dst.slots, "destination")
    return carry(src, dst, mine, theirs, tokens, choose(common_device(src, dst), backend), stream)


def check_views(*views: object) -> None:
    """Raise `LayoutError` where a copy is asked of something else than views."""
    for view in views:
        if not isinstance(view, KVView):
            raise LayoutError(
                f"A copy was asked of a {type(view).__name__}; expected two views. Read tensors "
                f"through a layout: KVView(tensors, layout)."
            )


def common_device(src: KVView, dst: KVView) -> torch.device:
    """The device that carries a copy out: the accelerator where one side is on it."""
    if src.device == dst.device or dst.device.type == "cpu":
        return src.device
    if src.device.type == "cpu":
        return dst.device
    raise DeviceMismatch(
        f"The source is on {src.device} and the destination on {dst.device}; a copy runs on one "
        f"device, or between it and the host. Go through a host buffer."
    )


def carry(
    src: KVView,
    dst: KVView,
    src_index: Index,
    dst_index: Index,
    count: int,
    choice: Choice,
    stream: torch.Stream | None,
    *,
    disjoint: bool = False,
    terms: Terms | None = None,
) -> Transfer:
    """Carry a copy of ``count`` positions, which indices and views cover, out through the chosen
    backend, or across the link through an engine over it.

    ``disjoint``: the views share no memory. ``terms``: what a copy across the link may take.
    Raises as `copy_rows` does.
    """
    dst.check_writable()
    # Settled once for an index that is kept: it needs nothing but forms and numbers of slots.
    listed, other = (src_index, dst_index) if src_index.ids is not None else (dst_index, src_index)
    known: list[Piece] | None = None
    key: tuple[object, ...] | None = None
    if listed.ids is not None and not (listed.fleeting or other.fleeting):
        key = (
            src.form, dst.form, src.slots, dst.slots, src.device, dst.device, count, choice, terms,
            src_index is listed, listed.offset, other.ids_token, other.offset,
        )  # fmt: skip
        known = listed.kept.get(key)
    error: PortaKVError | None = None
    if known is not None:
        pieces = known
    else:
        if not src.device == dst.device == choice.backend.device and _must_cross(src, dst, choice):
            choice = across(choice, terms)
        if count == 0:
            route(src.form, dst.form, src_index.plan_step, dst_index.plan_step, None, choice)
            return Transfer()
        given = src_index, dst_index
        pieces, src_index, dst_index, count, error = _settled(
            src, dst, src_index, dst_index, count, choice
        )
        if key is not None and src_index is given[0] and dst_index is given[1]:
            if len(listed.kept) >= _KEPT:
                listed.kept.clear()
            listed.kept[key] = pieces
    if not pieces:
        return Transfer((Completion(error=error),))
    if not disjoint:
        check_disjoint(Move(src, dst, src_index, dst_index, count))
    return launch(pieces, src, dst, src_index, dst_index, stream, error)


def _settled(
    src: KVView, dst: KVView, src_index: Index, dst_index: Index, count: int, choice: Choice
) -> tuple[list[Piece], Index, Index, int, PortaKVError | None]:
    """Judge the indices, drop what the backend cannot skip, and cut the copy into pieces.

    Returns:
        The pieces, none where nothing is left; the indices and positions that they go by; and what
        was found wrong with ids on a device.
    """
    way = route(src.form, dst.form, src_index.plan_step, dst_index.plan_step, None, choice)
    skips = src_index.check(count, src.slots, "source")
    skips |= dst_index.check(count, dst.slots, "destination", distinct=True)
    pieces = _pieces(way, src, dst, src_index, dst_index, count, choice)
    error = None
    trusted = src_index.is_clean(count, src.slots) and dst_index.is_clean(count, dst.slots)
    if (skips or not trusted) and _need_cleaning(pieces, trusted):
        unit = max(way.plan.unit for way, _, _ in pieces)
        src_index, dst_index, count, error = clean(src, dst, src_index, dst_index, count, unit)
        if count == 0:
            return [], src_index, dst_index, count, error
        way = route(src.form, dst.form, src_index.plan_step, dst_index.plan_step, None, choice)
        pieces = _pieces(way, src, dst, src_index, dst_index, count, choice)
    return pieces, src_index, dst_index, count, error


def _must_cross(src: KVView, dst: KVView, choice: Choice) -> bool:
    """True where the backend does not reach both places itself; raise where no engine can help."""
    home = choice.backend.device
    devices = {src.device, dst.device}
    if devices - {home, torch.device("cpu")} or (home not in devices):
        raise DeviceMismatch(
            f"The source is on {src.device} and the destination on {dst.device}, but the copy runs "
            f"on {home}; views must lie there or on the host. Make a connector for their device."
        )
    return (src.form.place, dst.form.place) not in choice.can.places


def _need_cleaning(pieces: list[Piece], trusted: bool) -> bool:
    """Whether a backend on the way cannot take ids that are negative, or not trusted either.

    Raises `Unsupported` inside graph capture, where they cannot be checked.
    """
    for way, _, _ in pieces:
        if not way.can.skips_negative or not (trusted or way.can.guards):
            refuse_capture(
                way.choice.backend.device, "its ids have to be checked before they are used"
            )
            return True
    return False


def _pieces(
    way: Route,
    src: KVView,
    dst: KVView,
    src_index: Index,
    dst_index: Index,
    count: int,
    choice: Choice,
) -> list[Piece]:
    """(route, first position, tokens): the body in the largest units, head and tail by token."""
    by_unit = {way.plan.unit: way}
    pieces = []
    for first, tokens, unit in way.plan.split(Move(src, dst, src_index, dst_index, count)):
        if unit not in by_unit:
            steps = (src_index.plan_step, dst_index.plan_step)
            by_unit[unit] = route(src.form, dst.form, *steps, unit, choice)
        pieces.append((by_unit[unit], first, tokens))
    return pieces


def _count(count: object) -> int:
    try:
        tokens = whole_number(count)  # type: ignore[arg-type]
    except TypeError:
        tokens = -1
    if tokens < 0:
        raise SlotError(f"count={count!r} was asked; expected a whole number of at least 0.")
    return tokens


def covered(src: KVView, dst: KVView, src_index: Index, dst_index: Index) -> int:
    """The tokens that two indices cover alike; raises `SlotError` where they do not."""
    tokens = [x.length for x in (src_index, dst_index) if x.length is not None]
    if not tokens:
        tokens = [src.slots - src_index.offset, dst.slots - dst_index.offset]
    if len(set(tokens)) > 1:
        raise SlotError(
            f"The source covers {tokens[0]} tokens and the destination {tokens[1]}; make them "
            f"equal, or pass count."
        )
    if tokens[0] < 0:
        raise SlotError(f"The index begins {-tokens[0]} tokens behind its end; lower its offset.")
    return tokens[0]
