# SPDX-License-Identifier: Apache-2.0
"""Block transfers: copies of whole blocks by their ids, all at once, by layer, or in slices."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch

from portakv.blocks.block_slices import in_slices
from portakv.blocks.handle import Asked, BlockTransfer
from portakv.blocks.request import Order
from portakv.copy.copy import check_views, common_device, copy_move, covered
from portakv.engines.engine import Engine, Terms
from portakv.errors import LayoutError, SlotError, Unsupported
from portakv.plan.move import Move
from portakv.registry.registry import Choice, choose
from portakv.runtime.devices import capturing, inside
from portakv.runtime.streams import beside, check_stream
from portakv.runtime.transfer import Transfer
from portakv.view.index import Index
from portakv.view.view import KVView

_NO_TERMS = Terms()


def copy_blocks(
    src: KVView,
    dst: KVView,
    src_blocks: Any,
    dst_blocks: Any,
    *,
    backend: str | None = None,
    stream: torch.Stream | None = None,
    by_layer: bool = False,
    overlap: str = "compute",
    max_thread_blocks: int | None = None,
    max_gbps: float | None = None,
    cancellable: bool = False,
    detached: bool = False,
    reinterpret: bool = False,
) -> BlockTransfer:
    """Copy whole blocks by their ids; block sizes may differ, the numbers of tokens may not.

    Everything is issued before this returns, ordered on a stream. Not so with ``cancellable`` or
    ``max_gbps``: then a thread issues it in slices, behind what the current stream holds by now,
    and no stream orders it: `Transfer.wait` blocks the host.

    With ``detached`` it begins behind the same work, and no stream waits for its end unless
    `Transfer.wait` makes one. A transfer that follows then need not wait for this one's last bytes,
    which keeps the link busy beside a model that leaves few gaps. Nor are two of them ordered:
    until the end nobody may write what is read, or use what is written.

    Args:
        src, dst: paged views, or chunks where that side's blocks are None (consecutive tokens).
        src_blocks, dst_blocks: block ids, int32 or int64, negative = skipped; or an `Index` of
            them with ``step=block_size``, which is validated once however often it is used.
        backend: the name of a backend or of an engine, which then must carry it out.
        stream: where to order the work; it first waits for the current stream. Its priority is
            that of the kernels; copy engines know none.
        by_layer: one layer behind the other, each with an end of its own: `BlockTransfer.layers`.
        overlap: what the device does meanwhile: ``compute``, a model runs; or ``idle``.
        max_thread_blocks: the most thread blocks of a kernel that reads or writes host memory.
        max_gbps: the most 10^9 bytes in a second.
        cancellable: `BlockTransfer.cancel` stops it between two slices.
        detached: no stream waits for its end, not even ``stream``; the handle alone tells it.
        reinterpret: rows of one number type may go to rows of another: their bits are moved.

    Raises:
        LayoutError: ids for a view that is not paged.
        SlotError: the two sides cover different numbers of tokens.
        DeviceMismatch: a stream of another device.
        Unsupported: terms that nobody can keep; in slices or detached, inside graph capture.
        PortaKVError: what `copy_rows` raises. Slices also refuse bad ids on a device at once.
    """
    check_views(src, dst)
    src = src.as_bytes() if reinterpret else src
    mine, theirs = _block_index(src, src_blocks, "src"), _block_index(dst, dst_blocks, "dst")
    tokens = covered(src, dst, mine, theirs)
    mine.check_length(tokens, src.slots, "source")
    theirs.check_length(tokens, dst.slots, "destination")
    device = common_device(src, dst)
    check_stream(stream, device)
    choice, terms = choose(device, backend), _NO_TERMS
    sliced = cancellable or max_gbps is not None
    if overlap != "compute" or max_thread_blocks is not None or max_gbps is not None or detached:
        # No stream orders slices anyway.
        terms = Terms(overlap, max_thread_blocks, max_gbps, False if sliced else detached)
        choice = _on_terms(src, dst, choice, terms)
    if src.device == dst.device and not (by_layer or sliced or detached):
        # As dear as `copy_rows`: by way of an order it takes the host a fifth longer.
        began = time.perf_counter()
        transfer = copy_move(Move(src, dst, mine, theirs, tokens), choice, stream)
        asked = Asked(src.form, dst.form, mine, theirs, tokens, choice, terms)
        return BlockTransfer.of(transfer, asked, began)
    order = Order(src, dst, mine, theirs, tokens, choice, stream, terms)
    if sliced:
        return in_slices(order, by_layer)
    if detached and device.type != "cpu":
        return _detached(order, by_layer)
    order.follow_current()
    began = time.perf_counter()
    return _by_layer(order, began) if by_layer else _at_once(order, began)


def _detached(order: Order, by_layer: bool) -> BlockTransfer:
    """Begin behind the order's stream, which does not wait for the end.

    Raises:
        Unsupported: a graph is captured.
    """
    with inside(order.stream):
        captured = capturing(order.device)
    if captured or capturing(order.device):
        raise Unsupported(
            "A detached copy inside graph capture",
            "a graph has no work that its stream does not wait for; leave out detached",
        )
    order.follow_current()
    with inside(order.stream):
        before = torch.accelerator.current_stream(order.device.index)
        stream = beside(before, order.src.form.place, order.dst.form.place)
        began, order = time.perf_counter(), order._replace(stream=stream)
        return _by_layer(order, began) if by_layer else _at_once(order, began)


def _at_once(order: Order, began: float) -> BlockTransfer:
    return BlockTransfer.of(order.carried(), order.asked(), began)


def _by_layer(order: Order, began: float) -> BlockTransfer:
    order.dst.check_writable()
    order.check_apart()
    layers = [order.layer(i).carried(disjoint=True) for i in range(order.src.layers)]
    first = order.layer(0).asked()
    return BlockTransfer.of(Transfer.join(layers), order.asked(), began, layers, first)


def _on_terms(src: KVView, dst: KVView, choice: Choice, terms: Terms) -> Choice:
    """A choice that keeps a caller's terms; the rate is kept by who issues the slices.

    Raises:
        Unsupported: no engine carries the copy out, which would keep the limit.
    """
    if isinstance(choice.backend, Engine):
        return _engine_on(choice, terms.of_engine)
    reached = (src.form.place, dst.form.place) in choice.can.places
    if terms.max_thread_blocks is not None and (src.device == dst.device or reached):
        raise Unsupported(
            f"A copy from {src.device} to {dst.device} by {choice.name!r} with "
            f"max_thread_blocks={terms.max_thread_blocks}",
            "the limit is kept by engines whose kernels read or write host memory; leave it out",
        )
    return choice


@cache
def _engine_on(engine: Choice, terms: Terms) -> Choice:
    """An engine that was asked for by its name, on a caller's terms."""
    made = type(engine.backend)(engine.backend.device, None, terms)  # type: ignore[call-arg]
    return Choice(made, engine.trace, engine.forced, made.capabilities())


def _block_index(view: KVView, blocks: Any, side: str) -> Index:
    if blocks is None:
        return Index()
    if view.block_size is None:
        raise LayoutError(
            f"{side}_blocks was given, but {view.layout.text!r} has no `block` axis; pass None for "
            f"consecutive tokens."
        )
    if isinstance(blocks, Index):
        if blocks.step != view.block_size:
            raise SlotError(
                f"{side}_blocks is an Index with step {blocks.step}, but the view's blocks hold "
                f"{view.block_size} tokens; pass Index(ids, step={view.block_size}), or ids."
            )
        return blocks
    return Index.of(blocks, view.block_size)
