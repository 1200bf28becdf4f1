# SPDX-License-Identifier: Apache-2.0
"""Clocks of transfers: what a device took by its own events, or else the host's clock."""

from __future__ import annotations

import time
from functools import cache

import torch

from portakv.runtime.events import Pool


class Clock:
    """Times work from its making on.

    Args:
        device: where the work is timed by events, if torch has such there; None: by the host's
            clock.
        stream: what the work is ordered on; None: the device's current stream.
        last: where it ends; None: there as well.
    """

    __slots__ = ("_began", "_first", "_landed", "_last", "_pool", "_seconds", "_stream")

    def __init__(
        self,
        device: torch.device | None,
        stream: torch.Stream | None = None,
        last: torch.Stream | None = None,
    ) -> None:
        self._stream = last or stream
        self._first: torch.Event | None = None
        self._last: torch.Event | None = None
        self._landed: float | None = None
        self._seconds: float | None = None
        self._pool = None if device is None else _timers(device)
        if self._pool is not None:
            try:
                self._first = self._pool.recorded(stream)
            except (RuntimeError, NotImplementedError):
                self._pool = None
        self._began = time.perf_counter()

    def __del__(self) -> None:
        for event in (self._first, self._last):
            if event is not None and self._pool is not None:
                self._pool.release(event)  # nobody waits for it, ended or not

    @property
    def name(self) -> str:
        """What tells the time: ``device events``, or ``host clock``, from the call to the moment
        when somebody saw the end."""
        return "host clock" if self._last is None else "device events"

    def issued(self, ordered: bool) -> None:
        """All work was issued; ``ordered``: on the stream."""
        if self._pool is not None and ordered:
            self._last = self._pool.recorded(self._stream)

    def landed(self) -> None:
        """Somebody saw that all work has ended; the first counts."""
        if self._landed is None:
            self._landed = time.perf_counter()

    def seconds(self) -> float | None:
        """What the work took; None before the end."""
        first, last = self._first, self._last
        if self._seconds is None and self._landed is not None:
            if first is None or last is None:
                self._seconds = self._landed - self._began
            else:
                last.synchronize()  # it stands right behind what has landed
                try:
                    self._seconds = first.elapsed_time(last) / 1000
                except (RuntimeError, NotImplementedError):
                    self._last = None
                    self._seconds = self._landed - self._began
        return self._seconds


class _Timers(Pool):
    """Events that tell the time."""

    def acquire(self) -> torch.Event:
        try:
            return self._free.pop()
        except IndexError:
            return torch.Event(self._device, enable_timing=True)


_timers = cache(_Timers)
