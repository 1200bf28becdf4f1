# SPDX-License-Identifier: Apache-2.0
"""Slices of a copy that packs or unpacks cross by plain copies, where no prepared copy serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch

from portakv.copy.options import USUAL, CopyOptions
from portakv.interconnect.slices import Slice
from portakv.plan.move import Move
from portakv.registry import STRATEGIES, Choice, PreparedPack, choose
from portakv.runtime.transfer import Transfer
from portakv.view.index import Index
from portakv.view.view import KVView

#: Issue a plain copy under options.
Submit: TypeAlias = Callable[[Move, CopyOptions], Transfer]


def named(options: CopyOptions) -> bool:
    """Return True if the options say how rows cross the link."""
    return options.backend in STRATEGIES or options.max_thread_blocks is not None


def packer(options: CopyOptions, device: torch.device) -> Choice:
    """Return the backend that packs or unpacks: a named strategy says only how rows cross."""
    return choose(device, None if options.backend in STRATEGIES else options.backend)


class ByCopies:
    """Slices cross by plain copies, for which the usual rules choose a strategy.

    Args:
        far: the side that is elsewhere, with its index.
        leaves: slices leave the device.
        submit: issues a copy.
        options: of the whole copy.
    """

    pieces = False

    def __init__(
        self, far: KVView, far_index: Index, leaves: bool, submit: Submit, options: CopyOptions
    ) -> None:
        self.carried = list[tuple[str, str]]()
        self._tokens = 1
        self._far = far
        self._index = far_index
        if far.form.encoding:  # a slot is a row, and a block is one token
            self._tokens = far.form.block_size
            self._far = far.as_slots()
            self._index = far_index.of_blocks(self._tokens)
        self._leaves = leaves
        self._submit = submit
        self._options = replace(
            USUAL,
            backend=options.backend if options.backend in STRATEGIES else None,
            overlap=options.overlap,
            max_thread_blocks=options.max_thread_blocks,
        )

    def __call__(
        self, each: Slice[PreparedPack], dense: KVView, nth: int, stream: torch.Stream
    ) -> None:
        """Copy a slice on a stream."""
        cut = each.cut
        far_index = self._index.shifted(cut.start // self._tokens)
        count = cut.count // self._tokens
        if dense.form.encoding:
            dense = dense.as_slots()
        move = Move(self._far, dense, far_index, Index(), count)
        if self._leaves:
            move = Move(dense, self._far, Index(), far_index, count)
        if self._options.stream is not stream:
            self._options = replace(self._options, stream=stream)
        transfer = self._submit(move, self._options)
        if not transfer.ordered:  # no stream orders the use of its memory
            transfer.synchronize()
        if transfer.carried not in self.carried:
            self.carried.append(transfer.carried)
