# SPDX-License-Identifier: Apache-2.0
"""The handle of blocks that a graph moves, for the caller of a block store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal, TypeAlias, cast

import numpy as np
import torch

from portakv import arguments
from portakv.errors import PortaKVError, TransferCancelled, TransferError
from portakv.graph.graph import Graph
from portakv.graph.task import End, Mask
from portakv.runtime.streams import ignoring_captures
from portakv.runtime.transfer import Completion, Pending, Transfer

#: How blocks that do not land are reported: the end raises, or it does not.
Missing: TypeAlias = Literal["raise", "skip"]


class Handle(Transfer):
    """A transfer that ends with the work of a graph, and retains an object until then.

    If blocks did not land, its end raises `TransferError`, unless ``missing="skip"``, or
    `TransferCancelled` if it was cancelled.

    Args:
        end: its end; the name "save" marks a transfer that writes blocks. None: no worker moves a
            block (see `of_issued`).
        layers: the end of each layer, which becomes a handle in the attribute.
        retained: an object to retain until the end.
        excused: blocks that need not land, bool ``[blocks]``.
        why: takes the blocks that landed, and returns why the others did not, or an empty text.

    Attributes:
        layers: a handle for each layer.
        cancelled: True if some blocks were not moved, because of `cancel`.
        form: the name of the blocks' form, of a store with several forms; else empty.
        released: of a save, the transfer after which nothing reads the caller's blocks: their rows
            are in staging, or are not saved. Its end raises nothing. None for others.
    """

    __slots__ = (
        "_ends",
        "_excused",
        "_graph",
        "_issued",
        "_issued_blocks",
        "_ordered",
        "_skip",
        "_why",
        "cancelled",
        "form",
        "layers",
        "released",
    )

    def __init__(
        self,
        graph: Graph,
        end: End | None,
        layers: Sequence[End] = (),
        missing: Missing = "raise",
        retained: object = None,
        excused: Mask | bool = False,
        why: Callable[[Mask], str] | None = None,
    ) -> None:
        ends = () if end is None else (end,)
        super().__init__(
            [Completion(pendings=(cast(Pending, x),), retained=retained) for x in ends]
        )
        self.layers = [Handle(graph, layer, missing=missing, why=why) for layer in layers]
        self._graph = graph
        self._ends = (*layers, *ends)
        self._skip = missing == "skip"
        self._excused = excused
        self._why = why
        # The ends of copies that were issued, which no worker makes, and the blocks that they move.
        self._issued: Sequence[Completion] = ()
        self._issued_blocks: Mask | None = None
        self._ordered = False  # a stream waits for these copies
        self.cancelled = False
        self.form = ""
        self.released: Transfer | None = None

    def add_release(self, end: End) -> None:
        """Set `released`: the end of the tasks that read the caller's blocks."""
        self.released = Transfer([Completion(pendings=(cast(Pending, end),))])
        self._ends = (end, *self._ends)

    def add_copies(self, ends: Sequence[Completion]) -> None:
        """Add copies to `released` that read the caller's blocks and were issued."""
        assert self.released is not None
        self.released.completions = (*ends, *self.released.completions)

    @classmethod
    def of_issued(
        cls, graph: Graph, blocks: int, transfer: Transfer, layers: Sequence[Transfer] = ()
    ) -> Handle:
        """Return the handle of a transfer that was issued, and that moves all blocks."""
        handle = cls(graph, None)
        handle.layers = [cls.of_issued(graph, blocks, layer) for layer in layers]
        handle.add_issued(transfer, np.ones(blocks, np.bool_))
        return handle

    def add_issued(self, transfer: Transfer, blocks: Mask) -> None:
        """Add a transfer that was issued and moves the blocks of a mask, which workers do not move.

        The handle ends after it, too.
        """
        self._issued = transfer.completions
        self._issued_blocks = blocks
        self.completions = (*transfer.completions, *self.completions)
        self._retained = transfer

    def issued_ended(self) -> bool:
        """Return True once the transfers that were issued have ended; never block or raise.

        Also while another thread captures a graph.
        """
        for completion in self._issued:
            event = completion.event
            with nullcontext() if event is None else ignoring_captures(event.device):
                if not completion.ended():
                    return False
        return True

    @property
    def is_issued(self) -> bool:
        """Return whether all copies were issued: `wait` orders a stream, and blocks no host."""
        return bool(self._issued) and not self._ends

    @property
    def landed(self) -> Mask:
        """Return the blocks that landed, bool ``[blocks]``; none before the end.

        After `wait`, the blocks of a copy that was issued count: the stream finds their bytes.
        """
        return self._landed(self._ordered or all(each.ended() for each in self._issued))

    def _landed(self, there: bool) -> Mask:
        """Return the blocks that workers landed, and those that were issued if they are there."""
        landed = np.array(self._ends[-1].landed if self._ends else (), np.bool_)
        blocks = self._issued_blocks
        if blocks is None:
            return landed
        there = there and not any(each.error for each in self._issued)
        if not self._ends:
            return blocks & there
        return np.where(blocks, there, landed)

    def when_ended(self, call: Callable[[], object]) -> None:
        """Have a function called once when workers have ended their part, or now if they have.

        It may be called under the graph's lock, in any thread: it must be quick, and wait for
        nothing.
        """
        if self._ends:
            self._ends[-1].on_end(call)
        else:
            call()

    def cancel(self) -> bool:
        """Start no further block; return True if some blocks will not be moved."""
        graph = self._graph
        left = False
        if self._ends:
            left = any(graph.run(lambda: [graph.cancel(end) for end in self._ends]))
        self.cancelled = self.cancelled or left
        return left

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Make the current stream (or ``stream``) wait; block the host until workers have ended.

        No stream has the work of workers. Raises the same errors as `done` after that.
        """
        super().wait(stream)
        self._ordered = True
        if self._ends:
            self._finish()

    def _await_end(self, seconds: float) -> None:
        """Sleep until workers have ended their part, then poll for copies that were issued.

        Polls alone would take the interpreter from the workers: 0.3 ms of a load of 2 MiB.
        """
        until = time.monotonic() + arguments.seconds("timeout", seconds, optional=True)
        for end in self._ends:
            end.wait(max(0.0, until - time.monotonic()))
        super()._await_end(max(0.0, until - time.monotonic()))

    def _finish(self) -> None:
        super()._finish()
        if not self._ends:
            return
        end = self._ends[-1]
        landed = self._landed(True)
        if not end.ended:
            raise TransferError(
                "Expected the process that started the transfer, got one that was forked from it. "
                "Wait there."
            )
        kind = TransferCancelled if isinstance(end.error, TransferCancelled) else TransferError
        if not ((landed | self._excused).all() or (self._skip and kind is TransferError)):
            counts = f"{landed.sum()} of {len(landed)} blocks landed."
            raise kind(f"{counts} {self._explain(end, landed)}") from end.error

    def _explain(self, end: End, landed: Mask) -> str:
        """Return why blocks did not land, and how the caller may proceed."""
        sentences = []
        details = self._why(landed) if self._why else ""
        if details:
            sentences.append(f"{details}.")
        if end.error:
            known = isinstance(end.error, PortaKVError)
            sentences.append(str(end.error) if known else repr(end.error))

        if end.name == "save":
            if not sentences and end.short:
                sentences.append(f"{end.short} did not take the other blocks.")
        elif not end.error:
            if not details:
                sentences.append("No tier has the other blocks.")
            sentences.append("Begin the load with missing='skip' to accept that.")
        return " ".join(sentences)
