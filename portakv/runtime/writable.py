# SPDX-License-Identifier: Apache-2.0
"""Ask the kernel whether host memory may be written, for copies that would else end the process."""

from __future__ import annotations

import ctypes
import errno
import platform
import sys
from functools import cache
from typing import Any

#: The number of the system call ``futex``, by machine.
_FUTEX = {"x86_64": 202, "aarch64": 98}
_WAKE_OP_PRIVATE = 5 | 128
_OR = 2 << 28  # FUTEX_OP_OR, with 0
_PAGE = 4096  # bytes of the smallest page, which has one protection


#: Why a destination is refused, as a clause.
READ_ONLY = (
    "its memory is mapped for reading only. Copy into other memory, or map it with PROT_WRITE"
)


def writable(first: int, past: int) -> bool:
    """Return False if a write of the first or the last byte of a range on the host would fail.

    Such memory is mapped for reading only, or not mapped at all, or is a page of a file that is
    shorter than its mapping. The kernel answers, and no byte changes. Memory that the kernel lets
    the process write is writable, whatever its owner says about it, such as a read-only numpy
    array. Where the call is unknown, as on other systems than Linux, the answer is True.
    """
    if past <= first or not _writable_byte(first):
        return past <= first
    same_page = first // _PAGE == (past - 1) // _PAGE
    return same_page or _writable_byte(past - 1)


def _writable_byte(address: int) -> bool:
    """Return False if a write of a byte would fail: ``futex`` joins 0 to its word, atomically."""
    futex = _futex()
    if futex is None:
        return True
    call, number, own = futex
    # Waiters at the own word are woken, of which there are none. Errors other than this one, such
    # as those of a filter of system calls, say nothing about the memory.
    failed = call(number, own, _WAKE_OP_PRIVATE, 0, 0, address & ~3, _OR) == -1
    return not (failed and ctypes.get_errno() == errno.EFAULT)


@cache
def _futex() -> tuple[Any, int, int] | None:
    """Return the C library's ``syscall``, the number of ``futex``, and the address of a word; None
    if it is not known here."""
    number = _FUTEX.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return None
    # The call never waits, so it keeps the interpreter's lock: another thread might not give it
    # back for milliseconds.
    call = ctypes.PyDLL(None, use_errno=True).syscall
    address = ctypes.c_void_p
    call.argtypes = [
        ctypes.c_long,
        address,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_ulong,
        address,
        ctypes.c_uint,
    ]
    call.restype = ctypes.c_long
    return call, number, ctypes.addressof(_WORD)


_WORD = ctypes.c_uint()
