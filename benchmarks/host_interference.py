# SPDX-License-Identifier: Apache-2.0
"""What a transfer does to the model that is running: loops of compute beside each way.

A loop runs on one stream. In a side stream blocks are moved at full speed from before its first
step until its last has ended, a few transfers in the queue at any time. The slow-down is the time
of the loop / its time alone in the same repeat - 1; the link's bandwidth counts the transfers that
had ended by then, by the host's clock. Nothing but the loop has an event that tells the time: one
for each transfer cost the link of an H200 up to 9 %, and on a stream that only waits it kept the
loop from beginning. Repeats take the ways in turns, in an order that rotates.

Peers meet the loops in a part of their own, since a kernel that fails may leave the process
without its device.
"""

from __future__ import annotations

import gc
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch

from portakv.errors import PortaKVError
from portakv.transfer import Transfer

from .command import Rows, Step
from .host_cases import DIRECTIONS, Case, case_of, scene
from .host_loops import Loop, attention, matmul, timed_event
from .host_memory import Sides
from .host_suite import KB, Bench, short
from .host_ways import (
    CHOSEN,
    DESCRIPTORS,
    HOST,
    HOST_DETACHED,
    MEMCPY,
    STAGED,
    Way,
    direct,
    plain,
)

#: Transfers in the queue at a time: several milliseconds of the link's time, in which the host
#: issues the loop and the next ones.
_AHEAD = 4
#: Ways that a bar judges are repeated in full, the others this often at most.
_OTHERS = 2
_JUDGED = (MEMCPY, CHOSEN, HOST_DETACHED.name)
_RUNS = (2 * KB, 256)
#: What goes wrong with a way, and is told in place of its figures.
_FAILURES = (PortaKVError, RuntimeError, TypeError, ValueError)


@dataclass
class Mover:
    """A way of moving a case, and what its meetings with the loop gave.

    Attributes:
        labels: what identifies it in the results.
        issue: moves the case once behind the current stream; a handle that tells the end, or None
            where that stream does.
        poison, right: as in `harness.Variant`.
        payload: bytes of one transfer.
        way: the engine and its terms; None of a peer, and of memcpy.
        times, alone: milliseconds of the loop beside it, and alone in the same repeat.
        links: 10^9 bytes in a second meanwhile.
        dry: how often all transfers had ended when the next was issued.
    """

    labels: dict[str, Any]
    issue: Callable[[], object]
    poison: Callable[[], None]
    right: Callable[[], bool]
    payload: int
    way: Way | None = None
    times: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    links: list[float] = field(default_factory=list)
    dry: int = 0
    verified: bool = True

    @property
    def judged(self) -> bool:
        """Whether a bar asks for it."""
        return self.labels["backend"] in _JUDGED

    def __str__(self) -> str:
        return f"{self.labels['backend']} {self.labels['shape']}"


def _matmul(bench: Bench) -> Loop:
    return matmul(bench.device, bench.preset.matmul, bench.preset.loop_seconds)


def _attention(bench: Bench) -> Loop:
    return attention(bench.device, bench.preset.attention, bench.preset.loop_seconds)


_LOOPS: dict[str, Callable[[Bench], Loop]] = {"matmul": _matmul, "attention": _attention}

#: Adds movers of a direction, and lines on those that there cannot be.
Movers = Callable[[Bench, str, list[str]], Iterable[Mover]]


def interference_steps(bench: Bench) -> Iterator[Step]:
    """A step for each loop and direction, beside plain memcpy and every engine."""
    for direction in DIRECTIONS:
        for name, make in _LOOPS.items():
            measure = partial(_measure, bench, make, direction, _engines, bench.preset.repeats)
            yield f"beside {name}, {direction}", measure


def peer_steps(bench: Bench) -> Iterator[Step]:
    """The same beside plain memcpy and peers; no step where there are none."""
    for direction in DIRECTIONS if bench.peers else ():
        for name, make in _LOOPS.items():
            repeats = min(_OTHERS, bench.preset.repeats)
            measure = partial(_measure, bench, make, direction, _peers, repeats)
            yield f"peers beside {name}, {direction}", measure


def _measure(
    bench: Bench, make: Callable[[Bench], Loop], direction: str, movers: Movers, repeats: int
) -> tuple[Rows, list[str]]:
    loop = make(bench)
    left_out: list[str] = []
    ways = _Ways(bench, f"beside {loop.name}, {direction}", left_out)
    usable = [one for one in movers(bench, direction, left_out) if ways.tried(one, _try)]
    streams = bench.stream(), bench.stream()
    for n in range(repeats if ways.usable else 0):
        alone = _meet(bench, loop, None, streams)[0]
        turn = n % max(1, len(usable))
        for mover in (*usable[turn:], *usable[:turn]):
            if n >= _OTHERS and not mover.judged:
                continue
            if ways.tried(mover, partial(_beside, bench, loop, streams, alone)):
                continue
            usable.remove(mover)
            if not ways.usable:
                break
        if not ways.usable:
            break
    rows = [_row(loop, direction, mover) for mover in usable if mover.times]
    compare(rows)
    return [row for row in rows if movers is _engines or row["backend"] != MEMCPY], left_out


class _Ways:
    """Keeps the ways apart: what one of them does wrong is told, and the others go on for as long
    as the device can be used.

    Attributes:
        usable: no failure has taken the device.
    """

    def __init__(self, bench: Bench, place: str, left_out: list[str]) -> None:
        self._bench, self._place, self._left_out = bench, place, left_out
        self.usable = True

    def tried(self, mover: Mover, action: Callable[[Mover], object]) -> bool:
        """Whether a mover could be put to some use; what has failed by then is this mover's."""
        if not self.usable:
            return False
        try:
            action(mover)
            self._bench.module.synchronize()
        except _FAILURES as error:
            self._tell(f"{mover}: {_line(error)}")
        else:
            return True
        try:
            self._bench.module.synchronize()
        except RuntimeError as error:
            self.usable = False
            self._tell(f"the device cannot be used any more ({_line(error)}); the others stopped")
        return False

    def _tell(self, line: str) -> None:
        self._left_out.append(f"{self._place}, {line}")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _try(mover: Mover) -> None:
    """Move once while nothing else runs, and look at every byte."""
    mover.poison()
    done = mover.issue()
    mover.verified &= mover.right()
    if mover.way is not None and isinstance(done, Transfer):
        mover.labels |= mover.way.taken(done)


def _beside(bench: Bench, loop: Loop, streams: Any, alone: float, mover: Mover) -> None:
    """Let a mover meet the loop, which took ``alone`` without it in this repeat."""
    mover.poison()
    taken, link = _meet(bench, loop, mover, streams)
    mover.verified &= mover.right()
    mover.times.append(taken)
    mover.alone.append(alone)
    mover.links.append(link)


def _meet(bench: Bench, loop: Loop, mover: Mover | None, streams: Any) -> tuple[float, float]:
    """Milliseconds of the loop beside a mover, and 10^9 bytes in a second of the link."""
    work, side = streams
    module = bench.module
    first, last = timed_event(module), timed_event(module)
    flying: deque[Callable[[], bool]] = deque()
    stamps: list[float] = []
    module.synchronize()

    def issue() -> None:
        assert mover is not None
        with module.stream(side):
            done = mover.issue()
        flying.append(done.done if isinstance(done, Transfer) else _recorded(bench, side).query)

    def land() -> None:
        while flying and flying[0]():
            flying.popleft()
            stamps.append(perf_counter())

    collecting = gc.isenabled()
    gc.disable()  # a collection takes the host longer than a transfer takes the link
    began = perf_counter()
    try:
        for _ in range(_AHEAD if mover is not None else 0):
            issue()
        with module.stream(work):
            first.record(work)
            loop.run()
            last.record(work)
        while mover is not None and not last.query():
            land()
            if len(flying) < _AHEAD:
                mover.dry += not flying
                issue()
        within = len(stamps)
        module.synchronize()
        land()
    finally:
        if collecting:
            gc.enable()
    taken = float(first.elapsed_time(last))
    if mover is None:
        return taken, 0.0
    ended = max(1, within)
    return taken, ended * mover.payload / (stamps[ended - 1] - began) / 1e9


def _recorded(bench: Bench, stream: torch.Stream) -> Any:
    """An event behind what a stream holds; one that tells no time."""
    event = bench.module.Event()
    event.record(stream)
    return event


def _engines(bench: Bench, direction: str, left_out: list[str]) -> Iterator[Mover]:
    """Plain memcpy and every engine; rows of 2 KB and of 256 bytes, and blocks for descriptors."""
    kept = _Kept(bench)
    yield _memcpy(kept, direction)
    ways = [(way, run) for run in _RUNS for way in (HOST_DETACHED, HOST, direct(8))]
    for way, run in [*ways, (STAGED, _RUNS[0]), (DESCRIPTORS, 32 * KB)]:
        if bench.serving([way]):
            sides = kept.at(run)
            issue = partial(way.move, sides, direction)
            yield _mover(sides, way.name, way.engine, direction, issue, way)


def _peers(bench: Bench, direction: str, left_out: list[str]) -> Iterator[Mover]:
    """Plain memcpy and peers; rows of 2 KB and of 256 bytes."""
    kept = _Kept(bench)
    yield _memcpy(kept, direction)
    for peer in bench.peers:
        for run in _RUNS:
            sides = kept.at(run)
            try:
                issue = peer.mover(sides, direction)
            except PortaKVError as error:
                left_out.append(f"beside a loop, {peer.name} {direction}: {error}")
            else:
                yield _mover(sides, peer.name, peer.name, direction, issue)


class _Kept:
    """Chunks of the host with rows of some bytes, over one region, each made once."""

    def __init__(self, bench: Bench) -> None:
        self._payload = bench.preset.beside
        self._region = bench.region(max(*bench.preset.payloads, self._payload))
        self._known: dict[int, Sides] = {}

    def at(self, run: int) -> Sides:
        """Rows of ``run`` bytes, or blocks of so many in a plane."""
        if run not in self._known:
            case = case_of(scene(run), self._payload)
            assert case is not None, f"{self._payload} bytes are no whole runs of {run}"
            self._known[run] = Sides(case, self._region)
            self._known[run].settle()
        return self._known[run]


def _memcpy(kept: _Kept, direction: str) -> Mover:
    dense = kept.at(_RUNS[0])
    dense.fill(direction)
    return Mover(
        {"shape": "dense", "backend": MEMCPY, "engine": MEMCPY},
        lambda: plain(dense, direction),
        lambda: dense.poison_plain(direction),
        lambda: dense.plain_right(direction),
        dense.case.payload,
    )


def _mover(
    sides: Sides, name: str, engine: str, direction: str, issue: Callable[[], object],
    way: Way | None = None,
) -> Mover:  # fmt: skip
    case: Case = sides.case
    labels: dict[str, Any] = {
        "shape": case.scene.name, "backend": name, "engine": engine,
        "row_bytes": case.scene.row,
    }  # fmt: skip
    if way is None:
        labels["peer"] = name
    elif "max_thread_blocks" in way.terms:
        labels["thread_blocks"] = way.terms["max_thread_blocks"]
    return Mover(
        labels, issue, lambda: sides.poison(direction), lambda: sides.right(direction),
        case.payload, way,
    )  # fmt: skip


def _row(loop: Loop, direction: str, mover: Mover) -> dict[str, Any]:
    slow = [100 * (t / a - 1) for t, a in zip(mover.times, mover.alone, strict=True)]
    return {
        "kind": "host_interference",
        "loop": loop.name,
        "op": direction,
        **mover.labels,
        "payload_bytes": mover.payload,
        "steps": loop.steps,
        "loop_ms": short(median(mover.times)),
        "alone_ms": short(median(mover.alone)),
        "slowdown_pct": round(median(slow), 2),
        "slowdowns_pct": [round(one, 2) for one in slow],
        "link_gb_per_s": short(median(mover.links)),
        "ran_dry": mover.dry,
        "repeats": len(mover.times),
        "verified": mover.verified,
    }


def compare(rows: Rows) -> None:
    """Write into each row how it stands to plain memcpy beside the same loop: ``over_memcpy``, in
    points of slow-down, and ``link_ratio``, of the link's bandwidth meanwhile."""
    points: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for row in rows:
        points[row["loop"], row["op"]].append(row)
    for point in points.values():
        floor = next((row for row in point if row["backend"] == MEMCPY), None)
        for row in point:
            if floor is not None and row is not floor:
                row["over_memcpy"] = round(row["slowdown_pct"] - floor["slowdown_pct"], 2)
                row["link_ratio"] = short(row["link_gb_per_s"] / floor["link_gb_per_s"])
