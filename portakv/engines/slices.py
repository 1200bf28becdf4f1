# SPDX-License-Identifier: Apache-2.0
"""Slices: how a copy across the link is cut for engines, so that its two stages overlap.

A slice should be one run of host memory: a copy engine moves those at the link's full speed, and
rows at a pitch a little slower (D2H, 16 MiB in 64 rows: 0.94 of a plain memcpy on an H200 beside a
gather, against 0.99 in one run). So where planes lie outside the tokens the planes are cut, else
the positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import lcm
from typing import TYPE_CHECKING, NamedTuple

import torch

from portakv.engines.pieces import Pieces, to_2d_copies
from portakv.engines.staging import DenseRows, dense_rows
from portakv.errors import Unsupported
from portakv.plan.plan import CopyPlan
from portakv.registry.prepared import Prepared, prepared
from portakv.runtime.bounded import Bounded
from portakv.view.index import Index

if TYPE_CHECKING:
    from portakv.registry.registry import Choice
    from portakv.view.form import Form
    from portakv.view.view import KVView

#: Bytes of the largest slice of `staged`, and of the smallest. Only at one end of a transfer is the
#: link idle (the first gather, the last scatter), so slices grow from there, each by `GROWTH`. Of
#: 8, 16 and 32 MiB the largest lose least to the gaps between slices (H200).
LARGEST, SMALLEST, GROWTH = 32 << 20, 4 << 20, 4
#: Bytes up to which a transfer of `staged` is one slice: a gather of 16 MiB takes 10 us, no more
#: than what the events and the gap of another slice cost.
WHOLE = 16 << 20


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


def staged_sizes(idle: bool) -> Sizes:
    """Those of `staged`; if the link is not ``idle`` all are as large as they can be, as nothing
    waits for the first of them, and a model that leaves little room is asked for it least often."""
    return Sizes(WHOLE, SMALLEST if idle else LARGEST, LARGEST)


def cuts(
    form: Form, outside: tuple[str, ...], count: int, quantum: int, rising: bool, sizes: Sizes
) -> list[Cut]:
    """Cut ``count`` positions of the host's form into slices, in the order in which they should be
    moved.

    Args:
        outside: which of ``kv`` and ``layer`` lie outside the positions in memory, outermost first.
        quantum: every slice but the last along the positions is a multiple of it.
        rising: small slices first; else last.
    """
    if form.token_bytes // _page(form) * count <= sizes.whole:
        return [Cut(None, None, 0, count)]
    found: list[Cut] = []
    target, largest = sizes.smallest, sizes.largest
    for kv, layers, atom in _planes(form, outside, count, largest):
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
    form: Form, outside: tuple[str, ...], count: int, largest: int
) -> list[tuple[tuple[int, int] | None, int, int]]:
    """Which kv, how many layers, and bytes of one of these layers, outermost first."""
    plane = form.token_bytes // (form.layers * form.kv) * count // _page(form)
    if outside[:1] == ("kv",) or (len(outside) == 2 and plane * form.kv > largest):
        return [((k, k + 1), form.layers, plane) for k in range(form.kv)]
    return [(None, form.layers, plane * form.kv)]


def _page(form: Form) -> int:
    return form.block_size if form.opaque else 1


def _positions(cut: Cut, quantum: int, nbytes: int, target: int, largest: int) -> list[Cut]:
    """Cut the positions of some planes, of ``nbytes`` in all, into slices that grow."""
    found, start = [], 0
    while start < cut.count:
        taken = min(multiple(target, quantum, nbytes / cut.count), cut.count - start)
        found.append(replace(cut, start=start, count=taken))
        start += taken
        target = min(target * GROWTH, largest)
    return found


def multiple(nbytes: int, quantum: int, token_bytes: float) -> int:
    """Positions of about so many bytes: a multiple of the quantum, at least one."""
    return max(1, int(nbytes / (quantum * max(1, token_bytes)))) * quantum


_FRONT = Index()
_KEPT = 64  # lengths of which a view of rows remembers the slices


class TwoStages:
    """Both stages of a plan: between the device's rows and dense ones, by ``half``, and across the
    link. Slices along the positions are multiples of ``quantum``, but for the last."""

    def __init__(self, plan: CopyPlan, dense: DenseRows, half: Choice) -> None:
        self.plan, self.dense = plan, dense
        self.downward = plan.src.place == "device"
        self.quantum = lcm(plan.unit, dense.block_size)
        self._half = half
        self._made: Bounded[int, tuple[Prepared, CopyPlan]] = Bounded("stages of slices", 64)

    def held(self, count: int, first: int, exactly: bool, largest: int) -> int:
        """Slots of a buffer for ``count`` positions of which the ``first`` may stand inside a
        block; exactly so many if nothing is to lie between its planes. Else one of few numbers, so
        that transfers of any length share forms and with them plans: no more than ``largest`` bytes
        but for one block, or one more if one is cut."""
        block, quantum = self.dense.block_size, self.quantum
        if exactly and block == 1:
            return count
        held = quantum
        most = multiple(largest, quantum, self.plan.token_bytes)
        while held < count:
            held *= 2
        held = max(min(held, most), -(-count // quantum) * quantum)
        return held + (block if first % block else 0)

    def of(self, dense: KVView, held: int) -> tuple[Prepared, CopyPlan]:
        """The stage on the device, prepared for buffers of so many slots, and the other's plan."""
        known = self._made.get(held)
        if known is None:
            plan, form = self.plan, dense.form
            ends = (plan.src, form, plan.src_step, 0), (form, plan.dst, 0, plan.dst_step)
            stage, link = ends if self.downward else ends[::-1]
            made = prepared(*stage, plan.unit, self._half)
            known = self._made[held] = made, CopyPlan(*link, plan.unit)
        return known

    def behind(self, index: Index) -> Index:
        """Where rows lie in a buffer: as far into a block as they do on the host."""
        block = self.dense.block_size
        return _FRONT if block == 1 else Index(offset=index.offset % block)


class StagesByCut:
    """The stages of a plan, ``whole`` and for the planes of its slices; prepared.

    Raises:
        Unsupported: no backend takes dense rows as the host has them, nor layer by layer; why not
            the second.
    """

    def __init__(self, plan: CopyPlan, half: Choice, device: torch.device) -> None:
        self._plan, self._half, self._by_layer = plan, half, False
        self._known: dict[tuple[Form, Form], TwoStages] = {}
        try:
            self.whole = self._prepared(device)
        except Unsupported:
            self._by_layer = True
            self.whole = self._prepared(device)

    def of(self, rows: KVView, host: KVView, cut: Cut) -> TwoStages:
        """The stages of a slice, of views that show only its planes."""
        if cut.layers is None and cut.kv is None:
            return self.whole
        key = rows.form, host.form
        known = self._known.get(key)
        if known is None:
            src, dst = key if self.whole.downward else key[::-1]
            steps = self._plan.src_step, self._plan.dst_step
            known = self._known[key] = self._of(CopyPlan(src, dst, *steps, self._plan.unit))
        return known

    def _prepared(self, device: torch.device) -> TwoStages:
        """The stages of the whole plan, with the one on the device prepared."""
        whole = self._of(self._plan)
        held = whole.held(1, 0, False, LARGEST)
        buffer = torch.empty(whole.dense.nbytes(held), dtype=torch.uint8, device=device)
        whole.of(whole.dense.view(buffer, held), held)
        return whole

    def _of(self, plan: CopyPlan) -> TwoStages:
        host = plan.dst if plan.src.place == "device" else plan.src
        return TwoStages(plan, dense_rows(host, self._by_layer), self._half)


class Slice:
    """A slice of a transfer, with everything settled that does not change with the host's memory:
    its planes, where they lie in a dense buffer on the device, and the device's stage of it.

    Args:
        stages: of the whole plan.
        rows, host: views of all planes.
        theirs: the index of all of the host's rows, with ids on the host.
        exactly: nothing may lie between the planes of a buffer, of at most ``largest`` bytes.

    Attributes:
        rows, theirs: the device's planes, and the index of its own rows on the host.
        dense, held, behind: how rows lie in a buffer, how many it holds, and where they begin.
    """

    def __init__(
        self,
        stages: StagesByCut,
        cut: Cut,
        rows: KVView,
        host: KVView,
        theirs: Index,
        exactly: bool,
        largest: int,
    ) -> None:
        self.cut, self.rows = cut, rows.planes(cut.layers, cut.kv)
        self.stages = stages.of(self.rows, host.planes(cut.layers, cut.kv), cut)
        self.theirs = theirs.shifted(cut.start)
        self.dense, self.behind = self.stages.dense, self.stages.behind(self.theirs)
        self.held = self.stages.held(cut.count, self.theirs.offset, exactly, largest)
        self.nbytes = self.dense.nbytes(self.held)
        self._prepared: Prepared | None = None
        # For a buffer and host memory at these addresses.
        self._settled: tuple[int, int, Pieces] | None = None

    def prepared(self, dense: KVView) -> Prepared:
        """The device's stage, for buffers of this slice's."""
        if self._prepared is None:
            self._prepared = self.stages.of(dense, self.held)[0]
        return self._prepared

    def pieces(self, dense: KVView, host: KVView, fold_below: int) -> Pieces:
        """What has to cross between a buffer and the host's rows, where these lie; settled when it
        is first asked for, so that the slices before this one are under way by then."""
        settled = self._settled
        if settled is None:
            src, dst = dense, host.planes(self.cut.layers, self.cut.kv)
            mine, theirs = self.behind, self.theirs
            if not self.stages.downward:
                src, dst, mine, theirs = dst, src, theirs, mine
            link = self.stages.of(dense, self.held)[1]
            runs = link.runs(src, dst, mine, theirs, self.cut.count)
            made = to_2d_copies(runs, src, dst, fold_below)
            # At once: other threads may look.
            settled = self._settled = dense.origins[0], host.origins[0], made
        there, here = dense.origins[0] - settled[0], host.origins[0] - settled[1]
        known = settled[2]
        src_moved, dst_moved = (there, here) if self.stages.downward else (here, there)
        if not dst_moved and not src_moved:
            return known
        return known._replace(dst=known.dst + dst_moved, src=known.src + src_moved)


def kept_slices(
    launch: object, rows: KVView, key: tuple[object, ...], make: Callable[[], list[Slice]]
) -> list[Slice]:
    """The slices that a view of rows keeps for a launch under a key, made if there are none."""
    kept: Bounded[tuple[object, ...], list[Slice]] | None = rows.derived.get(launch)
    if kept is None:
        kept = rows.derived.setdefault(launch, Bounded("slices of transfers", _KEPT))
    return kept.get_or_make(key, make)
