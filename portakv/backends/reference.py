# SPDX-License-Identifier: Apache-2.0
"""`reference`: plain tensor indexing, short enough to check by reading, on any torch device.

Each side of a nest becomes a strided tensor ``[units, loops..., run]`` for each entry of the
address table, with elements as wide as the plan's vector. The copy is then ``index_select``,
``index_copy_`` or ``copy_`` (see `strided`). Ids must be clean, neither negative nor past the end:
this backend claims neither skipping nor guarding, so that the caller of a launch removes bad ids.
"""

from __future__ import annotations

import torch

from portakv.backends.base import Backend, Capabilities, Decision, Launch, places_on
from portakv.backends.reference_pack import ReferencePack
from portakv.backends.strided import Ops, StridedLaunch, pick_in_any_shape, put_in_any_shape
from portakv.layout.packing import PACK
from portakv.plan.packing import PackPlan
from portakv.plan.plan import CopyPlan


def _put_bits(target: torch.Tensor, dim: int, rows: torch.Tensor, source: torch.Tensor) -> None:
    """Call `Tensor.index_copy_` with elements that may be complex numbers.

    Under deterministic algorithms torch multiplies by one on CUDA: a NaN in one part of a complex
    number then spoils the other part.
    """
    if target.is_complex() and torch.are_deterministic_algorithms_enabled():
        target = target.view(torch.int64)
        source = source.view(torch.int64)
    target.index_copy_(dim, rows, source)


def _pick(
    source: torch.Tensor, dim: int, rows: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Call `index_select` with row numbers of any shape; ``out`` may have holes."""
    if rows.dim() == 1:
        return torch.index_select(source, dim, rows, out=out)
    return pick_in_any_shape(source, dim, rows, out)


def _put(target: torch.Tensor, dim: int, rows: torch.Tensor, source: torch.Tensor) -> None:
    """Call `Tensor.index_copy_` with row numbers of any shape."""
    if rows.dim() == 1:
        target.index_copy_(dim, rows, source)
    else:
        put_in_any_shape(target, dim, rows, source)


# complex128 is torch's only 16-byte dtype, and not every vendor has it. A CPU is faster with a call
# for each plane than with strides over all planes.
_OPS = {"cpu": Ops(16, by_plane=True), "cuda": Ops(16, put=_put_bits)}
_NESTED = Ops(nested=True, select=_pick, put=_put)


class Reference(Backend):
    """Pure tensor indexing; always available."""

    name = "reference"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._ops = _OPS.get(device.type, _NESTED)

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        return Decision(cls.name, True, "plain torch indexing runs on any torch device")

    def capabilities(self) -> Capabilities:
        return Capabilities(places=places_on(self.device), encodings=frozenset({PACK}))

    def prepare(self, plan: CopyPlan) -> Launch:
        return StridedLaunch(plan, self._ops)

    def prepare_pack(self, plan: PackPlan) -> ReferencePack:
        return ReferencePack(plan, self.device, self._ops)
