# SPDX-License-Identifier: Apache-2.0
"""`pack` in plain torch: planes of bf16 values to slots and back, on any torch device.

`portakv.layout.packing` describes the format. Everything here is integer arithmetic, so that every
bit pattern survives and equal values give equal bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

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

_EXPONENTS = 256


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


def _tables(exponents: torch.Tensor, plane: PackedPlane) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exponents with codes, int64 ``[planes, entries]``, and the code of each exponent,
    int64 ``[planes, 256]``."""
    device = exponents.device
    planes = len(exponents)
    entries = plane.table_entries
    counted = exponents
    if plane.sample == VECTOR:
        counted = exponents[:, _sampled_places(plane.values, device)]
    row = torch.arange(planes, dtype=torch.int64, device=device)[:, None] * _EXPONENTS
    bins = (row + counted).reshape(-1).bincount(minlength=planes * _EXPONENTS)
    counts = bins.view(planes, _EXPONENTS)

    # The exponent decides between equal counts, so all keys differ.
    every = torch.arange(_EXPONENTS, dtype=torch.int64, device=device)
    keys = (counts * _EXPONENTS + every).topk(entries, 1, sorted=True).values
    chosen = keys % _EXPONENTS
    counted_once = keys >= _EXPONENTS
    numbers = torch.arange(entries, dtype=torch.int64, device=device).expand(planes, entries)
    codes = torch.where(counted_once, numbers, entries)
    codes_of = torch.full((planes, _EXPONENTS), entries, dtype=torch.int64, device=device)
    codes_of.scatter_(1, chosen, codes)
    return chosen * counted_once, codes_of


def _sampled_places(values: int, device: torch.device) -> torch.Tensor:
    """Return the places of the values that count for the table, one of each vector."""
    return torch.tensor(_places(values), dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def _places(values: int) -> tuple[int, ...]:
    return tuple(q * VECTOR + sampled(q) for q in range(values // VECTOR))


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
