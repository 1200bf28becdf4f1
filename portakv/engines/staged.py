# SPDX-License-Identifier: Apache-2.0
"""`staged`: rows are made dense on the device, and cross the link in few large copies.

The device's stage is a copy between the rows and dense ones, by whichever backend serves the
device; the other is one copy of each slice across the link, on a stream of its own. They overlap:
while a slice crosses, the next one is gathered, or the last one scattered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from portakv.backends.base import Capabilities, Launch
from portakv.engines.engine import PINNED, Engine, EngineLaunch, Move, finish, read_on
from portakv.engines.link import link_of
from portakv.engines.slices import Cut, Sizes, Slice, StagesByCut, cuts, kept_slices, staged_sizes
from portakv.engines.staging import DETACHED_RING, RING, Staging, mark, staging
from portakv.host import pinned
from portakv.plan.plan import CopyPlan
from portakv.registry.prepared import Prepared
from portakv.runtime import streams
from portakv.runtime.devices import inside
from portakv.view.index import Index

if TYPE_CHECKING:
    from portakv.view.view import KVView


class Staged(Engine):
    """Gather on the device, then a memcpy of each slice; or a memcpy, then scatter."""

    name = "staged"

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PINNED, index_on="any")

    def prepare(self, plan: CopyPlan) -> Launch:
        return StagedLaunch(plan, self)


class StagedLaunch(EngineLaunch):
    """A prepared copy."""

    def __init__(self, plan: CopyPlan, engine: Engine) -> None:
        super().__init__(plan, engine.device)
        self._detached = engine.terms.detached
        self._host = plan.dst if self.downward else plan.src
        self.stages = StagesByCut(plan, engine.half, engine.device)
        self.link = link_of(engine.device)

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        rows, host, mine, theirs = self.ends(move)
        current = torch.accelerator.current_stream(self.device.index)
        work = stream or current
        room = staging(self.device, work, self._detached)
        slices = self.slices(rows, host, theirs.to_host(), move.count, room.link.query())

        def cross(each: Slice, dense: KVView, _: int) -> None:
            src, dst = (dense, host) if self.downward else (host, dense)
            self.link.copy(each.pieces(dense, host, self.link.fold_below), src, dst, passage.link)

        passage = Passage(self.downward, room, work, slices, cross)
        try:
            with room.lock, passage.begun(mine, current):
                for nth in range(len(slices)):
                    passage.move(nth)
        finally:
            # No allocator knows of the link's copies: the host's memory is held until they ended,
            # also those that were under way when something failed.
            streams.completion(self.device, work, *host.owners)

    def slices(
        self, rows: KVView, host: KVView, theirs: Index, count: int, idle: bool = True
    ) -> list[Slice]:
        """The slices of a transfer, kept for others of its kind; ``idle``: the link is."""
        outside: tuple[str, ...] = ()
        seams = pinned.seams()  # which memory of the host was pinned in parts
        key: tuple[object, ...] = count, theirs.offset, idle, seams
        if theirs.ids is not None:
            key += theirs.ids_token, host.origins
        elif len(host.origins) > 1 or seams:
            key += (host.origins,)
        else:  # in other memory of the host's form a slice lies as far behind its address
            outside = self.stages.whole.dense.outside
        # Ids scatter the rows of a plane anyway, and several allocations the planes.
        sizes = staged_sizes(idle)
        return kept_slices(self, rows, key, lambda: [
            Slice(self.stages, cut, rows, host, theirs, bool(outside), sizes.largest)
            for cut in self._cuts(outside, count, sizes)
        ])  # fmt: skip

    def _cuts(self, outside: tuple[str, ...], count: int, sizes: Sizes) -> list[Cut]:
        return cuts(self._host, outside, count, self.stages.whole.quantum, self.downward, sizes)


class Passage:
    """One transfer under way: on which streams, and through which buffers of the device.

    The caller's stream stands before and behind it. In between the device's stage has a stream with
    priority, since a slice that waits for a model's kernels would leave the link idle; a single
    slice, which has nothing to overlap with, stays on the caller's stream.

    Args:
        room: the buffers, whose lock the caller holds.
        work: the stream that the transfer is ordered on.
        cross: enqueues what has to cross for a slice, with its buffer and its number, on ``link``.
    """

    def __init__(
        self,
        downward: bool,
        room: Staging,
        work: torch.Stream,
        slices: Sequence[Slice],
        cross: Callable[[Slice, KVView, int], None],
    ) -> None:
        self._downward, self._room, self._work = downward, room, work
        self._slices, self._cross = slices, cross
        alone = len(slices) == 1 and not room.detached
        self._half, self.link = (work, work) if alone else (room.half, room.link)
        # Of each slice its buffer and the number of that, the device's stage, its device's rows.
        self._staged: list[tuple[KVView, int, Prepared, Index]] = []
        self._free: list[torch.Event | None] = []
        self._last = 0  # so many last slices leave no mark that their buffers are free

    @contextmanager
    def begun(self, mine: Index, current: torch.Stream) -> Iterator[None]:
        """Inside, slices can be moved, of the device's rows under an index; the stream of the
        transfer then waits for them."""
        room, work, number = self._room, self._work, len(self._slices)
        # Detached: behind the current stream alone, and not behind the transfer before: buffers are
        # free one by one. Ids that are brought for one call are ordered on the current stream,
        # whatever reads them.
        first = current if room.detached else work
        buffers = DETACHED_RING if room.detached else RING
        with inside(room.half if room.detached else work):
            room.reserve(max(each.nbytes for each in self._slices), buffers)
        if room.detached:
            turns, self._free = room.turns(number, buffers), room.free
        else:
            turns, self._free = [nth % buffers for nth in range(number)], [None] * buffers
            self._last = min(number, buffers)
        with inside(first):
            self._settle(mine, turns)
        others = [each for each in (self._half, self.link) if each is not work]
        for each in others:
            each.wait_stream(first)
        try:
            yield
        finally:
            # What was enqueued, also before an interrupt, is part of the caller's stream.
            for each in others:
                work.wait_stream(each)
            for piece, (dense, *_) in zip(self._slices, self._staged, strict=True):
                piece.rows.record_table(work)  # made in a launch, for one stream's kernel
                dense.record_table(work)

    def _settle(self, mine: Index, turns: Sequence[int]) -> None:
        """Settle which buffer each slice goes through, and bring the ids of the device's rows."""
        index, by = mine, None
        for each, at in zip(self._slices, turns, strict=True):
            dense = self._room.view(at, each.dense, each.held)
            prepared = each.prepared(dense)
            if prepared is not by:
                index, by = read_on(self._work, prepared.place(mine)), prepared
            self._staged.append((dense, at, prepared, index.shifted(each.cut.start)))

    def move(self, nth: int) -> None:
        """Issue both stages of a slice, in order, behind its buffer's last use."""
        each, (dense, at, prepared, mine) = self._slices[nth], self._staged[nth]
        half, link = self._half, self.link
        beside, free = half is not link, self._free[at]
        if self._downward:
            if free is not None:
                half.wait_event(free)
            finish(prepared.launch(each.rows, dense, mine, each.behind, each.cut.count, half, None))
            if beside:
                link.wait_event(mark(half))
            self._cross(each, dense, nth)
            last = link
        else:
            if free is not None:
                link.wait_event(free)
            self._cross(each, dense, nth)
            if beside:
                half.wait_event(mark(link))
            finish(prepared.launch(dense, each.rows, each.behind, mine, each.cut.count, half, None))
            last = half
        again = beside and nth + 1 + self._last <= len(self._slices)
        self._free[at] = mark(last) if again else None
