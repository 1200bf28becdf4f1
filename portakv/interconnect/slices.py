# SPDX-License-Identifier: Apache-2.0
"""Slices: the cut of a copy across the link, so that its two stages overlap.

A slice should be one run of host memory: a copy engine moves one run at the link's full speed, and
rows at a pitch a little slower (D2H, 16 MiB in 64 rows: 0.94 of a plain memcpy on an H200 while a
gather runs, against 0.99 in one run). So if planes lie outside the tokens, the planes are cut, else
the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import lcm
from typing import NamedTuple, TypeAlias

import torch

from portakv.errors import Unsupported
from portakv.interconnect.link import CudaLink, TorchLink
from portakv.interconnect.staging import Buffers, DenseRows, Order, dense_rows
from portakv.plan.packing import PackPlan
from portakv.plan.plan import CopyPlan, Move
from portakv.registry.prepared import Prepared, prepared
from portakv.registry.registry import Choice
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

#: Each slice is so many times as long as the slice before it: the link is idle only at one end of a
#: transfer (the first gather, the last scatter).
GROWTH = 4


class Cut(NamedTuple):
    """A slice: its layers and kv (None: all), the first position, and the number of positions."""

    layers: tuple[int, int] | None
    kv: tuple[int, int] | None
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count


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
            cut = Cut((at, at + n) if outside else None, kv, 0, count)
            if "layer" in outside and atom <= largest:
                slices.append(cut)
            else:
                slices += _positions(cut, quantum, n * atom, target, largest)
            at += n
            target = min(target * GROWTH, largest)
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
    each = nbytes / cut.count
    while start < cut.count:
        taken = min(multiple(target, quantum, each), cut.count - start)
        parts.append(Cut(cut.layers, cut.kv, start, taken))
        start += taken
        target = min(target * GROWTH, largest)
    return parts


def multiple(nbytes: int, quantum: int, token_bytes: float) -> int:
    """Return the positions of about ``nbytes``: a multiple of the quantum, at least one."""
    return max(1, int(nbytes / (quantum * max(1, token_bytes)))) * quantum


class BothStages:
    """Both stages of a copy across the link: the device's, between its rows and dense rows, and the
    link's.

    Attributes:
        plan: the plan of the whole copy.
        downward: from the device to the host.
        dense: the arrangement of dense rows.
        quantum: every slice along the positions but the last is a multiple of it.
        usual: both stages if buffers of any length have the same; else None.
    """

    usual: tuple[Prepared, CopyPlan] | None = None

    def __init__(self, plan: CopyPlan | PackPlan, dense: DenseRows, token_bytes: float) -> None:
        self.plan = plan
        self.downward = plan.src.place == "device"
        self.dense = dense
        self.quantum = lcm(plan.unit, dense.block_size)
        self._token_bytes = token_bytes  # of dense rows

    def part(self, rows: KVView, host: KVView) -> BothStages:
        """Return the stages of views that show all planes, or some."""
        raise NotImplementedError

    def of(self, dense: KVView, slots: int) -> tuple[Prepared, CopyPlan]:
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


class Stages(BothStages):
    """Both stages of a plan: the device's rows to or from dense rows, by ``half``, and the link.

    ``order``: of dense rows, one of the host's form.
    """

    def __init__(self, plan: CopyPlan, half: Choice, order: Order) -> None:
        downward = plan.src.place == "device"
        dense = dense_rows(plan.dst if downward else plan.src, order)
        super().__init__(plan, dense, plan.token_bytes)
        self._half = half
        self._order = order

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
        made = self.of(self.dense.view(memory, slots), slots)
        if self.dense.any_length:
            self.usual = made

    def part(self, rows: KVView, host: KVView) -> Stages:
        """Return the stages of views that show all planes, or some."""
        plan = self.plan
        src, dst = (rows.form, host.form) if self.downward else (host.form, rows.form)
        if (src, dst) == (plan.src, plan.dst):
            return self
        part = CopyPlan(src, dst, plan.src_step, plan.dst_step, plan.unit)
        return Stages(part, self._half, self._order)

    def of(self, dense: KVView, slots: int) -> tuple[Prepared, CopyPlan]:
        """Return the device's stage, prepared for buffers of ``slots`` slots, and the link's
        plan."""
        plan = self.plan
        form = dense.form
        ends = (plan.src, form, plan.src_step, 0), (form, plan.dst, 0, plan.dst_step)
        stage, link = ends if self.downward else ends[::-1]
        return prepared(*stage, plan.unit, self._half), CopyPlan(*link, plan.unit)


class Planes:
    """The planes that some slices of a transfer show, and the buffers that these pass through.

    Args:
        stages: the stages of these planes.
        rows, host: the planes of the device and of the host.
        slots: of a buffer.
        buffer_index: the position of a slice in a buffer: as far into a block as on the host.

    Attributes:
        nbytes: of a buffer.
        ready, link: both stages, once `settle` has found them.
    """

    ready: Prepared
    link: CopyPlan

    def __init__(
        self,
        stages: BothStages,
        rows: KVView,
        host: KVView,
        slots: int,
        buffer_index: Index,
    ) -> None:
        self.stages = stages
        self.rows = rows
        self.host = host
        self.slots = slots
        self.nbytes = stages.dense.nbytes(slots)
        self.buffer_index = buffer_index

    def settle(self, buffers: Buffers) -> None:
        """Find both stages."""
        self._buffers = buffers
        stages = self.stages
        self.ready, self.link = stages.usual or stages.of(self.dense, self.slots)

    @cached_property
    def dense(self) -> KVView:
        """Return the first buffer as dense rows; known once the planes are settled."""
        return self.view(self._buffers, 0)

    def view(self, buffers: Buffers, at: int) -> KVView:
        """Return a buffer as dense rows of these planes."""
        return buffers.view(at, self.stages.dense, self.slots)


class Slice:
    """A slice of a transfer: some positions of some planes.

    Args:
        planes: the planes.
        cut: the positions.
        whole_index: the index of all of the host's rows, with ids on the host.
    """

    __slots__ = ("_whole_index", "cut", "planes")

    def __init__(self, planes: Planes, cut: Cut, whole_index: Index) -> None:
        self.planes = planes
        self.cut = cut
        self._whole_index = whole_index

    @property
    def host_index(self) -> Index:
        """Return the index of the slice's rows on the host."""
        return self._whole_index.shifted(self.cut.start)

    def crossing(self, dense: KVView) -> Move:
        """Return the copy between a buffer and the host's rows."""
        planes = self.planes
        inside = planes.buffer_index
        count = self.cut.count
        if planes.stages.downward:
            return Move(dense, planes.host, inside, self.host_index, count)
        return Move(planes.host, dense, self.host_index, inside, count)

    def cross(self, link: CudaLink | TorchLink, dense: KVView, stream: torch.Stream) -> None:
        """Copy between a buffer and the host's rows, ordered on a stream."""
        link.carry(self.planes.link, self.crossing(dense), stream, merged=True)


#: A slice of rows as they are.
RowSlice: TypeAlias = Slice


def sliced(
    stages: BothStages,
    cut: Sequence[Cut],
    ends: tuple[KVView, KVView],
    host_index: Index,
    exact: bool,
    largest: int,
    kind: type[Slice],
) -> list[Slice]:
    """Return the slices of a transfer.

    Args:
        stages: the stages of the whole plan.
        cut: how the transfer is cut.
        ends: the rows of the device, and of the host.
        host_index: the index of the host's rows.
        exact: nothing may lie between the planes of a buffer, of at most ``largest`` bytes.
        kind: of slices.
    """
    rows, host = ends
    offset = host_index.offset
    most = max(each.count for each in cut)
    known: dict[object, Planes] = {}
    slices = []
    for each in cut:
        # If blocks lie outermost, the rows of a buffer do not depend on its length.
        count = each.count if stages.dense.outside else most
        key = each.layers, each.kv, count
        planes = known.get(key)
        if planes is None:
            near = rows.planes(each.layers, each.kv)
            far = host.planes(each.layers, each.kv)
            part = stages.part(near, far)
            inside = Index(offset=offset % part.dense.block_size)
            slots = part.slots(count, inside.offset, exact, largest)
            planes = known[key] = Planes(part, near, far, slots, inside)
        slices.append(kind(planes, each, host_index))
    return slices
