# SPDX-License-Identifier: Apache-2.0
"""Order and completion: launches on streams, inside graph capture, and what must outlive them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from portakv.errors import PortaKVError
from portakv.plan.plan import Move
from portakv.registry.prepared import Prepared
from portakv.runtime import streams
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.transfer import (
    NOTHING,
    Completion,
    Pending,
    StatusWord,
    Transfer,
    acquire_word,
    event_pool,
    hold,
)

#: What carries out a part of a copy, the part's first position, and its tokens.
Piece: TypeAlias = tuple[Prepared, int, int]


def launch(
    pieces: Sequence[Piece], move: Move, stream: torch.Stream | None, error: PortaKVError | None
) -> Transfer:
    """Launch every piece, ordered behind the current stream (or, after it, on ``stream``).

    Inside graph capture every piece is captured; with ``stream`` the capture forks there, and
    `Transfer.wait` joins.
    """
    device = pieces[0][0].choice.backend.device
    on_device = move.src.form.place == "device" or move.dst.form.place == "device"
    captured = on_device and capturing(device)
    if captured:
        _check_capture(pieces, move)
    placed = []
    for ready, _, _ in pieces:
        placed.append(ready.place_both(move))
    if captured:  # a graph's memory is its owner's, so that no allocator is told of it
        streams.follow_current(stream)
    elif stream is not None:
        follow_current(stream, placed)
    pendings: list[Pending] = []
    status: list[tuple[StatusWord, int]] = []
    carried = NOTHING
    for (ready, first, tokens), whole in zip(pieces, placed, strict=True):
        word = None
        if on_device and ready.can.guards:
            status_word = acquire_word()
            status.append((status_word, first))  # it counts from there
            word = status_word.tensor
        pending = ready.launch(*whole.part(first, tokens), stream, word)
        if carried is NOTHING:
            carried = ready.carried
        if pending is not None:
            pendings.append(pending)
    if captured:
        # The graph may write these words at every replay, so they are never given back.
        return streams.captured(device, stream, move, status, carried)
    event, pool, kept = None, None, (move.src, move.dst, placed)
    if on_device:
        pool = event_pool(device)
        event = pool.recorded(stream)
    elif not pendings and error is None:
        return Transfer((), None, carried)
    completion = Completion(event, pendings, status, error, kept if pendings else None, pool)
    if pendings or status:
        hold(completion)
    return Transfer((completion,), kept, carried)


def follow_current(stream: torch.Stream, moves: Sequence[Move]) -> None:
    """Make ``stream`` wait for the current one, and tell the allocator that it uses the memory of
    copies between two views."""
    src, dst = moves[0].src, moves[0].dst
    # Tables are made on the current stream, so they have to be there before the other waits.
    tables = [view.table for view in (src, dst) if len(view.origins) > 1]
    indices = [index for move in moves for index in (move.src_index, move.dst_index)]
    ids = [index.ids for index in indices if index.ids is not None]
    streams.follow_current(stream, *src.owners, *dst.owners, *ids, *tables)


def check_not_captured(device: torch.device, why: str) -> None:
    """Raise `Unsupported` inside graph capture, before anything was enqueued."""
    if capturing(device):
        todo = "capture a copy with a capturable backend and contiguous device ids of a dtype"
        raise refuse_capture("A copy", f"{why}; {todo} that it reads")


def _check_capture(pieces: Sequence[Piece], move: Move) -> None:
    for ready, _, _ in pieces:
        device = ready.choice.backend.device
        if not ready.can.capturable:
            check_not_captured(device, f"backend {ready.choice.name!r} cannot be captured")
        for index in (move.src_index, move.dst_index):
            if not index.has_ids_on(ready.home_of_ids, ready.can.index_dtypes):
                check_not_captured(device, "its ids would have to be copied first")
