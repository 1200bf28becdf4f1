# SPDX-License-Identifier: Apache-2.0
"""Measure packed and raw copies between a device and pinned host memory, in turns with a memcpy of
the same payload, one direction or both at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from portakv import Index, KVView, copy_blocks
from portakv.errors import Unsupported
from portakv_benchmarks.encodings.suite import (
    Case,
    EncodingBench,
    Memory,
    host_memory,
    poison,
)
from portakv_benchmarks.host.cases import DIRECTIONS
from portakv_benchmarks.host.suite import MEMCPY, plain_copy
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Call, Measured, Row, Rows, Step, Variant, short
from portakv_benchmarks.shared.shapes import POISON, fill, in_words

BOTH = "both"
RAW = "raw"


def across_steps(bench: EncodingBench) -> Iterator[Step]:
    """Yield a step for each case, with all payloads and directions."""
    if bench.device.type == "cpu":
        raise Unsupported("Packed copies over a link", "the device is the CPU, without a link")
    for case in bench.sizes.linked:
        yield f"over the link: {case.name}", partial(_measure, bench, case)


def _measure(bench: EncodingBench, case: Case) -> Rows:
    largest = max(*bench.sizes.across, *(2 * payload for payload in bench.sizes.both))
    scene = Scene(bench, case, largest)
    rows: Rows = []
    for payload in bench.sizes.across:
        if blocks := payload // case.block_bytes:
            for direction in DIRECTIONS:
                rows += _rows(scene, blocks, direction)
    for payload in bench.sizes.both:
        if blocks := payload // case.block_bytes:
            rows += _rows(scene, blocks, BOTH)
    return rows


@dataclass(frozen=True, slots=True, eq=False)
class Host:
    """A pool of blocks on the host, raw or packed: bytes, and the view of all blocks."""

    name: str
    memory: torch.Tensor
    view: KVView


class Scene:
    """Rows of a device, and pools on the host for as many blocks.

    The host's blocks are in another random order than the device's, unless they are dense.
    """

    def __init__(self, bench: EncodingBench, case: Case, largest: int) -> None:
        self.bench = bench
        self.memory = Memory(case, largest, bench.device)
        self.case = case
        blocks = self.memory.blocks
        raw = host_memory(blocks * case.block_bytes)
        slots = host_memory(blocks * case.planes * case.plane.slot_bytes)
        self.raw = Host(RAW, raw, case.dense_view(case.dense(blocks, raw)))
        self.packed = Host("pack", slots, case.slots(blocks, slots))
        # What a plain copy moves.
        self.flat = host_memory(raw.numel())
        self.dense = torch.empty(raw.shape, dtype=torch.uint8, device=bench.device)
        fill(self.dense.view(torch.int64), 1)
        self.flat.copy_(self.dense)
        self.streams = [bench.stream() for _ in DIRECTIONS]
        self._host_order = case.block_order(blocks, 1)
        for host in (self.raw, self.packed):  # right blocks, also after each method
            self.call_of(host, "d2h", 0, blocks)().synchronize()

    @property
    def payload(self) -> int:
        """Return the raw bytes of all blocks."""
        return self.memory.blocks * self.case.block_bytes

    def ids(self, first: int, count: int) -> tuple[Index, Index]:
        """Return the blocks of the device and of the host from a position on."""
        step = self.case.tokens
        device = self.memory.order[first : first + count]
        return Index(device, step=step), Index(self._host_order[first : first + count], step=step)

    def call_of(
        self, host: Host, direction: str, first: int, count: int, **options: Any
    ) -> Callable[[], Any]:
        """Return a call that copies blocks under options."""
        device_ids, host_ids = self.ids(first, count)
        rows = self.memory.rows if direction == "d2h" else self.memory.written
        sides = [(self.case.view(rows), device_ids), (host.view, host_ids)]
        (src, src_ids), (dst, dst_ids) = sides if direction == "d2h" else sides[::-1]
        return lambda: copy_blocks(src, dst, src_ids, dst_ids, **options)

    def poison(self, host: Host, direction: str, first: int, count: int) -> None:
        """Overwrite the destinations of a copy."""
        self.bench.module.synchronize()
        if direction == "d2h":
            written = self._host_order[first : first + count]
            host.memory.view(self.memory.blocks, -1).index_fill_(0, written, POISON)
        else:
            self.memory.poison()
        self.bench.module.synchronize()

    def right(self, host: Host, direction: str, first: int, count: int) -> bool:
        """Return True if every byte of a copy arrived. The host's blocks are brought to the device
        by a plain copy, and unpacked there."""
        self.bench.module.synchronize()
        if direction == "d2h":
            self.memory.poison()
            there = self.dense[: host.memory.numel()].copy_(host.memory)
            blocks = self.memory.blocks
            if host is self.packed:
                view = self.case.slots(blocks, there)
            else:
                view = self.case.dense_view(self.case.dense(blocks, there))
            device_ids, host_ids = self.ids(first, count)
            copy_blocks(view, self.case.view(self.memory.written), host_ids, device_ids).wait()
            self.bench.module.synchronize()
        return self.memory.right(first + count, first)


def _rows(scene: Scene, blocks: int, op: str) -> Rows:
    """Return a row for each method of moving blocks in a direction, or in both."""
    bench = scene.bench
    case = scene.case
    directions = 2 if op == BOTH else 1
    payload = blocks * case.block_bytes
    make = _opposed if op == BOTH else _one_way
    known = [make(scene, host, op, blocks) for host in (scene.raw, scene.packed)]
    place = f"{case.name}, {in_words(payload)} {op}"
    good = harness.usable(known, place, bench.left_out)
    limits = 1, bench.sizes.rounds, bench.sizes.seconds
    results = harness.measure(memcpy_of(scene, op, payload), good, bench.timer, *limits)
    times = {str(one.labels["backend"]): one.figures["p50_us"] for one in results}
    return [_row(scene, one, op, payload, directions, times) for one in results]


def _row(
    scene: Scene, one: Measured, op: str, payload: int, directions: int, times: dict[str, float]
) -> Row:
    case = scene.case
    packed = one.labels["backend"] == scene.packed.name
    row: Row = {
        "kind": "encoding_link",
        "shape": case.name,
        **one.labels,
        "op": op,
        "code_bits": case.bits,
        "values": case.plane.values,
        "payload_bytes": payload,
        **one.row(directions * payload),
    }
    slots = payload // case.plane.raw_bytes
    row["wire_bytes"] = slots * case.plane.slot_bytes if packed else payload
    row["payload_to_wire"] = short(payload / row["wire_bytes"])
    if RAW in times:
        row["of_raw"] = short(times[RAW] / one.figures["p50_us"])
    return row


def _one_way(scene: Scene, host: Host, direction: str, blocks: int, first: int = 0) -> Variant:
    move = scene.call_of(host, direction, first, blocks)
    return Variant(
        {"backend": host.name},
        lambda i: move().wait(),
        lambda i: scene.poison(host, direction, first, blocks),
        lambda i: scene.right(host, direction, first, blocks),
    )


def _opposed(scene: Scene, host: Host, op: str, blocks: int) -> Variant:
    """Return both directions at the same time, as a variant: blocks out, and others in."""
    variants = [
        _one_way(scene, host, direction, blocks, at * blocks)
        for at, direction in enumerate(DIRECTIONS)
    ]

    def right(i: int) -> bool:  # the check of what went out overwrites what came in
        return all(variant.right(i) for variant in reversed(variants))

    def poison_all(i: int) -> None:
        for variant in variants:
            variant.poison(i)

    return Variant({"backend": host.name}, _together(scene, variants), poison_all, right)


def memcpy_of(scene: Scene, op: str, payload: int) -> Variant:
    """Return plain copies of as many bytes of payload, between dense memory and the host."""
    host = scene.flat
    device = scene.dense
    pairs = [(host[:payload], device[:payload]), (device[-payload:], host[-payload:])]
    variants = [_plain(scene, *pair) for pair in pairs]
    if op != BOTH:
        return variants[DIRECTIONS.index(op)]
    return Variant(
        {"backend": MEMCPY},
        _together(scene, variants),
        lambda i: [variant.poison(i) for variant in variants],
        lambda i: all(variant.right(i) for variant in variants),
    )


def _plain(scene: Scene, target: torch.Tensor, source: torch.Tensor) -> Variant:
    return Variant(
        {"backend": MEMCPY},
        lambda i: plain_copy(target, source),
        lambda i: poison(target),
        lambda i: _equal(scene, target, source),
    )


def _equal(scene: Scene, one: torch.Tensor, other: torch.Tensor) -> bool:
    scene.bench.module.synchronize()
    there = [x.to(scene.bench.device) for x in (one, other)]
    return torch.equal(*there)


def _together(scene: Scene, variants: Sequence[Variant]) -> Call:
    """Return a call of both directions, each on its own stream."""
    module = scene.bench.module

    def call(i: int) -> None:
        current = module.current_stream(scene.bench.device)
        for variant, stream in zip(variants, scene.streams, strict=True):
            stream.wait_stream(current)
            with module.stream(stream):
                variant.call(i)
        for stream in scene.streams:
            current.wait_stream(stream)

    return call
