# SPDX-License-Identifier: Apache-2.0
"""Measure copies by the wall clock: from the call until the host sees the end, on an idle device.

Nothing hides the host's time here, as for a caller who needs one transfer now. Every method copies
with ids that it has seen before, and with ids that are new in each call. The memcpy of the same
bytes is timed in the same way. Peers copy between the caches and a chunk, as their connectors do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from portakv_benchmarks.host import suite
from portakv_benchmarks.host.calls import IDS, moved
from portakv_benchmarks.host.cases import BLOCK_FIRST, CHUNK, DIRECTIONS, Case, Sides, cases, scene
from portakv_benchmarks.host.interference import by_peer
from portakv_benchmarks.host.suite import KB, Bench, Method
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Row, Rows, Step, Variant
from portakv_benchmarks.shared.peers import LMCache

METHODS = (suite.HOST, suite.HOST_IDLE, suite.STAGED, suite.ZERO_COPY)
#: Of pages. The default's kernel has few thread blocks, as alongside a model.
PAGE_METHODS = (*METHODS, suite.ZERO_COPY_FEW_BLOCKS, suite.BATCHED_MEMCPY)


def whole_call_steps(bench: Bench) -> Iterator[Step]:
    """Yield a step for each payload, between caches by layer and a block-first pool; with peers
    also between caches and a chunk."""
    scenes = [scene(32 * KB, BLOCK_FIRST, "random")]
    if bench.peers:
        scenes.append(scene(2 * KB))
    for case in cases(scenes, bench.preset.whole_call):
        yield f"wall clock: {case.name}", partial(_measure, bench, case, METHODS, "wall_copy")


def page_steps(bench: Bench) -> Iterator[Step]:
    """Yield a step for each payload in pages of 2 MiB, contiguous on both sides, as vLLM has
    them."""
    for case in cases([scene(2 * suite.MB, BLOCK_FIRST, "random")], bench.preset.pages):
        name = f"wall clock: pages, {case.name}"
        yield name, partial(_measure, bench, case, PAGE_METHODS, "wall_pages")


def _measure(bench: Bench, case: Case, methods: Sequence[Method], kind: str) -> Rows:
    sides = bench.sides(case)
    rows: Rows = []
    for direction in DIRECTIONS:
        sides.fill(direction)
        variants = [
            _variant(method, sides, direction, ids)
            for method in bench.serving(methods)
            for ids in IDS
        ]
        if case.on_host.cache == CHUNK:
            variants += [_by_peer(peer, sides, direction) for peer in bench.peers]
        good = harness.usable(variants, case.name, bench.left_out)
        memcpy = suite.by_memcpy(sides, direction)
        ceilings = _ceilings(bench, case, good, memcpy)
        for one in bench.measure(memcpy, good, case.payload, bench.busy_timer):
            row: Row = {
                "kind": kind,
                "shape": case.name,
                **one.labels,
                "host_side": case.scene.side,
                "run_bytes": case.scene.run,
                "payload_bytes": case.payload,
                **one.row(case.payload),
                "timer": bench.busy_timer.name,
            }
            if (backend := row["backend"]) in ceilings:
                row["ceiling"] = ceilings[backend]
            ids = row.get("ids", IDS[0])
            rows.append({**row, **chosen_with(sides, direction, row["backend"], ids)})
    return rows


def _ceilings(
    bench: Bench, case: Case, variants: Sequence[Variant], memcpy: Variant
) -> dict[str, float]:
    """Return the share of a memcpy's rate that each strategy reaches behind a delay, which hides
    the host's part: no call by the wall can reach more. Empty on devices that have no delay."""
    if bench.timer is bench.host_timer or case.on_host.cache == CHUNK:
        return {}
    alone = [
        each
        for each in variants
        if each.labels["engine"] != suite.CHOSEN and each.labels["ids"] == IDS[0]
    ]
    measured = bench.measure(memcpy, alone, case.payload)
    return {one.labels["backend"]: harness.short(one.figures["ratio"]) for one in measured[1:]}


def _variant(method: Method, sides: Sides, direction: str, ids: str) -> Variant:
    """Return a method as a variant whose ids are kept, or new in each call."""

    def call() -> object:
        return moved(method, sides, direction, ids)

    return suite.by_call(sides, direction, method.name, method.engine, call, ids=ids)


def _by_peer(peer: LMCache, sides: Sides, direction: str) -> Variant:
    """Return a peer's copy as a variant whose ids are kept, on the device."""
    call = by_peer(peer, sides, direction)
    return suite.by_call(sides, direction, peer.name, peer.name, call, ids=IDS[0], peer=peer.name)


def chosen_with(sides: Sides, direction: str, name: str, ids: str) -> dict[str, str]:
    """Return the fields of a row on the strategy that was chosen, if its method chooses one.

    New ids may have another strategy than kept ones, so one more copy with ids of the row's kind
    says which.
    """
    method = next((each for each in PAGE_METHODS if each.name == name), None)
    if method is None or method.engine != suite.CHOSEN:
        return {}
    transfer = moved(method, sides, direction, ids)
    transfer.synchronize()
    return method.taken(transfer)
