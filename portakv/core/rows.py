# SPDX-License-Identifier: Apache-2.0
"""Call the core's launches of kernels that copy rows."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from ctypes import c_char_p, c_int, c_int64, c_uint64, c_void_p
from functools import cache
from typing import Any, NamedTuple

from portakv.errors import PortaKVError

from .library import library
from .plan import Refused

# The codes of `core.h`.
LOOPS = -40
UNITS = -41

#: More words than a kernel has: it has at most 16 extents for each of its axes.
_ROOM = 256
_EMPTY = array("q", [0])
#: `portakv_rows_side`: the address of the addresses, of the table and of the ids; whether these are
#: int64; the tokens that are passed over, and those of the view.
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


def shape_of(plan: array[int], nest: int, options: array[int]) -> RowsShape:
    """Return one nest of a plan as a kernel; see `portakv_rows_describe`.

    Args:
        plan: the words of the plan.
        options: the words of `RowsOptions`.

    Raises:
        Refused: the kernels' argument does not hold it; the values are its loops and its planes.
    """
    out = _EMPTY * _ROOM
    count = _functions().describe(_at(plan), nest, _at(options), _at(out), _ROOM)
    if count < 0:
        raise Refused(count, out)
    words = iter(out[:count])
    vector, run, lanes, row, planes = (next(words) for _ in range(5))
    inner = read_extents(words)
    outer = read_extents(words)
    src = read_side(words)
    dst = read_side(words)
    return RowsShape(vector, run, lanes, row, planes, inner, outer, src, dst)


def read_extents(words: Iterator[int]) -> tuple[int, ...]:
    """Return the extents that follow in the words of a kernel."""
    return tuple(next(words) for _ in range(next(words)))


def read_side(words: Iterator[int]) -> SideShape:
    """Return the side that follows in the words of a kernel."""
    ids, per_id, lookup, entries = (next(words) for _ in range(4))
    return SideShape(bool(ids), per_id, lookup, entries, read_extents(words), next(words))


class Rows:
    """The launches of a plan by its kernels, which any thread may call; see `portakv_rows_open`.

    Args:
        cuts: the words of every kernel's cut.
        functions: for each kernel the driver's two handles.
        launch: the address of the driver's function.
    """

    def __init__(
        self,
        plan: array[int],
        options: array[int],
        cuts: Iterable[int],
        functions: Iterable[int],
        launch: int,
    ) -> None:
        core = _functions()
        words = array("q", cuts)
        handles = array("q", functions)
        self._close = core.close
        self._run = core.run
        self._again = core.again
        self.address = core.open(_at(plan), _at(options), _at(words), _at(handles), launch)
        if not self.address:
            raise PortaKVError(
                "Expected launches of one or two vectors for each thread, and memory for them, got "
                "a refusal of the core. Pass such tunings, or free memory."
            )

    def run(self, src: bytes, dst: bytes, count: int, status: int, stream: int) -> int:
        """Order a copy, and return 0, `UNITS` or the driver's error; see `portakv_rows_run`.

        ``src`` and ``dst`` are sides by `pack_side`.
        """
        result: int = self._run(self.address, src, dst, count, status, stream)
        return result

    def again(
        self,
        src: bytes,
        dst: bytes,
        src_at: int,
        dst_at: int,
        first: int,
        count: int,
        status: int,
        stream: int,
    ) -> int:
        """Order a copy between sides at other addresses as `run` does; see
        `portakv_rows_again`."""
        result: int = self._again(
            self.address, src, dst, src_at, dst_at, first, count, status, stream
        )
        return result

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self._close(self.address)


class _Functions(NamedTuple):
    describe: Any
    open: Any
    close: Any
    run: Any
    again: Any


def _at(words: array[int]) -> int:
    return words.buffer_info()[0]


@cache
def _functions() -> _Functions:
    """Return the functions with their prototypes. Launches release the interpreter, since a driver
    with a full queue blocks."""
    core = library()
    describe = core.portakv_rows_describe
    describe.argtypes = (c_void_p, c_int64, c_void_p, c_void_p, c_int64)
    describe.restype = c_int64
    make = core.portakv_rows_open
    make.argtypes = (c_void_p,) * 5
    make.restype = c_void_p
    close = core.portakv_rows_close
    close.argtypes = (c_void_p,)
    close.restype = None
    run = core.portakv_rows_run
    run.argtypes = (c_void_p, c_char_p, c_char_p, c_int64, c_uint64, c_void_p)
    run.restype = c_int
    again = core.portakv_rows_again
    again.argtypes = (
        *(c_void_p, c_char_p, c_char_p),
        *(c_int64, c_int64, c_int64, c_int64),
        *(c_uint64, c_void_p),
    )
    again.restype = c_int
    return _Functions(describe, make, close, run, again)
