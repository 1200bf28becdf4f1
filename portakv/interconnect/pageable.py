# SPDX-License-Identifier: Apache-2.0
"""`pageable`: copies between a device and pageable memory, through pinned buffers that are used in
turns.

A device cannot read or write pageable memory while the host works. So rows are made dense on the
device, as `staged` does. Each slice crosses in one copy to or from a bounce buffer, or in several
if a backend without kernels made it, in the order of the host's rows, or layers first. The caller's
thread copies between the bounce buffers and the rows, by torch's threads, while other buffers
cross. It is busy until the host has read or written all rows: a copy by this strategy blocks.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch

from portakv.backends.base import Launch
from portakv.backends.strided import HOST_OPS, Copies, Planes, calls_on_host, copy_on_host
from portakv.core.link import Cut, cut_copy
from portakv.interconnect.link import Pieces, link_of
from portakv.interconnect.slices import Passage, Sizes, SlicedRows, Stages, by_backend
from portakv.interconnect.staging import BUFFERS, bounce_buffers, staging
from portakv.interconnect.strategy import PAGEABLE, Move, Strategy, StrategyLaunch
from portakv.plan.plan import CopyPlan
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

#: What crosses at once. Each slice costs the caller about 0.1 ms, and during the first slice only
#: the link is busy, or only the host. Of 16, 24 and 32 MiB the middle did best (H200, 16 cores). A
#: device takes `BUFFERS` bounce buffers for them, 72 MiB of pinned memory, and a block more if one
#: is cut.
SIZES = Sizes(whole=8 << 20, smallest=8 << 20, largest=24 << 20)
#: What a backend without kernels makes dense at once. It takes a call for each layer and slice, so
#: its slices are longer, and cross in parts. A stream takes two buffers for them, of what a copy
#: needs: 4,096 tokens of 32 layers in 16 objects take 162 calls, and 546 in slices of 24 MiB.
WITHOUT_KERNELS = Sizes(whole=128 << 20, smallest=128 << 20, largest=128 << 20)

#: The slices that are planned together, before the first of them crosses.
AHEAD = 16


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


class _Part(NamedTuple):
    """What crosses at once: some positions of a copy.

    ``slots``, ``pitch``: of the bounce buffer. ``inside``: where the positions begin in it.
    ``used``: the bytes of the device's buffer that hold them, whole blocks that no other part has.
    """

    cut: Cut
    slots: int
    pitch: int
    inside: Index
    used: Extent


class _Hop(NamedTuple):
    """A part that passes through bounce buffer ``at``; ``calls``: of the host."""

    part: _Part
    at: int
    bounce: KVView
    calls: list[Planes]


class _PageableLaunch(StrategyLaunch):
    """A prepared copy: the copy of `staged`, with a second hop."""

    def __init__(self, plan: CopyPlan, strategy: Strategy) -> None:
        super().__init__(plan, strategy.device)
        stages = self.stages = Stages.tried(plan, strategy.half, strategy.device)
        self._link = link_of(strategy.device)
        self._buffers = bounce_buffers(strategy.device)
        self._in_parts = not strategy.half.can.guards and _crosses_in_parts(stages)

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        rows, host, device_index, host_index = move.ends(self.downward)
        current = torch.accelerator.current_stream(self.device.index)
        work = stream or current
        device_buffers = staging(self.device, work)
        buffers = self._buffers
        sizes = WITHOUT_KERNELS if self._in_parts else SIZES
        slices = SlicedRows(self.stages, rows, host, host_index.to_host(), move.count, sizes)
        planned: Iterator[list[_Hop]] = iter(())
        crossing = deque[_Hop]()  # downward: what the host copies later

        def copy(hop: _Hop) -> None:
            buffers.wait(hop.at)
            copy_on_host(hop.calls)

        def cross(cut: Cut, dense: KVView, nth: int, link: torch.Stream) -> None:
            for hop in next(planned):
                if len(crossing) == BUFFERS:
                    copy(crossing.popleft())
                if self.downward:
                    crossing.append(hop)
                    buffers.wait(hop.at)  # for a copy that was interrupted
                else:
                    copy(hop)
                buffers.begin(hop.at, link)
                src, dst = (dense, hop.bounce) if self.downward else (hop.bounce, dense)
                piece = _between(hop.part, src, dst, self.downward)
                self._link.copy(piece, src, dst, link)
                buffers.end(hop.at, link)

        passage = Passage(device_buffers, work, slices, by_backend, cross)
        with buffers.lock, device_buffers.lock:
            passage.settle(device_index, current)
            form = slices.view(device_buffers, 0).form
            parts = [self._parts(slices, cut, form) for cut in slices.cuts]
            most = max((part.slots for each in parts for part in each), default=0)
            buffers.reserve(self.stages.dense.nbytes(most))
            planned = self._planned(slices, parts)
            passage.issue()
            while crossing:
                copy(crossing.popleft())

    def _planned(self, slices: SlicedRows, parts: list[list[_Part]]) -> Iterator[list[_Hop]]:
        """Yield for each slice how its parts pass through bounce buffers, used in turns.

        Many are planned before the host copies rows: these displace the interpreter from the caches
        of its processor, so that each step takes several times as long (H200, 16 cores).
        """
        copies = dict[int, Copies]()  # by the slots of a bounce buffer
        turns = cycle(range(BUFFERS))
        for first in range(0, len(parts), AHEAD):
            planned = []
            for each in parts[first : first + AHEAD]:
                hops = []
                for part in each:
                    at = next(turns)
                    bounce = self._buffers.view(at, self.stages.dense, part.slots)
                    move = slices.crossing(part.cut, bounce, part.inside)
                    if part.slots not in copies:
                        copies[part.slots] = Copies(move, HOST_OPS)
                    hops.append(_Hop(part, at, bounce, calls_on_host(copies[part.slots], move)))
                planned.append(hops)
            yield from planned

    def _parts(self, slices: SlicedRows, cut: Cut, form: Form) -> list[_Part]:
        """Return the parts in which a slice crosses. ``form``: of its dense rows."""
        per = self.stages.dense.block_size
        offset = slices.inside.offset
        cuts = [Cut(0, offset + cut.count)]
        if self._in_parts:
            _, cuts = cut_copy(array("q", self.stages.rules(SIZES)), offset + cut.count, 0, True)
        parts = []
        for start, number in cuts:
            inside = Index(offset=max(0, offset - start))
            used = extent(form, slices.slots, start, number)
            # One of few numbers, unless a part would else cross by a call for each of its rows.
            slots = slices.slots
            pitch = used.pitch
            if len(cuts) > 1 and used.width * used.height < slices.nbytes:
                slots = -(-number // per) * per
                pitch = used.width
            first = max(offset, start)
            part = Cut(cut.start + first - offset, start + number - first)
            parts.append(_Part(part, slots, pitch, inside, used))
        return parts


def _crosses_in_parts(stages: Stages) -> bool:
    """Return whether some positions of dense rows take less than all of their bytes."""
    slots = 2 * stages.quantum
    nbytes = stages.dense.nbytes(slots)
    memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    used = extent(stages.dense.view(memory, slots).form, slots, 0, stages.quantum)
    return used.width * used.height < nbytes


def _between(part: _Part, src: KVView, dst: KVView, downward: bool) -> Pieces:
    """Return as one piece what crosses between the device's buffer and the beginning of a bounce
    buffer."""
    first, width, height, pitch = part.used
    at = dst.origins[0]
    start = src.origins[0]
    if downward:
        piece = (at, start + first, width, height, part.pitch, pitch)
    else:
        piece = (at + first, start, width, height, pitch, part.pitch)
    return Pieces(*np.array([piece], dtype=np.int64).T)
