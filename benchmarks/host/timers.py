# SPDX-License-Identifier: Apache-2.0
"""Timers of copies between a device and the host: device time, and time on an idle stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter, sleep
from weakref import WeakKeyDictionary

import torch

from portakv_benchmarks.shared.timers import Call, DeviceTimer, Sample, Timer

#: Microseconds of host time from which on no delay kernel hides them: with thousands of copies
#: in the queue it would fill, and the host wait for the delay itself.
_SEEN = 3000.0
_TIMES = 3
_REST = 0.02  # seconds


class LinkTimer(DeviceTimer):
    """Device events round a call, as `DeviceTimer`; and what it takes where nothing hides it.

    Attributes:
        alone: for each call that was settled the microseconds from its beginning on an idle device
            until the host sees its end; forgotten with the call, whose memory it would hold.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.alone: WeakKeyDictionary[Call, float] = WeakKeyDictionary()

    def settle(self, call: Call, objects: int) -> float:
        """Call it a few times; returns the delay in microseconds that hides its host time."""
        hosts, self.alone[call] = _call_alone(call, objects, self._module.synchronize)
        return 0.0 if hosts > _SEEN else 2 * hosts + 50


class WallTimer:
    """The host's clock from a call's beginning until the device has ended it.

    Before it the host rests: threads that torch copied with look for more work for some
    milliseconds (libgomp: 8 - 10), and would take it from the threads of the next way.

    Attributes:
        alone: as in `LinkTimer`.
    """

    name = "perf_counter round call and synchronisation"

    def __init__(self, device: torch.device) -> None:
        self._synchronise = torch.get_device_module(device).synchronize
        self.alone: WeakKeyDictionary[Call, float] = WeakKeyDictionary()

    def settle(self, call: Call, objects: int) -> None:
        """Call it a few times."""
        self.alone[call] = _call_alone(call, objects, self._synchronise)[1]

    def sample(self, call: Call, i: int, settled: None) -> Sample:
        """Time one call with memory object ``i``."""
        self._synchronise()
        sleep(_REST)
        start = perf_counter()
        call(i)
        issued = perf_counter()
        self._synchronise()
        return Sample((perf_counter() - start) * 1e6, (issued - start) * 1e6, False)


def link_timer(device: torch.device) -> LinkTimer | WallTimer:
    """The timer of a device: events where it has them with times, else the host's clock."""
    return LinkTimer(device) if device.type == "cuda" else WallTimer(device)


def alone(timer: Timer, call: Call) -> float:
    """Microseconds of a call that was settled, on an idle device; 0 where nobody measured it."""
    known: Mapping[Call, float] = getattr(timer, "alone", {})
    return known.get(call, 0.0)


def _call_alone(call: Call, objects: int, synchronise: Callable[[], object]) -> tuple[float, float]:
    """Median microseconds of the host's part of a call, and of all of it."""
    for i in range(objects):
        call(i)
    hosts, walls = [], []
    for n in range(_TIMES):
        synchronise()
        start = perf_counter()
        call(n % objects)
        hosts.append((perf_counter() - start) * 1e6)
        synchronise()
        walls.append((perf_counter() - start) * 1e6)
    return median(hosts), median(walls)
