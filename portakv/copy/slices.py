# SPDX-License-Identifier: Apache-2.0
"""Copy in slices that a worker issues, so that they can be cancelled or keep a rate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import gcd, lcm

import torch

from portakv.copy.call import (
    Context,
    Passed,
    check_ids,
    check_views,
    drop_bad_ids,
    follow_current,
    launch,
    layer_of,
    settle,
)
from portakv.copy.handle import BlockTransfer, token_bytes
from portakv.interconnect.strategy import Strategy
from portakv.plan.plan import Move, check_disjoint
from portakv.registry.prepared import bring
from portakv.registry.registry import Choice
from portakv.runtime.devices import inside
from portakv.runtime.streams import awaited_asleep, ignore_captures_elsewhere, own_stream
from portakv.runtime.transfer import Transfer
from portakv.runtime.worker import WINDOW, RateLimit, Slice, SliceCompletion, Worker

#: The most bytes of a slice, unless one block has more; three times as much if the host copies
#: too. What is in flight when a transfer is cancelled still lands, three slices of it
#: (`worker.WINDOW`): 1 ms on a link of 50 GB/s.
SLICE = 16 << 20
#: Seconds of a slice at the requested rate. It crosses as fast as the link, and
#: the pause after it makes the rate.
BEAT = 0.002
#: The checks that each slice passes: those of the whole copy, whose skipped positions are left out.
_PASSED = Passed(skips=False)


def in_slices(
    move: Move,
    choice: Choice,
    context: Context,
    rate: float | None,
    by_layer: bool,
    passed: Passed | None = None,
) -> BlockTransfer:
    """Start a transfer in slices, at most ``rate`` 10^9 bytes a second.

    With ``by_layer`` no slice has rows of two layers. ``passed``: as for `settle`.

    Raises:
        SlotError: bad ids, also on a device, which are read first.
        Unsupported: inside graph capture.
        PortaKVError: as `settle`.
    """
    device, stream, _ = context
    began = time.perf_counter()
    context.check_may_slice()
    if passed is None:
        check_views(move)
    whole = layer_of(move, 0) if by_layer else move
    settle(whole._replace(count=0), choice, context, passed=_PASSED)  # refuses what none executes
    move, guarded = _read(move, context, passed)
    if passed is None:
        check_disjoint(guarded)
    if not guarded.count:
        none = (Transfer(),) * move.src.layers if by_layer else None
        return BlockTransfer.of_move(Transfer(), move, began, none)
    # Private indices: copies of ids that the thread makes are on no other stream.
    guarded = _part(guarded, Slice(None, 0, guarded.count, 0))
    if device.type != "cpu":
        stream = stream or own_stream(device)
        follow_current(stream, [guarded])

    here = Context(device, None, captured=False)  # of the worker, whose stream is the current one

    def issue(piece: Slice) -> Transfer:
        part = _part(guarded, piece)
        for view in (part.src, part.dst):
            view.check_memory()  # it may be released after the call, while a slice runs
        transfer = launch(settle(part, choice, here, passed=_PASSED), here)
        return awaited_asleep(transfer, device)  # the worker waits for it

    slices = _cut(guarded, rate, by_layer)
    limit = None if rate is None else RateLimit(rate)
    worker = Worker(slices, issue, partial(_inside, guarded, choice, stream), limit)
    last = {piece.layer: nth for nth, piece in enumerate(slices, 1)}
    ends = (Transfer((SliceCompletion(worker, nth),)) for nth in last.values())
    layers = tuple(ends) if by_layer else None
    worker.end = end = SliceCompletion(worker, len(slices), (move.src, move.dst))
    transfer = BlockTransfer.of_move(Transfer((end,)), move, began, layers, worker)
    worker.start()
    return transfer


def _read(move: Move, context: Context, passed: Passed | None) -> tuple[Move, Move]:
    """Return a copy with private ids on the host, and the same without positions that are skipped.

    Raises `SlotError` for bad ids. Ids of a device are read, so they are checked in any case.
    """
    read = move._replace(
        src_index=move.src_index.apart().to_host(),
        dst_index=move.dst_index.apart().to_host(),
    )
    if passed is not None and move.ids_on_host:
        skips = passed.skips
    else:
        skips = check_ids(read, context, strict=False)
    return read, drop_bad_ids(read, gcd(*read.steps))[0] if skips else read


def _cut(move: Move, rate: float | None, by_layer: bool) -> list[Slice]:
    """Return the slices of a transfer, each of whole blocks."""
    src = move.src
    dst = move.dst
    src_step, dst_step = move.steps
    # Tokens between two places where both sides may be cut.
    whole = lcm(src_step or 1, dst_step or 1, src.form.block_size if src.opaque else 1)
    layers: list[int | None] = list(range(src.layers)) if by_layer else [None]
    each = token_bytes(src.form) / len(layers)
    most = float(SLICE)
    if {src.form.place, dst.form.place} == {"device", "pageable"}:
        most *= WINDOW  # each occupies its thread, and has to wake torch's
    if rate is not None:
        most = min(most, rate * 1e9 * BEAT)
    tokens = max(1, int(most / (whole * each))) * whole
    return [
        Slice(layer, first, size, round(size * each))
        for layer in layers
        for first in range(0, move.count, tokens)
        for size in [min(tokens, move.count - first)]
    ]


def _part(move: Move, piece: Slice) -> Move:
    """Return a slice of a copy, with only the ids of its positions."""
    whole = move if piece.layer is None else move.layer(piece.layer)
    return whole._replace(
        src_index=whole.src_index.part(piece.first, piece.tokens),
        dst_index=whole.dst_index.part(piece.first, piece.tokens),
        count=piece.tokens,
    )


@contextmanager
def _inside(move: Move, choice: Choice, stream: torch.Stream | None) -> Iterator[None]:
    """Make a stream and its device the current ones, and put the ids on the device."""
    device = choice.backend.device
    indices = (move.src_index, move.dst_index)
    ignore_captures_elsewhere(device)
    half = choice.backend.half if isinstance(choice.backend, Strategy) else choice
    dtypes = half.can.index_dtypes
    with inside(stream):
        bring(indices, device, dtypes)
        for index in indices:
            if index.ids is not None:
                # Together, and kept by the index: a copy for each slice would wait for the last
                # one.
                index.ids_on(device, dtypes)
        yield
