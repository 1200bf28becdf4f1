# SPDX-License-Identifier: Apache-2.0
"""Measure detached packed and raw copies between a device and pinned host memory while a loop of
compute runs, as the benchmark of the host link measures its strategies: one direction, or both."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

from portakv.errors import Unsupported
from portakv_benchmarks.encodings.across import BOTH, RAW, Host, Scene, memcpy_of
from portakv_benchmarks.encodings.suite import Case, EncodingBench
from portakv_benchmarks.host.cases import DIRECTIONS
from portakv_benchmarks.host.interference import Meeting
from portakv_benchmarks.host.suite import Bench
from portakv_benchmarks.host.traffic_sources import DEFAULT, LOOPS, Traffic
from portakv_benchmarks.shared.harness import Rows, Step, Variant, having


def alongside_steps(bench: EncodingBench) -> Iterator[Step]:
    """Yield a step for each case, loop and direction, and for both directions together."""
    if bench.device.type == "cpu":
        raise Unsupported("Packed copies over a link", "the device is the CPU, without a link")
    for case, loop, direction in product(bench.sizes.linked[:1], LOOPS, (*DIRECTIONS, BOTH)):
        name = f"alongside {loop}, {direction}: {case.name}"
        yield name, partial(_measure, bench, case, loop, direction)


def _measure(bench: EncodingBench, case: Case, loop: str, direction: str) -> Rows:
    scene = Scene(bench, case, bench.sizes.alongside)
    blocks = scene.memory.blocks
    # Each direction moves half of the blocks if both do.
    shares = [(direction, 0, blocks)]
    if direction == BOTH:
        half = blocks // 2
        shares = [(one, at * half, half) for at, one in enumerate(DIRECTIONS)]
    each = shares[0][2] * case.block_bytes
    payload = each * len(shares)

    def make(_: Bench, op: str) -> Iterator[Traffic]:
        variants = [memcpy_of(scene, op, each)]
        variants += [_detached(scene, host, shares) for host in (scene.raw, scene.packed)]
        for variant in variants:
            yield Traffic(variant, payload, shape=case.name, op=op)

    meeting = Meeting(bench, loop, DEFAULT, direction, "packed rows, ")
    rows = meeting.rows(make, bench.preset.repeats, judged=_Every())
    compare_with_raw(rows)
    return [{**row, "kind": "encoding_alongside"} for row in rows]


def compare_with_raw(rows: Rows) -> None:
    """Write ``over_raw`` to packed rows: the points of slow-down beyond that of raw copies."""
    for raw in having(rows, backend=f"{RAW}, detached"):
        for packed in having(rows, backend="pack, detached"):
            packed["over_raw"] = round(packed["slowdown_pct"] - raw["slowdown_pct"], 2)


class _Every:
    """Contains every method: all are repeated equally often."""

    def __contains__(self, name: object) -> bool:
        return True


class _Together:
    """The end of several copies."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def done(self) -> bool:
        """Return whether all copies have ended."""
        return all(handle.done() for handle in self._handles)


def _detached(scene: Scene, host: Host, shares: list[tuple[str, int, int]]) -> Variant:
    """Return detached copies whose handle reports the end of all.

    Args:
        shares: direction, first block and number of blocks of each copy.
    """
    moves = [scene.call_of(host, *share, detached=True) for share in shares]

    def poison(_: int) -> None:
        for share in shares:
            scene.poison(host, *share)

    def right(_: int) -> bool:  # the check of what went out overwrites what came in
        return all(scene.right(host, *share) for share in reversed(shares))

    return Variant(
        {"backend": f"{host.name}, detached"},
        lambda i: _Together([move() for move in moves]),
        poison,
        right,
    )
