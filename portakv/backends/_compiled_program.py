# SPDX-License-Identifier: Apache-2.0
"""The functions that `compiled` compiles, and the cache that compiles each only once.

All memory from an address on is one tensor here, and addresses are numbers in it. A plan over any
number of allocations is therefore one indexed copy, in one kernel. The values that a request
changes (addresses, strides of a chunk, tokens) are arguments, never shapes. Only the memory of rows
is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch

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
