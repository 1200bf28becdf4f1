# SPDX-License-Identifier: Apache-2.0
"""Issue a copy of one device as a whole, by layer, in slices, or detached."""

from __future__ import annotations

from portakv.copy.between import executor_of
from portakv.copy.context import Context
from portakv.copy.detached import detached
from portakv.copy.handle import BlockTransfer
from portakv.copy.launch import launch
from portakv.copy.layers import in_layers
from portakv.copy.options import CopyOptions
from portakv.copy.remember import remember
from portakv.copy.settle import Passed, check_executable, settle
from portakv.copy.slices import in_slices
from portakv.plan.move import Move
from portakv.registry.registry import Choice


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
        passed: the checks that a connector made; it also repeats its own copies. None: check it.

    Raises as `copy_rows`.
    """
    executor = _executor_of(move, choice, context, options)
    if options.sliced:
        return in_slices(move, executor, context, options.max_gbps, options.by_layer, passed)
    if options.detached and context.device.type != "cpu":
        return detached(move, executor, context, options, began, passed)
    if options.by_layer:
        return in_layers(move, executor, context, options.strict, began, passed)
    settled = settle(move, executor, context, passed=passed, strict=options.strict)
    made = launch(settled, context)
    if options.plain and passed is None and not context.captured:
        remember(move, choice, options, context.device, settled, made)
    skips = settled.guarded or settled.move is not move
    return BlockTransfer(made, move, began, skips=skips)


def check_issue(move: Move, choice: Choice, context: Context, options: CopyOptions) -> None:
    """Raise what `issue` raises for a copy that nothing here executes; move nothing."""
    check_executable(move, _executor_of(move, choice, context, options), context)


def _executor_of(move: Move, choice: Choice, context: Context, options: CopyOptions) -> Choice:
    """Return what executes a copy; raise as `executor_of`."""
    src = move.src
    dst = move.dst
    inside = src.device == dst.device == context.device and src.form.place != "peer"
    if options.terms is None and inside:
        return choice
    return executor_of(src, dst, choice, options.terms)
