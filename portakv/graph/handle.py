# SPDX-License-Identifier: Apache-2.0
"""The handle of a transfer that a graph carries out, for the caller of a block store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from portakv.errors import PortaKVError, TransferCancelled, TransferError
from portakv.graph.graph import Graph, Node
from portakv.runtime.transfer import Completion, Pending, Transfer


class _End(Completion):
    """The end of a gate, which holds ``kept`` until then."""

    __slots__ = ("gate", "skip")

    def __init__(self, gate: Node, skip: bool, kept: object) -> None:
        super().__init__(pendings=(cast(Pending, gate),), kept=kept)
        self.gate, self.skip = gate, skip

    def wait(self, stream: torch.Stream | None) -> None:
        """Block the host; raises for blocks that a stream would wait for in vain."""
        super().wait(stream)
        if (failure := self._failure()) is not None:
            raise failure

    def _settle(self) -> None:
        super()._settle()
        self.error = self.error or self._failure()

    def _failure(self) -> PortaKVError | None:
        landed, cause = self.gate.landed, self.gate.error
        if self.gate.graph.process.forked:
            landed[:], cause = False, TransferError("This process was forked; ask in the parent.")
        cancelled = isinstance(cause, TransferCancelled)
        if landed.all() or (self.skip and not cancelled):
            return None
        kind = TransferCancelled if cancelled else TransferError
        why = cause or "No tier has the others; ask for missing='skip' if that is no error."
        found = kind(f"{landed.sum()} of {len(landed)} blocks landed. {why}")
        found.__cause__ = cause
        return found


class Handle(Transfer):
    """A transfer of blocks, which ends with a gate.

    Args:
        layers: gates of the single layers; missing: "skip" if blocks that do not land are no error;
            kept: what must live until the end.

    Attributes:
        layers: a handle for each layer; cancelled: a `cancel` left blocks that will not be moved.
    """

    __slots__ = ("_gates", "_graph", "cancelled", "layers")

    def __init__(
        self,
        graph: Graph,
        gate: Node,
        layers: Sequence[Node] | None = None,
        missing: str = "raise",
        kept: object = None,
    ) -> None:
        super().__init__((_End(gate, missing == "skip", kept),))
        self.layers = [Handle(graph, one, missing=missing) for one in layers or ()]
        self._graph, self._gates, self.cancelled = graph, (*(layers or ()), gate), False

    @property
    def landed(self) -> Any:
        """Which blocks landed, bool ``[blocks]``; none before the end."""
        return self._gates[-1].landed

    def cancel(self) -> bool:
        """Let no further block begin; True if some will not be moved."""
        # All gates are asked: each of them keeps what the others follow.
        left = [self._graph.cancel(gate) for gate in self._gates]
        self.cancelled = self.cancelled or any(left)
        return any(left)
