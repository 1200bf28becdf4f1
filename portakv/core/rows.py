# SPDX-License-Identifier: Apache-2.0
"""Call the core's launches of kernels that copy rows."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from ctypes import c_char_p, c_int64, c_uint64, c_void_p
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

from portakv.errors import PortaKVError

from .library import Opened, function
from .plan import Refused

# The codes of `core.h`.
LOOPS = -40
UNITS = -41
NOT_LOADED = -42
NO_TABLE = -43
#: The most ids of the host that travel in the argument of one launch, as ``rows.h`` says.
MOST_CARRIED = 512
#: The most ids of the host of one copy that travel with its launches. More are sent to the device.
MOST_LISTED = 4096

#: More words than a kernel has: it has at most 16 extents for each of its axes.
_ROOM = 256
_EMPTY = array("q", [0])
#: What is added to `wide` of a side whose ids only the host reads, during the call.
ON_HOST = 2
#: `portakv_rows_side`: the address of the addresses, of the table and of the ids; whether these are
#: int64, and where; the tokens that are passed over, and those of the view.
pack_side = struct.Struct("=6q").pack


class SideShape(NamedTuple):
    """One side of a kernel, as `RowsSide` of ``rows.h``."""

    ids: bool
    per_id: int
    lookup: int
    entries: int
    bounded: tuple[int, ...]
    table: int


class RowsShape(NamedTuple):
    """One nest of a plan as a kernel, as ``rows.h`` describes it."""

    vector: int
    run: int
    lanes: int
    row: int
    planes: int
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    src: SideShape
    dst: SideShape

    @classmethod
    def of(cls, words: Iterable[int]) -> RowsShape:
        """Return the shape of words that `describe` returned."""
        numbers = iter(words)
        vector, run, lanes, row, planes = (next(numbers) for _ in range(5))
        inner = read_extents(numbers)
        outer = read_extents(numbers)
        src = read_side(numbers)
        dst = read_side(numbers)
        return cls(vector, run, lanes, row, planes, inner, outer, src, dst)


def describe(plan: array[int], nest: int, options: array[int]) -> array[int]:
    """Return the words of one nest of a plan as a kernel; see `portakv_rows_describe`.

    Args:
        plan: the words of the plan.
        options: the words of `RowsOptions`.

    Raises:
        Refused: the kernels' argument does not hold it; the values are its loops and its planes.
    """
    return words_of_nest(_functions().describe, plan, nest, options)


def words_of_nest(
    write: Callable[..., int], plan: array[int], nest: int, options: array[int]
) -> array[int]:
    """Return the words that a function of the core writes about one nest of a plan.

    Raises:
        Refused: as the function refuses the nest.
    """
    out = _EMPTY * _ROOM
    count = write(address_of(plan), nest, address_of(options), address_of(out), _ROOM)
    if count < 0:
        raise Refused(count, out)
    return out[:count]


def read_extents(words: Iterator[int]) -> tuple[int, ...]:
    """Return the extents that follow in the words of a kernel."""
    return tuple(next(words) for _ in range(next(words)))


def read_side(words: Iterator[int]) -> SideShape:
    """Return the side that follows in the words of a kernel."""
    ids, per_id, lookup, entries = (next(words) for _ in range(4))
    return SideShape(bool(ids), per_id, lookup, entries, read_extents(words), next(words))


class Kernels(Opened):
    """The loaded kernels of a device by their shapes, for any thread; see `portakv_kernels_open`.

    Args:
        launch: the address of the driver's function.

    Attributes:
        address: of the table, for calls of the core.
    """

    def __init__(self, launch: int) -> None:
        core = _functions()
        self._close = core.close
        self._run = core.run
        self.address = core.open(launch)
        if not self.address:
            raise _refused()

    def add(self, shape: array[int], cut: Iterable[int], functions: Iterable[int]) -> None:
        """Add the kernel of a shape, unless there is one; see `portakv_kernels_add`."""
        words = array("q", cut)
        handles = array("q", functions)
        code = _functions().add(
            self.address, address_of(shape), len(shape), address_of(words), address_of(handles)
        )
        if code:
            raise _refused()

    def run(
        self,
        plan: array[int],
        options: array[int],
        src: bytes,
        dst: bytes,
        count: int,
        status: int,
        stream: int,
    ) -> int:
        """Order a copy, and return 0, a code or the driver's error; see `portakv_rows_run`.

        ``src`` and ``dst`` are sides by `pack_side`.
        """
        at = plan.buffer_info()[0], options.buffer_info()[0]
        result: int = self._run(self.address, *at, src, dst, count, status, stream)
        return result


def _refused() -> PortaKVError:
    return PortaKVError(
        "Expected launches of one or two vectors for each thread, and memory for them, got a "
        "refusal of the core. Pass such tunings, or free memory."
    )


def address_of(words: array[int]) -> int:
    """Return where words are."""
    return words.buffer_info()[0]


@cache
def _functions() -> SimpleNamespace:
    """Return the functions. They wait, since a driver with a full queue blocks."""
    sides = c_char_p, c_char_p
    copy = c_void_p, c_void_p, c_void_p, *sides, c_int64, c_uint64, c_void_p
    words = c_void_p, c_int64, c_void_p, c_void_p
    return SimpleNamespace(
        describe=function("rows_describe", c_int64, *words, c_int64, waits=True),
        open=function("kernels_open", c_void_p, c_void_p, waits=True),
        close=function("kernels_close", None, c_void_p, waits=True),
        add=function("kernels_add", c_int64, c_void_p, *words, waits=True),
        run=function("rows_run", c_int64, *copy, waits=True),
    )
