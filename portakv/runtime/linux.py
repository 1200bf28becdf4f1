# SPDX-License-Identifier: Apache-2.0
"""Name the parts of PortaKV that need Linux, where another system runs.

Layouts, plans and the backend `reference` run on any system. Host memory, block stores, migration
and serving use Linux's files, descriptors and ``/proc``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import TYPE_CHECKING

from portakv.errors import Unsupported

if TYPE_CHECKING:
    import fcntl
else:
    try:
        import fcntl
    except ImportError:  # Windows

        class fcntl:
            """Replace the module on systems without it; `require_linux` is called before use."""


__all__ = ["fallocate", "fcntl", "require_linux"]


def require_linux(what: str) -> None:
    """Raise `Unsupported` on another system than Linux.

    Args:
        what: the part that needs it, as the subject of a sentence.
    """
    here = sys.platform
    if here != "linux":
        raise Unsupported(what, f"it needs Linux, and this system is {here}; run it on Linux")


def fallocate(fd: int, offset: int, nbytes: int) -> None:
    """Allocate space for a part of an open file, which is longer then if the part ends after it.

    `os.posix_fallocate` emulates this on a file system without it, by a write of one byte to each
    page, which ``O_DIRECT`` rejects. This function raises `OSError` with ``EOPNOTSUPP`` instead.
    """
    call = ctypes.CDLL(None, use_errno=True).fallocate
    numbers = ctypes.c_long(offset), ctypes.c_long(nbytes)
    while call(fd, 0, *numbers):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
