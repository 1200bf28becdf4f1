# SPDX-License-Identifier: Apache-2.0
"""Slices: how a copy across the link is cut for strategies, so that its two stages overlap.

A slice should be one run of host memory: a copy engine moves those at the link's full speed, and
rows at a pitch a little slower (D2H, 16 MiB in 64 rows: 0.94 of a plain memcpy on an H200 beside a
gather, against 0.99 in one run). So if planes lie outside the tokens the planes are cut, else
the positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm
from typing import NamedTuple

import torch

from portakv.errors import Unsupported
from portakv.interconnect.pieces import Pieces, to_2d_copies
from portakv.interconnect.staging import Order, dense_rows
from portakv.plan.plan import CopyPlan
from portakv.registry.prepared import Prepared, prepared
from portakv.registry.registry import Choice
from portakv.runtime.bounded import Bounded
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

#: Each slice is so many times as long as the one before it: only at one end of a transfer is the
#: link idle (the first gather, the last scatter).
GROWTH = 4


@dataclass(frozen=True, slots=True)
class Cut:
    """A slice: which layers and kv (None: all), the first position, and how many."""

    layers: tuple[int, int] | None
    kv: tuple[int, int] | None
    start: int
    count: int


class Sizes(NamedTuple):
    """Bytes of slices: up to which a transfer is one, of the first, and of the largest."""

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
    found: list[Cut] = []
    target = sizes.smallest
    largest = sizes.largest
    for kv, layers, atom in _planes(form, outside, nbytes, largest):
        at = 0
        while at < layers:
            n = layers
            if "layer" in outside:
                # Powers of two: for each number of layers there is a plan, and perhaps a kernel.
                n = 1 << (min(max(1, target // atom), layers - at).bit_length() - 1)
            cut = Cut((at, at + n), kv, 0, count)
            if "layer" in outside and atom <= largest:
                found.append(cut)
            else:
                found += _positions(cut, quantum, n * atom, target, largest)
            at += n
            target = min(target * GROWTH, largest)
    if not outside:
        found = [replace(cut, layers=None) for cut in found]
    return found if rising else found[::-1]


def _planes(
    form: Form, outside: tuple[str, ...], nbytes: int, largest: int
) -> list[tuple[tuple[int, int] | None, int, int]]:
    """Which kv, how many layers, and bytes of one of these layers, outermost first."""
    layer = nbytes // form.layers
    if outside[:1] == ("kv",) or (len(outside) == 2 and layer > largest):
        return [((k, k + 1), form.layers, layer // form.kv) for k in range(form.kv)]
    return [(None, form.layers, layer)]


def _positions(cut: Cut, quantum: int, nbytes: int, target: int, largest: int) -> list[Cut]:
    """Cut the positions of some planes, of ``nbytes`` in all, into slices that grow."""
    found = []
    start = 0
    while start < cut.count:
        taken = min(multiple(target, quantum, nbytes / cut.count), cut.count - start)
        found.append(replace(cut, start=start, count=taken))
        start += taken
        target = min(target * GROWTH, largest)
    return found


def multiple(nbytes: int, quantum: int, token_bytes: float) -> int:
    """Positions of about so many bytes: a multiple of the quantum, at least one."""
    return max(1, int(nbytes / (quantum * max(1, token_bytes)))) * quantum


class Stages:
    """Both stages of a plan: the device's rows to or from dense ones, by ``half``, and the link.

    Attributes:
        dense: how dense rows lie, in an ``order`` of the host's form.
        quantum: slices along the positions are multiples of it, but for the last.
    """

    def __init__(self, plan: CopyPlan, half: Choice, order: Order) -> None:
        self.plan = plan
        self.downward = plan.src.place == "device"
        self.dense = dense_rows(plan.dst if self.downward else plan.src, order)
        self.quantum = lcm(plan.unit, self.dense.block_size)
        self._half = half
        self._order = order
        self._made: Bounded[int, tuple[Prepared, CopyPlan]] = Bounded("stages of slices", 64)
        self._parts: dict[tuple[Form, Form], Stages] = {}

    @classmethod
    def tried(cls, plan: CopyPlan, half: Choice, device: torch.device, order: Order) -> Stages:
        """The stages of a plan, with the one on the device prepared.

        Raises:
            Unsupported: no backend takes dense rows in that order, nor layer by layer; why not the
                second.
        """
        made = cls(plan, half, order)
        try:
            made._try(device)
        except Unsupported:
            made = cls(plan, half, "layer")
            made._try(device)
        return made

    def _try(self, device: torch.device) -> None:
        held = self.quantum
        room = torch.empty(self.dense.nbytes(held), dtype=torch.uint8, device=device)
        self.of(self.dense.view(room, held), held)

    def part(self, rows: KVView, host: KVView) -> Stages:
        """The stages of views that show all planes, or some."""
        forms = (rows.form, host.form)
        plan = self.plan
        src, dst = forms if self.downward else forms[::-1]
        if (src, dst) == (plan.src, plan.dst):
            return self
        if forms not in self._parts:
            part = CopyPlan(src, dst, plan.src_step, plan.dst_step, plan.unit)
            self._parts[forms] = Stages(part, self._half, self._order)
        return self._parts[forms]

    def held(self, count: int, first: int, exactly: bool, largest: int) -> int:
        """Slots of a buffer for ``count`` positions of which the first stands at slot ``first`` of
        a block; exactly so many if nothing is to lie between its planes. Else one of few numbers,
        so that transfers of any length share forms and with them plans: no more than ``largest``
        bytes but for one block, or one more if one is cut."""
        block = self.dense.block_size
        quantum = self.quantum
        if exactly and block == 1:
            return count
        held = quantum
        most = multiple(largest, quantum, self.plan.token_bytes)
        while held < count:
            held *= 2
        held = max(min(held, most), -(-count // quantum) * quantum)
        return held + (block if first else 0)

    def of(self, dense: KVView, held: int) -> tuple[Prepared, CopyPlan]:
        """The stage on the device, prepared for buffers of so many slots, and the other's plan."""
        known = self._made.get(held)
        if known is None:
            plan = self.plan
            form = dense.form
            ends = (plan.src, form, plan.src_step, 0), (form, plan.dst, 0, plan.dst_step)
            stage, link = ends if self.downward else ends[::-1]
            made = prepared(*stage, plan.unit, self._half)
            known = self._made[held] = made, CopyPlan(*link, plan.unit)
        return known


class Slice:
    """A slice of a transfer, with everything settled that does not change with the host's memory.

    Args:
        stages: of the whole plan.
        rows, host: views of all planes.
        theirs: the index of all of the host's rows, with ids on the host.
        exactly: nothing may lie between the planes of a buffer, of at most ``largest`` bytes.

    Attributes:
        rows, theirs: the device's planes, and the index of its own rows on the host.
        dense, held, behind: how rows lie in a buffer, how many it holds, and where they begin: as
            far into a block as they do on the host.
    """

    def __init__(
        self,
        stages: Stages,
        cut: Cut,
        rows: KVView,
        host: KVView,
        theirs: Index,
        exactly: bool,
        largest: int,
    ) -> None:
        self.cut = cut
        self.rows = rows.planes(cut.layers, cut.kv)
        self.stages = stages.part(self.rows, host.planes(cut.layers, cut.kv))
        self.theirs = theirs.shifted(cut.start)
        self.dense = self.stages.dense
        self.behind = Index(offset=self.theirs.offset % self.dense.block_size)
        self.held = self.stages.held(cut.count, self.behind.offset, exactly, largest)
        self.nbytes = self.dense.nbytes(self.held)
        # Of a buffer and host memory at these addresses.
        self._settled: tuple[tuple[int, int], Pieces] | None = None

    def prepared(self, dense: KVView) -> Prepared:
        """The device's stage, for buffers of this slice's."""
        return self.stages.of(dense, self.held)[0]

    def pieces(self, dense: KVView, host: KVView, fold_below: int) -> Pieces:
        """What has to cross between a buffer and the host's memory, where these lie; settled when
        it is first asked for, so that the slices before this one are under way by then."""
        ends = (dense.origins[0], host.origins[0])
        settled = self._settled
        if settled is None:
            # At once: other threads may look.
            settled = self._settled = ends, self.crossing(dense, host, fold_below)
        if ends == settled[0]:
            return settled[1]
        moved = [now - then for now, then in zip(ends, settled[0], strict=True)]
        src, dst = moved if self.stages.downward else moved[::-1]
        return settled[1]._replace(dst=settled[1].dst + dst, src=settled[1].src + src)

    def crossing(self, dense: KVView, host: KVView, fold_below: int) -> Pieces:
        """The pieces between a buffer and the host's rows."""
        planes = host.planes(self.cut.layers, self.cut.kv)
        link = self.stages.of(dense, self.held)[1]
        count = self.cut.count
        if self.stages.downward:
            runs = link.runs(dense, planes, self.behind, self.theirs, count)
            return to_2d_copies(runs, dense, planes, fold_below)
        runs = link.runs(planes, dense, self.theirs, self.behind, count)
        return to_2d_copies(runs, planes, dense, fold_below)


def kept_slices(rows: KVView, launch: object) -> Bounded[tuple[object, ...], list[Slice]]:
    """The slices of transfers of some kinds that a view of rows keeps for a launch."""
    kept: Bounded[tuple[object, ...], list[Slice]] | None = rows.derived.get(launch)
    if kept is None:
        kept = rows.derived.setdefault(launch, Bounded("slices of transfers", 64))
    return kept
