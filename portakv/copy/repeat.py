# SPDX-License-Identifier: Apache-2.0
"""Repeat a copy between memory known by addresses, with other ids on a device.

Functions in the place of an engine's own are called for the same pools again and again, one layer
at a time. Views over addresses hold no memory that could be gone, and ids that are clean by promise
need no check. So every decision about the first copy holds for the next ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from portakv.backends.base import Again
from portakv.copy.between import carrier
from portakv.copy.context import Context
from portakv.plan.plan import Move
from portakv.registry.prepared import prepared
from portakv.registry.registry import Choice
from portakv.runtime.bounded import Bounded
from portakv.runtime.transfer import Completion, EventPool, Transfer, acquire_word, event_pool, hold
from portakv.view.view import KVView


class _Repeatable(NamedTuple):
    again: Again
    tabled: tuple[KVView, ...]  # views whose tables of addresses are read
    guards: bool  # it writes a status word
    events: EventPool
    carried: tuple[str, str]


# kept with the source, and released with it
_AGAIN = "copies made again"
_KEPT = 64
#: The backend of a copy of so many tokens between two forms; strategies may differ by their number.
_strategies: Bounded[tuple[Any, ...], str] = Bounded("carriers of copies made again", 4096)


def repeated(move: Move, choice: Choice, context: Context) -> Transfer | None:
    """Issue the copy on the current stream if one like it was remembered; else return None."""
    src = move.src
    dst = move.dst
    kind = _kind(move, context.device)
    if kind is None or move.count < 1 or context.captured:
        return None
    name = _strategies.get((src.form, dst.form, kind, choice, move.count))
    repeatable: _Repeatable | None = src.derived.get(_AGAIN, {}).get((dst, kind, choice, name))
    if repeatable is None or move.count > repeatable.again.most:
        return None
    for view in repeatable.tabled:
        view.follow_table(context.device)
    src_ids = move.src_index.ids
    dst_ids = move.dst_index.ids
    read = src.origins[0] if src_ids is None else src_ids.data_ptr()
    written = dst.origins[0] if dst_ids is None else dst_ids.data_ptr()
    word = acquire_word() if repeatable.guards else None
    repeatable.again(read, written, 0, move.count, word.address if word else 0)
    words = [(word, 0)] if word else []
    completion = Completion(
        repeatable.events.recorded(None), (), words, None, None, repeatable.events
    )
    if word:
        hold(completion)
    retained = (src, dst, move.src_index, move.dst_index)
    return Transfer((completion,), retained, repeatable.carried)


def remember(move: Move, choice: Choice, context: Context, made: Transfer) -> None:
    """Remember a copy that this thread just made, if it can be repeated.

    A copy is remembered when its like was made twice, which never happens to views made for one
    call.
    """
    src = move.src
    dst = move.dst
    device = context.device
    kind = _kind(move, device)
    if kind is None or not made.completions or context.captured:
        return
    half = choice if src.device == dst.device else carrier(src, dst, choice, None)
    ready = prepared(src.form, dst.form, *move.steps, None, half)
    name = made.carried[0]
    again = getattr(ready.launch, "again", None)
    if again is None:
        return
    key = dst, kind, choice, name
    repeatables = src.derived.setdefault(_AGAIN, Bounded(_AGAIN, _KEPT))
    if key not in repeatables:
        repeatables[key] = None
        return
    if repeatables[key] is None:
        result = again(src, dst, move.src_index, move.dst_index)
        if result is None:
            return
        tabled = tuple(view for view in (src, dst) if view.table_on(device) is not None)
        repeatables[key] = _Repeatable(
            result, tabled, ready.can.guards, event_pool(device), made.carried
        )
    _strategies[src.form, dst.form, kind, choice, move.count] = name


def _kind(move: Move, device: torch.device) -> tuple[Any, ...] | None:
    """Return the key under which copies have all decisions in common; None if there is none.

    Both views must be known by addresses and be made for more than one call. Ids must be clean by
    promise and lie where kernels read them. Without any ids, the tokens would decide which rows
    both sides share.
    """
    if not all(view.raw and not view.temporary for view in (move.src, move.dst)):
        return None
    kind: tuple[Any, ...] = ()
    for index in move.src_index, move.dst_index:
        ids = index.ids
        if index.offset or index.plan_step > 1:
            return None
        if ids is None:
            kind = *kind, None
        elif index.trusted and not ids.is_cpu and ids.device == device and ids.is_contiguous():
            kind = *kind, ids.dtype
        else:
            return None
    return kind if any(kind) else None
