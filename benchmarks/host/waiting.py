# SPDX-License-Identifier: Apache-2.0
"""What a copy of another stream waits for while transfers follow each other.

An engine sends its step's inputs and fetches its tokens over the same link, with copies of its own.
One of those is issued on another stream, in the direction of the transfers, a few of which are in
the queue at any time; what it takes until the host sees its end is told. A copy engine may stay
with the transfers for as long as there are more of them: a copy that has waited so long is given
up, and counts as that long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter

import torch

from portakv_benchmarks.host.cases import DIRECTIONS
from portakv_benchmarks.host.movers import Mover, Queue, Ways, memcpys, recorded, transfers
from portakv_benchmarks.host.suite import DESCRIPTORS, HOST, HOST_DETACHED, Bench, direct
from portakv_benchmarks.shared.harness import Rows, Step, short, uncollected
from portakv_benchmarks.shared.shapes import in_words

#: Bytes of the other's copy: what a kernel may carry out, and what surely takes a copy engine.
OTHERS = (64, 1 << 20)
_WAYS = (HOST_DETACHED, HOST, DESCRIPTORS, direct(8))
#: Seconds until the first copy of the other and between two, and after which one is given up.
_BEFORE, _BETWEEN, _GIVEN_UP = 12e-3, 3e-3, 50e-3


def waiting_steps(bench: Bench) -> Iterator[Step]:
    """A step for each direction."""
    for direction in DIRECTIONS:
        yield f"copies of others beside transfers, {direction}", partial(_measure, bench, direction)


def _measure(bench: Bench, direction: str) -> Rows:
    ways = Ways(bench, f"copies of others, {direction}")
    rows: Rows = []
    movers = [memcpys(bench, direction)]
    movers += [transfers(bench, way, direction) for way in bench.serving(_WAYS)]
    for mover, nbytes in product(movers, OTHERS):
        ways.tried(mover, partial(_row, bench, direction, nbytes, rows))
    return rows


def _row(bench: Bench, direction: str, nbytes: int, rows: Rows, mover: Mover) -> None:
    mover.once()
    mover.variant.poison(0)
    copy, right = _other(bench, direction, nbytes)
    waits = _waits(bench, mover, copy)
    alone_stream = bench.stream()
    bench.module.synchronize()
    alone = [_seen(bench, None, alone_stream, copy) for _ in range(bench.preset.calls)]
    mover.look()
    rows.append({
        "kind": "host_waiting", **mover.labels, "payload_bytes": mover.payload,
        "other_bytes": nbytes, "other": f"{in_words(nbytes)} copy",
        "alone_us": short(median(alone) * 1e6), "wait_us": short(median(waits) * 1e6),
        "worst_us": short(max(waits) * 1e6), "samples": len(waits),
        "given_up": sum(one >= _GIVEN_UP for one in waits),
        "verified": mover.verified and right(),
    })  # fmt: skip


def _other(
    bench: Bench, direction: str, nbytes: int
) -> tuple[Callable[[], object], Callable[[], bool]]:
    """A pinned copy on the current stream, and whether its bytes landed."""
    here = torch.zeros(nbytes, dtype=torch.uint8).pin_memory()
    there = torch.zeros(nbytes, dtype=torch.uint8, device=bench.device)
    src, dst = (there, here) if direction == "d2h" else (here, there)
    src.fill_(7)
    return lambda: dst.copy_(src, non_blocking=True), lambda: bool((dst == 7).all())


def _waits(bench: Bench, mover: Mover, copy: Callable[[], object]) -> list[float]:
    """Seconds of each copy of the other, from its call to its end."""
    queue, stream = Queue(bench.module, mover, bench.stream()), bench.stream()
    waits: list[float] = []
    bench.module.synchronize()
    with uncollected():
        due = (began := perf_counter()) + _BEFORE
        while not waits or perf_counter() < began + bench.preset.waiting:
            queue.go_on()
            if perf_counter() >= due:
                waits.append(_seen(bench, queue, stream, copy))
                if waits[-1] >= _GIVEN_UP:
                    bench.module.synchronize()
                due = perf_counter() + _BETWEEN
        bench.module.synchronize()
    return waits


def _seen(
    bench: Bench, queue: Queue | None, stream: torch.Stream, copy: Callable[[], object]
) -> float:
    """Seconds of a copy until its end was seen, or until it was given up."""
    began = perf_counter()
    with bench.module.stream(stream):
        copy()
    end = recorded(bench.module, stream)
    while not end.query() and perf_counter() - began < _GIVEN_UP:
        if queue is not None:
            queue.go_on()
    return perf_counter() - began
