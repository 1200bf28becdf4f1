# SPDX-License-Identifier: Apache-2.0
"""Block transfers in slices: a worker issues them, so that they can be cancelled or keep a rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import gcd

import torch

from portakv.blocks.handle import BlockTransfer, Slice
from portakv.blocks.request import Order
from portakv.copy.copy import drop_bad_ids
from portakv.errors import Unsupported
from portakv.plan.move import Move
from portakv.registry.prepared import bring
from portakv.runtime.cuda import ignore_captures_elsewhere
from portakv.runtime.devices import capturing
from portakv.runtime.streams import own_stream
from portakv.runtime.transfer import Transfer
from portakv.runtime.worker import WINDOW, Landing, RateLimit, Worker

#: The most bytes of a slice, unless one block has more; three times as much where the host copies
#: too. What is under way when a transfer is cancelled still lands, three slices of it
#: (`worker.WINDOW`): 1 ms on a link of 50 GB/s.
SLICE = 16 << 20
#: Seconds that a slice takes at the rate that was asked for. It crosses as fast as the link, and
#: the pause behind it makes the rate.
BEAT = 0.002


def in_slices(order: Order, by_layer: bool) -> BlockTransfer:
    """Start a transfer in slices; with ``by_layer`` none has rows of two layers.

    Raises:
        SlotError: also for bad ids on a device, which are read first.
        Unsupported: inside graph capture. As `copy.copy_move` does otherwise.
    """
    if capturing(order.device):
        raise Unsupported(
            "A copy in slices inside graph capture",
            "the host issues them while the copy runs; leave out cancellable and max_gbps",
        )
    order.dst.check_writable()
    shown = order.layer(0) if by_layer else order
    shown._replace(tokens=0).carried()  # what cannot be carried out is refused now
    order = order._replace(src_index=order.src_index.to_host(), dst_index=order.dst_index.to_host())
    asked, order = order.asked(), _cleaned(order)
    order.check_apart()
    if not order.tokens:
        layers = [Transfer() for _ in range(order.src.layers if by_layer else 0)]
        return BlockTransfer.of(Transfer(), asked, time.perf_counter(), layers)
    # Indices of its own: copies of ids that the thread makes are on no other stream.
    order = order.part(0, order.tokens)
    if order.device.type != "cpu":
        order = order._replace(stream=order.stream or own_stream(order.device))
        order.follow_current()
    began, rate = time.perf_counter(), order.terms.max_gbps
    slices = cut(order, by_layer)
    inside = partial(_inside, order)
    worker = Worker(slices, _issuer(order), inside, None if rate is None else RateLimit(rate))
    layers = []
    if by_layer:
        last = {piece.layer: nth for nth, piece in enumerate(slices, 1)}
        layers = [Transfer((Landing(worker, nth),)) for nth in last.values()]
    whole = Landing(worker, len(slices), (order.src, order.dst))
    first = _rows(order, slices[0]).asked()
    transfer = BlockTransfer((whole,), None, False, asked, began, layers, first, worker, slices)
    worker.start()
    return transfer


def cut(order: Order, by_layer: bool) -> list[Slice]:
    """The slices of a transfer, each of whole blocks."""
    layers: list[int | None] = list(range(order.src.layers)) if by_layer else [None]
    token_bytes = order.asked().token_bytes / len(layers)
    rate, most = order.terms.max_gbps, float(SLICE)
    if {order.src.form.place, order.dst.form.place} == {"device", "pageable"}:
        most *= WINDOW  # each keeps its thread, and has to wake torch's
    if rate is not None:
        most = min(most, rate * 1e9 * BEAT)
    tokens = max(1, int(most / (order.whole * token_bytes))) * order.whole
    return [
        Slice(layer, first, size, round(size * token_bytes))
        for layer in layers
        for first in range(0, order.tokens, tokens)
        for size in [min(tokens, order.tokens - first)]
    ]


def _cleaned(order: Order) -> Order:
    """Without the positions that are skipped; raises `SlotError` for bad ids."""
    mine, theirs = order.src_index, order.dst_index
    skips = mine.check(order.tokens, order.src.slots, "source")
    skips |= theirs.check(order.tokens, order.dst.slots, "destination", distinct=True)
    count = order.tokens
    if skips:
        unit = gcd(mine.plan_step, theirs.plan_step)
        move, _ = drop_bad_ids(Move(order.src, order.dst, mine, theirs, count), unit)
        _, _, mine, theirs, count = move
    return order._replace(src_index=mine, dst_index=theirs, tokens=count)


def _issuer(order: Order) -> Callable[[Slice], Transfer]:
    order = order._replace(stream=None)  # its stream is the thread's current one

    def issue(piece: Slice) -> Transfer:
        return _rows(order, piece).carried(disjoint=True)

    return issue


def _rows(order: Order, piece: Slice) -> Order:
    rows = order if piece.layer is None else order.layer(piece.layer)
    return rows.part(piece.first, piece.tokens)


@contextmanager
def _inside(order: Order) -> Iterator[None]:
    """Inside, its stream and device are the current ones, and its ids are on the device."""
    if order.stream is None:
        yield
        return
    ignore_captures_elsewhere(order.device)
    with torch.get_device_module(order.device).stream(order.stream):
        bring((order.src_index, order.dst_index), order.device, order.choice.can.index_dtypes)
        for index in (order.src_index, order.dst_index):
            if index.ids is not None:
                # All at once, kept by the index: a copy for each slice would wait for the last.
                index.ids_on(order.device, order.choice.can.index_dtypes)
        yield
