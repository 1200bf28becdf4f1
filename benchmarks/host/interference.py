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
from portakv_benchmarks.shared.harness import Row, Rows, Step, grouped, having, short, uncollected
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


class Met:
    """What a mover's meetings with the loop gave."""

    def __init__(self, mover: Mover) -> None:
        self.mover = mover
        self.times = list[float]()  # milliseconds of the loop beside it
        self.alone = list[float]()  # and of the loop alone, for each of them
        self.links = list[float]()  # 10^9 bytes in a second meanwhile
        self.dry = 0  # how often all transfers had ended when the next was issued


def interference_steps(bench: Bench) -> Iterator[Step]:
    """A step for each loop and direction, beside plain memcpy and every engine; and with the loop
    on a stream of its own, beside what bars judge."""
    kinds = (movers.DEFAULT, _engines, bench.preset.repeats), (OWN, _chosen, _ON_OWN)
    for (where, make, most), direction, loop in product(kinds, DIRECTIONS, LOOPS):
        yield (
            _place(loop, where, direction),
            partial(_measure, bench, loop, where, direction, make, most),
        )


def peer_steps(bench: Bench) -> Iterator[Step]:
    """The same beside plain memcpy and peers; no step if there are none."""
    for direction, loop in product(DIRECTIONS if bench.peers else (), LOOPS):
        asked = loop, movers.DEFAULT, direction
        yield f"peers {_place(*asked)}", partial(_measure, bench, *asked, _peers, _OTHERS)


def _place(loop: str, where: str, direction: str) -> str:
    return f"beside {loop} on {movers.STREAMS[where]}, {direction}"


def _measure(bench: Bench, loop: str, where: str, direction: str, make: Movers, most: int) -> Rows:
    rows = _Meeting(bench, loop, where, direction).rows(make, min(most, bench.preset.repeats))
    return [row for row in rows if make is not _peers or "peer" in row]


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
            taking_part = [
                met for met in [*usable[turn:], *usable[:turn]]
                if n < _OTHERS or met.mover.labels["backend"] in _JUDGED
            ]  # fmt: skip
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
    yield from _chosen(bench, direction, suite.direct(8))
    for way in bench.serving((suite.STAGED, suite.DESCRIPTORS)):
        yield movers.transfers(bench, way, direction)


def _chosen(bench: Bench, direction: str, *more: Way) -> Iterator[Mover]:
    """Plain memcpy and what PortaKV chooses; rows of 2 KB and of 256 bytes."""
    yield movers.memcpys(bench, direction)
    for run, way in product(movers.RUNS, bench.serving((HOST_DETACHED, HOST, *more))):
        yield movers.transfers(bench, way, direction, run)


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
    """A peer's slot kernel with a chunk in pinned memory, as its connector has it."""
    kernel, *_ = peer.kernels(sides.case.on_device, by_blocks=False)
    move = peer.move_by(kernel, sides.case.on_device, sides.slots, sides.caches)
    return lambda: move(sides.chunk, direction == "d2h")


def compare(rows: Rows) -> None:
    """Write into each row how it stands to plain memcpy beside the same loop: ``over_memcpy``, in
    points of slow-down, and ``link_ratio``, of the link's bandwidth meanwhile."""
    for point in grouped(rows, "loop", "stream", "op"):
        for floor, row in product(having(point, backend=MEMCPY), point):
            if row is not floor:
                row["over_memcpy"] = round(row["slowdown_pct"] - floor["slowdown_pct"], 2)
                row["link_ratio"] = short(row["link_gb_per_s"] / floor["link_gb_per_s"])
