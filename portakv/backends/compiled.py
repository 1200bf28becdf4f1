# SPDX-License-Identifier: Apache-2.0
"""`compiled`: a plan as one indexed copy, through ``torch.compile``.

One kernel moves all planes of a nest, in one allocation or in several. It is compiled only in
`prepare`, for each shape that a model fixes (see below). The kernel guards ids
itself: to clean them before it would read device ids on the host, and wait for the device.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch

from portakv.backends._sides import SideArguments
from portakv.backends.base import Backend, Capabilities, Decision, Launch, MoveLaunch, places_on
from portakv.backends.strided import ELEMENTS
from portakv.plan.plan import CopyPlan, Move, Nest
from portakv.runtime.bounded import making
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.kernel_cache import LOADED
from portakv.runtime.streams import side_stream
from portakv.view.index import Index
from portakv.view.view import KVView

# ------------------------------------------------------------------------------------------------
# The functions that `compiled` compiles, and the cache that compiles each only once.
#
# All memory from an address on is one tensor here, and addresses are numbers in it. A plan over
# any number of allocations is therefore one indexed copy, in one kernel. The values that a
# request changes (addresses, strides of a chunk, tokens) are arguments, never shapes. Only the
# memory of rows is touched.

#: Bytes that a tensor over all memory spans: what a process can address.
SPAN = 2**47
# Inductor assumes that pointers are aligned by this many bytes, without a look at the pointer.
ALIGNMENT = 16
_OPTIONS = {
    # Ids are guarded in the function itself; an assertion would poison the device's context.
    "assert_indirect_indexing": False,
    # To time alternatives inductor copies what a kernel writes to: here that is all memory.
    "triton.autotune_pointwise": False,
    "max_autotune": False,
    "max_autotune_pointwise": False,
    "coordinate_descent_tuning": False,
    "triton.cudagraphs": False,
    # One kernel needs no pool of compiling processes.
    "compile_threads": 1,
    # The caller makes all arguments in one pattern, so that nothing is left to assert.
    "size_asserts": False,
    "alignment_asserts": False,
}

Argument = torch.Tensor | int


class SideShape(NamedTuple):
    """The values of one side that a model fixes."""

    per_id: int  # units that one id covers; 0 without ids
    extents: tuple[int, ...]  # of the steps of a unit's number, outermost (0) first
    unit_entries: tuple[bool, ...]  # for each step: True if it walks through the address table
    loop_entries: tuple[bool, ...]  # for each loop, the same

    @property
    def tabled(self) -> bool:
        """True if addresses are looked up."""
        return any(self.unit_entries) or any(self.loop_entries)


class CopyShape(NamedTuple):
    """The values of one nest that a model fixes: nests of equal shape share one program."""

    dtype: torch.dtype  # of the elements that are moved
    run: int  # elements in a contiguous run
    ratio: int  # elements in a grain, the distance that addresses are counted in
    loops: tuple[int, ...]  # their extents, outermost first
    src: SideShape
    dst: SideShape

    @property
    def grain(self) -> int:
        """The bytes in a grain, a power of two."""
        return self.ratio * self.dtype.itemsize

    @property
    def has_ids(self) -> bool:
        """True if a side has ids."""
        return self.src.per_id + self.dst.per_id > 0


def memory_from(
    address: int, device: torch.device, dtype: torch.dtype, run: int = 1, ratio: int = 1
) -> torch.Tensor:
    """Return all memory from ``address`` on, as rows ``[rows, run]`` that begin ``ratio`` elements
    apart.

    ``address`` is a multiple of `ALIGNMENT` in an allocation of the device. The tensor owns and
    allocates nothing.
    """
    storage = torch._C._construct_storage_from_data_pointer(address, device, SPAN)
    rows = (SPAN // dtype.itemsize - run) // ratio
    # A tensor made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        memory = torch.empty(0, dtype=dtype, device=device)
        return memory.set_(storage, 0, (rows, run), (ratio, 1))


# Constants of the functions below: each program replaces them.
SHAPE = cast(CopyShape, None)
SIDES = 0


def copy(*arguments: Argument) -> None:
    """Copy a nest of ``SHAPE``: ``(units, *source's side, *destination's side, lost)``.

    ``lost``, present if a side has ids, is a row, counted in grains of the destination's memory.
    Units with a negative or bad id are sent to this row: such a unit moves nothing, and the host
    does not have to know the ids. The arguments of a side are, as far as its shape needs them: its
    memory; ids int64; the table of addresses; then the numbers ``at`` (grains from the memory's
    start), ``first`` (the first id, or without ids the first unit), ``limit`` (units in the view),
    ``rest`` (units of the first id to skip, if an id covers several), ``entry`` (of the table); for
    each step of the units its stride in grains or its entries; for each loop its stride in grains,
    and its entries if it has any.
    """
    _refuse_plain_python()
    values: Iterator[Any] = iter(arguments)
    units = next(values)
    source, src_rows, src_good = _side(SHAPE, SHAPE.src, values, units)
    target, dst_rows, dst_good = _side(SHAPE, SHAPE.dst, values, units)
    loops = len(SHAPE.loops)
    good = [_over(mask, loops) for mask in (src_good, dst_good) if mask is not None]
    if good:
        dst_rows = torch.where(good[0] & good[-1], dst_rows, next(values))
    target.index_put_((dst_rows,), source[src_rows])


def report(*arguments: Argument) -> None:
    """Report bad ids: ``(memory of int64, units, unit, word, lost, *side...)``.

    Writes position + 1 of the first bad id, in tokens, to row ``word`` of the memory, and nothing
    if there is none (row ``lost`` is never read). The arguments of each of the ``SIDES`` with ids
    are ids, ``first``, ``rest``, ``limit`` and ``per_id``.
    """
    _refuse_plain_python()
    values: Iterator[Any] = iter(arguments)
    memory, units, unit, word, lost = (next(values) for _ in range(5))
    at = torch.arange(units, device=memory.device)
    bad = torch.zeros_like(at, dtype=torch.bool)
    for _ in range(SIDES):
        ids, first, rest, limit, per_id = (next(values) for _ in range(5))
        listed = ids[:, 0][first + (at + rest) // per_id]
        number = listed * per_id + (at + rest) % per_id
        bad = bad | (listed >= limit) | ((listed >= 0) & (number >= limit))
    first = torch.where(bad, at, units).amin(0, keepdim=True)
    row = torch.where(first < units, word, lost)
    memory.index_put_((row,), (first * unit + 1)[:, None])


def _refuse_plain_python() -> None:
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "Expected torch.compile to compile a copy, but it ran the copy as plain Python. Unset "
            "TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE and TORCHDYNAMO_SUPPRESS_ERRORS, or use "
            "another backend."
        )


def _side(
    shape: CopyShape, side: SideShape, values: Iterator[Any], units: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the memory of a side, its ``[units, loops...]`` rows, and a mask of the units with
    good ids."""
    memory = next(values)
    ids = next(values) if side.per_id else None
    table = next(values) if side.tabled else None
    row = next(values)
    first = next(values)
    at = torch.arange(units, device=memory.device)
    good = None
    if ids is None:
        number = at + first
    else:
        limit = next(values)
        if side.per_id == 1:
            number = torch.narrow(ids, 0, first, at.shape[0])[:, 0]
            good = (number >= 0) & (number < limit)
        else:
            at = at + next(values)  # the units of the first id to skip
            listed = ids[:, 0][first + at // side.per_id]
            number = listed * side.per_id + at % side.per_id
            # The product of a huge id may have overflowed into a number that looks good.
            good = (listed >= 0) & (listed < limit) & (number < limit)
        number = torch.where(good, number, 0)

    # Walk through the steps of a unit's number, innermost first.
    entry = next(values) if side.tabled else 0
    strides = [next(values) for _ in side.extents]
    for place in reversed(range(len(strides))):
        extent = side.extents[place]
        digit = number % extent if extent else number
        number = number // extent if extent else number
        if side.unit_entries[place]:
            entry = entry + digit * strides[place]
        else:
            row = row + digit * strides[place]
    below = len(shape.loops)
    row = _over(row, below)
    entry = _over(entry, below)
    for depth, extent in enumerate(shape.loops):
        along = _over(torch.arange(extent, device=memory.device), below - depth - 1)
        row = row + along * next(values)
        if side.loop_entries[depth]:
            entry = entry + along * next(values)
    if table is not None:
        row = row + (table[:, 0][entry] >> (shape.grain.bit_length() - 1))
    return memory, row, good


def _over(unit: Argument, loops: int) -> Any:
    """Return ``[units]`` as ``[units, 1...]``, with one 1 for each loop; a number unchanged."""
    return unit.reshape(-1, *[1] * loops) if isinstance(unit, torch.Tensor) else unit


class Program:
    """A function that was compiled once; a call of it compiles nothing and checks nothing.

    ``torch.compile`` traces the function; the program stores inductor's result and calls it
    directly. No guard is left whose failure would compile again, such as one on the state of
    autocast or on the number of threads.

    Args:
        function: takes tensors and integers in turn, changes them, returns nothing.
        constants: its globals; the tracer treats a global integer as a constant, and a parameter as
            a variable.
        example: its arguments: tensors of the later shapes, and integers, which stay variable.
        lost: memory that takes what must not move; it is never read. Stays as long as the program.

    Raises:
        RuntimeError: torch.compile is switched off, or would run the function as plain Python.
    """

    def __init__(
        self,
        function: Callable[..., None],
        constants: dict[str, object],
        example: Sequence[Argument],
        lost: torch.Tensor,
    ) -> None:
        self.lost = lost
        self._compiled: Callable[..., object] | None = None
        self._order: list[int] = []
        # The integers are distinct, to recognise them when they come back from the tracer. They
        # are above 1, because the tracer treats 0 and 1 as constants. They fall, because inductor
        # sorts loops by the strides of the example: with units outermost, all divisions are by
        # constants.
        taken = {x for x in example if isinstance(x, int)}
        marks = iter(n for n in range(1 << 20, 1, -1) if n not in taken)
        self._example = [next(marks) if isinstance(x, int) and x < 2 else x for x in example]
        for tensor in self._example:
            if isinstance(tensor, torch.Tensor):
                torch._dynamo.mark_static(tensor)
        # A separate code object: torch counts compilations of each, and gives up after a few.
        code = function.__code__.replace(co_name=f"portakv_{function.__name__}")
        copied = FunctionType(code, {**function.__globals__, **constants})
        with torch.inference_mode(False), torch.no_grad(), _any_order():
            torch.compile(copied, backend=self._compile, fullgraph=True, dynamic=True)(
                *self._example
            )
        if sorted(self._order) != list(range(len(example))):
            raise RuntimeError("torch.compile took an argument of a copy for a constant.")
        del self._example
        self(example)  # the first call builds or loads the rest

    def __call__(self, arguments: Sequence[Argument]) -> None:
        """Run it on arguments of the example's pattern, on the current stream."""
        compiled = self._compiled
        assert compiled is not None
        compiled(*[arguments[n] for n in self._order])

    def _compile(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        """Compile as the backend of torch.compile, and store the order of arguments."""
        if self._compiled is not None:
            raise RuntimeError("A function that was to be compiled once was compiled again.")
        known = set(torch._inductor.list_options())  # of this torch
        options = {name: value for name, value in _OPTIONS.items() if name in known}
        self._compiled = torch._inductor.compile(graph, examples, options=options)

        def learn(*arguments: Argument) -> tuple[()]:
            # The example's integers are marks, not addresses: nothing may run on them.
            self._order = [self._find(x) for x in arguments]
            return ()

        return learn

    def _find(self, argument: Argument) -> int:
        number = isinstance(argument, int)
        for n, x in enumerate(self._example):
            if (isinstance(x, int) and x == argument) if number else x is argument:
                return n
        raise RuntimeError(f"torch.compile made the argument {argument!r}, not in the example.")


@contextmanager
def _any_order() -> Iterator[None]:
    """Switch off torch's deterministic algorithms, which order writes and are slow.

    Rows do not overlap, so that every order gives the same result.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


# ------------------------------------------------------------------------------------------------
# `compiled`: a plan as one indexed copy, through ``torch.compile``.

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
