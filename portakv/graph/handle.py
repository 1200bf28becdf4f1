# SPDX-License-Identifier: Apache-2.0
"""The handle of blocks that a graph moves, for the caller of a block store."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import PortaKVError, TransferCancelled, TransferError
from portakv.graph.graph import Graph, Node
from portakv.runtime.transfer import Completion, Pending, Transfer

#: What becomes of blocks that do not land: the end raises, or it does not.
Missing: TypeAlias = Literal["raise", "skip"]


class Handle(Transfer):
    """A transfer that ends with a gate, and holds ``kept`` until then. If blocks did not land, its
    end raises `TransferError`, unless they are ``missing="skip"``; `TransferCancelled` if it was
    cancelled. ``layers``: the gate of each layer, which becomes a handle in the attribute.
    ``excused``: blocks that need not land, bool ``[blocks]``. A gate of the name "save" is of
    blocks that are written."""

    __slots__ = ("_excused", "_gates", "_graph", "_skip", "cancelled", "layers")

    def __init__(
        self,
        graph: Graph,
        gate: Node,
        layers: Any = (),
        missing: Missing = "raise",
        kept: Any = None,
        excused: Any = False,
    ) -> None:
        super().__init__((Completion(pendings=(cast(Pending, gate),), kept=kept),))
        self.layers = [Handle(graph, layer, missing=missing) for layer in layers]
        self._graph, self._gates, self._skip = graph, (*layers, gate), missing == "skip"
        self._excused = excused
        self.cancelled = False

    @property
    def landed(self) -> npt.NDArray[np.bool_]:
        """Which blocks landed, bool ``[blocks]``; none before the end."""
        landed: npt.NDArray[np.bool_] = self._gates[-1].landed
        return np.array(landed, np.bool_)

    def cancel(self) -> bool:
        """Let no further block begin; True if some will not be moved."""
        left = self._graph.run(self._cancel)
        self.cancelled = self.cancelled or left
        return left

    def _cancel(self) -> bool:
        """Cancel all gates, of which each keeps what it follows."""
        left = [self._graph.cancel(gate) for gate in self._gates]
        return any(left)

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Block the host, as nothing is on a stream any more when it ends; raises as `done`."""
        super().wait(stream)
        self._finish()

    def _finish(self) -> None:
        super()._finish()
        gate, landed = self._gates[-1], self.landed
        if not gate.ended:
            raise TransferError("A transfer goes on in the process that this was forked from.")
        kind = TransferCancelled if isinstance(gate.error, TransferCancelled) else TransferError
        if not ((landed | self._excused).all() or (self._skip and kind is TransferError)):
            why = "No tier has the others; missing='skip' lets that pass."
            if gate.name == "save":
                why = f"{gate.short or 'A tier'} did not take the others; statistics() tell more."
            if gate.error:
                why = str(gate.error) if isinstance(gate.error, PortaKVError) else repr(gate.error)
            raise kind(f"{landed.sum()} of {len(landed)} blocks landed. {why}") from gate.error
