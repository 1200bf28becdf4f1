# SPDX-License-Identifier: Apache-2.0
"""Pageable host memory, against the best that plain copies through a pinned ring reach.

The ring is written here without any of PortaKV's engines: slots of pinned memory, the device's
memcpy between one end and a slot, and the host's own copy by several threads between the slot and
pageable memory. Its best configuration, and torch's own copy of pageable memory, set the mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from portakv.host import pinned
from portakv_benchmarks.host.cases import BLOCK_FIRST, DIRECTIONS, Case, Sides, cases, scene
from portakv_benchmarks.host.suite import HOST, KB, Bench, Way, by_engine, by_memcpy
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Rows, Step
from portakv_benchmarks.shared.shapes import in_words

RING = "plain ring"
TORCH = "torch, pageable"


class PlainRing:
    """A pinned ring for copies between dense memory of a device and of the host."""

    def __init__(self, device: torch.device, slots: int, nbytes: int) -> None:
        self._words = nbytes // 8
        self._slots = [
            (pinned.empty(self._words, torch.int64), torch.Event(device)) for _ in range(slots)
        ]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy int64 words; the host waits for the end of what it reads or writes itself."""
        down, ahead = source.device.type != "cpu", len(self._slots)
        pieces = list(zip(target.split(self._words), source.split(self._words), strict=True))
        for n in range(len(pieces) + ahead):
            slot, event = self._slots[n % ahead]
            if 0 <= n - ahead < len(pieces):  # what the slot held before
                event.synchronize()
                if down:
                    into = pieces[n - ahead][0]
                    into.copy_(slot[: into.numel()])
            if n < len(pieces):
                into, words = pieces[n]
                part = slot[: words.numel()].copy_(words, non_blocking=down)
                if not down:
                    into.copy_(part, non_blocking=True)
                event.record()


def pageable_steps(bench: Bench) -> Iterator[Step]:
    """A step for each case."""
    scenes = (scene(256), scene(2 * KB), scene(32 * KB, BLOCK_FIRST, "random"))
    for case in cases(scenes, bench.preset.pageable):
        yield f"pageable: {case.name}", partial(_measure, bench, case)


def _measure(bench: Bench, case: Case) -> Rows:
    sides = Sides(case, bench.region(max(bench.preset.pageable), pageable=True))
    copies: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {TORCH: torch.Tensor.copy_}
    for slots, nbytes in bench.preset.ring_slots:
        ring = PlainRing(bench.device, slots, nbytes)
        copies[f"{RING}, {slots} x {in_words(nbytes)}"] = ring.copy
    rows: Rows = []
    for direction in DIRECTIONS:
        sides.fill(direction)
        torchs, *rings = (
            by_memcpy(sides, direction, name, copy, plain=True) for name, copy in copies.items()
        )
        ways = bench.serving((Way("ring", "ring"), HOST))
        known = [by_engine(way, sides, direction) for way in ways]
        good = harness.usable(known, f"pageable: {case.name}", bench.left_out)
        chosen = HOST.name in (variant.labels["backend"] for variant in good)
        told = {HOST.name: HOST.taken(HOST.move(sides, direction))} if chosen else {}
        bench.module.synchronize()
        for one in bench.measure(torchs, [*rings, *good], case.payload, bench.wall):
            rows.append({
                "kind": "host_pageable", "shape": case.name, "plain": False, **one.labels,
                **told.get(one.labels["backend"], {}),
                "run_bytes": case.scene.run, "payload_bytes": case.payload,
                **one.row(case.payload), "timer": bench.wall.name,
            })  # fmt: skip
    compare(rows)
    return rows


def compare(rows: Rows) -> None:
    """Write into the rows of engines ``to_ring``, the time of the best plain way / their own, and
    which one that is."""
    for point in harness.grouped(rows, "shape", "op"):
        best = harness.quickest(row for row in point if row["plain"])
        for row in point:
            if best is not None and not row["plain"]:
                row["to_ring"] = harness.short(best["p50_us"] / row["p50_us"])
                row["best_ring"] = best["backend"]
