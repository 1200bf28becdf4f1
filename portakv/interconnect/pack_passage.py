# SPDX-License-Identifier: Apache-2.0
"""Issue the slices of a copy that packs or unpacks across the link.

The staging memory holds slices in the far side's encoding. They are packed or unpacked on one
stream and cross on another, so that the two overlap.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from portakv.interconnect.link import link_of
from portakv.interconnect.pack_slices import PackStages, pack_slices
from portakv.interconnect.passage import Passage
from portakv.interconnect.slices import Sizes, Slice
from portakv.interconnect.staging import staging
from portakv.interconnect.strategy import finish
from portakv.plan.move import Move
from portakv.registry.prepared import PreparedPack
from portakv.runtime import streams
from portakv.view.view import KVView


class Crosses(Protocol):
    """Makes slices cross: the far side, and the calls that copy a slice.

    Attributes:
        carried: the executors of the copies and the reasons, as `Transfer.carried`.
        pieces: it copies pieces, so that the host needs the ids.
    """

    carried: list[tuple[str, str]]
    pieces: bool

    def __call__(
        self, each: Slice[PreparedPack], dense: KVView, nth: int, stream: torch.Stream
    ) -> None:
        """Copy slice ``nth`` between its buffer and the far side, ordered on a stream."""


class ByLink:
    """Slices cross between staging memory and pinned memory in pieces."""

    pieces = True

    def __init__(self, device: torch.device) -> None:
        self.carried = [("staged", "dense rows cross in few large copies")]
        self._link = link_of(device)

    def __call__(
        self, each: Slice[PreparedPack], dense: KVView, nth: int, stream: torch.Stream
    ) -> None:
        """Copy a slice on a stream."""
        each.cross(self._link, dense, stream)


def issue_slices(
    move: Move,
    stages: PackStages,
    cross: Crosses,
    sizes: Sizes,
    order: tuple[torch.Stream, torch.Stream],
    words: torch.Tensor,
) -> None:
    """Issue all slices of a copy.

    Args:
        sizes: of slices, in bytes of raw rows. The first one is large if the link is busy.
        order: the slices begin after the first stream, and the second stream waits for their end.
            The copy is detached if they differ.
        words: a cleared word for each block, which gets 1 if the block does not fit.
    """
    current, work = order
    far = move.src
    near = move.dst
    far_index = move.src_index
    near_index = move.dst_index
    if stages.downward:
        far = move.dst
        near = move.src
        far_index = move.dst_index
        near_index = move.src_index
    if cross.pieces:
        far_index = far_index.to_host()
    device = near.device
    buffers = staging(device, work, work is not current, packs=True)
    if not buffers.link.query():  # nothing waits for the first slice
        sizes = sizes._replace(smallest=sizes.largest)
    slices = pack_slices(stages, (near, far), far_index, move.count, sizes)
    unit = stages.plan.unit

    def transform(nth: int, ready: PreparedPack, part: Move, stream: torch.Stream) -> None:
        first = slices[nth].cut.start // unit
        own = words[first : first + part.count // unit]
        finish(ready.enqueue(part, stream, None, own))

    passage: Passage[Any] = Passage(stages.downward, buffers, work, slices, transform, cross)
    try:
        with buffers.lock:
            passage.settle(near_index, current)
            with passage.begun():
                for nth in range(len(slices)):
                    passage.move(nth)
    finally:
        # Also if something failed while slices were in progress.
        streams.completion(device, work, *far.retained, words)
