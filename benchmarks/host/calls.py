# SPDX-License-Identifier: Apache-2.0
"""Measure the host time of a block transfer: 1,000 blocks x 64 planes, by each strategy.

Everything that can be made beforehand is: views, plans, kernels. Calls follow each other in rounds,
without waiting for an end in between, as those of a serving engine do. The first of a round finds
an idle device and a processor that has waited: it is reported next to the others, and is two to
four times as dear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from time import perf_counter

from portakv.plan.plan import CopyPlan
from portakv.runtime.transfer import Transfer
from portakv_benchmarks.host.cases import BLOCK_FIRST, DIRECTIONS, LAYER_FIRST, Case, Scene, Sides
from portakv_benchmarks.host.suite import (
    BATCHED_MEMCPY,
    HOST,
    HOST_IDLE,
    STAGED,
    ZERO_COPY,
    Bench,
    Method,
)
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Row, Rows, Step, quantile, short
from portakv_benchmarks.shared.shapes import in_words

_BLOCK = 16
_LAYERS = 32
_WAYS = (ZERO_COPY, STAGED, HOST, BATCHED_MEMCPY)
#: Calls of a method that takes the host this many microseconds are not repeated as often.
_DEAR = 20_000.0
_FEW = 4
#: Calls of a round.
_ROUND = 5
# of the host's blocks
IDS = ("kept Index", "host tensor")
ORDERS = ("random", "consecutive")


def moved(method: Method, sides: Sides, direction: str, ids: str) -> Transfer:
    """Copy a case once by a method, with ids of one kind of `IDS`.

    New ids may have another strategy than those that were used before.
    """
    return method.move(sides, direction, ids=None if ids == IDS[0] else sides.fresh_ids())


def call_steps(bench: Bench) -> Iterator[Step]:
    """Yield a step for each row size and order of the host's blocks.

    The first size is measured in full. Other sizes, which move gigabytes, are measured less often,
    by fewer methods and with cached ids alone.
    """
    tokens = _BLOCK * bench.preset.call_blocks
    for row, order in product(bench.preset.call_rows, ORDERS):
        whole = row == bench.preset.call_rows[0]
        if whole or order == ORDERS[0]:
            place = Scene(_BLOCK * row, row // 256, LAYER_FIRST, "blocks", BLOCK_FIRST, order)
            name = f"host time: rows of {in_words(row)}, {place.side}"
            yield name, partial(_measure, bench, Case(place, _LAYERS, tokens), whole)


def new_id_steps(bench: Bench) -> Iterator[Step]:
    """Yield a step for each number of blocks of 32 layers, copied by ids that are new in each call
    between caches by layer and a block-first pool."""
    place = Scene(_BLOCK * 2048, 8, LAYER_FIRST, "blocks", BLOCK_FIRST, ORDERS[0])
    for blocks in bench.preset.new_blocks:
        case = Case(place, _LAYERS, _BLOCK * blocks)
        yield f"host time: {blocks} blocks by new ids", partial(_measure_new, bench, case)


def _measure_new(bench: Bench, case: Case) -> Rows:
    rows: Rows = []
    sides = bench.sides(case)
    for direction, method in product(DIRECTIONS, bench.serving((HOST, HOST_IDLE))):
        sides.fill(direction)
        row = _row(bench, sides, direction, method, IDS[1], case.runs, bench.preset.calls)
        rows.append({**row, "kind": "wall_blocks", **_driver(bench, sides, direction, method)})
    return rows


def _driver(bench: Bench, sides: Sides, direction: str, method: Method) -> Row:
    """Return what the driver's own submissions take of such calls."""
    clock = bench.clock
    if clock is None:
        return {}
    submissions = list[int]()

    def call(follows_others: bool = False) -> float:
        fresh = sides.fresh_ids()
        if not follows_others:
            bench.module.synchronize()
        clock.start()
        method.move(sides, direction, ids=fresh)
        spent, calls = clock.stop()
        submissions.append(calls)
        return spent

    _, times = _times(call, bench.preset.calls)
    bench.module.synchronize()
    middle = int(quantile(submissions, 0.5))
    return {"driver_us": short(quantile(times, 0.5)), "submissions": middle}


def _measure(bench: Bench, case: Case, whole: bool) -> Rows:
    rows: Rows = []
    sides = bench.sides(case)
    calls = bench.preset.calls if whole else max(1, bench.preset.calls // 3)
    methods = bench.serving(_WAYS if whole else _WAYS[:-1])
    for direction in DIRECTIONS:
        sides.fill(direction)
        src, dst, local, remote = sides.arguments(direction)
        plan = CopyPlan(src.form, dst.form, local.plan_step, remote.plan_step)
        merged = int(plan.runs(src, dst, local, remote, case.tokens).nbytes.size)  # with neighbours
        for method, ids in product(methods, IDS if whole else IDS[:1]):
            try:
                rows.append(_row(bench, sides, direction, method, ids, merged, calls))
            except harness.FAILURES as error:
                place = f"host time: {method.name} {direction}, {ids}"
                bench.left_out.append(f"{place}: {harness.in_a_line(error)}")
    return rows


def _row(
    bench: Bench, sides: Sides, direction: str, method: Method, ids: str, merged: int, calls: int
) -> Row:
    def call(follows_others: bool = False) -> float:
        fresh = None if ids == IDS[0] else sides.fresh_ids()
        if not follows_others:
            bench.module.synchronize()
        began = perf_counter()
        method.move(sides, direction, ids=fresh)
        return (perf_counter() - began) * 1e6

    sides.poison(direction)
    first = call()
    right = sides.right(direction)
    idle, times = _times(call, calls)
    bench.module.synchronize()
    chosen = method.taken(moved(method, sides, direction, ids))
    bench.module.synchronize()
    middle = quantile(times, 0.5)
    case = sides.case
    scene = sides.case.scene
    return {
        "kind": "host_call",
        "shape": case.name,
        "backend": method.name,
        "engine": method.engine,
        **chosen,
        "op": direction,
        "ids": ids,
        "host_side": scene.side,
        "row_bytes": scene.row,
        "run_bytes": scene.run,
        "payload_bytes": case.payload,
        "blocks": case.tokens // _BLOCK,
        "planes": 2 * case.layers,
        "merged_runs": merged,
        "host_us": short(middle),
        "host_us_p90": short(quantile(times, 0.9)),
        "idle_us": short(quantile(idle, 0.5)),
        "first_us": short(first),
        "us_per_run": short(middle / merged),
        "calls": len(times),
        "verified": right,
    }


def _times(call: Callable[..., float], calls: int) -> tuple[list[float], list[float]]:
    """Return the microseconds of the first calls of rounds, and of the later calls."""
    call()
    idle = [call()]
    times = list[float]()
    most = min(calls, _FEW) if idle[0] > _DEAR else calls
    while len(times) < most:
        for follows_others in (False, *[True] * (_ROUND - 1)):
            (times if follows_others else idle).append(call(follows_others))
    return idle, times
