# SPDX-License-Identifier: Apache-2.0
"""Copies that pack or unpack on a device while one side is elsewhere: slices in staging memory."""

from __future__ import annotations

import torch

from portakv.copy.call import Context, beside, follow_current
from portakv.copy.options import CopyOptions
from portakv.copy.pack_crossing import ByCopies, Submit, named, packer
from portakv.copy.pack_launch import (
    Checked,
    OverflowReport,
    Packed,
    Passed,
    nothing_packed,
    overflow_words,
    without_bad_ids,
)
from portakv.interconnect.pack_passage import ByLink, Crosses, issue_slices
from portakv.interconnect.pack_slices import PackStages, pack_stages
from portakv.interconnect.slices import Sizes
from portakv.plan.move import Move
from portakv.runtime.devices import inside
from portakv.runtime.transfer import Completion, Transfer, event_pool, hold

#: Raw bytes of the largest slice that crosses the link, unless one block has more. While a
#: persistent matmul runs, four such slices hide its gaps, and four of 16 MiB do not (H200).
SLICE = 64 << 20
#: Raw bytes of the first slice while nothing crosses, and the most of a copy in one slice.
SMALLEST = 16 << 20
WHOLE = 32 << 20


def issue_staged(
    move: Move, options: CopyOptions, submit: Submit, context: Context, passed: Passed
) -> Packed:
    """Issue a checked copy that packs or unpacks on the context's device, of which one side is
    elsewhere.

    ``passed``: its checks. ``submit`` issues the plain copy of a slice, unless the slice crosses by
    the link itself.

    Raises as `copy_packed` does.
    """
    device = context.device
    leaves = move.dst.device != device
    packed = move.src if move.src.form.encoding else move.dst
    stages = pack_stages(move, leaves, packer(options, device))  # refuses what cannot be executed
    # The ids are used in slices, so that bad ones are left out first.
    checked = without_bad_ids(move, packed.form.block_size, passed)
    move = checked.move
    if not move.count:
        return nothing_packed(checked)
    far = move.dst if leaves else move.src
    cross: Crosses
    if far.form.place == "pinned" and not named(options):
        cross = ByLink(device)
    else:
        far_index = move.dst_index if leaves else move.src_index
        cross = ByCopies(far, far_index, leaves, submit, options, device)
    return _issue(checked, stages, cross, context, options.detached)


def _issue(
    checked: Checked, stages: PackStages, cross: Crosses, context: Context, detached: bool
) -> Packed:
    """Issue all slices; return the end of the copy."""
    move = checked.move
    device = context.device
    unit = stages.plan.unit
    with inside(context.stream):
        current = torch.accelerator.current_stream(device.index)
    work = current
    if detached:
        work = beside(move, context)
        with inside(current):
            follow_current(work, [move])
    else:
        follow_current(context.stream, [move])
    with inside(current):
        words = overflow_words(move, unit, device)
        sizes = Sizes(min(WHOLE, SLICE), min(SMALLEST, SLICE), SLICE)
        issue_slices(move, stages, cross, sizes, (current, work), words)
    with inside(work):
        report = OverflowReport.of(move, unit, words, device, not move.src.form.encoding)
    pool = event_pool(device)
    completion = Completion(
        event=pool.recorded(work), late_error=report, retained=(move, words), pool=pool
    )
    hold(completion)
    completions = [completion]
    if checked.error is not None:
        completions.append(Completion(error=checked.error))
    transfer = Transfer(completions, move, _carried(stages, cross))
    return Packed(checked, transfer, report, work)


def _carried(stages: PackStages, cross: Crosses) -> tuple[str, str]:
    """Return what executed a copy, in order, and the reasons."""
    both = [stages.carried, *cross.carried]
    if not stages.downward:
        both.reverse()
    how = " and ".join(dict.fromkeys(name for name, _ in both))
    return how, "; ".join(f"{name}: {reason}" for name, reason in both)
