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
    current = torch.accelerator.current_stream(device.index)
    placed = [
        tuple(index.placed(way.can, device) for index in (src_index, dst_index))
        for way, _, _ in pieces
    ]
    if stream is not None:
        stream.wait_stream(current)
        ids = (index.ids for pair in placed for index in pair if index.ids is not None)
        for tensor in (*src.owners, *dst.owners, *ids):
            if tensor.device == device:
                tensor.record_stream(stream)
    guarded = any(way.can.guards for way, _, _ in pieces)
    word = words.acquire() if guarded else None
    pendings = []
    for (way, start, tokens), (mine, theirs) in zip(pieces, placed, strict=True):
        pending = way.launch(
            src, dst, mine.shifted(start), theirs.shifted(start), tokens, stream,
            None if word is None else word.tensor,
        )  # fmt: skip
        if pending is not None:
            pendings.append(pending)
    event = torch.Event(device)
    event.record(stream or current)
    kept = (src, dst, placed)
    completion = Completion(
        (event,), pendings, () if word is None else (word,), error, kept if pendings else None
    )
    if pendings or word is not None:
        _watch(completion)
    return Transfer(completion, kept)


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
    completion = Completion((), pendings, (), error, (src, dst, src_index, dst_index))
    if pendings:
        _watch(completion)
    return Transfer(completion)


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
    events = []
    if stream is not None:
        stream.wait_stream(torch.accelerator.current_stream(device.index))
    _run(pieces, src, dst, src_index, dst_index, stream, None)
    if stream is not None:
        events.append(torch.Event(device))
        events[0].record(stream)
    kept = (src, dst, src_index, dst_index)
    return Transfer(Completion(events), kept, captured=True)


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
    ask = _capture_probe(device.type)
    return ask is not None and ask()


@cache
def _capture_probe(kind: str) -> Callable[[], bool] | None:
    if kind == "cpu":
        return None
    return getattr(torch.get_device_module(kind), "is_current_stream_capturing", None)


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


# Status words of transfers in flight, and memory of work that no stream orders, must outlive a
# handle that the caller dropped.
_watched: deque[Completion] = deque()


def _watch(completion: Completion) -> None:
    try:
        while True:
            first = _watched.popleft()
            if not first.ended():
                _watched.appendleft(first)
                break
    except IndexError:  # empty, perhaps because another thread was faster
        pass
    _watched.append(completion)
