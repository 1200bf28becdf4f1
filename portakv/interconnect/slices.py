# SPDX-License-Identifier: Apache-2.0
"""Slices: the cut of a copy across the link, so that its two stages overlap, and a copy in slices
that is in progress.

The core cuts the positions of a copy. If planes lie outside the positions on the host, a slice has
a run in each of them: a copy engine moves batches of runs of 256 KiB as fast as one run, and those
of 32 KiB at 0.98 of that (benchmarks/notes/link.md).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import lcm
from typing import NamedTuple, TypeAlias, cast

import torch

from portakv.core.link import RECORD, STAGED, WAIT, Cut, SliceOrder, Step, cut_copy, schedule_of
from portakv.errors import Unsupported
from portakv.interconnect.link import CudaLink, TorchLink, link_of
from portakv.interconnect.staging import Buffers, DenseRows, Order, Staging, staging
from portakv.interconnect.strategy import finish, read_on
from portakv.plan.packing import PackPlan
from portakv.plan.plan import CopyPlan, Move
from portakv.registry.prepared import PREPARED, Prepared, bring_table, prepared
from portakv.registry.registry import Choice
from portakv.runtime import streams
from portakv.runtime.devices import inside
from portakv.view.form import Form, same_form
from portakv.view.index import Index
from portakv.view.view import KVView

#: Each slice is so many times as long as the slice before it: the link is idle only at one end of a
#: transfer (the first gather, the last scatter).
GROWTH = 4


class Sizes(NamedTuple):
    """Bytes of slices: the most of a transfer in one slice, of the first slice, and of the
    largest."""

    whole: int
    smallest: int
    largest: int


class BothStages:
    """Both stages of a copy across the link: the device's, between its rows and dense rows, and the
    link's.

    Attributes:
        plan: the plan of the whole copy.
        downward: from the device to the host.
        dense: the arrangement of dense rows.
        quantum: every slice but the last is a multiple of it.
        usual: both stages if buffers of any length have the same; else None.
    """

    usual: tuple[Prepared, CopyPlan] | None = None

    def __init__(self, plan: CopyPlan | PackPlan, dense: DenseRows) -> None:
        self.plan = plan
        self.downward = plan.src.place == "device"
        self.dense = dense
        self.quantum = lcm(plan.unit, dense.block_size)

    def of(self, dense: KVView, slots: int) -> tuple[Prepared, CopyPlan]:
        """Return the device's stage, prepared for buffers of ``slots`` slots, and the link's
        plan."""
        raise NotImplementedError

    def tried_on(self, device: torch.device) -> Prepared:
        """Return the device's stage for buffers of the least length; raise as `prepared` if no
        backend takes it."""
        slots = self.quantum
        memory = torch.empty(self.dense.nbytes(slots), dtype=torch.uint8, device=device)
        made = self.of(self.dense.view(memory, slots), slots)
        if self.dense.any_length:
            self.usual = made
        return made[0]

    def rules(self, sizes: Sizes, slots: int = 0) -> tuple[int, ...]:
        """Return how copies are cut, as `CutRules` of ``link.h``. ``slots``: of a buffer; 0: as
        many as the slices need."""
        dense = self.dense
        form = dense.form
        tokens = form.block_size if form.opaque else 1
        rows = dense.block_size, self.quantum, form.token_bytes, tokens, slots
        return (self.downward, *rows, *sizes, GROWTH)


class Stages(BothStages):
    """Both stages of a plan: the device's rows to or from dense rows, by ``half``, and the link.

    ``order``: of dense rows, one of the host's form.
    """

    def __init__(self, plan: CopyPlan, half: Choice, order: Order) -> None:
        downward = plan.src.place == "device"
        super().__init__(plan, DenseRows(plan.dst if downward else plan.src, order))
        self._half = half

    @classmethod
    def tried(cls, plan: CopyPlan, half: Choice, device: torch.device) -> Stages:
        """Return the stages of a plan, with the device's stage prepared.

        Raises:
            Unsupported: no backend takes dense rows in the host's order, nor layer by layer; the
                message has the reason of the second.
        """
        made = cls(plan, half, "form")
        try:
            made.tried_on(device)
        except Unsupported:
            made = cls(plan, half, "layer")
            made.tried_on(device)
        return made

    def of(self, dense: KVView, slots: int) -> tuple[Prepared, CopyPlan]:
        """Return the device's stage, prepared for buffers of ``slots`` slots, and the link's
        plan."""
        plan = self.plan
        form = dense.form
        ends = (plan.src, form, plan.src_step, 0), (form, plan.dst, 0, plan.dst_step)
        stage, link = ends if self.downward else ends[::-1]
        return prepared(*stage, plan.unit, self._half), CopyPlan(*link, plan.unit)


class SlicedRows:
    """The rows of a transfer in slices, and the buffers that these pass through.

    Args:
        stages: of the whole copy.
        rows, host: the rows of the device and of the host.
        host_index: of the host's rows; its ids are on the host if they cross by a link.
        count: positions of the copy.
        sizes: of slices.

    Attributes:
        cuts: the slices in the order of their moves.
        slots, nbytes: of a buffer.
        inside: the position of a slice in a buffer: as far into a block as on the host.
        ready, link: both stages, once `settle` has found them.
    """

    ready: Prepared
    link: CopyPlan

    def __init__(
        self,
        stages: BothStages,
        rows: KVView,
        host: KVView,
        host_index: Index,
        count: int,
        sizes: Sizes,
    ) -> None:
        self.stages = stages
        self.rows = rows
        self.host = host
        self._host_index = host_index
        rules = array("q", stages.rules(sizes))
        self.slots, self.cuts = cut_copy(rules, count, host_index.offset, True)
        self.nbytes = stages.dense.nbytes(self.slots)
        self.inside = Index(offset=host_index.offset % stages.dense.block_size)

    def settle(self, buffers: Buffers) -> None:
        """Find both stages."""
        stages = self.stages
        self.ready, self.link = stages.usual or stages.of(self.view(buffers, 0), self.slots)

    def view(self, buffers: Buffers, at: int) -> KVView:
        """Return a buffer as dense rows."""
        return buffers.view(at, self.stages.dense, self.slots)

    def host_index(self, cut: Cut) -> Index:
        """Return the index of a slice's rows on the host."""
        return self._host_index.shifted(cut.start)

    def crossing(self, cut: Cut, dense: KVView, inside: Index | None = None) -> Move:
        """Return the copy of a slice between a buffer and the host's rows.

        ``inside``: where it begins in the buffer; None: as far into a block as on the host.
        """
        inside = inside or self.inside
        index = self.host_index(cut)
        if self.stages.downward:
            return Move(dense, self.host, inside, index, cut.count)
        return Move(self.host, dense, index, inside, cut.count)

    def cross(
        self, link: CudaLink | TorchLink, cut: Cut, dense: KVView, stream: torch.Stream
    ) -> None:
        """Copy a slice between a buffer and the host's rows, ordered on a stream."""
        link.carry(self.link, self.crossing(cut, dense), stream, merged=True)


# ------------------------------------------------------------------------------------------------
# A transfer in slices that is in progress: its streams, its buffers, and the schedule by torch.
#
# The core has the schedule. For NVIDIA devices it also executes it, see `staged`; here the torch
# of any device does, with any backend for the device's stages.

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


# ------------------------------------------------------------------------------------------------
# Copies that pack or unpack across the link, in slices, as `staged` moves raw rows.
#
# The device's stage makes dense rows in the encoding of the other side, in staging memory. They lie
# in the order of the other side, so that few long runs cross. Slices are packed or unpacked on one
# stream and cross on another, so that the two overlap.


class PackStages(BothStages):
    """Both stages of a copy of which one side is packed.

    Args:
        src, dst: the forms of both sides. One is the device's; the other is elsewhere.
        steps: tokens for each entry of each side's index.
        downward: the source is the device's side.
        choice: the backend that packs or unpacks.

    Raises as `prepared`.
    """

    def __init__(
        self, src: Form, dst: Form, steps: tuple[int, int], downward: bool, choice: Choice
    ) -> None:
        plan = PackPlan(src, dst, *steps)
        far = dst if downward else src
        dense = DenseRows(far)
        per_token = far.token_bytes / (far.block_size if far.opaque else 1)
        super().__init__(plan, dense)
        self.downward = downward
        self.choice = choice
        #: Bytes of dense rows for each byte of raw rows.
        self.share = per_token / plan.raw.token_bytes
        self._far = far
        self.carried = self.tried_on(choice.backend.device).carried  # refuses what none executes

    def of(self, dense: KVView, slots: int) -> tuple[Prepared, CopyPlan]:
        """Return the device's stage, prepared for buffers of ``slots`` slots, and the link's
        plan."""
        return self._stage(dense.form), self._link(dense.form)

    def _stage(self, dense: Form) -> Prepared:
        plan = self.plan
        # Buffers are bytes. Their rows have the type of the other side's.
        typed = same_form(replace(dense, dtypes=self._far.dtypes))
        if self.downward:
            return prepared(plan.src, typed, plan.src_step, 0, None, self.choice, PackPlan)
        return prepared(typed, plan.dst, 0, plan.dst_step, None, self.choice, PackPlan)

    def _link(self, dense: Form) -> CopyPlan:
        far = self._far
        step = self.plan.dst_step if self.downward else self.plan.src_step
        unit = self.plan.unit
        if far.encoding:  # a slot is a row, and a block is one token
            dense = dense.as_slots()
            far = far.as_slots()
            step = step // unit
            unit = 1
        if self.downward:
            return CopyPlan(dense, far, 0, step, unit)
        return CopyPlan(far, dense, step, 0, unit)


def pack_stages(move: Move, downward: bool, choice: Choice) -> PackStages:
    """Return the stages of a copy; made on the first call, looked up after that.

    Raises as `PackStages`.
    """
    src = move.src.form
    dst = move.dst.form
    key = (src.address, dst.address, *move.steps, downward, choice, PackStages)
    known: PackStages | None = PREPARED.get(key)
    if known is None:
        made = PackStages(src, dst, move.steps, downward, choice)
        known = PREPARED.setdefault(key, made)
    return known


class PackedRows(SlicedRows):
    """Rows in slices of whole blocks, of which one side is packed."""

    def crossing(self, cut: Cut, dense: KVView, inside: Index | None = None) -> Move:
        """Return the copy between a buffer and the rows or slots of the other side."""
        far = self.host
        inside = inside or self.inside
        outside = self.host_index(cut)
        count = cut.count
        if far.form.encoding:
            size = far.form.block_size
            inside = inside.of_blocks(size)
            outside = outside.of_blocks(size)
            count = count // size
            dense = dense.as_slots()
            far = far.as_slots()
        if self.stages.downward:
            return Move(dense, far, inside, outside, count)
        return Move(far, dense, outside, inside, count)


def issue_slices(
    move: Move,
    stages: PackStages,
    cross: Cross | None,
    sizes: Sizes,
    order: tuple[torch.Stream, torch.Stream],
    words: torch.Tensor,
) -> None:
    """Issue all slices of a copy.

    Args:
        cross: copies a slice between its buffer and the far side, ordered on a stream. None: slices
            cross by the link, between staging memory and pinned memory, in pieces.
        sizes: of slices, in bytes of raw rows. The first one is large if the link is busy.
        order: the slices begin after the first stream, and the second stream waits for their end.
            The copy is detached if they differ.
        words: a cleared word for each block, which gets 1 if the block does not fit.
    """
    current, work = order
    near, far, near_index, far_index = move.ends(stages.downward)
    device = near.device
    if cross is None:
        far_index = far_index.to_host()
    buffers = staging(device, work, work is not current, packs=True)
    if not buffers.link.query():  # nothing waits for the first slice
        sizes = sizes._replace(smallest=sizes.largest)
    smaller = Sizes(*(max(1, int(size * stages.share)) for size in sizes))
    slices = PackedRows(stages, near, far, far_index, move.count, smaller)
    unit = stages.plan.unit

    def transform(nth: int, ready: Prepared, part: Move, stream: torch.Stream) -> None:
        first = slices.cuts[nth].start // unit
        own = words[first : first + part.count // unit]
        finish(ready.pack(part, stream, None, own))

    link = link_of(device)

    def by_link(cut: Cut, dense: KVView, _: int, stream: torch.Stream) -> None:
        slices.cross(link, cut, dense, stream)

    passage = Passage(buffers, work, slices, transform, cross or by_link)
    try:
        with buffers.lock:
            passage.settle(near_index, current)
            passage.issue()
    finally:
        # Also if something failed while slices were in progress.
        streams.completion(device, work, *far.retained, words)
