# SPDX-License-Identifier: Apache-2.0
"""Copies between memory known by addresses that were made before, but for their ids on a device.

Functions that stand for an engine's own are called for the same pools again and again, for a layer
at a time. Views over addresses hold no memory that could be gone, and ids that are clean by promise
need no look, so that all answers about the first copy are those about the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from portakv.backends.base import Again
from portakv.copy.between import carrier
from portakv.plan.plan import Move
from portakv.registry.prepared import prepared
from portakv.registry.registry import Choice
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing
from portakv.runtime.transfer import Completion, EventPool, Transfer, acquire_word, event_pool, hold
from portakv.view.view import KVView


class _Way(NamedTuple):
    again: Again
    tabled: tuple[KVView, ...]  # views whose tables of addresses are read
    guards: bool  # it writes a status word
    events: EventPool
    carried: tuple[str, str]


# kept with the source, so that they go when it goes
_AGAIN = "copies made again"
_KEPT = 64
#: What carried so many tokens between such forms; engines differ by that.
_carriers: Bounded[tuple[Any, ...], str] = Bounded("carriers of copies made again", 4096)


def repeated(move: Move, choice: Choice) -> Transfer | None:
    """The copy, ordered on the current stream, if one like it was remembered; else None."""
    src, dst, mine, theirs, count = move
    kind = _kind(move, choice.backend.device)
    if kind is None or count < 1 or capturing(choice.backend.device):
        return None
    name = _carriers.get((src.form, dst.form, kind, choice, count))
    way: _Way | None = src.derived.get(_AGAIN, {}).get((dst, kind, choice, name))
    if way is None or count > way.again.most:
        return None
    for view in way.tabled:
        view.follow_table(choice.backend.device)
    read = src.origins[0] if mine.ids is None else mine.ids.data_ptr()
    written = dst.origins[0] if theirs.ids is None else theirs.ids.data_ptr()
    word = acquire_word() if way.guards else None
    way.again(read, written, 0, count, word.address if word else 0)
    words = [(word, 0)] if word else []
    completion = Completion(way.events.recorded(None), (), words, None, None, way.events)
    if word:
        hold(completion)
    return Transfer((completion,), (src, dst, mine, theirs), way.carried)


def remember(move: Move, choice: Choice, made: Transfer) -> None:
    """Remember a copy that was made just now, by this thread, if its like can be repeated: once its
    like was made twice, as views that are made for one call never are."""
    src, dst, mine, theirs, count = move
    device = choice.backend.device
    kind = _kind(move, device)
    if kind is None or not made.completions or capturing(device):
        return
    half = choice if src.device == dst.device else carrier(src, dst, choice, None)
    ready = prepared(src.form, dst.form, *move.steps, None, half)
    name = made.carried[0]
    again = getattr(ready.launch, "again", None)
    if again is None:
        return
    key = dst, kind, choice, name
    ways = src.derived.setdefault(_AGAIN, Bounded(_AGAIN, _KEPT))
    if key not in ways:
        ways[key] = None
        return
    if ways[key] is None:
        found = again(src, dst, mine, theirs)
        if found is None:
            return
        tabled = tuple(view for view in (src, dst) if view.table_on(device) is not None)
        ways[key] = _Way(found, tabled, ready.can.guards, event_pool(device), made.carried)
    _carriers[src.form, dst.form, kind, choice, count] = name


def _kind(move: Move, device: torch.device) -> tuple[Any, ...] | None:
    """What a copy's indices have in common with another's that needs no other answer; None unless
    both views are known by addresses, for more than one call, and ids lie, clean by promise, where
    kernels read them. Without any ids it would depend on the tokens which rows both sides share."""
    if not all(view.foreign and not view.fleeting for view in (move.src, move.dst)):
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
