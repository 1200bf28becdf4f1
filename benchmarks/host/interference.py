# SPDX-License-Identifier: Apache-2.0
"""What a transfer does to the model that is running: loops of compute beside each way.

A loop runs on one stream, the default one or one of its own, as engines do either. In a side stream
blocks are moved at full speed from before its first step until its last has ended, a few transfers
in the queue at any time. The slow-down is the time of the loop / its time alone - 1; alone it runs
before and behind the ways of each repeat, since clocks sink while a device works. The link's
bandwidth counts the transfers that had ended by the loop's end, by the host's clock. Nothing but
the loop has an event that tells the time: one for each transfer cost the link of an H200 up to 9 %.
Repeats take the ways in turns, in an order that rotates.

An event that tells the time is written by the engine that did the last work of its stream. Behind a
copy that is a copy engine, and while that has copies of another stream the event, and what follows
it, waits for all of them; so the loop's stream ends with a kernel before its first event.

Peers meet the loops in a part of their own, since a kernel that fails may leave the process
without its device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import torch

from portakv.errors import PortaKVError
from portakv_benchmarks.host.cases import DIRECTIONS
from portakv_benchmarks.host.loops import (
    DEFAULT,
    OWN,
    STREAMS,
    Loop,
    attention,
    matmul,
    timed_event,
)
from portakv_benchmarks.host.memory import Sides
from portakv_benchmarks.host.movers import (
    RUNS,
    Kept,
    Mover,
    Queue,
    Ways,
    by_call,
    by_memcpy,
    by_way,
)
from portakv_benchmarks.host.suite import Bench
from portakv_benchmarks.host.ways import (
    CHOSEN,
    DESCRIPTORS,
    HOST,
    HOST_DETACHED,
    MEMCPY,
    STAGED,
    Way,
    direct,
)
from portakv_benchmarks.shared.command import Rows, Step
from portakv_benchmarks.shared.harness import short, uncollected
from portakv_benchmarks.shared.peers import LMCache

#: Ways that a bar judges are repeated in full, the others this often at most.
_OTHERS = 2
#: Repeats with the loop on a stream of its own, at most.
_ON_OWN = 3
#: Seconds after which a loop beside a mover is given up: it would never begin.
_HELD_UP = 15.0
_JUDGED = (MEMCPY, CHOSEN, HOST_DETACHED.name)


@dataclass
class Met:
    """What a mover's meetings with the loop gave.

    Attributes:
        mover: what met it.
        times: milliseconds of the loop beside it.
        alone: milliseconds of the loop alone, for each of them.
        links: 10^9 bytes in a second meanwhile.
        dry: how often all transfers had ended when the next was issued.
    """

    mover: Mover
    times: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    links: list[float] = field(default_factory=list)
    dry: int = 0

    @property
    def judged(self) -> bool:
        """Whether a bar asks for it."""
        return self.mover.labels["backend"] in _JUDGED


def _matmul(bench: Bench) -> Loop:
    return matmul(bench.device, bench.preset.matmul, bench.preset.loop_seconds)


def _attention(bench: Bench) -> Loop:
    return attention(bench.device, bench.preset.attention, bench.preset.loop_seconds)


_LOOPS: dict[str, Callable[[Bench], Loop]] = {"matmul": _matmul, "attention": _attention}

#: Adds movers of a direction, and lines on those that there cannot be.
Movers = Callable[[Bench, str, list[str]], Iterable[Mover]]


@dataclass(frozen=True)
class _Meeting:
    """The movers that meet a loop, on which stream and how often."""

    bench: Bench
    loop: str
    where: str
    direction: str
    movers: Movers
    repeats: int

    def __str__(self) -> str:
        return f"beside {self.loop} on {STREAMS[self.where]}, {self.direction}"


def interference_steps(bench: Bench) -> Iterator[Step]:
    """A step for each loop and direction, beside plain memcpy and every engine; and with the loop
    on a stream of its own, beside what bars judge."""
    most = bench.preset.repeats
    kinds = (DEFAULT, _engines, most), (OWN, _chosen, min(_ON_OWN, most))
    for (where, movers, repeats), direction, loop in product(kinds, DIRECTIONS, _LOOPS):
        meeting = _Meeting(bench, loop, where, direction, movers, repeats)
        yield str(meeting), partial(_measure, meeting)


def peer_steps(bench: Bench) -> Iterator[Step]:
    """The same beside plain memcpy and peers; no step where there are none."""
    for direction, loop in product(DIRECTIONS if bench.peers else (), _LOOPS):
        repeats = min(_OTHERS, bench.preset.repeats)
        meeting = _Meeting(bench, loop, DEFAULT, direction, _peers, repeats)
        yield f"peers {meeting}", partial(_measure, meeting)


def _measure(meeting: _Meeting) -> tuple[Rows, list[str]]:
    bench = meeting.bench
    left_out: list[str] = []
    loop = _LOOPS[meeting.loop](bench)
    ways = Ways(bench, str(meeting), left_out)
    movers = meeting.movers(bench, meeting.direction, left_out)
    usable = [Met(one) for one in movers if ways.tried(one, Mover.once)]
    work = bench.module.default_stream(bench.device) if meeting.where == DEFAULT else bench.stream()
    streams = work, bench.stream()
    if ways.usable:
        _alone(bench, loop, work)  # clocks sink from then on, no more at once
    for n in range(meeting.repeats):
        turn = n % max(1, len(usable))
        order = [*usable[turn:], *usable[:turn]]
        taking_part = [met for met in order if n < _OTHERS or met.judged]
        stayed = _repeat(bench, loop, streams, ways, taking_part)
        usable = [met for met in usable if met in stayed or met not in taking_part]
    rows = [_row(loop, meeting, met) for met in usable if met.times]
    compare(rows)
    return [row for row in rows if meeting.movers is not _peers or "peer" in row], left_out


def _repeat(
    bench: Bench, loop: Loop, streams: Any, ways: Ways, taking_part: list[Met]
) -> list[Met]:
    """Let movers meet the loop one after the other; those that could."""
    if not ways.usable:
        return taking_part
    before = _alone(bench, loop, streams[0])
    meet = partial(_beside, bench, loop, streams)
    stayed = [met for met in taking_part if ways.tried(met.mover, partial(meet, met))]
    behind = _alone(bench, loop, streams[0]) if ways.usable else before
    for met in taking_part:
        met.alone += [(before + behind) / 2] * (len(met.times) - len(met.alone))
    return stayed if ways.usable else [met for met in taking_part if met.times]


def _beside(bench: Bench, loop: Loop, streams: Any, met: Met, mover: Mover) -> None:
    """Let a mover meet the loop."""
    mover.poison()
    queue = Queue(bench.module, mover, streams[1])
    taken, link = _meet(bench, loop, queue, streams[0])
    mover.verified &= mover.right()
    met.times.append(taken)
    met.links.append(link)
    met.dry += queue.dry


def _alone(bench: Bench, loop: Loop, work: torch.Stream) -> float:
    """Milliseconds of the loop when nothing else runs."""
    events = _ready(bench, work)
    _start(bench, loop, work, events)
    bench.module.synchronize()
    return float(events[0].elapsed_time(events[1]))


def _meet(bench: Bench, loop: Loop, queue: Queue, work: torch.Stream) -> tuple[float, float]:
    """Milliseconds of the loop beside transfers, and 10^9 bytes in a second of the link.

    Raises:
        RuntimeError: the loop had not ended after `_HELD_UP` seconds.
    """
    first, last = events = _ready(bench, work)
    began = perf_counter()
    with uncollected():
        queue.fill()
        _start(bench, loop, work, events)
        while not last.query() and perf_counter() - began < _HELD_UP:
            queue.go_on()
        held_up, within = not last.query(), len(queue.stamps)
        bench.module.synchronize()
    if held_up:
        raise RuntimeError(f"the loop was held up: it had not ended after {_HELD_UP:g} s")
    queue.land()
    ended = max(1, within)
    link = ended * queue.mover.payload / (queue.stamps[ended - 1] - began) / 1e9
    return float(first.elapsed_time(last)), link


def _ready(bench: Bench, work: torch.Stream) -> tuple[Any, Any]:
    """Events for the loop's beginning and end, on a device that has nothing to do."""
    with bench.module.stream(work):
        torch.zeros(1, device=bench.device)  # the stream's last work is a kernel's
    bench.module.synchronize()
    return timed_event(bench.module), timed_event(bench.module)


def _start(bench: Bench, loop: Loop, work: torch.Stream, events: tuple[Any, Any]) -> None:
    with bench.module.stream(work):
        events[0].record(work)
        loop.run()
        events[1].record(work)


def _engines(bench: Bench, direction: str, left_out: list[str]) -> Iterator[Mover]:
    """Plain memcpy and every engine; rows of 2 KB and of 256 bytes, and blocks for descriptors."""
    yield from _moved_by(bench, direction, (HOST_DETACHED, HOST, direct(8)), (STAGED, DESCRIPTORS))


def _chosen(bench: Bench, direction: str, left_out: list[str]) -> Iterator[Mover]:
    """Plain memcpy and what PortaKV chooses."""
    yield from _moved_by(bench, direction, (HOST_DETACHED, HOST), ())


def _moved_by(
    bench: Bench, direction: str, by_rows: tuple[Way, ...], once: tuple[Way, ...]
) -> Iterator[Mover]:
    kept = Kept(bench)
    yield by_memcpy(kept, direction)
    for run in RUNS:
        for way in bench.serving(by_rows):
            yield by_way(kept, way, direction, run)
    for way in bench.serving(once):
        yield by_way(kept, way, direction)


def _peers(bench: Bench, direction: str, left_out: list[str]) -> Iterator[Mover]:
    """Plain memcpy and peers; rows of 2 KB and of 256 bytes."""
    kept = Kept(bench)
    yield by_memcpy(kept, direction)
    for peer, run in product(bench.peers, RUNS):
        sides = kept.at(run)
        try:
            issue = _by_peer(peer, sides, direction)
        except PortaKVError as error:
            left_out.append(f"beside a loop, {peer.name} {direction}: {error}")
        else:
            mover = by_call(sides, peer.name, peer.name, direction, issue)
            mover.labels["peer"] = peer.name
            yield mover


def _by_peer(peer: LMCache, sides: Sides, direction: str) -> Callable[[], object]:
    """A peer's slot kernel with a chunk in pinned memory, as its connector has it.

    Raises:
        PeerMissing: its kernel does not take the cache.
    """
    kernel, *_ = peer.kernels(sides.case.on_device, by_blocks=False)
    move = peer.move_by(kernel, sides.case.on_device, sides.slots(), sides.caches)
    chunk = sides.chunk()
    return lambda: move(chunk, direction == "d2h")


def _row(loop: Loop, meeting: _Meeting, met: Met) -> dict[str, Any]:
    slow = [100 * (t / a - 1) for t, a in zip(met.times, met.alone, strict=True)]
    return {
        "kind": "host_interference",
        "loop": loop.name,
        "stream": meeting.where,
        "op": meeting.direction,
        **met.mover.labels,
        "payload_bytes": met.mover.payload,
        "steps": loop.steps,
        "loop_ms": short(median(met.times)),
        "alone_ms": short(median(met.alone)),
        "slowdown_pct": round(median(slow), 2),
        "slowdowns_pct": [round(one, 2) for one in slow],
        "link_gb_per_s": short(median(met.links)),
        "ran_dry": met.dry,
        "repeats": len(met.times),
        "verified": met.mover.verified,
    }


def compare(rows: Rows) -> None:
    """Write into each row how it stands to plain memcpy beside the same loop: ``over_memcpy``, in
    points of slow-down, and ``link_ratio``, of the link's bandwidth meanwhile."""
    points: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for row in rows:
        points[row["loop"], row["stream"], row["op"]].append(row)
    for point in points.values():
        floor = next((row for row in point if row["backend"] == MEMCPY), None)
        for row in point:
            if floor is not None and row is not floor:
                row["over_memcpy"] = round(row["slowdown_pct"] - floor["slowdown_pct"], 2)
                row["link_ratio"] = short(row["link_gb_per_s"] / floor["link_gb_per_s"])
