# SPDX-License-Identifier: Apache-2.0
"""`ring`: between a device and pageable memory, through pinned memory that is used in turns.

A device cannot read or write pageable memory beside the host. So rows are made dense on the device,
as `staged` does, and cross in one copy each slice to or from bounce buffers, where they lie in the
order of the host's rows; and the caller copies between those and the rows, by torch's threads,
while other slices cross. It is busy until the host has read or written all: a copy through this
engine blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from portakv.backends.base import Capabilities, Launch
from portakv.backends.strided import HostRows
from portakv.engines.engine import PAGEABLE, Engine, Move
from portakv.engines.pieces import Pieces
from portakv.engines.slices import Sizes, Slice, TwoStages, kept_slices
from portakv.engines.staged import Passage, StagedLaunch
from portakv.engines.staging import BUFFERS, bounce_buffers, staging
from portakv.plan.plan import CopyPlan
from portakv.runtime.bounded import Bounded
from portakv.view.index import Index

if TYPE_CHECKING:
    from portakv.view.form import Form
    from portakv.view.view import KVView

#: Each slice costs the caller about 0.1 ms, and in the first one only the link is busy, or only the
#: host. Of 16, 24 and 32 MiB the middle did best (H200, 16 cores); a device takes
#: `BUFFERS` bounce buffers for them, 72 MiB of pinned memory, and a block more if one is cut.
SIZES = Sizes(whole=8 << 20, smallest=8 << 20, largest=24 << 20)


class Ring(Engine):
    """Dense on the device, across to pinned memory, and on to the rows by the host; or back."""

    name = "ring"

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PAGEABLE, index_on="any")

    def prepare(self, plan: CopyPlan) -> Launch:
        return _RingLaunch(plan, self)


class _Bounced(Slice):
    """A slice that crosses to or from a bounce buffer, in one copy."""

    def pieces(self, dense: KVView, host: KVView, fold_below: int) -> Pieces:
        """The rows that both buffers hold; settled for the two that were last asked for."""
        ends = dense.origins[0], host.origins[0]
        settled = self._settled
        if settled is None or settled[:2] != ends:
            used = extent(dense.form, self.held, self.behind.offset, self.cut.count)
            pitch = used.width if used.height == 1 else used.pitch
            dst, src = ends[::-1] if self.stages.downward else ends
            numbers = dst + used.start, src + used.start, used.width, used.height, pitch, pitch
            made = Pieces(*np.array([numbers], dtype=np.int64).T)
            settled = self._settled = *ends, made
        return settled[2]


class Extent(NamedTuple):
    """Rows of bytes: where the first one begins, their width, how many, and how far apart."""

    start: int
    width: int
    height: int
    pitch: int


def extent(form: Form, held: int, first: int, count: int) -> Extent:
    """What some positions take of dense rows that hold ``held``; whole blocks, and perhaps more
    than they take, but nothing outside of the rows."""
    per = form.block_size or 1
    nbytes = held * form.token_bytes // (per if form.opaque else 1)
    chains = [part.block if form.paged else part.token for part in form.parts]
    stride = chains[0][0].stride
    pitch = held // per * stride
    if any(len(chain) > 1 or chain[0].stride != stride for chain in chains) or nbytes % pitch:
        return Extent(0, nbytes, 1, nbytes)
    begin, end = first // per, -(-(first + count) // per)
    if (end - begin) * stride == pitch:
        return Extent(0, nbytes, 1, nbytes)
    return Extent(begin * stride, (end - begin) * stride, nbytes // pitch, pitch)


class _RingLaunch(StagedLaunch):
    """A prepared copy: that of `staged`, with a second hop."""

    def __init__(self, plan: CopyPlan, engine: Engine) -> None:
        super().__init__(plan, engine)
        self._buffers = bounce_buffers(engine.device)
        self._hops: Bounded[tuple[TwoStages, int], HostRows] = Bounded("second hops", 64)

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        rows, host, mine, theirs = self.ends(move)
        work = stream or torch.accelerator.current_stream(self.device.index)
        room, buffers = staging(self.device, work), self._buffers
        slices = self.slices(rows, host, theirs.to_host(), move.count)
        number = len(slices)

        def cross(each: Slice, dense: KVView, nth: int) -> None:
            at, link = nth % BUFFERS, passage.link
            bounce = buffers.view(at, each.dense, each.held)
            src, dst = (dense, bounce) if self.downward else (bounce, dense)
            buffers.wait(at)
            buffers.begin(at, link)
            self.link.copy(each.pieces(dense, bounce, 0), src, dst, link)
            buffers.end(at, link)

        passage = Passage(self.downward, room, work, slices, cross)
        with buffers.lock, room.lock:
            buffers.reserve(max(each.nbytes for each in slices))
            with passage.begun(mine, work):
                if self.downward:  # slices cross while the host copies those before them
                    for nth in range(min(BUFFERS, number)):
                        passage.move(nth)
                for nth in range(number):
                    self._hop(slices[nth], host, nth % BUFFERS)
                    if not self.downward:
                        passage.move(nth)
                    elif nth + BUFFERS < number:
                        passage.move(nth + BUFFERS)

    def slices(
        self, rows: KVView, host: KVView, theirs: Index, count: int, idle: bool = True
    ) -> list[Slice]:
        """As `StagedLaunch.slices`, wherever the host's memory is. If planes lie outside the
        positions these are cut, so that the host copies few long pieces."""
        outside = self.stages.whole.dense.outside
        # Not exactly so many positions: transfers of any length share few plans.
        key = count, theirs.ids_token, theirs.offset
        return kept_slices(self, rows, key, lambda: [
            _Bounced(self.stages, cut, rows, host, theirs, False, SIZES.largest)
            for cut in self._cuts(outside, count, SIZES)
        ])  # fmt: skip

    def _hop(self, each: Slice, host: KVView, at: int) -> None:
        """The host's copy between its rows and a bounce buffer, once nothing crosses there."""
        bounce = self._buffers.view(at, each.dense, each.held)
        part, key = host.planes(each.cut.layers, each.cut.kv), (each.stages, each.held)
        hop = self._hops.get(key)
        if hop is None:
            plan, form = each.stages.plan, bounce.form
            if self.downward:
                hop = HostRows(form, plan.dst, 0, plan.dst_step, plan.unit)
            else:
                hop = HostRows(plan.src, form, plan.src_step, 0, plan.unit)
            self._hops[key] = hop
        self._buffers.wait(at)
        if self.downward:
            hop.copy(bounce, part, each.behind, each.theirs, each.cut.count)
        else:
            hop.copy(part, bounce, each.theirs, each.behind, each.cut.count)
