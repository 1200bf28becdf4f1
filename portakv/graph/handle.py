# SPDX-License-Identifier: Apache-2.0
"""The handle of blocks that a graph moves, for the caller of a block store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import PortaKVError, TransferCancelled, TransferError
from portakv.graph.graph import Graph, Task
from portakv.runtime.transfer import Completion, Pending, Transfer

#: What becomes of blocks that do not land: the end raises, or it does not.
Missing: TypeAlias = Literal["raise", "skip"]


class Handle(Transfer):
    """A transfer that ends with a gate, and holds ``kept`` until then. If blocks did not land, its
    end raises `TransferError`, unless they are ``missing="skip"``; `TransferCancelled` if it was
    cancelled. ``layers``: the gate of each layer, which becomes a handle in the attribute.
    ``excused``: blocks that need not land, bool ``[blocks]``. ``why`` takes which blocks landed,
    and returns why the others did not, or an empty text. A gate of the name "save" is of blocks
    that are written."""

    __slots__ = ("_excused", "_gates", "_graph", "_skip", "_why", "cancelled", "layers")

    def __init__(
        self,
        graph: Graph,
        gate: Task,
        layers: Any = (),
        missing: Missing = "raise",
        kept: Any = None,
        excused: Any = False,
        why: Callable[[Any], str] | None = None,
    ) -> None:
        super().__init__((Completion(pendings=(cast(Pending, gate),), retained=kept),))
        self.layers = [Handle(graph, layer, missing=missing, why=why) for layer in layers]
        self._graph = graph
        self._gates = (*layers, gate)
        self._skip = missing == "skip"
        self._excused = excused
        self._why = why
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
        gate = self._gates[-1]
        landed = self.landed
        if not gate.ended:
            raise TransferError("A transfer goes on in the process that this was forked from.")
        kind = TransferCancelled if isinstance(gate.error, TransferCancelled) else TransferError
        if not ((landed | self._excused).all() or (self._skip and kind is TransferError)):
            counts = f"{landed.sum()} of {len(landed)} blocks landed."
            raise kind(f"{counts} {self._explain(gate, landed)}") from gate.error

    def _explain(self, gate: Task, landed: Any) -> str:
        """Return why blocks did not land, and what the caller may do."""
        sentences = []
        details = self._why(landed) if self._why else ""
        if details:
            sentences.append(f"{details}.")
        if gate.error:
            known = isinstance(gate.error, PortaKVError)
            sentences.append(str(gate.error) if known else repr(gate.error))

        if gate.name == "save":
            if not sentences and gate.short:
                sentences.append(f"{gate.short} did not take the others.")
        elif not gate.error:
            if not details:
                sentences.append("No tier has the others.")
            sentences.append("Pass missing='skip' to accept that.")
        return " ".join(sentences)
