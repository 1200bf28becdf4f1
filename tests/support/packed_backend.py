# SPDX-License-Identifier: Apache-2.0
"""A backend whose launches are packed for copies that are repeated, on any device.

It moves bytes as the reference does. Only the addresses of ids and the counts change.
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
        return self._launch(*move, stream, None)

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


def _index_at(address: int, view: KVView, like: Index, first: int, count: int) -> Index:
    """Return the index of the ids at an address; without ids the rows themselves lie there."""
    if like.ids is None:
        assert address == view.origins[0], "the same memory each time"
        return like
    nbytes = -(-(first + count) // like.step) * like.ids.itemsize
    (ids,) = RawMemory(like.ids.dtype, nbytes).tensors([address], like.ids.device)
    return Index(ids, like.step, first)
