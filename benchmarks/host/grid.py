# SPDX-License-Identifier: Apache-2.0
"""The grid: every engine over direction, layouts and payload, in turns with a plain memcpy.

Three parts: the grid itself; the direct engine by its thread blocks; both directions at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from portakv.engines.staging import staging
from portakv_benchmarks.host.cases import (
    BLOCK_FIRST,
    DIRECTIONS,
    POOL_BY_LAYER,
    SCENES,
    Case,
    case_of,
    cases,
    scene,
)
from portakv_benchmarks.host.memory import Sides
from portakv_benchmarks.host.suite import KB, MB, Bench
from portakv_benchmarks.host.ways import (
    CHOSEN,
    DESCRIPTORS,
    HOST,
    HOST_IDLE,
    MEMCPY,
    STAGED,
    Way,
    by_engine,
    direct,
    memcpy,
    plain,
)
from portakv_benchmarks.shared.command import Rows, Step
from portakv_benchmarks.shared.harness import Measured, Variant, figures, measure, short, usable
from portakv_benchmarks.shared.shapes import in_words

#: What is compared; `chosen_loss` is against the best of the first three that may be chosen.
ENGINES = (STAGED, DESCRIPTORS, direct())
GRID_WAYS = (*ENGINES, HOST, HOST_IDLE)

Found = tuple[Rows, list[str]]


def grid_steps(bench: Bench) -> Iterator[Step]:
    """A step for each scene, and the largest payload."""
    preset = bench.preset
    scenes = [one for one in SCENES if one.run in preset.runs]
    late = [one for one in scenes if one.host == POOL_BY_LAYER]
    for one in (one for one in scenes if one not in late):
        mine = cases([one], preset.payloads_of(one))
        yield f"grid: {one.name}", partial(_grid, bench, mine)
    largest = cases([scene(2 * KB), scene(32 * KB, BLOCK_FIRST, "random")], [preset.largest])
    yield f"grid: {in_words(preset.largest)}", partial(_grid, bench, largest)
    for one in late:
        mine = cases([one], preset.payloads_of(one))
        yield f"grid: {one.name}", partial(_grid, bench, mine)


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


def _grid(bench: Bench, mine: Sequence[Case]) -> Found:
    rows: Rows = []
    left_out: list[str] = []
    for case in mine:
        found, told = _measure(bench, case, GRID_WAYS, "host_copy")
        rows += found
        left_out += told
    compare(rows)
    return rows, left_out


def _direct(bench: Bench, case: Case) -> Found:
    ways = [direct(blocks) for blocks in bench.preset.thread_blocks]
    rows, left_out = _measure(bench, case, ways, "host_direct")
    for row in rows:
        if row["backend"] != MEMCPY:
            row["thread_blocks"] = int(row["backend"].rpartition(" ")[2])
    return rows, left_out


def _measure(bench: Bench, case: Case, ways: Sequence[Way], kind: str) -> Found:
    """A case in both directions by each way."""
    ways = bench.serving(ways)
    told = {way: way.left_out(case) for way in ways}
    left_out = [why for why in told.values() if why]
    named = {way.name: way for way in ways if not told[way]}
    sides = bench.sides(case)
    rows: Rows = []
    for direction in DIRECTIONS:
        sides.fill(direction)
        good, refused = usable([by_engine(way, sides, direction) for way in named.values()])
        left_out += [f"{case.name}, {v.labels['backend']} {direction}: {why}" for v, why in refused]
        more: list[dict[str, Any]] = [{}, *(_staging(bench, variant) for variant in good)]
        ceiling, *others = measured(bench, memcpy(sides, direction), good, case.payload)
        for variant, one in zip(good, more[1:], strict=True):
            one["alone_us"] = short(bench.timer.alone.get(variant.call, 0.0))
            way = named[variant.labels["backend"]]
            if way.engine == CHOSEN:
                one |= way.taken(way.move(sides, direction))
                one["allowed"] = sorted(way.allowed(sides, direction))
        bench.module.synchronize()
        for measure_of, fields in zip((ceiling, *others), more, strict=True):
            rows.append({**_row(kind, case, measure_of, bench), **fields})
    return rows, left_out


def _row(kind: str, case: Case, one: Measured, bench: Bench) -> dict[str, Any]:
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
        **figures(one, case.payload),
        "timer": bench.timer.name,
    }


def _staging(bench: Bench, variant: Variant) -> dict[str, Any]:
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
    return {"staging_mb": short((module.max_memory_allocated(device) - before) / MB)}


def compare(rows: Rows) -> None:
    """Write into the rows of chosen engines how they stand to the best engine of that point:
    ``chosen_loss``, their time / its time - 1, where the best is of those that their terms allow;
    ``best_engine`` and ``best_ratio``, of all."""
    points: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for row in rows:
        points[row["shape"], row["op"]].append(row)
    named = [way.name for way in ENGINES]
    for point in points.values():
        known = [row for row in point if row["backend"] in named and row["verified"]]
        for row in (row for row in point if row["engine"] == CHOSEN and known):
            allowed = [one for one in known if one["engine"] in row["allowed"]]
            if allowed:
                row["chosen_loss"] = short(row["p50_us"] / _quickest(allowed)["p50_us"] - 1)
            best = _quickest(known)
            row["best_engine"], row["best_ratio"] = best["backend"], best["ratio"]


def _quickest(rows: Rows) -> dict[str, Any]:
    return min(rows, key=lambda row: float(row["p50_us"]))


def measured(
    bench: Bench, ceiling: Variant, variants: Sequence[Variant], payload: int
) -> list[Measured]:
    """Variants in turns with a ceiling, on one device and one region."""
    return measure(
        ceiling, variants, bench.timer, objects=1, rounds=bench.preset.rounds(payload),
        seconds=bench.preset.seconds,
    )  # fmt: skip


def _both_ways(bench: Bench, case: Case) -> Found:
    """Device to host and host to device at once, each with memory of its own."""
    first, second = bench.region(2 * case.payload).halves()
    down, up = Sides(case, first), Sides(case, second)
    down.fill("d2h")
    up.fill("h2d")
    streams = bench.stream(), bench.stream()
    ways = bench.serving((STAGED, direct(), HOST, HOST_IDLE))
    good, refused = usable([_opposed(way, down, up, streams) for way in ways])
    left_out = [f"both ways: {case.name}, {v.labels['backend']}: {why}" for v, why in refused]
    ceiling = _opposed_memcpy(bench, down, up, streams)
    rows = [
        _row("host_duplex", case, one, bench)
        for one in measured(bench, ceiling, good, 2 * case.payload)
    ]
    for row in rows:  # what went both ways together
        row["gb_per_s"] = short(2 * row["gb_per_s"])
        way = next((way for way in ways if way.name == row["backend"]), None)
        if way is not None and way.engine == CHOSEN:
            told = [way.taken(way.move(*one)) for one in ((down, "d2h"), (up, "h2d"))]
            chosen = ", ".join(dict.fromkeys(one["chosen"] for one in told))
            row.update(told[0], chosen=chosen)
    bench.module.synchronize()
    return rows, left_out


Streams = tuple[torch.Stream, torch.Stream]


def _opposed(way: Way, down: Sides, up: Sides, streams: Streams) -> Variant:
    def call(i: int) -> None:
        there = way.move(down, "d2h", streams[0])
        back = way.move(up, "h2d", streams[1])
        there.wait()
        back.wait()

    return _duplex_variant(way.name, way.engine, call, down, up, plainly=False)


def _opposed_memcpy(bench: Bench, down: Sides, up: Sides, streams: Streams) -> Variant:
    def call(i: int) -> None:
        current = bench.module.current_stream(bench.device)
        for stream, sides, direction in zip(streams, (down, up), DIRECTIONS, strict=True):
            stream.wait_stream(current)
            with bench.module.stream(stream):
                plain(sides, direction)
        for stream in streams:
            current.wait_stream(stream)

    return _duplex_variant(MEMCPY, MEMCPY, call, down, up, plainly=True)


def _duplex_variant(
    name: str, engine: str, call: Any, down: Sides, up: Sides, *, plainly: bool
) -> Variant:
    both = ((down, "d2h"), (up, "h2d"))

    def poison(i: int) -> None:
        for sides, direction in both:
            (sides.poison_plain if plainly else sides.poison)(direction)

    def right(i: int) -> bool:
        return all((s.plain_right if plainly else s.right)(direction) for s, direction in both)

    return Variant({"backend": name, "engine": engine, "op": "both"}, call, poison, right)
