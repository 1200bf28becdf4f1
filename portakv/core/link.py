# SPDX-License-Identifier: Apache-2.0
"""Call the core for the link: the schedule of slices, and CUDA's driver.

`native/core/link.h` and `native/core/link.cpp` describe the words.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_char_p, c_int64, c_void_p
from functools import cache
from struct import Struct
from types import SimpleNamespace
from typing import NamedTuple, TypeAlias

import numpy as np

from portakv.core.call import Fault
from portakv.core.library import Opened, address_in, function, written
from portakv.core.plan import NO_MEMORY
from portakv.core.runs import Int64
from portakv.errors import PortaKVError

# The codes of `core.h`.
OUTSIDE = -20
EDGES = -21
ROOM = -60
COPY, BATCH, REST, WORD, EVENT, STAGE = range(1, 7)

# The kinds of a step, and the streams; `link.h` has them.
WAIT, RECORD, STAGED, CROSSED = range(4)

#: A step of a schedule: its kind, its stream, and the number of an event or a slice.
Step: TypeAlias = tuple[int, int, int]

#: The driver's functions, in the order of `portakv_link_open`.
FUNCTIONS = (
    "cuMemcpyAsync",
    "cuMemcpy2DAsync_v2",
    "cuMemcpyBatchAsync_v2",
    "cuMemcpyBatchAsync",
    "cuStreamWaitValue32_v2",
    "cuMemHostAlloc",
    "cuThreadExchangeStreamCaptureMode",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuStreamWaitEvent",
    "cuStreamQuery",
)
#: Events of a schedule besides those of the buffers.
EVENTS = 3

_order = Struct("=7q").pack
#: A `Crossing`: the direction, the stream, the stream aside, and the five rules.
pack_crossing = Struct("=8q").pack
#: A `CrossingCopy`.
pack_copy = Struct("=14q").pack


class SliceOrder(NamedTuple):
    """What a schedule depends on; `SliceOrder` of `link.h` describes the members."""

    slices: int
    buffers: int
    first: int
    used: int
    downward: bool
    alone: bool
    detached: bool


class Schedule(NamedTuple):
    """The steps of a copy in slices: before the first slice, of each slice, after the last one, and
    after a step that failed."""

    before: list[Step]
    slices: list[list[Step]]
    after: list[Step]
    failed: list[Step]


class Cut(NamedTuple):
    """A slice of a copy: its first position, and the number of its positions."""

    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count


def cut_copy(rules: array[int], count: int, offset: int, idle: bool) -> tuple[int, list[Cut]]:
    """Return the tokens of a buffer, and the slices in the order of their moves.

    Args:
        rules: `CutRules` of `link.h`.
        count: tokens of the copy.
        offset: tokens of the host's rows that are passed over.
        idle: nothing crosses.
    """
    terms = rules.buffer_info()[0], count, offset, idle
    number, out = written(_functions().cut, 64, *terms)
    if number < 0:
        raise PortaKVError("Expected rules that cut a copy. Report this as a bug.")
    slots, *words = out[:number]
    return slots, [Cut(*pair) for pair in zip(words[::2], words[1::2], strict=True)]


def schedule_of(order: SliceOrder) -> Schedule:
    """Return the schedule of a copy in slices, which an executor in Python follows."""
    out = array("q", bytes(8 * (64 + 32 * order.slices)))
    number = _functions().schedule(_order(*order), out.buffer_info()[0], len(out))
    if not 0 <= number <= len(out):
        raise PortaKVError("Expected an order of slices. Report this as a bug.")
    words = iter(out[:number])
    groups = [
        [(next(words), next(words), next(words)) for _ in range(next(words))]
        for _ in range(order.slices + 3)
    ]
    before, *slices, after, failed = groups
    return Schedule(before, slices, after, failed)


class Link(Opened):
    """CUDA's driver as the core calls it, by any thread; see `portakv_link_open`."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        core = _functions()
        addresses = array("q", [_address(driver, name) for name in FUNCTIONS])
        #: Whether the driver takes many copies in one call.
        self.batches = bool(addresses[2] or addresses[3])
        self._library = driver  # whose functions are called
        self._close = core.close
        #: Of the link, for the core.
        self.address = core.open(addresses.buffer_info()[0])
        if not self.address:
            raise MemoryError("The core has no memory for a link.")

    def submit(self, columns: Sequence[Int64], crossing: bytes) -> Fault | None:
        """Order pieces; `Pieces` has the columns. Return what was refused."""
        arrays = [np.ascontiguousarray(column) for column in columns]
        pointers = array("q", [each.__array_interface__["data"][0] for each in arrays])
        fault = Fault()
        at = pointers.buffer_info()[0]
        reported = ctypes.addressof(fault)
        if _functions().submit(self.address, at, arrays[0].size, crossing, reported):
            return _refused(fault)
        return None

    def rows(self, copy: bytes) -> Fault | None:
        """Submit a copy of rows, by `pack_copy`."""
        fault = Fault()
        if _functions().rows(self.address, copy, ctypes.addressof(fault)):
            return _refused(fault)
        return None


def _refused(fault: Fault) -> Fault:
    """Return what was refused; raise an error for a code that no caller words."""
    if fault.code == NO_MEMORY:
        raise MemoryError("The core has no memory for the pieces of a copy.")
    if fault.code == -1:
        raise PortaKVError(
            "Expected a plan and positions that fit each other. Report this as a bug."
        )
    return fault


def _address(driver: ctypes.CDLL, name: str) -> int:
    """Return the address of a function; 0 if an old driver lacks one that has a substitute."""
    optional = ("cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync", "cuThreadExchangeStreamCaptureMode")
    if name in optional and not hasattr(driver, name):
        return 0
    return address_in(driver, name)


@cache
def _functions() -> SimpleNamespace:
    """Return the functions. Those that call the driver wait."""
    rules = c_void_p, c_int64, c_int64, c_int64
    pieces = c_void_p, c_void_p, c_int64, c_char_p, c_void_p
    return SimpleNamespace(
        schedule=function("link_schedule", c_int64, c_char_p, c_void_p, c_int64),
        cut=function("link_cut", c_int64, *rules, c_void_p, c_int64),
        open=function("link_open", c_void_p, c_void_p, waits=True),
        close=function("link_close", None, c_void_p, waits=True),
        submit=function("link_submit", c_int64, *pieces, waits=True),
        rows=function("link_rows", c_int64, c_void_p, c_char_p, c_void_p, waits=True),
    )
