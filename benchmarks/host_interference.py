# SPDX-License-Identifier: Apache-2.0
"""What a transfer does to the model that is running: loops of compute beside each way.

A loop runs on one stream. In a side stream blocks are moved at full speed from before its first
step until its last has ended, a few transfers in the queue at any time. The slow-down is the time
of the loop / its time alone in the same repeat - 1; the link's bandwidth counts the transfers that
had ended by then. Repeats take the ways in turns, in an order that rotates.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from portakv.errors import PortaKVError

from .command import Rows, Step
from .host_cases import DIRECTIONS, Case, case_of, scene
from .host_loops import Loop, attention, matmul, timed_event
from .host_memory import Sides
from .host_suite import KB, Bench, short
from .host_ways import (
    CHOSEN,
    DESCRIPTORS,
    HOST,
    MEMCPY,
    MOST_RUNS,
    STAGED,
    direct,
    plain,
)  # fmt: skip

#: Transfers in the queue at a time.
_AHEAD = 3
#: Ways that a bar judges are repeated in full, the others this often at most.
_OTHERS = 2
_JUDGED = (MEMCPY, CHOSEN)
_RUNS = (2 * KB, 256)


@dataclass
class Mover:
    """A way of moving a case, and what its meetings with the loop gave.

    Attributes:
        labels: what identifies it in the results.
        issue: moves the case once on the current stream.
        poison, right: as in `harness.Variant`.
        payload: bytes of one transfer.
        times, alone: milliseconds of the loop beside it, and alone in the same repeat.
        links: 10^9 bytes in a second meanwhile.
    """

    labels: dict[str, Any]
    issue: Callable[[], object]
    poison: Callable[[], None]
    right: Callable[[], bool]
    payload: int
    times: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    links: list[float] = field(default_factory=list)
    verified: bool = True

    @property
    def judged(self) -> bool:
        """Whether a bar asks for it."""
        return self.labels["backend"] in _JUDGED


def _matmul(bench: Bench) -> Loop:
    return matmul(bench.device, bench.preset.matmul, bench.preset.loop_seconds)


def _attention(bench: Bench) -> Loop:
    return attention(bench.device, bench.preset.attention, bench.preset.loop_seconds)


_LOOPS: dict[str, Callable[[Bench], Loop]] = {"matmul": _matmul, "attention": _attention}


def interference_steps(bench: Bench) -> Iterator[Step]:
    """A step for each loop and direction."""
    for direction in DIRECTIONS:
        for name, make in _LOOPS.items():
            yield f"beside {name}, {direction}", partial(_measure, bench, make, direction)


def _measure(bench: Bench, make: Callable[[Bench], Loop], direction: str) -> tuple[Rows, list[str]]:
    loop = make(bench)
    left_out: list[str] = []
    movers = list(_movers(bench, direction, left_out))
    usable = []
    for mover in movers:
        try:
            mover.poison()
            mover.issue()
            bench.module.synchronize()
        except (PortaKVError, RuntimeError, TypeError, ValueError) as error:
            told = str(error).partition("\n")[0]
            left_out.append(f"beside {loop.name}, {mover.labels['backend']} {direction}, "
                            f"{mover.labels['shape']}: {told}")  # fmt: skip
        else:
            usable.append(mover)
    streams = bench.stream(), bench.stream()
    for n in range(bench.preset.repeats):
        alone = _meet(bench, loop, None, streams)[0]
        turn = n % max(1, len(usable))
        for mover in (*usable[turn:], *usable[:turn]):
            if n >= _OTHERS and not mover.judged:
                continue
            mover.poison()
            taken, link = _meet(bench, loop, mover, streams)
            mover.verified &= mover.right()
            mover.times.append(taken)
            mover.alone.append(alone)
            mover.links.append(link)
    rows = [_row(loop, direction, mover) for mover in usable]
    compare(rows)
    return rows, left_out


def _meet(bench: Bench, loop: Loop, mover: Mover | None, streams: Any) -> tuple[float, float]:
    """Milliseconds of the loop beside a mover, and 10^9 bytes in a second of the link."""
    work, side = streams
    module = bench.module
    first, last = timed_event(module), timed_event(module)
    ended: list[Any] = []
    flying: deque[Any] = deque()
    module.synchronize()

    def issue() -> None:
        assert mover is not None
        with module.stream(side):
            mover.issue()
            ended.append(timed_event(module))
            ended[-1].record(side)
        flying.append(ended[-1])

    began = timed_event(module)
    began.record(side)
    if mover is not None:
        issue()
    with module.stream(work):
        first.record(work)
        loop.run()
        last.record(work)
    while mover is not None and not last.query():
        if len(flying) < _AHEAD:
            issue()
        elif flying[0].query():
            flying.popleft()
    module.synchronize()
    taken = float(first.elapsed_time(last))
    if mover is None:
        return taken, 0.0
    until = float(began.elapsed_time(last))
    stamps = [float(began.elapsed_time(event)) for event in ended]
    within = [stamp for stamp in stamps if stamp <= until] or stamps[:1]
    return taken, len(within) * mover.payload / max(within) / 1e6


def _movers(bench: Bench, direction: str, left_out: list[str]) -> Iterator[Mover]:
    """Plain memcpy, every engine and the peers; rows of 2 KB and of 256 bytes."""
    payload, kept = bench.preset.beside, _Kept(bench)
    dense = kept.at(_RUNS[0], payload)
    dense.fill(direction)
    yield Mover(
        {"shape": "dense", "backend": MEMCPY, "engine": MEMCPY},
        lambda: plain(dense, direction),
        lambda: dense.poison_plain(direction),
        lambda: dense.plain_right(direction),
        payload,
    )
    for run in _RUNS:
        for way in bench.serving((HOST, STAGED, DESCRIPTORS, direct(8))):
            # So few descriptors that their cost for the host is not all that is seen.
            most = 1 << (run * MOST_RUNS).bit_length() - 1 if way is DESCRIPTORS else payload
            sides = kept.at(run, min(payload, most))
            issue: Callable[[], object] = partial(way.move, sides, direction)
            yield _mover(sides, way.name, way.engine, direction, issue,
                         way.terms.get("max_thread_blocks"))  # fmt: skip
        for peer in bench.peers:
            sides = kept.at(run, payload)
            try:
                issue = peer.mover(sides, direction)
            except PortaKVError as error:
                left_out.append(f"beside a loop, {peer.name} {direction}: {error}")
            else:
                yield _mover(sides, peer.name, peer.name, direction, issue)


class _Kept:
    """Chunks of the host with rows of some bytes, over one region, each made once."""

    def __init__(self, bench: Bench) -> None:
        self._region = bench.region(max(bench.preset.payloads))
        self._known: dict[tuple[int, int], Sides] = {}

    def at(self, run: int, payload: int) -> Sides:
        """Rows of ``run`` bytes, ``payload`` in all."""
        if (run, payload) not in self._known:
            case = case_of(scene(run), payload)
            assert case is not None, f"{payload} bytes are no whole rows of {run}"
            self._known[run, payload] = Sides(case, self._region)
        return self._known[run, payload]


def _mover(
    sides: Sides, name: str, engine: str, direction: str, issue: Callable[[], object],
    blocks: int | None = None,
) -> Mover:  # fmt: skip
    case: Case = sides.case
    labels: dict[str, Any] = {
        "shape": case.scene.name, "backend": name, "engine": engine,
        "row_bytes": case.scene.row,
    }  # fmt: skip
    if blocks is not None:
        labels["thread_blocks"] = blocks
    return Mover(
        labels, issue, lambda: sides.poison(direction), lambda: sides.right(direction),
        case.payload,
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
