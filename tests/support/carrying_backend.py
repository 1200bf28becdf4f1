# SPDX-License-Identifier: Apache-2.0
"""A backend whose launches carry few ids of the host, on any device.

It moves bytes as the reference does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from portakv.backends.base import Capabilities, Launch, MoveLaunch, Pending
from portakv.backends.reference import Reference
from portakv.plan.plan import CopyPlan, Move
from portakv.view.addresses import RawMemory
from portakv.view.index import Index


class Carrying(Reference):
    """The reference. The ids of its copies have to be right: it guards none, whatever it says."""

    name = "carrying"
    #: For each launch, whether it got a status word.
    judging: ClassVar[list[bool]] = []
    #: The ids of each launch that carried some, which its argument holds until it has run.
    carried: ClassVar[list[torch.Tensor]] = []

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), guards=True, skips_negative=True)

    def prepare(self, plan: CopyPlan) -> Launch:
        return CarryingLaunch(super().prepare(plan))


class CarryingLaunch(MoveLaunch):
    """A launch that the device may run after the caller has changed the ids."""

    carries_ids = True
    #: As the driver copies an argument.
    take = staticmethod(torch.clone)

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def enqueue(
        self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None
    ) -> Pending | None:
        Carrying.judging.append(status is not None)
        src, dst, src_index, dst_index, count = move
        src_index = self._carried(src_index, src.device)
        dst_index = self._carried(dst_index, dst.device)
        return self._launch(src, dst, src_index, dst_index, count, stream, None)

    def _carried(self, index: Index, device: torch.device) -> Index:
        """Return an index whose ids lie on the host as one that a device reads."""
        if index.ids is None or not index.ids.is_cpu:
            return index
        ids = self.take(index.ids)
        Carrying.carried.append(ids)
        (there,) = RawMemory(ids.dtype, ids.nbytes).tensors([ids.data_ptr()], device)
        return Index(there, index.step, index.offset)
