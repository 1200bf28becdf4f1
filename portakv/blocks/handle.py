# SPDX-License-Identifier: Apache-2.0
"""Block transfers: transfers that know what they move, layer by layer, and how far they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from portakv.engines.choose import across
from portakv.engines.engine import Terms
from portakv.registry.prepared import prepared
from portakv.registry.registry import Choice
from portakv.runtime.transfer import Completion, Transfer
from portakv.runtime.worker import Worker
from portakv.view.form import Form
from portakv.view.index import Index


@dataclass(frozen=True, slots=True)
class Statistics:
    """What became of a block transfer so far.

    Attributes:
        nbytes: bytes that have landed.
        blocks: blocks that have landed in all layers, in blocks of the source, or of the
            destination where the source is a chunk.
        blocks_asked: blocks to move. Ids on the host that are skipped do not count; ids on a
            device are not looked at.
        engine: the backend, or the engine across the link, that carries it out; of several pieces,
            the first.
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
        """10^9 bytes in a second; None where no time is known."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else None


class Slice(NamedTuple):
    """Positions ``first`` to ``first + tokens`` of one layer (None: of all), and their bytes."""

    layer: int | None
    first: int
    tokens: int
    nbytes: int


class Asked(NamedTuple):
    """What a block transfer was asked to move: enough to tell of it, and none of the memory."""

    src: Form
    dst: Form
    src_index: Index
    dst_index: Index
    tokens: int
    choice: Choice
    terms: Terms

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.src_index.plan_step or self.dst_index.plan_step or 1

    @property
    def token_bytes(self) -> float:
        """Bytes of a token in all layers; of an opaque page, its share."""
        return self.src.token_bytes / (self.src.block_size if self.src.opaque else 1)

    def moving(self) -> int:
        """The tokens of which no id on the host says that they are skipped."""
        skipped = None
        for index in (self.src_index, self.dst_index):
            if index.ids is None or not index.on_host:
                continue
            if self.tokens and int(index.host_ids().min()) < 0:
                mine = index.slots(self.tokens) < 0
                skipped = mine if skipped is None else skipped | mine
        return self.tokens if skipped is None else self.tokens - int(np.count_nonzero(skipped))

    def engine(self) -> tuple[str, str]:
        """The backend, or the engine across the link, that carries it out, and why that one."""
        choice = self.choice
        if (self.src.place, self.dst.place) not in choice.can.places:
            choice = across(choice, self.terms)
        steps = (self.src_index.plan_step, self.dst_index.plan_step)
        way = prepared(self.src, self.dst, *steps, None, choice)
        pick = getattr(way.launch, "pick", None)
        if pick is None or not self.tokens:
            return way.choice.name, way.choice.trace[-1].reason
        # An engine that chooses engines: it looks at indices, and at no memory.
        picked = pick(None, None, self.src_index, self.dst_index, self.tokens)
        return picked.engine, picked.why


class BlockTransfer(Transfer):
    """What `copy_blocks` returns.

    Attributes:
        layers: with ``by_layer`` a `Transfer` for each layer, which ends when that layer's bytes
            have landed; else empty. The transfer itself covers all of them.
    """

    __slots__ = ("_asked", "_began", "_ended", "_first", "_slices", "_worker", "layers")

    def __init__(
        self,
        completions: Sequence[Completion],
        kept: Any,
        captured: bool,
        asked: Asked,
        began: float,
        layers: Sequence[Transfer] = (),
        first: Asked | None = None,
        worker: Worker[Slice] | None = None,
        slices: Sequence[Slice] = (),
    ) -> None:
        super().__init__(completions, kept, captured)
        self._asked, self._first = asked, first or asked
        self._worker, self._slices, self.layers = worker, slices, tuple(layers)
        self._began = began  # by `time.perf_counter`, as the end
        self._ended: float | None = None if completions else time.perf_counter()

    @classmethod
    def of(
        cls,
        transfer: Transfer,
        asked: Asked,
        began: float,
        layers: Sequence[Transfer] = (),
        first: Asked | None = None,
    ) -> BlockTransfer:
        """A transfer that was issued already."""
        ends = transfer.completions, transfer._kept, transfer._captured
        return cls(*ends, asked, began, layers, first)

    def cancel(self) -> bool:
        """Move no more than what is on its way already; never blocks.

        Returns:
            True where some blocks will not be moved: the transfer then ends early, with
            `TransferCancelled`. False where all have been issued or moved, which is so from the
            beginning without ``cancellable`` or ``max_gbps``.
        """
        return self._worker is not None and self._worker.cancel()

    @property
    def cancelled(self) -> bool:
        """True where some blocks will not be moved because of `cancel`."""
        return self._worker is not None and self._worker.cancelled

    @property
    def statistics(self) -> Statistics:
        """What became of it so far; never blocks or raises."""
        asked = self._asked
        ended = self._worker is None or self._worker.ended  # asked first: what follows is then all
        moving = asked.moving()
        nbytes, blocks = self._progress(moving)
        engine, why = self._first.engine()
        return Statistics(
            nbytes,
            blocks,
            moving // asked.block,
            engine,
            why,
            self._seconds() if ended else None,
            self._worker.issued if self._worker is not None else max(1, len(self.layers)),
            self.cancelled,
        )

    def _progress(self, moving: int) -> tuple[int, int]:
        """Bytes that have landed, and blocks that have in all layers."""
        asked = self._asked
        if self._worker is not None:
            landed = self._slices[: self._worker.landed]
            layer = self._slices[-1].layer if self._slices else None
            whole = sum(piece.tokens for piece in landed if piece.layer == layer)
            return sum(piece.nbytes for piece in landed), whole // asked.block
        if self._captured:
            return 0, 0
        ended = all(completion.ended() for completion in self.completions)
        if ended:
            self._note_end()
            return round(moving * asked.token_bytes), moving // asked.block
        done = sum(all(c.ended() for c in layer.completions) for layer in self.layers)
        each = moving * asked.token_bytes / max(1, len(self.layers))
        return round(done * each), 0

    def _finish(self) -> None:
        self._note_end()
        super()._finish()

    def _note_end(self) -> None:
        """The end was seen now; the first time counts."""
        if self._ended is None:
            self._ended = time.perf_counter()

    def _seconds(self) -> float | None:
        ended = self._ended if self._worker is None else self._worker.ended_at
        return None if ended is None else ended - self._began
