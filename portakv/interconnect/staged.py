# SPDX-License-Identifier: Apache-2.0
"""`staged`: makes rows dense on the device, and moves them across the link in few large copies.

The device's stage is a copy between the rows and dense rows, by the backend that serves the device.
The link's stage copies a slice in as few pieces as the host's rows allow. A transfer above `WHOLE`
bytes has several slices, and its stages overlap on two streams: while a slice crosses, the next
slice is gathered, or the last one scattered. A smaller one is one slice on the caller's stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeAlias

import torch

from portakv.backends.base import Capabilities, Launch
from portakv.host import pinned
from portakv.interconnect.link import link_of
from portakv.interconnect.slices import Ready, RowSlice, Sizes, Slice, Stages, cached_slices, cuts
from portakv.interconnect.staging import Order, Staging, mark, staging
from portakv.interconnect.strategy import PINNED, Move, Strategy, StrategyLaunch, read_on
from portakv.plan.plan import CopyPlan
from portakv.registry.prepared import Prepared, bring_table
from portakv.runtime import streams
from portakv.runtime.devices import inside
from portakv.view.index import Index
from portakv.view.view import KVView

#: Bytes of the largest slice, and of the smallest. Of 8, 16 and 32 MiB the largest loses least to
#: the gaps between slices (H200).
LARGEST = 32 << 20
SMALLEST = 4 << 20
#: Bytes up to which a transfer is one slice. A gather of 32 MiB takes 20 us, 3 % of its time on the
#: link, and another slice occupies the host for up to 1 ms if its ids are new (H200).
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
            src, dst = (dense, host) if self.downward else (host, dense)
            self.link.copy(each.pieces(dense, host, self.link.fold_below), src, dst, link)

        passage = Passage(self.downward, buffers, work, slices, by_backend, cross)
        try:
            with buffers.lock, passage.begun(device_index, current):
                for nth in range(len(slices)):
                    passage.move(nth)
        finally:
            # No allocator knows of the link's copies. The host's memory is retained until they end,
            # also if something failed while they were in progress.
            streams.completion(self.device, work, *host.retained)

    def slices(
        self, rows: KVView, host: KVView, host_index: Index, count: int, idle: bool = True
    ) -> list[RowSlice]:
        """Return the slices of a transfer, cached with its rows for other transfers of its kind.

        ``idle``: no earlier slice of this staging is crossing the link.
        """
        key, outside, exact, sizes = self.cutting(host, host_index, idle)

        def make() -> list[RowSlice]:
            quantum = self.stages.quantum
            largest = sizes.largest
            cut = cuts(self._host, outside, count, quantum, self.downward, sizes)
            return [self.kind(self.stages, x, rows, host, host_index, exact, largest) for x in cut]

        key = count, host_index.offset, host_index.ids_token, *key
        return cached_slices(rows, self.stages).get_or_make(key, make)

    def cutting(
        self, host: KVView, host_index: Index, idle: bool
    ) -> tuple[tuple[object, ...], tuple[str, ...], bool, Sizes]:
        """Return how a transfer is cut.

        The result has the values that its slices depend on, besides positions and ids; the axes
        ``outside`` of positions that may be cut; whether nothing may lie between planes; and the
        sizes.
        """
        # If the link is busy, nothing waits for the first slice. All slices are then as large as
        # possible, and wait least often for a model that leaves little of the device free.
        sizes = Sizes(WHOLE, SMALLEST if idle else LARGEST, LARGEST)
        boundaries = pinned.boundaries()  # where memory of the host was pinned in parts
        if host_index.ids is None and len(host.origins) == 1 and not boundaries:
            # In other memory of the host's form a slice lies at the same distance from its address.
            outside = self.stages.dense.outside
            return (idle,), outside, bool(outside), sizes
        # Ids scatter the rows of a plane anyway, and several allocations scatter the planes.
        return (idle, boundaries, host.origins), (), False, sizes


#: Enqueues the copy of a slice across the link, by its buffer and its number, on the link's stream.
Cross: TypeAlias = Callable[[Slice[Ready], KVView, int, torch.Stream], None]
#: Enqueues the device's stage of a slice, by the slice's number, on a stream.
Gather: TypeAlias = Callable[[int, Ready, Move, torch.Stream], None]


def by_backend(_: int, ready: Prepared, move: Move, stream: torch.Stream) -> None:
    """Enqueue the device's stage of a slice of rows."""
    pending = ready.launch(*move, stream, None)
    if pending is not None:
        pending.wait()


class Passage(Generic[Ready]):
    """One transfer in progress: its streams, and its buffers of the device.

    It begins after the caller's stream ``work``, which waits for its end. In between, the device's
    stage has a stream with priority, since a slice that waits for a model's kernels leaves the link
    idle. A single slice overlaps with nothing and stays on ``work``. The caller holds the lock of
    ``buffers``.
    """

    def __init__(
        self,
        downward: bool,
        buffers: Staging,
        work: torch.Stream,
        slices: Sequence[Slice[Ready]],
        gather: Gather[Ready],
        cross: Cross[Ready],
    ) -> None:
        self._downward = downward
        self._buffers = buffers
        self._work = work
        self._slices = slices
        self._gather = gather
        self._cross = cross
        alone = len(slices) == 1 and not buffers.detached
        self._half, self._link = (work, work) if alone else (buffers.half, buffers.link)
        # For each slice its buffer, the buffer's number, the device's stage, and the index of its
        # rows.
        self._staged: list[tuple[KVView, int, Ready, Index]] = []

    @contextmanager
    def begun(self, device_index: Index, current: torch.Stream) -> Iterator[None]:
        """Issue slices by `move` inside the context, under the index of the device's rows. At its
        end the caller's stream waits for them. ``current``: the device's current stream."""
        buffers = self._buffers
        work = self._work
        # A detached transfer begins after the current stream, not after the transfer before it:
        # each buffer has an event for its last use. Ids that are brought for one call are ordered
        # on the current stream, whichever stream reads them.
        first = current if buffers.detached else work
        where = None if first is current else first
        with inside(buffers.half if buffers.detached else where):
            buffers.reserve(max([each.nbytes for each in self._slices]))
        turns = buffers.turns(len(self._slices))
        with inside(where):
            self._settle(device_index, turns)
        others = [each for each in (self._half, self._link) if each is not work]
        for each in others:
            each.wait_stream(first)
        complete = False
        try:
            yield
            complete = True
        finally:
            # Enqueued work is part of the caller's stream, also after an interrupt.
            for each in others:
                work.wait_stream(each)
            if buffers.detached and not complete:
                # The slice that failed may still use its buffer.
                end = mark(work)
                for _, at, *_ in self._staged:
                    buffers.free[at] = end
            # Slices share views: each once.
            rows = [each.rows for each in self._slices]
            for view in dict.fromkeys([*rows, *[dense for dense, *_ in self._staged]]):
                view.record_table(work)

    def _settle(self, device_index: Index, turns: Sequence[int]) -> None:
        """Assign a buffer to each slice, and bring the ids of the device's rows."""
        index = device_index
        last_stage = None
        for each, at in zip(self._slices, turns, strict=True):
            dense = self._buffers.view(at, each.dense, each.slots)
            prepared = each.prepared(dense)
            sides = (each.rows, dense) if self._downward else (dense, each.rows)
            for view, read in zip(sides, prepared.tables, strict=True):
                if read:
                    bring_table(view, self._work.device)
            if prepared is not last_stage:
                index = read_on(self._work, prepared.place(device_index))
                last_stage = prepared
            self._staged.append((dense, at, prepared, index.shifted(each.cut.start)))

    def move(self, nth: int) -> None:
        """Issue both stages of a slice, in order, after its buffer's last use."""
        each = self._slices[nth]
        (dense, at, prepared, device_index) = self._staged[nth]
        half = self._half
        link = self._link
        buffers = self._buffers
        first, last = (half, link) if self._downward else (link, half)
        free = buffers.free[at]
        count = each.cut.count
        if free is not None:
            first.wait_event(free)
        if self._downward:
            move = Move(each.rows, dense, device_index, each.buffer_index, count)
            self._gather(nth, prepared, move, half)
        else:
            self._cross(each, dense, nth, link)
        if half is not link:
            last.wait_event(mark(first))
        if self._downward:
            self._cross(each, dense, nth, link)
        else:
            move = Move(dense, each.rows, each.buffer_index, device_index, count)
            self._gather(nth, prepared, move, half)
        # The next transfer waits for the stream of this transfer, unless it is detached.
        again = buffers.detached or nth + buffers.buffers < len(self._slices)
        buffers.free[at] = mark(last) if again else None
