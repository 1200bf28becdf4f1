# SPDX-License-Identifier: Apache-2.0
"""Copy layer by layer: all layers are issued together, each with a separate end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from portakv.copy.context import Context
from portakv.copy.handle import BlockTransfer
from portakv.copy.launch import launch
from portakv.copy.settle import Passed, check, layer_of, settle, without_left_out
from portakv.plan.move import Move
from portakv.registry.registry import Choice
from portakv.runtime.transfer import Transfer

_calls = threading.local()  # of each thread: what is to be called


@contextmanager
def calling_for_layers(call: Callable[[int, Transfer], None]) -> Iterator[None]:
    """Have copies by layer that this thread issues call a function with the number and the end of
    each layer, once it is issued and before the next one is."""
    before = getattr(_calls, "call", None)
    _calls.call = call
    try:
        yield
    finally:
        _calls.call = before


def in_layers(
    move: Move,
    choice: Choice,
    context: Context,
    strict: bool,
    began: float,
    passed: Passed | None = None,
) -> BlockTransfer:
    """Issue one layer after another; arguments and errors are those of `settle`."""
    if passed is None:
        passed = check(move, context, strict)
    call = getattr(_calls, "call", None)
    layers = []
    used = move
    for i in range(move.src.layers):
        settled = settle(layer_of(used, i), choice, context, passed=passed)
        used, passed = without_left_out(used, passed, settled.move, settled.error)
        layers.append(launch(settled, context))
        if call is not None:
            call(i, layers[-1])
    return BlockTransfer(Transfer.join(layers), move, began, tuple(layers))
