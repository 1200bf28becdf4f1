# SPDX-License-Identifier: Apache-2.0
"""Order and completion: launches on streams, inside graph capture, and what must outlive them."""

from __future__ import annotations

from typing import Any

import torch

from portakv.errors import PortaKVError, Unsupported
from portakv.registry.ids import bring
from portakv.registry.prepared import Route
from portakv.runtime import events, words
from portakv.runtime.capture import capturing
from portakv.runtime.transfer import Completion, Transfer
from portakv.runtime.watch import watch
from portakv.view.index import Index
from portakv.view.view import KVView

Piece = tuple[Route, int, int]  # a route, its first position, its tokens


def launch(
    pieces: list[Piece],
    src: KVView,
    dst: KVView,
    src_index: Index,
    dst_index: Index,
    stream: torch.Stream | None,
    error: PortaKVError | None,
) -> Transfer:
    """Launch every piece, ordered behind the current stream (or, after it, on ``stream``)."""
    if src.form.place != "device" and dst.form.place != "device":
        return _launch_on_host(pieces, src, dst, src_index, dst_index, error)
    device = pieces[0][0].choice.backend.device
    if capturing(device):
        return _launch_captured(pieces, src, dst, src_index, dst_index, stream)
    placed = [_placed(way, src_index, dst_index) for way, _, _ in pieces]
    if stream is not None:
        _order(stream, device, src, dst, placed)
    pendings: list[Any] = []
    status: list[tuple[words.Word, int]] = []
    for (way, start, tokens), (mine, theirs) in zip(pieces, placed, strict=True):
        word = _word(way, start, status)
        pending = way.launch(
            src, dst, mine.shifted(start), theirs.shifted(start), tokens, stream, word
        )
        if pending is not None:
            pendings.append(pending)
    pool = events.pool(device)
    event = pool.recorded(stream)
    kept = (src, dst, placed)
    completion = Completion(event, pendings, status, error, kept if pendings else None, pool)
    if pendings or status:
        watch(completion)
    return Transfer((completion,), kept)


def _placed(way: Route, src_index: Index, dst_index: Index) -> tuple[Index, Index]:
    """Both indices with their ids where the backend reads them."""
    if src_index.fleeting and dst_index.fleeting and way.can.index_on != "any":
        bring((src_index, dst_index), way.home_of_ids, way.can.index_dtypes)
    return way.place(src_index), way.place(dst_index)


def _word(way: Route, start: int, status: list[tuple[words.Word, int]]) -> torch.Tensor | None:
    """A status word for a launch that guards; noted with the position that it counts from."""
    if not way.can.guards:
        return None
    word = words.acquire()
    status.append((word, start))
    return word.tensor


def _order(
    stream: torch.Stream,
    device: torch.device,
    src: KVView,
    dst: KVView,
    placed: list[tuple[Index, Index]],
) -> None:
    """Make ``stream`` wait for the current one, and tell the allocator who uses the memory."""
    # Tables are made on the current stream, so they have to be there before the other waits.
    tables = [view.table for view in (src, dst) if len(view.origins) > 1]
    stream.wait_stream(torch.accelerator.current_stream(device.index))
    ids = [index.ids for pair in placed for index in pair if index.ids is not None]
    for tensor in (*src.owners, *dst.owners, *ids, *tables):
        if tensor.device == device:
            tensor.record_stream(stream)


def _launch_on_host(
    pieces: list[Piece],
    src: KVView,
    dst: KVView,
    src_index: Index,
    dst_index: Index,
    error: PortaKVError | None,
) -> Transfer:
    pendings = []
    for way, start, tokens in pieces:
        mine, theirs = way.place(src_index), way.place(dst_index)
        if start:
            mine, theirs = mine.shifted(start), theirs.shifted(start)
        pending = way.launch(src, dst, mine, theirs, tokens, None, None)
        if pending is not None:
            pendings.append(pending)
    if not pendings and error is None:
        return Transfer()
    completion = Completion(None, pendings, (), error, (src, dst, src_index, dst_index))
    if pendings:
        watch(completion)
    return Transfer((completion,))


def _launch_captured(
    pieces: list[Piece],
    src: KVView,
    dst: KVView,
    src_index: Index,
    dst_index: Index,
    stream: torch.Stream | None,
) -> Transfer:
    """Capture every piece; with ``stream`` the capture forks there, and `Transfer.wait` joins."""
    _check_capture(pieces, src_index, dst_index)
    device = pieces[0][0].choice.backend.device
    if stream is not None:
        stream.wait_stream(torch.accelerator.current_stream(device.index))
    # The graph may write these words at every replay, so they are never given back.
    status: list[tuple[words.Word, int]] = []
    for way, start, tokens in pieces:
        # The ids lie where they are read, or a copy of theirs that was made before does.
        mine, theirs = way.place(src_index).shifted(start), way.place(dst_index).shifted(start)
        way.launch(src, dst, mine, theirs, tokens, stream, _word(way, start, status))
    event = None
    if stream is not None:
        event = torch.Event(device)
        event.record(stream)
    completion = Completion(event, words=status, standing=True)
    return Transfer((completion,), (src, dst, src_index, dst_index), captured=True)


def refuse_capture(device: torch.device, why: str) -> None:
    """Raise `Unsupported` inside graph capture, before anything was enqueued."""
    if capturing(device):
        raise Unsupported(
            "A copy inside graph capture",
            f"{why}; capture a copy with a capturable backend and contiguous device ids of a dtype "
            f"that it reads",
        )


def _check_capture(pieces: list[Piece], src_index: Index, dst_index: Index) -> None:
    for way, _, _ in pieces:
        device = way.choice.backend.device
        if not way.can.capturable:
            refuse_capture(device, f"backend {way.choice.name!r} cannot be captured")
        for index in (src_index, dst_index):
            if not index.has_ids_on(way.home_of_ids, way.can.index_dtypes):
                refuse_capture(device, "its ids would have to be copied first")
