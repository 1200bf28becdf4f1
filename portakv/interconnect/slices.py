# SPDX-License-Identifier: Apache-2.0
"""Slices: the cut of a copy across the link, so that its two stages overlap.

The core cuts the positions of a copy. If planes lie outside the positions on the host, a slice has
a run in each of them: a copy engine moves batches of runs of 256 KiB as fast as one run, and those
of 32 KiB at 0.98 of that (benchmarks/notes/link.md).
"""

from __future__ import annotations

from array import array
from math import lcm
from typing import NamedTuple

import torch

from portakv.core.link import Cut, cut_copy
from portakv.errors import Unsupported
from portakv.interconnect.link import CudaLink, TorchLink
from portakv.interconnect.staging import Buffers, DenseRows, Order
from portakv.plan.packing import PackPlan
from portakv.plan.plan import CopyPlan, Move
from portakv.registry.prepared import Prepared, prepared
from portakv.registry.registry import Choice
from portakv.view.index import Index
from portakv.view.view import KVView

#: Each slice is so many times as long as the slice before it: the link is idle only at one end of a
#: transfer (the first gather, the last scatter).
GROWTH = 4


class Sizes(NamedTuple):
    """Bytes of slices: the most of a transfer in one slice, of the first slice, and of the
    largest."""

    whole: int
    smallest: int
    largest: int


class BothStages:
    """Both stages of a copy across the link: the device's, between its rows and dense rows, and the
    link's.

    Attributes:
        plan: the plan of the whole copy.
        downward: from the device to the host.
        dense: the arrangement of dense rows.
        quantum: every slice but the last is a multiple of it.
        usual: both stages if buffers of any length have the same; else None.
    """

    usual: tuple[Prepared, CopyPlan] | None = None

    def __init__(self, plan: CopyPlan | PackPlan, dense: DenseRows) -> None:
        self.plan = plan
        self.downward = plan.src.place == "device"
        self.dense = dense
        self.quantum = lcm(plan.unit, dense.block_size)

    def of(self, dense: KVView, slots: int) -> tuple[Prepared, CopyPlan]:
        """Return the device's stage, prepared for buffers of ``slots`` slots, and the link's
        plan."""
        raise NotImplementedError

    def tried_on(self, device: torch.device) -> Prepared:
        """Return the device's stage for buffers of the least length; raise as `prepared` if no
        backend takes it."""
        slots = self.quantum
        memory = torch.empty(self.dense.nbytes(slots), dtype=torch.uint8, device=device)
        made = self.of(self.dense.view(memory, slots), slots)
        if self.dense.any_length:
            self.usual = made
        return made[0]

    def rules(self, sizes: Sizes, slots: int = 0) -> tuple[int, ...]:
        """Return how copies are cut, as `CutRules` of ``link.h``. ``slots``: of a buffer; 0: as
        many as the slices need."""
        dense = self.dense
        form = dense.form
        tokens = form.block_size if form.opaque else 1
        rows = dense.block_size, self.quantum, form.token_bytes, tokens, slots
        return (self.downward, *rows, *sizes, GROWTH)


class Stages(BothStages):
    """Both stages of a plan: the device's rows to or from dense rows, by ``half``, and the link.

    ``order``: of dense rows, one of the host's form.
    """

    def __init__(self, plan: CopyPlan, half: Choice, order: Order) -> None:
        downward = plan.src.place == "device"
        super().__init__(plan, DenseRows(plan.dst if downward else plan.src, order))
        self._half = half

    @classmethod
    def tried(cls, plan: CopyPlan, half: Choice, device: torch.device) -> Stages:
        """Return the stages of a plan, with the device's stage prepared.

        Raises:
            Unsupported: no backend takes dense rows in the host's order, nor layer by layer; the
                message has the reason of the second.
        """
        made = cls(plan, half, "form")
        try:
            made.tried_on(device)
        except Unsupported:
            made = cls(plan, half, "layer")
            made.tried_on(device)
        return made

    def of(self, dense: KVView, slots: int) -> tuple[Prepared, CopyPlan]:
        """Return the device's stage, prepared for buffers of ``slots`` slots, and the link's
        plan."""
        plan = self.plan
        form = dense.form
        ends = (plan.src, form, plan.src_step, 0), (form, plan.dst, 0, plan.dst_step)
        stage, link = ends if self.downward else ends[::-1]
        return prepared(*stage, plan.unit, self._half), CopyPlan(*link, plan.unit)


class SlicedRows:
    """The rows of a transfer in slices, and the buffers that these pass through.

    Args:
        stages: of the whole copy.
        rows, host: the rows of the device and of the host.
        host_index: of the host's rows; its ids are on the host if they cross by a link.
        count: positions of the copy.
        sizes: of slices.

    Attributes:
        cuts: the slices in the order of their moves.
        slots, nbytes: of a buffer.
        inside: the position of a slice in a buffer: as far into a block as on the host.
        ready, link: both stages, once `settle` has found them.
    """

    ready: Prepared
    link: CopyPlan

    def __init__(
        self,
        stages: BothStages,
        rows: KVView,
        host: KVView,
        host_index: Index,
        count: int,
        sizes: Sizes,
    ) -> None:
        self.stages = stages
        self.rows = rows
        self.host = host
        self._host_index = host_index
        rules = array("q", stages.rules(sizes))
        self.slots, self.cuts = cut_copy(rules, count, host_index.offset, True)
        self.nbytes = stages.dense.nbytes(self.slots)
        self.inside = Index(offset=host_index.offset % stages.dense.block_size)

    def settle(self, buffers: Buffers) -> None:
        """Find both stages."""
        stages = self.stages
        self.ready, self.link = stages.usual or stages.of(self.view(buffers, 0), self.slots)

    def view(self, buffers: Buffers, at: int) -> KVView:
        """Return a buffer as dense rows."""
        return buffers.view(at, self.stages.dense, self.slots)

    def host_index(self, cut: Cut) -> Index:
        """Return the index of a slice's rows on the host."""
        return self._host_index.shifted(cut.start)

    def crossing(self, cut: Cut, dense: KVView, inside: Index | None = None) -> Move:
        """Return the copy of a slice between a buffer and the host's rows.

        ``inside``: where it begins in the buffer; None: as far into a block as on the host.
        """
        inside = inside or self.inside
        index = self.host_index(cut)
        if self.stages.downward:
            return Move(dense, self.host, inside, index, cut.count)
        return Move(self.host, dense, index, inside, cut.count)

    def cross(
        self, link: CudaLink | TorchLink, cut: Cut, dense: KVView, stream: torch.Stream
    ) -> None:
        """Copy a slice between a buffer and the host's rows, ordered on a stream."""
        link.carry(self.link, self.crossing(cut, dense), stream, merged=True)
