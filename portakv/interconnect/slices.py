# SPDX-License-Identifier: Apache-2.0
"""Slices: the cut of a copy across the link, so that its two stages overlap.

A slice should be one run of host memory: a copy engine moves one run at the link's full speed, and
rows at a pitch a little slower (D2H, 16 MiB in 64 rows: 0.94 of a plain memcpy on an H200 while a
gather runs, against 0.99 in one run). So if planes lie outside the tokens, the planes are cut, else
the positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import torch

from portakv.errors import Unsupported
from portakv.interconnect.pieces import Pieces, pieces_of
from portakv.interconnect.staging import DenseRows, Order, dense_rows
from portakv.plan.packing import PackPlan
from portakv.plan.plan import CopyPlan, Move
from portakv.registry.prepared import Prepared, PreparedPack, prepared
from portakv.registry.registry import Choice
from portakv.runtime.bounded import Bounded
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

#: The device's stage: a copy of rows, or one that packs or unpacks.
Ready = TypeVar("Ready", bound=Prepared | PreparedPack)
#: Each slice is so many times as long as the slice before it: the link is idle only at one end of a
#: transfer (the first gather, the last scatter).
GROWTH = 4


@dataclass(frozen=True, slots=True)
class Cut:
    """A slice: its layers and kv (None: all), the first position, and the number of positions."""

    layers: tuple[int, int] | None
    kv: tuple[int, int] | None
    start: int
    count: int


class Sizes(NamedTuple):
    """Bytes of slices: the most of a transfer in one slice, of the first slice, and of the
    largest."""

    whole: int
    smallest: int
    largest: int


def cuts(
    form: Form, outside: tuple[str, ...], count: int, quantum: int, rising: bool, sizes: Sizes
) -> list[Cut]:
    """Cut ``count`` positions of the host's form into slices, in the order of their moves.

    Args:
        outside: which of ``kv`` and ``layer`` lie outside the positions in memory, outermost first.
        quantum: every slice but the last along the positions is a multiple of it.
        rising: small slices first; else last.
    """
    nbytes = form.token_bytes * count // (form.block_size if form.opaque else 1)
    if nbytes <= sizes.whole:
        return [Cut(None, None, 0, count)]
    slices: list[Cut] = []
    target = sizes.smallest
    largest = sizes.largest
    for kv, layers, atom in _planes(form, outside, nbytes, largest):
        at = 0
        while at < layers:
            n = layers
            if "layer" in outside:
                # Powers of two, since each number of layers has a plan, and perhaps a kernel.
                n = 1 << (min(max(1, target // atom), layers - at).bit_length() - 1)
            cut = Cut((at, at + n), kv, 0, count)
            if "layer" in outside and atom <= largest:
                slices.append(cut)
            else:
                slices += _positions(cut, quantum, n * atom, target, largest)
            at += n
            target = min(target * GROWTH, largest)
    if not outside:
        slices = [Cut(None, cut.kv, cut.start, cut.count) for cut in slices]
    return slices if rising else slices[::-1]


def _planes(
    form: Form, outside: tuple[str, ...], nbytes: int, largest: int
) -> list[tuple[tuple[int, int] | None, int, int]]:
    """Return the kv, the number of layers, and the bytes of one of these layers, outermost
    first."""
    layer = nbytes // form.layers
    if outside[:1] == ("kv",) or (len(outside) == 2 and layer > largest):
        return [((k, k + 1), form.layers, layer // form.kv) for k in range(form.kv)]
    return [(None, form.layers, layer)]


def _positions(cut: Cut, quantum: int, nbytes: int, target: int, largest: int) -> list[Cut]:
    """Cut the positions of some planes, ``nbytes`` together, into slices that grow."""
    parts = []
    start = 0
    while start < cut.count:
        taken = min(multiple(target, quantum, nbytes / cut.count), cut.count - start)
        parts.append(Cut(cut.layers, cut.kv, start, taken))
        start += taken
        target = min(target * GROWTH, largest)
    return parts


def multiple(nbytes: int, quantum: int, token_bytes: float) -> int:
    """Return the positions of about ``nbytes``: a multiple of the quantum, at least one."""
    return max(1, int(nbytes / (quantum * max(1, token_bytes)))) * quantum


class BothStages(Generic[Ready]):
    """Both stages of a copy across the link: the device's, between its rows and dense rows, and the
    link's.

    Attributes:
        plan: the plan of the whole copy.
        downward: from the device to the host.
        dense: the arrangement of dense rows.
        quantum: every slice along the positions but the last is a multiple of it.
    """

    def __init__(self, plan: CopyPlan | PackPlan, dense: DenseRows, token_bytes: float) -> None:
        self.plan = plan
        self.downward = plan.src.place == "device"
        self.dense = dense
        self.quantum = lcm(plan.unit, dense.block_size)
        self._token_bytes = token_bytes  # of dense rows

    def part(self, rows: KVView, host: KVView) -> BothStages[Ready]:
        """Return the stages of views that show all planes, or some."""
        raise NotImplementedError

    def of(self, dense: KVView, slots: int) -> tuple[Ready, CopyPlan]:
        """Return the device's stage, prepared for buffers of ``slots`` slots, and the link's
        plan."""
        raise NotImplementedError

    def slots(self, count: int, first: int, exact: bool, largest: int) -> int:
        """Return the slots of a buffer for ``count`` positions, of which the first is at slot
        ``first`` of a block.

        ``exact``: no more slots than positions, if nothing may lie between planes. Else the
        result is one of few numbers, so that transfers of any length share forms and plans: at most
        ``largest`` bytes or one block, and a block more if one is cut.
        """
        block = self.dense.block_size
        quantum = self.quantum
        if exact and block == 1:
            return count
        slots = quantum
        most = multiple(largest, quantum, self._token_bytes)
        while slots < count:
            slots *= 2
        slots = max(min(slots, most), -(-count // quantum) * quantum)
        return slots + (block if first else 0)


class Stages(BothStages[Prepared]):
    """Both stages of a plan: the device's rows to or from dense rows, by ``half``, and the link.

    ``order``: of dense rows, one of the host's form.
    """

    def __init__(self, plan: CopyPlan, half: Choice, order: Order) -> None:
        downward = plan.src.place == "device"
        dense = dense_rows(plan.dst if downward else plan.src, order)
        super().__init__(plan, dense, plan.token_bytes)
        self._half = half
        self._order = order
        self._made: Bounded[int, tuple[Prepared, CopyPlan]] = Bounded("stages of slices", 64)
        self._parts: dict[tuple[Form, Form], Stages] = {}

    @classmethod
    def tried(cls, plan: CopyPlan, half: Choice, device: torch.device, order: Order) -> Stages:
        """Return the stages of a plan, with the device's stage prepared.

        Raises:
            Unsupported: no backend takes dense rows in that order, nor layer by layer; the message
                has the reason of the second.
        """
        made = cls(plan, half, order)
        try:
            made._try(device)
        except Unsupported:
            made = cls(plan, half, "layer")
            made._try(device)
        return made

    def _try(self, device: torch.device) -> None:
        slots = self.quantum
        memory = torch.empty(self.dense.nbytes(slots), dtype=torch.uint8, device=device)
        self.of(self.dense.view(memory, slots), slots)

    def part(self, rows: KVView, host: KVView) -> Stages:
        """Return the stages of views that show all planes, or some."""
        forms = (rows.form, host.form)
        plan = self.plan
        src, dst = forms if self.downward else forms[::-1]
        if (src, dst) == (plan.src, plan.dst):
            return self
        if forms not in self._parts:
            part = CopyPlan(src, dst, plan.src_step, plan.dst_step, plan.unit)
            self._parts[forms] = Stages(part, self._half, self._order)
        return self._parts[forms]

    def of(self, dense: KVView, slots: int) -> tuple[Prepared, CopyPlan]:
        """Return the device's stage, prepared for buffers of ``slots`` slots, and the link's
        plan."""
        known = self._made.get(slots)
        if known is None:
            plan = self.plan
            form = dense.form
            ends = (plan.src, form, plan.src_step, 0), (form, plan.dst, 0, plan.dst_step)
            stage, link = ends if self.downward else ends[::-1]
            made = prepared(*stage, plan.unit, self._half)
            known = self._made[slots] = made, CopyPlan(*link, plan.unit)
        return known


class Slice(Generic[Ready]):
    """A slice of a transfer, with everything worked out that does not change with the host's
    memory.

    Args:
        stages: the stages of the whole plan.
        rows, host: views of all planes.
        host_index: the index of all of the host's rows, with ids on the host.
        exact: nothing may lie between the planes of a buffer, of at most ``largest`` bytes.

    Attributes:
        rows: the device's planes.
        host_index: the index of the slice's rows on the host.
        dense, slots: the arrangement of rows in a buffer, and its slots.
        buffer_index: the position of the rows in a buffer: as far into a block as on the host.
    """

    def __init__(
        self,
        stages: BothStages[Ready],
        cut: Cut,
        rows: KVView,
        host: KVView,
        host_index: Index,
        exact: bool,
        largest: int,
    ) -> None:
        self.cut = cut
        self.rows = rows.planes(cut.layers, cut.kv)
        self.stages = stages.part(self.rows, host.planes(cut.layers, cut.kv))
        self.host_index = host_index.shifted(cut.start)
        self.dense = self.stages.dense
        self.buffer_index = Index(offset=self.host_index.offset % self.dense.block_size)
        self.slots = self.stages.slots(cut.count, self.buffer_index.offset, exact, largest)
        self.nbytes = self.dense.nbytes(self.slots)
        self._ready: Ready | None = None
        # The pieces, and the addresses of the buffer and the host memory that they belong to.
        self._settled: tuple[tuple[int, int], Pieces] | None = None

    def prepared(self, dense: KVView) -> Ready:
        """Return the device's stage, for buffers of this slice."""
        ready = self._ready
        if ready is None:
            ready = self._ready = self.stages.of(dense, self.slots)[0]
        return ready

    def pieces(self, dense: KVView, host: KVView, fold_below: int) -> Pieces:
        """Return the pieces that cross between a buffer and the host's memory.

        The first call works them out; earlier slices cross by then. Later calls shift them
        to the current addresses.
        """
        ends = (dense.origins[0], host.origins[0])
        settled = self._settled
        if settled is None:
            # One assignment: other threads may read it.
            settled = self._settled = ends, self.crossing(dense, host, fold_below)
        if ends == settled[0]:
            return settled[1]
        moved = [now - then for now, then in zip(ends, settled[0], strict=True)]
        src, dst = moved if self.stages.downward else moved[::-1]
        return settled[1]._replace(dst=settled[1].dst + dst, src=settled[1].src + src)

    def crossing(self, dense: KVView, host: KVView, fold_below: int) -> Pieces:
        """Return the pieces between a buffer and the host's rows."""
        planes = host.planes(self.cut.layers, self.cut.kv)
        link = self.stages.of(dense, self.slots)[1]
        count = self.cut.count
        if self.stages.downward:
            move = Move(dense, planes, self.buffer_index, self.host_index, count)
        else:
            move = Move(planes, dense, self.host_index, self.buffer_index, count)
        return pieces_of(link, move, fold_below, merged=True)


#: Slices and stages of rows as they are.
RowSlice: TypeAlias = Slice[Prepared]
RowStages: TypeAlias = BothStages[Prepared]


def cached_slices(
    rows: KVView, stages: BothStages[Ready]
) -> Bounded[tuple[object, ...], list[Slice[Ready]]]:
    """Return the slices of transfers of several kinds that a view of rows caches for a launch,
    or a copy, with these stages."""
    cached: Bounded[tuple[object, ...], list[Slice[Ready]]] | None = rows.derived.get(stages)
    if cached is None:
        cached = rows.derived.setdefault(stages, Bounded("slices of transfers", 64))
    return cached
