# SPDX-License-Identifier: Apache-2.0
"""`reference` packs and unpacks by operations of torch: rows to dense planes, planes to slots, and
slots to their places.

The copies to and from dense memory are those of rows, so that every layout works on the raw side.
`portakv.layout.packing` describes the format. All arithmetic is of integers, so that every bit
pattern survives and equal values give equal bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from portakv.backends.strided import Copies, Ops
from portakv.layout.packing import (
    COUNTS_AT,
    FLAG_AT,
    OVERFLOW,
    PACKED,
    SEGMENT,
    TOTAL_AT,
    VECTOR,
    PackedPlane,
    sampled,
)
from portakv.plan.packing import PackPlan
from portakv.plan.plan import Move
from portakv.runtime.devices import inside
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView, dense_blocks

#: The most values that are packed together, which bounds the temporary memory.
MOST_VALUES = 4 << 20
_EXPONENTS = 256


class ReferencePack:
    """The launch of a plan that packs or unpacks; see `base.PackLaunch`."""

    tables = False, False

    def __init__(self, plan: PackPlan, device: torch.device, ops: Ops) -> None:
        self._plan = plan
        self._device = device
        self._ops = ops
        raw = plan.raw
        self._planes = plan.packed.encoding
        values = raw.layers * raw.heads * sum(plane.values for plane in self._planes)
        self._most_blocks = max(1, MOST_VALUES // values)

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
        overflow: torch.Tensor,
    ) -> None:
        """See `base.PackLaunch`. Ids must be clean; ``status`` is not written."""
        move = Move(src, dst, src_index, dst_index, count)
        unit = self._plan.unit
        execute = self._pack if self._plan.packs else self._unpack
        with inside(self._device if stream is None else stream):
            for first in range(0, count // unit, self._most_blocks):
                blocks = min(self._most_blocks, count // unit - first)
                flags = execute(move.part(first * unit, blocks * unit), blocks)
                overflow[first : first + blocks] |= flags.to(torch.int32)

    def _pack(self, move: Move, blocks: int) -> torch.Tensor:
        """Pack blocks; return for each True if a plane overflowed."""
        rows = self._dense(self._plan.raw, blocks)
        slots = self._dense(self._plan.packed, blocks)
        self._copy(Move(move.src, rows, move.src_index, Index(), move.count))
        flags = []
        for plane, values, packed in zip(self._planes, rows.tensors, slots.tensors, strict=True):
            made = pack_planes(values.view(torch.int16).view(-1, plane.values), plane)
            packed.view(-1, plane.slot_bytes).copy_(made.slots)
            flags.append(made.overflow.view(blocks, -1).any(1))
        dst_index = move.dst_index.of_blocks(self._plan.unit)
        self._copy(Move(slots.as_slots(), move.dst.as_slots(), Index(), dst_index, blocks))
        return torch.stack(flags).any(0)

    def _unpack(self, move: Move, blocks: int) -> torch.Tensor:
        """Unpack blocks; return for each True if a slot has the flag of a plane that did not
        fit."""
        rows = self._dense(self._plan.raw, blocks)
        slots = self._dense(self._plan.packed, blocks)
        src_index = move.src_index.of_blocks(self._plan.unit)
        self._copy(Move(move.src.as_slots(), slots.as_slots(), src_index, Index(), blocks))
        refused = []
        for plane, values, packed in zip(self._planes, rows.tensors, slots.tensors, strict=True):
            made, flagged = unpack_planes(packed.view(-1, plane.slot_bytes), plane)
            values.view(torch.int16).view(-1, plane.values).copy_(made)
            refused.append(flagged)
        flags = torch.stack([each.view(blocks, -1).any(1) for each in refused]).any(0)
        if bool(flags.any()):
            self._put_back(move, rows, refused, blocks)
        self._copy(Move(rows, move.dst, Index(), move.dst_index, move.count))
        return flags

    def _put_back(self, move: Move, rows: KVView, refused: list[torch.Tensor], blocks: int) -> None:
        """Replace the planes of flagged slots by the rows that the destination has."""
        present = self._dense(self._plan.raw, blocks)
        self._copy(Move(move.dst, present, move.dst_index, Index(), move.count))
        for plane, values, old, flagged in zip(
            self._planes, rows.tensors, present.tensors, refused, strict=True
        ):
            new = values.view(torch.int16).view(-1, plane.values)
            former = old.view(torch.int16).view(-1, plane.values)
            new.copy_(torch.where(flagged[:, None], former, new))

    def _dense(self, form: Form, blocks: int) -> KVView:
        """Return dense memory for blocks of a side, a tensor for each kv."""
        return dense_blocks(form, self._plan.unit, blocks, self._device)

    def _copy(self, move: Move) -> None:
        """Copy rows by plain indexing, on the current stream."""
        for copy, part in Copies(move, self._ops).of(move):
            copy(part)


# --- Planes and slots -----------------------------------------------------------------------------


class Packed(NamedTuple):
    """Packed planes.

    Attributes:
        slots: uint8 ``[planes, slot_bytes]``.
        overflow: bool ``[planes]``, True for planes whose escapes do not fit.
        escapes: int64 ``[planes]``, the number of escapes.
    """

    slots: torch.Tensor
    overflow: torch.Tensor
    escapes: torch.Tensor


def pack_planes(values: torch.Tensor, plane: PackedPlane) -> Packed:
    """Pack planes of bf16 bits, int16 ``[planes, values]``."""
    bits = values.to(torch.int32) & 0xFFFF
    exponents = bits >> 7 & 0xFF
    table, codes_of = _tables(exponents, plane)
    codes = codes_of.gather(1, exponents.to(torch.int64))
    escaped = codes == plane.table_entries
    escapes = escaped.sum(1)
    overflow = escapes > plane.most_escapes

    slots = torch.zeros((len(values), plane.slot_bytes), dtype=torch.uint8, device=values.device)
    slots[:, : plane.codes_at] = bits >> 8 & 0x80 | bits & 0x7F
    slots[:, plane.codes_at : plane.head_at] = _join_codes(codes, plane.code_bits)
    head = slots[:, plane.head_at : plane.escapes_at]
    head[:, : table.shape[1]] = table
    _write_counts(head, escaped, plane)
    _write_escapes(slots[:, plane.escapes_at :], exponents, escaped & ~overflow[:, None])

    # Only the flag of a plane that overflows is kept.
    slots.masked_fill_(overflow[:, None], 0)
    slots[:, plane.head_at + FLAG_AT] = overflow.to(torch.uint8) * OVERFLOW
    return Packed(slots, overflow, escapes)


def unpack_planes(slots: torch.Tensor, plane: PackedPlane) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpack slots, uint8 ``[planes, slot_bytes]``.

    Returns:
        The bf16 bits, int16 ``[planes, values]``, and for each plane True if its slot has the flag
        of a plane that did not fit; its values are then undefined.
    """
    places = slots[:, : plane.codes_at].to(torch.int32)
    joined = slots[:, plane.codes_at : plane.head_at]
    codes = _split_codes(joined, plane.code_bits).to(torch.int64)
    head = slots[:, plane.head_at : plane.escapes_at].to(torch.int32)
    escaped = codes == plane.table_entries

    # The table has no entry for the escape's code; its values follow from their ranks.
    table = torch.nn.functional.pad(head[:, : plane.table_entries], (0, 1))
    rank = (escaped.cumsum(1) - 1).clamp_(0, plane.most_escapes - 1)
    stored = slots[:, plane.escapes_at :].gather(1, rank).to(torch.int32)
    exponents = torch.where(escaped, stored, table.gather(1, codes))

    bits = (places & 0x80) << 8 | exponents << 7 | places & 0x7F
    return bits.to(torch.int16), head[:, FLAG_AT] != PACKED


def escapes_of(values: torch.Tensor, plane: PackedPlane) -> torch.Tensor:
    """Return the number of escapes of planes of bf16 bits, int16 ``[planes, values]``.

    Returns int64 ``[planes]``, on the device of the values, without a wait for it.
    """
    exponents = values.to(torch.int64) >> 7 & 0xFF
    every = _histogram(exponents)
    counts = every
    if plane.sample == VECTOR:
        counts = _histogram(_counted(exponents, plane))
    chosen, occurs = _most_frequent(counts, plane)
    return plane.values - (every.gather(1, chosen) * occurs).sum(1)


def _tables(exponents: torch.Tensor, plane: PackedPlane) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exponents with codes, int64 ``[planes, entries]``, and the code of each exponent,
    int64 ``[planes, 256]``."""
    device = exponents.device
    planes = len(exponents)
    entries = plane.table_entries
    chosen, occurs = _most_frequent(_histogram(_counted(exponents, plane)), plane)
    numbers = torch.arange(entries, dtype=torch.int64, device=device).expand(planes, entries)
    codes = torch.where(occurs, numbers, entries)
    codes_of = torch.full((planes, _EXPONENTS), entries, dtype=torch.int64, device=device)
    codes_of.scatter_(1, chosen, codes)
    return chosen * occurs, codes_of


def _counted(exponents: torch.Tensor, plane: PackedPlane) -> torch.Tensor:
    """Return the exponents that count for the table: all, or one of each vector."""
    if plane.sample != VECTOR:
        return exponents
    vectors = plane.values // VECTOR
    vector: Any = torch.arange(vectors, dtype=torch.int64, device=exponents.device)
    return exponents[:, vector * VECTOR + sampled(vector)]


def _histogram(exponents: torch.Tensor) -> torch.Tensor:
    """Return how often each exponent occurs in each row, int64 ``[rows, 256]``."""
    rows = len(exponents)
    device = exponents.device
    row = torch.arange(rows, dtype=torch.int64, device=device)[:, None] * _EXPONENTS
    places = (exponents + row).reshape(-1)
    counts = torch.zeros(rows * _EXPONENTS, dtype=torch.int64, device=device)
    # Unlike `bincount` this does not wait for the device. With one axis it also works while the
    # process wants deterministic algorithms.
    ones = torch.ones(1, dtype=torch.int64, device=device).expand(places.shape)
    return counts.scatter_add_(0, places, ones).view(rows, _EXPONENTS)


def _most_frequent(counts: torch.Tensor, plane: PackedPlane) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exponents that have codes, int64 ``[planes, entries]``, the most frequent first,
    and True for each that occurs.

    Of equal counts the larger exponent comes first, so all keys differ.
    """
    numbers = torch.arange(_EXPONENTS, dtype=torch.int64, device=counts.device)
    keys = (counts * _EXPONENTS + numbers).topk(plane.table_entries, 1, sorted=True).values
    return keys % _EXPONENTS, keys >= _EXPONENTS


def _write_counts(head: torch.Tensor, escaped: torch.Tensor, plane: PackedPlane) -> None:
    """Write the number of escapes, and the number before each segment except the first."""
    padding = plane.segments * SEGMENT - plane.values
    padded = torch.nn.functional.pad(escaped.to(torch.int32), (0, padding))
    totals = padded.view(len(escaped), plane.segments, SEGMENT).sum(2).cumsum(1)
    numbers = torch.cat([totals[:, -1:], totals[:, :-1]], 1)
    assert TOTAL_AT + 2 == COUNTS_AT
    for nth in range(plane.segments):
        at = TOTAL_AT + 2 * nth
        head[:, at] = numbers[:, nth] & 0xFF
        head[:, at + 1] = numbers[:, nth] >> 8 & 0xFF


def _write_escapes(area: torch.Tensor, exponents: torch.Tensor, escaped: torch.Tensor) -> None:
    """Write the exponents of escaped values one after the other, in the order of the values."""
    rank = escaped.cumsum(1) - 1
    where = escaped.nonzero(as_tuple=True)
    area[where[0], rank[where]] = exponents[where].to(torch.uint8)


def _join_codes(codes: torch.Tensor, code_bits: int) -> torch.Tensor:
    """Return the bytes of codes: two a byte, or eight in three bytes."""
    if code_bits == 4:
        return codes[:, ::2] | codes[:, 1::2] << 4
    groups = codes.view(len(codes), -1, 8)
    shifts = torch.arange(0, 24, 3, dtype=torch.int64, device=codes.device)
    joined = (groups << shifts).sum(2)
    return torch.stack([joined >> at & 0xFF for at in (0, 8, 16)], 2).flatten(1)


def _split_codes(joined: torch.Tensor, code_bits: int) -> torch.Tensor:
    """Return the codes in bytes that `_join_codes` returned."""
    if code_bits == 4:
        return torch.stack([joined & 15, joined >> 4], 2).flatten(1)
    groups = joined.to(torch.int32).view(len(joined), -1, 3)
    whole = groups[..., 0] | groups[..., 1] << 8 | groups[..., 2] << 16
    return torch.stack([whole >> at & 7 for at in range(0, 24, 3)], 2).flatten(1)
