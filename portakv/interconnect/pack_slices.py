# SPDX-License-Identifier: Apache-2.0
"""Copies that pack or unpack across the link, in slices, as `staged` moves raw rows.

The device's stage makes dense rows in the encoding of the other side, in staging memory. Dense rows
lie in the order of the other side, so that few long runs cross. Slices are packed or unpacked on
one stream and cross on another, so that the two overlap.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from portakv.core.link import Cut
from portakv.interconnect.link import link_of
from portakv.interconnect.slices import BothStages, Cross, Passage, Sizes, SlicedRows
from portakv.interconnect.staging import DenseRows, staging
from portakv.interconnect.strategy import finish
from portakv.plan.packing import Move, PackPlan
from portakv.plan.plan import CopyPlan
from portakv.registry.prepared import PREPARED, Prepared, prepared
from portakv.registry.registry import Choice
from portakv.runtime import streams
from portakv.view.form import Form, same_form
from portakv.view.index import Index
from portakv.view.view import KVView


class PackStages(BothStages):
    """Both stages of a copy of which one side is packed.

    Args:
        src, dst: the forms of both sides. One is the device's; the other is elsewhere.
        steps: tokens for each entry of each side's index.
        downward: the source is the device's side.
        choice: the backend that packs or unpacks.

    Raises as `prepared`.
    """

    def __init__(
        self, src: Form, dst: Form, steps: tuple[int, int], downward: bool, choice: Choice
    ) -> None:
        plan = PackPlan(src, dst, *steps)
        far = dst if downward else src
        dense = DenseRows(far)
        per_token = far.token_bytes / (far.block_size if far.opaque else 1)
        super().__init__(plan, dense)
        self.downward = downward
        self.choice = choice
        #: Bytes of dense rows for each byte of raw rows.
        self.share = per_token / plan.raw.token_bytes
        self._far = far
        self.carried = self.tried_on(choice.backend.device).carried  # refuses what none executes

    def of(self, dense: KVView, slots: int) -> tuple[Prepared, CopyPlan]:
        """Return the device's stage, prepared for buffers of ``slots`` slots, and the link's
        plan."""
        return self._stage(dense.form), self._link(dense.form)

    def _stage(self, dense: Form) -> Prepared:
        plan = self.plan
        # Buffers are bytes. Their rows have the type of the other side's.
        typed = same_form(replace(dense, dtypes=self._far.dtypes))
        if self.downward:
            return prepared(plan.src, typed, plan.src_step, 0, None, self.choice, PackPlan)
        return prepared(typed, plan.dst, 0, plan.dst_step, None, self.choice, PackPlan)

    def _link(self, dense: Form) -> CopyPlan:
        far = self._far
        step = self.plan.dst_step if self.downward else self.plan.src_step
        unit = self.plan.unit
        if far.encoding:  # a slot is a row, and a block is one token
            dense = dense.as_slots()
            far = far.as_slots()
            step = step // unit
            unit = 1
        if self.downward:
            return CopyPlan(dense, far, 0, step, unit)
        return CopyPlan(far, dense, step, 0, unit)


def pack_stages(move: Move, downward: bool, choice: Choice) -> PackStages:
    """Return the stages of a copy; made on the first call, looked up after that.

    Raises as `PackStages`.
    """
    src = move.src.form
    dst = move.dst.form
    key = (src.address, dst.address, *move.steps, downward, choice, PackStages)
    known: PackStages | None = PREPARED.get(key)
    if known is None:
        made = PackStages(src, dst, move.steps, downward, choice)
        known = PREPARED.setdefault(key, made)
    return known


class PackedRows(SlicedRows):
    """Rows in slices of whole blocks, of which one side is packed."""

    def crossing(self, cut: Cut, dense: KVView, inside: Index | None = None) -> Move:
        """Return the copy between a buffer and the rows or slots of the other side."""
        far = self.host
        inside = inside or self.inside
        outside = self.host_index(cut)
        count = cut.count
        if far.form.encoding:
            size = far.form.block_size
            inside = inside.of_blocks(size)
            outside = outside.of_blocks(size)
            count = count // size
            dense = dense.as_slots()
            far = far.as_slots()
        if self.stages.downward:
            return Move(dense, far, inside, outside, count)
        return Move(far, dense, outside, inside, count)


def issue_slices(
    move: Move,
    stages: PackStages,
    cross: Cross | None,
    sizes: Sizes,
    order: tuple[torch.Stream, torch.Stream],
    words: torch.Tensor,
) -> None:
    """Issue all slices of a copy.

    Args:
        cross: copies a slice between its buffer and the far side, ordered on a stream. None: slices
            cross by the link, between staging memory and pinned memory, in pieces.
        sizes: of slices, in bytes of raw rows. The first one is large if the link is busy.
        order: the slices begin after the first stream, and the second stream waits for their end.
            The copy is detached if they differ.
        words: a cleared word for each block, which gets 1 if the block does not fit.
    """
    current, work = order
    near, far, near_index, far_index = move.ends(stages.downward)
    device = near.device
    if cross is None:
        far_index = far_index.to_host()
    buffers = staging(device, work, work is not current, packs=True)
    if not buffers.link.query():  # nothing waits for the first slice
        sizes = sizes._replace(smallest=sizes.largest)
    smaller = Sizes(*(max(1, int(size * stages.share)) for size in sizes))
    slices = PackedRows(stages, near, far, far_index, move.count, smaller)
    unit = stages.plan.unit

    def transform(nth: int, ready: Prepared, part: Move, stream: torch.Stream) -> None:
        first = slices.cuts[nth].start // unit
        own = words[first : first + part.count // unit]
        finish(ready.pack(part, stream, None, own))

    link = link_of(device)

    def by_link(cut: Cut, dense: KVView, _: int, stream: torch.Stream) -> None:
        slices.cross(link, cut, dense, stream)

    passage = Passage(buffers, work, slices, transform, cross or by_link)
    try:
        with buffers.lock:
            passage.settle(near_index, current)
            passage.issue()
    finally:
        # Also if something failed while slices were in progress.
        streams.completion(device, work, *far.retained, words)
