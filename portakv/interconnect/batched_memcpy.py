# SPDX-License-Identifier: Apache-2.0
"""`batched_memcpy`: copy engines move the plan's runs, merged and folded, without staging.

No kernel runs on the device. The host pays for each piece.
"""

from __future__ import annotations

import torch

from portakv.backends.base import Decision, Launch
from portakv.backends.row_kernels import RowKernels
from portakv.core.call import Crossings
from portakv.core.pick import ORDER
from portakv.interconnect.link import CudaLink, link_of, uncut
from portakv.interconnect.strategy import (
    Cross,
    Move,
    Strategy,
    UnownedLaunch,
    cross_plainly,
)
from portakv.plan.plan import CopyPlan

#: The least bytes of a plan's run. The host spends longer on describing a shorter run than any
#: other strategy takes to move it: at 1 us a run, 16 bytes are 0.016 GB/s.
LEAST_RUN = 16


class BatchedMemcpy(Strategy):
    """Copy every piece: in batches if the driver can, as 2-D copies if rows lie at a pitch."""

    name = "batched_memcpy"
    reads = "both"

    def check(self, plan: CopyPlan) -> Decision:
        run = min(nest.run for nest in plan.nests)
        why = f"it copies runs of {LEAST_RUN} B or more, and the plan has some of {run} B"
        decision = super().check(plan)
        narrow = decision.accepted and run < LEAST_RUN
        return Decision(self.name, False, why) if narrow else decision

    def prepare(self, plan: CopyPlan) -> Launch:
        return _BatchedMemcpyLaunch(plan, self)


class _BatchedMemcpyLaunch(UnownedLaunch):
    strategy = BatchedMemcpy.name

    def __init__(self, plan: CopyPlan, strategy: Strategy) -> None:
        super().__init__(plan, strategy.device)
        self._plan = plan
        self._strategy = strategy
        self._link = link_of(strategy.device)
        # Of the plan, for a link by the driver.
        self._words = None
        if isinstance(self._link, CudaLink):
            self._words = self._link.words_of(plan, uncut(self.downward))

    def row_kernels(self) -> RowKernels | None:
        return self._strategy.half.backend.row_kernels

    def described(self, words: Crossings, strategy: str) -> Cross | None:
        if self._words is None:
            return None
        words.plans[ORDER.index(strategy)] = self._words.buffer_info()[0]
        return cross_plainly

    def submit(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        # Every id is checked on the host before anything is moved.
        if not move.ids_on_host:
            src_index = move.src_index.to_host()
            move = move._replace(src_index=src_index, dst_index=move.dst_index.to_host())
        self._link.carry(self._plan, move, stream)
