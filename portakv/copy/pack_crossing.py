# SPDX-License-Identifier: Apache-2.0
"""Slices of a copy that packs or unpacks cross by plain copies, where no prepared copy serves."""

from __future__ import annotations

from dataclasses import replace

import torch

from portakv.copy.call import Context, Passed, note_clean
from portakv.copy.call import Submit as Submit
from portakv.copy.options import USUAL, CopyOptions
from portakv.interconnect.slices import Slice
from portakv.plan.move import Move
from portakv.registry import STRATEGIES, Choice, PreparedPack, choose
from portakv.view.index import Index
from portakv.view.view import KVView


def named(options: CopyOptions) -> bool:
    """Return True if the options say how rows cross the link."""
    return options.backend in STRATEGIES or options.max_thread_blocks is not None


def packer(options: CopyOptions, device: torch.device) -> Choice:
    """Return the backend that packs or unpacks: a named strategy says only how rows cross."""
    return choose(device, None if options.backend in STRATEGIES else options.backend)


class ByCopies:
    """Slices of a checked copy cross by plain copies, for which the usual rules choose a strategy.

    Args:
        far: the side that is elsewhere, with its index, which has no bad ids.
        leaves: slices leave the device.
        submit: issues a copy.
        options: of the whole copy.
        device: it packs or unpacks.
    """

    pieces = False

    def __init__(
        self,
        far: KVView,
        far_index: Index,
        leaves: bool,
        submit: Submit,
        options: CopyOptions,
        device: torch.device,
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
        self._device = device
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
        note_clean(move)
        passed = Passed(False, context=Context(self._device, stream, captured=False))
        transfer = self._submit(move, self._options, passed)
        if not transfer.ordered:  # no stream orders the use of its memory
            transfer.synchronize()
        if transfer.carried not in self.carried:
            self.carried.append(transfer.carried)
