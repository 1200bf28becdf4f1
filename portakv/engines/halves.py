# SPDX-License-Identifier: Apache-2.0
"""The halves of a copy across the link: inside the device, and between a mirror and the host."""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING

import torch

from portakv.engines.dense import Mirror, mirror_of
from portakv.engines.link import fold
from portakv.engines.pieces import Pieces
from portakv.engines.slices import Cut, capacity
from portakv.errors import Unsupported
from portakv.plan.plan import CopyPlan
from portakv.registry.prepared import Route, route
from portakv.view.index import Index

if TYPE_CHECKING:
    from portakv.registry.registry import Choice
    from portakv.view.view import KVView

_FRONT = Index()


class Halves:
    """Both halves of a plan.

    Args:
        plan: between a device and the host.
        mirror: how its mirrors lie.
        half: what carries out the device's half.

    Attributes:
        downward: from the device to the host.
        quantum: slices along the positions are multiples of it, but for the last.
    """

    def __init__(self, plan: CopyPlan, mirror: Mirror, half: Choice) -> None:
        self.plan, self.mirror = plan, mirror
        self.downward = plan.src.place == "device"
        self.quantum = lcm(plan.unit, mirror.block_size)
        self._half = half
        self._ways: dict[int, tuple[Route, CopyPlan]] = {}

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

    def ways(self, mirror: KVView, held: int) -> tuple[Route, CopyPlan]:
        """The route between the device's rows and a mirror, and the plan of its other side."""
        known = self._ways.get(held)
        if known is None:
            plan, unit = self.plan, self.plan.unit
            if self.downward:
                way = route(plan.src, mirror.form, plan.src_step, 0, unit, self._half)
                link = CopyPlan(mirror.form, plan.dst, 0, plan.dst_step, unit)
            else:
                way = route(mirror.form, plan.dst, 0, plan.dst_step, unit, self._half)
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
        """What has to cross between a mirror and the host; ``below`` as in `fold`."""
        behind = self.behind(index)
        if self.downward:
            return fold(link.runs(mirror, host, behind, index, count), mirror, host, below)
        return fold(link.runs(host, mirror, index, behind, count), host, mirror, below)


class CutHalves:
    """The halves of a plan, ``whole`` and for the planes of its slices.

    Args:
        plan: between a device and the host.
        by_layer: mirrors lie layer by layer instead of as the host's rows do.
        half: what carries out the device's half.
    """

    def __init__(self, plan: CopyPlan, by_layer: bool, half: Choice) -> None:
        self._plan, self._by_layer, self._half = plan, by_layer, half
        self.whole = self._of(plan)
        self._known: dict[tuple[object, ...], Halves] = {}

    def of(self, rows: KVView, host: KVView, cut: Cut) -> Halves:
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

    def _of(self, plan: CopyPlan) -> Halves:
        host = plan.dst if plan.src.place == "device" else plan.src
        return Halves(plan, mirror_of(host, self._by_layer), self._half)


def sliced(view: KVView, cut: Cut) -> KVView:
    """The planes of a slice, as a view that is made once."""
    if cut.layers is None and cut.kv is None:
        return view
    key = "planes", cut.layers, cut.kv
    known: KVView | None = view.kept.get(key)
    if known is None:
        layers, kv = (None if ends is None else slice(*ends) for ends in (cut.layers, cut.kv))
        known = view.kept[key] = view.slice(layers=layers, kv=kv)
    return known


def in_either_order(plan: CopyPlan, half: Choice, device: torch.device) -> CutHalves:
    """The halves of a plan, prepared: their mirrors lie as the host's rows do, else layer by layer.

    Raises:
        Unsupported: nobody takes either; why not the second.
    """
    try:
        halves = CutHalves(plan, False, half)
        halves.whole.prepare(device)
    except Unsupported:
        halves = CutHalves(plan, True, half)
        halves.whole.prepare(device)
    return halves
