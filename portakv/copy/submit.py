# SPDX-License-Identifier: Apache-2.0
"""Submit a copy: choose what makes it, and how: whole, by layer, in slices or detached."""

from __future__ import annotations

from time import perf_counter

import torch

from portakv.copy.call import (
    Context,
    Passed,
    common_device,
    context_of,
    detached,
    executor_of,
    in_layers,
    launch,
    settle,
)
from portakv.copy.encodings import copy_encoded
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions
from portakv.copy.slices import in_slices
from portakv.plan.move import Move
from portakv.registry.registry import Choice, choose
from portakv.runtime.devices import capturing, inside, refuse_capture


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
    """Issue a copy of another device's rows, which the destination's device reads.

    Raises:
        DeviceMismatch: devices of two types.
        Unsupported: in graph capture.
        PortaKVError: as `issue`.
    """
    device = move.dst.device
    owner = move.src.memory_device
    context = context_of(passed, device, options.stream)
    seen = move._replace(src=move.src.as_peer(device))
    if context.captured or capturing(owner):
        why = (
            f"a graph would have to hold the streams of {owner} and {device}; make the copy outside"
        )
        raise refuse_capture("A copy between two devices", why)
    # The present work of the stream of the rows' device comes first.
    work = options.stream or torch.accelerator.current_stream(device.index)
    work.wait_stream(torch.accelerator.current_stream(owner.index))
    # Make the device the current one: once, instead of a query about every device that is not.
    apart = torch.accelerator.current_device_index() != device.index
    with inside(device if apart else None):
        choice = choose(device, options.backend)
        made = issue(seen, choice, context, options, began, passed)
    if not (options.detached or options.sliced):
        # Nothing overwrites the source too early; `Tensor.copy_` orders both devices the same way.
        for last in made.completions[-1:]:  # of several layers, which end in order
            last.wait(torch.accelerator.current_stream(owner.index))
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
    return BlockTransfer.of_move(launch(settled, context), move, began, skips=skips)


def check_issue(move: Move, choice: Choice, context: Context, options: CopyOptions) -> None:
    """Raise what `issue` raises for a copy that nothing here executes; move nothing."""
    executor = executor_of(move.src, move.dst, choice, options.terms)
    settle(move._replace(count=0), executor, context, passed=Passed(skips=False))
