# SPDX-License-Identifier: Apache-2.0
"""Measure detached packed and raw copies between a device and pinned host memory while a loop of
compute runs, as the benchmark of the host link measures its strategies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from portakv.errors import Unsupported
from portakv_benchmarks.encodings.across import Host, Scene, memcpy_of
from portakv_benchmarks.encodings.suite import Case, EncodingBench
from portakv_benchmarks.host.cases import DIRECTIONS
from portakv_benchmarks.host.interference import Meeting
from portakv_benchmarks.host.suite import Bench
from portakv_benchmarks.host.traffic_sources import DEFAULT, LOOPS, Traffic
from portakv_benchmarks.shared.harness import Rows, Step, Variant


def alongside_steps(bench: EncodingBench) -> Iterator[Step]:
    """Yield a step for each case, loop and direction."""
    if bench.device.type == "cpu":
        raise Unsupported("Packed copies over a link", "the device is the CPU, without a link")
    for case, loop, direction in product(bench.sizes.linked[:1], LOOPS, DIRECTIONS):
        name = f"alongside {loop}, {direction}: {case.name}"
        yield name, partial(_measure, bench, case, loop, direction)


def _measure(bench: EncodingBench, case: Case, loop: str, direction: str) -> Rows:
    scene = Scene(bench, case, bench.sizes.alongside)

    def make(_: Bench, op: str) -> Iterator[Traffic]:
        variants = [memcpy_of(scene, op, scene.payload)]
        variants += [_detached(scene, host, op) for host in (scene.raw, scene.packed)]
        for variant in variants:
            yield Traffic(variant, scene.payload, shape=case.name, op=op)

    meeting = Meeting(bench, loop, DEFAULT, direction, "packed rows, ")
    rows = meeting.rows(make, bench.preset.repeats, judged=_Every())
    return [{**row, "kind": "encoding_alongside"} for row in rows]


class _Every:
    """Contains every method: all are repeated equally often."""

    def __contains__(self, name: object) -> bool:
        return True


def _detached(scene: Scene, host: Host, direction: str) -> Variant:
    """Return detached copies of all blocks, whose handle reports the end."""
    blocks = scene.memory.blocks
    move = scene.call_of(host, direction, 0, blocks, detached=True)
    return Variant(
        {"backend": f"{host.name}, detached"},
        lambda i: move(),
        lambda i: scene.poison(host, direction, 0, blocks),
        lambda i: scene.right(host, direction, 0, blocks),
    )
