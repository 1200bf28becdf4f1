# SPDX-License-Identifier: Apache-2.0
"""`staged`: makes rows dense on the device, and moves them across the link in few large copies.

The device's stage is a copy between the rows and dense rows, by the backend that serves the device.
The link's stage copies a slice in as few pieces as the host's rows allow. A transfer above `WHOLE`
bytes has several slices, and its stages overlap on two streams: while a slice crosses, the next
slice is gathered, or the last one scattered. A smaller one is one slice on the caller's stream.
"""

from __future__ import annotations

from array import array

import torch

from portakv.backends.base import Capabilities, Launch
from portakv.backends.rows_launch import RowsLaunch
from portakv.core.call import OTHERWISE
from portakv.core.link import COUNT, ROOM, STAGE, Fault
from portakv.errors import Unsupported
from portakv.host import pinned
from portakv.interconnect.link import CheckedCopy, CudaLink, link_of, rules
from portakv.interconnect.passage import Passage, by_backend
from portakv.interconnect.pieces import limits_of
from portakv.interconnect.slices import (
    GROWTH,
    BothStages,
    RowSlice,
    Sizes,
    Slice,
    Stages,
    cuts,
    sliced,
)
from portakv.interconnect.staging import Order, Staging, staging
from portakv.interconnect.strategy import PINNED, Move, Strategy, StrategyLaunch
from portakv.interconnect.submission import submit
from portakv.plan.plan import CopyPlan
from portakv.registry.prepared import Prepared
from portakv.runtime import cuda, streams
from portakv.view.index import Index
from portakv.view.view import KVView

#: Bytes of the largest slice, and of the smallest. Of 8, 16 and 32 MiB the largest loses least to
#: the gaps between slices (H200).
LARGEST = 32 << 20
SMALLEST = 4 << 20
#: Bytes up to which a transfer is one slice. A gather of 32 MiB takes 20 us, 3 % of its time on the
#: link (H200).
WHOLE = 32 << 20


class Staged(Strategy):
    """Gather on the device, then copy each slice; or copy each slice, then scatter."""

    name = "staged"
    reads = "host"

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PINNED, index_on="any")

    def prepare(self, plan: CopyPlan) -> Launch:
        return StagedLaunch(plan, self)


class StagedCrossing:
    """The copies between two forms, each by one call of the core, which cuts it into slices.

    Args:
        stages: both stages of the copies.
        link: of the device.
        device: the rows' device.
    """

    def __init__(self, stages: BothStages, link: CudaLink, device: torch.device) -> None:
        self._stages = stages
        self._link = link
        self._device = device
        # `CrossingPlan` of ``link.h``. None: not known yet.
        self._words: array[int] | None = None
        self._stage: RowsLaunch | None = None
        self._declines = False  # another backend executes the device's stage
        if stages.usual is not None:
            self._settle(*stages.usual, 0)

    def cross(self, copy: CheckedCopy) -> int:
        """Submit a copy, as `StrategyLaunch.cross` does."""
        if self._declines or self._in_planes(copy):
            return OTHERWISE
        buffers = staging(self._device, torch.accelerator.current_stream(self._device.index))
        with buffers.lock:
            try:
                if self._words is None:
                    self._settle_fixed(buffers)
                if self._words is None:
                    return OTHERWISE
                fault = self._submit(self._words, buffers, copy)
                if fault is not None and fault.code == ROOM:
                    buffers.reserve(fault.values[0])
                    fault = self._submit(self._words, buffers, copy)
            except (torch.OutOfMemoryError, Unsupported):  # nothing was submitted
                return OTHERWISE
        if fault is None:
            return copy.words[COUNT] << 2
        if fault.what == STAGE and fault.code != cuda.NO_CONTEXT and self._stage is not None:
            self._stage.refuse(fault.code, copy.rows.slots, 0, fault.slice)
        return self._link.refused(fault)

    def _in_planes(self, copy: CheckedCopy) -> bool:
        """Return True if planes of a copy are cut, not its positions."""
        stages = self._stages
        if not stages.dense.outside or copy.host.entries > 1 or copy.host_ids:
            return False
        dense = stages.dense.form
        tokens = dense.block_size if dense.opaque else 1
        whole = dense.token_bytes * copy.words[COUNT] <= WHOLE * tokens
        return not (whole or pinned.boundaries())

    def _submit(self, words: array[int], buffers: Staging, copy: CheckedCopy) -> Fault | None:
        return self._link.rows(words, buffers.words.buffer_info()[0], copy, copy.uncrossed)

    def _settle_fixed(self, buffers: Staging) -> None:
        """Prepare both stages for buffers of one length, since their form depends on it."""
        stages = self._stages
        quantum = stages.quantum
        quanta = max(WHOLE, LARGEST) // stages.dense.nbytes(quantum)
        # A copy that is one slice may end inside a quantum, and begin inside a block.
        slots = (max(1, quanta) + 1) * quantum + stages.dense.block_size
        buffers.reserve(stages.dense.nbytes(slots))
        ready, plan = stages.of(buffers.view(0, stages.dense, slots), slots)
        self._settle(ready, plan, slots)

    def _settle(self, ready: Prepared, plan: CopyPlan, slots: int) -> None:
        """Describe the copies for the core, if it launches the kernels of their device's stage.

        ``slots``: of the buffers; 0: any.
        """
        stage = ready.launch
        if not isinstance(stage, RowsLaunch):
            self._declines = True
            return
        dense = self._stages.dense
        form = dense.form
        tokens = form.block_size if form.opaque else 1
        self._stage = stage
        self._plan = plan  # whose words are read
        self._words = array(
            "q",
            [
                self._stages.downward,
                *stage.words,
                plan.words.buffer_info()[0],
                0,  # the core merges the pieces of slices
                *(dense.block_size, self._stages.quantum, form.token_bytes, tokens, slots),
                *(WHOLE, SMALLEST, LARGEST, GROWTH),
                *limits_of(self._link.fold_below),
                *rules(),
            ],
        )


class StagedLaunch(StrategyLaunch):
    """A prepared copy, in slices of its ``kind``."""

    kind: type[RowSlice] = Slice

    def __init__(self, plan: CopyPlan, strategy: Strategy, order: Order = "form") -> None:
        super().__init__(plan, strategy.device)
        self._detached = strategy.terms.detached
        self._host = plan.dst if self.downward else plan.src
        self.stages = Stages.tried(plan, strategy.half, strategy.device, order)
        self.link = link_of(strategy.device)
        self._crossing: StagedCrossing | None = None
        if isinstance(self.link, CudaLink) and not self._detached:
            self._crossing = StagedCrossing(self.stages, self.link, strategy.device)

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        rows, host, device_index, host_index = self.ends(move)
        current = torch.accelerator.current_stream(self.device.index)
        work = stream or current
        buffers = staging(self.device, work, self._detached)
        slices = self.slices(rows, host, host_index.to_host(), move.count, buffers.link.query())

        def cross(each: RowSlice, dense: KVView, _: int, link: torch.Stream) -> None:
            each.cross(self.link, dense, link)

        passage = Passage(self.downward, buffers, work, slices, by_backend, cross)
        try:
            with buffers.lock:
                by_driver = isinstance(self.link, CudaLink)
                passage.settle(device_index, current, by_driver)
                if isinstance(self.link, CudaLink) and passage.by_kernels:
                    submit(self.link, passage, host_index.to_host())
                else:
                    with passage.begun():
                        for nth in range(len(slices)):
                            passage.move(nth)
        finally:
            # No allocator knows of the link's copies. The host's memory is retained until they end,
            # also if something failed while they were in progress.
            streams.completion(self.device, work, *host.retained, lists=passage.lists)

    def cross(self, copy: CheckedCopy) -> int:
        return OTHERWISE if self._crossing is None else self._crossing.cross(copy)

    def slices(
        self, rows: KVView, host: KVView, host_index: Index, count: int, idle: bool = True
    ) -> list[RowSlice]:
        """Return the slices of a transfer. ``idle``: no earlier slice of this staging is crossing
        the link."""
        outside, exact, sizes = self.cutting(host, host_index, idle)
        stages = self.stages
        cut = cuts(self._host, outside, count, stages.quantum, self.downward, sizes)
        return sliced(stages, cut, (rows, host), host_index, exact, sizes.largest, self.kind)

    def cutting(
        self, host: KVView, host_index: Index, idle: bool
    ) -> tuple[tuple[str, ...], bool, Sizes]:
        """Return how a transfer is cut: the axes ``outside`` of positions that may be cut; whether
        nothing may lie between planes; and the sizes."""
        # If the link is busy, nothing waits for the first slice. All slices are then as large as
        # possible, and wait least often for a model that leaves little of the device free.
        sizes = Sizes(WHOLE, SMALLEST if idle else LARGEST, LARGEST)
        if host_index.ids is None and len(host.origins) == 1 and not pinned.boundaries():
            outside = self.stages.dense.outside
            return outside, bool(outside), sizes
        # Ids scatter the rows of a plane anyway, and several allocations scatter the planes.
        return (), False, sizes
