# SPDX-License-Identifier: Apache-2.0
"""A backend whose launches read ids in pinned memory, on any device.

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


class ReadingPinned(Reference):
    """The reference. The ids of its copies have to be right: it guards none, whatever it says."""

    name = "reading-pinned"
    #: For each launch, whether it got a status word.
    judging: ClassVar[list[bool]] = []

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), guards=True, skips_negative=True)

    def prepare(self, plan: CopyPlan) -> Launch:
        return _Launch(super().prepare(plan))


class _Launch(MoveLaunch):
    reads_pinned_ids = True

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def enqueue(
        self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None
    ) -> Pending | None:
        ReadingPinned.judging.append(status is not None)
        src, dst, src_index, dst_index, count = move
        src_index = _read_later(src_index, src.device)
        dst_index = _read_later(dst_index, dst.device)
        return self._launch(src, dst, src_index, dst_index, count, stream, None)


def _read_later(index: Index, device: torch.device) -> Index:
    """Return an index whose ids lie in pinned memory as one that a device reads there."""
    ids = index.ids
    if ids is None or not ids.is_cpu:
        return index
    (there,) = RawMemory(ids.dtype, ids.nbytes).tensors([ids.data_ptr()], device)
    return index.reading(there)
