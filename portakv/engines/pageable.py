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
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from portakv.backends.base import Capabilities, Launch
from portakv.backends.strided import HostRows
from portakv.engines.dense import DenseRows
from portakv.engines.engine import PAGEABLE, Engine, finish, read_on
from portakv.engines.link import link_of
from portakv.engines.pieces import Pieces
from portakv.engines.slices import RING, Sizes, TwoStages, cuts, in_either_order, sliced
from portakv.engines.staging import Staging, mark, staging, wait
from portakv.host import pinned
from portakv.plan.plan import CopyPlan
from portakv.registry.prepared import Route
from portakv.runtime import _flight
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
#: `_ring_slots.BUFFERS` slots for them, 72 MiB of pinned memory, and a block more where one is cut.
SIZES = Sizes(whole=8 << 20, smallest=8 << 20, largest=24 << 20)


class Ring(Engine):
    """Dense on the device, across to pinned memory, and on to the rows by the host; or back."""

    name = "ring"

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PAGEABLE, index_on="any")

    def prepare(self, plan: CopyPlan) -> Launch:
        return _RingLaunch(plan, self)


@dataclass(frozen=True, slots=True)
class _Slice:
    """A slice: its planes on both sides, from which position on and how many, where the host's rows
    are named and where they lie in a mirror that holds ``held`` positions."""

    rows: KVView
    host: KVView
    halves: TwoStages
    start: int
    count: int
    theirs: Index
    behind: Index
    held: int

    @property
    def mirror(self) -> DenseRows:
        """How its rows lie while they are dense."""
        return self.halves.mirror


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
        self._slots = bounce_buffers(engine.device)
        self._of_host: dict[tuple[TwoStages, int], HostRows] = {}

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
        with self._slots.lock, room.lock, _flight.inside(stream):
            largest = max(piece.mirror.nbytes(piece.held) for piece in slices)
            room.reserve(largest, RING)
            self._slots.reserve(largest)
            _Passage(self, room, self._slots, work, slices).run(mine)

    def slices(self, rows: KVView, host: KVView, theirs: Index, count: int) -> list[_Slice]:
        """The slices of a transfer, in their order. Where planes lie outside the positions these
        are cut, so that the host copies few long pieces."""
        whole, found = self.halves.whole, list[_Slice]()
        outside = whole.mirror.outside
        for cut in cuts(self._host, outside, count, whole.quantum, self.downward, SIZES):
            mine, part = sliced(rows, cut), sliced(host, cut)
            halves, there = self.halves.of(mine, part, cut), theirs.shifted(cut.start)
            # Not exactly so many: transfers of any length share few plans.
            held = halves.held(cut.count, there.offset, False, SIZES.largest)
            behind = halves.behind(there)
            found.append(_Slice(mine, part, halves, cut.start, cut.count, there, behind, held))
        return found

    def of_host(self, piece: _Slice, slot: KVView) -> HostRows:
        """The host's own half, for slots that hold so many."""
        key = piece.halves, piece.held
        known = self._of_host.get(key)
        if known is None:
            plan = piece.halves.plan
            if self.downward:
                known = HostRows(slot.form, plan.dst, 0, plan.dst_step, plan.unit)
            else:
                known = HostRows(plan.src, slot.form, plan.src_step, 0, plan.unit)
            self._of_host[key] = known
        return known


class _Move(NamedTuple):
    """The device's half of a slice: through which mirror, by what, and its rows there."""

    mirror: KVView
    way: Route
    mine: Index


class _Passage:
    """One transfer under way.

    The caller's stream stands before and behind it, as it does with `staged`.
    """

    def __init__(
        self,
        launch: _RingLaunch,
        room: Staging,
        ring: BounceBuffers,
        work: torch.Stream,
        slices: list[_Slice],
    ) -> None:
        self._launch, self._room, self._ring, self._work = launch, room, ring, work
        self._slices = slices
        # A single slice has nothing to overlap with.
        single = len(slices) == 1
        self._half, self._link = (work, work) if single else (room.half, room.link)
        self._beside = not single
        self._free: list[torch.Event | None] = [None] * RING
        self._moves: list[_Move] = []

    def run(self, mine: Index) -> None:
        """Move every slice."""
        # First: ids that it brings are ordered on the caller's stream, which the others wait for.
        self._moves = self._settled(mine)
        others = [stream for stream in (self._half, self._link) if stream is not self._work]
        for stream in others:
            stream.wait_stream(self._work)
        try:
            (self._down if self._launch.downward else self._up)()
        finally:
            # What was enqueued, also before an interrupt, is part of the caller's stream.
            for stream in others:
                self._work.wait_stream(stream)
            for piece in self._slices:
                piece.rows.record_table(self._work)  # made in a launch, for one stream's kernel

    def _settled(self, mine: Index) -> list[_Move]:
        """The device's half of every slice; on the current stream."""
        moves, index, by = list[_Move](), mine, None
        for nth, piece in enumerate(self._slices):
            mirror = self._room.mirror(nth % RING, piece.mirror, piece.held)
            way, _ = piece.halves.ways(mirror, piece.held)
            if way is not by:
                index, by = read_on(self._work, way.place(mine)), way
            moves.append(_Move(mirror, way, index.shifted(piece.start)))
        return moves

    def _down(self) -> None:
        """To the host, while later slices cross."""
        number = len(self._slices)
        for nth in range(min(BUFFERS, number)):
            self._take(nth)
        for nth in range(number):
            self._copy(nth)
            if nth + BUFFERS < number:
                self._take(nth + BUFFERS)

    def _up(self) -> None:
        """From the host, while earlier slices cross."""
        for nth in range(len(self._slices)):
            self._copy(nth)
            self._bring(nth)

    def _take(self, nth: int) -> None:
        """From the device's rows to a slot."""
        piece, at, (mirror, way, index) = self._slices[nth], nth % RING, self._moves[nth]
        wait(self._half, self._free[at])
        finish(way.launch(piece.rows, mirror, index, piece.behind, piece.count, self._half, None))
        wait(self._link, mark(self._half, self._beside))
        self._cross(nth, mirror)
        self._free[at] = mark(self._link, self._beside)

    def _bring(self, nth: int) -> None:
        """From a slot to the device's rows."""
        piece, at, (mirror, way, index) = self._slices[nth], nth % RING, self._moves[nth]
        wait(self._link, self._free[at])
        self._cross(nth, mirror)
        wait(self._half, mark(self._link, self._beside))
        finish(way.launch(mirror, piece.rows, piece.behind, index, piece.count, self._half, None))
        self._free[at] = mark(self._half, self._beside)

    def _cross(self, nth: int, mirror: KVView) -> None:
        """Between a mirror and a slot, in one copy."""
        piece, at = self._slices[nth], nth % BUFFERS
        slot = self._ring.view(at, piece.mirror, piece.held)
        src, dst = (mirror, slot) if self._launch.downward else (slot, mirror)
        used = extent(mirror.form, piece.held, piece.behind.offset, piece.count)
        self._ring.wait(at)
        self._ring.begin(at, self._link)
        self._launch.crossing.copy(_pieces(src, dst, used), src, dst, self._link)
        self._ring.end(at, self._link)

    def _copy(self, nth: int) -> None:
        """The host's copy between its rows and a slot, once nothing crosses there."""
        piece, at = self._slices[nth], nth % BUFFERS
        slot = self._ring.view(at, piece.mirror, piece.held)
        half = self._launch.of_host(piece, slot)
        self._ring.wait(at)
        if self._launch.downward:
            half.copy(slot, piece.host, piece.behind, piece.theirs, piece.count)
        else:
            half.copy(piece.host, slot, piece.theirs, piece.behind, piece.count)
