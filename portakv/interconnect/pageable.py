# SPDX-License-Identifier: Apache-2.0
"""`pageable`: between a device and pageable memory, through pinned memory that is used in turns.

A device cannot read or write pageable memory beside the host. So rows are made dense on the device,
as `staged` does, and cross in one copy each slice to or from bounce buffers, where they lie as the
host's rows, or layers first; and the caller copies between those and the rows, by torch's threads,
while other slices cross. It is busy until the host has read or written all: a copy through this
strategy blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from portakv.backends.base import Capabilities, Launch
from portakv.backends.strided import HostRows
from portakv.interconnect.pieces import Pieces
from portakv.interconnect.slices import Sizes, Slice, Stages
from portakv.interconnect.staged import Passage, StagedLaunch
from portakv.interconnect.staging import BUFFERS, bounce_buffers, staging
from portakv.interconnect.strategy import PAGEABLE, Move, Strategy
from portakv.plan.plan import CopyPlan
from portakv.runtime.bounded import Bounded
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

#: Each slice costs the caller about 0.1 ms, and in the first one only the link is busy, or only the
#: host. Of 16, 24 and 32 MiB the middle did best (H200, 16 cores); a device takes
#: `BUFFERS` bounce buffers for them, 72 MiB of pinned memory, and a block more if one is cut.
SIZES = Sizes(whole=8 << 20, smallest=8 << 20, largest=24 << 20)


class Pageable(Strategy):
    """Dense on the device, across to pinned memory, and on to the rows by the host; or back."""

    name = "pageable"
    reads = "host"

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PAGEABLE, index_on="any")

    def prepare(self, plan: CopyPlan) -> Launch:
        return _PageableLaunch(plan, self)


class _BouncedSlice(Slice):
    """A slice that crosses to or from a bounce buffer, in one copy."""

    def crossing(self, dense: KVView, host: KVView, fold_below: int) -> Pieces:
        """The rows that both buffers hold."""
        used = extent(dense.form, self.held, self.behind.offset, self.cut.count)
        pitch = used.width if used.height == 1 else used.pitch
        in_buffer = dense.origins[0] + used.start
        in_bounce = host.origins[0] + used.start
        src = in_buffer if self.stages.downward else in_bounce
        dst = in_bounce if self.stages.downward else in_buffer
        piece = (dst, src, used.width, used.height, pitch, pitch)
        return Pieces(*np.array([piece], dtype=np.int64).T)


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
    begin = first // per
    end = -(-(first + count) // per)
    if (end - begin) * stride == pitch:
        return Extent(0, nbytes, 1, nbytes)
    return Extent(begin * stride, (end - begin) * stride, nbytes // pitch, pitch)


class _PageableLaunch(StagedLaunch):
    """A prepared copy: that of `staged`, with a second hop."""

    kind = _BouncedSlice

    def __init__(self, plan: CopyPlan, strategy: Strategy) -> None:
        # A backend without a kernel takes a call for each layer of a slice: whole layers are cut.
        super().__init__(plan, strategy, "form" if strategy.half.can.guards else "planes")
        self._buffers = bounce_buffers(strategy.device)
        self._hops: Bounded[tuple[Stages, int], HostRows] = Bounded("second hops", 64)

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        rows, host, mine, theirs = self.ends(move)
        work = stream or torch.accelerator.current_stream(self.device.index)
        room = staging(self.device, work)
        buffers = self._buffers
        slices = self.slices(rows, host, theirs.to_host(), move.count)
        number = len(slices)

        def cross(each: Slice, dense: KVView, nth: int, link: torch.Stream) -> None:
            at = nth % BUFFERS
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

    def cutting(
        self, host: KVView, theirs: Index, idle: bool
    ) -> tuple[tuple[object, ...], tuple[str, ...], bool, Sizes]:
        """As `StagedLaunch.cutting`, wherever the host's memory is. If planes lie outside the
        positions these are cut, so that the host copies few long pieces; positions are not held
        exactly, so that transfers of any length share few plans."""
        return (), self.stages.dense.outside, False, SIZES

    def _hop(self, each: Slice, host: KVView, at: int) -> None:
        """The host's copy between its rows and a bounce buffer, once nothing crosses there."""
        bounce = self._buffers.view(at, each.dense, each.held)
        part = host.planes(each.cut.layers, each.cut.kv)
        key = (each.stages, each.held)
        src = bounce
        dst = part
        src_index = each.behind
        dst_index = each.theirs
        if not self.downward:
            src = part
            dst = bounce
            src_index = each.theirs
            dst_index = each.behind
        hop = self._hops.get(key)
        if hop is None:
            plan = each.stages.plan
            steps = (0, plan.dst_step) if self.downward else (plan.src_step, 0)
            hop = self._hops[key] = HostRows(src.form, dst.form, *steps, plan.unit)
        self._buffers.wait(at)
        hop.copy(src, dst, src_index, dst_index, each.cut.count)
