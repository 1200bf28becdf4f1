# SPDX-License-Identifier: Apache-2.0
"""Issue a detached copy: no stream waits for its end."""

from __future__ import annotations

import torch

from portakv.copy.context import Context
from portakv.copy.handle import BlockTransfer
from portakv.copy.launch import follow_current, launch
from portakv.copy.layers import in_layers
from portakv.copy.options import CopyOptions
from portakv.copy.settle import Passed, settle
from portakv.plan.move import Move
from portakv.registry.registry import Choice
from portakv.runtime.devices import capturing, inside, refuse_capture
from portakv.runtime.streams import side_stream


def detached(
    move: Move,
    choice: Choice,
    context: Context,
    options: CopyOptions,
    began: float,
    passed: Passed | None = None,
) -> BlockTransfer:
    """Issue a copy that begins after the current stream, or after the given one, which does not
    wait for its end.

    Raises:
        Unsupported: while a graph is captured.
        PortaKVError: as `settle`, whose ``passed`` it takes.
    """
    side = beside(move, context)
    with inside(context.stream):
        aside = context._replace(stream=side)
        if options.by_layer:
            return in_layers(move, choice, aside, options.strict, began, passed)
        settled = settle(move, choice, aside, passed=passed, strict=options.strict)
        return BlockTransfer(launch(settled, aside), move, began)


def beside(move: Move, context: Context) -> torch.Stream:
    """Return the stream of a detached copy. The given stream follows the current one; the copy
    makes its stream follow the given one.

    Raises:
        Unsupported: while a graph is captured.
    """
    device = context.device
    with inside(context.stream):
        # The context knows the current stream; a given stream may record a graph as well.
        if context.captured or (context.stream is not None and capturing(device)):
            why = "a graph has no work that its stream does not wait for; leave out detached"
            raise refuse_capture("A detached copy", why)
        begins_after = torch.accelerator.current_stream(device.index)
    follow_current(context.stream, [move])
    return side_stream(begins_after, move.src.form.place, move.dst.form.place)
