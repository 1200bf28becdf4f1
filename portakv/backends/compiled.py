# SPDX-License-Identifier: Apache-2.0
"""`compiled`: a plan as one indexed copy, through ``torch.compile``.

One kernel moves all planes of a nest, in one allocation or in several. It is compiled only in
`prepare`, for each shape that a model fixes (see `_compiled_program`). The kernel guards ids
itself: to clean them before it would read device ids on the host, and wait for the device.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, cast

import torch

from portakv.backends._compiled_program import (
    ALIGNMENT,
    Argument,
    CopyShape,
    Program,
    SideShape,
    copy,
    memory_from,
    report,
)
from portakv.backends._sides import SideArguments
from portakv.backends.base import Backend, Capabilities, Decision, Launch, MoveLaunch, places_on
from portakv.backends.strided import ELEMENTS
from portakv.plan.plan import CopyPlan, Move, Nest
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.kernel_cache import LOADED
from portakv.runtime.once import making
from portakv.runtime.streams import side_stream
from portakv.view.index import Index
from portakv.view.view import KVView

# Elements that the example of a program moves; inductor sizes its blocks by it.
_EXAMPLE = 2**18
_WORD = 16  # bytes, of which a report uses eight


class Compiled(Backend):
    """One indexed copy through ``torch.compile``, on devices that inductor compiles for."""

    name = "compiled"

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        why = _missing(device)
        return Decision(cls.name, why is None, why or f"inductor compiles for {device.type}")

    def capabilities(self) -> Capabilities:
        # `prepare` does not know the dtype of later ids, and each dtype needs a separate program.
        return Capabilities(
            places_on(self.device),
            index_dtypes=frozenset({torch.int64}),
            skips_negative=True,
            guards=True,
            capturable=self.device.type != "cpu",
        )

    def prepare(self, plan: CopyPlan) -> Launch:
        if capturing(self.device):
            raise refuse_capture(
                why="it has to be compiled first; make the same call once before the capture"
            )
        with making():
            nests = [_NestLaunch(nest, plan, self._copying) for nest in plan.nests]
            return _CompiledLaunch(plan, nests, self._reporting(plan), self.device)

    def _lost_bytes(self, nbytes: int) -> torch.Tensor:
        """Return memory for rows that are not to be moved; it is never read."""
        with torch.inference_mode(False):
            return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def _copying(self, shape: CopyShape) -> Program:
        """Return the program of a shape; its example's rows are the first bytes of one buffer."""

        def make() -> Program:
            units = max(2, _EXAMPLE // (prod(shape.loops) * shape.run))
            zeros = torch.zeros(units, dtype=torch.int64, device=self.device)
            lost = self._lost_bytes(shape.run * shape.dtype.itemsize)
            base = lost.data_ptr()
            example: list[Argument] = [units]
            for side in (shape.src, shape.dst):
                example.append(memory_from(base, self.device, shape.dtype, shape.run, shape.ratio))
                example += [self._all_from(zeros) for _ in range(bool(side.per_id) + side.tabled)]
                steps = len(side.extents) + len(shape.loops) + sum(side.loop_entries)
                numbers = 2 + (side.per_id > 0) + (side.per_id > 1) + side.tabled
                example += [0] * (numbers + steps)
            return Program(copy, {"SHAPE": shape}, [*example, *[0] * shape.has_ids], lost)

        return cast("Program", LOADED.get_or_make((self, shape), make))

    def _reporting(self, plan: CopyPlan) -> Program | None:
        """Return the program that reports bad ids; None for a plan without ids."""
        key = (plan.src_step > 0, plan.dst_step > 0)

        def make() -> Program:
            zeros = torch.zeros(4096, dtype=torch.int64, device=self.device)
            lost = self._lost_bytes(_WORD)
            example: list[Argument] = [self._all_from(lost), len(zeros), 0, 0, 0]
            for _ in range(sum(key)):
                example += [self._all_from(zeros), 0, 0, 0, 1]
            return Program(report, {"SIDES": sum(key)}, example, lost)

        return LOADED.get_or_make((self, key), make) if any(key) else None

    def _all_from(self, tensor: torch.Tensor) -> torch.Tensor:
        return memory_from(tensor.data_ptr(), self.device, torch.int64)


class _CompiledLaunch(MoveLaunch):
    def __init__(
        self,
        plan: CopyPlan,
        nests: list[_NestLaunch],
        report: Program | None,
        device: torch.device,
    ) -> None:
        self._unit = plan.unit
        self._nests = nests
        self._report = report
        self._device = device
        self._per_id = [step // plan.unit for step in (plan.src_step, plan.dst_step)]

    @torch.no_grad()
    def carry(self, move: Move, status: torch.Tensor | None) -> None:
        units = move.count // self._unit
        side = None
        if self._report is not None and status is not None:
            side = self._start_report(self._report, move, status)
        try:
            # A view without slots has no memory, and every id is bad.
            if move.src.slots and move.dst.slots:
                for nest in self._nests:
                    nest(move, units)
        finally:
            if side is not None:
                torch.cuda.current_stream(self._device).wait_stream(side)

    def _start_report(self, report: Program, move: Move, status: torch.Tensor) -> Any:
        """Report bad ids while the copy runs, on a side stream, and return that stream.

        After the copy, the report took 15 % of the time of a 33 MB copy. In a capture it runs
        before the copy and this returns None: a fork would gain nothing there.
        """
        device = self._device
        word = status.data_ptr()
        lost = report.lost.data_ptr()
        low = min(word, lost) // ALIGNMENT * ALIGNMENT
        memory = memory_from(low, device, torch.int64)
        places = (word - low) // 8, (lost - low) // 8
        arguments: list[Argument] = [memory, move.count // self._unit, self._unit, *places]
        for view, index, per_id in zip(move[:2], move[2:4], self._per_id, strict=True):
            if index.ids is not None:
                first = index.offset // self._unit
                ids = id_arguments(index.ids.data_ptr(), device, first, per_id)
                arguments += [*ids, view.slots // self._unit, per_id]
        if device.type == "cpu" or capturing(device):
            report(arguments)
            return None
        current = torch.cuda.current_stream(device)
        # One for each caller's stream: a shared one would wait for the work of all callers.
        side: Any = side_stream(current, "ids", "report")
        side.wait_stream(current)
        with torch.cuda.stream(side):
            report(arguments)
        return side


class _NestLaunch:
    """One nest: its program, and the arguments of its launches."""

    def __init__(
        self, nest: Nest, plan: CopyPlan, program_of: Callable[[CopyShape], Program]
    ) -> None:
        width = min(nest.vector, 8)
        self._src = _SideArguments(nest, plan, "src", nest.loops)
        self._dst = _SideArguments(nest, plan, "dst", nest.loops)
        shape = CopyShape(
            ELEMENTS[width],
            nest.run // width,
            nest.vector // width,
            tuple(x.extent for x in nest.loops),
            self._src.shape,
            self._dst.shape,
        )
        self._shape = self._src.copy = self._dst.copy = shape
        self._program = program_of(shape)
        self._dst.reached = (self._program.lost.data_ptr(),)

    def __call__(self, move: Move, units: int) -> None:
        """Copy so many units, ordered on the current stream."""
        src, _ = self._src.arguments(move.src, move.src_index)
        dst, low = self._dst.arguments(move.dst, move.dst_index)
        lost = (self._program.lost.data_ptr() - low) // self._shape.grain
        self._program([units, *src, *dst, *[lost] * self._shape.has_ids])


class _SideArguments(SideArguments):
    """One side of a nest."""

    copy: CopyShape  # the nest's
    reached: tuple[int, ...] = ()  # further addresses that the side's memory must reach

    @cached_property
    def shape(self) -> SideShape:
        """The values of the side that the model fixes."""
        units = self.side.units
        return SideShape(
            self.per_id,
            tuple(step.extent for step in units),
            tuple(step.table != 0 for step in units),
            tuple(table != 0 for table, _ in self.walks),
        )

    @cached_property
    def _steps(self) -> list[int]:
        grain = self.copy.grain
        steps = [x.table or x.stride // grain for x in self.side.units]
        for table, stride in self.walks:
            steps += [stride // grain, *[table] * bool(table)]
        return steps

    def arguments(self, view: KVView, index: Index) -> tuple[list[Argument], int]:
        """Return the arguments of this side, and the address that its memory begins at."""
        base, _, ids, _, first, limit = self.request(view, index)
        memory, table, low = self._memory(view)
        tensors: list[Argument] = [memory]
        numbers = [(base - low) // self.copy.grain, first]
        if self.per_id:
            of_ids, first, rest = id_arguments(ids, view.device, first, self.per_id)
            tensors.append(of_ids)
            numbers[1:] = [first, limit, *[rest] * (self.per_id > 1)]
        if table is not None:
            tensors.append(table)
            numbers.append(self.side.table)
        return [*tensors, *numbers, *self._steps], low

    def _memory(self, view: KVView) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """Return a view's memory, its table of addresses, and the address of the memory."""
        if self not in view.derived:
            low = min((*view.origins, *self.reached)) // ALIGNMENT * ALIGNMENT
            copy = self.copy
            device = view.device
            table = None
            memory = memory_from(low, device, copy.dtype, copy.run, copy.ratio)
            if self.shape.tabled:
                table = memory_from(view.table.data_ptr(), device, torch.int64)
            view.derived[self] = (memory, table, low)
        return view.derived[self]  # type: ignore[no-any-return]


def id_arguments(
    ids: int, device: torch.device, first: int, per_id: int
) -> tuple[torch.Tensor, int, int]:
    """Return the memory of ids, the position there of the id of unit ``first``, and the rest.

    The rest is the number of that id's units before ``first``.
    """
    low = ids // ALIGNMENT * ALIGNMENT
    first, rest = divmod(first, per_id)
    return memory_from(low, device, torch.int64), (ids - low) // 8 + first, rest


def _missing(device: torch.device) -> str | None:
    """Return what compiling for a device lacks, as a sentence, or None.

    Imports nothing: inductor alone takes a second. A fault of inductor is the self-check's reason.
    """
    if device.type not in ("cpu", "cuda"):
        return f"it runs on cuda and cpu devices, not on {device.type}"
    if not hasattr(torch._C, "_construct_storage_from_data_pointer"):
        return f"torch {torch.__version__} cannot make a tensor of an address"
    for switch in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(switch, "0") not in ("", "0"):
            return f"torch.compile is switched off by {switch}"
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "inductor needs the package triton for GPUs, and it is not installed"
        compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
        if not any(shutil.which(compiler) for compiler in compilers if compiler):
            return "Triton finds no C compiler for its launchers; install gcc, or set CC"
    else:
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            return f"inductor's C++ compiler {compiler!r} is not there; install g++, or set CXX"
        # torch 2.13 joins the words of the compiler's command by spaces, and does not quote them.
        package = str(Path(torch.__file__).parent)
        if " " in package:
            return (
                f"inductor cannot pass a path with a space to the compiler, and torch lies in "
                f"{package}"
            )
    folder = sysconfig.get_path("include")
    if not (Path(folder) / "Python.h").exists():
        return f"Python's headers are not in {folder}; install them (Debian: python3-dev)"
    return None
