# SPDX-License-Identifier: Apache-2.0
"""Launch a copy that is settled, without a further question, and return its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from portakv.copy.context import Context
from portakv.copy.settle import Settled
from portakv.plan.move import Move
from portakv.registry.prepared import Prepared, bring_table
from portakv.runtime import streams
from portakv.runtime.transfer import (
    NOTHING,
    Completion,
    Pending,
    StatusWord,
    Transfer,
    acquire_word,
    event_pool,
    hold,
    hold_memory,
)


class LaunchPart(NamedTuple):
    """A piece of a copy with its ids where its backend reads them.

    Attributes:
        ready: the backend with its plan.
        first: the position in the whole copy at which the part begins.
        move: the part as a copy.
    """

    ready: Prepared
    first: int
    move: Move


def launch(settled: Settled, context: Context) -> Transfer:
    """Launch every piece after the current stream's work, or on the context's stream after that.

    Inside graph capture with a stream the capture forks there, and `Transfer.wait` joins it.
    """
    move, pieces, error, *_ = settled
    if not pieces:
        return Transfer(() if error is None else (Completion(error=error),))
    device, stream, captured = context
    on_device = device.type != "cpu"
    parts: list[LaunchPart] = []
    for ready, first, tokens in pieces:
        parts.append(LaunchPart(ready, first, ready.place_both(move).part(first, tokens)))
    if captured:  # a graph's memory belongs to its owner, so no allocator records it
        streams.follow_current(stream)
    elif on_device:
        bring_tables(move, pieces[0][0].tables, device)
        follow_current(stream, [part.move for part in parts])
    pendings, status, carried = _enqueue(parts, settled, context)
    if captured:
        # The graph may write these words at every replay, so they are never given back.
        return streams.captured(device, stream, move, status, carried)
    if not (on_device or pendings or error):
        return Transfer((), None, carried)
    retained = (move.src, move.dst, parts)
    # The allocator knows the ids' memory by the stream on which they were brought, which may be
    # another one. None keeps a peer's memory while this device reads it, or its own device sends.
    ids = [(part.move.src_index, part.move.dst_index) for part in parts]
    peer = move.src.form.place == "peer"
    pool = event_pool(device) if on_device else None
    completion = Completion(
        None if pool is None else pool.recorded(stream),
        pendings,
        status,
        error,
        retained if pendings or peer else ids,
        pool,
    )
    if peer:
        hold_memory(completion)
    if pendings or pool is not None:
        hold(completion)
    return Transfer((completion,), retained, carried)


def _enqueue(
    parts: Sequence[LaunchPart], settled: Settled, context: Context
) -> tuple[list[Pending], list[tuple[StatusWord, int]], tuple[str, str]]:
    """Launch parts; return what no stream orders, the status words with their first positions, and
    what executes the first part.

    A backend that guards ids gets a status word if it has ids that the host has not checked. If ids
    are to be guarded, a strategy is picked that takes one.
    """
    pendings: list[Pending] = []
    status: list[tuple[StatusWord, int]] = []
    carried = NOTHING
    on_device = context.device.type != "cpu"
    checked = settled.move.ids_on_host
    for ready, first, part in parts:
        word = None
        if on_device and (settled.guarded or (ready.can.guards and not checked)):
            status_word = acquire_word()
            status.append((status_word, first))  # it counts from its own start
            word = status_word.tensor
        pending = ready.launch(*part, context.stream, word)
        if carried is NOTHING:
            carried = ready.carried
        if pending is not None:
            pendings.append(pending)
    return pendings, status, carried


def bring_tables(
    move: Move, tables: tuple[bool, bool], device: torch.device, captured: bool = False
) -> None:
    """Have the tables of addresses on the device that backends read there.

    ``tables``: for each side, whether its table is read. ``captured``: as for `bring_table`.
    """
    for view, read in zip((move.src, move.dst), tables, strict=True):
        if read and view.device == device:
            bring_table(view, device, captured=captured)


def follow_current(stream: torch.Stream | None, moves: Sequence[Move]) -> None:
    """Make ``stream`` wait for the current stream, and tell the allocator which memory of two views
    it uses. None: it is the current stream."""
    if stream is None:
        return
    src = moves[0].src
    dst = moves[0].dst
    tables = [table for view in (src, dst) if (table := view.table_on(stream.device)) is not None]
    indices = [index for move in moves for index in (move.src_index, move.dst_index)]
    ids = [index.ids for index in indices if index.ids is not None]
    views = (*src.used_on(stream), *dst.used_on(stream))
    streams.follow_current(stream, *views, *ids, *tables)
