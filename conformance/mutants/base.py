# SPDX-License-Identifier: Apache-2.0
"""The base of all mutants: a small and correct backend, in the style of a real kernel. It carries
out ``plan.nests`` by address, stride and vector, one method for each step of the way, of which a
mutant replaces one. Un-mutated it passes the suite: it is the control of the experiment."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.backends.base import Backend, Capabilities, Decision, Launch, Pending
from portakv.plan.plan import CopyPlan, Loop, Nest, Side
from portakv_conformance.draw.arrangement import Keywords

if TYPE_CHECKING:
    from portakv import Index, KVView

Values: TypeAlias = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Pair = tuple[Int64, Int64]
HOST = frozenset((a, b) for a in ("pageable", "pinned") for b in ("pageable", "pinned"))
_FIRST = 16  # a multiple of every vector; numpy takes address 0 for "no memory given"
_SPACE = 2**56  # bytes, past every address that a process can have
_ELEMENTS = {1: "|u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "|V16"}
_WILD = 2**62  # far past the end of any view; an id is clipped to it before it is multiplied


class IllegalAddress(RuntimeError):
    """An access outside the buffers of a view: a mutant that runs wild is seen, and harms no other
    memory."""


@cache
def _space(width: int) -> Values:
    """Return the whole address space for numpy, as vectors of one width."""
    shape = ((_SPACE - _FIRST) // width,)
    interface = {"data": (_FIRST, False), "shape": shape, "typestr": _ELEMENTS[width], "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def _cells(addresses: Int64, nbytes: int, width: int) -> Int64:
    """Return numbers of the vectors in ``nbytes`` from each address on, int64 ``[runs, vectors]``.

    The low bits of an unaligned address are lost, as on hardware without byte lanes.
    """
    first = (addresses - _FIRST) // width
    return np.asarray(first[:, None] + np.arange(nbytes // width, dtype=np.int64))


def load(view: KVView, addresses: Int64, nbytes: int, width: int) -> Values:
    """Return runs of ``nbytes`` at addresses of a view, in vectors ``[runs, vectors]``."""
    check_inside(view, addresses, nbytes)
    return np.asarray(_space(width)[_cells(addresses, nbytes, width)])


def store(view: KVView, addresses: Int64, values: Values) -> None:
    """Put vectors ``[runs, vectors]`` at addresses of a view."""
    width = values.dtype.itemsize
    nbytes = values.shape[1] * values.dtype.itemsize
    check_inside(view, addresses, nbytes)
    _space(width)[_cells(addresses, nbytes, width)] = values


def check_inside(view: KVView, addresses: Int64, nbytes: int) -> None:
    """Raise `IllegalAddress` where a run leaves the storages of a view's tensors."""
    storages = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in view.owners}
    bases = np.array(sorted(storages), dtype=np.int64)
    ends = np.array([base + storages[base] for base in bases.tolist()], dtype=np.int64)
    at = np.searchsorted(bases, addresses, side="right") - 1
    outside = (at < 0) | (addresses + nbytes > ends[at])
    if outside.any():
        first = int(addresses[outside][0])
        raise IllegalAddress(
            f"Expected runs inside the buffers of {view.layout.text!r}, got {int(outside.sum())} "
            f"runs of {nbytes} bytes outside, the first at {first:#x}. Nothing was moved."
        )


@dataclass(frozen=True)
class Call:
    """The arguments of one launch, and the plan that it was prepared for."""

    plan: CopyPlan
    src: KVView
    dst: KVView
    src_index: Index
    dst_index: Index
    count: int
    stream: torch.Stream | None
    status: torch.Tensor | None

    @property
    def ends(self) -> tuple[int, int]:
        """Return the number of units of each side."""
        return self.src.slots // self.plan.unit, self.dst.slots // self.plan.unit


@dataclass(frozen=True)
class Runs:
    """Contiguous pieces of one nest: addresses ``[runs]`` on both sides, bytes and vector."""

    src: Int64
    dst: Int64
    nbytes: int
    vector: int

    def at(self, chosen: Any) -> Runs:
        """Return some of the runs, by numbers, a mask or a slice."""
        return replace(self, src=self.src[chosen], dst=self.dst[chosen])


class HostRows(Backend):
    """Rows moved on the host as a kernel moves them; keywords of a subclass are claims."""

    #: Where a mutant shows its bug: the device and the profile that judge it.
    device_type: ClassVar[str] = "cpu"
    profile: ClassVar[str] = "core"
    claims: ClassVar[Keywords] = {
        "places": HOST,
        "index_on": "host",
        "skips_negative": True,
        "guards": True,
    }

    name = "host-rows"

    @classmethod
    def target(cls) -> str:
        """Return ``module:Class``, the NAME for `portakv conform`."""
        return f"{cls.__module__}:{cls.__name__}"

    @classmethod
    def bug(cls) -> str:
        """Return the bug, a sentence."""
        return " ".join((cls.__doc__ or "").split())

    def __init_subclass__(cls, profile: str = "core", **claims: object) -> None:
        super().__init_subclass__()
        cls.profile = profile
        cls.name = re.sub(r"(?<=.)(?=[A-Z])", "-", cls.__name__).lower()
        cls.claims = {**cls.claims, **claims}

    @classmethod
    def mutate(cls, step: str, **claims: object) -> Callable[[Callable[..., Any]], type[HostRows]]:
        """Make a function a mutant of one ``step``. The function gets the right steps, as `super`
        has them, in place of the backend itself."""

        def mutant(wrong: Callable[..., Any]) -> type[HostRows]:
            def mutated(self: HostRows, *arguments: object) -> object:
                return wrong(super(made, self), *arguments)

            attributes = {
                "__doc__": wrong.__doc__,
                "__module__": wrong.__module__,
                "__wrapped__": wrong,
            }
            made = type(wrong.__name__, (cls,), {step: mutated, **attributes}, **claims)
            return made

        return mutant

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type == cls.device_type:
            return Decision(cls.name, True, f"it moves rows by address on {device.type}")
        return Decision(cls.name, False, f"it runs on {cls.device_type}, not on {device.type}")

    def capabilities(self) -> Capabilities:
        return Capabilities(**self.claims)

    def prepare(self, plan: CopyPlan) -> Launch:
        return lambda *supplied: self.carry(Call(plan, *supplied))

    @cached_property
    def state(self) -> dict[Any, Any]:
        """Return the state of a mutant between calls."""
        return {}

    # The steps, in their order

    def carry(self, call: Call) -> Pending | None:
        """Carry out one launch from beginning to end."""
        for runs in self.pieces(call):
            self.move(runs, call)
        return None

    def pieces(self, call: Call) -> list[Runs]:
        """Return the bytes to move, nest by nest: units and loops as the addresses of runs."""
        (src, dst) = self.pairs(call)
        plan = call.plan
        pieces = []
        for nest in self.nests(plan):
            own = self.offsets(nest, "src", src, call.src_index, plan.unit)
            other = self.offsets(nest, "dst", dst, call.dst_index, plan.unit)
            here = self.address(call.src, *own)
            there = self.address(call.dst, *other)
            vector = self.vector(nest, plan)
            pieces.append(Runs(here, there, self.length(nest.run, vector), vector))
        return pieces

    def nests(self, plan: CopyPlan) -> Sequence[Nest]:
        """Return the nests as the kernel's generator writes them down."""
        return plan.nests

    def units(self, call: Call) -> int:
        """Return the number of units that the grid covers."""
        return call.count // call.plan.unit

    def pairs(self, call: Call) -> Pair:
        """Return the numbers of the units to move, on both sides. Skip or report the others."""
        units = self.units(call)
        unit = call.plan.unit
        src, dst = (self.numbers(at, units, unit) for at in (call.src_index, call.dst_index))
        bad = self.bad(src, dst, call)
        if bad.any() and call.status is not None:
            call.status[0] = self.status_of(np.nonzero(bad)[0], call)
        moved = self.moved(src, dst) & ~bad
        return src[moved], dst[moved]

    def bad(self, src: Int64, dst: Int64, call: Call) -> Mask:
        """Return a mask of the units past the end of either side."""
        return (src >= call.ends[0]) | (dst >= call.ends[1])

    def moved(self, src: Int64, dst: Int64) -> Mask:
        """Return a mask of the units that are not padding."""
        return (src >= 0) & (dst >= 0)

    def status_of(self, bad: Int64, call: Call) -> int:
        """Return the status word for bad units: the first of their positions, + 1."""
        return int(bad[0]) * call.plan.unit + 1

    def numbers(self, index: Index, units: int, unit: int) -> Int64:
        """Return the number of each unit on one side; negative for padding."""
        at = np.arange(self.start(index) // unit, self.start(index) // unit + units)
        if index.ids is None:
            return at
        per_id = index.step // unit
        ids = self.ids(index.ids)[at // per_id]
        wide = np.minimum(ids, _WILD // index.step)
        return np.where(ids < 0, ids, wide * per_id + at % per_id)

    def start(self, index: Index) -> int:
        """Return the position of an index at which a copy begins."""
        return index.offset

    def ids(self, ids: torch.Tensor) -> Int64:
        """Return the list of ids, as the kernel reads it from memory."""
        return ids.numpy().astype(np.int64)

    def offsets(self, nest: Nest, name: str, numbers: Int64, index: Index, unit: int) -> Pair:
        """Return the table entry, and the bytes from its address, of every run of one side."""
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

    def place(self, side: Side, numbers: Int64) -> Pair:
        """Return table entry and bytes of each unit."""
        entry = np.full_like(numbers, side.table)
        byte = np.full_like(numbers, side.offset)
        for step in reversed(side.units):
            at = numbers % step.extent if step.extent else numbers
            numbers = numbers // step.extent if step.extent else numbers
            entry = entry + at * step.table
            byte = byte + at * step.stride
        return entry, byte

    def walk(self, loop: Loop, name: str) -> Pair:
        """Return table entries and bytes of each turn of a loop, on side ``src`` or ``dst``."""
        at = self.turns(loop)
        return at * getattr(loop, f"{name}_table"), at * getattr(loop, f"{name}_stride")

    def turns(self, loop: Loop) -> Int64:
        """Return the numbers that a loop runs through."""
        return np.arange(loop.extent, dtype=np.int64)

    def address(self, view: KVView, entry: Int64, byte: Int64) -> Int64:
        """Return absolute addresses."""
        return np.asarray(self.table(view)[entry] + byte)

    def table(self, view: KVView) -> Int64:
        """Return the table of addresses of a view."""
        return view.addresses

    def vector(self, nest: Nest, plan: CopyPlan) -> int:
        """Return the width of one access, in bytes."""
        return nest.vector

    def length(self, run: int, vector: int) -> int:
        """Return the number of moved bytes of each run."""
        return run

    def move(self, runs: Runs, call: Call) -> None:
        """Load every vector, and store it."""
        store(call.dst, runs.dst, self.load(runs, call))

    def load(self, runs: Runs, call: Call) -> Values:
        """Return the vectors of all runs ``[runs, vectors]``."""
        return load(call.src, runs.src, runs.nbytes, runs.vector)


class DeviceRows(HostRows, places=frozenset({("device", "device")})):
    """Rows moved by the simulated device, in the order of a stream: what the steps of `HostRows`
    work out is handed to the device's one vendor op, a batch of copies."""

    device_type: ClassVar[str] = "simdev"

    def move(self, runs: Runs, call: Call) -> None:
        self.enqueue(runs, call, self.stream(call))

    def stream(self, call: Call) -> torch.Stream:
        """Return the stream on which to order the work: that of the call, else the current one."""
        return call.stream or torch.accelerator.current_stream(self.device)

    def enqueue(self, runs: Runs, call: Call, stream: torch.Stream) -> None:
        """Order the copies of all runs on a stream."""
        check_inside(call.src, runs.src, runs.nbytes)
        check_inside(call.dst, runs.dst, runs.nbytes)
        copy_runs(runs.src, runs.dst, runs.nbytes, stream)


def copy_runs(src: Int64, dst: Int64, nbytes: int, stream: torch.Stream) -> None:
    """Order copies of ``nbytes`` between addresses of the simulated device on a stream."""
    from portakv_conformance import simdev  # built and loaded only where it is used

    sources = torch.from_numpy(src)
    targets = torch.from_numpy(dst)
    simdev.copy_runs(sources, targets, torch.full_like(sources, nbytes), stream)
