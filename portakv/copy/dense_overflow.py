# SPDX-License-Identifier: Apache-2.0
"""Blocks that do not fit into packed slots, of a copy through dense memory (see `dense`).

Its plain copies number such blocks by their places in dense memory, and each slice has an error. A
caller gets one error with its own numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from portakv.copy.pack_launch import OverflowReport
from portakv.errors import PackOverflow, PortaKVError
from portakv.layout.encodings import PACK
from portakv.plan.move import Move
from portakv.runtime.transfer import Completion, Transfer, event_pool, hold
from portakv.view.form import Form


def is_packed(form: Form) -> bool:
    """Return True if slots of a form may hold a flag in place of rows."""
    return bool(form.encoding) and form.encoding[0].encoding == PACK


def wait_for_end(transfer: Transfer) -> None:
    """Wait for a transfer. Its errors are left to the handle of the whole copy."""
    for completion in transfer.completions:
        completion.synchronize()


def unfit_blocks(fetched: Transfer) -> list[int]:
    """Wait for a copy that unpacks to dense memory; return the places there of blocks that did not
    fit when they were packed."""
    wait_for_end(fetched)
    errors = [end.error for end in fetched.completions]
    return [at for error in errors if isinstance(error, PackOverflow) for at in error.dst_blocks]


def end_of_packed(
    move: Move,
    unit: int,
    copies: Sequence[tuple[int, Transfer]],
    device: torch.device,
    stream: torch.Stream | None,
) -> Transfer:
    """Return the end of the plain copies that pack or unpack the slices of a copy.

    Args:
        move: the whole copy.
        unit: tokens of a block.
        copies: for each slice its first block, and its plain copy.
        device, stream: they order the plain copies. None: the current stream.
    """
    packs = is_packed(move.dst.form)
    numbers = OverflowReport.of_blocks(move, unit, device, packs)
    report = _Overflow(numbers, move.count // unit, copies)
    if device.type == "cpu":
        error = report()
        return Transfer(() if error is None else (Completion(error=error),))

    # The event is recorded last, so that all slices have ended when the report is read.
    pool = event_pool(device)
    completion = Completion(pool.recorded(stream), late_error=report, pool=pool)
    hold(completion)
    return Transfer((completion,))


@dataclass(frozen=True, slots=True)
class _Overflow:
    """Reports the error of slices that have ended.

    Attributes:
        numbers: has the caller's numbers of all blocks.
        blocks: the number of blocks.
        copies: as of `end_of_packed`.
    """

    numbers: OverflowReport
    blocks: int
    copies: Sequence[tuple[int, Transfer]]

    def __call__(self) -> PortaKVError | None:
        """Return the error that names the blocks of all slices; None if all of them fit."""
        bad = np.zeros(self.blocks, np.bool_)
        for first, copy in self.copies:
            wait_for_end(copy)  # it has ended: this reads its words
            for completion in copy.completions:
                error = completion.error
                if isinstance(error, PackOverflow):
                    places = error.src_blocks if self.numbers.packs else error.dst_blocks
                    bad[[first + place for place in places]] = True
                elif error is not None:
                    return error
        return self.numbers.error_of(bad)
