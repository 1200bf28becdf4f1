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
        return 2**self.code_bits - 1

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
    if values >= 8192:
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
    exponents = exponent_of(values).tolist()
    counted = exponents
    if shape.large:
        counted = [exponents[8 * q + (q + q // 16) % 8] for q in range(shape.values // 8)]
    count = {exponent: counted.count(exponent) for exponent in set(counted)}
    ordered = sorted(count, key=lambda exponent: (count[exponent], exponent), reverse=True)
    return ordered[: shape.codes]


def packed_slot(values: np.ndarray, shape: SlotShape) -> tuple[np.ndarray, bool]:
    """Return the slot of one plane of bf16 bits (uint16), and True if its escapes do not fit."""
    slot = np.zeros(shape.slot_bytes, dtype=np.uint8)
    table = table_of(values, shape)
    code_of = {exponent: code for code, exponent in enumerate(table)}
    exponents = exponent_of(values).tolist()
    codes = [code_of.get(exponent, shape.codes) for exponent in exponents]
    places = [at for at, code in enumerate(codes) if code == shape.codes]
    if len(places) > shape.most:
        slot[shape.head + 15] = 1
        return slot, True
    sign = (values >> 15) & 1
    slot[: shape.values] = (sign << 7) | (values & 0x7F)
    slot[shape.values : shape.head] = _bits_of(codes, shape.code_bits)
    slot[shape.head : shape.head + len(table)] = table
    _put_u16(slot, shape.head + 16, len(places))
    for nth, first in enumerate(range(_SEGMENT, shape.values, _SEGMENT)):
        before = sum(place < first for place in places)
        _put_u16(slot, shape.head + 18 + 2 * nth, before)
    for nth, place in enumerate(places):
        slot[shape.escapes + nth] = exponents[place]
    return slot, False


def unpacked_values(slot: np.ndarray, shape: SlotShape) -> np.ndarray | None:
    """Return the bf16 bits (uint16) in a slot; None if it has the flag of a plane that did not
    fit."""
    if slot[shape.head + 15]:
        return None
    bits = np.unpackbits(slot[shape.values : shape.head], bitorder="little")
    weights = 1 << np.arange(shape.code_bits)
    codes = bits.reshape(-1, shape.code_bits) @ weights
    values = np.zeros(shape.values, dtype=np.uint16)
    escape = shape.escapes
    for at, code in enumerate(codes.tolist()):
        if code == shape.codes:
            exponent = int(slot[escape])
            escape += 1
        else:
            exponent = int(slot[shape.head + code])
        byte = int(slot[at])
        values[at] = (byte >> 7) << 15 | exponent << 7 | (byte & 0x7F)
    return values


def _bits_of(codes: list[int], code_bits: int) -> np.ndarray:
    """Return codes as a row of bits, the lowest first, in bytes."""
    numbers = np.array(codes, dtype=np.uint8)
    bits = (numbers[:, None] >> np.arange(code_bits, dtype=np.uint8)) & 1
    return np.packbits(bits.reshape(-1), bitorder="little")


def _put_u16(slot: np.ndarray, at: int, number: int) -> None:
    slot[at] = number % 256
    slot[at + 1] = number // 256
