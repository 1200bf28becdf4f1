# SPDX-License-Identifier: Apache-2.0
"""List the system calls that reach files, and install a filter that hands some to a supervisor.

The filter is seccomp's with user notification (Linux 5.9 and newer). It needs no privilege, and it
catches Python and native code alike. It holds for the thread that installs it and for the threads
that this thread starts. io_uring and Linux's older asynchronous I/O would pass the filter, so it
refuses both: a tier that can do without uses plain calls then.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Collection
from typing import Literal, NamedTuple

Kind = Literal["read", "write", "open", "sync", "rename", "unlink", "look", "size", "mkdir"]


class Call(NamedTuple):
    """One system call.

    Attributes:
        name: of the call.
        kind: of its purpose.
        x86_64: its number there; None: the machine does not have it.
        aarch64: its number there.
        target: where its file stands: in argument 0 as a descriptor (``fd``) or as a path, or in
            the arguments 0 and 1 as a folder and a path (``at``).
        data: where its bytes lie: a buffer or a vector of buffers in arguments 1 and 2.
        offset: the argument with the offset in the file; None: the file's own position.
    """

    name: str
    kind: Kind
    x86_64: int | None
    aarch64: int | None
    target: Literal["fd", "path", "at"]
    data: Literal["buffer", "vector"] | None = None
    offset: int | None = None


CALLS = (
    Call("read", "read", 0, 63, "fd", "buffer"),
    Call("pread64", "read", 17, 67, "fd", "buffer", 3),
    Call("readv", "read", 19, 65, "fd", "vector"),
    Call("preadv", "read", 295, 69, "fd", "vector", 3),
    Call("preadv2", "read", 327, 286, "fd", "vector", 3),
    Call("write", "write", 1, 64, "fd", "buffer"),
    Call("pwrite64", "write", 18, 68, "fd", "buffer", 3),
    Call("writev", "write", 20, 66, "fd", "vector"),
    Call("pwritev", "write", 296, 70, "fd", "vector", 3),
    Call("pwritev2", "write", 328, 287, "fd", "vector", 3),
    Call("open", "open", 2, None, "path"),
    Call("creat", "open", 85, None, "path"),
    Call("openat", "open", 257, 56, "at"),
    Call("openat2", "open", 437, 437, "at"),
    Call("fsync", "sync", 74, 82, "fd"),
    Call("fdatasync", "sync", 75, 83, "fd"),
    Call("rename", "rename", 82, None, "path"),
    Call("renameat", "rename", 264, 38, "at"),
    Call("renameat2", "rename", 316, 276, "at"),
    Call("link", "rename", 86, None, "path"),
    Call("linkat", "rename", 265, 37, "at"),
    Call("unlink", "unlink", 87, None, "path"),
    Call("unlinkat", "unlink", 263, 35, "at"),
    Call("stat", "look", 4, None, "path"),
    Call("lstat", "look", 6, None, "path"),
    Call("access", "look", 21, None, "path"),
    Call("newfstatat", "look", 262, 79, "at"),
    Call("statx", "look", 332, 291, "at"),
    Call("faccessat", "look", 269, 48, "at"),
    Call("faccessat2", "look", 439, 439, "at"),
    Call("ftruncate", "size", 77, 46, "fd"),
    Call("fallocate", "size", 285, 47, "fd"),
    Call("mkdir", "mkdir", 83, None, "path"),
    Call("mkdirat", "mkdir", 258, 34, "at"),
)
MACHINE = platform.machine()
# AUDIT_ARCH of the kernel, and numbers of calls that have no place in the table.
_MACHINES = {
    "x86_64": (0xC000003E, {"seccomp": 317, "pidfd_getfd": 438, "rings": (425, 206)}),
    "aarch64": (0xC00000B7, {"seccomp": 277, "pidfd_getfd": 438, "rings": (425, 0)}),
}
BY_NUMBER = {number: call for call in CALLS if (number := getattr(call, MACHINE, None)) is not None}
# Of linux/filter.h and linux/seccomp.h.
_LOAD = 0x20
_JUMP_EQUAL = 0x15
_RETURN = 0x06
_ALLOW = 0x7FFF0000
_NOTIFY = 0x7FC00000
_FAIL = 0x00050000
_NEW_LISTENER = 8
_NO_NEW_PRIVILEGES = 38


class NotSupported(Exception):
    """This machine does not let a process watch another one's system calls."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def number_of(name: str, machine: str = MACHINE) -> int:
    """Return the number of ``seccomp`` or ``pidfd_getfd``.

    Raises `NotSupported` for a machine whose calls are not listed.
    """
    try:
        number = _MACHINES[machine][1][name]
    except KeyError:
        raise NotSupported(f"the system calls of {machine} are not listed") from None
    assert isinstance(number, int)
    return number


def install_filter(kinds: Collection[str]) -> int:
    """Hand the calls of some kinds to a supervisor; return the descriptor to answer them with.

    The filter holds until the process ends. Raises `NotSupported` with the reason.
    """
    listener = -1
    libc = ctypes.CDLL(None, use_errno=True)
    seccomp = number_of("seccomp")
    code = _program(kinds)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0:
        listener = libc.syscall(seccomp, 1, _NEW_LISTENER, ctypes.byref(program))
    if listener < 0:
        raise NotSupported(f"seccomp is refused: {os.strerror(ctypes.get_errno())}")
    return int(listener)


def _program(kinds: Collection[str]) -> bytes:
    """Return the code of the filter: 8 bytes an instruction."""
    architecture, others = _MACHINES[MACHINE]
    rings = others["rings"]
    assert isinstance(rings, tuple)
    watched = [number for number, call in BY_NUMBER.items() if call.kind in kinds]
    code = [
        struct.pack("HBBI", _LOAD, 0, 0, 4),
        struct.pack("HBBI", _JUMP_EQUAL, 1, 0, architecture),
        struct.pack("HBBI", _RETURN, 0, 0, _ALLOW),
        struct.pack("HBBI", _LOAD, 0, 0, 0),
    ]
    for number in rings:
        code.append(struct.pack("HBBI", _JUMP_EQUAL, 0, 1, number))
        code.append(struct.pack("HBBI", _RETURN, 0, 0, _FAIL | errno.ENOSYS))
    for number in watched:
        code.append(struct.pack("HBBI", _JUMP_EQUAL, 0, 1, number))
        code.append(struct.pack("HBBI", _RETURN, 0, 0, _NOTIFY))
    code.append(struct.pack("HBBI", _RETURN, 0, 0, _ALLOW))
    return b"".join(code)


def borrow(process: int, descriptor: int) -> int:
    """Return a duplicate of another process's descriptor; raise OSError if that is refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.pidfd_open(process)
    try:
        duplicate = libc.syscall(number_of("pidfd_getfd"), handle, descriptor, 0)
    finally:
        os.close(handle)
    if duplicate < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd is refused")
    return int(duplicate)
