# SPDX-License-Identifier: Apache-2.0
"""`ring`: between a device and pageable memory, through pinned memory that is used in turns.

A device cannot read or write pageable memory beside the host. So rows are made dense on the device,
as `staged` does, and cross in one copy each slice to or from pinned memory, where they lie in the
order of the host's rows; and the caller copies between that and the rows, by torch's threads, while
other slices cross. It is busy until the host has read or written all: a copy through this engine
blocks.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from portakv.backends.base import Capabilities, Launch
from portakv.backends.strided import HostRows
from portakv.engines.dense import DenseRows
from portakv.engines.engine import PAGEABLE, Engine
from portakv.engines.link import link_of
from portakv.engines.pieces import Pieces
from portakv.engines.slices import RING, Cut, Sizes, TwoStages, cuts, in_either_order
from portakv.engines.staged import Passage, Slice
from portakv.engines.staging import Staging, staging
from portakv.host import pinned
from portakv.plan.plan import CopyPlan
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import inside
from portakv.view.index import Index

if TYPE_CHECKING:
    from portakv.view.form import Form
    from portakv.view.view import KVView

#: Bounce buffers of a device: while the host copies one, others cross. Of 2, 3 and 4 of 4 and 16
#: MiB, plain copies did best through 3 of 16 on an H200.
BUFFERS = 3
_KEPT = 64  # views of slots that are remembered


class BounceBuffers:
    """The slots of one device. One transfer at a time has them, under ``lock``.

    What crosses is remembered with its slot, not with the transfer: a transfer may end before its
    last slices have crossed, or be interrupted, and the next one waits for the slot it takes.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._memory: list[torch.Tensor] = []
        self._views: dict[tuple[int, DenseRows, int], KVView] = {}
        self._crossing: list[torch.Stream | torch.Event | None] = [None] * BUFFERS

    @property
    def nbytes(self) -> int:
        """Bytes of pinned memory that are held."""
        return sum(memory.numel() for memory in self._memory)

    def reserve(self, nbytes: int) -> None:
        """Have slots of at least so many bytes each."""
        if self._memory and self._memory[0].numel() >= nbytes:
            return
        for at in range(BUFFERS):
            self.wait(at)
        self._views.clear()
        self._memory = []
        self._memory = [pinned.empty(nbytes, torch.uint8) for _ in range(BUFFERS)]

    def view(self, at: int, mirror: DenseRows, held: int) -> KVView:
        """One of the slots, as rows of ``held`` slots of a mirror."""
        key = at, mirror, held
        known = self._views.get(key)
        if known is None:
            if len(self._views) >= _KEPT:
                self._views.clear()
            known = self._views[key] = mirror.view(self._memory[at], held)
        return known

    def begin(self, at: int, stream: torch.Stream) -> None:
        """Something is about to cross on a stream: until `end`, the slot waits for all of it."""
        self._crossing[at] = stream

    def end(self, at: int, stream: torch.Stream) -> None:
        """It has been enqueued."""
        event = torch.Event(stream.device)
        event.record(stream)
        self._crossing[at] = event

    def wait(self, at: int) -> None:
        """Block the host until nothing crosses from or to a slot."""
        crossing = self._crossing[at]
        if crossing is not None:
            crossing.synchronize()
            self._crossing[at] = None


@cache
def bounce_buffers(device: torch.device) -> BounceBuffers:
    """The slots of a device."""
    return BounceBuffers()


#: Each slice costs the caller about 0.1 ms, and in the first one only the link is busy, or only the
#: host. Of 16, 24 and 32 MiB the middle did best (H200, 16 cores); a device takes
#: `BUFFERS` bounce buffers for them, 72 MiB of pinned memory, and a block more where one is cut.
SIZES = Sizes(whole=8 << 20, smallest=8 << 20, largest=24 << 20)


class Ring(Engine):
    """Dense on the device, across to pinned memory, and on to the rows by the host; or back."""

    name = "ring"

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PAGEABLE, index_on="any")

    def prepare(self, plan: CopyPlan) -> Launch:
        return _RingLaunch(plan, self)


class _Slice(Slice):
    """A slice with its rows on the host.

    Args:
        launch: the prepared copy.
        cut: which planes and positions.
        rows, host: views of all planes.
        theirs: the index of the host's rows, with ids on the host.
    """

    def __init__(
        self, launch: _RingLaunch, cut: Cut, rows: KVView, host: KVView, theirs: Index
    ) -> None:
        mine, self.host = rows.planes(cut.layers, cut.kv), host.planes(cut.layers, cut.kv)
        # Not exactly so many positions: transfers of any length share few plans.
        stages = launch.halves.of(mine, self.host, cut)
        super().__init__(stages, mine, cut, theirs, False, SIZES.largest)


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


def _pieces(src: KVView, dst: KVView, used: Extent) -> Pieces:
    """The same bytes of two views of dense rows, as what crosses between them."""
    pitch = used.width if used.height == 1 else used.pitch
    numbers = dst.origins[0] + used.start, src.origins[0] + used.start, used.width, used.height
    return Pieces(*np.array([[*numbers, pitch, pitch]], dtype=np.int64).T)


class _RingLaunch:
    """A prepared copy."""

    def __init__(self, plan: CopyPlan, engine: Engine) -> None:
        self.device, self.downward = engine.device, plan.src.place == "device"
        self._host = plan.dst if self.downward else plan.src
        self.halves = in_either_order(plan, engine.half, engine.device)
        self.crossing = link_of(engine.device)
        self.buffers = bounce_buffers(engine.device)
        self._of_host: Bounded[tuple[TwoStages, int], HostRows] = Bounded("second hops", 64)

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> None:
        if not count:
            return
        host, rows = (dst, src) if self.downward else (src, dst)
        theirs, mine = (dst_index, src_index) if self.downward else (src_index, dst_index)
        work = stream or torch.accelerator.current_stream(self.device.index)
        room = staging(self.device, work)
        slices = self.slices(rows, host, theirs.to_host(), count)
        with self.buffers.lock, room.lock, inside(stream):
            _Hops(self, room, work, slices).run(mine)

    def slices(self, rows: KVView, host: KVView, theirs: Index, count: int) -> list[_Slice]:
        """The slices of a transfer, in their order. If planes lie outside the positions these are
        cut, so that the host copies few long pieces."""
        whole = self.halves.whole
        found = cuts(self._host, whole.mirror.outside, count, whole.quantum, self.downward, SIZES)
        return [_Slice(self, cut, rows, host, theirs) for cut in found]

    def of_host(self, piece: _Slice, slot: KVView) -> HostRows:
        """The copy between the host's rows and a bounce buffer that holds so many."""
        key = piece.stages, piece.held
        known = self._of_host.get(key)
        if known is None:
            plan = piece.stages.plan
            if self.downward:
                known = HostRows(slot.form, plan.dst, 0, plan.dst_step, plan.unit)
            else:
                known = HostRows(plan.src, slot.form, plan.src_step, 0, plan.unit)
            self._of_host[key] = known
        return known


class _Hops:
    """One transfer under way: its passage through the device's buffers, and the second hop."""

    def __init__(
        self, launch: _RingLaunch, room: Staging, work: torch.Stream, slices: list[_Slice]
    ) -> None:
        self._launch, self._slices, self._buffers = launch, slices, launch.buffers
        self._work = work
        self._passage = Passage(launch.downward, room, work, slices, self._cross)

    def run(self, mine: Index) -> None:
        """Move every slice."""
        passage, number = self._passage, len(self._slices)
        passage.alone()
        passage.reserve(self._work, RING)
        self._buffers.reserve(max(piece.nbytes for piece in self._slices))
        passage.settle(mine, self._work, [nth % RING for nth in range(number)])
        with passage.behind(self._work):
            if self._launch.downward:  # slices cross while the host copies those before them
                for nth in range(min(BUFFERS, number)):
                    passage.move(nth)
            for nth in range(number):
                self._copy(nth)
                if not self._launch.downward:
                    passage.move(nth)
                elif nth + BUFFERS < number:
                    passage.move(nth + BUFFERS)

    def _cross(self, piece: _Slice, mirror: KVView, nth: int) -> None:
        """Between the device's buffer and a bounce buffer, in one copy."""
        at, link = nth % BUFFERS, self._passage.link
        slot = self._buffers.view(at, piece.mirror, piece.held)
        src, dst = (mirror, slot) if self._launch.downward else (slot, mirror)
        used = extent(mirror.form, piece.held, piece.behind.offset, piece.count)
        self._buffers.wait(at)
        self._buffers.begin(at, link)
        self._launch.crossing.copy(_pieces(src, dst, used), src, dst, link)
        self._buffers.end(at, link)

    def _copy(self, nth: int) -> None:
        """The host's copy between its rows and a bounce buffer, once nothing crosses there."""
        piece, at = self._slices[nth], nth % BUFFERS
        slot = self._buffers.view(at, piece.mirror, piece.held)
        hop = self._launch.of_host(piece, slot)
        self._buffers.wait(at)
        if self._launch.downward:
            hop.copy(slot, piece.host, piece.behind, piece.theirs, piece.count)
        else:
            hop.copy(piece.host, slot, piece.theirs, piece.behind, piece.count)
