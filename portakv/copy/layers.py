# SPDX-License-Identifier: Apache-2.0
"""Copy layer by layer: all layers are issued together, each with a separate end."""

from __future__ import annotations

from portakv.copy.context import Context
from portakv.copy.handle import BlockTransfer
from portakv.copy.launch import launch
from portakv.copy.settle import check_memory, layer_of, settle
from portakv.plan.move import Move
from portakv.registry.registry import Choice
from portakv.runtime.transfer import Transfer


def in_layers(
    move: Move, choice: Choice, context: Context, strict: bool, began: float
) -> BlockTransfer:
    """Issue one layer after another; arguments and errors are those of `settle`."""
    check_memory(move)
    layers = []
    for i in range(move.src.layers):
        settled = settle(layer_of(move, i), choice, context, known_good=True, strict=strict)
        layers.append(launch(settled, context))
    return BlockTransfer(Transfer.join(layers), move, began, tuple(layers))
