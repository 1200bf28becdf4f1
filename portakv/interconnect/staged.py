# SPDX-License-Identifier: Apache-2.0
"""`staged`: makes rows dense on the device, and moves them across the link in few large copies.

The device's stage is a copy between the rows and dense rows, by the backend that serves the device.
The link's stage copies a slice in as few pieces as the host's rows allow. A transfer above `WHOLE`
bytes has several slices, and its stages overlap on two streams: while a slice crosses, the next
slice is gathered, or the last one scattered. A smaller one is one slice on the caller's stream.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import NamedTuple

import torch

from portakv.backends.base import Launch
from portakv.backends.row_kernels import RowKernels
from portakv.backends.rows_launch import RowsLaunch
from portakv.core.call import OTHERWISE, CopyEnd, Crossings, Fault
from portakv.core.link import OUTSIDE, ROOM, STAGE, Cut
from portakv.core.pick import ORDER
from portakv.errors import Unsupported
from portakv.interconnect.link import CudaLink, Uncrossed, checked_words, link_of
from portakv.interconnect.slices import (
    BothStages,
    Passage,
    Sizes,
    SlicedRows,
    Stages,
    by_backend,
    first_of,
    place_rows,
)
from portakv.interconnect.staging import Staging, staging
from portakv.interconnect.strategy import (
    Cross,
    Move,
    Strategy,
    StrategyLaunch,
    read_on,
)
from portakv.plan.plan import CopyPlan, outside
from portakv.registry.prepared import Prepared
from portakv.runtime import cuda, streams
from portakv.runtime.devices import inside
from portakv.view.index import Index
from portakv.view.view import KVView

#: Bytes of the largest slice, and of the smallest. Of 8, 16 and 32 MiB the largest loses least to
#: the gaps between slices (H200).
LARGEST = 32 << 20
SMALLEST = 4 << 20
#: Bytes up to which a transfer is one slice. A gather of 32 MiB takes 20 us, 3 % of its time on the
#: link (H200).
WHOLE = 32 << 20


class Staged(Strategy):
    """Gather on the device, then copy each slice; or copy each slice, then scatter."""

    name = "staged"
    reads = "host"

    def prepare(self, plan: CopyPlan) -> Launch:
        return StagedLaunch(plan, self)


class _Settled(NamedTuple):
    """Both stages of copies as the core reads them.

    Attributes:
        words: a `CrossingPlan` of ``link.h``.
        plan: of the link's stage, whose words are read.
        ready, launch: the device's stage.
    """

    words: array[int]
    plan: CopyPlan
    ready: Prepared
    launch: RowsLaunch


class StagedCrossing:
    """The copies between two forms, each by one call of the core, which cuts it into slices.

    Args:
        stages: both stages of the copies.
        link: of the device.
        device: the rows' device.
    """

    def __init__(self, stages: BothStages, link: CudaLink, device: torch.device) -> None:
        self._stages = stages
        self._link = link
        self._device = device
        # None: not known yet.
        self._settled: _Settled | None = None
        self._declines = False  # another backend executes the device's stage
        if stages.usual is not None:
            self._settle(*stages.usual, 0)

    @property
    def words(self) -> array[int] | None:
        """Return the words of a `CrossingPlan`; None: the core does not make the copies."""
        if self._settled is None and not self._declines:
            buffers = self._buffers()
            try:
                with buffers.lock:
                    self.stage(buffers)
            except (torch.OutOfMemoryError, Unsupported):
                return None
        return None if self._settled is None else self._settled.words

    def _buffers(self) -> Staging:
        """Return the buffers of the current stream."""
        return staging(self._device, torch.accelerator.current_stream(self._device.index))

    def cross(self, submit: Callable[[int], int], end: int) -> int:
        """Submit a copy; see `Cross`."""
        buffers = self._buffers()
        with buffers.lock:
            result = submit(buffers.words.buffer_info()[0])
            if result != ROOM:
                return result
            try:
                buffers.reserve(CopyEnd.from_address(end).fault.values[0])
            except torch.OutOfMemoryError:  # nothing was submitted
                return OTHERWISE
            return submit(buffers.words.buffer_info()[0])

    def stage(self, buffers: Staging) -> Prepared | None:
        """Return the device's stage; None: the core does not launch its kernels.

        The caller holds the lock of the buffers, and the stream that their memory is allocated on
        is current.
        """
        if self._settled is None and not self._declines:
            self._settle_fixed(buffers)
        return None if self._settled is None else self._settled.ready

    def carry(self, move: Move, index: Index, buffers: Staging, work: int, before: int) -> None:
        """Submit a copy after `stage`, with the same stream current.

        Args:
            move: the copy, with ids of the host's rows on the host.
            index: of the device's rows, as its stage reads it.
            work, before: the handles of the copy's stream, and of the stream whose present work
                comes first.

        Raises:
            TransferError: the driver refused a call; what was submitted stays ordered.
            SlotError: a position of the host lies outside of its list or its view.
            Unsupported: a view has more units than the kernels count.
        """
        settled = self._settled
        assert settled is not None
        downward = self._stages.downward
        rows, host, *_ = move.ends(downward)
        stage = settled.launch
        side = stage.side(rows, index, stage.tables[0 if downward else 1])
        copy = checked_words(move, downward, side)
        # Without several allocations there are no edges besides those of registrations.
        uncrossed = Uncrossed(host) if host.entries > 1 else Uncrossed()

        def submit() -> Fault | None:
            return self._link.rows(settled.words, copy, work, uncrossed, buffers.words, before)

        def submit_with_room() -> Fault | None:
            fault = submit()
            if fault is not None and fault.code == ROOM:
                buffers.reserve(fault.values[0])
                fault = submit()
            if fault is None:
                return None
            if fault.code == OUTSIDE:
                raise outside(move)
            if fault.what == STAGE:
                stage.refuse(fault.code, rows.slots, 0, fault.slice)
            return fault

        self._link.ordered(submit_with_room)

    def _settle_fixed(self, buffers: Staging) -> None:
        """Prepare both stages for buffers of one length, since their form depends on it."""
        stages = self._stages
        quantum = stages.quantum
        quanta = max(WHOLE, LARGEST) // stages.dense.nbytes(quantum)
        # A copy that is one slice may end inside a quantum, and begin inside a block.
        slots = (max(1, quanta) + 1) * quantum + stages.dense.block_size
        buffers.reserve(stages.dense.nbytes(slots))
        try:
            ready, plan = stages.of(buffers.view(0, stages.dense, slots), slots)
        except Unsupported:  # a backend that may take buffers of other lengths
            self._declines = True
        else:
            self._settle(ready, plan, slots)

    def _settle(self, ready: Prepared, plan: CopyPlan, slots: int) -> None:
        """Describe the copies for the core, if it launches the kernels of their device's stage.

        ``slots``: of the buffers; 0: any.
        """
        stage = ready.launch
        if not isinstance(stage, RowsLaunch):
            self._declines = True
            return
        rules = self._stages.rules(Sizes(WHOLE, SMALLEST, LARGEST), slots)
        words = self._link.words_of(plan, rules, stage.words)
        self._settled = _Settled(words, plan, ready, stage)


class StagedLaunch(StrategyLaunch):
    """A prepared copy, in slices."""

    strategy = Staged.name

    def __init__(self, plan: CopyPlan, strategy: Strategy) -> None:
        super().__init__(plan, strategy.device)
        self._strategy = strategy
        self._detached = strategy.terms.detached
        self.stages = Stages.tried(plan, strategy.half, strategy.device)
        self.link = link_of(strategy.device)
        self._crossing: StagedCrossing | None = None
        if isinstance(self.link, CudaLink):
            self._crossing = StagedCrossing(self.stages, self.link, strategy.device)

    def row_kernels(self) -> RowKernels | None:
        return self._strategy.half.backend.row_kernels

    def described(self, words: Crossings, strategy: str) -> Cross | None:
        crossing = self._crossing
        if crossing is None or self._detached or crossing.words is None:
            return None
        words.plans[ORDER.index(strategy)] = crossing.words.buffer_info()[0]
        return crossing.cross

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        host = move.dst if self.downward else move.src
        if self.downward:
            move = move._replace(dst_index=move.dst_index.to_host())
        else:
            move = move._replace(src_index=move.src_index.to_host())
        current = torch.accelerator.current_stream(self.device.index)
        work = stream or current
        buffers = staging(self.device, work, self._detached)
        try:
            with buffers.lock:
                if not self._by_core(move, buffers, work, current):
                    self._by_torch(move, buffers, work, current)
        finally:
            # No allocator knows of the link's copies. The host's memory is retained until they end,
            # also if something failed while they were in progress.
            streams.completion(self.device, work, *host.retained)

    def _by_core(
        self,
        move: Move,
        buffers: Staging,
        work: torch.Stream,
        current: torch.Stream,
    ) -> bool:
        """Submit a copy by one call of the core; return False if the core does not launch the
        kernels of the device's stage.

        ``current``: the device's current stream.
        """
        if self._crossing is None:
            return False
        rows, _, device_index, _ = move.ends(self.downward)
        first = first_of(buffers, work, current)
        with inside(None if first is current else first):
            ready = self._crossing.stage(buffers)
            if ready is None:
                return False
            index = read_on(work, place_rows(rows, device_index, ready, self.downward))
            handles = [cuda.raw(each, self.device.index) for each in (work, first)]
            try:
                self._crossing.carry(move, index, buffers, *handles)
            finally:
                rows.record_table(work)
        return True

    def _by_torch(
        self,
        move: Move,
        buffers: Staging,
        work: torch.Stream,
        current: torch.Stream,
    ) -> None:
        """Issue a copy by the torch of the device; the arguments are those of `_by_core`."""
        rows, host, device_index, host_index = move.ends(self.downward)
        # If the link is busy, nothing waits for the first slice. All slices are then as large as
        # possible, and wait least often for a model that leaves little of the device free.
        sizes = Sizes(WHOLE, SMALLEST if buffers.link.query() else LARGEST, LARGEST)
        slices = SlicedRows(self.stages, rows, host, host_index, move.count, sizes)

        def cross(cut: Cut, dense: KVView, _: int, link: torch.Stream) -> None:
            slices.cross(self.link, cut, dense, link)

        passage = Passage(buffers, work, slices, by_backend, cross)
        passage.settle(device_index, current)
        passage.issue()
