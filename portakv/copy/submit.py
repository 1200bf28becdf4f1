# SPDX-License-Identifier: Apache-2.0
"""Submit a copy under options: as a whole, by layer, in slices, or detached."""

from __future__ import annotations

from time import perf_counter

import torch

from portakv.copy.between import carrier, common_device, current, order_after, seen_by_reader
from portakv.copy.context import Context
from portakv.copy.detached import detached
from portakv.copy.encoded import copy_encoded
from portakv.copy.handle import BlockTransfer
from portakv.copy.launch import launch, settle
from portakv.copy.layers import in_layers
from portakv.copy.options import CopyOptions
from portakv.copy.repeat import REPEATS, remember, repeated
from portakv.copy.slices import in_slices
from portakv.plan.move import Move
from portakv.registry.registry import Choice, choose


def submit(move: Move, options: CopyOptions) -> BlockTransfer:
    """Issue a copy by the schedule that its options request; raises as `copy_rows`."""
    began = perf_counter()
    src = move.src
    dst = move.dst
    if options.plain and REPEATS in src.derived:
        made = repeated(move, options)
        if made is not None:
            return BlockTransfer(made, move, began)
    late = options.late
    if late is not None:
        late.check(src.device if src.device.type != "cpu" else dst.device)
    if options.reinterpret:
        src = src.as_bytes()
        move = move._replace(src=src)
    if src.form.encoding or dst.form.encoding:
        transfer = copy_encoded(move, options, began, submit)
    elif src.device != dst.device and src.device.type != "cpu" != dst.device.type:
        transfer = _from_peer(move, options, began)
    else:
        choice = choose(common_device(src, dst), options.backend)
        transfer = issue(move, choice, options.stream, options, began)
    if late is not None:
        late.keep(transfer)
    return transfer


def issue(
    move: Move,
    choice: Choice,
    stream: torch.Stream | None,
    options: CopyOptions,
    began: float,
    known_good: bool = False,
) -> BlockTransfer:
    """Issue a copy of one device by the schedule that its options request.

    Args:
        stream: where the copy is ordered, whatever stream the options name.
        began: when the call began, by `perf_counter`.
        known_good: the memory of the views was checked just now: it exists, and no byte is shared.

    Raises as `copy_rows`.
    """
    src = move.src
    dst = move.dst
    context = Context.of(choice.backend.device, stream)
    chosen = choice
    if options.terms is not None or src.form.place == "peer":
        choice = carrier(src, dst, choice, options.terms)
    if options.sliced:
        return in_slices(move, choice, context, options.max_gbps, options.by_layer)
    if options.detached and context.device.type != "cpu":
        return detached(move, choice, context, options, began)
    if options.by_layer:
        return in_layers(move, choice, context, options.strict, began)
    settled = settle(move, choice, context, known_good=known_good, strict=options.strict)
    made = launch(settled, context)
    # A connector repeats its own copies.
    if options.plain and not (known_good or context.captured or context.device.type == "cpu"):
        remember(move, chosen, options, context.device, settled, made)
    return BlockTransfer(made, move, began)


def _from_peer(move: Move, options: CopyOptions, began: float) -> BlockTransfer:
    """Issue a copy of another device's rows, which the destination's device reads."""
    device = move.dst.device
    seen = move._replace(src=seen_by_reader(move.src, device, options.stream))
    with current(device):
        made = repeated(seen, options) if options.plain else None
        if made is None:
            choice = choose(device, options.backend)
            transfer = issue(seen, choice, options.stream, options, began)
        else:
            transfer = BlockTransfer(made, seen, began)
    if not (options.detached or options.sliced):
        order_after(move.src, transfer)
    return transfer
