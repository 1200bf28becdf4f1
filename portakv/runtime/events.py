# SPDX-License-Identifier: Apache-2.0
"""Events that are used again: making and destroying one costs more than recording it."""

from __future__ import annotations

from functools import cache

import torch

_KEPT = 256  # for each device; more are left to the garbage collector


class Pool:
    """The free events of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[torch.Event] = []

    def acquire(self) -> torch.Event:
        """An event, ready to be recorded."""
        try:
            return self._free.pop()
        except IndexError:
            return torch.Event(self._device)

    def recorded(self, stream: torch.Stream | None) -> torch.Event:
        """An event behind everything on ``stream``; None: the current stream of this device."""
        event = self.acquire()
        if stream is None and torch.accelerator.current_device_index() != self._device.index:
            # Given no stream it would take the current device's.
            stream = torch.accelerator.current_stream(self._device.index)
        event.record(stream)
        return event

    def release(self, event: torch.Event) -> None:
        """Give an event back that has ended and for which no stream or host waits any more."""
        if len(self._free) < _KEPT:
            self._free.append(event)


@cache
def pool(device: torch.device) -> Pool:
    """The events of a device."""
    return Pool(device)
