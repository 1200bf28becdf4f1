# SPDX-License-Identifier: Apache-2.0
"""Calibration: measures the cost of the strategies on a device, within a limited time.

Each point copies a number of runs of one size between blocks in random order, on the device and on
the host. Gaps lie between the blocks, so that no two runs are neighbours and none fold. Every
strategy copies the same blocks, and a strategy with wrong bytes is left out. The time that a call
occupies the host is measured separately. It is not part of the device's time if it can be hidden.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from portakv.backends.base import Pending
from portakv.core.pick import ORDER
from portakv.errors import PortaKVError
from portakv.host import pinned
from portakv.interconnect.choose import Host, HostLaunch
from portakv.interconnect.costs import DIRECTIONS, Point, Table, cost, identity
from portakv.interconnect.strategy import Terms, finish
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.devices import inside
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

#: The most seconds of measuring.
SECONDS = 20.0
GAP = 256  # bytes between two blocks
OFTEN = 3

#: A copy to time.
Call = Callable[[], Pending | None]


@dataclass(frozen=True)
class Grid:
    """The points to measure.

    Attributes:
        run_bytes: bytes of a run; multiples of 16.
        payloads: bytes of a copy; each gives a point for every run size that fits into it.
        most_runs: the most runs of a point; beyond, each further run adds the same cost.
        repeats: how often each point is timed, after one call that is not timed.
        short: bytes of a copy up to which it is timed `OFTEN` times as often. On an H200 a short
            copy takes one of two times (1 MB: 26.7 and 34.9 us), and five measurements often show
            the rarer one.
        pageable: the largest payload between the device and pageable memory.
    """

    # Sizes are closer where copy engines change from a limit on copies in a second to a limit on
    # bytes.
    run_bytes: tuple[int, ...] = (
        256,
        1 << 10,
        4 << 10,
        8 << 10,
        16 << 10,
        32 << 10,
        64 << 10,
        256 << 10,
        2 << 20,
    )
    payloads: tuple[int, ...] = (64 << 10, 1 << 20, 8 << 20, 64 << 20, 256 << 20)
    most_runs: int = 1 << 16
    repeats: int = 5
    short: int = 1 << 20
    pageable: int = 64 << 20

    def times(self, nbytes: int) -> int:
        """Return how often a point of ``nbytes`` is timed."""
        return self.repeats * (OFTEN if nbytes <= self.short else 1)

    def runs(self, run_bytes: int, pageable: bool = False) -> list[int]:
        """Return the numbers of runs of one size, rising."""
        most = self.pageable if pageable else max(self.payloads)
        fitting = [payload // run_bytes for payload in self.payloads if payload <= most]
        return sorted({min(max(1, n), self.most_runs) for n in fitting} or {1})

    def largest(self, pageable: bool) -> int:
        """Return the bytes of the blocks, with their gaps, of the largest point."""
        return max(self.runs(size, pageable)[-1] * (size + GAP) for size in self.run_bytes)


GRID = Grid()


def calibrate(
    device: torch.device,
    seconds: float = SECONDS,
    grid: Grid | None = None,
    timer: Timer | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Table:
    """Measure the strategies of an idle accelerator.

    Args:
        seconds: the most time; points that do not fit are left out.
        grid: the points (default: `GRID`).
        timer: times one copy (default: a `Timer`).
        clock: measures the time that is left.

    Raises:
        PortaKVError: no strategy could be measured, with the reasons.
    """
    began = clock()
    grid = grid or GRID
    work = Work(device, grid, timer or Timer(device), Host(device, terms=Terms(overlap="idle")))
    whole = True
    for point in work.points():
        if clock() - began + work.expected(*point) > seconds:
            whole = False
        else:
            work.measure(*point)
    if not work.results:
        lines = "\n".join(f"  {name}: {why}" for name, why in work.left_out.items())
        reasons = lines or f"  {seconds:g} s are too few for the first point"
        raise PortaKVError(f"No strategy could be measured on {device}:\n{reasons}")
    points = {key: dict(sorted(sizes.items())) for key, sizes in work.results.items()}
    emulated = bool(getattr(torch.get_device_module(device), "EMULATED", False))
    return Table(
        identity(device),
        points,
        work.left_out,
        emulated,
        clock() - began,
        whole,
        f"measured by this process on {device}{', which is emulated' if emulated else ''}",
        work.timer.name,
    )


#: The expected cost of a point without results: a fixed time, and for each run and byte.
_FIXED = 50e-6
_PER_RUN = 0.5e-6
_PER_BYTE = 1 / 20e9


class Work:
    """The tools and the results of a calibration.

    A point is a strategy, a direction, bytes of a run, and a number of runs.
    """

    def __init__(self, device: torch.device, grid: Grid, timer: Timer, host: Host) -> None:
        self.device = device
        self.timer = timer
        self._grid = grid
        self._host = host
        self.left_out: dict[str, str] = dict(host.out)
        self.results: dict[tuple[str, str], dict[int, list[Point]]] = {}
        self._launches: dict[tuple[Form, Form], HostLaunch] = {}
        self._pools: dict[str, torch.Tensor] = {}

    def points(self) -> Iterator[tuple[str, str, int, int]]:
        """Yield every point; the ends of the grid first, so that a part of the points spans the
        grid."""
        served = [strategy for strategy in ORDER if strategy in self._host.strategies]
        for size, pageable in product(spread(self._grid.run_bytes), (False, True)):
            counts = spread(self._grid.runs(size, pageable))
            strategies = [strategy for strategy in served if self._pageable(strategy) == pageable]
            for runs, direction, strategy in product(counts, DIRECTIONS, strategies):
                yield strategy, direction, size, runs

    def _pageable(self, strategy: str) -> bool:
        places = self._host.strategies[strategy].capabilities().places
        return any("pageable" in pair for pair in places)

    def expected(self, strategy: str, direction: str, size: int, runs: int) -> float:
        """Return the seconds that a point should take, with the delays before its copies, by the
        results so far."""
        columns = self.results.get((strategy, direction))
        one = _FIXED + runs * _PER_RUN
        one += runs * size * _PER_BYTE
        if columns:
            columns = dict(sorted(columns.items()))
            seconds, host = cost(columns, size, runs)
            one = seconds + host + min(host, SEEN)
        return one * (self._grid.times(size * runs) + 2)

    def measure(self, strategy: str, direction: str, size: int, runs: int) -> None:
        """Measure one point. A strategy that fails, or copies wrong bytes, is left out."""
        if strategy in self.left_out:
            return
        column = self.results.setdefault((strategy, direction), {}).setdefault(size, [])
        try:
            times = self._times(strategy, direction, size, runs, prove=not column)
        except Exception as error:  # a strategy that fails must not end the measurement
            with suppress(RuntimeError):  # the device may fail again; the first error counts
                torch.accelerator.synchronize(self.device)
            self.left_out[strategy] = f"{type(error).__name__} at {runs} runs of {size} B: {error}"
            self.results = {key: sizes for key, sizes in self.results.items() if key[0] != strategy}
            return
        seconds, host = (median(each) for each in zip(*times, strict=True))
        insort(column, Point(runs, seconds, host), key=lambda point: point.runs)

    def _times(
        self, strategy: str, direction: str, size: int, runs: int, prove: bool
    ) -> list[Timed]:
        """Return the times of one point.

        The ids are wherever the strategies read them: some strategies send new ids, in a few
        microseconds that do not belong to the copy.
        """
        pageable = self._pageable(strategy)
        places = ["device", "pageable" if pageable else "pinned"]
        ends = [self.blocks(x, size, runs) for x in places[:: 1 if direction == "d2h" else -1]]
        draws = [np.random.default_rng(seed).permutation(runs) for seed in (1, 2)]
        orders = [torch.from_numpy(each) for each in draws]
        src, dst = (KVView(blocks, "block token dim", block_size=1) for blocks in ends)
        forms = src.form, dst.form
        if forms not in self._launches:
            self._launches[forms] = self._host.prepare(CopyPlan(*forms, 1, 1))
        move = Move(src, dst, Index(orders[0]), Index(orders[1]), runs)
        call = partial(self._launches[forms].launch_by, strategy, move, None)
        if prove:
            self._prove(call, ends, orders)
        for _ in range(2):  # the second call: how long it occupies the host when warm
            torch.accelerator.synchronize(self.device)
            began = perf_counter()
            pending = call()
            host = perf_counter() - began
            finish(pending)
        # A copy of pageable memory waits for the device, and would wait for a delay as well.
        hide = 0.0 if pageable else host
        return [self.timer.time(call, hide) for _ in range(self._grid.times(size * runs))]

    def _prove(self, call: Call, ends: Sequence[torch.Tensor], ids: Sequence[torch.Tensor]) -> None:
        """Raise `PortaKVError` unless a copy puts every block in its place."""
        for blocks, first in zip(ends, (1, 128), strict=True):
            number = torch.arange(blocks.shape[0], device=blocks.device) % 127 + first
            blocks[:, 0, :] = number.to(torch.uint8)[:, None]
        finish(call())
        torch.accelerator.synchronize(self.device)
        sides = zip(ends, ids, strict=True)
        expected, copied = (blocks.cpu()[order] for blocks, order in sides)
        if not torch.equal(expected, copied):
            raise PortaKVError("its bytes were wrong")

    def blocks(self, place: str, size: int, runs: int) -> torch.Tensor:
        """Return ``[runs, 1, size]`` bytes with gaps, from one allocation for each place."""
        if place not in self._pools:
            nbytes = self._grid.largest(place == "pageable")
            if place == "pinned":
                self._pools[place] = pinned.allocate(nbytes, fallback=False).tensor
            else:
                device = self.device if place == "device" else "cpu"
                self._pools[place] = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        pitch = size + GAP
        return self._pools[place][: runs * pitch].view(runs, 1, pitch)[:, :, :size]


def spread(values: Sequence[int]) -> list[int]:
    """Return the ends first, then the middle of each gap."""
    order = list(dict.fromkeys((values[0], values[-1])))
    spans = [(0, len(values) - 1)]
    for low, high in spans:
        if high - low >= 2:
            middle = (low + high) // 2
            order.append(values[middle])
            spans += [(low, middle), (middle, high)]
    return order


def by_point(table: Table) -> dict[tuple[str, int, int], dict[str, Point]]:
    """Return the measurements of a table by direction, bytes of a run and runs, then by
    strategy."""
    points: dict[tuple[str, int, int], dict[str, Point]] = {}
    for strategy, direction in product(ORDER, DIRECTIONS):
        for size, column in table.points.get((strategy, direction), {}).items():
            for point in column:
                points.setdefault((direction, size, point.runs), {})[strategy] = point
    return dict(sorted(points.items()))


#: Host seconds from which no delay hides the host's part, if it is more than `SHARE` of the whole:
#: consecutive calls wait for the host, however early it starts. With thousands of copies in its
#: queue the device accepts no more.
SEEN = 3e-3
SHARE = 0.75
#: How often a call is timed again, after a longer delay, if its host part was visible.
TRIES = 4
#: How a `Timer` describes its times, without a delay and with one.
IDLE = "device events round a call on an idle device"
DELAYED = (
    "device events, after a delay except for calls that keep the host over "
    f"{SEEN * 1e3:.0f} ms and for {SHARE:.0%} of their time"
)
_FLUSHED = 128 << 20  # bytes that clear a cache if torch does not report its size
CYCLES = 2_000_000


class Timed(NamedTuple):
    """The seconds until a copy arrived, and the seconds that its call occupied the host."""

    seconds: float
    host_seconds: float


class Timer:
    """Time one copy by device events around a call on an idle device; the host's part before the
    copy counts.

    If the device's torch has a kernel that sleeps, the first event follows such a kernel, which
    outlasts the host's part, and a flush of the L2 cache: rows of a cache that a model has left lie
    in memory.

    Attributes:
        name: the kind of its times.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = IDLE
        self._events = [torch.Event(device, enable_timing=True) for _ in range(2)]
        module = torch.get_device_module(device)
        self._sleep: Callable[[int], object] | None = getattr(module, "_sleep", None)
        if self._sleep is not None:
            self.name = DELAYED
            properties = module.get_device_properties(device)
            flushed = 2 * (getattr(properties, "L2_cache_size", 0) or _FLUSHED)
            self._flushed = torch.empty(flushed // 8, dtype=torch.int64, device=device)
            asleep = partial(self._asleep, self._sleep, CYCLES)
            self._rate = max(CYCLES / self._seen(asleep).seconds for _ in range(5))

    def time(self, call: Call, host_seconds: float = 0.0) -> Timed:
        """Time a call, whose work is ordered on the current stream unless it is pending.

        The call is timed again if the host was late. ``host_seconds``: the expected time that the
        call occupies the host, which the delay hides. 0: the call itself waits for the device.
        """
        if self._sleep is None or host_seconds <= 0:
            return self._seen(call)
        if host_seconds >= SEEN:
            seen = self._seen(call)
            if host_seconds > SHARE * seen.seconds:
                return seen
        delay = 2 * host_seconds + 50e-6
        for _ in range(TRIES):
            self._idle()
            self._flushed.zero_()
            began = perf_counter()
            self._asleep(self._sleep, int(delay * self._rate))
            issued = perf_counter() - began
            timed = self._timed(call)
            if issued + timed.host_seconds < delay:  # the whole call was issued during the delay
                return timed
            delay *= 2
        # The host waited for the delay itself, so the measured time is not the call's.
        return self._seen(call)

    def _seen(self, call: Call) -> Timed:
        self._idle()
        return self._timed(call)

    def _idle(self) -> None:
        torch.accelerator.current_stream(self.device).synchronize()

    def _asleep(self, sleep: Callable[[int], object], cycles: int) -> None:
        with inside(torch.accelerator.current_stream(self.device)):  # any device may be current
            sleep(cycles)

    def _timed(self, call: Call) -> Timed:
        """Time a call between two events. The last event follows the work that the host had to wait
        for."""
        stream = torch.accelerator.current_stream(self.device)
        first, last = self._events
        first.record(stream)
        began = perf_counter()
        pending = call()
        host = perf_counter() - began
        finish(pending)
        last.record(stream)
        last.synchronize()
        return Timed(first.elapsed_time(last) / 1e3, host)
