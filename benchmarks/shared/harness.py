# SPDX-License-Identifier: Apache-2.0
"""Measure variants in turns with `copy_` of the same bytes, and check every byte in the run.

In each round every variant is called once, in an order drawn by lot, with the next memory object.
A variant's ratio is the median over the rounds of the time of `copy_` / the variant's time. A slow
machine thus slows both. Bytes are checked before and after the rounds, with a poisoned output. On a
device the L2 cache is flushed before each call, and a delay kernel precedes the first event. The
delay outlasts the host's part, so the events measure device time alone.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from random import Random
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
#: The fields of a result, a machine or a row by name, as JSON holds them.
Fields = Mapping[str, Any]
Rows = list[Row]
#: A step's name, and the function that measures it.
Step = tuple[str, Callable[[], Rows]]

#: Errors of a method, which are reported in place of its figures.
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
SEED = 20261125  # of the orders


@dataclass(frozen=True, slots=True)
class Variant:
    """One method of moving the bytes; its calls take a memory object's number."""

    labels: Fields  # identify the variant in the results
    call: Call  # is timed
    poison: Call  # overwrites the destination of the call
    right: Callable[[int], bool]  # whether every byte arrived, and no other byte changed

    def check(self, i: int) -> bool:
        """Call it once, and return whether every byte is right."""
        self.poison(i)
        self.call(i)
        return self.right(i)


class Measured(NamedTuple):
    """The measurements of one variant."""

    labels: Fields
    figures: Mapping[str, float]  # p10_us, p50_us, p90_us, ratio, ratio_p10, ratio_p90, host_us
    rounds: int
    hidden: bool  # the host's part of the call is not in the times
    verified: bool
    repeats: tuple[float, ...] = ()  # the ratios of single measurements, if there were several

    @property
    def noisy(self) -> bool:
        """Return True if the row's spread is too wide to be quoted."""
        return self.figures["p90_us"] > NOISY * self.figures["p50_us"]

    def row(self, moved: int) -> Row:
        """Return a row's fields of times; ``moved`` bytes count in its bandwidth."""
        return {
            **{name: short(value) for name, value in self.figures.items()},
            "gb_per_s": short(moved / self.figures["p50_us"] / 1e3),
            "rounds": self.rounds,
            "host_hidden": self.hidden,
            "noisy": self.noisy,
            "verified": self.verified,
        }


def usable(variants: Sequence[Variant], place: str, left_out: list[str]) -> list[Variant]:
    """Return the variants that can be called; add a line with ``place`` for each failing one."""
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
    """Clear the error of a failed call.

    CUDA retains the last error, and torch raises it at the next launch of a kernel, which belongs
    to another method.
    """
    with suppress(RuntimeError):
        torch.ones(1, device=usual_device())


class Failed(str):
    """A line about a requested part that failed, not about an absent part; the exit code is 1."""

    __slots__ = ()


def in_a_line(error: BaseException) -> str:
    """Return an error in a line, with the error during whose handling it occurred, if any."""
    line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    context = error.__context__
    return line if context is None else f"{line} (after {in_a_line(context)})"


@contextmanager
def uncollected() -> Iterator[None]:
    """Disable garbage collection inside: it takes the host longer than the timed calls."""
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
    """Measure variants in turns with ``ceiling``, `copy_` of the same bytes, which comes first.

    The order of a round is drawn by lot: a copy's time depends on the one before it. The calls
    rotate over ``objects`` memory objects. After ``seconds`` no round starts, except that at
    least 5 rounds run.
    """
    drawn = Random(SEED)
    everyone = [ceiling, *variants]
    verified = [all(variant.check(i) for i in range(objects)) for variant in everyone]
    settled = [timer.settle(variant.call, objects) for variant in everyone]
    samples: list[list[Sample]] = [[] for _ in everyone]
    began = perf_counter()
    with uncollected():
        for n in range(rounds):
            if n >= _LEAST_ROUNDS and perf_counter() - began > seconds:
                break
            for turn, v in enumerate(drawn.sample(range(len(everyone)), len(everyone))):
                i = (n * len(everyone) + turn) % objects  # differs from that of the previous call
                samples[v].append(timer.sample(everyone[v].call, i, settled[v]))
    verified = [known and v.check(0) for known, v in zip(verified, everyone, strict=True)]
    results = []
    for variant, own, known in zip(everyone, samples, verified, strict=True):
        ratios = [c.elapsed / s.elapsed for c, s in zip(samples[0], own, strict=True)]
        figures = _quantiles([sample.elapsed for sample in own], "p{}_us", 10, 50, 90)
        figures["ratio"] = median(ratios)
        figures |= _quantiles(ratios, "ratio_p{}", 10, 90)
        figures["host_us"] = median(sample.host for sample in own)
        hidden = all(sample.hidden for sample in own)
        results.append(Measured(variant.labels, figures, len(own), hidden, known))
    return results


def _quantiles(values: Sequence[float], name: str, *percents: int) -> dict[str, float]:
    return {name.format(q): quantile(values, q / 100) for q in percents}


def merge(repeats: Sequence[Sequence[Measured]]) -> list[Measured]:
    """Merge several measurements of all variants: medians of the medians, for each variant."""
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
    """Return a number with four significant digits."""
    return float(f"{value:.4g}")


def quantile(values: Sequence[float], q: float) -> float:
    """Return the q-th quantile, linear between neighbours."""
    return float(np.quantile(values, q))


def grouped(rows: Rows, *names: str) -> list[Rows]:
    """Return groups of rows with equal values of some fields."""
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def having(rows: Sequence[Row], **fields: object) -> Rows:
    """Return the rows whose fields have these values."""
    return [row for row in rows if all(row.get(name) == fields[name] for name in fields)]


def quickest(rows: Iterable[Row]) -> Row | None:
    """Return the row of the least time whose bytes were right."""
    return min((r for r in rows if r["verified"]), key=lambda r: float(r["p50_us"]), default=None)


#: Microseconds of host time from which on no delay is put in front of a call inside a device: such
#: calls are thousands of launches, more than a device queues, so that the host's time shows anyway.
NEVER_HIDDEN = 20_000.0
#: The same for copies to and from the host: with thousands of them in the queue it would fill, and
#: the host wait for the delay itself.
LINK_NEVER_HIDDEN = 3000.0
#: How often a call is timed again, after a longer delay, if its host part was visible.
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

    name: str  # the timer's name in results

    def __init__(self, device: torch.device, settling: int) -> None:
        self._module = torch.get_device_module(device)
        self._settling = settling
        # For each call that was settled the microseconds from its beginning on an idle device until
        # the host sees its end; forgotten with the call, whose memory it would hold.
        self.alone: WeakKeyDictionary[Call, float] = WeakKeyDictionary()

    def settle(self, call: Call, objects: int) -> float:
        """Call it a few times; return the host's median microseconds on an idle device."""
        for i in range(objects):
            call(i)
        hosts = []
        elapsed_times = []
        for n in range(self._settling):
            self._module.synchronize()
            start = perf_counter()
            call(n % objects)
            hosts.append((perf_counter() - start) * 1e6)
            self._module.synchronize()
            elapsed_times.append((perf_counter() - start) * 1e6)
        self.alone[call] = median(elapsed_times)
        return median(hosts)

    @abstractmethod
    def sample(self, call: Call, i: int, settled: float) -> Sample:
        """Time one call with memory object ``i``."""


class HostTimer(Timer):
    """Time a call by `time.perf_counter`, from its start until its device has ended it.

    Before a call to an accelerator the host rests. Threads of torch look for more work for some
    milliseconds (libgomp: 8 - 10), and would take processor time from the next call. With ``busy``
    the call follows one of its kind instead, as in a process that works all the time: on an H100's
    host a memcpy's call took 10 us there, 30 after calls of other kinds and 150 after a rest.
    """

    def __init__(self, device: torch.device, busy: bool = False) -> None:
        super().__init__(device, _LINK_SETTLING)
        self._on_cpu = device.type == "cpu"
        self._busy = busy
        self.name = "perf_counter" + ("" if self._on_cpu else " round call and synchronisation")
        if busy:
            self.name += ", after a call of its kind"

    def sample(self, call: Call, i: int, settled: float) -> Sample:
        if self._busy:
            call(i)
        if not self._on_cpu:
            self._module.synchronize()
            if not self._busy:
                sleep(REST)
        start = perf_counter()
        call(i)
        issued = perf_counter()
        self._module.synchronize()
        return Sample((perf_counter() - start) * 1e6, (issued - start) * 1e6, self._on_cpu)


class DeviceTimer(Timer):
    """Time a call by device events, after a flush of the L2 cache and a delay kernel.

    ``link`` is for copies to and from the host, which take the host and the link longer.
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
        """Call it a few times; return the delay that hides its host time, 0.0 if no delay can."""
        host = super().settle(call, objects)
        return 0.0 if host > self._never_hidden else 2 * host + 50

    def sample(self, call: Call, i: int, settled: float) -> Sample:
        """Time one call, again after a longer delay if the host was late."""
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
        """Return the delay kernel's clock cycles in a microsecond."""
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
