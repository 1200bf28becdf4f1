# SPDX-License-Identifier: Apache-2.0
"""A transfer in slices that is in progress: its streams, its buffers, and the schedule by torch.

The core has the schedule. For NVIDIA devices it also executes it, see `staged`; here the torch of
any device does, with any backend for the device's stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, cast

import torch

from portakv.core.link import RECORD, STAGED, WAIT, Cut, SliceOrder, Step, schedule_of
from portakv.interconnect.slices import SlicedRows
from portakv.interconnect.staging import Staging
from portakv.interconnect.strategy import Move, finish, read_on
from portakv.registry.prepared import Prepared, bring_table
from portakv.runtime.devices import inside
from portakv.view.index import Index
from portakv.view.view import KVView

#: Enqueues the copy of a slice across the link, by its buffer and its number, on the link's stream.
Cross: TypeAlias = Callable[[Cut, KVView, int, torch.Stream], None]
#: Enqueues the device's stage of a slice, by the slice's number, on a stream.
Gather: TypeAlias = Callable[[int, Prepared, Move, torch.Stream], None]


def by_backend(_: int, ready: Prepared, move: Move, stream: torch.Stream) -> None:
    """Enqueue the device's stage of a slice of rows."""
    finish(ready.launch(*move, stream, None))


def place_rows(rows: KVView, index: Index, ready: Prepared, by_source: bool) -> Index:
    """Bring what a device's stage reads of its rows, ordered on the current stream.

    Args:
        ready: the stage; ``by_source``: it reads the rows, and else writes them.

    Returns:
        The index as the stage reads it.
    """
    if ready.tables[0 if by_source else 1]:
        bring_table(rows, ready.choice.backend.device)
    return ready.place(index)


class Passage:
    """One transfer in progress: its streams, and its buffers of the device.

    It begins after the caller's stream ``work``, which waits for its end. In between, the device's
    stage has a stream with priority, since a slice that waits for a model's kernels leaves the link
    idle. A single slice overlaps with nothing and stays on ``work``. The caller holds the lock of
    ``buffers``.
    """

    def __init__(
        self,
        buffers: Staging,
        work: torch.Stream,
        slices: SlicedRows,
        gather: Gather,
        cross: Cross,
    ) -> None:
        self.downward = slices.stages.downward
        self.buffers = buffers
        self.slices = slices
        # By the schedule's numbers: ``work``, the device's stage, the link, and the stream whose
        # present work comes first.
        self._streams = [work, buffers.half, buffers.link, work]
        self._work = work
        self._gather = gather
        self._cross = cross
        self._dense: dict[int, KVView] = {}  # buffers as rows, by number

    def settle(self, device_index: Index, current: torch.Stream) -> None:
        """Reserve buffers, find both stages, and bring what they read to the device.

        Args:
            device_index: of the device's rows.
            current: the device's current stream.
        """
        slices = self.slices
        first = self._streams[3] = first_of(self.buffers, self._work, current)
        with inside(None if first is current else first):
            self.buffers.reserve(slices.nbytes)
            slices.settle(self.buffers)
            index = place_rows(slices.rows, device_index, slices.ready, self.downward)
            self._placed = read_on(self._work, index)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Issue slices by `move` inside the context. At its end the caller's stream waits for
        them."""
        order = self.buffers.order(len(self.slices.cuts), self.downward)
        schedule = self._schedule = schedule_of(order)
        self._order: SliceOrder = order
        complete = False
        try:
            self._execute(schedule.before)
            yield
            self._execute(schedule.after)
            complete = True
        finally:
            if not complete:
                # Enqueued work is part of the caller's stream, also after an interrupt.
                self._execute(schedule.failed)
            self.slices.rows.record_table(self._work)

    def issue(self) -> None:
        """Issue all slices, after `settle`."""
        with self.begun():
            for nth in range(len(self.slices.cuts)):
                self.move(nth)

    def move(self, nth: int) -> None:
        """Issue both stages of a slice, in order, after its buffer's last use."""
        order = self._order
        at = (order.first + nth) % order.buffers
        dense = self._dense.get(at)
        if dense is None:
            dense = self._dense[at] = self.slices.view(self.buffers, at)
        self._execute(self._schedule.slices[nth], dense)

    def _execute(self, steps: Sequence[Step], dense: KVView | None = None) -> None:
        """Execute steps of the schedule, those of a slice with its buffer."""
        events = self.buffers.events
        for kind, which, number in steps:
            stream = self._streams[which]
            if kind == WAIT:
                event = events[number]
                if event is not None:
                    stream.wait_event(event)
            elif kind == RECORD:
                self.buffers.record(number, stream)
            elif kind == STAGED:
                move = self._staged(self.slices.cuts[number], cast("KVView", dense))
                self._gather(number, self.slices.ready, move, stream)
            else:
                self._cross(self.slices.cuts[number], cast("KVView", dense), number, stream)

    def _staged(self, cut: Cut, dense: KVView) -> Move:
        """Return what the device's stage of a slice copies."""
        slices = self.slices
        index = self._placed.shifted(cut.start)
        if self.downward:
            return Move(slices.rows, dense, index, slices.inside, cut.count)
        return Move(dense, slices.rows, slices.inside, index, cut.count)


def first_of(buffers: Staging, work: torch.Stream, current: torch.Stream) -> torch.Stream:
    """Return the stream whose present work comes before a transfer on ``work``.

    A detached transfer begins after the current stream, not after the transfer before it: each
    buffer has an event for its last use. Ids that are brought for one call are ordered on the
    current stream, whichever stream reads them.
    """
    return current if buffers.detached else work
