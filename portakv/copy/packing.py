# SPDX-License-Identifier: Apache-2.0
"""Copies between a raw side and a packed side.

The rows are packed or unpacked on one device. If the other side is elsewhere, its encoding is
produced or read in staging memory of the device, and a plain copy crosses the link. Between two
packed sides slots are rows of bytes, which any copy moves (see `packed_slots`).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from portakv.copy.call import (
    Context,
    Passed,
    Submit,
    check,
    common_device,
    context_of,
    without_left_out,
)
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions
from portakv.copy.pack_launch import Packed, issue_pack, join_layers
from portakv.copy.pack_staged import issue_staged
from portakv.copy.packed_slots import check_whole, slots_of
from portakv.errors import Unsupported
from portakv.layout.encodings import PACK
from portakv.plan.packing import Move, PackPlan
from portakv.registry import choose, prepared_pack


def copy_packed(
    move: Move,
    options: CopyOptions,
    began: float,
    submit: Submit,
    passed: Passed | None = None,
) -> BlockTransfer:
    """Issue a copy of which a side is packed: as slots if both are, else packing or unpacking.

    ``submit`` issues copies of rows. ``passed``: the checks that the copy passed just now, as a
    part. None: check it.

    Raises:
        Unsupported: rows that the encoding does not take, a part of a block, or an option that no
            such copy keeps.
        PortaKVError: as `copy_rows`.
    """
    if move.src.form.encoding and move.dst.form.encoding:
        return submit(slots_of(move), replace(options, reinterpret=False, late=None), passed)
    _refuse_options(options)
    packed = move.src.form if move.src.form.encoding else move.dst.form
    check_whole(move, packed.block_size)
    if options.by_layer:
        PackPlan(move.src.form, move.dst.form, *move.steps)  # a layer of each side may not tell
    context = context_of(passed, _device_of(move), options.stream)
    context.check_no_graph(f"{PACK!r} reports blocks that do not fit to the host")
    if passed is None:
        passed = check(move, context, options.strict)
    if not options.by_layer:
        whole = _transform(move, options, submit, context, passed)
        return BlockTransfer(whole.transfer, move, began)
    layers: list[Packed] = []
    used = move
    for at in range(move.src.layers):
        layer = _transform(used.layer(at), options, submit, context, passed)
        used, passed = without_left_out(used, passed, layer.checked.move, layer.checked.error)
        layers.append(layer)
    ends = tuple(layer.transfer for layer in layers)
    return BlockTransfer(join_layers(layers, context.device), move, began, ends)


def _device_of(move: Move) -> torch.device:
    """Return the device that packs or unpacks: the destination's, of two accelerators."""
    src = move.src.device
    dst = move.dst.device
    if src.type != "cpu" != dst.type:
        return dst
    return common_device(move.src, move.dst)


def _transform(
    move: Move,
    options: CopyOptions,
    submit: Submit,
    context: Context,
    passed: Passed,
) -> Packed:
    """Pack or unpack on the device of both sides, or on the one that is an accelerator.

    ``passed``: the checks of the copy.
    """
    src = move.src
    dst = move.dst
    if src.device == dst.device and src.form.place != "peer":
        choice = choose(src.device, options.backend)
        ready = prepared_pack(src.form, dst.form, *move.steps, choice)
        return issue_pack(move, ready, context, passed, options.detached)
    if options.detached and src.device.type != "cpu" != dst.device.type:
        raise Unsupported(
            "A detached copy that packs or unpacks between two devices",
            "a stream of the source's device waits for it; leave detached out",
        )
    return issue_staged(move, options, submit, context, passed)


def _refuse_options(options: CopyOptions) -> None:
    """Raise `Unsupported` for an option that a copy that packs or unpacks does not keep."""
    kept = {
        "max_gbps": options.max_gbps is not None,
        "cancellable": options.cancellable,
    }
    for name, wanted in kept.items():
        if wanted:
            raise Unsupported(
                f"A copy that packs or unpacks with {name}",
                f"{PACK!r} moves whole blocks in one piece; leave {name} out",
            )
