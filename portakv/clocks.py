# SPDX-License-Identifier: Apache-2.0
"""Clocks of transfers: what a device took by its own events, or else the host's clock."""

from __future__ import annotations

import time
from contextlib import suppress

import torch


class Clock:
    """Times work from its making on.

    Args:
        stream: what the work is ordered on, which is timed by its device's events where torch has
            such; None: by the host's clock.
    """

    __slots__ = ("_began", "_first", "_landed", "_last", "_seconds", "_stream")

    def __init__(self, stream: torch.Stream | None) -> None:
        self._stream = stream
        self._first: torch.Event | None = None
        self._last: torch.Event | None = None
        self._landed: float | None = None
        self._seconds: float | None = None
        if stream is not None:
            with suppress(RuntimeError, NotImplementedError):
                self._first = self._recorded(stream)
        self._began = time.perf_counter()

    @property
    def name(self) -> str:
        """What tells the time: ``device events``, or ``host clock``, from the call to the moment
        when somebody saw the end."""
        return "host clock" if self._last is None else "device events"

    def issued(self, ordered: bool) -> None:
        """All work was issued; ``ordered``: on the stream."""
        if self._first is not None and self._stream is not None and ordered:
            self._last = self._recorded(self._stream)

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

    @staticmethod
    def _recorded(stream: torch.Stream) -> torch.Event:
        event = torch.Event(stream.device, enable_timing=True)
        event.record(stream)
        return event
