# SPDX-License-Identifier: Apache-2.0
"""A backend whose launches read ids in pinned memory, and are packed for copies of chunks that are
repeated, on any device. It moves bytes as the reference does.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import ClassVar

import torch

from portakv.backends.base import Again, Capabilities, Launch, MoveLaunch, Pending
from portakv.backends.reference import Reference
from portakv.plan.plan import CopyPlan, Move
from portakv.view.addresses import RawMemory
from portakv.view.index import Index
from portakv.view.view import KVView

#: The most tokens of a packed launch.
MOST = 1 << 12


class Packing(Reference):
    """The reference with packed launches. The ids of its copies have to be right: it guards none,
    whatever it says."""

    name = "packing"
    #: The address of the status word of each packed launch.
    words: ClassVar[list[int]] = []
    #: For each other launch, whether it got a status word.
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
        Packing.judging.append(status is not None)
        src, dst, src_index, dst_index, count = move
        src_index = _read_later(src_index, src.device)
        dst_index = _read_later(dst_index, dst.device)
        return self._launch(src, dst, src_index, dst_index, count, stream, None)

    def again(self, src: KVView, dst: KVView, src_index: Index, dst_index: Index) -> Again:
        return _Again(self._launch, Move(src, dst, src_index, dst_index, 0))


class _Again:
    """A launch that finds its ids by their addresses, when the device comes to it."""

    def __init__(self, launch: Launch, like: Move) -> None:
        self.most = MOST
        self._launch = launch
        self._like = like

    def __call__(self, src: int, dst: int, first: int, count: int, status: int) -> None:
        assert count <= self.most
        Packing.words.append(status)
        like = self._like
        # A trace of calls ends here, as at the driver of a device.
        profile = sys.getprofile()
        sys.setprofile(None)
        try:
            src_index = _index_at(src, like.src, like.src_index, first, count)
            dst_index = _index_at(dst, like.dst, like.dst_index, first, count)
            self._launch(like.src, like.dst, src_index, dst_index, count, None, None)
        finally:
            sys.setprofile(profile)


def _read_later(index: Index, device: torch.device) -> Index:
    """Return an index whose ids lie in pinned memory as one that a device reads there."""
    ids = index.ids
    if ids is None or not ids.is_cpu:
        return index
    (there,) = RawMemory(ids.dtype, ids.nbytes).tensors([ids.data_ptr()], device)
    return index.reading(there)


def _index_at(address: int, view: KVView, like: Index, first: int, count: int) -> Index:
    """Return the index of the ids at an address; without ids the rows themselves lie there."""
    if like.ids is None:
        assert address == view.origins[0], "the same memory each time"
        return like
    nbytes = -(-(first + count) // like.step) * like.ids.itemsize
    (ids,) = RawMemory(like.ids.dtype, nbytes).tensors([address], like.ids.device)
    return Index(ids, like.step, first)
