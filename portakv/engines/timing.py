# SPDX-License-Identifier: Apache-2.0
"""Timers of one copy: what the device takes, and how long the call keeps the host.

What the host does first is no part of the device's time where a delay kernel can hide it: a model
that runs ahead of its device hides it too.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch

from portakv.engines.engine import finish
from portakv.runtime._flight import inside
from portakv.runtime.transfer import Pending

#: Seconds of host time from which on no delay hides them where they are more than this share of the
#: whole: calls that follow each other would wait for the host, however far ahead it began. With
#: thousands of copies in its queue the device also takes no more.
SEEN, SHARE = 3e-3, 0.75
#: How often a call is timed again, behind a longer delay, when its host part was seen.
TRIES = 4
_FLUSHED = 128 << 20  # bytes that clear a cache whose size torch does not tell
_CYCLES = 2_000_000


class Timed(NamedTuple):
    """Seconds until a copy had landed, and seconds that its call kept the host."""

    seconds: float
    host_seconds: float


class Timer(Protocol):
    """Times one copy.

    Attributes:
        name: what its times are.
    """

    name: str

    def time(self, call: Callable[[], Pending | None], host_seconds: float = 0.0) -> Timed:
        """Time a call, whose work is ordered on the current stream unless it is pending.

        Args:
            call: the copy.
            host_seconds: what the call is taken to keep the host, which is to be hidden; 0: nothing
                is, since the call itself waits for the device.
        """


class EventTimer:
    """Device events round a call on an idle device: what the host does first counts."""

    name = "device events round a call on an idle device"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events = [torch.Event(device, enable_timing=True) for _ in range(2)]

    def time(self, call: Callable[[], Pending | None], host_seconds: float = 0.0) -> Timed:
        """Time one call, the last event behind what the host had to wait for."""
        stream = torch.accelerator.current_stream(self.device)
        stream.synchronize()
        return self._timed(call, stream)

    def _timed(self, call: Callable[[], Pending | None], stream: torch.Stream) -> Timed:
        first, last = self._events
        first.record(stream)
        began = perf_counter()
        pending = call()
        host = perf_counter() - began
        finish(pending)
        last.record(stream)
        last.synchronize()
        return Timed(first.elapsed_time(last) / 1e3, host)


class DelayTimer(EventTimer):
    """Device events, the first one behind a kernel that outlasts the host's part of the call.

    The L2 cache is flushed before, as rows of a cache that a model has left lie in memory.
    """

    name = (
        "device events, behind a delay but for calls that keep the host over "
        f"{SEEN * 1e3:.0f} ms and for {SHARE:.0%} of their time"
    )

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        module = torch.get_device_module(device)
        self._sleep: Callable[[int], Any] = module._sleep
        properties = module.get_device_properties(device)
        flushed = 2 * (getattr(properties, "L2_cache_size", 0) or _FLUSHED)
        self._flushed = torch.empty(flushed // 8, dtype=torch.int64, device=device)
        self._rate = max(self._cycles_per_second() for _ in range(5))

    def time(self, call: Callable[[], Pending | None], host_seconds: float = 0.0) -> Timed:
        """Time one call; again, where the host was late."""
        if host_seconds <= 0:
            return super().time(call)
        if host_seconds >= SEEN:
            seen = super().time(call)
            if host_seconds > SHARE * seen.seconds:
                return seen
        delay = 2 * host_seconds + 50e-6
        for _ in range(TRIES):
            timed, hidden = self._behind(call, delay)
            if hidden:
                return timed
            delay *= 2
        # The host waited for the delay itself: what it told is not the call's.
        return super().time(call)

    def _behind(self, call: Callable[[], Pending | None], delay: float) -> tuple[Timed, bool]:
        """A call behind a delay, and whether all of it was issued meanwhile."""
        stream = torch.accelerator.current_stream(self.device)
        stream.synchronize()
        self._flushed.zero_()
        began = perf_counter()
        with inside(stream):  # on its device, whichever is the current one
            self._sleep(int(delay * self._rate))
        issued: list[float] = []

        def noted() -> Pending | None:
            pending = call()
            issued.append(perf_counter() - began)
            return pending

        return self._timed(noted, stream), issued[0] < delay

    def _cycles_per_second(self) -> float:
        stream = torch.accelerator.current_stream(self.device)
        first, last = self._events
        first.record(stream)
        with inside(stream):
            self._sleep(_CYCLES)
        last.record(stream)
        last.synchronize()
        return _CYCLES / (first.elapsed_time(last) / 1e3)


def timer_for(device: torch.device) -> EventTimer:
    """The timer of a device: with a delay where its torch has a kernel for that."""
    can = hasattr(torch.get_device_module(device), "_sleep")
    return DelayTimer(device) if can else EventTimer(device)
