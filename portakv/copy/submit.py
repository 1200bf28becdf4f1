# SPDX-License-Identifier: Apache-2.0
"""Submit a copy: repeat it, or find out what its two sides need, and issue it."""

from __future__ import annotations

from time import perf_counter

from portakv.copy.between import common_device, current, order_after, seen_by_reader
from portakv.copy.encodings import copy_encoded
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions
from portakv.copy.repeat import repeated
from portakv.copy.schedule import issue
from portakv.copy.settle import Passed, context_of
from portakv.plan.move import Move
from portakv.registry.registry import choose


def submit(move: Move, options: CopyOptions, passed: Passed | None = None) -> BlockTransfer:
    """Repeat a known copy, or issue it by the schedule that its options request.

    ``passed``: as for `submit_new`; such a copy is not repeated, since that would check it again.

    Raises as `copy_rows`.
    """
    if passed is not None:
        return submit_new(move, options, passed)
    return repeated(move, options) or submit_new(move, options)


def submit_new(move: Move, options: CopyOptions, passed: Passed | None = None) -> BlockTransfer:
    """Issue a copy that `repeated` does not know, by the schedule that its options request.

    ``passed``: the checks that the copy passed just now, alone or as a part. None: check it.
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
        made = repeated(seen, options) if passed is None else None
        if made is None:
            choice = choose(device, options.backend)
            made = issue(seen, choice, context, options, began, passed)
    if not (options.detached or options.sliced):
        order_after(move.src, made)
    return made
