# SPDX-License-Identifier: Apache-2.0
"""Measure packing and unpacking inside a device, in turns with a plain gather, scatter and `copy_`
of the same rows.

`pack` and `unpack` are the prepared launch alone; the whole calls, which also check, and report the
blocks that do not fit, have rows of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from portakv import Index, KVView, copy_blocks
from portakv.copy.encodings import overflow_words
from portakv.plan.packing import PackPlan
from portakv.plan.plan import Move
from portakv.registry import choose
from portakv.registry.prepared import prepared
from portakv_benchmarks.encodings.suite import Case, EncodingBench, Memory, poison
from portakv_benchmarks.host.suite import MB
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Call, Rows, Step, Variant, short
from portakv_benchmarks.shared.shapes import in_words

#: The plain method for each method that packs or unpacks, and their direction.
PLAIN = {"pack": "gather", "pack, call": "gather", "unpack": "scatter", "unpack, call": "scatter"}
#: The payload on a CPU, where packing has no target.
ON_CPU = 8 * MB


def inside_steps(bench: EncodingBench) -> Iterator[Step]:
    """Yield a step for each case, with all payloads."""
    for case in bench.sizes.cases:
        yield f"inside the device: {case.name}", partial(_measure, bench, case)


def _measure(bench: EncodingBench, case: Case) -> Rows:
    payloads = bench.sizes.inside
    if bench.device.type == "cpu":
        payloads = (min(ON_CPU, payloads[0]),)
    largest = max(payloads)
    memory = Memory(case, largest, bench.device)
    dense = torch.empty(largest, dtype=torch.uint8, device=bench.device)
    packed = memory.blocks * case.planes * case.plane.slot_bytes
    slots = torch.empty(packed, dtype=torch.uint8, device=bench.device)
    rows: Rows = []
    for payload in payloads:
        blocks = payload // case.block_bytes
        if blocks:
            rows += _Sized(bench, memory, dense, slots, blocks).measure()
    return rows


def _called(src: KVView, dst: KVView, src_ids: Index | None, dst_ids: Index | None) -> Call:
    """Return the whole call of a copy."""
    return lambda i: copy_blocks(src, dst, src_ids, dst_ids)


def _numbered(call: Callable[[], object]) -> Call:
    """Return a call that takes the number of a memory object; there is one."""
    return lambda i: call()


class _Sized:
    """A case with a number of blocks, and its methods."""

    def __init__(
        self,
        bench: EncodingBench,
        memory: Memory,
        dense: torch.Tensor,
        slots: torch.Tensor,
        blocks: int,
    ) -> None:
        self._bench = bench
        self._memory = memory
        self._blocks = blocks
        case = memory.case
        self._dense = case.dense(blocks, dense)
        self._slots = slots
        self._index = memory.index(blocks)
        self._cache = case.view(memory.rows)
        self._target = case.view(memory.written)
        self._chunk = case.dense_view(self._dense)
        self._packed = case.slots(blocks, slots)

    def measure(self) -> Rows:
        """Return a row for each method."""
        bench = self._bench
        case = self._memory.case
        payload = self._blocks * case.block_bytes
        place = f"{case.name}, {in_words(payload)}"
        variants = harness.usable(self._variants(), place, bench.left_out)
        limits = 1, bench.sizes.rounds, bench.sizes.seconds
        results = harness.measure(self._plain_copy(), variants, bench.inside, *limits)
        times = {str(one.labels["backend"]): one.figures["p50_us"] for one in results}
        rows = []
        for one in results:
            name = str(one.labels["backend"])
            row = {
                "kind": "encoding_copy",
                "shape": case.name,
                **one.labels,
                "layout": case.layout,
                "code_bits": case.bits,
                "values": case.plane.values,
                "payload_bytes": payload,
                **one.row(payload),
            }
            if name in PLAIN:
                row["wire_bytes"] = self._blocks * case.planes * case.plane.slot_bytes
                row["payload_to_wire"] = short(case.plane.ratio)
            if PLAIN.get(name) in times:
                row["of_plain"] = short(times[PLAIN[name]] / one.figures["p50_us"])
            rows.append(row)
        return rows

    def _plain_copy(self) -> Variant:
        """Return `copy_` of the same bytes."""
        whole = self._memory.written.view(-1)[: self._dense.numel()]
        source = self._dense.view(-1)
        return Variant(
            {"backend": "copy_", "op": "copy_"},
            lambda i: whole.copy_(source),
            lambda i: poison(whole),
            lambda i: torch.equal(whole.view(torch.int16), source.view(torch.int16)),
        )

    def _variants(self) -> list[Variant]:
        """Return all methods but the ceiling. The dense rows and the slots are right at first, and
        after each method that was checked."""
        blocks = self._blocks
        memory = self._memory
        self._dense.view(torch.int16).copy_(memory.read(blocks))
        copy_blocks(self._cache, self._packed, self._index, None).synchronize()
        sides = {
            "gather": (self._cache, self._chunk, self._index, None),
            "scatter": (self._chunk, self._target, None, self._index),
            "pack, call": (self._cache, self._packed, self._index, None),
            "unpack, call": (self._packed, self._target, None, self._index),
        }
        calls: dict[str, Call] = {
            "pack": self._launch(*sides["pack, call"]),
            "unpack": self._launch(*sides["unpack, call"]),
            **{name: _called(*arguments) for name, arguments in sides.items()},
        }
        right: dict[str, Callable[[int], bool]] = {
            "gather": lambda i: torch.equal(self._dense.view(torch.int16), memory.read(blocks)),
            "pack": lambda i: self._slots_right(),
        }
        poisons = {"gather": partial(poison, self._dense), "pack": partial(poison, self._slots)}
        variants = []
        for name, call in calls.items():
            kind = name.removesuffix(", call")
            op = PLAIN.get(name, name)
            poisoned = poisons.get(kind, memory.poison)
            judged = right.get(kind, lambda i: memory.right(blocks))
            variants.append(Variant({"backend": name, "op": op}, call, _numbered(poisoned), judged))
        return variants

    def _slots_right(self) -> bool:
        """Return True if the slots are unpacked to the rows, every byte."""
        self._memory.poison()
        copy_blocks(self._packed, self._target, None, self._index).synchronize()
        return self._memory.right(self._blocks)

    def _launch(
        self, src: KVView, dst: KVView, src_ids: Index | None, dst_ids: Index | None
    ) -> Call:
        """Return the prepared launch of a copy, without what surrounds it in a call."""
        count = self._blocks * self._memory.case.tokens
        move = Move(src, dst, src_ids or Index(), dst_ids or Index(), count)
        choice = choose(self._bench.device, None)
        ready = prepared(src.form, dst.form, *move.steps, None, choice, PackPlan)
        placed = ready.place_both(move)
        overflow = overflow_words(move, ready.plan.unit, self._bench.device)
        return lambda i: ready.pack(placed, None, None, overflow)
