# SPDX-License-Identifier: Apache-2.0
"""`staged`: makes rows dense on the device, and moves them across the link in few large copies.

The device's stage is a copy between the rows and dense rows, by the backend that serves the device.
The link's stage copies a slice in as few pieces as the host's rows allow. A transfer above `WHOLE`
bytes has several slices, and its stages overlap on two streams: while a slice crosses, the next
slice is gathered, or the last one scattered. A smaller one is one slice on the caller's stream.
"""

from __future__ import annotations

import torch

from portakv.backends.base import Capabilities, Launch
from portakv.host import pinned
from portakv.interconnect.link import CudaLink, link_of
from portakv.interconnect.passage import Passage, by_backend
from portakv.interconnect.slices import RowSlice, Sizes, Slice, Stages, cuts, sliced
from portakv.interconnect.staging import Order, staging
from portakv.interconnect.strategy import PINNED, Move, Strategy, StrategyLaunch
from portakv.interconnect.submission import submit
from portakv.plan.plan import CopyPlan
from portakv.runtime import streams
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


class StagedLaunch(StrategyLaunch):
    """A prepared copy, in slices of its ``kind``."""

    kind: type[RowSlice] = Slice

    def __init__(self, plan: CopyPlan, strategy: Strategy, order: Order = "form") -> None:
        super().__init__(plan, strategy.device)
        self._detached = strategy.terms.detached
        self._host = plan.dst if self.downward else plan.src
        self.stages = Stages.tried(plan, strategy.half, strategy.device, order)
        self.link = link_of(strategy.device)

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
