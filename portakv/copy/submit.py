# SPDX-License-Identifier: Apache-2.0
"""Submit a copy: choose what makes it, and how: whole, by layer, in slices or detached."""

from __future__ import annotations

from time import perf_counter

from portakv.copy.call import (
    Context,
    Passed,
    check_executable,
    common_device,
    context_of,
    current,
    detached,
    executor_of,
    in_layers,
    launch,
    order_after,
    seen_by_reader,
    settle,
)
from portakv.copy.encodings import copy_encoded
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions
from portakv.copy.slices import in_slices
from portakv.plan.move import Move
from portakv.registry.registry import Choice, choose


def submit(move: Move, options: CopyOptions, passed: Passed | None = None) -> BlockTransfer:
    """Issue a copy by the schedule that its options request.

    ``passed``: the checks that the copy passed just now, alone or as a part. None: check it.

    Raises as `copy_rows`.
    """
    began = perf_counter()
    src = move.src
    dst = move.dst
    late = options.late
    if late is not None:
        late.check(src.device if src.device.type != "cpu" else dst.device)
    if options.reinterpret:
        src = src.as_bytes()
        move = move._replace(src=src)
    if src.form.encoding or dst.form.encoding:
        transfer = copy_encoded(move, options, began, submit, passed)
    elif src.device != dst.device and src.device.type != "cpu" != dst.device.type:
        transfer = _from_peer(move, options, began, passed)
    else:
        choice = choose(common_device(src, dst), options.backend)
        context = context_of(passed, choice.backend.device, options.stream)
        transfer = issue(move, choice, context, options, began, passed)
    if late is not None:
        late.keep(transfer)
    return transfer


def _from_peer(
    move: Move, options: CopyOptions, began: float, passed: Passed | None
) -> BlockTransfer:
    """Issue a copy of another device's rows, which the destination's device reads."""
    device = move.dst.device
    context = context_of(passed, device, options.stream)
    seen = move._replace(src=seen_by_reader(move.src, context))
    with current(device):
        choice = choose(device, options.backend)
        made = issue(seen, choice, context, options, began, passed)
    if not (options.detached or options.sliced):
        order_after(move.src, made)
    return made


def issue(
    move: Move,
    choice: Choice,
    context: Context,
    options: CopyOptions,
    began: float,
    passed: Passed | None = None,
) -> BlockTransfer:
    """Issue a copy of one device by the schedule that its options request.

    Args:
        choice: the registry's, for the device of the copy.
        context: of that device, with the stream of the copy, whatever stream the options name.
        began: when the call began, by `perf_counter`.
        passed: the checks that a connector made. None: check it.

    Raises as `copy_rows`.
    """
    executor = executor_of(move.src, move.dst, choice, options.terms)
    if options.sliced:
        return in_slices(move, executor, context, options.max_gbps, options.by_layer, passed)
    if options.detached and context.device.type != "cpu":
        return detached(move, executor, context, options, began, passed)
    if options.by_layer:
        return in_layers(move, executor, context, options.strict, began, passed)
    settled = settle(move, executor, context, passed=passed, strict=options.strict)
    skips = settled.guarded or settled.move is not move
    return BlockTransfer(launch(settled, context), move, began, skips=skips)


def check_issue(move: Move, choice: Choice, context: Context, options: CopyOptions) -> None:
    """Raise what `issue` raises for a copy that nothing here executes; move nothing."""
    executor = executor_of(move.src, move.dst, choice, options.terms)
    check_executable(move, executor, context)
