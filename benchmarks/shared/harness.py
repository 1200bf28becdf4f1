# SPDX-License-Identifier: Apache-2.0
"""The harness: variants in turns with `copy_` of the same bytes, every byte checked in the run.

In each round every variant is called once, in an order that rotates, with the next memory object.
A variant's ratio is the median over the rounds of the time of `copy_` / its own time, so that what
slows the whole machine down slows both. Bytes are checked before and behind the rounds, the output
poisoned each time. On a device the L2 cache is flushed before each call, and a delay kernel stands
before the first event: it outlasts the host's part, so that the events see device time alone.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from time import perf_counter, sleep
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from portakv.errors import PortaKVError
from portakv.runtime.devices import usual_device

Call = Callable[[int], object]  # takes the number of the memory object
Row = dict[str, Any]
Rows = list[Row]
#: A step's name, and what measures it.
Step = tuple[str, Callable[[], Rows]]

#: What goes wrong with a way, and is told in place of its figures.
FAILURES = (
    PortaKVError,
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AssertionError,
    AttributeError,
)
#: A row whose p90 is above this many times its median is flagged as noisy.
NOISY = 1.2
_LEAST_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of moving the bytes; its calls take a memory object's number."""

    labels: Mapping[str, Any]  # what identifies it in the results
    call: Call  # is timed
    poison: Call  # overwrites what the call will write
    right: Callable[[int], bool]  # every byte landed, and none elsewhere

    def check(self, i: int) -> bool:
        """Call it once, and look at every byte."""
        self.poison(i)
        self.call(i)
        return self.right(i)


class Measured(NamedTuple):
    """What the rounds gave for one variant."""

    labels: Mapping[str, Any]
    figures: Mapping[str, float]  # p10_us, p50_us, p90_us, ratio, ratio_p10, ratio_p90, host_us
    rounds: int
    hidden: bool  # the host's part of the call is not in the times
    verified: bool
    repeats: tuple[float, ...] = ()  # the ratios of single measurements, if there were several

    @property
    def noisy(self) -> bool:
        """True if the row is flagged: its spread is too wide to be quoted."""
        return self.figures["p90_us"] > NOISY * self.figures["p50_us"]

    def row(self, moved: int) -> Row:
        """What a row says of times; ``moved`` bytes count in its bandwidth."""
        return {
            **{name: short(value) for name, value in self.figures.items()},
            "gb_per_s": short(moved / self.figures["p50_us"] / 1e3),
            "rounds": self.rounds,
            "host_hidden": self.hidden,
            "noisy": self.noisy,
            "verified": self.verified,
        }


def usable(variants: Sequence[Variant], place: str, left_out: list[str]) -> list[Variant]:
    """The variants that can be called; adds a line on each other, which begins with ``place``."""
    good = []
    for variant in variants:
        try:
            variant.poison(0)
            variant.call(0)
        except FAILURES as error:
            names = [variant.labels[n] for n in ("backend", "op", "index") if n in variant.labels]
            left_out.append(f"{place}, {' '.join(names)}: {in_a_line(error)}")
            take_error()
        else:
            good.append(variant)
    return good


def take_error() -> None:
    """Take the error that a failed call left behind. CUDA keeps the last one, and torch raises it
    at the next launch of a kernel, which is another way's."""
    with suppress(RuntimeError):
        torch.ones(1, device=usual_device())


class Failed(str):
    """A line on what was asked for and failed, not on what is absent; the command ends with 1."""

    __slots__ = ()


def in_a_line(error: BaseException) -> str:
    """An error in a line, with the one that it came up behind, if any."""
    line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    behind = error.__context__
    return line if behind is None else f"{line} (behind {in_a_line(behind)})"


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, no garbage is collected: that takes the host longer than what is timed."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(
    ceiling: Variant,
    variants: Sequence[Variant],
    timer: Timer,
    objects: int,
    rounds: int,
    seconds: float,
) -> list[Measured]:
    """Measure variants beside ``ceiling``, `copy_` of the same bytes, whose row comes first; with
    so many memory objects in turns, in fewer rounds, but at least 5, if ``seconds`` are over."""
    everyone = [ceiling, *variants]
    verified = [all(variant.check(i) for i in range(objects)) for variant in everyone]
    settled = [timer.settle(variant.call, objects) for variant in everyone]
    samples: list[list[Sample]] = [[] for _ in everyone]
    began = perf_counter()
    with uncollected():
        for n in range(rounds):
            if n >= _LEAST_ROUNDS and perf_counter() - began > seconds:
                break
            for turn in range(len(everyone)):
                v = (n + turn) % len(everyone)
                i = (n * len(everyone) + turn) % objects  # never that of the call before
                samples[v].append(timer.sample(everyone[v].call, i, settled[v]))
    verified = [known and v.check(0) for known, v in zip(verified, everyone, strict=True)]
    found = []
    for variant, own, known in zip(everyone, samples, verified, strict=True):
        ratios = [c.elapsed / s.elapsed for c, s in zip(samples[0], own, strict=True)]
        figures = _quantiles([sample.elapsed for sample in own], "p{}_us", 10, 50, 90)
        figures["ratio"] = median(ratios)
        figures |= _quantiles(ratios, "ratio_p{}", 10, 90)
        figures["host_us"] = median(sample.host for sample in own)
        hidden = all(sample.hidden for sample in own)
        found.append(Measured(variant.labels, figures, len(own), hidden, known))
    return found


def _quantiles(values: Sequence[float], name: str, *percents: int) -> dict[str, float]:
    return {name.format(q): quantile(values, q / 100) for q in percents}


def merge(repeats: Sequence[Sequence[Measured]]) -> list[Measured]:
    """One result for each variant out of several measurements of all: medians of the medians."""
    return [
        Measured(
            same[0].labels,
            {name: median(one.figures[name] for one in same) for name in same[0].figures},
            sum(one.rounds for one in same),
            all(one.hidden for one in same),
            all(one.verified for one in same),
            tuple(one.figures["ratio"] for one in same),
        )
        for same in zip(*repeats, strict=True)
    ]


def short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def quantile(values: Sequence[float], q: float) -> float:
    """The q-th quantile, linear between neighbours."""
    return float(np.quantile(values, q))


def grouped(rows: Rows, *names: str) -> list[Rows]:
    """Rows apart by the values of some fields."""
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def having(rows: Sequence[Row], **fields: Any) -> Rows:
    """The rows whose fields have these values."""
    return [row for row in rows if all(row.get(name) == fields[name] for name in fields)]


def quickest(rows: Iterable[Row]) -> Row | None:
    """The row of the least time whose bytes were right."""
    return min((r for r in rows if r["verified"]), key=lambda r: float(r["p50_us"]), default=None)


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
REST = 0.02  # seconds


class Sample(NamedTuple):
    """One timed call, in microseconds."""

    elapsed: float
    host: float
    hidden: bool  # the host's part is not in ``elapsed``


class Timer(ABC):
    """Times single calls."""

    name: str  # what results call it

    def __init__(self, device: torch.device, settling: int) -> None:
        self._module = torch.get_device_module(device)
        self._settling = settling
        # For each call that was settled the microseconds from its beginning on an idle device until
        # the host sees its end; forgotten with the call, whose memory it would hold.
        self.alone: WeakKeyDictionary[Call, float] = WeakKeyDictionary()

    def settle(self, call: Call, objects: int) -> float:
        """Call it a few times; the median microseconds of its host's part on an idle device."""
        for i in range(objects):
            call(i)
        hosts = []
        walls = []
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
    """`time.perf_counter` from a call's beginning until its device has ended it. Before a call to
    an accelerator the host rests: threads that torch copied with look for more work for some
    milliseconds (libgomp: 8 - 10), and would take it from those of the next call."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, _LINK_SETTLING)
        self._on_cpu = device.type == "cpu"
        self.name = "perf_counter" + ("" if self._on_cpu else " round call and synchronisation")

    def sample(self, call: Call, i: int, settled: float) -> Sample:
        if not self._on_cpu:
            self._module.synchronize()
            sleep(REST)
        start = perf_counter()
        call(i)
        issued = perf_counter()
        self._module.synchronize()
        return Sample((perf_counter() - start) * 1e6, (issued - start) * 1e6, self._on_cpu)


class DeviceTimer(Timer):
    """Device events, behind a flush of the L2 cache and a delay kernel; ``link``: of copies to and
    from the host, which take the host and the link longer."""

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
        """The same, but the delay that hides its host time, 0.0 if nothing can."""
        host = super().settle(call, objects)
        return 0.0 if host > self._never_hidden else 2 * host + 50

    def sample(self, call: Call, i: int, settled: float) -> Sample:
        """The same; again behind a longer delay, if the host was late."""
        first, last = self._events
        for attempt in range(_TRIES):
            delay = settled * 2**attempt
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
            hidden = bool(self._sleep) and issued < delay
            if hidden or not self._sleep or not settled:
                break
        return Sample(first.elapsed_time(last) * 1e3, host, hidden)

    def _calibrate(self) -> float:
        """Clock cycles of the delay kernel in a microsecond."""
        cycles = 2_000_000
        (first, last) = self._events
        taken = list[float]()
        for _ in range(5):
            first.record()
            self._module._sleep(cycles)
            last.record()
            self._module.synchronize()
            taken.append(first.elapsed_time(last))
        return cycles / (min(taken) * 1e3)
