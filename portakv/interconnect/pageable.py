# SPDX-License-Identifier: Apache-2.0
"""`pageable`: copies between a device and pageable memory, through pinned buffers that are used in
turns.

A device cannot read or write pageable memory while the host works. So rows are made dense on the
device, as `staged` does. Each slice crosses in one copy to or from a bounce buffer, in the order of
the host's rows, or layers first. The caller's thread copies between the bounce buffers and the
rows, by torch's threads, while other slices cross. It is busy until the host has read or written
all rows: a copy by this strategy blocks.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch

from portakv.backends.base import Capabilities, Launch
from portakv.backends.strided import copy_on_host
from portakv.interconnect.passage import Passage, by_backend
from portakv.interconnect.pieces import Pieces
from portakv.interconnect.slices import RowSlice, Sizes
from portakv.interconnect.staged import StagedLaunch
from portakv.interconnect.staging import BUFFERS, bounce_buffers, staging
from portakv.interconnect.strategy import PAGEABLE, Move, Strategy
from portakv.plan.plan import CopyPlan
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

#: Each slice costs the caller about 0.1 ms, and during the first slice only the link is busy, or
#: only the host. Of 16, 24 and 32 MiB the middle did best (H200, 16 cores). A device takes
#: `BUFFERS` bounce buffers for them, 72 MiB of pinned memory, and a block more if one is cut.
SIZES = Sizes(whole=8 << 20, smallest=8 << 20, largest=24 << 20)


class Pageable(Strategy):
    """Copy dense rows on the device across to pinned memory, and on to the rows by the host; or
    back."""

    name = "pageable"
    reads = "host"

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PAGEABLE, index_on="any")

    def prepare(self, plan: CopyPlan) -> Launch:
        return _PageableLaunch(plan, self)


class _BouncedSlice(RowSlice):
    """A slice that crosses to or from a bounce buffer, in one copy."""

    def between(self, dense: KVView, bounce: KVView) -> Pieces:
        """Return the rows that both buffers hold."""
        planes = self.planes
        used = extent(dense.form, planes.slots, planes.buffer_index.offset, self.cut.count)
        pitch = used.width if used.height == 1 else used.pitch
        in_buffer = dense.origins[0] + used.start
        in_bounce = bounce.origins[0] + used.start
        src = in_buffer if planes.stages.downward else in_bounce
        dst = in_bounce if planes.stages.downward else in_buffer
        piece = (dst, src, used.width, used.height, pitch, pitch)
        return Pieces(*np.array([piece], dtype=np.int64).T)


class Extent(NamedTuple):
    """Rows of bytes: the start of the first row, their width, their number, and their distance."""

    start: int
    width: int
    height: int
    pitch: int


def extent(form: Form, slots: int, first: int, count: int) -> Extent:
    """Return the bytes of some positions of dense rows with ``slots`` slots.

    The result has whole blocks, so perhaps more bytes than the positions take, but none outside of
    the rows.
    """
    per = form.block_size or 1
    nbytes = slots * form.token_bytes // (per if form.opaque else 1)
    chains = [part.block if form.paged else part.token for part in form.parts]
    stride = chains[0][0].stride
    pitch = slots // per * stride
    if any(len(chain) > 1 or chain[0].stride != stride for chain in chains) or nbytes % pitch:
        return Extent(0, nbytes, 1, nbytes)
    begin = first // per
    end = -(-(first + count) // per)
    if (end - begin) * stride == pitch:
        return Extent(0, nbytes, 1, nbytes)
    return Extent(begin * stride, (end - begin) * stride, nbytes // pitch, pitch)


class _PageableLaunch(StagedLaunch):
    """A prepared copy: the copy of `staged`, with a second hop."""

    kind = _BouncedSlice

    def __init__(self, plan: CopyPlan, strategy: Strategy) -> None:
        # A backend without a kernel needs a call for each layer of a slice, so whole layers are
        # cut.
        super().__init__(plan, strategy, "form" if strategy.half.can.guards else "planes")
        self._buffers = bounce_buffers(strategy.device)

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        rows, host, device_index, host_index = self.ends(move)
        current = torch.accelerator.current_stream(self.device.index)
        work = stream or current
        device_buffers = staging(self.device, work)
        buffers = self._buffers
        slices = self.slices(rows, host, host_index.to_host(), move.count)
        number = len(slices)

        def cross(each: RowSlice, dense: KVView, nth: int, link: torch.Stream) -> None:
            at = nth % BUFFERS
            bounce = each.planes.view(buffers, at)
            src, dst = (dense, bounce) if self.downward else (bounce, dense)
            pieces = cast("_BouncedSlice", each).between(dense, bounce)
            buffers.wait(at)
            buffers.begin(at, link)
            self.link.copy(pieces, src, dst, link)
            buffers.end(at, link)

        passage = Passage(self.downward, device_buffers, work, slices, by_backend, cross)
        with buffers.lock, device_buffers.lock:
            buffers.reserve(max(each.nbytes for each in passage.planes))
            passage.settle(device_index, current)
            with passage.begun():
                if self.downward:  # slices cross while the host copies earlier slices
                    for nth in range(min(BUFFERS, number)):
                        passage.move(nth)
                for nth in range(number):
                    self._hop(slices[nth], nth % BUFFERS)
                    if not self.downward:
                        passage.move(nth)
                    elif nth + BUFFERS < number:
                        passage.move(nth + BUFFERS)

    def cutting(
        self, host: KVView, host_index: Index, idle: bool
    ) -> tuple[tuple[str, ...], bool, Sizes]:
        """Cut as `StagedLaunch.cutting` does, wherever the host's memory is.

        If planes lie outside the positions, the positions are cut, so that the host copies few long
        pieces. Buffers are not of the exact size, so that transfers of any length share few plans.
        """
        return self.stages.dense.outside, False, SIZES

    def _hop(self, each: RowSlice, at: int) -> None:
        """Copy on the host between its rows and a bounce buffer, after nothing crosses there."""
        planes = each.planes
        bounce = planes.view(self._buffers, at)
        count = each.cut.count
        hop = Move(bounce, planes.host, planes.buffer_index, each.host_index, count)
        if not self.downward:
            hop = Move(planes.host, bounce, each.host_index, planes.buffer_index, count)
        self._buffers.wait(at)
        copy_on_host(hop)
