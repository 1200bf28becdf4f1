# SPDX-License-Identifier: Apache-2.0
"""`staged`: rows are made dense on the device, and cross the link in few large copies.

The device's stage is a copy between the rows and dense ones, by whichever backend serves the
device; the other is one copy of each slice across the link, on a stream of its own. They overlap:
while a slice crosses, the next one is gathered, or the last one scattered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from portakv.backends.base import Capabilities, Launch
from portakv.host import pinned
from portakv.interconnect.link import link_of
from portakv.interconnect.slices import Sizes, Slice, Stages, cuts, kept_slices
from portakv.interconnect.staging import Order, Staging, mark, staging
from portakv.interconnect.strategy import PINNED, Move, Strategy, StrategyLaunch, finish, read_on
from portakv.plan.plan import CopyPlan
from portakv.registry.prepared import Prepared, bring_table
from portakv.runtime import streams
from portakv.runtime.devices import inside
from portakv.view.index import Index
from portakv.view.view import KVView

#: Bytes of the largest slice, and of the smallest. Of 8, 16 and 32 MiB the largest lose least to
#: the gaps between slices (H200).
LARGEST = 32 << 20
SMALLEST = 4 << 20
#: Bytes up to which a transfer is one slice: a gather of 32 MiB takes 20 us, 3 % of its time on the
#: link, and another slice keeps the host for up to 1 ms if its ids are new (H200).
WHOLE = 32 << 20


class Staged(Strategy):
    """Gather on the device, then a memcpy of each slice; or a memcpy, then scatter."""

    name = "staged"
    reads = "host"

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PINNED, index_on="any")

    def prepare(self, plan: CopyPlan) -> Launch:
        return StagedLaunch(plan, self)


class StagedLaunch(StrategyLaunch):
    """A prepared copy, in slices of its ``kind``."""

    kind: type[Slice] = Slice

    def __init__(self, plan: CopyPlan, strategy: Strategy, order: Order = "form") -> None:
        super().__init__(plan, strategy.device)
        self._detached = strategy.terms.detached
        self._host = plan.dst if self.downward else plan.src
        self.stages = Stages.tried(plan, strategy.half, strategy.device, order)
        self.link = link_of(strategy.device)

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        rows, host, mine, theirs = self.ends(move)
        current = torch.accelerator.current_stream(self.device.index)
        work = stream or current
        room = staging(self.device, work, self._detached)
        slices = self.slices(rows, host, theirs.to_host(), move.count, room.link.query())

        def cross(each: Slice, dense: KVView, _: int, link: torch.Stream) -> None:
            src, dst = (dense, host) if self.downward else (host, dense)
            self.link.copy(each.pieces(dense, host, self.link.fold_below), src, dst, link)

        passage = Passage(self.downward, room, work, slices, cross)
        try:
            with room.lock, passage.begun(mine, current):
                for nth in range(len(slices)):
                    passage.move(nth)
        finally:
            # No allocator knows of the link's copies: the host's memory is held until they ended,
            # also those that were under way when something failed.
            streams.completion(self.device, work, *host.held)

    def slices(
        self, rows: KVView, host: KVView, theirs: Index, count: int, idle: bool = True
    ) -> list[Slice]:
        """The slices of a transfer, kept with its rows for others of its kind; ``idle``: nothing
        crosses the link now."""
        key, outside, exactly, sizes = self.cutting(host, theirs, idle)

        def make() -> list[Slice]:
            quantum = self.stages.quantum
            largest = sizes.largest
            cut = cuts(self._host, outside, count, quantum, self.downward, sizes)
            return [self.kind(self.stages, x, rows, host, theirs, exactly, largest) for x in cut]

        key = count, theirs.offset, theirs.ids_token, *key
        return kept_slices(rows, self).get_or_make(key, make)

    def cutting(
        self, host: KVView, theirs: Index, idle: bool
    ) -> tuple[tuple[object, ...], tuple[str, ...], bool, Sizes]:
        """How a transfer is cut: what its slices depend on, beside positions and ids; the axes
        ``outside`` of positions that may be cut; whether nothing may lie between planes; sizes."""
        # If the link is busy, nothing waits for the first slice: all are as large as they can be,
        # and a model that leaves little room is asked for it least often.
        sizes = Sizes(WHOLE, SMALLEST if idle else LARGEST, LARGEST)
        seams = pinned.seams()  # which memory of the host was pinned in parts
        if theirs.ids is None and len(host.origins) == 1 and not seams:
            # In other memory of the host's form a slice lies as far behind its address.
            outside = self.stages.dense.outside
            return (idle,), outside, bool(outside), sizes
        # Ids scatter the rows of a plane anyway, and several allocations the planes.
        return (idle, seams, host.origins), (), False, sizes


#: Enqueues what has to cross for a slice, by its buffer and its number, on the link's stream.
Cross = Callable[[Slice, KVView, int, torch.Stream], None]


class Passage:
    """One transfer under way: on which streams, and through which buffers of the device.

    It begins behind the caller's stream ``work``, which waits for its end. In between the device's
    stage has a stream with priority, since a slice that waits for a model's kernels would leave the
    link idle; a single slice, which overlaps with nothing, stays on ``work``. The caller holds the
    lock of ``room``.
    """

    def __init__(
        self,
        downward: bool,
        room: Staging,
        work: torch.Stream,
        slices: Sequence[Slice],
        cross: Cross,
    ) -> None:
        self._downward = downward
        self._room = room
        self._work = work
        self._slices = slices
        self._cross = cross
        alone = len(slices) == 1 and not room.detached
        self._half, self._link = (work, work) if alone else (room.half, room.link)
        # For each slice a buffer, its number, the device's stage, and the index of its rows there.
        self._staged: list[tuple[KVView, int, Prepared, Index]] = []

    @contextmanager
    def begun(self, mine: Index, current: torch.Stream) -> Iterator[None]:
        """Inside, `move` issues slices of the device's rows under an index; at the end the caller's
        stream waits for them."""
        room = self._room
        work = self._work
        # A detached transfer begins behind the current stream, not behind the transfer before it:
        # each buffer is free at an event of its own. Ids that are brought for one call are ordered
        # on the current stream, whichever stream reads them.
        first = current if room.detached else work
        with inside(room.half if room.detached else work):
            room.reserve(max(each.nbytes for each in self._slices))
        turns = room.turns(len(self._slices))
        with inside(first):
            self._settle(mine, turns)
        others = [each for each in (self._half, self._link) if each is not work]
        for each in others:
            each.wait_stream(first)
        try:
            yield
        finally:
            # What was enqueued, also before an interrupt, is part of the caller's stream.
            for each in others:
                work.wait_stream(each)
            for piece, (dense, *_) in zip(self._slices, self._staged, strict=True):
                piece.rows.record_table(work)
                dense.record_table(work)

    def _settle(self, mine: Index, turns: Sequence[int]) -> None:
        """Settle which buffer each slice goes through, and bring the ids of the device's rows."""
        index = mine
        by = None
        for each, at in zip(self._slices, turns, strict=True):
            dense = self._room.view(at, each.dense, each.held)
            prepared = each.prepared(dense)
            sides = (each.rows, dense) if self._downward else (dense, each.rows)
            for view, read in zip(sides, prepared.tables, strict=True):
                if read:
                    bring_table(view, self._work.device)
            if prepared is not by:
                index = read_on(self._work, prepared.place(mine))
                by = prepared
            self._staged.append((dense, at, prepared, index.shifted(each.cut.start)))

    def move(self, nth: int) -> None:
        """Issue both stages of a slice, in order, behind its buffer's last use."""
        each = self._slices[nth]
        (dense, at, prepared, mine) = self._staged[nth]
        half = self._half
        link = self._link
        room = self._room
        first, last = (half, link) if self._downward else (link, half)
        free = room.free[at]
        count = each.cut.count
        if free is not None:
            first.wait_event(free)
        if self._downward:
            finish(prepared.launch(each.rows, dense, mine, each.behind, count, half, None))
        else:
            self._cross(each, dense, nth, link)
        if half is not link:
            last.wait_event(mark(first))
        if self._downward:
            self._cross(each, dense, nth, link)
        else:
            finish(prepared.launch(dense, each.rows, each.behind, mine, count, half, None))
        # The next transfer waits for the stream of this one, unless it is detached.
        again = room.detached or nth + room.buffers < len(self._slices)
        room.free[at] = mark(last) if again else None
