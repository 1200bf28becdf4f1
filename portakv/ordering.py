# SPDX-License-Identifier: Apache-2.0
"""Order and completion: launches on streams, inside graph capture, and what must outlive them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from . import words
from .errors import PortaKVError, Unsupported
from .index import Index
from .routes import Route
from .transfer import Completion, Transfer
from .view import KVView

_HOST = torch.device("cpu")

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
    device = pieces[0][0].choice.backend.device
    if device == _HOST:
        return _launch_on_host(pieces, src, dst, src_index, dst_index, error)
    if capturing(device):
        return _launch_captured(pieces, src, dst, src_index, dst_index, stream)
    placed = [
        (src_index.placed(way.can, device), dst_index.placed(way.can, device))
        for way, _, _ in pieces
    ]
    if stream is not None:
        _order(stream, device, src, dst, placed)
    word = None
    for way, _, _ in pieces:
        if way.can.guards and word is None:
            word = words.acquire()
    status = None if word is None else word.tensor
    pendings = []
    for (way, start, tokens), (mine, theirs) in zip(pieces, placed, strict=True):
        pending = way.launch(
            src, dst, mine.shifted(start), theirs.shifted(start), tokens, stream, status
        )
        if pending is not None:
            pendings.append(pending)
    event = torch.Event(device)
    event.record(stream)  # None: the current stream of its device
    kept = (src, dst, placed)
    completion = Completion(event, pendings, word, error, kept if pendings else None)
    if pendings or word is not None:
        _watch(completion)
    return Transfer((completion,), kept)


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
    pendings = _run(pieces, src, dst, src_index, dst_index, None, None)
    if not pendings and error is None:
        return Transfer()
    completion = Completion(None, pendings, None, error, (src, dst, src_index, dst_index))
    if pendings:
        _watch(completion)
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
    # The graph may write this word at every replay, so it is never given back.
    word = words.acquire() if any(way.can.guards for way, _, _ in pieces) else None
    if stream is not None:
        stream.wait_stream(torch.accelerator.current_stream(device.index))
    status = None if word is None else word.tensor
    _run(pieces, src, dst, src_index, dst_index, stream, status)
    event = None
    if stream is not None:
        event = torch.Event(device)
        event.record(stream)
    completions = [Completion(event, word=word, standing=True)]
    kept = (src, dst, src_index, dst_index)
    return Transfer(completions, kept, captured=True)


def _run(
    pieces: list[Piece],
    src: KVView,
    dst: KVView,
    src_index: Index,
    dst_index: Index,
    stream: torch.Stream | None,
    status: torch.Tensor | None,
) -> list[Any]:
    pendings = []
    for way, start, tokens in pieces:
        device = way.choice.backend.device
        mine, theirs = src_index.placed(way.can, device), dst_index.placed(way.can, device)
        if start:
            mine, theirs = mine.shifted(start), theirs.shifted(start)
        pending = way.launch(src, dst, mine, theirs, tokens, stream, status)
        if pending is not None:
            pendings.append(pending)
    return pendings


def capturing(device: torch.device) -> bool:
    """True while the current stream of ``device`` is captured into a graph."""
    ask = _capture_probe(device)
    return ask is not None and ask()


@cache
def _capture_probe(device: torch.device) -> Callable[[], bool] | None:
    if device == _HOST:
        return None
    return getattr(torch.get_device_module(device), "is_current_stream_capturing", None)


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
            if index.placed(way.can, device) is not index:
                refuse_capture(device, "its ids would have to be copied first")


# Work that no stream orders, and status words, must outlive a handle that the caller dropped.
_watched: deque[Completion] = deque()
_WATCHED = 64  # looked through only when there are more, so that a call seldom pays for it


def _watch(completion: Completion) -> None:
    _watched.append(completion)
    if len(_watched) <= _WATCHED:
        return
    try:
        while _watched[0].ended():
            _watched.popleft()
    except IndexError:  # empty, perhaps because another thread was faster
        pass
