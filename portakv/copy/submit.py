# SPDX-License-Identifier: Apache-2.0
"""Submit a copy under options: as a whole, by layer, in slices, or detached."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

from portakv.copy.between import carrier, common_device, current, order_after, seen_by_reader
from portakv.copy.context import Context
from portakv.copy.detached import detached
from portakv.copy.handle import BlockTransfer
from portakv.copy.launch import launch
from portakv.copy.layers import in_layers
from portakv.copy.options import CopyOptions
from portakv.copy.repeat import remember, repeated
from portakv.copy.settle import settle
from portakv.copy.slices import in_slices
from portakv.plan.move import Move
from portakv.registry.registry import Choice, choose


def submit(
    move: Move, options: CopyOptions, choice: Choice | None = None, *, known_good: bool = False
) -> BlockTransfer:
    """Issue a copy by the schedule that its options request.

    Args:
        choice: the backend that executes it. None: the one that the options or the registry choose.
        known_good: the memory of the views was checked just now: it exists, and no byte is shared.

    Raises as `copy_rows`.
    """
    began = perf_counter()
    src = move.src
    dst = move.dst
    if options.late is not None:
        return _reporting(move, options, choice)
    if options.reinterpret:
        src = src.as_bytes()
        move = move._replace(src=src)
    if src.device != dst.device and src.device.type != "cpu" != dst.device.type:
        return _from_peer(move, options)
    if choice is None:
        choice = choose(common_device(src, dst), options.backend)
    context = Context.of(choice.backend.device, options.stream)
    if options.terms is not None or src.form.place == "peer":
        choice = carrier(src, dst, choice, options.terms)
    if options.sliced:
        return in_slices(move, choice, context, options.max_gbps, options.by_layer)
    if options.detached and context.device.type != "cpu":
        return detached(move, choice, context, options, began)
    if options.by_layer:
        return in_layers(move, choice, context, options.strict, began)
    if src.raw and dst.raw and options.stream is None and not options.strict:
        made = repeated(move, choice, context)
        if made is None:
            made = launch(settle(move, choice, context), context)
            remember(move, choice, context, made)
        return BlockTransfer(made, move, began)
    settled = settle(move, choice, context, known_good=known_good, strict=options.strict)
    return BlockTransfer(launch(settled, context), move, began)


def _reporting(move: Move, options: CopyOptions, choice: Choice | None) -> BlockTransfer:
    """Issue a copy whose errors the next copy with the same ``late`` raises."""
    late = options.late
    assert late is not None
    src = move.src
    late.check(src.device if src.device.type != "cpu" else move.dst.device)
    transfer = submit(move, replace(options, late=None), choice)
    late.keep(transfer)
    return transfer


def _from_peer(move: Move, options: CopyOptions) -> BlockTransfer:
    """Issue a copy of another device's rows, which the destination's device reads."""
    device = move.dst.device
    seen = move._replace(src=seen_by_reader(move.src, device, options.stream))
    with current(device):
        transfer = submit(seen, options)
    if not (options.detached or options.sliced):
        order_after(move.src, transfer)
    return transfer
