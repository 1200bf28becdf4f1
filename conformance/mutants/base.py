# SPDX-License-Identifier: Apache-2.0
"""The base of all mutants: a small and correct backend, in the style of a real kernel.

It carries out ``plan.nests`` by address, stride and vector, one method for each step of the way,
so that a mutant replaces one step and leaves the rest right. Un-mutated it passes the suite: it is
the control of the experiment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from portakv.backends.base import Backend, Capabilities, Decision, Launch, Pending
from portakv.plan.loops import Loop
from portakv.plan.plan import CopyPlan, Nest, Side
from portakv_conformance.mutants.cells import Int64, load, store

if TYPE_CHECKING:
    from portakv import Index, KVView

Mask = npt.NDArray[np.bool_]
Pair = tuple[Int64, Int64]
_HOST = ("pageable", "pinned")
_WILD = 2**62  # far past the end of any view; an id is clipped to it before it is multiplied


@dataclass(frozen=True)
class Call:
    """What one launch was called with."""

    src: KVView
    dst: KVView
    src_index: Index
    dst_index: Index
    count: int
    stream: torch.Stream | None
    status: torch.Tensor | None


@dataclass(frozen=True)
class Runs:
    """Contiguous pieces of one nest: addresses ``[runs]`` on both sides, bytes and vector."""

    src: Int64
    dst: Int64
    nbytes: int
    vector: int


class HostRows(Backend):
    """Rows moved on the host as a kernel moves them."""

    #: Where a mutant shows its bug: the device and the profile that judge it.
    device_type: ClassVar[str] = "cpu"
    profile: ClassVar[str] = "core"

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls.name = re.sub(r"(?<=.)(?=[A-Z])", "-", cls.__name__).lower()

    name = "host-rows"

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type != cls.device_type:
            why = f"it runs on {cls.device_type}, not on {device.type}"
            return Decision(cls.name, False, why)
        return Decision(cls.name, True, f"it moves rows by address on {device.type}")

    def capabilities(self) -> Capabilities:
        places = frozenset((a, b) for a in _HOST for b in _HOST)
        return Capabilities(places=places, index_on="host", skips_negative=True, guards=True)

    def prepare(self, plan: CopyPlan) -> Launch:
        def launch(
            src: KVView,
            dst: KVView,
            src_index: Index,
            dst_index: Index,
            count: int,
            stream: torch.Stream | None,
            status: torch.Tensor | None,
        ) -> Pending | None:
            return self.carry(plan, Call(src, dst, src_index, dst_index, count, stream, status))

        return launch

    # The steps, in their order

    def carry(self, plan: CopyPlan, call: Call) -> Pending | None:
        """One launch from beginning to end."""
        plan = self.planned(plan, call)
        for runs in self.pieces(plan, call):
            self.move(runs, call)
        return None

    def planned(self, plan: CopyPlan, call: Call) -> CopyPlan:
        """The plan as the kernel understands it."""
        return plan

    def pieces(self, plan: CopyPlan, call: Call) -> list[Runs]:
        """What is to be moved, nest by nest."""
        src, dst = self.pairs(plan, call)
        return [self.expand(nest, plan, call, src, dst) for nest in self.nests(plan)]

    def nests(self, plan: CopyPlan) -> Sequence[Nest]:
        """The nests as the kernel's generator writes them down."""
        return plan.nests

    def units(self, plan: CopyPlan, call: Call) -> int:
        """How many units the grid covers."""
        return call.count // plan.unit

    def pairs(self, plan: CopyPlan, call: Call) -> tuple[Int64, Int64]:
        """The numbers of the units to move, on both sides; the others are skipped or reported."""
        units = self.units(plan, call)
        src = self.numbers(call.src_index, units, plan.unit)
        dst = self.numbers(call.dst_index, units, plan.unit)
        bad = self.bad(src, dst, call.src.slots // plan.unit, call.dst.slots // plan.unit, call)
        if bad.any():
            self.report(np.nonzero(bad)[0], plan.unit, call)
        moved = self.moved(src, dst) & ~bad
        return src[moved], dst[moved]

    def bad(self, src: Int64, dst: Int64, src_end: int, dst_end: int, call: Call) -> Mask:
        """Which units lie past the end of either side."""
        return (src >= src_end) | (dst >= dst_end)

    def moved(self, src: Int64, dst: Int64) -> Mask:
        """Which units are not padding."""
        return (src >= 0) & (dst >= 0)

    def report(self, bad: Int64, unit: int, call: Call) -> None:
        """Name the first of the bad units in the status word."""
        if call.status is not None:
            call.status[0] = int(bad[0]) * unit + 1

    def numbers(self, index: Index, units: int, unit: int) -> Int64:
        """The number of each unit on one side; negative where it is padding."""
        at = np.arange(self.start(index) // unit, self.start(index) // unit + units)
        if index.ids is None:
            return at
        per_id = index.step // unit
        ids = self.ids(index.ids)[at // per_id]
        wide = np.minimum(ids, _WILD // index.step)
        return np.where(ids < 0, ids, wide * per_id + at % per_id)

    def start(self, index: Index) -> int:
        """The position of an index at which a copy begins."""
        return index.offset

    def ids(self, ids: torch.Tensor) -> Int64:
        """The list of ids, as the kernel reads it from memory."""
        return ids.numpy().astype(np.int64)

    def expand(self, nest: Nest, plan: CopyPlan, call: Call, src: Int64, dst: Int64) -> Runs:
        """Units and loops as the addresses of runs."""
        mine = self.offsets(nest, "src", src, call.src_index, plan.unit)
        theirs = self.offsets(nest, "dst", dst, call.dst_index, plan.unit)
        here, there = self.address(call.src, *mine), self.address(call.dst, *theirs)
        return Runs(here, there, nest.run, self.vector(nest, plan, call))

    def offsets(self, nest: Nest, name: str, numbers: Int64, index: Index, unit: int) -> Pair:
        """Table entry, and bytes behind its address, of every run of one side."""
        side: Side = getattr(nest, name)
        entry, byte = self.place(side, numbers)
        if index.ids is None:
            # Only where tokens lie at one stride may a unit begin between two multiples.
            byte = byte + index.offset % unit * (side.units[-1].stride // unit)
        for loop in nest.loops:
            entries, steps = self.walk(loop, name)
            entry = np.add.outer(entry, entries).reshape(-1)
            byte = np.add.outer(byte, steps).reshape(-1)
        return entry, byte

    def place(self, side: Side, numbers: Int64) -> tuple[Int64, Int64]:
        """Table entry and bytes of each unit."""
        entry, byte = np.full_like(numbers, side.table), np.full_like(numbers, side.offset)
        for step in reversed(side.units):
            at = numbers % step.extent if step.extent else numbers
            numbers = numbers // step.extent if step.extent else numbers
            entry, byte = entry + at * step.table, byte + at * step.stride
        return entry, byte

    def walk(self, loop: Loop, name: str) -> tuple[Int64, Int64]:
        """Table entries and bytes of each turn of a loop, on side ``src`` or ``dst``."""
        at = np.arange(loop.extent, dtype=np.int64)
        if name == "src":
            return at * loop.src_table, at * loop.src_stride
        return at * loop.dst_table, at * loop.dst_stride

    def address(self, view: KVView, entry: Int64, byte: Int64) -> Int64:
        """Absolute addresses."""
        return np.asarray(self.table(view)[entry] + byte)

    def table(self, view: KVView) -> Int64:
        """The table of addresses of a view."""
        return view.addresses

    def vector(self, nest: Nest, plan: CopyPlan, call: Call) -> int:
        """The width of one access, in bytes."""
        return nest.vector

    def move(self, runs: Runs, call: Call) -> None:
        """Load every vector, and store it."""
        store(call.dst, runs.dst, self.load(runs, call))

    def load(self, runs: Runs, call: Call) -> npt.NDArray[Any]:
        """The vectors of all runs ``[runs, vectors]``."""
        return load(call.src, runs.src, runs.nbytes, runs.vector)
