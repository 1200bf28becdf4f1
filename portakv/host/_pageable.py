# SPDX-License-Identifier: Apache-2.0
"""The warning, given once for each reason, where host memory is pageable after all."""

from __future__ import annotations

import sys
import threading
import warnings

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
        stacklevel=_outside(),
    )


def _outside() -> int:
    """How far up the stack, from the warning on, the first line is that is not PortaKV's own."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("portakv."):
        frame, level = frame.f_back, level + 1
    return level
