# SPDX-License-Identifier: Apache-2.0
"""Timers: how long one call takes, on a CPU and on an accelerator.

On an accelerator the L2 cache is flushed before each call, and a delay kernel stands before the
first event: it outlasts the host's part of the call, so that the events see device time alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import torch

Call = Callable[[int], object]  # takes the number of the memory object

#: Microseconds of host time from which on no delay is put in front: such calls are thousands of
#: launches, more than a device queues, so that the host's time shows whatever the delay.
_NEVER_HIDDEN = 20_000.0
#: How often a call is timed again, behind a longer delay, when its host part was seen.
_TRIES = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed call, in microseconds. ``hidden``: the host's part is not in ``elapsed``."""

    elapsed: float
    host: float
    hidden: bool


class Timer(Protocol):
    """Times single calls."""

    name: str

    def settle(self, call: Call, objects: int) -> Any:
        """Warm a call up; returns what `sample` wants to know about it."""

    def sample(self, call: Call, i: int, settled: Any) -> Sample:
        """Time one call with memory object ``i``."""


class CpuTimer:
    """`time.perf_counter` around a call: the host is the device."""

    name = "perf_counter"

    def settle(self, call: Call, objects: int) -> None:
        """Call it with each memory object once."""
        for i in range(objects):
            call(i)

    def sample(self, call: Call, i: int, settled: None) -> Sample:
        """Time one call with memory object ``i``."""
        start = perf_counter()
        call(i)
        elapsed = (perf_counter() - start) * 1e6
        return Sample(elapsed, elapsed, True)


class DeviceTimer:
    """Device events, behind a flush of the L2 cache and a delay kernel."""

    name = "device events, L2 flushed, delay kernel in front"

    def __init__(self, device: torch.device) -> None:
        self._module = torch.get_device_module(device)
        self._sleep = getattr(self._module, "_sleep", None)
        if self._sleep is None:
            self.name = "device events, L2 flushed; no delay kernel on this device"
        properties = self._module.get_device_properties(device)
        flushed = 2 * (getattr(properties, "L2_cache_size", 0) or 128 << 20)
        self._flush = torch.empty(flushed // 8, dtype=torch.int64, device=device)
        self._events = [self._module.Event(enable_timing=True) for _ in range(2)]
        self._cycles_per_us = self._calibrate() if self._sleep else 0.0

    def settle(self, call: Call, objects: int) -> float:
        """Call it with each memory object; returns the delay in microseconds that hides it, 0.0
        where nothing can."""
        for i in range(objects):
            call(i)
        hosts = []
        for n in range(5):
            self._module.synchronize()
            start = perf_counter()
            call(n % objects)
            hosts.append((perf_counter() - start) * 1e6)
        self._module.synchronize()
        return 0.0 if median(hosts) > _NEVER_HIDDEN else 2 * median(hosts) + 50

    def sample(self, call: Call, i: int, settled: float) -> Sample:
        """Time one call with memory object ``i``; again, where the host was late."""
        for _ in range(_TRIES):
            taken = self._sample(call, i, settled)
            if taken.hidden or not self._sleep or not settled:
                break
            settled *= 2
        return taken

    def _sample(self, call: Call, i: int, delay: float) -> Sample:
        first, last = self._events
        self._flush.zero_()
        if self._sleep:
            self._sleep(int(delay * self._cycles_per_us))
        began = perf_counter()
        first.record()
        start = perf_counter()
        call(i)
        host = (perf_counter() - start) * 1e6
        last.record()
        issued = (perf_counter() - began) * 1e6
        self._module.synchronize()
        return Sample(first.elapsed_time(last) * 1e3, host, bool(self._sleep) and issued < delay)

    def _calibrate(self) -> float:
        """Clock cycles of the delay kernel in a microsecond."""
        assert self._sleep is not None
        cycles = 2_000_000
        rates: list[float] = []
        first, last = self._events
        for _ in range(5):
            first.record()
            self._sleep(cycles)
            last.record()
            self._module.synchronize()
            rates.append(cycles / (first.elapsed_time(last) * 1e3))
        return max(rates)


def timer_for(device: torch.device) -> Timer:
    """The timer of a device."""
    return CpuTimer() if device.type == "cpu" else DeviceTimer(device)
