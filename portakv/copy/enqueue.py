# SPDX-License-Identifier: Apache-2.0
"""Order and completion: launches on streams, inside graph capture, and what must outlive them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from portakv.errors import PortaKVError, Unsupported
from portakv.plan.move import Move
from portakv.registry.prepared import Prepared
from portakv.runtime import events
from portakv.runtime.devices import capturing
from portakv.runtime.transfer import (
    NOTHING,
    Completion,
    Pending,
    StatusWord,
    Transfer,
    acquire_word,
    hold,
)


class Piece(NamedTuple):
    """What carries out ``tokens`` positions of a copy from position ``first`` on."""

    ready: Prepared
    first: int
    tokens: int


def launch(
    pieces: Sequence[Piece], move: Move, stream: torch.Stream | None, error: PortaKVError | None
) -> Transfer:
    """Launch every piece, ordered behind the current stream (or, after it, on ``stream``)."""
    if move.src.form.place != "device" and move.dst.form.place != "device":
        return _launch_on_host(pieces, move, error)
    device = pieces[0].ready.choice.backend.device
    if capturing(device):
        return _launch_captured(pieces, move, stream, device)
    placed = [ready.place_both(move) for ready, _, _ in pieces]
    if stream is not None:
        follow_current(stream, device, placed)
    pendings: list[Pending] = []
    status: list[tuple[StatusWord, int]] = []
    carried = None
    for (ready, first, tokens), whole in zip(pieces, placed, strict=True):
        word = _word(ready, first, status)
        pending = ready.launch(*whole.part(first, tokens), stream, word)
        carried = carried or ready.carried
        if pending is not None:
            pendings.append(pending)
    pool = events.pool(device)
    event = pool.recorded(stream)
    kept = (move.src, move.dst, placed)
    completion = Completion(event, pendings, status, error, kept if pendings else None, pool)
    if pendings or status:
        hold(completion)
    return Transfer((completion,), kept, False, carried or NOTHING)


def _word(ready: Prepared, first: int, status: list[tuple[StatusWord, int]]) -> torch.Tensor | None:
    """A status word for a launch that guards; noted with the position that it counts from."""
    if not ready.can.guards:
        return None
    word = acquire_word()
    status.append((word, first))
    return word.tensor


def follow_current(stream: torch.Stream, device: torch.device, moves: Sequence[Move]) -> None:
    """Make ``stream`` wait for the current one, and tell the allocator who uses the memory."""
    src, dst = moves[0].src, moves[0].dst
    # Tables are made on the current stream, so they have to be there before the other waits.
    tables = [view.table for view in (src, dst) if len(view.origins) > 1]
    stream.wait_stream(torch.accelerator.current_stream(device.index))
    indices = [index for move in moves for index in (move.src_index, move.dst_index)]
    ids = [index.ids for index in indices if index.ids is not None]
    for tensor in (*src.owners, *dst.owners, *ids, *tables):
        if tensor.device == device:
            tensor.record_stream(stream)


def _launch_on_host(pieces: Sequence[Piece], move: Move, error: PortaKVError | None) -> Transfer:
    pendings, carried = [], None
    for ready, first, tokens in pieces:
        pending = ready.launch(*ready.place_both(move).part(first, tokens), None, None)
        carried = carried or ready.carried
        if pending is not None:
            pendings.append(pending)
    if not pendings and error is None:
        return Transfer((), None, False, carried or NOTHING)
    completion = Completion(None, pendings, (), error, move)
    if pendings:
        hold(completion)
    return Transfer((completion,), None, False, carried or NOTHING)


def _launch_captured(
    pieces: Sequence[Piece], move: Move, stream: torch.Stream | None, device: torch.device
) -> Transfer:
    """Capture every piece; with ``stream`` the capture forks there, and `Transfer.wait` joins."""
    _check_capture(pieces, move)
    if stream is not None:
        stream.wait_stream(torch.accelerator.current_stream(device.index))
    # The graph may write these words at every replay, so they are never given back.
    status: list[tuple[StatusWord, int]] = []
    for ready, first, tokens in pieces:
        # The ids lie where they are read, or a copy of theirs that was made before does.
        word = _word(ready, first, status)
        ready.launch(*ready.place_both(move).part(first, tokens), stream, word)
    event = None
    if stream is not None:
        event = torch.Event(device)
        event.record(stream)
    completion = Completion(event, words=status, standing=True)
    return Transfer((completion,), move, True, pieces[0].ready.carried)


def refuse_capture(device: torch.device, why: str) -> None:
    """Raise `Unsupported` inside graph capture, before anything was enqueued."""
    if capturing(device):
        raise Unsupported(
            "A copy inside graph capture",
            f"{why}; capture a copy with a capturable backend and contiguous device ids of a dtype "
            f"that it reads",
        )


def _check_capture(pieces: Sequence[Piece], move: Move) -> None:
    for ready, _, _ in pieces:
        device = ready.choice.backend.device
        if not ready.can.capturable:
            refuse_capture(device, f"backend {ready.choice.name!r} cannot be captured")
        for index in (move.src_index, move.dst_index):
            if not index.has_ids_on(ready.home_of_ids, ready.can.index_dtypes):
                refuse_capture(device, "its ids would have to be copied first")
