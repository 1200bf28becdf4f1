# SPDX-License-Identifier: Apache-2.0
"""Measure how pulls slow a model down, on the reader's device or on the owner's.

A loop of matrix products runs alone, during raw copies, and during pulls on the default terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from time import perf_counter, sleep
from types import SimpleNamespace
from typing import Any

from portakv.errors import Unsupported
from portakv.migrate import Pull
from portakv_benchmarks.host.interference import Meeting
from portakv_benchmarks.host.suite import MEMCPY, Bench
from portakv_benchmarks.host.traffic_sources import DEFAULT, Queue, Traffic
from portakv_benchmarks.migration.cases import CASES, USUAL
from portakv_benchmarks.migration.pulls import MAPPED, RAW
from portakv_benchmarks.migration.suite import MigrationBench
from portakv_benchmarks.shared.harness import Row, Rows, Step, Variant, short
from portakv_benchmarks.shared.shapes import in_words


def loop_steps(bench: MigrationBench) -> Iterator[Step]:
    """Yield a step for the loop on either side."""
    if not bench.on:
        raise Unsupported("A loop alongside pulls", "torch finds no accelerator here")
    yield "matmul on the reader", partial(_on_reader, bench)
    if bench.there != bench.device:
        yield "matmul on the owner", partial(_on_owner, bench)


def _transports(bench: MigrationBench, *_: Any) -> Iterator[Traffic]:
    """Yield raw copies, and pulls on the default terms."""
    nbytes = bench.sizes.large[1]
    near = bench.near
    bench.meet(USUAL, nbytes)
    ticket = bench.far.do("offer", nbytes)
    payload = CASES[USUAL].payload(nbytes)

    def pull() -> Any:
        return SimpleNamespace(done=partial(_done, near.pull(ticket, nbytes)))

    for name, call in ((MEMCPY, partial(near.copy, nbytes)), (MAPPED, pull)):
        labels = {"backend": name, "op": in_words(nbytes)}

        def once(_: int, call: Any = call) -> Any:
            return call()

        right = partial(_right, bench, nbytes, name == MEMCPY)
        variant = Variant(labels, once, lambda _: bench.change(), right)
        yield Traffic(variant, payload, shape=USUAL)


def _done(pulled: Pull) -> bool:
    sleep(2e-5)  # else the worker that ends the pull would wait for the interpreter
    return pulled.done()


def _right(bench: MigrationBench, nbytes: int, raw: bool, _: int) -> bool:
    bench.near.settle()
    return bench.near.right(nbytes, raw)


def _rows_of_side(bench: MigrationBench, on: str, rows: Rows) -> Rows:
    """Return the rows of either side in the same words; `over_raw` in points."""
    raw = next((x for x in rows if x["backend"] == MEMCPY), None)
    made = Rows()
    for row in rows:
        fields: Row = {"kind": "migrate_beside", "loop": "matmul", "on": on, "across": bench.across}
        names = ("shape", "op", "payload_bytes", "slowdown_pct", "slowdowns_pct", "link_gb_per_s")
        fields |= {name: row[name] for name in (*names, "verified")}
        fields["backend"] = RAW if row is raw else MAPPED
        if raw and row is not raw:
            fields["over_raw"] = round(row["slowdown_pct"] - raw["slowdown_pct"], 2)
            fields["of_raw"] = short(row["link_gb_per_s"] / raw["link_gb_per_s"])
        made.append(fields)
    return made


def _on_reader(bench: MigrationBench) -> Rows:
    def make(_: Bench, __: str) -> list[Traffic]:
        return [*_transports(bench)]

    meeting = Meeting(bench, "matmul", DEFAULT, "pull")
    rows = meeting.rows(make, bench.sizes.repeats, (MEMCPY, MAPPED))
    return _rows_of_side(bench, "reader", rows)


def _on_owner(bench: MigrationBench) -> Rows:
    traffics = [*_transports(bench)]
    terms = bench.sizes.matmul, bench.sizes.seconds
    bench.far.do("loop", *terms)  # makes it, and warms it up
    slow: dict[str, list[float]] = {str(one): [] for one in traffics}
    rates: dict[str, list[float]] = {str(one): [] for one in traffics}
    side = bench.stream()
    for _ in range(bench.sizes.repeats):
        for traffic in traffics:
            alone = bench.far.do("loop", *terms)
            traffic.variant.poison(0)
            bench.module.synchronize()
            queue = Queue(bench.module, traffic, side)
            began = perf_counter()
            queue.fill()
            bench.far.begin("loop", *terms)
            while not bench.far.ready() or not queue.stamps:
                queue.go_on()
            slow[str(traffic)].append(100 * (bench.far.end() / alone - 1))
            moved = len(queue.stamps) * traffic.payload
            rates[str(traffic)].append(moved / (queue.stamps[-1] - began) / 1e9)
            bench.module.synchronize()
            traffic.look()
    rows = [
        {
            **traffic.labels,
            "payload_bytes": traffic.payload,
            "verified": traffic.verified,
            "slowdown_pct": round(median(slow[str(traffic)]), 2),
            "slowdowns_pct": [round(one, 2) for one in slow[str(traffic)]],
            "link_gb_per_s": short(median(rates[str(traffic)])),
        }
        for traffic in traffics
    ]
    return _rows_of_side(bench, "owner", rows)
