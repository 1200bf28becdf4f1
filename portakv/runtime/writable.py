# SPDX-License-Identifier: Apache-2.0
"""Ask the kernel whether host memory may be written, for copies that would else end the process."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_int64
from functools import cache

from portakv.core.library import function

#: Why a destination is refused, as a clause.
READ_ONLY = (
    "its memory is mapped for reading only. Copy into other memory, or map it with PROT_WRITE"
)


def writable(first: int, past: int) -> bool:
    """Return False if a write of the first or the last byte of a range on the host would fail.

    Memory that the kernel lets the process write is writable, whatever its owner says about it,
    such as a read-only numpy array. `portakv_writable` of ``core.h`` says more.
    """
    return _writable()(first, past) != 0


@cache
def _writable() -> Callable[[int, int], int]:
    """Return the function. It never waits: another thread might not give the interpreter back for
    milliseconds."""
    return function("writable", c_int, c_int64, c_int64)
