# SPDX-License-Identifier: Apache-2.0
"""A transfer in slices that is in progress: its streams, its buffers, and the schedule by torch.

The core has the schedule. `submission.submit` has the core execute it by CUDA's driver; here the
torch of any device does, with any backend for the device's stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from portakv.backends.rows_launch import RowsLaunch
from portakv.core.link import RECORD, STAGED, WAIT, SliceOrder, Step, schedule_of
from portakv.host import small
from portakv.interconnect.slices import Slice
from portakv.interconnect.staging import Staging
from portakv.interconnect.strategy import Move, read_on
from portakv.registry.prepared import Prepared, bring_table
from portakv.runtime.devices import inside
from portakv.runtime.pinned_ids import PinnedIds
from portakv.runtime.transfer import acquire_after_ends
from portakv.view.index import Index
from portakv.view.view import KVView

#: Enqueues the copy of a slice across the link, by its buffer and its number, on the link's stream.
Cross: TypeAlias = Callable[[Slice, KVView, int, torch.Stream], None]
#: Enqueues the device's stage of a slice, by the slice's number, on a stream.
Gather: TypeAlias = Callable[[int, Prepared, Move, torch.Stream], None]


def by_backend(_: int, ready: Prepared, move: Move, stream: torch.Stream) -> None:
    """Enqueue the device's stage of a slice of rows."""
    pending = ready.launch(*move, stream, None)
    if pending is not None:
        pending.wait()


class Sent(NamedTuple):
    """Ids of the host that the core brings to a device together with the slices."""

    array: npt.NDArray[np.int64]
    ids: torch.Tensor

    @property
    def words(self) -> tuple[int, int, int]:
        """Return the addresses of both and the bytes, for the core."""
        start = self.array.__array_interface__["data"][0]
        return start, self.ids.data_ptr(), self.array.nbytes


class Passage:
    """One transfer in progress: its streams, and its buffers of the device.

    It begins after the caller's stream ``work``, which waits for its end. In between, the device's
    stage has a stream with priority, since a slice that waits for a model's kernels leaves the link
    idle. A single slice overlaps with nothing and stays on ``work``. The caller holds the lock of
    ``buffers``.

    The core has the schedule. After `settle` either the core executes it, see `submit`, or `begun`
    and `move` execute it here by torch, for any device.

    Attributes:
        planes: the planes of the slices, each once.
        placed: for each of them, the index of the device's rows, as its stage reads it.
        sent: the ids of ``placed`` that are still on the host; None: all are on the device.
        lists: pinned memory with ids of ``placed``, to be given back at the end.
        streams: by the schedule's numbers: ``work``, the device's stage, the link, and the stream
            whose present work comes first.
    """

    def __init__(
        self,
        downward: bool,
        buffers: Staging,
        work: torch.Stream,
        slices: Sequence[Slice],
        gather: Gather,
        cross: Cross,
    ) -> None:
        self.downward = downward
        self.buffers = buffers
        self.slices = slices
        self.planes = list(dict.fromkeys(each.planes for each in slices))
        self.placed: list[Index] = []
        self.sent: Sent | None = None
        self.lists: list[PinnedIds] = []
        self.streams = [work, buffers.half, buffers.link, work]
        self._work = work
        self._gather = gather
        self._cross = cross

    def settle(self, device_index: Index, current: torch.Stream, by_driver: bool = False) -> None:
        """Reserve buffers, find both stages of all planes, and bring what they read to the device.

        Args:
            device_index: of the device's rows.
            current: the device's current stream.
            by_driver: ids for this call may stay on the host, for `submission.submit`, if it takes
                the slices.
        """
        buffers = self.buffers
        work = self._work
        # A detached transfer begins after the current stream, not after the transfer before it:
        # each buffer has an event for its last use. Ids that are brought for one call are ordered
        # on the current stream, whichever stream reads them.
        first = self.streams[3] = current if buffers.detached else work
        where = None if first is current else first
        with inside(buffers.half if buffers.detached else where):
            buffers.reserve(max([each.nbytes for each in self.planes]))
        with inside(where):
            for planes in self.planes:
                planes.settle(buffers)
                ready = planes.ready
                of_rows, of_dense = ready.tables if self.downward else ready.tables[::-1]
                if of_rows:
                    bring_table(planes.rows, work.device)
                if of_dense:
                    bring_table(planes.dense, work.device)
            self._place(device_index, by_driver and self.by_kernels)

    def _place(self, device_index: Index, may_send: bool) -> None:
        """Bring the ids of the device's rows, ordered on the current stream."""
        index = device_index
        last_stage = None
        for ready in [planes.ready for planes in self.planes]:
            if ready is not last_stage:
                there = self._pinned(device_index, ready)
                if there is None and may_send:
                    there = self._sent(device_index, ready)
                index = read_on(self._work, there or ready.place(device_index))
                last_stage = ready
            self.placed.append(index)

    def _pinned(self, index: Index, ready: Prepared) -> Index | None:
        """Return the index with few ids for this call in pinned memory, where kernels read them;
        None: there are none, or no memory for them is free."""
        new = 0 < index.listed <= PinnedIds.MOST
        if not (new and ready.reads_pinned_ids):
            return None
        if not self.lists:
            lists = PinnedIds.acquire() or acquire_after_ends()
            if lists is None:
                return None
            self.lists.append(lists)
        return index.reading(self.lists[0].write(0, index.host_ids()))

    def _sent(self, index: Index, ready: Prepared) -> Index | None:
        """Return the index with memory for its ids, which the core brings; None: they are no ids
        for this call, they are on the device, or they are too many."""
        if not (index.temporary and index.on_host):
            return None
        device = ready.ids_device
        dtypes = ready.can.index_dtypes
        if torch.int64 not in dtypes or index.has_ids_on(device, dtypes):
            return None
        if self.sent is None:
            array = index.host_ids()
            if array.nbytes > small.COMMAND_BYTES or not small.by_inline(device):
                return None
            ids = torch.empty(array.size, dtype=torch.int64, device=device)
            self.sent = Sent(array, ids)
        return Index(self.sent.ids, index.step, index.offset)

    @property
    def by_kernels(self) -> bool:
        """Return True if the core launches the kernels of every device's stage."""
        return all(
            isinstance(getattr(each.ready, "launch", None), RowsLaunch) for each in self.planes
        )

    def order(self) -> SliceOrder:
        """Return what the schedule depends on, and take the buffers; called once."""
        return self.buffers.order(len(self.slices), self.downward)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Issue slices by `move` inside the context. At its end the caller's stream waits for
        them."""
        order = self.order()
        schedule = self._schedule = schedule_of(order)
        self._order = order
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
            self.record_tables()

    def record_tables(self) -> None:
        """Record that the caller's stream uses the tables of addresses on the device."""
        for view in dict.fromkeys(each.rows for each in self.planes):
            view.record_table(self._work)

    def move(self, nth: int) -> None:
        """Issue both stages of a slice, in order, after its buffer's last use."""
        order = self._order
        each = self.slices[nth]
        dense = each.planes.view(self.buffers, (order.first + nth) % order.buffers)
        self._execute(self._schedule.slices[nth], dense)

    def _execute(self, steps: Sequence[Step], dense: KVView | None = None) -> None:
        """Execute steps of the schedule, those of a slice with its buffer."""
        events = self.buffers.events
        for kind, which, number in steps:
            stream = self.streams[which]
            if kind == WAIT:
                event = events[number]
                if event is not None:
                    stream.wait_event(event)
            elif kind == RECORD:
                self.buffers.record(number, stream)
            elif kind == STAGED:
                self._gather(number, *self._staged(number, dense), stream)
            else:
                self._cross(self.slices[number], cast("KVView", dense), number, stream)

    def _staged(self, nth: int, dense: KVView | None) -> tuple[Prepared, Move]:
        """Return the device's stage of a slice, and what it copies."""
        each = self.slices[nth]
        planes = each.planes
        index = self.placed[self.planes.index(planes)].shifted(each.cut.start)
        buffer = cast("KVView", dense)
        move = Move(buffer, planes.rows, planes.buffer_index, index, each.cut.count)
        if self.downward:
            move = Move(planes.rows, buffer, index, planes.buffer_index, each.cut.count)
        return planes.ready, move
