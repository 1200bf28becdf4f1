# SPDX-License-Identifier: Apache-2.0
"""Copies that pack or unpack, and the bytes of every storage after them. The addresses of rows and
of slots come from the layout language's definition, and the bytes of slots from the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from portakv import KVView, PackOverflow, Transfer, Unsupported, copy_blocks
from portakv.layout.encodings import Pack
from portakv.plan.packing import PackPlan
from portakv_conformance.draw.arrangement import Keywords, Side
from portakv_conformance.judge.judging import Judge, view_of
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.rows import Rows
from portakv_conformance.judge.slots import packed_slot, unpacked_values

#: Return the bf16 bits of a plane of so many values, by the number of the plane.
Values = Callable[[int, int], np.ndarray]


@dataclass
class PackedCase:
    """A copy of blocks between a raw side and a packed side.

    Attributes:
        raw: the raw side, of bf16.
        packed: the slots as rows of one token each, of uint8.
        layout: the layout of the packed side as a user writes it.
        slots: the sizes of the slots of each kv: a `SlotShape`, or that of another encoding.
        block_size: tokens of a block.
        raw_blocks, packed_blocks: the numbers of the blocks on each side; negative ones are
            skipped. None: consecutive blocks.
        packs: True from raw to packed.
        count: blocks.
    """

    raw: Side
    packed: Side
    layout: str
    slots: tuple[Any, ...]
    block_size: int
    raw_blocks: torch.Tensor | None
    packed_blocks: torch.Tensor | None
    packs: bool
    count: int

    @property
    def sides(self) -> tuple[Side, Side]:
        """Return source and destination."""
        return (self.raw, self.packed) if self.packs else (self.packed, self.raw)

    def views(self) -> tuple[KVView, KVView]:
        """Return the views of source and destination."""
        raw = view_of(self.raw)
        packed = self.packed_view(self.packed)
        return (raw, packed) if self.packs else (packed, raw)

    def packed_view(self, side: Side) -> KVView:
        """Return the view of a packed side."""
        one = {(shape.code_bits, shape.slot_bytes) for shape in self.slots}
        bits = self.slots[0].code_bits
        pack = Pack(bits, self.slots[0].slot_bytes if len(one) == 1 else None)
        dims = [shape.values // self.block_size for shape in self.slots]
        extents: Keywords = {"kv": len(dims), "dim": dims, "block_size": self.block_size}
        extents |= {"layers": side.layers, "heads": side.heads}
        return KVView(side.tensors, self.layout, encoding=pack, **extents)

    def blocks(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the blocks of source and destination."""
        pair = self.raw_blocks, self.packed_blocks
        return pair if self.packs else pair[::-1]

    def why_declined(self, judge: Judge) -> str | None:
        """Return the reason by which the backend declines the plan of the copy, or None."""
        src, dst = self.views()
        steps = [0 if blocks is None else self.block_size for blocks in self.blocks()]
        plan = PackPlan(src.form, dst.form, *steps)
        backend = judge.subject.backend
        decision = backend.check_pack(plan)
        if not decision.accepted:
            return decision.reason
        try:
            backend.prepare_pack(plan)
        except Unsupported as error:
            return str(error)
        return None

    def fill(self, values: Values) -> None:
        """Write values into all planes of the source, packed if that side is."""
        side = self.sides[0]
        rows = Rows(side.tensors, side.layout, side.extents)
        memory = Memory.snapshot(side.tensors)
        size = self.block_size if self.packs else 1
        number = 0
        for block in range(rows.slots // size):
            for layer, kv, head in self._planes(rows):
                made = values(number, self.slots[kv].values)
                number += 1
                addresses = self._addresses(rows, block, layer, kv, head, size)
                if self.packs:
                    content = made.view(np.uint8).reshape(addresses.shape)
                else:
                    content = self.slot_of(made, kv).reshape(addresses.shape)
                memory.write(addresses, content)
        memory.restore(guard.whole for guard in side.guards)
        side.arrangement = None  # these bytes come from no seed

    def _planes(self, rows: Rows) -> Iterator[tuple[int, int, int]]:
        for layer in range(rows.layers):
            for kv in range(rows.kv):
                for head in range(rows.heads):
                    yield layer, kv, head

    def _addresses(
        self, rows: Rows, block: int, layer: int, kv: int, head: int, size: int
    ) -> np.ndarray:
        """Return the addresses of the bytes of a plane, or of its slot if ``size`` is 1."""
        slots = np.arange(block * size, (block + 1) * size)
        return rows.row_addresses(kv, layer, slots)[:, head]

    def expected(self) -> Outcome:
        """Return the memory after the copy, and the positions of the blocks that do not fit."""
        raw = Rows(self.raw.tensors, self.raw.layout, self.raw.extents)
        packed = Rows(self.packed.tensors, self.packed.layout, self.packed.extents)
        src, dst = self.sides
        before = Memory.snapshot(dst.tensors)
        outcome = Outcome(Memory.snapshot(src.tensors), before, before.copy(), set())
        raw_blocks = _listed(self.raw_blocks, self.count)
        packed_blocks = _listed(self.packed_blocks, self.count)
        for position, pair in enumerate(zip(raw_blocks, packed_blocks, strict=True)):
            if min(pair) < 0:
                continue
            for layer, kv, head in self._planes(raw):
                plane = self._addresses(raw, pair[0], layer, kv, head, self.block_size)
                slot = self._addresses(packed, pair[1], layer, kv, head, 1)
                if not self.moved(outcome, plane, slot, kv):
                    outcome.refused.add(position)
        return outcome

    def slot_of(self, values: np.ndarray, kv: int) -> np.ndarray:
        """Return the slot of a plane of one kv, from the bits of its values."""
        return packed_slot(values, self.slots[kv])[0]

    def moved(self, outcome: Outcome, plane: np.ndarray, slot: np.ndarray, kv: int) -> bool:
        """Pack or unpack one plane in the expectation; return False if it does not fit."""
        shape = self.slots[kv]
        if self.packs:
            values = outcome.source.read(plane).reshape(-1).view(np.uint16)
            made, over = packed_slot(values, shape)
            outcome.after.write(slot, made.reshape(slot.shape))
            return not over
        read = unpacked_values(outcome.source.read(slot).reshape(-1), shape)
        if read is None:
            return False
        outcome.after.write(plane, read.view(np.uint8).reshape(plane.shape))
        return True


@dataclass
class Outcome:
    """A copy as it must turn out: the source and the destination before it, the destination after
    it, and the positions of the blocks that do not fit."""

    source: Memory
    before: Memory
    after: Memory
    refused: set[int]

    def fault(self, case: PackedCase) -> str:
        """Return a sentence on the first wrong byte of either side; empty if all are right."""
        src, dst = case.sides
        for name, memory, tensors in (
            ("destination", self.after, dst.tensors),
            ("source", self.source, src.tensors),
        ):
            actual = Memory.snapshot(tensors)
            for number, changed in memory.changes(actual):
                here = changed[:1]
                where = int(here[0]) - memory.regions[number].base
                return (
                    f"The {name} holds 0x{int(actual.read(here)[0]):02x} at byte {where} of "
                    f"storage {number}, expected 0x{int(memory.read(here)[0]):02x}. {changed.size} "
                    f"bytes of that storage are wrong."
                )
        return ""


def _listed(blocks: torch.Tensor | None, count: int) -> list[int]:
    return list(range(count)) if blocks is None else [int(block) for block in blocks.cpu()]


def start_packed(judge: Judge, case: PackedCase) -> Transfer:
    """Begin a case as a user gets it, by the judged backend."""
    src, dst = case.views()
    tokens = case.count * case.block_size
    return copy_blocks(src, dst, *case.blocks(), count=tokens, backend=judge.subject.name)


def judge_packed(judge: Judge, case: PackedCase) -> bool:
    """Judge every byte of a copy that packs or unpacks, and the blocks that it reports.

    Returns False if the backend declines the plan, as it may; no byte may have changed then.
    """
    expected = case.expected()
    reported: tuple[int, ...] = ()
    refused: Unsupported | None = None
    try:
        start_packed(judge, case).synchronize()
    except PackOverflow as error:
        reported = error.src_blocks
    except Unsupported as error:
        refused = error
    if refused is not None:
        judge.facility.synchronize()
        expected.after = expected.before
        fault = expected.fault(case)
        assert not fault, f"The copy was refused as Unsupported, but: {fault} {refused}"
        why = case.why_declined(judge)
        assert why is not None, (
            f"The backend's check and prepare take the plans of this copy, and the copy raised "
            f"Unsupported: {refused}"
        )
        judge.declined.append(why)
        return False
    judge.facility.synchronize()
    fault = expected.fault(case)
    assert not fault, f"{fault} The case was {case!r}."
    listed = _listed(case.blocks()[0], case.count)
    wanted = tuple(listed[position] for position in sorted(expected.refused))
    assert reported == wanted, (
        f"The copy reports that blocks {list(reported)} of the source do not fit, expected "
        f"{list(wanted)}. The case was {case!r}."
    )
    judge.examples += 1
    return True
