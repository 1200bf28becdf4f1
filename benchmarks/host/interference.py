# SPDX-License-Identifier: Apache-2.0
"""Measure how transfers slow a model down: loops of compute during each strategy, as
docs/benchmarks.md describes.

Only the loop has an event that measures time: one for each transfer cost the link of an
H200 up to 9 %. Such an event is written by the engine that did the last work of its stream. After
a copy that is a copy engine, and while that has copies of another stream the event, and what
follows it, waits for all of them; so the loop's stream ends with a kernel before its first event.

Likewise, what a copy of another stream waits for while transfers follow each other: an engine sends
its step's inputs and fetches its tokens over the same link, with separate copies. Tokens are copied
after a kernel of a third stream. A copy that has waited so long that the copy engine may stay with
the transfers for ever is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter
from typing import cast

import torch

from portakv.errors import PortaKVError
from portakv_benchmarks.host import suite, traffic_sources
from portakv_benchmarks.host.cases import DIRECTIONS, Sides
from portakv_benchmarks.host.suite import HOST, HOST_DETACHED, MEMCPY, Bench, Method
from portakv_benchmarks.host.traffic_sources import LOOPS, OWN, Methods, Queue, Traffic
from portakv_benchmarks.shared.harness import Row, Rows, Step, grouped, having, short, uncollected
from portakv_benchmarks.shared.peers import LMCache
from portakv_benchmarks.shared.shapes import in_words

#: Methods that a target judges are repeated in full, the others this often at most.
_OTHERS = 2
#: Repeats with the loop on a separate stream, at most.
_ON_OWN = 3
#: Seconds after which a loop alongside traffic is given up: it would never begin.
HELD_UP = 15.0
#: Kinds of rows: of large transfers, and of short ones.
KIND = "host_interference"
SHORT = "host_interference_short"
_JUDGED = (MEMCPY, suite.CHOSEN, HOST_DETACHED.name)

#: Makes the traffic of a direction.
MakeTraffic = Callable[[Bench, str], Iterable[Traffic]]


class Met:
    """The measurements of a loop alongside one traffic."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.times = list[float]()  # milliseconds of the loop alongside the traffic
        self.alone = list[float]()  # and of the loop alone, for each of them
        self.links = list[float]()  # 10^9 bytes in a second meanwhile
        self.dry = 0  # how often all transfers had ended when the next was issued


def interference_steps(bench: Bench) -> Iterator[Step]:
    """Yield a step for each loop and direction, alongside plain memcpy and every strategy.

    With the loop on a separate stream, the steps run only what performance targets judge.
    """
    kinds = (traffic_sources.DEFAULT, each_engine, bench.preset.repeats), (OWN, _chosen, _ON_OWN)
    for (where, make, most), direction, loop in product(kinds, DIRECTIONS, LOOPS):
        case = loop, where, direction
        yield _place(*case), partial(_measure, bench, *case, make, most)


def short_steps(bench: Bench) -> Iterator[Step]:
    """Yield the same steps alongside short transfers that follow each other, by what PortaKV
    chooses for them and by two strategies of copy engines."""
    for direction, loop in product(DIRECTIONS, LOOPS):
        case = loop, traffic_sources.DEFAULT, direction
        yield f"short transfers {_place(*case)}", partial(_measure_short, bench, *case)


def peer_steps(bench: Bench) -> Iterator[Step]:
    """Yield the steps of `interference_steps` for plain memcpy and peers; no step without peers."""
    for direction, loop in product(DIRECTIONS if bench.peers else (), LOOPS):
        case = loop, traffic_sources.DEFAULT, direction
        yield f"peers {_place(*case)}", partial(_measure, bench, *case, _peers, _OTHERS)


def _place(loop: str, where: str, direction: str) -> str:
    return f"alongside {loop} on {traffic_sources.STREAMS[where]}, {direction}"


def _measure(
    bench: Bench, loop: str, where: str, direction: str, make: MakeTraffic, most: int
) -> Rows:
    rows = Meeting(bench, loop, where, direction).rows(make, min(most, bench.preset.repeats))
    return [row for row in rows if make is not _peers or "peer" in row]


def _measure_short(bench: Bench, loop: str, where: str, direction: str) -> Rows:
    meeting = Meeting(bench, loop, where, direction, "short transfers ", SHORT)
    return meeting.rows(_short, min(_ON_OWN, bench.preset.repeats))


class Meeting:
    """A loop on a stream, and what moves in one direction on another one meanwhile."""

    def __init__(
        self, bench: Bench, loop: str, where: str, direction: str, what: str = "", kind: str = KIND
    ) -> None:
        self._bench = bench
        self._kind = kind
        self._direction = direction
        self._labels = {"loop": loop, "stream": where}
        self._methods = Methods(bench, what + _place(loop, where, direction))
        self._loop = LOOPS[loop](bench.device, bench.preset)
        own = where == OWN
        self._work = bench.stream() if own else bench.module.default_stream(bench.device)
        self._side = bench.stream()

    def rows(self, make: MakeTraffic, repeats: int, judged: Container[str] = _JUDGED) -> Rows:
        """Return a row for each traffic that ran alongside the loop.

        Traffic that is not ``judged`` runs less often.
        """
        methods = self._methods
        results = make(self._bench, self._direction)
        usable = [Met(one) for one in results if methods.tried(one, Traffic.once)]
        if methods.usable:
            self._alone()  # clocks sink from then on, gradually
        for n in range(repeats):
            turn = n % max(1, len(usable))
            taking_part = [
                met
                for met in [*usable[turn:], *usable[:turn]]
                if n < _OTHERS or met.traffic.labels["backend"] in judged
            ]
            stayed = self._repeat(taking_part)
            usable = [met for met in usable if met in stayed or met not in taking_part]
        rows = [self._row(met) for met in usable if met.times]
        compare(rows)
        return rows

    def _repeat(self, taking_part: list[Met]) -> list[Met]:
        """Run each traffic alongside the loop in turn; return the traffic that succeeded."""
        methods = self._methods
        if not methods.usable:
            return taking_part
        before = self._alone()
        stayed = [
            met for met in taking_part if methods.tried(met.traffic, partial(self._alongside, met))
        ]
        after = self._alone() if methods.usable else before
        for met in taking_part:
            met.alone += [(before + after) / 2] * (len(met.times) - len(met.alone))
        return stayed if methods.usable else [met for met in taking_part if met.times]

    def _alone(self) -> float:
        """Return the milliseconds of the loop when nothing else runs."""
        first, last = self._ready()
        self._start(first, last)
        self._bench.module.synchronize()
        return float(first.elapsed_time(last))

    def _alongside(self, met: Met, traffic: Traffic) -> None:
        """Run traffic alongside the loop; raise `RuntimeError` if the loop does not end in time."""
        traffic.variant.poison(0)
        queue = Queue(self._bench.module, traffic, self._side)
        first, last = self._ready()
        began = perf_counter()
        with uncollected():
            queue.fill()
            self._start(first, last)
            while not last.query() and perf_counter() - began < HELD_UP:
                queue.go_on()
            delayed = not last.query()
            within = len(queue.stamps)
            self._bench.module.synchronize()
        if delayed:
            raise RuntimeError(f"the loop was held up: it had not ended after {HELD_UP:g} s")
        queue.land()
        traffic.look()
        ended = max(1, within)
        met.times.append(float(first.elapsed_time(last)))
        met.links.append(ended * traffic.payload / (queue.stamps[ended - 1] - began) / 1e9)
        met.dry += queue.dry

    def _ready(self) -> tuple[torch.Event, torch.Event]:
        """Return events for the loop's beginning and end, on a device that has nothing to do."""
        with self._bench.module.stream(self._work):
            torch.zeros(1, device=self._bench.device)  # the stream's last work is a kernel's
        self._bench.module.synchronize()
        first, last = (self._bench.module.Event(enable_timing=True) for _ in range(2))
        return first, last

    def _start(self, first: torch.Event, last: torch.Event) -> None:
        with self._bench.module.stream(self._work):
            first.record(self._work)
            self._loop.run()
            last.record(self._work)

    def _row(self, met: Met) -> Row:
        slow = [100 * (t / a - 1) for t, a in zip(met.times, met.alone, strict=True)]
        return {
            "kind": self._kind,
            **self._labels,
            **met.traffic.labels,
            "payload_bytes": met.traffic.payload,
            "steps": self._loop.steps,
            "loop_ms": short(median(met.times)),
            "alone_ms": short(median(met.alone)),
            "slowdown_pct": round(median(slow), 2),
            "slowdowns_pct": [round(one, 2) for one in slow],
            "link_gb_per_s": short(median(met.links)),
            "ran_dry": met.dry,
            "repeats": len(met.times),
            "verified": met.traffic.verified,
        }


def each_engine(bench: Bench, direction: str) -> Iterator[Traffic]:
    """Yield the traffic of a plain memcpy and of every strategy: rows of 2 KB and of 256 bytes."""
    yield from _chosen(bench, direction, suite.zero_copy(8))
    for method in bench.serving((suite.STAGED, suite.BATCHED_MEMCPY)):
        yield traffic_sources.transfers(bench, method, direction)


def _chosen(bench: Bench, direction: str, *more: Method) -> Iterator[Traffic]:
    """Yield plain memcpy and what PortaKV chooses; rows of 2 KB and of 256 bytes."""
    yield traffic_sources.memcpys(bench, direction)
    for run, method in product(traffic_sources.RUNS, bench.serving((HOST_DETACHED, HOST, *more))):
        yield traffic_sources.transfers(bench, method, direction, run)


def _short(bench: Bench, direction: str) -> Iterator[Traffic]:
    """Yield plain memcpy, what PortaKV chooses, and what it does by copy engines."""
    run = traffic_sources.BLOCK_RUN
    pair = 2 * run  # of keys and of values
    nbytes = max(pair, bench.preset.alongside * 3 // 32 // pair * pair)  # 12 MiB of 128
    yield traffic_sources.memcpys(bench, direction, nbytes)
    for method in bench.serving((HOST, suite.STAGED, suite.BATCHED_MEMCPY)):
        yield traffic_sources.transfers(bench, method, direction, run, nbytes)


def _peers(bench: Bench, direction: str) -> Iterator[Traffic]:
    """Yield plain memcpy and peers; rows of 2 KB and of 256 bytes."""
    yield traffic_sources.memcpys(bench, direction)
    for peer, run in product(bench.peers, traffic_sources.RUNS):
        sides = traffic_sources.sides_of(bench, run)
        name = peer.name
        try:
            call = by_peer(peer, sides, direction)
        except PortaKVError as error:
            bench.left_out.append(f"alongside a loop, {name} {direction}: {error}")
        else:
            labels = sides, direction, name, name, call
            yield traffic_sources.moved(sides, suite.by_call(*labels, peer=name))


def by_peer(peer: LMCache, sides: Sides, direction: str) -> Callable[[], object]:
    """Return a peer's slot kernel with a chunk in pinned memory, as its connector has it."""
    kernel, *_ = peer.kernels(sides.case.on_device, by_blocks=False)
    move = peer.move_by(kernel, sides.case.on_device, sides.slots, sides.caches)
    return lambda: move(sides.chunk, direction == "d2h")


def compare(rows: Rows) -> None:
    """Compare each row with plain memcpy alongside the same loop.

    Writes ``over_memcpy``, in points of slow-down, and ``link_ratio``, of the link's bandwidth.
    """
    for point in grouped(rows, "loop", "stream", "op"):
        for floor, row in product(having(point, backend=MEMCPY), point):
            if row is not floor:
                row["over_memcpy"] = round(row["slowdown_pct"] - floor["slowdown_pct"], 2)
                row["link_ratio"] = short(row["link_gb_per_s"] / floor["link_gb_per_s"])


# --- copies of other streams during transfers -----------------------------------------------------

#: Bytes of the other's copy: what a kernel may carry out, and what surely takes a copy engine; and
#: whether the copy waits for work of a third stream.
OTHERS = ((64, False), (1 << 20, False), (64, True))
_TRANSFERS = (HOST_DETACHED, HOST, suite.BATCHED_MEMCPY, suite.zero_copy(8))
#: Seconds until the first copy of the other and between two, and after which one is given up.
_BEFORE = 12e-3
_BETWEEN = 3e-3
_GIVEN_UP = 50e-3
#: Products of matrices that a copy waits for: 3 ms of an H200.
_PRODUCTS = 2


def waiting_steps(bench: Bench) -> Iterator[Step]:
    """Yield a step for each direction."""
    for direction in DIRECTIONS:
        yield f"copies of others alongside transfers, {direction}", partial(_wait, bench, direction)


def _wait(bench: Bench, direction: str) -> Rows:
    methods = Methods(bench, f"copies of others, {direction}")
    rows: Rows = []
    results = [traffic_sources.memcpys(bench, direction)]
    results += [
        traffic_sources.transfers(bench, method, direction) for method in bench.serving(_TRANSFERS)
    ]
    for traffic, (nbytes, waits_for_work) in product(results, OTHERS):
        work = Work(bench) if waits_for_work else None
        methods.tried(traffic, partial(_wait_row, bench, direction, nbytes, work, rows))
    return rows


class Work:
    """A few milliseconds of a model, on a separate stream."""

    def __init__(self, bench: Bench) -> None:
        self._module = bench.module
        self.stream = bench.stream()
        side = bench.preset.matmul
        self._square = torch.zeros(side, side, dtype=torch.bfloat16, device=bench.device)
        self._out = torch.empty_like(self._square)
        bench.module.synchronize()

    def start(self) -> torch.Event:
        """Enqueue the work; return the event of its end."""
        with self._module.stream(self.stream):
            for _ in range(_PRODUCTS):
                torch.mm(self._square, self._square, out=self._out)
        return cast(torch.Event, traffic_sources.recorded(self._module, self.stream))


def _wait_row(
    bench: Bench, direction: str, nbytes: int, work: Work | None, rows: Rows, traffic: Traffic
) -> None:
    traffic.once()
    traffic.variant.poison(0)
    # A pinned copy in the same direction.
    here = torch.zeros(nbytes, dtype=torch.uint8).pin_memory()
    there = torch.zeros(nbytes, dtype=torch.uint8, device=bench.device)
    src, dst = (there, here) if direction == "d2h" else (here, there)
    src.fill_(7)
    copy = partial(dst.copy_, src, non_blocking=True)
    waits = _waits(bench, traffic, copy, work)
    alone_stream = bench.stream()
    bench.module.synchronize()
    alone = [seen(bench, None, alone_stream, copy, work) for _ in range(bench.preset.calls)]
    traffic.look()
    rows.append(
        {
            "kind": "host_waiting",
            **traffic.labels,
            "payload_bytes": traffic.payload,
            "other_bytes": nbytes,
            "other": f"{in_words(nbytes)} copy{' that waits for a kernel' if work else ''}",
            "alone_us": short(median(alone) * 1e6),
            "wait_us": short(median(waits) * 1e6),
            "worst_us": short(max(waits) * 1e6),
            "samples": len(waits),
            "given_up": sum(one >= _GIVEN_UP for one in waits),
            "verified": traffic.verified and bool((dst == 7).all()),
        }
    )


def _waits(
    bench: Bench, traffic: Traffic, copy: Callable[[], object], work: Work | None
) -> list[float]:
    """Return the seconds of each copy of the other, as `seen` does."""
    queue = Queue(bench.module, traffic, bench.stream())
    stream = bench.stream()
    waits: list[float] = []
    bench.module.synchronize()
    with uncollected():
        due = (began := perf_counter()) + _BEFORE
        while not waits or perf_counter() < began + bench.preset.waiting:
            queue.go_on()
            if perf_counter() >= due:
                waits.append(seen(bench, queue, stream, copy, work))
                if waits[-1] >= _GIVEN_UP:
                    bench.module.synchronize()
                due = perf_counter() + _BETWEEN
        bench.module.synchronize()
    return waits


def seen(
    bench: Bench,
    queue: Queue | None,
    stream: torch.Stream,
    copy: Callable[[], object],
    work: Work | None,
) -> float:
    """Return the seconds of a copy until its end was seen, or until it was given up: from its call
    on, or from the end of the work for which it waits."""
    began = perf_counter()
    ready = None
    if work is not None:
        ready = work.start()
        stream.wait_stream(work.stream)
    with bench.module.stream(stream):
        copy()
    end = traffic_sources.recorded(bench.module, stream)

    if ready is not None:
        _look_until(ready, queue)
        began = perf_counter()
    _look_until(end, queue)
    return perf_counter() - began


def _look_until(event: torch.Event, queue: Queue | None) -> None:
    """Look for the end of an event until it is given up; the queue goes on meanwhile."""
    began = perf_counter()
    while not event.query() and perf_counter() - began < _GIVEN_UP:
        if queue is not None:
            queue.go_on()
