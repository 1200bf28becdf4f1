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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import torch

from portakv.errors import PortaKVError
from portakv_benchmarks.host import movers, suite
from portakv_benchmarks.host.cases import DIRECTIONS, Sides
from portakv_benchmarks.host.movers import LOOPS, OWN, Mover, Queue, Ways
from portakv_benchmarks.host.suite import HOST, HOST_DETACHED, MEMCPY, Bench, Way
from portakv_benchmarks.shared.harness import Row, Rows, Step, grouped, short, uncollected
from portakv_benchmarks.shared.peers import LMCache

#: Ways that a bar judges are repeated in full, the others this often at most.
_OTHERS = 2
#: Repeats with the loop on a stream of its own, at most.
_ON_OWN = 3
#: Seconds after which a loop beside a mover is given up: it would never begin.
_HELD_UP = 15.0
_JUDGED = (MEMCPY, suite.CHOSEN, HOST_DETACHED.name)

#: The movers of a direction.
Movers = Callable[[Bench, str], Iterable[Mover]]


@dataclass
class Met:
    """What a mover's meetings with the loop gave."""

    mover: Mover
    times: list[float] = field(default_factory=list)  # milliseconds of the loop beside it
    alone: list[float] = field(default_factory=list)  # and of the loop alone, for each of them
    links: list[float] = field(default_factory=list)  # 10^9 bytes in a second meanwhile
    dry: int = 0  # how often all transfers had ended when the next was issued


def interference_steps(bench: Bench) -> Iterator[Step]:
    """A step for each loop and direction, beside plain memcpy and every engine; and with the loop
    on a stream of its own, beside what bars judge."""
    most = bench.preset.repeats
    kinds = (movers.DEFAULT, _engines, most), (OWN, _chosen, min(_ON_OWN, most))
    for (where, make, repeats), direction, loop in product(kinds, DIRECTIONS, LOOPS):
        asked = bench, loop, where, direction
        yield _place(*asked[1:]), partial(_measure, asked, make, repeats)


def peer_steps(bench: Bench) -> Iterator[Step]:
    """The same beside plain memcpy and peers; no step if there are none."""
    for direction, loop in product(DIRECTIONS if bench.peers else (), LOOPS):
        asked = bench, loop, movers.DEFAULT, direction
        yield f"peers {_place(*asked[1:])}", partial(_beside_peers, asked)


def _place(loop: str, where: str, direction: str) -> str:
    return f"beside {loop} on {movers.STREAMS[where]}, {direction}"


def _beside_peers(asked: tuple[Bench, str, str, str]) -> Rows:
    rows = _measure(asked, _peers, min(_OTHERS, asked[0].preset.repeats))
    return [row for row in rows if "peer" in row]


def _measure(asked: tuple[Bench, str, str, str], make: Movers, repeats: int) -> Rows:
    return _Meeting(*asked).rows(make, repeats)


class _Meeting:
    """A loop on a stream, and what moves in one direction on another one meanwhile."""

    def __init__(self, bench: Bench, loop: str, where: str, direction: str) -> None:
        self._bench, self._direction = bench, direction
        self._labels = {"loop": loop, "stream": where}
        self._ways = Ways(bench, _place(loop, where, direction))
        self._loop = LOOPS[loop](bench.device, bench.preset)
        own = where == OWN
        self._work = bench.stream() if own else bench.module.default_stream(bench.device)
        self._side = bench.stream()

    def rows(self, make: Movers, repeats: int) -> Rows:
        """A row for each mover that could meet the loop."""
        ways = self._ways
        found = make(self._bench, self._direction)
        usable = [Met(one) for one in found if ways.tried(one, Mover.once)]
        if ways.usable:
            self._alone()  # clocks sink from then on, no more at once
        for n in range(repeats):
            turn = n % max(1, len(usable))
            judged = [met for met in usable if met.mover.labels["backend"] in _JUDGED]
            taking_part = [
                met for met in [*usable[turn:], *usable[:turn]] if n < _OTHERS or met in judged
            ]
            stayed = self._repeat(taking_part)
            usable = [met for met in usable if met in stayed or met not in taking_part]
        rows = [self._row(met) for met in usable if met.times]
        compare(rows)
        return rows

    def _repeat(self, taking_part: list[Met]) -> list[Met]:
        """Let movers meet the loop one after the other; those that could."""
        ways = self._ways
        if not ways.usable:
            return taking_part
        before = self._alone()
        stayed = [met for met in taking_part if ways.tried(met.mover, partial(self._beside, met))]
        behind = self._alone() if ways.usable else before
        for met in taking_part:
            met.alone += [(before + behind) / 2] * (len(met.times) - len(met.alone))
        return stayed if ways.usable else [met for met in taking_part if met.times]

    def _alone(self) -> float:
        """Milliseconds of the loop when nothing else runs."""
        first, last = self._ready()
        self._start(first, last)
        self._bench.module.synchronize()
        return float(first.elapsed_time(last))

    def _beside(self, met: Met, mover: Mover) -> None:
        """Let a mover meet the loop.

        Raises:
            RuntimeError: the loop had not ended after `_HELD_UP` seconds.
        """
        mover.variant.poison(0)
        queue = Queue(self._bench.module, mover, self._side)
        first, last = self._ready()
        began = perf_counter()
        with uncollected():
            queue.fill()
            self._start(first, last)
            while not last.query() and perf_counter() - began < _HELD_UP:
                queue.go_on()
            held_up, within = not last.query(), len(queue.stamps)
            self._bench.module.synchronize()
        if held_up:
            raise RuntimeError(f"the loop was held up: it had not ended after {_HELD_UP:g} s")
        queue.land()
        mover.look()
        ended = max(1, within)
        met.times.append(float(first.elapsed_time(last)))
        met.links.append(ended * mover.payload / (queue.stamps[ended - 1] - began) / 1e9)
        met.dry += queue.dry

    def _ready(self) -> tuple[Any, Any]:
        """Events for the loop's beginning and end, on a device that has nothing to do."""
        with self._bench.module.stream(self._work):
            torch.zeros(1, device=self._bench.device)  # the stream's last work is a kernel's
        self._bench.module.synchronize()
        first, last = (self._bench.module.Event(enable_timing=True) for _ in range(2))
        return first, last

    def _start(self, first: Any, last: Any) -> None:
        with self._bench.module.stream(self._work):
            first.record(self._work)
            self._loop.run()
            last.record(self._work)

    def _row(self, met: Met) -> Row:
        slow = [100 * (t / a - 1) for t, a in zip(met.times, met.alone, strict=True)]
        return {
            "kind": "host_interference", **self._labels, **met.mover.labels,
            "payload_bytes": met.mover.payload, "steps": self._loop.steps,
            "loop_ms": short(median(met.times)), "alone_ms": short(median(met.alone)),
            "slowdown_pct": round(median(slow), 2),
            "slowdowns_pct": [round(one, 2) for one in slow],
            "link_gb_per_s": short(median(met.links)), "ran_dry": met.dry,
            "repeats": len(met.times), "verified": met.mover.verified,
        }  # fmt: skip


def _engines(bench: Bench, direction: str) -> Iterator[Mover]:
    """Plain memcpy and every engine; rows of 2 KB and of 256 bytes, and blocks for descriptors."""
    by_rows, once = (HOST_DETACHED, HOST, suite.direct(8)), (suite.STAGED, suite.DESCRIPTORS)
    yield from _moved_by(bench, direction, by_rows, once)


def _chosen(bench: Bench, direction: str) -> Iterator[Mover]:
    """Plain memcpy and what PortaKV chooses."""
    yield from _moved_by(bench, direction, (HOST_DETACHED, HOST), ())


def _moved_by(
    bench: Bench, direction: str, by_rows: tuple[Way, ...], once: tuple[Way, ...]
) -> Iterator[Mover]:
    yield movers.memcpys(bench, direction)
    for run, way in product(movers.RUNS, bench.serving(by_rows)):
        yield movers.transfers(bench, way, direction, run)
    for way in bench.serving(once):
        yield movers.transfers(bench, way, direction)


def _peers(bench: Bench, direction: str) -> Iterator[Mover]:
    """Plain memcpy and peers; rows of 2 KB and of 256 bytes."""
    yield movers.memcpys(bench, direction)
    for peer, run in product(bench.peers, movers.RUNS):
        sides = movers.sides_of(bench, run)
        try:
            call = _by_peer(peer, sides, direction)
        except PortaKVError as error:
            bench.left_out.append(f"beside a loop, {peer.name} {direction}: {error}")
        else:
            yield movers.moved(
                sides, suite.by_call(sides, direction, peer.name, peer.name, call, peer=peer.name)
            )


def _by_peer(peer: LMCache, sides: Sides, direction: str) -> Callable[[], object]:
    """A peer's slot kernel with a chunk in pinned memory, as its connector has it.

    Raises:
        PeerMissing: its kernel does not take the cache.
    """
    kernel, *_ = peer.kernels(sides.case.on_device, by_blocks=False)
    move = peer.move_by(kernel, sides.case.on_device, sides.slots, sides.caches)
    return lambda: move(sides.chunk, direction == "d2h")


def compare(rows: Rows) -> None:
    """Write into each row how it stands to plain memcpy beside the same loop: ``over_memcpy``, in
    points of slow-down, and ``link_ratio``, of the link's bandwidth meanwhile."""
    for point in grouped(rows, "loop", "stream", "op"):
        floor = next((row for row in point if row["backend"] == MEMCPY), None)
        for row in point:
            if floor is not None and row is not floor:
                row["over_memcpy"] = round(row["slowdown_pct"] - floor["slowdown_pct"], 2)
                row["link_ratio"] = short(row["link_gb_per_s"] / floor["link_gb_per_s"])
