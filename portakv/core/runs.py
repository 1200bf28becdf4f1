# SPDX-License-Identifier: Apache-2.0
"""Call the core to expand plans into runs, and into pieces that cross a link.

Arguments are the words that `native/core/core.h` describes. A position that lies outside of its
list or view is no error here: the result is None, and the caller finds the sentence. ``plan`` is
the address of a plan's words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_char_p, c_int64, c_void_p
from functools import cache
from struct import Struct
from struct import error as StructError
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt

from portakv.core.library import function
from portakv.core.plan import NO_MEMORY
from portakv.errors import PortaKVError

Int64 = npt.NDArray[np.int64]

_OUTSIDE = -20  # PORTAKV_RUNS_OUTSIDE
_EDGES = -21  # PORTAKV_RUNS_EDGES

#: A buffer of more rows than `_FEW`, and of so many times the rows that it has, is not retained.
_FEW = 1024
_SPARE = 4

_copy = Struct("=17q").pack
#: The words of a copy, of limits, and of edges, as `portakv_pieces_list` reads them.
pack_request = Struct("=33q").pack


@cache
def _functions() -> SimpleNamespace:
    """Return the functions."""
    listing = c_void_p, c_char_p, c_void_p, c_int64
    numbers = (c_int64,) * 4
    return SimpleNamespace(
        runs_list=function("runs_list", c_int64, *listing),
        runs_groups=function("runs_groups", c_int64, c_char_p, *numbers),
        pieces_list=function("pieces_list", c_int64, *listing),
    )


def pointer_to(array: Int64) -> int:
    """Return the address of an array that is contiguous and may be written; 0 if it is empty."""
    # A third of the time that the array's own interface takes.
    return ctypes.addressof(ctypes.c_char.from_buffer(array)) if array.size else 0  # type: ignore[arg-type]  # arrays are buffers


def list_runs(plan: int, copy: Sequence[int], room: int) -> list[Int64] | None:
    """Return the runs of a copy: source, destination and bytes. None: a position is outside.

    ``room``: their number, or more; if they are more, they are listed twice.
    """
    try:
        words = _copy(*copy)
    except StructError:  # a number past 64 bits
        return None
    while True:
        out = np.empty(3 * room + 1, dtype=np.int64)
        number = _functions().runs_list(plan, words, pointer_to(out), room)
        if 0 <= number <= room:
            return _columns(out[:-1], 3, number, room)
        if number == _OUTSIDE:
            return None
        room = _known(number)


def count_groups(
    copy: Sequence[int], unit: int, src_limit: int, dst_limit: int, most: int
) -> int | None:
    """Return the number of groups of units that follow each other. None: a position is outside."""
    try:
        words = _copy(*copy)
    except StructError:  # a number past 64 bits
        return None
    number = _functions().runs_groups(words, unit, src_limit, dst_limit, most)
    return None if number == _OUTSIDE else _known(number)


class NeedsEdges(Exception):
    """Pieces could cross the edges of allocations, which were not listed."""


def list_pieces(plan: int, request: Sequence[int], room: int) -> list[Int64] | None:
    """Return the pieces of a copy. None: a position is outside. Raise `NeedsEdges`.

    The result is six columns, or the first three if all pieces have one row: destination, source,
    width, height, pitch of the destination, pitch of the source. ``room``: as for `list_runs`.
    """
    try:
        words = pack_request(*request)
    except StructError:  # a number past 64 bits
        return None
    while True:
        out = np.empty(6 * room + 1, dtype=np.int64)
        number = _functions().pieces_list(plan, words, pointer_to(out), room)
        if 0 <= number <= room:
            return _columns(out[1:], 6 if out[0] else 3, number, room)
        if number == _OUTSIDE:
            return None
        if number == _EDGES:
            raise NeedsEdges
        room = _known(number)


def _columns(out: Int64, columns: int, number: int, room: int) -> list[Int64]:
    """Return the columns of a buffer; copies if the buffer would retain much more memory."""
    if not room:
        return [out] * columns
    found = [out[at : at + number] for at in range(0, columns * room, room)]
    if room > _FEW and room > _SPARE * number:
        return [column.copy() for column in found]
    return found


def _known(number: int) -> int:
    """Return a number of the core; raise an error for a code."""
    if number >= 0:
        return number
    if number == NO_MEMORY:
        raise MemoryError("The core has no memory for the runs of a copy.")
    raise PortaKVError("Expected a plan and positions that fit each other. Report this as a bug.")
