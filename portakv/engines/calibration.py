# SPDX-License-Identifier: Apache-2.0
"""Calibration: measures what the engines cost on a device, within a time that is given.

Each point copies so many runs of one size between blocks in random order, on the device and on the
host alike, with room between them, so that no two runs are neighbours and none fold. Every engine
copies the same blocks, and an engine whose bytes are wrong is left out. What a call keeps the host
is measured beside what the device takes, and is no part of it if it can be hidden.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from portakv.backends.base import Pending
from portakv.engines.choose import ORDER, Host, HostLaunch
from portakv.engines.costs import D2H, DIRECTIONS, Point, Table, cost, identity
from portakv.engines.engine import Terms, finish
from portakv.errors import PortaKVError
from portakv.host import pinned
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.devices import inside
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

#: Seconds that measuring takes at most.
SECONDS = 20.0
GAP = 256  # bytes between two blocks
OFTEN = 3


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        run_bytes: bytes of a run; multiples of 16.
        payloads: bytes of a copy; each makes a point for every run that fits into it.
        most_runs: the most runs of a point; beyond, cost rises by as much for each run.
        repeats: how often each point is timed, after one call that is not.
        short: bytes of a copy up to which its point is timed `OFTEN` times as often: short copies
            take one of two times on an H200 (1 MB: 26.7 and 34.9 us), and five of them in a row
            would often tell the rarer one.
        pageable: the largest payload between the device and pageable memory.
    """

    # Closer where copy engines turn from so many copies in a second to so many bytes.
    run_bytes: tuple[int, ...] = (
        256, 1 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10, 2 << 20,
    )  # fmt: skip
    payloads: tuple[int, ...] = (64 << 10, 1 << 20, 8 << 20, 64 << 20, 256 << 20)
    most_runs: int = 1 << 16
    repeats: int = 5
    short: int = 1 << 20
    pageable: int = 64 << 20

    def times(self, nbytes: int) -> int:
        """How often a point of so many bytes is timed."""
        return self.repeats * (OFTEN if nbytes <= self.short else 1)

    def runs(self, run_bytes: int, most: int) -> list[int]:
        """The numbers of runs of one size, rising, in payloads of at most ``most`` bytes."""
        fitting = [payload // run_bytes for payload in self.payloads if payload <= most]
        return sorted({min(max(1, n), self.most_runs) for n in fitting} or {1})

    def largest(self, most: int) -> int:
        """Bytes of the blocks, with their gaps, of the largest point."""
        return max(self.runs(size, most)[-1] * (size + GAP) for size in self.run_bytes)


GRID = Grid()


def calibrate(
    device: torch.device,
    seconds: float = SECONDS,
    grid: Grid | None = None,
    timer: EventTimer | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Table:
    """Measure the engines of a device.

    Args:
        device: an accelerator, idle.
        seconds: time to take at most; points that are left then are not measured.
        grid: what to measure; by default `GRID`.
        timer: how; by default `timer_for` the device.
        clock: seconds that pass.

    Raises:
        PortaKVError: no engine could be measured, with the reasons.
    """
    began = clock()
    grid = grid or GRID
    timer = timer or timer_for(device)
    work = _Work(device, grid, timer, Host(device, terms=_IDLE))
    whole = True
    for direction, size, runs, engine in work.points():
        expected = work.expected(engine, direction, size, runs) * (grid.times(size * runs) + 2)
        if clock() - began + expected > seconds:
            whole = False
            continue
        work.measure(engine, direction, size, runs)
    if not work.found:
        lines = "\n".join(f"  {name}: {why}" for name, why in work.left_out.items())
        said = lines or f"  {seconds:g} s are too few for the first point"
        raise PortaKVError(f"No engine could be measured on {device}:\n{said}")
    points = {key: dict(sorted(sizes.items())) for key, sizes in work.found.items()}
    emulated = bool(getattr(torch.get_device_module(device), "EMULATED", False))
    return Table(
        identity(device), points, work.left_out, emulated, clock() - began, whole,
        f"measured by this process on {device}{', which is emulated' if emulated else ''}",
        timer.name,
    )  # fmt: skip


_IDLE = Terms(overlap="idle")
#: What a point should take of which nothing is known yet: a fixed time, and for each run and byte.
_FIXED, _PER_RUN, _PER_BYTE = 50e-6, 0.5e-6, 1 / 20e9


class _Work:
    """What is measured with, and what was found so far."""

    def __init__(self, device: torch.device, grid: Grid, timer: EventTimer, host: Host) -> None:
        self.device, self._grid, self._timer, self._host = device, grid, timer, host
        self.left_out: dict[str, str] = dict(host.out)
        self.found: dict[tuple[str, str], dict[int, list[Point]]] = {}
        self._launches: dict[tuple[Form, Form], HostLaunch] = {}
        self._pools: dict[str, torch.Tensor] = {}

    def points(self) -> Iterator[tuple[str, int, int, str]]:
        """Every point; the ends of the grid first, so that a part of them spans it."""
        there = [engine for engine in ORDER if engine in self._host.engines]
        for size, pageable in product(_spread(self._grid.run_bytes), (False, True)):
            counts = _spread(self._grid.runs(size, self._most(pageable)))
            engines = [engine for engine in there if self.pageable(engine) == pageable]
            for runs, direction, engine in product(counts, DIRECTIONS, engines):
                yield direction, size, runs, engine

    def _most(self, pageable: bool) -> int:
        return self._grid.pageable if pageable else max(self._grid.payloads)

    def pageable(self, engine: str) -> bool:
        places = self._host.engines[engine].capabilities().places
        return any("pageable" in pair for pair in places)

    def expected(self, engine: str, direction: str, size: int, runs: int) -> float:
        """Seconds that a copy and a delay before it should take, by what was found so far."""
        columns = self.found.get((engine, direction))
        if not columns:
            return _FIXED + runs * (_PER_RUN + size * _PER_BYTE)
        host = cost(columns, "host_seconds", size, runs)
        return cost(columns, "seconds", size, runs) + host + min(host, SEEN)

    def measure(self, engine: str, direction: str, size: int, runs: int) -> None:
        """Measure one point; an engine that fails, or whose bytes are wrong, is left out."""
        if engine in self.left_out:
            return
        try:
            copy = _Copy(self, engine, direction, size, runs)
            if size not in self.found.get((engine, direction), {}):
                copy.prove()
            # A copy of pageable memory waits for the device, and would wait for a delay as well.
            kept = copy.host_seconds()
            hide = 0.0 if self.pageable(engine) else kept
            repeats = self._grid.times(size * runs)
            times = [self._timer.time(copy.call, hide) for _ in range(repeats)]
        except Exception as error:  # one engine that fails must not end the others
            with suppress(Exception):
                torch.accelerator.synchronize(self.device)
            self.left_out[engine] = f"{type(error).__name__} at {runs} runs of {size} B: {error}"
            for key in [key for key in self.found if key[0] == engine]:
                del self.found[key]
            return
        seconds, host = (median(column) for column in zip(*times, strict=True))
        column = self.found.setdefault((engine, direction), {}).setdefault(size, [])
        insort(column, Point(runs, seconds, host), key=lambda point: point.runs)

    def launch(self, src: Form, dst: Form) -> HostLaunch:
        """The launch between two forms; made once."""
        if (src, dst) not in self._launches:
            self._launches[src, dst] = self._host.prepare(CopyPlan(src, dst, 1, 1))
        return self._launches[src, dst]

    def blocks(self, place: str, size: int, runs: int) -> torch.Tensor:
        """``[runs, 1, size]`` bytes with gaps, out of one piece of memory for each place."""
        if place not in self._pools:
            nbytes = self._grid.largest(self._most(place == "pageable"))
            if place == "pinned":
                self._pools[place] = pinned.allocate(nbytes, fallback=False).tensor
            else:
                device = self.device if place == "device" else "cpu"
                self._pools[place] = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        pitch = size + GAP
        return self._pools[place][: runs * pitch].view(runs, 1, pitch)[:, :, :size]


class _Copy:
    """One engine's copy of so many blocks of one size."""

    def __init__(self, work: _Work, engine: str, direction: str, size: int, runs: int) -> None:
        places = ["device", "pageable" if work.pageable(engine) else "pinned"]
        self._engine, self._device, self._runs = engine, work.device, runs
        self._blocks = [
            work.blocks(place, size, runs) for place in places[:: 1 if direction == D2H else -1]
        ]
        self._orders = [np.random.default_rng(seed).permutation(runs) for seed in (1, 2)]
        src, dst = (KVView(each, "block token dim", block_size=1) for each in self._blocks)
        mine, theirs = (Index(order) for order in self._orders)
        self._move = Move(src, dst, mine, theirs, runs)
        self._launch = work.launch(src.form, dst.form)

    def call(self) -> Pending | None:
        """Copy every block, under lists that are wherever engines read them: new ones are sent by
        some and not by others, in a few microseconds that are not the copy's."""
        return self._launch.launch_by(self._engine, self._move, None)

    def host_seconds(self) -> float:
        """Seconds that a call keeps the host, once one was made before it."""
        for _ in range(2):
            torch.accelerator.synchronize(self._device)
            began = perf_counter()
            pending = self.call()
            taken = perf_counter() - began
            finish(pending)
        return taken

    def prove(self) -> None:
        """Raise `PortaKVError` unless a copy brings every block where it belongs."""
        for blocks, first in zip(self._blocks, (1, 128), strict=True):
            number = torch.arange(self._runs, device=blocks.device) % 127 + first
            blocks[:, 0, :] = number.to(torch.uint8)[:, None]
        finish(self.call())
        torch.accelerator.synchronize(self._device)
        sides = zip(self._blocks, self._orders, strict=True)
        wanted, found = (blocks.cpu()[torch.from_numpy(order)] for blocks, order in sides)
        if not torch.equal(wanted, found):
            raise PortaKVError("its bytes were wrong")


def _spread(values: Sequence[int]) -> list[int]:
    """The ends first, then the middle of each gap."""
    order, spans = list(dict.fromkeys((values[0], values[-1]))), [(0, len(values) - 1)]
    for low, high in spans:
        if high - low >= 2:
            middle = (low + high) // 2
            order.append(values[middle])
            spans += [(low, middle), (middle, high)]
    return order


Rows = Mapping[tuple[str, int, int], Mapping[str, Point]]


def by_point(table: Table) -> Rows:
    """The measurements of a table by direction, bytes of a run and runs, then by engine."""
    found: dict[tuple[str, int, int], dict[str, Point]] = {}
    for engine in ORDER:
        for direction in DIRECTIONS:
            for size, column in table.points.get((engine, direction), {}).items():
                for point in column:
                    found.setdefault((direction, size, point.runs), {})[engine] = point
    return dict(sorted(found.items()))


#: Seconds of host time from which on no delay hides them if they are more than this share of the
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


class EventTimer:
    """Times one copy by device events round a call on an idle device: what the host does first
    counts.

    Attributes:
        name: what its times are.
    """

    name = "device events round a call on an idle device"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events = [torch.Event(device, enable_timing=True) for _ in range(2)]

    def time(self, call: Callable[[], Pending | None], host_seconds: float = 0.0) -> Timed:
        """Time a call, whose work is ordered on the current stream unless it is pending; the last
        event stands behind what the host had to wait for. ``host_seconds``: what the call is taken
        to keep the host, which is to be hidden; 0: the call itself waits for the device."""
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
        """Time one call; again, if the host was late."""
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
        """A call behind a delay, and whether all of it was issued during it."""
        stream = torch.accelerator.current_stream(self.device)
        stream.synchronize()
        self._flushed.zero_()
        began = perf_counter()
        with inside(stream):  # on its device, whichever is the current one
            self._sleep(int(delay * self._rate))
        asked = perf_counter() - began
        timed = self._timed(call, stream)
        return timed, asked + timed.host_seconds < delay

    def _cycles_per_second(self) -> float:
        def asleep() -> None:
            with inside(torch.accelerator.current_stream(self.device)):
                self._sleep(_CYCLES)

        return _CYCLES / super().time(asleep).seconds


def timer_for(device: torch.device) -> EventTimer:
    """The timer of a device: with a delay if its torch has a kernel for that."""
    can = hasattr(torch.get_device_module(device), "_sleep")
    return DelayTimer(device) if can else EventTimer(device)
