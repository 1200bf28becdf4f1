# SPDX-License-Identifier: Apache-2.0
"""Host memory: copies to and from pageable memory, and what pinning takes.

Copies of pageable memory are held against the best that plain copies through a pinned ring reach.
The ring uses none of PortaKV's strategies, but the device's memcpy between one end and pinned
slots, and the host's own copy by several threads between these and pageable memory. Its best
configuration, and torch's own copy of pageable memory, set the mark.

Pinning gigabytes is held against torch's. The machine's memory is touched once and freed first: a
virtual machine may get its pages from its host only then. What is taken is what the process has
more of resident by the kernel's account; of torch's, which the driver may keep elsewhere, what its
own statistics say.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from portakv.host import pinned
from portakv_benchmarks.host.cases import BLOCK_FIRST, DIRECTIONS, Case, Sides, cases, scene
from portakv_benchmarks.host.suite import HOST, KB, Bench, Method, by_engine, by_memcpy
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Row, Rows, Step, short
from portakv_benchmarks.shared.shapes import in_words

RING = "plain ring"
PAGEABLE = "torch, pageable"


class PlainRing:
    """A pinned ring for copies between dense memory of a device and of the host."""

    def __init__(self, device: torch.device, slots: int, nbytes: int) -> None:
        self._words = nbytes // 8
        self._slots = [
            (pinned.empty(self._words, torch.int64), torch.Event(device)) for _ in range(slots)
        ]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy int64 words; the host waits for the end of what it reads or writes itself."""
        down = source.device.type != "cpu"
        ahead = len(self._slots)
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
    """Yield a step for each case."""
    scenes = (scene(256), scene(2 * KB), scene(32 * KB, BLOCK_FIRST, "random"))
    for case in cases(scenes, bench.preset.pageable):
        yield f"pageable: {case.name}", partial(_pageable, bench, case)


def _pageable(bench: Bench, case: Case) -> Rows:
    sides = Sides(case, bench.region(max(bench.preset.pageable), pageable=True))
    copies: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
        PAGEABLE: torch.Tensor.copy_
    }
    for slots, nbytes in bench.preset.ring_slots:
        ring = PlainRing(bench.device, slots, nbytes)
        copies[f"{RING}, {slots} x {in_words(nbytes)}"] = ring.copy
    rows: Rows = []
    for direction in DIRECTIONS:
        sides.fill(direction)
        torchs, *rings = (
            by_memcpy(sides, direction, name, copy, plain=True) for name, copy in copies.items()
        )
        methods = bench.serving((Method("pageable", "pageable"), HOST))
        known = [by_engine(method, sides, direction) for method in methods]
        good = harness.usable(known, f"pageable: {case.name}", bench.left_out)
        chosen = HOST.name in (variant.labels["backend"] for variant in good)
        fields = {HOST.name: HOST.taken(HOST.move(sides, direction))} if chosen else {}
        bench.module.synchronize()
        for one in bench.measure(torchs, [*rings, *good], case.payload, bench.host_timer):
            rows.append(
                {
                    "kind": "host_pageable",
                    "shape": case.name,
                    "plain": False,
                    **one.labels,
                    **fields.get(one.labels["backend"], {}),
                    "run_bytes": case.scene.run,
                    "payload_bytes": case.payload,
                    **one.row(case.payload),
                    "timer": bench.host_timer.name,
                }
            )
    compare(rows)
    return rows


def compare(rows: Rows) -> None:
    """Write ``to_ring`` and ``best_ring`` into the rows of strategies.

    ``to_ring`` is the time of the fastest plain method / that of the strategy; ``best_ring`` names
    this method.
    """
    for point in harness.grouped(rows, "shape", "op"):
        if best := harness.quickest(harness.having(point, plain=True)):
            for row in harness.having(point, plain=False):
                row["to_ring"] = short(best["p50_us"] / row["p50_us"])
                row["best_ring"] = best["backend"]


# --- pinning --------------------------------------------------------------------------------------

OURS = "pinned.allocate"
TORCH = "torch, pin_memory=True"

#: Memory; what holds it; the bytes that its allocator says it took, None: ask the kernel.
Taken = tuple[torch.Tensor, object, int | None]


def pinning_steps(bench: Bench) -> Iterator[Step]:
    """Yield the one step."""
    yield f"pinning {in_words(bench.preset.pinned)}", partial(_pinning, bench, bench.preset.pinned)


def _pinning(bench: Bench, nbytes: int) -> Rows:
    bench.forget()
    gc.collect()
    _empty_torch()
    # Have the machine give as much as the greedier of the two takes, a power of two, and free it.
    torch.empty((1 << (nbytes - 1).bit_length()) // 8, dtype=torch.int64).fill_(1)
    rows = [_pinned_by(OURS, nbytes, _ours), _pinned_by(TORCH, nbytes, _torch)]
    _empty_torch()
    for row in rows:
        row["to_torch"] = short(row["seconds"] / rows[1]["seconds"])
    return rows


def _pinned_by(name: str, nbytes: int, take: Callable[[int], Taken]) -> Row:
    before = resident()
    began = perf_counter()
    tensor, tensors, message = take(nbytes)
    seconds = perf_counter() - began
    grown = resident() - before
    taken = grown if message is None else message
    # Another byte than 0 at both ends and in between.
    some = tensor[:: max(1, nbytes // 1000)].fill_(0x5A)
    right = tensor.numel() == nbytes and bool((some == 0x5A).all())
    pinned_all = bool(tensor[:1].is_pinned() and tensor[-1:].is_pinned())
    del some
    began = perf_counter()
    del tensor, tensors
    gc.collect()
    freed = perf_counter() - began
    return {
        "kind": "host_pinning",
        "shape": in_words(nbytes),
        "backend": name,
        "payload_bytes": nbytes,
        "seconds": short(seconds),
        "free_seconds": short(freed),
        "gib_per_s": short(nbytes / seconds / (1 << 30)),
        "taken_bytes": taken,
        "excess_mb": short(abs(taken - nbytes) / 1e6),
        "resident_bytes": grown,
        "pinned": pinned_all,
        "verified": right,
    }


def _ours(nbytes: int) -> Taken:
    memory = pinned.allocate(nbytes)
    return memory.tensor, memory, None


def _torch(nbytes: int) -> Taken:
    before = _torch_has()
    memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return memory, None, None if before is None else (_torch_has() or 0) - before


def _torch_has() -> int | None:
    """Return the pinned bytes that torch reports; None if it does not report them."""
    if not (hasattr(torch.cuda, "host_memory_stats") and torch.cuda.is_available()):
        return None
    stats = torch.cuda.host_memory_stats()
    return int(stats.get("allocated_bytes.current", stats.get("allocated_bytes.allocated", 0)))


def _empty_torch() -> None:
    """Release the pinned memory that torch keeps for later."""
    if torch.cuda.is_available() and hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()


def resident() -> int:
    """Return the bytes that the process has in memory, by the kernel's account."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(r"^VmRSS:\s*(\d+) kB$", status, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0
