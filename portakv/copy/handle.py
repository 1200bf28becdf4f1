# SPDX-License-Identifier: Apache-2.0
"""The handle that `copy_rows` and `copy_blocks` return, which tells how far the copy is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from portakv.errors import TransferError
from portakv.plan.move import Move
from portakv.runtime.transfer import NOTHING, Transfer
from portakv.runtime.worker import Worker
from portakv.view.form import Form
from portakv.view.index import Index


@dataclass(frozen=True, slots=True)
class Statistics:
    """What became of a transfer so far.

    Attributes:
        nbytes: bytes that have landed.
        blocks: blocks that have landed in all layers, in blocks of the source's ids, or of the
            destination's if the source has none; with a slot mapping each token is one. Without
            ids in the source's own blocks.
        blocks_asked: blocks to move. Ids on the host that are skipped do not count; ids on a
            device are not looked at.
        engine: the backend, or the engine across the link, that carried it out, or its first piece.
        why: why that one, as a phrase.
        seconds: what it took by the host's clock, from the call to the moment when the end was
            noticed; None before the end, and inside graph capture.
        slices: how many pieces it was issued in so far.
        cancelled: it was cancelled, so that some blocks are not moved.
    """

    nbytes: int
    blocks: int
    blocks_asked: int
    engine: str
    why: str
    seconds: float | None
    slices: int
    cancelled: bool

    @property
    def gbps(self) -> float | None:
        """10^9 bytes in a second; None if no time is known."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else None


def token_bytes(form: Form) -> float:
    """Bytes of a token in all layers; of an opaque page, its share."""
    return form.token_bytes / (form.block_size if form.opaque else 1)


class BlockTransfer(Transfer):
    """What `copy_rows` and `copy_blocks` return; it keeps no view of its move. Its ``worker``
    issues what is not issued yet."""

    __slots__ = ("_asked", "_began", "_block", "_ended", "_form", "_layers", "_worker")

    def __init__(
        self,
        transfer: Transfer,
        move: Move,
        began: float,
        layers: tuple[Transfer, ...] | None = None,
        worker: Worker | None = None,
    ) -> None:
        self.completions = transfer.completions
        self._retained = transfer._retained
        self.carried = transfer.carried
        src, _, mine, theirs, count = move
        self._form = form = src.form
        self._block = mine.plan_step or theirs.plan_step or form.block_size or 1
        # Tokens, and the indices that may skip some of them, until the end: it counts them.
        self._asked: tuple[int, tuple[Index, ...]] = count, (mine, theirs)
        self._began = began
        self._worker = worker
        self._layers = layers
        self._ended: float | None = None if transfer.completions else perf_counter()

    @classmethod
    def together(cls, transfers: Sequence[BlockTransfer]) -> BlockTransfer:
        """Several transfers as one handle: the first error counts, bytes and blocks are added, and
        the time is that from the first call to the last end."""
        flat = [one for each in transfers for one in each._parts]
        return flat[0] if len(flat) == 1 else _Together(flat)

    @property
    def _parts(self) -> tuple[BlockTransfer, ...]:
        """The transfers that it joins; itself, if it joins none."""
        return (self,)

    @property
    def layers(self) -> tuple[Transfer, ...]:
        """A `Transfer` for each layer, which ends when that layer's bytes have landed; the block
        transfer itself covers all of them.

        Raises:
            TransferError: it was not asked for with ``by_layer=True``.
        """
        if self._layers is None:
            raise TransferError(
                "The layers of a block transfer were asked for, but it was made as a whole; pass "
                "by_layer=True to wait for each layer."
            )
        return self._layers

    def cancel(self) -> bool:
        """Move no more than what is in flight already; never blocks.

        Returns:
            True if some blocks will not be moved; the transfer then ends early, with
            `TransferCancelled`. False if all have been issued or moved, which is so from the
            beginning without ``cancellable`` or ``max_gbps``.
        """
        return self._worker is not None and self._worker.cancel()

    @property
    def cancelled(self) -> bool:
        """True if some blocks will not be moved because of `cancel`."""
        return self._worker is not None and self._worker.progress.cancelled

    @property
    def statistics(self) -> Statistics:
        """What became of it so far; never blocks or raises."""
        worker = self._worker
        layers = self._layers or ()
        moving = self._moving()
        if worker is None:
            nbytes, tokens = self._landed(moving)
            ended_at = self._ended
            pieces = max(1, len(layers))
            carried = self.carried
        else:
            progress = worker.progress
            ended_at = progress.ended_at  # read first: the rest is then complete
            landed = worker.slices[: progress.landed]
            last = worker.slices[-1].layer
            nbytes = sum(piece.nbytes for piece in landed)
            tokens = sum(piece.tokens for piece in landed if piece.layer == last)
            pieces = progress.issued
            carried = progress.carried
        seconds = None if ended_at is None else ended_at - self._began
        counts = nbytes, tokens // self._block, moving // self._block
        return Statistics(*counts, *carried, seconds, pieces, self.cancelled)

    def _moving(self) -> int:
        """The tokens of which no id on the host says that they are skipped."""
        tokens, indices = self._asked
        skipped = [
            index.slots(tokens) < 0
            for index in indices
            if index.ids is not None and index.on_host and index.host_ids().min(initial=0) < 0
        ]
        return tokens - int(np.count_nonzero(np.logical_or.reduce(skipped))) if skipped else tokens

    def _landed(self, moving: int) -> tuple[int, int]:
        """Bytes that have landed, and tokens that have in all layers, of what is on streams."""
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
        """The end was seen now; the first time counts. The indices are let go."""
        if self._ended is None:
            self._ended = perf_counter()
        self._asked = self._moving(), ()


class _Together(BlockTransfer):
    """Several transfers as one handle."""

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
    def layers(self) -> tuple[Transfer, ...]:
        """Those of all transfers, one behind the other."""
        return tuple(layer for each in self._all for layer in each.layers)

    def cancel(self) -> bool:
        """See `BlockTransfer.cancel`; True if some blocks of any will not be moved."""
        return True in [each.cancel() for each in self._all]  # all of them are asked

    @property
    def cancelled(self) -> bool:
        """True if some blocks of any will not be moved because of `cancel`."""
        return any(each.cancelled for each in self._all)

    @property
    def statistics(self) -> Statistics:
        """What became of all of them so far; never blocks or raises."""
        told = [each.statistics for each in self._all]
        began = min((each._began for each in self._all), default=0.0)
        ends = [
            None if one.seconds is None else each._began + one.seconds
            for each, one in zip(self._all, told, strict=True)
        ]
        seconds = max((end for end in ends if end is not None), default=began) - began
        return Statistics(
            sum(one.nbytes for one in told),
            sum(one.blocks for one in told),
            sum(one.blocks_asked for one in told),
            *(told[0].engine, told[0].why) if told else NOTHING,
            None if None in ends else seconds,
            sum(one.slices for one in told),
            self.cancelled,
        )

    def _finish(self) -> None:
        for each in self._all:
            each._note_end()
            each._retained = None
        Transfer._finish(self)
