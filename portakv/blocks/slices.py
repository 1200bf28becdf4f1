# SPDX-License-Identifier: Apache-2.0
"""Block transfers in slices: a worker issues them, so that they can be cancelled or keep a rate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import gcd, lcm

from portakv.blocks.handle import BlockMove, BlockTransfer, token_bytes
from portakv.copy.copy import drop_bad_ids
from portakv.engines.engine import Engine
from portakv.plan import Move
from portakv.registry.prepared import bring
from portakv.runtime.devices import capturing, inside, refuse_capture
from portakv.runtime.streams import ignore_captures_elsewhere, own_stream
from portakv.runtime.transfer import Transfer
from portakv.runtime.worker import WINDOW, Landing, RateLimit, Slice, Worker

#: The most bytes of a slice, unless one block has more; three times as much if the host copies
#: too. What is in flight when a transfer is cancelled still lands, three slices of it
#: (`worker.WINDOW`): 1 ms on a link of 50 GB/s.
SLICE = 16 << 20
#: Seconds that a slice takes at the rate that was asked for. It crosses as fast as the link, and
#: the pause behind it makes the rate.
BEAT = 0.002


def in_slices(asked: BlockMove, rate: float | None, by_layer: bool) -> BlockTransfer:
    """Start a transfer in slices, at most ``rate`` 10^9 bytes a second; with ``by_layer`` no slice
    has rows of two layers. Raises as `copy_move` does; `SlotError` also for bad ids on a device,
    which are read first, and `Unsupported` inside graph capture."""
    if capturing(asked.device):
        why = "the host issues them while the copy runs; leave out cancellable and max_gbps"
        raise refuse_capture("A copy in slices", why)
    asked.move.dst.check_writable()
    (asked.layer(0) if by_layer else asked).check()  # what cannot be carried out is refused now
    whole, began = asked.move, time.perf_counter()
    src, dst, mine, theirs, count = whole
    move = _cleaned(Move(src, dst, mine.to_host(), theirs.to_host(), count))
    asked = asked._replace(move=move)
    asked.check_memory()
    if not move.count:
        layers = [Transfer()] * src.layers if by_layer else None
        return BlockTransfer(Transfer(), whole, began, layers)
    # Indices of its own: copies of ids that the thread makes are on no other stream.
    asked = asked.part(Slice(None, 0, move.count, 0))
    if asked.device.type != "cpu":
        asked = asked._replace(stream=asked.stream or own_stream(asked.device))
        asked.follow_current()
    within = asked._replace(stream=None, strict=False)  # its stream is the thread's current one

    def issue(piece: Slice) -> Transfer:
        return within.part(piece).issue()  # memory may go while it runs

    slices, limit = cut(asked, rate, by_layer), None if rate is None else RateLimit(rate)
    worker = Worker(slices, issue, partial(_inside, asked), limit)
    layers = None
    if by_layer:
        last = {piece.layer: nth for nth, piece in enumerate(slices, 1)}
        layers = [Transfer((Landing(worker, nth),)) for nth in last.values()]
    end = Transfer((Landing(worker, len(slices), (src, dst)),))
    transfer = BlockTransfer(end, whole, began, layers, worker)
    worker.start()
    return transfer


def cut(asked: BlockMove, rate: float | None, by_layer: bool) -> list[Slice]:
    """The slices of a transfer, each of whole blocks."""
    src, dst, *_, count = asked.move
    mine, theirs = asked.move.steps
    # Tokens between two places where both sides may be cut.
    whole = lcm(mine or 1, theirs or 1, src.form.block_size if src.opaque else 1)
    layers: list[int | None] = list(range(src.layers)) if by_layer else [None]
    each, most = token_bytes(src.form) / len(layers), float(SLICE)
    if {src.form.place, dst.form.place} == {"device", "pageable"}:
        most *= WINDOW  # each keeps its thread, and has to wake torch's
    if rate is not None:
        most = min(most, rate * 1e9 * BEAT)
    tokens = max(1, int(most / (whole * each))) * whole
    return [
        Slice(layer, first, size, round(size * each))
        for layer in layers
        for first in range(0, count, tokens)
        for size in [min(tokens, count - first)]
    ]


def _cleaned(move: Move) -> Move:
    """Without the positions that are skipped; raises `SlotError` for bad ids."""
    src, dst, mine, theirs, count = move
    skips = mine.check(count, src.slots, "source")
    skips |= theirs.check(count, dst.slots, "destination", distinct=True)
    return drop_bad_ids(move, gcd(*move.steps))[0] if skips else move


@contextmanager
def _inside(asked: BlockMove) -> Iterator[None]:
    """Inside, its stream and device are the current ones, and its ids are on the device."""
    ignore_captures_elsewhere(asked.device)
    indices, choice = (asked.move.src_index, asked.move.dst_index), asked.choice
    half = choice.backend.half if isinstance(choice.backend, Engine) else choice
    dtypes = half.can.index_dtypes
    with inside(asked.stream):
        bring(indices, asked.device, dtypes)
        for index in indices:
            if index.ids is not None:
                # All at once, kept by the index: a copy for each slice would wait for the last.
                index.ids_on(asked.device, dtypes)
        yield
