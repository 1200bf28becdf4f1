# SPDX-License-Identifier: Apache-2.0
"""Schedules: how a copy across the link is cut into slices that overlap.

A slice should be one run of host memory: a copy engine moves those at the link's full speed, and
rows at a pitch a little slower (D2H, 16 MiB in 64 rows: 0.94 of a plain memcpy on an H200 beside a
gather, against 0.99 in one run). So where planes lie outside the tokens the planes are cut, else
the positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm
from typing import TYPE_CHECKING, NamedTuple

import torch

from portakv.engines.dense import DenseRows, dense_rows
from portakv.engines.pieces import Pieces, to_2d_copies
from portakv.errors import Unsupported
from portakv.plan.plan import CopyPlan
from portakv.registry.prepared import Prepared, prepared
from portakv.view.index import Index

if TYPE_CHECKING:
    from portakv.registry.registry import Choice
    from portakv.view.form import Form
    from portakv.view.view import KVView

#: Bytes of the largest slice of `staged`, and of the smallest. Only at one end of a transfer is the
#: link idle (the first gather, the last scatter), so slices grow from there, each by `GROWTH`. Of
#: 8, 16 and 32 MiB the largest lose least to the gaps between slices (H200).
LARGEST, SMALLEST, GROWTH = 32 << 20, 4 << 20, 4
#: Buffers that are under way at once: one is filled or emptied while the other crosses. Four if the
#: next transfer does not wait for the end of the last: one is half drained by then, three are 96
#: MiB. A persistent matmul lets a gather in only between two of its kernels, every 1.6 ms, in which
#: the link of an H200 moves 85 MiB.
RING, DETACHED_RING = 2, 4
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
    """Those of `staged`; where the link is not ``idle`` all are as large as they can be, as nothing
    waits for the first of them, and a model that leaves little room is asked for it least often."""
    return Sizes(WHOLE, SMALLEST if idle else LARGEST, LARGEST)


def cuts(
    form: Form,
    outside: tuple[str, ...],
    count: int,
    quantum: int,
    rising: bool,
    sizes: Sizes,
) -> list[Cut]:
    """Cut ``count`` positions of a form into slices, in the order in which they should be moved.

    Args:
        form: of the host's rows.
        outside: which of ``kv`` and ``layer`` lie outside the positions in memory, outermost first.
        count: positions.
        quantum: every slice but the last along the positions is a multiple of it.
        rising: small slices first; else last.
        sizes: of the slices.
    """
    if form.token_bytes // _page(form) * count <= sizes.whole:
        return [Cut(None, None, 0, count)]
    found: list[Cut] = []
    target, largest = sizes.smallest, sizes.largest
    for kv, layers, atom in _planes(form, outside, count, largest):
        at = 0
        while at < layers:
            # Powers of two: for each number of layers there is a plan, and perhaps a kernel.
            n = 1 << (min(max(1, target // atom), layers - at).bit_length() - 1)
            if "layer" not in outside:
                n = layers
            if "layer" in outside and atom <= largest:
                found.append(Cut((at, at + n), kv, 0, count))
            else:
                found += _positions((at, at + n), kv, count, quantum, n * atom, target, largest)
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
    if "layer" not in outside:
        if "kv" not in outside:
            return [(None, form.layers, plane * form.kv)]
        return [((k, k + 1), form.layers, plane) for k in range(form.kv)]
    if outside[0] == "kv" or (len(outside) == 2 and plane * form.kv > largest):
        return [((k, k + 1), form.layers, plane) for k in range(form.kv)]
    return [(None, form.layers, plane * form.kv)]


def _page(form: Form) -> int:
    return form.block_size if form.opaque else 1


def _positions(
    layers: tuple[int, int],
    kv: tuple[int, int] | None,
    count: int,
    quantum: int,
    nbytes: int,
    target: int,
    largest: int,
) -> list[Cut]:
    """Cut the positions of some layers, of ``nbytes`` in all, into slices that grow."""
    found, start = [], 0
    while start < count:
        taken = min(multiple(target, quantum, nbytes / count), count - start)
        found.append(Cut(layers, kv, start, taken))
        start += taken
        target = min(target * GROWTH, largest)
    return found


def capacity(count: int, quantum: int, token_bytes: float, largest: int | None = None) -> int:
    """Positions of a mirror that holds any slice of at most ``count`` positions, and if that is
    less no more than ``largest`` bytes (None: `LARGEST`).

    One of few numbers, so that transfers of any length share forms and with them plans.
    """
    held, most = quantum, multiple(LARGEST if largest is None else largest, quantum, token_bytes)
    while held < count:
        held *= 2
    return max(min(held, most), -(-count // quantum) * quantum)


def multiple(nbytes: int, quantum: int, token_bytes: float) -> int:
    """Positions of about so many bytes: a multiple of the quantum, at least one."""
    return max(1, int(nbytes / (quantum * max(1, token_bytes)))) * quantum


_FRONT = Index()


class TwoStages:
    """Both halves of a plan.

    Args:
        plan: between a device and the host.
        mirror: how its mirrors lie.
        half: what carries out the device's half.

    Attributes:
        downward: from the device to the host.
        quantum: slices along the positions are multiples of it, but for the last.
    """

    def __init__(self, plan: CopyPlan, mirror: DenseRows, half: Choice) -> None:
        self.plan, self.mirror = plan, mirror
        self.downward = plan.src.place == "device"
        self.quantum = lcm(plan.unit, mirror.block_size)
        self._half = half
        self._ways: dict[int, tuple[Prepared, CopyPlan]] = {}

    def prepare(self, device: torch.device) -> None:
        """Prepare the device's half; raises `Unsupported` where nobody takes it."""
        held = self.held(1, 0, False)
        buffer = torch.empty(self.mirror.nbytes(held), dtype=torch.uint8, device=device)
        self.ways(self.mirror.view(buffer, held), held)

    def held(self, count: int, first: int, exactly: bool, largest: int | None = None) -> int:
        """Slots of a mirror for ``count`` positions of which the ``first`` may stand inside a
        block; exactly so many where nothing is to lie between its planes. No more than ``largest``
        bytes (by default those of `staged`), but for one block, or one more where one is cut."""
        block = self.mirror.block_size
        if exactly and block == 1:
            return count
        held = capacity(count, self.quantum, self.plan.token_bytes, largest)
        return held + (block if first % block else 0)

    def ways(self, mirror: KVView, held: int) -> tuple[Prepared, CopyPlan]:
        """The route between the device's rows and a mirror, and the plan of its other side."""
        known = self._ways.get(held)
        if known is None:
            plan, unit = self.plan, self.plan.unit
            if self.downward:
                way = prepared(plan.src, mirror.form, plan.src_step, 0, unit, self._half)
                link = CopyPlan(mirror.form, plan.dst, 0, plan.dst_step, unit)
            else:
                way = prepared(mirror.form, plan.dst, 0, plan.dst_step, unit, self._half)
                link = CopyPlan(plan.src, mirror.form, plan.src_step, 0, unit)
            known = self._ways[held] = way, link
        return known

    def behind(self, index: Index) -> Index:
        """Where rows lie in a mirror: as far into a block as they do on the host."""
        block = self.mirror.block_size
        return _FRONT if block == 1 else Index(offset=index.offset % block)

    def pieces(
        self, link: CopyPlan, host: KVView, mirror: KVView, index: Index, count: int, below: int
    ) -> Pieces:
        """What has to cross between a mirror and the host; ``below`` as in `to_2d_copies`."""
        behind = self.behind(index)
        if self.downward:
            return to_2d_copies(link.runs(mirror, host, behind, index, count), mirror, host, below)
        return to_2d_copies(link.runs(host, mirror, index, behind, count), host, mirror, below)


class StagesByCut:
    """The halves of a plan, ``whole`` and for the planes of its slices.

    Args:
        plan: between a device and the host.
        by_layer: mirrors lie layer by layer instead of as the host's rows do.
        half: what carries out the device's half.
    """

    def __init__(self, plan: CopyPlan, by_layer: bool, half: Choice) -> None:
        self._plan, self._by_layer, self._half = plan, by_layer, half
        self.whole = self._of(plan)
        self._known: dict[tuple[object, ...], TwoStages] = {}

    def of(self, rows: KVView, host: KVView, cut: Cut) -> TwoStages:
        """The halves for a slice, of views that show only its planes."""
        if cut.layers is None and cut.kv is None:
            return self.whole
        key = rows.form, host.form
        known = self._known.get(key)
        if known is None:
            src, dst = key if self.whole.downward else key[::-1]
            steps = self._plan.src_step, self._plan.dst_step
            known = self._known[key] = self._of(CopyPlan(src, dst, *steps, self._plan.unit))
        return known

    def _of(self, plan: CopyPlan) -> TwoStages:
        host = plan.dst if plan.src.place == "device" else plan.src
        return TwoStages(plan, dense_rows(host, self._by_layer), self._half)


def in_either_order(plan: CopyPlan, half: Choice, device: torch.device) -> StagesByCut:
    """The halves of a plan, prepared: their mirrors lie as the host's rows do, else layer by layer.

    Raises:
        Unsupported: nobody takes either; why not the second.
    """
    try:
        halves = StagesByCut(plan, False, half)
        halves.whole.prepare(device)
    except Unsupported:
        halves = StagesByCut(plan, True, half)
        halves.whole.prepare(device)
    return halves
