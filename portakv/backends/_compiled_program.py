# SPDX-License-Identifier: Apache-2.0
"""The functions that `compiled` compiles, and how each is compiled only once.

All memory from an address on is one tensor here, and addresses are numbers in it. So a plan over
any number of allocations is one indexed copy, one kernel, and what a request changes (addresses,
strides of a chunk, tokens) are arguments, never shapes. Only the memory of rows is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch

#: Bytes that a tensor over all memory spans: what a process can address.
SPAN = 2**47
# Inductor judges whether a pointer is aligned by this many bytes without looking at the pointer.
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
    """What a model fixes about one side."""

    per_id: int  # units that one id covers; 0 without ids
    extents: tuple[int, ...]  # of the steps of a unit's number, outermost (0) first
    unit_entries: tuple[bool, ...]  # for each step, whether it walks through the table of addresses
    loop_entries: tuple[bool, ...]  # for each loop, the same

    @property
    def tabled(self) -> bool:
        """True if addresses are looked up."""
        return any(self.unit_entries) or any(self.loop_entries)


class CopyShape(NamedTuple):
    """What a model fixes about one nest: nests of equal shape share one program."""

    dtype: torch.dtype  # of the elements that are moved
    run: int  # elements in a contiguous run
    ratio: int  # elements in a grain, the distance that addresses are counted in
    loops: tuple[int, ...]  # their extents, outermost first
    src: SideShape
    dst: SideShape

    @property
    def grain(self) -> int:
        """Bytes in a grain, a power of two."""
        return self.ratio * self.dtype.itemsize

    @property
    def has_ids(self) -> bool:
        """True if a side has ids."""
        return self.src.per_id + self.dst.per_id > 0


def memory_from(
    address: int, device: torch.device, dtype: torch.dtype, run: int = 1, ratio: int = 1
) -> torch.Tensor:
    """All memory from ``address`` on, a multiple of `ALIGNMENT` in an allocation of the device, as
    rows ``[rows, run]`` that begin ``ratio`` elements apart. It owns and allocates nothing."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, SPAN)
    rows = (SPAN // dtype.itemsize - run) // ratio
    # A tensor made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        memory = torch.empty(0, dtype=dtype, device=device)
        return memory.set_(storage, 0, (rows, run), (ratio, 1))


# Constants of the functions below: each program puts its own in their place.
SHAPE = cast(CopyShape, None)
SIDES = 0


def copy(*arguments: Argument) -> None:
    """The copy of a nest of ``SHAPE``: ``(units, *source's side, *destination's side, lost)``.

    ``lost``, given if a side has ids, is the row, counted in grains of the destination's memory,
    that units with a negative or bad id are sent to: so such a unit moves nothing, and no id has to
    be known to the host. The arguments of a side are, as far as its shape needs them: its memory;
    ids int64; the table of addresses; then the numbers ``at`` (grains from the memory's start),
    ``first`` (the id, or without ids the unit, to begin with), ``limit`` (units in the view),
    ``rest`` (units of the first id to pass over, if an id covers several), ``entry`` (of the
    table); for each step of the units its stride in grains or its entries; for each loop its stride
    in grains, and its entries if it has any.
    """
    _refuse_plain_python()
    given: Iterator[Any] = iter(arguments)
    units = next(given)
    source, src_rows, src_good = _side(SHAPE, SHAPE.src, given, units)
    target, dst_rows, dst_good = _side(SHAPE, SHAPE.dst, given, units)
    loops = len(SHAPE.loops)
    good = [_over(found, loops) for found in (src_good, dst_good) if found is not None]
    if good:
        dst_rows = torch.where(good[0] & good[-1], dst_rows, next(given))
    target.index_put_((dst_rows,), source[src_rows])


def report(*arguments: Argument) -> None:
    """The report of bad ids: ``(memory of int64, units, unit, word, lost, *side...)``.

    Writes position + 1 of the first bad id, in tokens, to row ``word`` of the memory, and nothing
    if there is none (row ``lost`` is never read). The arguments of each of the ``SIDES`` with ids
    are ids, ``first``, ``rest``, ``limit`` and ``per_id``.
    """
    _refuse_plain_python()
    given: Iterator[Any] = iter(arguments)
    memory, units, unit, word, lost = (next(given) for _ in range(5))
    at = torch.arange(units, device=memory.device)
    bad = torch.zeros_like(at, dtype=torch.bool)
    for _ in range(SIDES):
        ids, first, rest, limit, per_id = (next(given) for _ in range(5))
        found = ids[:, 0][first + (at + rest) // per_id]
        number = found * per_id + (at + rest) % per_id
        bad = bad | (found >= limit) | ((found >= 0) & (number >= limit))
    first = torch.where(bad, at, units).amin(0, keepdim=True)
    row = torch.where(first < units, word, lost)
    memory.index_put_((row,), (first * unit + 1)[:, None])


def _refuse_plain_python() -> None:
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "torch.compile was asked to compile a copy but ran it as plain Python; unset "
            "TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE and TORCHDYNAMO_SUPPRESS_ERRORS, or use "
            "another backend."
        )


def _side(
    shape: CopyShape, side: SideShape, given: Iterator[Any], units: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The memory of a side, ``[units, loops...]`` rows in it, and which units have good ids."""
    memory = next(given)
    ids = next(given) if side.per_id else None
    table = next(given) if side.tabled else None
    row = next(given)
    first = next(given)
    number = torch.arange(units, device=memory.device)
    good = None
    if ids is None:
        number = number + first
    else:
        limit = next(given)
        rest = next(given) if side.per_id > 1 else 0
        number, good = _from_ids(side, number, ids, first, limit, rest)
    entry = next(given) if side.tabled else 0
    row, entry = _walk_units(side, number, row, entry, [next(given) for _ in side.extents])
    below = len(shape.loops)
    row = _over(row, below)
    entry = _over(entry, below)
    for depth, extent in enumerate(shape.loops):
        along = _over(torch.arange(extent, device=memory.device), below - depth - 1)
        row = row + along * next(given)
        if side.loop_entries[depth]:
            entry = entry + along * next(given)
    if table is not None:
        row = row + (table[:, 0][entry] >> (shape.grain.bit_length() - 1))
    return memory, row, good


def _from_ids(
    side: SideShape, at: torch.Tensor, ids: torch.Tensor, first: int, limit: int, rest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of the unit for each position, 0 where its id is not good; and which are."""
    if side.per_id == 1:
        number = torch.narrow(ids, 0, first, at.shape[0])[:, 0]
        good = (number >= 0) & (number < limit)
    else:
        found = ids[:, 0][first + (at + rest) // side.per_id]
        number = found * side.per_id + (at + rest) % side.per_id
        # The product of a huge id may have overflowed into what looks like a good number.
        good = (found >= 0) & (found < limit) & (number < limit)
    return torch.where(good, number, 0), good


def _walk_units(
    side: SideShape, number: torch.Tensor, row: Any, entry: Any, strides: list[int]
) -> tuple[Any, Any]:
    """Rows and entries after the steps that numbers of units walk through."""
    for place in reversed(range(len(strides))):
        extent = side.extents[place]
        digit = number % extent if extent else number
        number = number // extent if extent else number
        if side.unit_entries[place]:
            entry = entry + digit * strides[place]
        else:
            row = row + digit * strides[place]
    return row, entry


def _over(unit: Any, loops: int) -> Any:
    """``[units]`` as ``[units, 1...]``, with so many loops below; a number as it is."""
    return unit.reshape(-1, *[1] * loops) if isinstance(unit, torch.Tensor) else unit


class Program:
    """A function that was compiled once; a call of it compiles nothing and checks nothing.

    ``torch.compile`` traces the function, and what inductor made of it is kept and called
    directly: no guard is left whose failure would compile again, such as one on the state of
    autocast or on the number of threads.

    Args:
        function: takes tensors and integers one behind the other, changes them, returns nothing.
        constants: its globals; the tracer takes a global integer for a constant, and a
            parameter's for a variable.
        example: its arguments: tensors of the shapes to come, and integers, which stay variable.

    Raises:
        RuntimeError: torch.compile is switched off, or would run the function as it is.
    """

    def __init__(
        self, function: Callable[..., None], constants: dict[str, Any], example: Sequence[Argument]
    ) -> None:
        self._compiled: Callable[..., object] | None = None
        self._order: list[int] = []
        # Distinct integers, so that they can be told apart when they come back from the tracer;
        # above 1, because it takes 0 and 1 for constants; falling, because inductor sorts loops by
        # the strides of the example, and units outermost leave divisions by constants only.
        taken = {x for x in example if isinstance(x, int)}
        marks = iter(n for n in range(1 << 20, 1, -1) if n not in taken)
        self._example = [next(marks) if isinstance(x, int) and x < 2 else x for x in example]
        for tensor in self._example:
            if isinstance(tensor, torch.Tensor):
                torch._dynamo.mark_static(tensor)
        # A code object of its own: torch counts compilations for each, and gives up after a few.
        code = function.__code__.replace(co_name=f"portakv_{function.__name__}")
        own = FunctionType(code, {**function.__globals__, **constants})
        with torch.inference_mode(False), torch.no_grad(), _any_order():
            torch.compile(own, backend=self._compile, fullgraph=True, dynamic=True)(*self._example)
        if sorted(self._order) != list(range(len(example))):
            raise RuntimeError("torch.compile took an argument of a copy for a constant.")
        del self._example
        self(example)  # what is left to build or load at the first call

    def __call__(self, arguments: Sequence[Argument]) -> None:
        """Run it on arguments of the example's pattern, on the current stream."""
        compiled = self._compiled
        assert compiled is not None
        compiled(*[arguments[n] for n in self._order])

    def _compile(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        """What torch.compile calls as its backend: compile, and learn the order of arguments."""
        if self._compiled is not None:
            raise RuntimeError("A function that was to be compiled once was compiled again.")
        known = set(torch._inductor.list_options())  # of this torch
        options = {name: value for name, value in _OPTIONS.items() if name in known}
        self._compiled = torch._inductor.compile(graph, examples, options=options)

        def learn(*given: Argument) -> tuple[()]:
            # The example's integers are marks, not addresses: nothing may run on them.
            self._order = [self._find(x) for x in given]
            return ()

        return learn

    def _find(self, argument: Argument) -> int:
        number = isinstance(argument, int)
        for n, x in enumerate(self._example):
            if (isinstance(x, int) and x == argument) if number else x is argument:
                return n
        raise RuntimeError(f"torch.compile made an argument {argument!r} that it was not given.")


@contextmanager
def _any_order() -> Iterator[None]:
    """Without torch's deterministic algorithms, which order writes and are slow: rows do not
    overlap, so that any order gives one result."""
    promised = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(promised, warn_only=warned)
