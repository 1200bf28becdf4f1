# SPDX-License-Identifier: Apache-2.0
"""The oracle of the encoding `pack`: planes of bf16 bits to slots and back, in numpy, written from
the description of the format and from nothing of the library. Plain loops over one plane: it is
meant to be checked by reading it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SEGMENT = 2048


@dataclass(frozen=True)
class SlotShape:
    """The sizes of a slot: bf16 values of a plane, bits of a code, and bytes of the slot."""

    values: int
    code_bits: int
    slot_bytes: int

    @property
    def large(self) -> bool:
        """Return True for planes with the long head and a sampled table."""
        return self.values >= 8192

    @property
    def codes(self) -> int:
        """Return the number of codes that stand for exponents; the next one is the escape."""
        return (1 << self.code_bits) - 1

    @property
    def head(self) -> int:
        """Return the first byte of the head."""
        return self.values + self.values * self.code_bits // 8

    @property
    def escapes(self) -> int:
        """Return the first byte of the escapes."""
        return self.head + (64 if self.large else 32)

    @property
    def most(self) -> int:
        """Return the number of escapes that fit."""
        return self.slot_bytes - self.escapes


def usual_slot(values: int, code_bits: int) -> SlotShape:
    """Return the slot of the usual size for planes of so many values."""
    most = 32
    if code_bits == 3:
        most = max(32, int(np.ceil(values / 20)))
    elif values >= 8192:
        most = int(np.ceil(values * 27 / 1000))
    elif values >= 4096:
        most = int(np.ceil(values * 16 / 1000))
    bare = SlotShape(values, code_bits, 0).escapes
    return SlotShape(values, code_bits, int(np.ceil((bare + most) / 32)) * 32)


def exponent_of(values: np.ndarray) -> np.ndarray:
    """Return the exponents of bf16 bits (uint16)."""
    return (values >> 7) & 0xFF


def table_of(values: np.ndarray, shape: SlotShape) -> list[int]:
    """Return the exponents that have codes, in the order of their codes."""
    counted = exponent_of(values)
    if shape.large:
        q = np.arange(shape.values // 8)
        counted = counted[8 * q + (q + q // 16) % 8]
    count = dict(zip(*(x.tolist() for x in np.unique(counted, return_counts=True)), strict=True))
    ordered = sorted(count, key=lambda exponent: (count[exponent], exponent), reverse=True)
    return ordered[: shape.codes]


def packed_slot(values: np.ndarray, shape: SlotShape) -> tuple[np.ndarray, bool]:
    """Return the slot of one plane of bf16 bits (uint16), and True if its escapes do not fit."""
    slot = np.zeros(shape.slot_bytes, dtype=np.uint8)
    head = shape.head
    table = table_of(values, shape)
    code_of = np.full(256, shape.codes, dtype=np.uint8)
    code_of[table] = np.arange(len(table))
    codes = code_of[exponent_of(values)]
    places = np.flatnonzero(codes == shape.codes)
    if len(places) > shape.most:
        slot[head + 15] = 1
        return slot, True
    sign = (values >> 15) & 1
    slot[: shape.values] = (sign << 7) | (values & 0x7F)
    slot[shape.values : head] = _bits_of(codes, shape.code_bits)
    slot[head : head + len(table)] = table
    _put_u16(slot, head + 16, len(places))
    for nth, first in enumerate(range(_SEGMENT, shape.values, _SEGMENT)):
        _put_u16(slot, head + 18 + 2 * nth, int((places < first).sum()))
    slot[shape.escapes : shape.escapes + len(places)] = exponent_of(values[places])
    return slot, False


def unpacked_values(slot: np.ndarray, shape: SlotShape) -> np.ndarray | None:
    """Return the bf16 bits (uint16) in a slot; None if it has the flag of a plane that did not
    fit."""
    head = shape.head
    if slot[head + 15]:
        return None
    bits = np.unpackbits(slot[shape.values : head], bitorder="little")
    codes = bits.reshape(-1, shape.code_bits) @ (1 << np.arange(shape.code_bits))
    exponents = slot[head + np.minimum(codes, 14)].astype(np.uint16)
    places = np.flatnonzero(codes == shape.codes)
    exponents[places] = slot[shape.escapes : shape.escapes + len(places)]
    byte = slot[: shape.values].astype(np.uint16)
    return np.asarray((byte >> 7) << 15 | exponents << 7 | (byte & 0x7F))


def _bits_of(codes: np.ndarray, code_bits: int) -> np.ndarray:
    """Return codes as a row of bits, the lowest first, in bytes."""
    bits = (codes[:, None] >> np.arange(code_bits, dtype=np.uint8)) & 1
    return np.packbits(bits.reshape(-1), bitorder="little")


def _put_u16(slot: np.ndarray, at: int, number: int) -> None:
    slot[at] = number % 256
    slot[at + 1] = number // 256
