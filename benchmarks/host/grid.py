# SPDX-License-Identifier: Apache-2.0
"""The grid: every engine over direction, layouts and payload, in turns with a plain memcpy.

Three parts: the grid itself; the direct engine by its thread blocks; both directions at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from portakv.engines.staging import staging
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
from portakv_benchmarks.host.suite import HOST, KB, Bench, Way
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Measured, Row, Rows, Step, Variant, short
from portakv_benchmarks.shared.shapes import in_words

#: What is compared; `chosen_loss` is against the best of the first three that may be chosen.
ENGINES = (suite.STAGED, suite.DESCRIPTORS, suite.direct())
GRID_WAYS = (*ENGINES, HOST, suite.HOST_IDLE)


def grid_steps(bench: Bench) -> Iterator[Step]:
    """A step for each scene, and the largest payload."""
    preset = bench.preset
    largest = cases([scene(2 * KB), scene(32 * KB, BLOCK_FIRST, "random")], [preset.largest])
    steps = {
        one.name: (one.host == POOL_BY_LAYER, cases([one], preset.payloads_of(one)))
        for one in SCENES
        if one.run in preset.runs
    }
    steps[in_words(preset.largest)] = (False, largest)
    for name, (_, mine) in sorted(steps.items(), key=lambda step: step[1][0]):  # what is late, last
        yield f"grid: {name}", partial(_grid, bench, mine)


def direct_steps(bench: Bench) -> Iterator[Step]:
    """The direct engine by its limit on thread blocks."""
    for run in (256, 2 * KB, 32 * KB):
        case = case_of(scene(run), bench.preset.direct)
        if case is not None:
            yield f"direct: {case.name}", partial(_direct, bench, case)


def duplex_steps(bench: Bench) -> Iterator[Step]:
    """Both directions at once, on two streams."""
    scenes = (scene(256), scene(2 * KB), scene(32 * KB, BLOCK_FIRST, "random"))
    for case in cases(scenes, bench.preset.duplex):
        yield f"both ways: {case.name}", partial(_both_ways, bench, case)


def _grid(bench: Bench, mine: Sequence[Case]) -> Rows:
    rows = [row for case in mine for row in _measure(bench, case, GRID_WAYS, "host_copy")]
    compare(rows)
    return rows


def _direct(bench: Bench, case: Case) -> Rows:
    ways = [suite.direct(blocks) for blocks in bench.preset.thread_blocks]
    rows = _measure(bench, case, ways, "host_direct")
    for row in rows:
        if row["backend"] != suite.MEMCPY:
            row["thread_blocks"] = int(row["backend"].rpartition(" ")[2])
    return rows


def _measure(bench: Bench, case: Case, ways: Sequence[Way], kind: str) -> Rows:
    """A case in both directions by each way."""
    ways = bench.serving(ways)
    bench.left_out += [why for way in ways if (why := way.left_out(case))]
    named = {way.name: way for way in ways if not way.left_out(case)}
    sides = bench.sides(case)
    rows: Rows = []
    for direction in DIRECTIONS:
        sides.fill(direction)
        known = [suite.by_engine(way, sides, direction) for way in named.values()]
        good = harness.usable(known, case.name, bench.left_out)
        more: Rows = [{}, *(_staging(bench, variant) for variant in good)]
        found = measured(bench, suite.by_memcpy(sides, direction), good, case.payload)
        for variant, told in zip(good, more[1:], strict=True):
            told["alone_us"] = short(bench.timer.alone.get(variant.call, 0.0))
            way = named[variant.labels["backend"]]
            if way.engine == suite.CHOSEN:
                told |= way.taken(way.move(sides, direction))
                told["allowed"] = sorted(way.allowed(sides, direction))
        bench.module.synchronize()
        for one, told in zip(found, more, strict=True):
            rows.append({**_row(kind, case, one, bench), **told})
    return rows


def _row(kind: str, case: Case, one: Measured, bench: Bench) -> Row:
    return {
        "kind": kind, "shape": case.name, **one.labels, "host_side": case.scene.side,
        "row_bytes": case.scene.row, "run_bytes": case.scene.run, "runs": case.runs,
        "payload_bytes": case.payload, "layer_count": case.layers, "tokens": case.tokens,
        **one.row(case.payload), "timer": bench.timer.name,
    }  # fmt: skip


def _staging(bench: Bench, variant: Variant) -> Row:
    """``staging_mb``, the most memory of the device that a call takes, in 2^20 bytes. Empty where
    torch does not say.

    Engines keep what they stage in for each stream, so the call comes on a stream that none has
    seen: what it takes there is its own, and nothing of it was left by a call before.
    """
    module, device = bench.module, bench.device
    if not hasattr(module, "max_memory_allocated"):
        return {}
    stream = bench.stream()
    staging(device, stream)  # the oldest stream's is given back now, and not in the call
    module.synchronize()
    before = module.memory_allocated(device)
    module.reset_peak_memory_stats(device)
    with module.stream(stream):
        variant.call(0)
    module.synchronize()
    return {"staging_mb": short((module.max_memory_allocated(device) - before) / suite.MB)}


def compare(rows: Rows) -> None:
    """Write into the rows of chosen engines how they stand to the best engine of that point:
    ``chosen_loss``, their time / its time - 1, if the best is of those that their terms allow;
    ``best_engine`` and ``best_ratio``, of all."""
    named = [way.name for way in ENGINES]
    for point in harness.grouped(rows, "shape", "op"):
        known = [row for row in point if row["backend"] in named]
        best = harness.quickest(known)
        for row in (row for row in point if row["engine"] == suite.CHOSEN):
            if best is not None:
                row["best_engine"], row["best_ratio"] = best["backend"], best["ratio"]
            allowed = harness.quickest(one for one in known if one["engine"] in row["allowed"])
            if allowed is not None:
                row["chosen_loss"] = short(row["p50_us"] / allowed["p50_us"] - 1)


def measured(
    bench: Bench, ceiling: Variant, variants: Sequence[Variant], payload: int
) -> list[Measured]:
    """Variants in turns with a ceiling, on one device and one region."""
    return harness.measure(
        ceiling, variants, bench.timer, objects=1, rounds=bench.preset.rounds(payload),
        seconds=bench.preset.seconds,
    )  # fmt: skip


def _both_ways(bench: Bench, case: Case) -> Rows:
    """Device to host and host to device at once, each with memory of its own."""
    ends = [
        (Sides(case, region), direction, bench.stream())
        for region, direction in zip(
            bench.region(2 * case.payload).halves(), DIRECTIONS, strict=True
        )
    ]
    for sides, direction, _ in ends:
        sides.fill(direction)
    ways = bench.serving((suite.STAGED, suite.direct(), HOST, suite.HOST_IDLE))
    known = [_opposed(way, ends) for way in ways]
    good = harness.usable(known, f"both ways: {case.name}", bench.left_out)
    rows = [
        _row("host_duplex", case, one, bench)
        for one in measured(bench, _opposed_memcpy(bench, ends), good, 2 * case.payload)
    ]
    chosen = {way.name: way for way in ways if way.engine == suite.CHOSEN}
    for row in rows:  # what went both ways together
        row["gb_per_s"] = short(2 * row["gb_per_s"])
        if (way := chosen.get(row["backend"])) is not None:
            told = [way.taken(way.move(sides, direction)) for sides, direction, _ in ends]
            row |= {**told[0], "chosen": ", ".join(dict.fromkeys(one["chosen"] for one in told))}
    bench.module.synchronize()
    return rows


Ends = list[tuple[Sides, str, torch.Stream]]


def _opposed(way: Way, ends: Ends) -> Variant:
    def call(i: int) -> None:
        for transfer in [way.move(*end) for end in ends]:
            transfer.wait()

    variants = [suite.by_engine(way, sides, direction) for sides, direction, _ in ends]
    return _together(variants, call)


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


def _together(variants: Sequence[Variant], call: Any) -> Variant:
    """Both directions as one variant."""
    return Variant(
        {**variants[0].labels, "op": "both"},
        call,
        lambda i: [variant.poison(i) for variant in variants],
        lambda i: all(variant.right(i) for variant in variants),
    )
