# SPDX-License-Identifier: Apache-2.0
"""Measure every transfer strategy over direction, layouts and payload, in turns with a memcpy.

Further parts vary the thread blocks of `zero_copy`, and copy in both directions together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from portakv.interconnect.staging import staging
from portakv_benchmarks.host import suite
from portakv_benchmarks.host.cases import (
    BLOCK_FIRST,
    DIRECTIONS,
    POOL_BY_LAYER,
    SCENES,
    Case,
    Sides,
    case_of,
    cases,
    scene,
)
from portakv_benchmarks.host.suite import HOST, KB, Bench, Method
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Call, Measured, Row, Rows, Step, Variant, short
from portakv_benchmarks.shared.shapes import in_words

#: The strategies to compare; `chosen_loss` is against the best of these that may be chosen.
STRATEGIES = (suite.STAGED, suite.BATCHED_MEMCPY, suite.ZERO_COPY, suite.ZERO_COPY_FEW_BLOCKS)
GRID_METHODS = (*STRATEGIES, HOST, suite.HOST_IDLE)


def grid_steps(bench: Bench) -> Iterator[Step]:
    """Yield a step for each scene, and one for the largest payload."""
    preset = bench.preset
    scenes = [one for one in SCENES if one.run in preset.runs]
    steps = [(one.name, cases([one], preset.payloads_of(one))) for one in scenes]
    late = sum(one.host == POOL_BY_LAYER for one in scenes)  # they are the last of all
    largest = cases([scene(2 * KB), scene(32 * KB, BLOCK_FIRST, "random")], [preset.largest])
    steps.insert(len(steps) - late, (in_words(preset.largest), largest))
    for name, grid_cases in steps:
        yield f"grid: {name}", partial(_grid, bench, grid_cases)


def zero_copy_steps(bench: Bench) -> Iterator[Step]:
    """Yield a step for each length of a run: `zero_copy` with several limits on thread blocks."""
    for run in (256, 2 * KB, 32 * KB):
        case = case_of(scene(run), bench.preset.direct)
        if case is not None:
            yield f"direct: {case.name}", partial(_zero_copy, bench, case)


def duplex_steps(bench: Bench) -> Iterator[Step]:
    """Run both directions at the same time, on two streams."""
    scenes = (scene(256), scene(2 * KB), scene(32 * KB, BLOCK_FIRST, "random"))
    for case in cases(scenes, bench.preset.duplex):
        yield f"both ways: {case.name}", partial(_both_directions, bench, case)


def _grid(bench: Bench, local: Sequence[Case]) -> Rows:
    rows = [row for case in local for row in _measure(bench, case, GRID_METHODS, "host_copy")]
    compare(rows)
    return rows


def _zero_copy(bench: Bench, case: Case) -> Rows:
    limits = {suite.zero_copy(blocks).name: blocks for blocks in bench.preset.thread_blocks}
    rows = _measure(bench, case, [*map(suite.zero_copy, limits.values())], "host_direct")
    for row in rows:
        if row["backend"] in limits:
            row["thread_blocks"] = limits[row["backend"]]
    return rows


def _measure(bench: Bench, case: Case, methods: Sequence[Method], kind: str) -> Rows:
    """Return the rows of a case in both directions by each method."""
    methods = bench.serving(methods)
    bench.left_out += [why for method in methods if (why := method.left_out(case))]
    named = {method.name: method for method in methods if not method.left_out(case)}
    sides = bench.sides(case)
    rows: Rows = []
    for direction in DIRECTIONS:
        sides.fill(direction)
        known = [suite.by_engine(method, sides, direction) for method in named.values()]
        good = harness.usable(known, case.name, bench.left_out)
        more = [staging_of(bench, variant) for variant in good]
        results = bench.measure(suite.by_memcpy(sides, direction), good, case.payload)
        for variant, fields in zip(good, more, strict=True):
            fields["alone_us"] = short(bench.timer.alone.get(variant.call, 0.0))
            method = named[variant.labels["backend"]]
            if method.engine == suite.CHOSEN:
                fields |= method.taken(method.move(sides, direction))
                fields["allowed"] = sorted(method.allowed(sides, direction))
        bench.module.synchronize()
        for one, fields in zip(results, [{}, *more], strict=True):
            rows.append({**_row(kind, case, one, bench), **fields})
    return rows


def _row(kind: str, case: Case, one: Measured, bench: Bench) -> Row:
    return {
        "kind": kind,
        "shape": case.name,
        **one.labels,
        "host_side": case.scene.side,
        "row_bytes": case.scene.row,
        "run_bytes": case.scene.run,
        "runs": case.runs,
        "payload_bytes": case.payload,
        "layer_count": case.layers,
        "tokens": case.tokens,
        **one.row(case.payload),
        "timer": bench.timer.name,
    }


def staging_of(bench: Bench, variant: Variant) -> Row:
    """Return ``staging_mb``, the most memory of the device that a call takes, in 2^20 bytes.

    The row is empty if torch does not report it. Strategies keep staging memory for each stream, so
    the call runs on a new stream.
    """
    module = bench.module
    device = bench.device
    if not hasattr(module, "max_memory_allocated"):
        return {}
    stream = bench.stream()
    staging(device, stream)  # the oldest stream's memory is released now, not in the call
    module.synchronize()
    before = module.memory_allocated(device)
    module.reset_peak_memory_stats(device)
    with module.stream(stream):
        variant.call(0)
    module.synchronize()
    return {"staging_mb": short((module.max_memory_allocated(device) - before) / suite.MB)}


def compare(rows: Rows) -> None:
    """Write ``chosen_loss``, ``best_engine`` and ``best_ratio`` into the rows of chosen strategies.

    ``chosen_loss`` is the time / that of the best strategy which the row's terms allow - 1; the
    other two fields concern the best of all strategies.
    """
    named = [method.name for method in STRATEGIES]
    for point in harness.grouped(rows, "shape", "op"):
        known = [row for row in point if row["backend"] in named]
        for row in harness.having(point, engine=suite.CHOSEN):
            if best := harness.quickest(known):
                row["best_engine"] = best["backend"]
                row["best_ratio"] = best["ratio"]
            other = "" if row["backend"] == suite.HOST_IDLE.name else suite.ZERO_COPY.name
            able = (one for one in known if one["engine"] in row["allowed"])
            if best := harness.quickest(one for one in able if one["backend"] != other):
                row["chosen_loss"] = short(row["p50_us"] / best["p50_us"] - 1)


def _both_directions(bench: Bench, case: Case) -> Rows:
    """Run device to host and host to device at the same time, each with separate memory."""
    regions = zip(bench.region(2 * case.payload).halves(), DIRECTIONS, strict=True)
    ends = [(Sides(case, region), op, bench.stream()) for region, op in regions]
    for sides, direction, _ in ends:
        sides.fill(direction)
    methods = bench.serving((suite.STAGED, suite.ZERO_COPY, HOST, suite.HOST_IDLE))
    known = [_opposed(method, ends) for method in methods]
    good = harness.usable(known, f"both ways: {case.name}", bench.left_out)
    chosen = {method.name: method for method in methods if method.engine == suite.CHOSEN}
    rows = []
    for one in bench.measure(_opposed_memcpy(bench, ends), good, 2 * case.payload):
        row = _row("host_duplex", case, one, bench)
        row["gb_per_s"] = short(2 * row["gb_per_s"])  # what went both ways together
        if (method := chosen.get(row["backend"])) is not None:
            moves = [method.taken(method.move(sides, direction)) for sides, direction, _ in ends]
            row |= {
                **moves[0],
                "chosen": ", ".join(dict.fromkeys(one["chosen"] for one in moves)),
            }
        rows.append(row)
    bench.module.synchronize()
    return rows


Ends = list[tuple[Sides, str, torch.Stream]]


def _opposed(method: Method, ends: Ends) -> Variant:
    def call(i: int) -> None:
        for transfer in [method.move(*end) for end in ends]:
            transfer.wait()

    return _together([suite.by_engine(method, sides, op) for sides, op, _ in ends], call)


def _opposed_memcpy(bench: Bench, ends: Ends) -> Variant:
    variants = [suite.by_memcpy(sides, direction) for sides, direction, _ in ends]

    def call(i: int) -> None:
        current = bench.module.current_stream(bench.device)
        for variant, (_, _, stream) in zip(variants, ends, strict=True):
            stream.wait_stream(current)
            with bench.module.stream(stream):
                variant.call(i)
        for _, _, stream in ends:
            current.wait_stream(stream)

    return _together(variants, call)


def _together(variants: Sequence[Variant], call: Call) -> Variant:
    """Return both directions as one variant."""
    return Variant(
        {**variants[0].labels, "op": "both"},
        call,
        lambda i: [variant.poison(i) for variant in variants],
        lambda i: all(variant.right(i) for variant in variants),
    )
