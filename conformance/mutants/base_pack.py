# SPDX-License-Identifier: Apache-2.0
"""The base of the mutants that pack: the kernel of `HostRows`, which also packs and unpacks, one
method for each step of a plane. Un-mutated it passes the suite."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from portakv.backends.base import Decision, PackLaunch
from portakv.layout import encodings
from portakv.layout.encodings import PackedPlane
from portakv.plan.packing import PackNest, PackPlan
from portakv.view.form import Steps
from portakv_conformance.mutants.base import Call, HostRows, Int64, Values, load, store


@dataclass(frozen=True)
class PackCall(Call):
    """The arguments of one launch that packs or unpacks."""

    plan: PackPlan  # type: ignore[assignment]  # it has the unit of a plan of rows
    overflow: torch.Tensor


class PackRows(HostRows, encodings=frozenset({encodings.PACK})):
    """Rows packed and unpacked on the host as a kernel does it, plane by plane."""

    def check_pack(self, plan: PackPlan) -> Decision:
        decision = super().check_pack(plan)
        if decision.accepted and any(step.table for nest in plan.nests for step in nest.tokens):
            return Decision(self.name, False, "the tokens of a block lie in several tensors")
        return decision

    def prepare_pack(self, plan: PackPlan) -> PackLaunch:
        return lambda *supplied: self.carry_pack(PackCall(plan, *supplied))

    # The steps of a launch

    def carry_pack(self, call: PackCall) -> None:
        """Carry out one launch from beginning to end."""
        plan = call.plan
        units = self.units(call)
        src, dst = (self.numbers(at, units, plan.unit) for at in (call.src_index, call.dst_index))
        bad = self.bad(src, dst, call)
        if bad.any() and call.status is not None:
            call.status[0] = self.status_of(np.flatnonzero(bad), call)
        moved = np.flatnonzero(self.moved(src, dst) & ~bad)
        for nest in plan.nests:
            own = self.offsets(nest, "src", src[moved], call.src_index, plan.unit)  # type: ignore[arg-type]
            other = self.offsets(nest, "dst", dst[moved], call.dst_index, plan.unit)  # type: ignore[arg-type]
            here = self.address(call.src, *own)
            there = self.address(call.dst, *other)
            planes = len(here) // max(len(moved), 1)
            execute = self.pack_planes if plan.packs else self.unpack_planes
            flags = execute(here, there, nest, call)
            for at in np.flatnonzero(flags):
                self.report(int(moved[at // planes]), call)

    def report(self, block: int, call: PackCall) -> None:
        """Report a block that does not fit."""
        call.overflow[block] = 1

    def pack_planes(self, src: Int64, dst: Int64, nest: PackNest, call: PackCall) -> list[bool]:
        """Pack planes at addresses into slots; return for each True if it does not fit."""
        flags = []
        rows = _rows_of(nest)
        for here, there in zip(src, dst, strict=True):
            values = load(call.src, here + rows, nest.dim[-1].extent, 1)
            slot, over = self.pack_slot(values.reshape(-1).view(np.uint16), nest.plane, call)
            store(call.dst, np.array([there]), slot[None])
            flags.append(over)
        return flags

    def unpack_planes(self, src: Int64, dst: Int64, nest: PackNest, call: PackCall) -> list[bool]:
        """Unpack slots to planes at addresses; return for each True if its slot is flagged."""
        flags = []
        rows = _rows_of(nest)
        for here, there in zip(src, dst, strict=True):
            slot = load(call.src, np.array([here]), nest.plane.slot_bytes, 1)[0]
            flagged = self.flagged(slot, nest.plane)
            if not flagged:
                values = self.unpack_slot(slot, nest.plane)
                store(call.dst, there + rows, values.view(np.uint8).reshape(len(rows), -1))
            flags.append(bool(slot[nest.plane.head_at + encodings.FLAG_AT]))
        return flags

    # The steps of a plane

    def pack_slot(self, values: Values, plane: PackedPlane, call: PackCall) -> tuple[Values, bool]:
        """Return the slot of a plane, and True if its escapes do not fit."""
        exponents = values >> 7 & 0xFF
        table = self.exponent_table(exponents, plane, call)
        codes = np.full(256, plane.table_entries, dtype=np.uint8)
        codes[table] = np.arange(len(table))
        codes = codes[exponents]
        escaped = np.flatnonzero(codes == plane.table_entries)
        slot = self.blank(plane)
        if not self.fits(len(escaped), plane):
            slot[:] = 0
            slot[plane.head_at + encodings.FLAG_AT] = encodings.OVERFLOW
            return slot, True
        slot[: plane.codes_at] = self.places(values)
        slot[plane.codes_at : plane.head_at] = self.join(codes, plane.code_bits)
        head = slot[plane.head_at : plane.escapes_at]
        head[: len(table)] = table
        numbers = [len(escaped), *self.before_segments(escaped, plane)]
        at = encodings.TOTAL_AT
        head[at : at + 2 * len(numbers)] = np.array(numbers, dtype="<u2").view(np.uint8)
        stored = self.escapes(exponents[escaped])[: plane.most_escapes]
        slot[plane.escapes_at : plane.escapes_at + len(stored)] = stored
        return slot, False

    def blank(self, plane: PackedPlane) -> Values:
        """Return the bytes that a slot has before anything is written."""
        return np.zeros(plane.slot_bytes, dtype=np.uint8)

    def fits(self, escapes: int, plane: PackedPlane) -> bool:
        """Return True if so many escapes fit into a slot."""
        return escapes <= plane.most_escapes

    def exponent_table(self, exponents: Values, plane: PackedPlane, call: PackCall) -> Values:
        """Return the exponents that have codes."""
        counts = np.bincount(self.counted(exponents, plane), minlength=256)
        order = self.order(counts)
        return order[counts[order] > 0][: plane.table_entries]

    def counted(self, exponents: Values, plane: PackedPlane) -> Values:
        """Return the exponents that count for the table."""
        if plane.sample == 1:
            return exponents
        q = np.arange(plane.values // encodings.VECTOR)
        return np.asarray(exponents[q * encodings.VECTOR + (q + q // 16) % encodings.VECTOR])

    def order(self, counts: Int64) -> Int64:
        """Return all exponents by falling frequency, of equally frequent ones the larger first."""
        return np.argsort(counts * 256 + np.arange(256))[::-1]

    def places(self, values: Values) -> Values:
        """Return sign and mantissa of each value in a byte."""
        return np.asarray((values >> 8 & 0x80) | (values & 0x7F))

    def join(self, codes: Values, code_bits: int) -> Values:
        """Return codes in bytes, the lowest bits first."""
        bits = codes[:, None] >> np.arange(code_bits, dtype=np.uint8) & 1
        return np.packbits(bits.reshape(-1), bitorder="little")

    def before_segments(self, escaped: Int64, plane: PackedPlane) -> list[int]:
        """Return the number of escapes before each segment except the first."""
        firsts = range(encodings.SEGMENT, plane.values, encodings.SEGMENT)
        return [int((escaped < first).sum()) for first in firsts]

    def escapes(self, exponents: Values) -> Values:
        """Return the bytes of the escapes, from the exponents of escaped values in their order."""
        return exponents

    def flagged(self, slot: Values, plane: PackedPlane) -> bool:
        """Return True if a slot is not to be unpacked."""
        return bool(slot[plane.head_at + encodings.FLAG_AT])

    def unpack_slot(self, slot: Values, plane: PackedPlane) -> Values:
        """Return the bf16 bits of a slot."""
        bits = np.unpackbits(slot[plane.codes_at : plane.head_at], bitorder="little")
        codes = bits.reshape(-1, plane.code_bits) @ (1 << np.arange(plane.code_bits))
        exponents = slot[plane.head_at + np.minimum(codes, encodings.TABLE_BYTES - 1)]
        escaped = np.flatnonzero(codes == plane.table_entries)
        exponents[escaped] = self.stored(slot, plane, len(escaped))
        byte = slot[: plane.codes_at].astype(np.uint16)
        bits = (byte & 0x80) << 8 | exponents.astype(np.uint16) << 7 | byte & 0x7F
        return np.asarray(bits)

    def stored(self, slot: Values, plane: PackedPlane, count: int) -> Values:
        """Return the exponents of so many escaped values, in the order of the values."""
        return np.asarray(slot[plane.escapes_at : plane.escapes_at + count])


def _rows_of(nest: PackNest) -> Int64:
    """Return the bytes from the start of a plane to each of its runs, in order."""
    return _walk(nest.tokens, _walk(nest.dim[:-1], np.zeros(1, dtype=np.int64)))


def _walk(steps: Steps, inner: Int64) -> Int64:
    for step in reversed(steps):
        inner = np.add.outer(np.arange(step.extent) * step.stride, inner).reshape(-1)
    return inner
