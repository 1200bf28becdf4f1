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

from typing import NamedTuple

import numpy as np
import torch

from portakv.backends.base import Launch
from portakv.backends.strided import copy_on_host
from portakv.core.link import Cut
from portakv.interconnect.link import link_of
from portakv.interconnect.passage import Passage, by_backend
from portakv.interconnect.pieces import Pieces
from portakv.interconnect.slices import Sizes, SlicedRows, Stages
from portakv.interconnect.staging import BUFFERS, bounce_buffers, staging
from portakv.interconnect.strategy import PAGEABLE, Move, Strategy, StrategyLaunch
from portakv.plan.plan import CopyPlan
from portakv.view.form import Form
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
    places = PAGEABLE

    def prepare(self, plan: CopyPlan) -> Launch:
        return _PageableLaunch(plan, self)


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


class _PageableLaunch(StrategyLaunch):
    """A prepared copy: the copy of `staged`, with a second hop."""

    def __init__(self, plan: CopyPlan, strategy: Strategy) -> None:
        super().__init__(plan, strategy.device)
        self.stages = Stages.tried(plan, strategy.half, strategy.device)
        self._link = link_of(strategy.device)
        self._buffers = bounce_buffers(strategy.device)

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        rows, host, device_index, host_index = move.ends(self.downward)
        current = torch.accelerator.current_stream(self.device.index)
        work = stream or current
        device_buffers = staging(self.device, work)
        buffers = self._buffers
        slices = SlicedRows(self.stages, rows, host, host_index.to_host(), move.count, SIZES)
        number = len(slices.cuts)

        def cross(cut: Cut, dense: KVView, nth: int, link: torch.Stream) -> None:
            at = nth % BUFFERS
            bounce = slices.view(buffers, at)
            src, dst = (dense, bounce) if self.downward else (bounce, dense)
            buffers.wait(at)
            buffers.begin(at, link)
            self._link.copy(_between(slices, cut, src, dst), src, dst, link)
            buffers.end(at, link)

        passage = Passage(device_buffers, work, slices, by_backend, cross)
        with buffers.lock, device_buffers.lock:
            buffers.reserve(slices.nbytes)
            passage.settle(device_index, current)
            with passage.begun():
                if self.downward:  # slices cross while the host copies earlier slices
                    for nth in range(min(BUFFERS, number)):
                        passage.move(nth)
                for nth in range(number):
                    self._hop(slices, nth)
                    if not self.downward:
                        passage.move(nth)
                    elif nth + BUFFERS < number:
                        passage.move(nth + BUFFERS)

    def _hop(self, slices: SlicedRows, nth: int) -> None:
        """Copy on the host between its rows and a bounce buffer, after nothing crosses there."""
        at = nth % BUFFERS
        cut = slices.cuts[nth]
        hop = slices.crossing(cut, slices.view(self._buffers, at))
        self._buffers.wait(at)
        copy_on_host(hop)


def _between(slices: SlicedRows, cut: Cut, src: KVView, dst: KVView) -> Pieces:
    """Return the rows of a slice that both buffers hold, as one piece."""
    used = extent(src.form, slices.slots, slices.inside.offset, cut.count)
    pitch = used.width if used.height == 1 else used.pitch
    start, target = (each.origins[0] + used.start for each in (src, dst))
    piece = (target, start, used.width, used.height, pitch, pitch)
    return Pieces(*np.array([piece], dtype=np.int64).T)
