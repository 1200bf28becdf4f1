# SPDX-License-Identifier: Apache-2.0
"""The two timers of the benchmarks: how long one call takes by the host's clock, or by a device's.

On a device the L2 cache is flushed before each call, and a delay kernel stands before the first
event: it outlasts the host's part of the call, so that the events see device time alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter, sleep
from weakref import WeakKeyDictionary

import torch

Call = Callable[[int], object]  # takes the number of the memory object

#: Microseconds of host time from which on no delay is put in front of a call inside a device: such
#: calls are thousands of launches, more than a device queues, so that the host's time shows anyway.
NEVER_HIDDEN = 20_000.0
#: The same for copies to and from the host: with thousands of them in the queue it would fill, and
#: the host wait for the delay itself.
LINK_NEVER_HIDDEN = 3000.0
#: How often a call is timed again, behind a longer delay, when its host part was seen.
_TRIES = 4
#: Calls on an idle device that say how long the host takes.
_SETTLING = 5
_LINK_SETTLING = 3
_REST = 0.02  # seconds


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed call, in microseconds. ``hidden``: the host's part is not in ``elapsed``."""

    elapsed: float
    host: float
    hidden: bool


class Timer(ABC):
    """Times single calls.

    Attributes:
        name: what results call it.
        alone: for each call that was settled the microseconds from its beginning on an idle device
            until the host sees its end; forgotten with the call, whose memory it would hold.
    """

    name: str

    def __init__(self, device: torch.device, settling: int) -> None:
        self._module = torch.get_device_module(device)
        self._settling = settling
        self.alone: WeakKeyDictionary[Call, float] = WeakKeyDictionary()

    def settle(self, call: Call, objects: int) -> float:
        """Call it a few times; returns the median microseconds of its host's part on an idle
        device, which `sample` takes."""
        for i in range(objects):
            call(i)
        hosts, walls = [], []
        for n in range(self._settling):
            self._module.synchronize()
            start = perf_counter()
            call(n % objects)
            hosts.append((perf_counter() - start) * 1e6)
            self._module.synchronize()
            walls.append((perf_counter() - start) * 1e6)
        self.alone[call] = median(walls)
        return median(hosts)

    @abstractmethod
    def sample(self, call: Call, i: int, settled: float) -> Sample:
        """Time one call with memory object ``i``."""


class HostTimer(Timer):
    """`time.perf_counter` from a call's beginning until its device has ended it.

    Before a call to an accelerator the host rests: threads that torch copied with look for more
    work for some milliseconds (libgomp: 8 - 10), and would take it from those of the next call.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, _LINK_SETTLING)
        self._on_cpu = device.type == "cpu"
        self.name = "perf_counter" + ("" if self._on_cpu else " round call and synchronisation")

    def sample(self, call: Call, i: int, settled: float) -> Sample:
        """Time one call with memory object ``i``."""
        if not self._on_cpu:
            self._module.synchronize()
            sleep(_REST)
        start = perf_counter()
        call(i)
        issued = perf_counter()
        self._module.synchronize()
        return Sample((perf_counter() - start) * 1e6, (issued - start) * 1e6, self._on_cpu)


class DeviceTimer(Timer):
    """Device events, behind a flush of the L2 cache and a delay kernel.

    Args:
        device: an accelerator.
        link: times copies to and from the host, which take the host and the link longer.
    """

    def __init__(self, device: torch.device, link: bool = False) -> None:
        super().__init__(device, _LINK_SETTLING if link else _SETTLING)
        self._never_hidden = LINK_NEVER_HIDDEN if link else NEVER_HIDDEN
        self._sleep = getattr(self._module, "_sleep", None)
        self.name = "device events, L2 flushed" + (
            ", delay kernel in front" if self._sleep else "; no delay kernel on this device"
        )
        properties = self._module.get_device_properties(device)
        flushed = 2 * (getattr(properties, "L2_cache_size", 0) or 128 << 20)
        self._flush = torch.empty(flushed // 8, dtype=torch.int64, device=device)
        self._events = [self._module.Event(enable_timing=True) for _ in range(2)]
        self._cycles_per_us = self._calibrate() if self._sleep else 0.0

    def settle(self, call: Call, objects: int) -> float:
        """Call it a few times; returns the delay in microseconds that hides its host time, 0.0 if
        nothing can."""
        host = super().settle(call, objects)
        return 0.0 if host > self._never_hidden else 2 * host + 50

    def sample(self, call: Call, i: int, settled: float) -> Sample:
        """Time one call with memory object ``i``; again, if the host was late."""
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
        cycles, rates = 2_000_000, list[float]()
        first, last = self._events
        for _ in range(5):
            first.record()
            self._sleep(cycles)
            last.record()
            self._module.synchronize()
            rates.append(cycles / (first.elapsed_time(last) * 1e3))
        return max(rates)
