# SPDX-License-Identifier: Apache-2.0
"""The handle of blocks that a graph moves, for the caller of a block store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from portakv.errors import TransferCancelled, TransferError
from portakv.graph.graph import Graph, Node
from portakv.runtime.transfer import Completion, Pending, Transfer


class Handle(Transfer):
    """A transfer that ends with a gate, and holds ``kept`` until then. If blocks did not land, its
    end raises `TransferError`, unless they are ``missing="skip"``; `TransferCancelled` if it was
    cancelled. ``layers``: the gate of each layer, which becomes a handle in the attribute."""

    __slots__ = ("_gates", "_graph", "_skip", "cancelled", "layers")

    def __init__(
        self,
        graph: Graph,
        gate: Node,
        layers: Sequence[Node] = (),
        missing: str = "raise",
        kept: object = None,
    ) -> None:
        super().__init__((Completion(pendings=(cast(Pending, gate),), kept=kept),))
        self.layers = [Handle(graph, layer, missing=missing) for layer in layers or ()]
        self._graph, self._gates, self._skip = graph, (*(layers or ()), gate), missing == "skip"
        self.cancelled = False

    @property
    def landed(self) -> Any:
        """Which blocks landed, bool ``[blocks]``; none before the end."""
        return self._gates[-1].landed

    def cancel(self) -> bool:
        """Let no further block begin; True if some will not be moved."""
        left = [self._graph.cancel(gate) for gate in self._gates]  # each keeps what it follows
        self.cancelled = self.cancelled or any(left)
        return any(left)

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Block the host, as nothing is on a stream any more when it ends; raises as `done`."""
        super().wait(stream)
        self._finish()

    def _finish(self) -> None:
        super()._finish()
        landed, cause = self.landed, self._gates[-1].error
        if self._graph.process.forked:
            landed[:], cause = False, TransferError("It goes on in the process that was forked.")
        kind = TransferCancelled if isinstance(cause, TransferCancelled) else TransferError
        if not (landed.all() or (self._skip and kind is TransferError)):
            why = cause or "No tier has the others; missing='skip' makes that no error."
            raise kind(f"{landed.sum()} of {len(landed)} blocks landed. {why}") from cause
