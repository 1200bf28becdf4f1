# SPDX-License-Identifier: Apache-2.0
"""`ring`: between a device and pageable memory, through pinned memory that is used in turns.

A device cannot read or write pageable memory beside the host. So each slice crosses to or from
pinned memory as `staged` has it, and the host copies between that and the rows while the next slice
crosses. The host is busy until all has landed: a copy through this engine blocks.
"""

from __future__ import annotations

import threading
from functools import cache
from math import lcm
from typing import TYPE_CHECKING

import torch

from ...backends.base import Capabilities, Launch
from ...index import Index
from ...plan import CopyPlan
from ...registry import REGISTRY
from ...routes import route
from .. import pinned
from .engine import PAGEABLE, Engine
from .mirror import mirror_of
from .schedule import Cut, multiple
from .staged import Staged

if TYPE_CHECKING:
    from ...view import KVView

#: Bytes of a slice, and slices of pinned memory for each device: while the host copies one, another
#: crosses. Defaults, to be measured.
SLICE, TURNS = 8 << 20, 3


class Ring(Engine):
    """Pinned memory in turns, between `staged` and the host's own copies."""

    name = "ring"

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PAGEABLE, index_on="any")

    def prepare(self, plan: CopyPlan) -> Launch:
        return _RingLaunch(plan, self)


class _Turns:
    """The pinned memory of one device; one transfer at a time has it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._memory: list[torch.Tensor] = []

    def of(self, nbytes: int) -> list[torch.Tensor]:
        """Pieces of at least so many bytes."""
        if not self._memory or self._memory[0].numel() < nbytes:
            self._memory = [pinned.empty(nbytes, torch.uint8) for _ in range(TURNS)]
        return self._memory


@cache
def _turns(device: torch.device) -> _Turns:
    return _Turns()


class _RingLaunch:
    def __init__(self, plan: CopyPlan, engine: Engine) -> None:
        self._device = engine.device
        self._downward = plan.src.place == "device"
        host = plan.dst if self._downward else plan.src
        self._mirror = mirror_of(host)
        quantum = lcm(plan.unit, self._mirror.block_size)
        self._positions = multiple(SLICE, quantum, plan.token_bytes)
        block = self._mirror.block_size
        self._held = self._positions + (block if block > 1 else 0)
        self._turns = _turns(self._device)
        form = self._views()[0].form
        # The host's half is the reference's, whatever was forced for the device.
        on_host = REGISTRY.choose_plainly(torch.device("cpu"), "reference")
        staged = Staged(self._device, engine.half, engine.terms)
        if self._downward:
            self._link = staged.prepare(CopyPlan(plan.src, form, plan.src_step, 0, plan.unit))
            self._way = route(form, plan.dst, 0, plan.dst_step, plan.unit, on_host)
        else:
            self._way = route(plan.src, form, plan.src_step, 0, plan.unit, on_host)
            self._link = staged.prepare(CopyPlan(form, plan.dst, 0, plan.dst_step, plan.unit))

    def _views(self) -> list[KVView]:
        nbytes = self._mirror.nbytes(self._held)
        return [self._mirror.view(memory, self._held) for memory in self._turns.of(nbytes)]

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> None:
        work = stream or torch.accelerator.current_stream(self._device.index)
        most = self._positions
        slices = [Cut(None, None, at, min(most, count - at)) for at in range(0, count, most)]
        with self._turns.lock:
            if self._downward:
                self._take(slices, src, dst, src_index, dst_index.to_host(), work)
            else:
                self._bring(slices, src, dst, src_index.to_host(), dst_index, work)

    def _take(
        self,
        slices: list[Cut],
        src: KVView,
        dst: KVView,
        mine: Index,
        theirs: Index,
        work: torch.Stream,
    ) -> None:
        """From the device: each slice is laid out by the host while the next ones cross."""
        views = self._views()
        crossing: list[tuple[Cut, KVView, torch.Event]] = []
        try:
            for nth, cut in enumerate(slices):
                if len(crossing) == len(views):
                    self._lay_out(*crossing.pop(0), dst, theirs)
                view, behind = views[nth % len(views)], self._behind(theirs, cut)
                self._link(src, view, mine.shifted(cut.start), behind, cut.count, work, None)
                crossing.append((cut, view, self._mark(work)))
            while crossing:
                self._lay_out(*crossing.pop(0), dst, theirs)
        finally:
            _settle([event for _, _, event in crossing])

    def _lay_out(
        self, cut: Cut, view: KVView, event: torch.Event, dst: KVView, theirs: Index
    ) -> None:
        event.synchronize()
        here, behind = theirs.shifted(cut.start), self._behind(theirs, cut)
        self._way.launch(view, dst, behind, here, cut.count, None, None)

    def _bring(
        self,
        slices: list[Cut],
        src: KVView,
        dst: KVView,
        theirs: Index,
        mine: Index,
        work: torch.Stream,
    ) -> None:
        """To the device: the host packs a slice while those before it cross."""
        views = self._views()
        events: list[torch.Event] = []
        try:
            for nth, cut in enumerate(slices):
                if nth >= len(views):
                    events[nth - len(views)].synchronize()
                view, behind = views[nth % len(views)], self._behind(theirs, cut)
                here = theirs.shifted(cut.start)
                self._way.launch(src, view, here, behind, cut.count, None, None)
                self._link(view, dst, behind, mine.shifted(cut.start), cut.count, work, None)
                events.append(self._mark(work))
        finally:
            _settle(events)

    def _behind(self, theirs: Index, cut: Cut) -> Index:
        """Where a slice lies in pinned memory: as far into a block as it does in the rows."""
        return Index(offset=(theirs.offset + cut.start) % self._mirror.block_size)

    def _mark(self, stream: torch.Stream) -> torch.Event:
        event = torch.Event(self._device)
        event.record(stream)
        return event


def _settle(events: list[torch.Event]) -> None:
    """Wait for what still uses the pinned memory, before the next transfer has it."""
    for event in events:
        event.synchronize()
