# SPDX-License-Identifier: Apache-2.0
"""Events that are used again: making and destroying one costs more than recording it."""

from __future__ import annotations

from collections import deque

import torch

_KEPT = 256  # for each device; more are left to the garbage collector
_free: dict[torch.device, deque[torch.Event]] = {}


def acquire(device: torch.device) -> torch.Event:
    """An event of a device, ready to be recorded."""
    try:
        return _free[device].pop()
    except (KeyError, IndexError):
        return torch.Event(device)


def release(event: torch.Event) -> None:
    """Give an event back that has ended and that nobody waits for any more."""
    kept = _free.setdefault(event.device, deque())
    if len(kept) < _KEPT:
        kept.append(event)
