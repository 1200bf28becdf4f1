# SPDX-License-Identifier: Apache-2.0
"""The geometry of `pack`, the lossless encoding of bf16 rows. Integers only.

A plane has the values of one block, layer, kv and head, token after token. It is packed into one
slot of a fixed size, in this order:

1. A byte for each value: the sign in bit 7, the mantissa in bits 0 to 6.
2. A code of ``code_bits`` for each value. A code below the largest is a position in the table of
   exponents. The largest code, all ones, marks an escape.
3. The head: 15 bytes of table (the most frequent exponents by falling count; of equal counts the
   larger exponent is first), a flag (0 packed, 1 overflow), the number of escapes as u16, and the
   number of escapes before each segment of 2,048 values except the first, as u16.
4. The escapes: the exponent of each escaped value, one byte each, in the order of the values.

From 8,192 values on, one value in eight counts for the table: of vector q of eight values the value
number (q + q // 16) % 8.

All numbers are little endian, and all bytes without a meaning are 0. Equal values give equal bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from portakv.errors import InvalidTerms, Unsupported

#: The name of the encoding, as callers and capabilities spell it.
PACK = "pack"
#: The number type of the rows that `pack` takes.
PACKED_DTYPE = "bfloat16"
#: The number of this format, part of every stored form.
FORMAT = 1
CODE_BITS = (3, 4)
#: Values of a plane.
LEAST_VALUES = 256
MOST_VALUES = 49_152
VALUES_STEP = 64
#: Slots are a multiple of this many bytes.
SLOT_STEP = 32
#: Planes of so many values and more have the long head, and a table from one value in eight.
LARGE_VALUES = 8_192
#: Values of a segment, for which the head counts the escapes before it.
SEGMENT = 2_048
#: Bytes of the table, and places in the head.
TABLE_BYTES = 15
FLAG_AT = 15
TOTAL_AT = 16
COUNTS_AT = 18
#: Values of a vector; with ``sample`` 8 one value of each vector counts for the table.
VECTOR = 8
PACKED = 0
OVERFLOW = 1
_TEXT = re.compile(rf"{PACK}/{FORMAT}:(?P<bits>[0-9])(:(?P<slot>[0-9]{{1,9}}))?")


@dataclass(frozen=True, slots=True)
class Pack:
    """The parameters of `pack`.

    Attributes:
        code_bits: bits of a code, 4 or 3. 4: 15 exponents have codes; 3: 7 exponents.
        slot_bytes: bytes of a slot, a multiple of 32. None: by the number of values of a plane.

    Raises:
        InvalidTerms: a value that a parameter cannot have.
    """

    code_bits: int = 4
    slot_bytes: int | None = None

    def __post_init__(self) -> None:
        bits = self.code_bits
        if type(bits) is not int or bits not in CODE_BITS:
            raise InvalidTerms(f"Expected code_bits to be 3 or 4, got {bits!r}. Pass one of these.")
        slot = self.slot_bytes
        whole = type(slot) is int and slot > 0 and slot % SLOT_STEP == 0
        if slot is not None and not whole:
            raise InvalidTerms(
                f"Expected slot_bytes to be a positive multiple of {SLOT_STEP} or None, got "
                f"{slot!r}. Pass such a number, or None for the usual size."
            )

    @property
    def text(self) -> str:
        """Return the parameters as a text, with the number of the format, as forms are stored."""
        slot = "" if self.slot_bytes is None else f":{self.slot_bytes}"
        return f"{PACK}/{FORMAT}:{self.code_bits}{slot}"

    @classmethod
    def of_text(cls, text: str) -> Pack:
        """Return the parameters that `text` wrote.

        Raises:
            InvalidTerms: another text, or one of another format.
        """
        found = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise InvalidTerms(
                f"Expected encoding to be a text such as {cls().text!r}, got {text!r}. Use the "
                f"release that wrote it, or pass what Pack.text returns."
            )
        return cls(int(found["bits"]), int(found["slot"]) if found["slot"] else None)

    def plane(self, values: int) -> PackedPlane:
        """Return the geometry of planes of so many values, a multiple of 64 from 256 to 49,152.

        Raises:
            Unsupported: the format has no planes of so many values.
            InvalidTerms: a slot without space for one escape.
        """
        whole = type(values) is int and values % VALUES_STEP == 0
        if not (whole and LEAST_VALUES <= values <= MOST_VALUES):
            raise Unsupported(
                f"The encoding {PACK!r} for planes of {values} values",
                f"block_size x dim must be a multiple of {VALUES_STEP} from {LEAST_VALUES} to "
                f"{MOST_VALUES}; leave these rows raw",
            )
        least = _before_escapes(values, self.code_bits)
        slot = self.slot_bytes
        if slot is None:
            slot = _rounded_up(least + _usual_escapes(values, self.code_bits), SLOT_STEP)
        if slot <= least:
            raise InvalidTerms(
                f"Expected slot_bytes above {least} for planes of {values} values with codes of "
                f"{self.code_bits} bits, got {slot}. Pass more, or None for the usual size."
            )
        return PackedPlane(values, self.code_bits, slot)


@dataclass(frozen=True, slots=True)
class PackedPlane:
    """The places of everything in the slot of a plane, in bytes; made by `Pack.plane`.

    Attributes:
        values: bf16 values of a plane, tokens of a block x width of a head: a multiple of 64 from
            256 to 49,152.
        code_bits: bits of a code.
        slot_bytes: bytes of a slot.
    """

    values: int
    code_bits: int
    slot_bytes: int
    encoding: ClassVar[str] = PACK

    @property
    def parameters(self) -> Pack:
        """Return the parameters that make this geometry for these values."""
        return Pack(self.code_bits, self.slot_bytes)

    @property
    def sample(self) -> int:
        """Return 8 if one value in eight counts for the table, 1 if all do."""
        return VECTOR if self.values >= LARGE_VALUES else 1

    @property
    def table_entries(self) -> int:
        """Return the number of exponents that can have codes; it is also the code of an escape."""
        return (1 << self.code_bits) - 1

    @property
    def codes_at(self) -> int:
        """Return the place of the codes, after the byte of each value."""
        return self.values

    @property
    def head_at(self) -> int:
        """Return the place of the head."""
        return self.values + self.values * self.code_bits // 8

    @property
    def head_bytes(self) -> int:
        """Return the bytes of the head."""
        return _head_bytes(self.values)

    @property
    def escapes_at(self) -> int:
        """Return the place of the escapes."""
        return self.head_at + self.head_bytes

    @property
    def most_escapes(self) -> int:
        """Return the number of escapes that a slot holds; planes with more overflow."""
        return self.slot_bytes - self.escapes_at

    @property
    def segments(self) -> int:
        """Return the number of segments, the last of which may be shorter."""
        return -(-self.values // SEGMENT)

    @property
    def raw_bytes(self) -> int:
        """Return the bytes of the plane's values as rows."""
        return 2 * self.values

    @property
    def ratio(self) -> float:
        """Return the bytes of the rows divided by the bytes of a slot."""
        return self.raw_bytes / self.slot_bytes

    def __str__(self) -> str:
        return f"{self.values} values in {self.slot_bytes} B ({self.code_bits} bits)"


def parameters_of(planes: Sequence[PackedPlane]) -> Pack:
    """Return the parameters that made the planes of a form, without a slot size if it is the usual
    one.

    Raises:
        Unsupported: planes of another encoding.
    """
    for plane in planes:
        if plane.encoding != PACK:
            why = f"this part of the library takes raw rows and {PACK!r}; unpack the rows first"
            raise Unsupported(f"Rows in the encoding {plane.encoding!r}", why)
    pack = Pack(planes[0].code_bits)
    if all(pack.plane(plane.values) == plane for plane in planes):
        return pack
    return planes[0].parameters


def slot_for(values: int, code_bits: int, escapes: int) -> int:
    """Return the bytes of the smallest slot of a plane that holds so many escapes."""
    return _rounded_up(_before_escapes(values, code_bits) + max(1, escapes), SLOT_STEP)


def sampled(vector: int) -> int:
    """Return the value of a vector of 8 that counts for the table, with ``sample`` 8."""
    return (vector + vector // 16) % VECTOR


def _head_bytes(values: int) -> int:
    return 64 if values >= LARGE_VALUES else 32


def _before_escapes(values: int, code_bits: int) -> int:
    return values + values * code_bits // 8 + _head_bytes(values)


def _usual_escapes(values: int, code_bits: int) -> int:
    """Return the escapes that a slot of the usual size holds at least."""
    if code_bits == 3:
        return max(32, -(-values * 50 // 1000))
    if values >= LARGE_VALUES:
        return -(-values * 27 // 1000)
    return 32 if values < 4_096 else -(-values * 16 // 1000)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
