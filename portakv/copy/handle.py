# SPDX-License-Identifier: Apache-2.0
"""The handle that `copy_rows` and `copy_blocks` return: progress, layers and cancellation of a
copy."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from portakv.copy.counting import Counted
from portakv.copy.slices import Slices
from portakv.errors import TransferError
from portakv.plan.plan import Move
from portakv.runtime.transfer import NOTHING, Completion, Mask, Statistics, Transfer
from portakv.view.form import Form
from portakv.view.view import KVView, note_written


def token_bytes(form: Form) -> float:
    """Return the bytes of a token in all layers; of an opaque page, its share."""
    return form.token_bytes / (form.block_size if form.opaque else 1)


def skipped_tokens(move: Move) -> int:
    """Return the number of tokens that negative ids on the host skip."""
    sides = ((move.src_index, move.src), (move.dst_index, move.dst))
    count = move.count
    skipped = [index.slots(count) < 0 for index, view in sides if index.skips(count, view.slots)]
    return int(np.count_nonzero(np.logical_or.reduce(skipped))) if skipped else 0


class BlockTransfer(Transfer):
    """The handle of a copy. It does not keep the views of its copy alive.

    Args:
        completions, retained, carried: of the copy, as `Transfer` takes them.
        step: tokens of an id; 0 without ids.
        count: tokens, with those that negative ids on the host skip.
        skipped: those.
        layers: their ends, if the copy was made by layers.
        slices: it issues what is not issued yet.
    """

    __slots__ = ("_began", "_block", "_ended", "_form", "_layers", "_requested", "_slices")

    def __init__(
        self,
        completions: Sequence[Completion],
        retained: object,
        carried: tuple[str, str],
        src: KVView,
        dst: KVView,
        step: int,
        count: int,
        skipped: int,
        began: float,
        layers: tuple[Transfer, ...] | None = None,
        slices: Slices | None = None,
    ) -> None:
        self.completions = completions
        self._retained = retained
        self.carried = carried
        self._slices = slices
        self._layers = layers
        self._form = form = src.form
        self._block = step or form.block_size or 1
        self._requested = count - skipped
        self._began = began
        self._ended: float | None = None if completions else perf_counter()
        counts = Counted.counts
        if counts is not None and count:
            counts.add(carried[0], form.place, dst.form, count)

    @classmethod
    def of(cls, transfer: Transfer, *arguments: Any) -> BlockTransfer:
        """Return the handle of a copy that a transfer made, with the other arguments."""
        return cls(transfer.completions, transfer._retained, transfer.carried, *arguments)

    @classmethod
    def of_move(
        cls,
        transfer: Transfer,
        move: Move,
        began: float,
        layers: tuple[Transfer, ...] | None = None,
        slices: Slices | None = None,
        skips: bool = True,
    ) -> BlockTransfer:
        """Return the handle of a copy, and raise the versions of the destination's tensors
        (`note_written`).

        ``skips``: False if no id on the host skips a position.
        """
        step = move.src_index.plan_step or move.dst_index.plan_step
        # Counted now: the caller may change its ids after the call.
        skipped = skipped_tokens(move) if skips else 0
        count = move.count
        made = cls.of(transfer, move.src, move.dst, step, count, skipped, began, layers, slices)
        if count:
            note_written(move.dst)
        return made

    @classmethod
    def together(cls, transfers: Sequence[BlockTransfer]) -> BlockTransfer:
        """Join several transfers in one handle.

        The first error counts. Bytes and blocks are added. The time runs from the first call to the
        last end.
        """
        flat = [one for each in transfers for one in each._parts]
        return flat[0] if len(flat) == 1 else _Together(flat)

    @property
    def _parts(self) -> tuple[BlockTransfer, ...]:
        """Return the transfers that it joins; itself, if it joins none."""
        return (self,)

    @property
    def layers(self) -> tuple[Transfer, ...]:
        """Return a `Transfer` for each layer, which ends when that layer's bytes have landed.

        The block transfer itself covers all of them.

        Raises:
            TransferError: the copy was not requested with ``by_layer=True``.
        """
        if self._layers is None:
            raise TransferError(
                "Expected a block transfer that was made by layers, got one that was made as a "
                "whole. Pass by_layer=True to wait for each layer."
            )
        return self._layers

    def cancel(self) -> bool:
        """Stop after what is in flight already; never block.

        Returns:
            True if some blocks will not be moved; the transfer then ends early, with
            `TransferCancelled`. False if all have been issued or moved. Without ``cancellable`` or
            ``max_gbps`` that is so from the beginning.
        """
        return self._slices is not None and self._slices.cancel()

    @property
    def cancelled(self) -> bool:
        """True if some blocks will not be moved because of `cancel`."""
        return self._slices is not None and self._slices.cancelled

    @property
    def statistics(self) -> Statistics:
        """Return the progress so far; never block or raise."""
        slices = self._slices
        layers = self._layers or ()
        moving = self._requested
        if slices is None:
            nbytes, tokens = self._landed(moving)
            ended_at = self._ended
            pieces = max(1, len(layers))
            carried = self.carried
        else:
            ended_at = slices.ended_at  # read first: the other attributes are then complete
            landed = slices.slices[: slices.landed]
            last = slices.slices[-1].layer
            nbytes = sum(piece.nbytes for piece in landed)
            tokens = sum(piece.tokens for piece in landed if piece.layer == last)
            pieces = slices.issued
            carried = slices.carried
        seconds = None if ended_at is None else ended_at - self._began
        counts = nbytes, tokens // self._block, moving // self._block
        return Statistics(*counts, *carried, seconds, pieces, self.cancelled)

    def _landed(self, moving: int) -> tuple[int, int]:
        """Return the bytes that have landed and the tokens that have landed in all layers, of what
        is on streams."""
        if self._captured:
            return 0, 0
        nbytes = moving * token_bytes(self._form)
        layers = self._layers or ()
        if all(completion.ended() for completion in self.completions):
            self._note_end()
            return round(nbytes), moving
        done = sum(all(c.ended() for c in layer.completions) for layer in layers)
        return round(done * nbytes / max(1, len(layers))), 0

    def _finish(self) -> None:
        self._note_end()
        super()._finish()

    def _note_end(self) -> None:
        """Note that the end was noticed now; the first time counts."""
        if self._ended is None:
            self._ended = perf_counter()


class _Together(BlockTransfer):
    """Join several transfers in one handle."""

    __slots__ = ("_all",)

    def __init__(self, transfers: Sequence[BlockTransfer]) -> None:
        completions = [completion for each in transfers for completion in each.completions]
        carried = transfers[0].carried if transfers else NOTHING
        Transfer.__init__(self, completions, None, carried)
        self._all = tuple(transfers)

    @property
    def _parts(self) -> tuple[BlockTransfer, ...]:
        return self._all

    @property
    def landed(self) -> Mask:
        """Return which requested blocks have landed, of all transfers, one after another."""
        return np.concatenate([np.zeros(0, np.bool_), *(each.landed for each in self._all)])

    @property
    def layers(self) -> tuple[Transfer, ...]:
        """Return the layers of all transfers, one after another."""
        return tuple(layer for each in self._all for layer in each.layers)

    def cancel(self) -> bool:
        """Cancel all transfers, as `BlockTransfer.cancel` does; True if some blocks of any will not
        be moved."""
        return True in [each.cancel() for each in self._all]

    @property
    def cancelled(self) -> bool:
        """True if some blocks of any will not be moved because of `cancel`."""
        return any(each.cancelled for each in self._all)

    @property
    def statistics(self) -> Statistics:
        """Return the progress of all of them so far; never block or raise."""
        reported = [each.statistics for each in self._all]
        began = min((each._began for each in self._all), default=0.0)
        ends = [
            None if one.seconds is None else each._began + one.seconds
            for each, one in zip(self._all, reported, strict=True)
        ]
        seconds = max((end for end in ends if end is not None), default=began) - began
        return Statistics(
            sum(one.nbytes for one in reported),
            sum(one.blocks for one in reported),
            sum(one.blocks_requested for one in reported),
            *(reported[0].strategy, reported[0].why) if reported else NOTHING,
            None if None in ends else seconds,
            sum(one.slices for one in reported),
            self.cancelled,
        )

    def _finish(self) -> None:
        for each in self._all:
            each._note_end()
            each._retained = None
        Transfer._finish(self)
