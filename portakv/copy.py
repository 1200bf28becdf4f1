# SPDX-License-Identifier: Apache-2.0
"""The one primitive: copy rows from one view to another, under an index on either side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from math import gcd
from typing import Any

import numpy as np
import torch

from .clean import clean
from .errors import DeviceMismatch, LayoutError, PortaKVError, SlotError, Unsupported
from .index import Index
from .registry import Choice, choose
from .routes import Route, route
from .staging import staged_copy
from .transfer import Transfer
from .view import KVView


def copy_rows(
    src: KVView,
    dst: KVView,
    src_index: Any = None,
    dst_index: Any = None,
    *,
    count: int | None = None,
    backend: str | None = None,
    stream: torch.Stream | None = None,
) -> Transfer:
    """Copy rows between views.

    Args:
        src, dst: views of equal extents and widths in bytes, of any layouts.
        src_index, dst_index: an `Index`, or ids as a slot mapping (step 1); None: consecutive.
        count: tokens to move; by default what the indices cover.
        backend: a backend's name, which then must carry the copy out.
        stream: where to order the work; it first waits for the current stream.

    Raises:
        LayoutError: the views cannot hold each other's rows, or the destination cannot be written.
        SlotError: a bad index on the host; bad device ids are raised by the transfer.
        DeviceMismatch, BackendUnavailable, Unsupported: nobody can carry it out; with the trace.
    """
    mine, theirs = Index.of(src_index), Index.of(dst_index)
    tokens = _tokens(src, dst, mine, theirs) if count is None else count
    if tokens < 0:
        raise SlotError(f"count={count} was asked; it must be at least 0.")
    mine.check_length(tokens, src.slots, "source")
    theirs.check_length(tokens, dst.slots, "destination")
    return carry(src, dst, mine, theirs, tokens, choose(common_device(src, dst), backend), stream)


def copy_blocks(
    src: KVView,
    dst: KVView,
    src_blocks: Any,
    dst_blocks: Any,
    *,
    backend: str | None = None,
    stream: torch.Stream | None = None,
) -> Transfer:
    """Copy whole blocks by their ids; block sizes may differ, the numbers of tokens may not.

    Args:
        src, dst: paged views, or chunks where that side's blocks are None (consecutive tokens).
        src_blocks, dst_blocks: block ids, int32 or int64, negative = skipped.

    Raises:
        LayoutError: ids for a view that is not paged.
        SlotError: the two sides cover different numbers of tokens.
        As `copy_rows` does otherwise.
    """
    mine, theirs = _block_index(src, src_blocks, "src"), _block_index(dst, dst_blocks, "dst")
    return copy_rows(src, dst, mine, theirs, backend=backend, stream=stream)


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
) -> Transfer:
    """Carry a copy out through the chosen backend; raises as `copy_rows` does.

    The caller has checked that indices and views cover ``count`` positions. ``disjoint``: the views
    are known to share no memory.
    """
    dst.check_writable()
    if src.device != dst.device and (src.form.place, dst.form.place) not in choice.can.places:
        return staged_copy(carry, src, dst, src_index, dst_index, count, choice, stream)
    way = route(src.form, dst.form, src_index.plan_step, dst_index.plan_step, None, choice)
    if count == 0:
        return Transfer()
    skips = src_index.judge(count, src.slots, False, "source")
    skips |= dst_index.judge(count, dst.slots, True, "destination")
    error: PortaKVError | None = None
    if _needs_cleaning(way, src_index, dst_index, skips):
        _refuse_capture(way, src.device, "ids that have to be checked on the host")
        kept = clean(src, dst, src_index, dst_index, count, way.plan.unit)
        src_index, dst_index, count, error = kept
        if count == 0:
            return Transfer(error=error)
        way = route(src.form, dst.form, src_index.plan_step, dst_index.plan_step, None, choice)
    if not disjoint and src.overlaps(dst):
        _check_disjoint(way, src, dst, src_index, dst_index, count)
    return _launch(way, src, dst, src_index, dst_index, count, choice, stream, error)


def _needs_cleaning(way: Route, src_index: Index, dst_index: Index, skips: bool) -> bool:
    if skips and not way.can.skips_negative:
        return True
    device_ids = not (src_index.on_host and dst_index.on_host)
    return device_ids and not (way.can.guards and way.can.skips_negative)


def _launch(
    way: Route,
    src: KVView,
    dst: KVView,
    src_index: Index,
    dst_index: Index,
    count: int,
    choice: Choice,
    stream: torch.Stream | None,
    error: PortaKVError | None,
) -> Transfer:
    pieces = [(way, 0, count)]
    if way.plan.unit > 1:
        pieces = _pieces(way, src, dst, src_index, dst_index, count, choice)
    can, device = pieces[0][0].can, src.device
    src_index, dst_index = src_index.placed(can, device), dst_index.placed(can, device)
    if src.form.place != "device":
        pendings = _run(pieces, src, dst, src_index, dst_index, None, None)
        return Transfer((), pendings, None, error, (src, dst) if pendings else None)
    capturing = _capturing(device)
    if capturing:
        for way, _, _ in pieces:
            _refuse_capture(way, device, f"backend {way.choice.name!r}, which cannot be captured")
    current = torch.accelerator.current_stream(device.index)
    if stream is not None:
        stream.wait_stream(current)
        for tensor in (*src.owners, *dst.owners):
            tensor.record_stream(stream)
    guarded = any(way.can.guards for way, _, _ in pieces)
    status = torch.zeros(1, dtype=torch.int64).pin_memory() if guarded else None
    pendings = _run(pieces, src, dst, src_index, dst_index, stream, status)
    if capturing:
        return Transfer(captured=True, status=status, kept=(src, dst, src_index, dst_index))
    event = torch.Event(device)
    event.record(stream or current)
    kept = (src, dst, src_index, dst_index)
    transfer = Transfer((event,), pendings, status, error, kept)
    if status is not None:
        _watch(transfer)
    return transfer


def _run(
    pieces: list[tuple[Route, int, int]],
    src: KVView,
    dst: KVView,
    src_index: Index,
    dst_index: Index,
    stream: torch.Stream | None,
    status: torch.Tensor | None,
) -> list[Any]:
    pendings = []
    for way, start, tokens in pieces:
        mine, theirs = src_index, dst_index
        if start:
            mine, theirs = src_index.shifted(start), dst_index.shifted(start)
        pending = way.launch(src, dst, mine, theirs, tokens, stream, status)
        if pending is not None:
            pendings.append(pending)
    return pendings


def _pieces(
    way: Route,
    src: KVView,
    dst: KVView,
    src_index: Index,
    dst_index: Index,
    count: int,
    choice: Choice,
) -> list[tuple[Route, int, int]]:
    """(route, first position, tokens): the body in the largest units, head and tail by token."""
    unit = way.plan.unit
    steps = (src.form, dst.form, src_index.plan_step, dst_index.plan_step)
    starts = [x.offset for x, side in ((src_index, "src"), (dst_index, "dst")) if way.plan.aligned(side)]
    common = gcd(unit, *(start - starts[0] for start in starts))
    head = -starts[0] % common if starts else 0
    body = max(0, count - head) // common * common
    if src.opaque and (common < unit or head or body < count):
        raise Unsupported(
            f"Moving {count} tokens of opaque pages of {src.block_size} from {starts} on",
            "a page moves only whole; ask for whole blocks",
        )
    if common < unit:
        way = route(*steps, common, choice)
    if body == count:
        return [(way, 0, count)]
    single = route(*steps, 1, choice)
    if body == 0:
        return [(single, 0, count)]
    spans = [(single, 0, head), (way, head, body), (single, head + body, count - head - body)]
    return [piece for piece in spans if piece[2]]


def _tokens(src: KVView, dst: KVView, src_index: Index, dst_index: Index) -> int:
    covered = [x.length for x in (src_index, dst_index) if x.length is not None]
    if not covered:
        covered = [src.slots - src_index.offset, dst.slots - dst_index.offset]
    if len(set(covered)) > 1:
        raise SlotError(
            f"The source covers {covered[0]} tokens and the destination {covered[1]}; make them "
            f"equal, or pass count."
        )
    if covered[0] < 0:
        raise SlotError(f"The index begins {-covered[0]} tokens behind its end; lower its offset.")
    return covered[0]


def _block_index(view: KVView, blocks: Any, side: str) -> Index:
    if blocks is None:
        return Index()
    if view.block_size is None:
        raise LayoutError(
            f"{side}_blocks was given, but {view.layout.text!r} has no `block` axis; pass None for "
            f"consecutive tokens."
        )
    if isinstance(blocks, Index):
        raise SlotError(f"{side}_blocks takes block ids; pass an Index to copy_rows instead.")
    return Index(blocks, step=view.block_size)


def _check_disjoint(
    way: Route, src: KVView, dst: KVView, src_index: Index, dst_index: Index, count: int
) -> None:
    """Host ids: raise where a byte is both read and written. Device ids: not checked."""
    if not (src_index.on_host and dst_index.on_host):
        return
    if src.form == dst.form and src.origins == dst.origins:
        mine, theirs = src_index.slots(count), dst_index.slots(count)
        both = np.intersect1d(mine[mine >= 0], theirs[theirs >= 0])
        if both.size:
            raise SlotError(
                f"Slot {int(both[0])} is both source and destination of a copy inside one cache; "
                f"exchange rows through a buffer."
            )
        return
    single = route(
        src.form, dst.form, src_index.plan_step, dst_index.plan_step, 1, way.choice
    ) if not src.opaque else way
    runs = single.plan.runs(src, dst, src_index, dst_index, count)
    order = np.argsort(runs.dst)
    first, past = runs.dst[order], (runs.dst + runs.nbytes)[order]
    at = np.searchsorted(first, runs.src + runs.nbytes) - 1
    if ((at >= 0) & (past[np.maximum(at, 0)] > runs.src)).any():
        raise SlotError(
            "A row is both source and destination of a copy inside one allocation; exchange rows "
            "through a buffer."
        )


def _capturing(device: torch.device) -> bool:
    ask = _capture_probe(device)
    return ask is not None and ask()


@cache
def _capture_probe(device: torch.device) -> Callable[[], bool] | None:
    return getattr(torch.get_device_module(device), "is_current_stream_capturing", None)


def _refuse_capture(way: Route, device: torch.device, what: str) -> None:
    if device.type != "cpu" and not way.can.capturable and _capturing(device):
        raise Unsupported(
            "A copy inside graph capture",
            f"it needs {what}; capture a copy with a capturable backend and device ids",
        )


# Status words of transfers in flight must outlive them, also where the caller dropped the handle.
_watched: deque[Transfer] = deque()


def _watch(transfer: Transfer) -> None:
    while _watched and _watched[0].ended:
        _watched.popleft()
    _watched.append(transfer)
