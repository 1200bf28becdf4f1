# SPDX-License-Identifier: Apache-2.0
"""`batched_memcpy`: the plan's runs, merged and folded, handed to the copy engines as they are.

Nothing runs on the device and nothing is staged; the host pays for each piece.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

import torch

from portakv.backends.base import Capabilities, Decision, Launch
from portakv.host import pinned
from portakv.interconnect.link import link_of
from portakv.interconnect.pieces import Pieces, pieces_of
from portakv.interconnect.strategy import PINNED, Move, Strategy, StrategyLaunch
from portakv.plan.plan import CopyPlan
from portakv.runtime import streams

#: Bytes of a plan's run. With less the host spends longer on describing a run than anything else
#: would take to move it: at 1 us a run, 16 bytes are 0.016 GB/s.
LEAST_RUN = 16

#: Pieces that one launch remembers, of all the index lists that it met; 48 bytes each.
MOST_KEPT = 1 << 18


class BatchedMemcpy(Strategy):
    """A copy for every piece: batched if the driver can, of rows at a pitch if they are."""

    name = "batched_memcpy"
    reads = "both"

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PINNED, index_on="any")

    def check(self, plan: CopyPlan) -> Decision:
        run = min(nest.run for nest in plan.nests)
        why = f"it copies runs of {LEAST_RUN} B or more, and the plan has some of {run} B"
        decision = super().check(plan)
        narrow = decision.accepted and run < LEAST_RUN
        return Decision(self.name, False, why) if narrow else decision

    def prepare(self, plan: CopyPlan) -> Launch:
        return _BatchedMemcpyLaunch(plan, self.device)


class _BatchedMemcpyLaunch(StrategyLaunch):
    def __init__(self, plan: CopyPlan, device: torch.device) -> None:
        super().__init__(plan, device)
        self._plan = plan
        self._link = link_of(device)
        self._lock = threading.Lock()
        # Of the lists that were met last, and how many pieces they have, with one more for each.
        self.known: OrderedDict[Hashable, Pieces] = OrderedDict()
        self.number = 0

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        src, dst, mine, theirs, count = move
        key = (
            src.origins,
            dst.origins,
            src.slots,
            dst.slots,
            count,
            pinned.seams(),
            mine.ids_token,
            mine.offset,
            theirs.ids_token,
            theirs.offset,
        )
        pieces = self.known.get(key)
        if pieces is None:
            # On the host every id is looked at before anything is moved.
            here = move._replace(src_index=mine.to_host(), dst_index=theirs.to_host())
            pieces = pieces_of(self._plan, here, self._link.fold_below)
            if not (mine.fleeting or theirs.fleeting):
                self._remember(key, pieces)
        try:
            self._link.copy(pieces, src, dst, stream)
        finally:
            # No allocator knows of these copies, so the host's memory is held until they ended.
            host = dst if self.downward else src
            streams.completion(self.device, stream, *host.held)

    def _remember(self, key: Hashable, pieces: Pieces) -> None:
        with self._lock:
            if pieces.number > MOST_KEPT or key in self.known:
                return
            self.known[key] = pieces
            self.number += pieces.number + 1
            while self.number > MOST_KEPT:
                self.number -= self.known.popitem(last=False)[1].number + 1
