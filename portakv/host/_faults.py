# SPDX-License-Identifier: Apache-2.0
"""What host memory can be refused for, and the warning where it is pageable after all."""

from __future__ import annotations

import threading
import warnings

from ..errors import PortaKVError


class HostMemoryError(PortaKVError, RuntimeError):
    """Host memory that cannot be had, registered or given back as asked."""


class PoolExhausted(HostMemoryError):
    """A pool has no block to give, at once or within the time that was allowed."""


_told: set[str] = set()
_lock = threading.Lock()


def warn_once(why: str) -> None:
    """Say for the first time in this process that host memory is pageable, and why."""
    with _lock:
        if why in _told:
            return
        _told.add(why)
    warnings.warn(
        f"Host memory was asked to be pinned and stays pageable: {why}. Results are the same; "
        f"copies are slower, and block the host.",
        RuntimeWarning,
        stacklevel=3,
    )
