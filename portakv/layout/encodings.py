# SPDX-License-Identifier: Apache-2.0
"""The encodings that forms can have, `pack` and `fp8`, and the rotation of keys. Numbers only.

**pack** is lossless, for bf16 rows. A plane has the values of one block, layer, kv and head, token
after token. It is packed into one slot of a fixed size, in this order:

1. A byte for each value: the sign in bit 7, the mantissa in bits 0 to 6.
2. A code of ``code_bits`` for each value. A code below the largest is a position in the table of
   exponents. The largest code, all ones, marks an escape.
3. The head: 15 bytes of table (the most frequent exponents by falling count; of equal counts the
   larger exponent is first), a flag (0 packed, 1 overflow), the number of escapes as u16, and the
   number of escapes before each segment of 2,048 values except the first, as u16.
4. The escapes: the exponent of each escaped value, one byte each, in the order of the values.

From 8,192 values on, one value in eight counts for the table: of vector q of eight values the value
number (q + q // 16) % 8.

**fp8** is lossy: rows in e4m3. A plane has the rows of one block, layer, kv and head, token after
token. Its slot has this order:

1. A byte for each value, token after token: e4m3 (sign, 4 bits of exponent with bias 7, 3 bits of
   mantissa, no infinity, 0x7F for NaN).
2. A scale for each token, bf16. A value is its e4m3 number times the scale of its token.
3. Zeros up to a multiple of 16 bytes.

All numbers are little endian. Bytes of `pack` without a meaning are 0. Equal rows give equal bytes,
on every device.

A **rotation** moves keys to other positions: the angles by which a shift of positions rotates them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, isfinite, sin
from typing import ClassVar, TypeAlias

from portakv.arguments import shown
from portakv.errors import InvalidTerms, LayoutError, Unsupported

#: The name of the encoding, as callers and capabilities spell it.
PACK = "pack"
#: The number type of the rows that `pack` takes.
PACKED_DTYPE = "bfloat16"
#: The number of this format, part of every stored form.
PACK_FORMAT = 1
CODE_BITS = (3, 4)
#: Values of a plane.
LEAST_VALUES = 256
MOST_VALUES = 49_152
VALUES_STEP = 64
#: Slots are a multiple of this many bytes.
PACK_SLOT_STEP = 32
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
_PACK_TEXT = re.compile(rf"{PACK}/{PACK_FORMAT}:(?P<bits>[0-9])(:(?P<slot>[0-9]{{1,9}}))?")


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
        whole = type(slot) is int and slot > 0 and slot % PACK_SLOT_STEP == 0
        if slot is not None and not whole:
            raise InvalidTerms(
                f"Expected slot_bytes to be a positive multiple of {PACK_SLOT_STEP} or None, got "
                f"{slot!r}. Pass such a number, or None for the usual size."
            )

    @property
    def text(self) -> str:
        """Return the parameters as a text, with the number of the format, as forms are stored."""
        slot = "" if self.slot_bytes is None else f":{self.slot_bytes}"
        return f"{PACK}/{PACK_FORMAT}:{self.code_bits}{slot}"

    @classmethod
    def of_text(cls, text: str) -> Pack:
        """Return the parameters that `text` wrote.

        Raises:
            InvalidTerms: another text, or one of another format.
        """
        found = _PACK_TEXT.fullmatch(text) if isinstance(text, str) else None
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
        least = PackedPlane(values, self.code_bits, 0).escapes_at
        slot = self.slot_bytes
        if slot is None:
            slot = _rounded_up(least + _usual_escapes(values, self.code_bits))
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
        return 64 if self.values >= LARGE_VALUES else 32

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


def pack_parameters_of(planes: Sequence[PackedPlane]) -> Pack:
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
    least = PackedPlane(values, code_bits, 0).escapes_at
    return _rounded_up(least + max(1, escapes))


def sampled(vector: int) -> int:
    """Return the value of a vector of 8 that counts for the table, with ``sample`` 8."""
    return (vector + vector // 16) % VECTOR


def _usual_escapes(values: int, code_bits: int) -> int:
    """Return the escapes that a slot of the usual size holds at least."""
    if code_bits == 3:
        return max(32, -(-values * 50 // 1000))
    if values >= LARGE_VALUES:
        return -(-values * 27 // 1000)
    return 32 if values < 4_096 else -(-values * 16 // 1000)


def _rounded_up(nbytes: int) -> int:
    return -(-nbytes // PACK_SLOT_STEP) * PACK_SLOT_STEP


#: The name of the encoding, as callers spell it.
FP8 = "fp8"
#: The number types of the rows that `fp8` takes.
FP8_DTYPES = ("bfloat16", "float16", "float32")
#: The number of this format, part of every stored form.
FP8_FORMAT = 1
#: Slots are a multiple of this many bytes.
FP8_SLOT_STEP = 16
SCALE_BYTES = 2
#: The largest number of e4m3; the value of a token that is largest gets it.
E4M3_LARGEST = 448.0
#: The least number of e4m3 above 0 that is normal, and the distance of numbers below it.
E4M3_LEAST_NORMAL = 2.0**-6
E4M3_STEP = 2.0**-9
#: The least scale. Values below 2 ** -126 count as 0, so that no arithmetic has subnormals.
FP8_LEAST_SCALE = 2.0**-117
FP8_LEAST_VALUE = 2.0**-126
E4M3_NAN = 0x7F
_FP8_TEXT = f"{FP8}/{FP8_FORMAT}"


@dataclass(frozen=True, slots=True)
class Fp8:
    """The parameters of `fp8`: there are none."""

    @property
    def text(self) -> str:
        """Return the encoding as a text, with the number of the format, as forms are stored."""
        return _FP8_TEXT

    @classmethod
    def of_text(cls, text: str) -> Fp8:
        """Return the parameters that `text` wrote.

        Raises:
            InvalidTerms: another text, or one of another format.
        """
        if text != _FP8_TEXT:
            raise InvalidTerms(
                f"Expected encoding to be {_FP8_TEXT!r}, got {text!r}. Use the release that wrote "
                f"it, or pass what Fp8.text returns."
            )
        return cls()

    def plane(self, tokens: int, dim: int) -> Fp8Plane:
        """Return the geometry of planes of so many tokens, each with ``dim`` values.

        Raises:
            Unsupported: a number that is not a positive integer.
        """
        for name, number in (("tokens", tokens), ("dim", dim)):
            if type(number) is not int or number < 1:
                raise Unsupported(
                    f"The encoding {FP8!r} for planes with {name}={number!r}",
                    "a plane has at least one token and one value; pass positive integers",
                )
        return Fp8Plane(tokens, dim)


@dataclass(frozen=True, slots=True)
class Fp8Plane:
    """The places of everything in the slot of a plane, in bytes; made by `Fp8.plane`.

    Attributes:
        tokens: tokens of a block.
        dim: values of a token.
    """

    tokens: int
    dim: int
    encoding: ClassVar[str] = FP8

    @property
    def parameters(self) -> Fp8:
        """Return the parameters that make this geometry."""
        return Fp8()

    @property
    def values(self) -> int:
        """Return the values of a plane; it is also the place of the scales."""
        return self.tokens * self.dim

    @property
    def scales_past(self) -> int:
        """Return the place after the scales."""
        return self.values + SCALE_BYTES * self.tokens

    @property
    def slot_bytes(self) -> int:
        """Return the bytes of a slot."""
        return -(-self.scales_past // FP8_SLOT_STEP) * FP8_SLOT_STEP

    def __str__(self) -> str:
        return f"{self.tokens} x {self.dim} values in {self.slot_bytes} B"


Encoding: TypeAlias = Pack | Fp8
#: The geometry of a slot.
Plane: TypeAlias = PackedPlane | Fp8Plane
#: For each encoding, the number types of rows that it takes.
DTYPES: dict[str, tuple[str, ...]] = {PACK: (PACKED_DTYPE,), FP8: FP8_DTYPES}


def as_encoding(encoding: object) -> Encoding | None:
    """Return the parameters of an encoding; None for raw rows.

    Raises:
        InvalidTerms: not the name of an encoding, nor its parameters.
    """
    if encoding is None or isinstance(encoding, (Pack, Fp8)):
        return encoding
    if encoding == PACK:
        return Pack()
    if encoding == FP8:
        return Fp8()
    raise InvalidTerms(
        f"Expected encoding to be {PACK!r}, {FP8!r}, a Pack, an Fp8 or None, got {encoding!r}. "
        f"Pass one of these."
    )


def encoding_of_text(text: str) -> Encoding:
    """Return the parameters that `Pack.text` or `Fp8.text` wrote.

    Raises:
        InvalidTerms: another text, or one of another format.
    """
    return Fp8.of_text(text) if text.startswith(FP8) else Pack.of_text(text)


def plane_of(encoding: Encoding, tokens: int, dim: int) -> Plane:
    """Return the geometry of planes of so many tokens, each with ``dim`` values.

    Raises:
        Unsupported: the encoding has no such planes.
        InvalidTerms: slots that are too small.
    """
    if isinstance(encoding, Fp8):
        return encoding.plane(tokens, dim)
    return encoding.plane(tokens * dim)


def parameters_of(planes: Sequence[Plane]) -> Encoding:
    """Return the parameters that made the planes of a form."""
    first = planes[0]
    if isinstance(first, Fp8Plane):
        return first.parameters
    return pack_parameters_of(planes)  # type: ignore[arg-type]  # a form has planes of one kind


def is_lossy(encoding: str) -> bool:
    """Return True if an encoding, by the text of its parameters, does not keep every bit."""
    return encoding.startswith(FP8)


#: How the values of a head form pairs: ``neox`` value i with value i + rotary_dim / 2, ``gptj``
#: value 2i with value 2i + 1.
ROPE_STYLES = ("neox", "gptj")
MOST_SHIFT = 1 << 30


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotation of keys to other positions, as a model with rotary positions makes it.

    A key at position p becomes the key at position p + ``shift``. Scaling variants (YaRN, llama3)
    differ in their inverse frequencies: pass them. A factor on the magnitude of keys, which YaRN
    has, is in the keys already.

    Attributes:
        shift: positions to move by; negative: to the front.
        base: inverse frequency i is ``base ** (-2 i / rotary_dim)``. None: ``inv_freq`` has them.
        style: ``neox`` or ``gptj``, see `ROPE_STYLES`.
        rotary_dim: the first values of a head, which are rotated. None: all.
        inv_freq: radians a position for each pair, ``rotary_dim / 2`` numbers.
        kv: the number of the rows that are keys; all other rows are copied as they are.

    Raises:
        InvalidTerms: a value that an attribute cannot have, not one of ``base`` and ``inv_freq``,
            or angles past the range of floats.
    """

    shift: int
    base: float | None = None
    style: str = "neox"
    rotary_dim: int | None = None
    inv_freq: Sequence[float] | None = None
    kv: int = 0

    def __post_init__(self) -> None:
        if type(self.shift) is not int or abs(self.shift) > MOST_SHIFT:
            raise _wrong("shift", "a number of positions from -2^30 to 2^30", self.shift)
        if self.style not in ROPE_STYLES:
            raise _wrong("style", f"one of {', '.join(map(repr, ROPE_STYLES))}", self.style)
        if type(self.kv) is not int or self.kv < 0:
            raise _wrong("kv", "the number of the rows that are keys", self.kv)
        dim = self.rotary_dim
        if dim is not None and (type(dim) is not int or dim < 2 or dim % 2):
            raise _wrong("rotary_dim", "an even number of values, or None", dim)
        if (self.base is None) == (self.inv_freq is None):
            raise InvalidTerms(
                f"Expected base or inv_freq, got base={self.base!r} and inv_freq "
                f"{'too' if self.base is not None else 'None'}. Pass one of them."
            )
        if self.base is not None and not (_is_number(self.base) and self.base > 0):
            raise _wrong("base", "a number above 0", self.base)
        if self.inv_freq is not None:
            object.__setattr__(self, "inv_freq", _numbers(self.inv_freq, dim))
        name = "inv_freq"
        if self.base is not None:
            name = "base"
            most = max(1.0, 1 / self.base)
        else:
            assert self.inv_freq is not None
            most = max(map(abs, self.inv_freq))
        if not isfinite(self.shift * most):
            got = f"{most:g} radians a position and shift={self.shift}"
            raise _wrong(name, "such that all angles are finite", got)

    def rotary(self, dim: int) -> int:
        """Return the rotated values of a head of ``dim`` values.

        Raises:
            LayoutError: the head has fewer values, or another number of them.
        """
        rotary = dim if self.rotary_dim is None else self.rotary_dim
        pairs = rotary // 2 if self.inv_freq is None else len(self.inv_freq)
        if rotary > dim or rotary != 2 * pairs:
            raise LayoutError(
                f"Expected keys with a rotary_dim of {2 * pairs} in heads of at least as many "
                f"values, got rotary_dim={rotary} and heads of {dim}. Pass the model's rotary_dim."
            )
        return rotary

    def turns(self, dim: int) -> tuple[list[float], list[float]]:
        """Return the cosine and the sine for each pair of values of a head.

        Raises as `rotary`.
        """
        rotary = self.rotary(dim)
        inverse = self.inv_freq
        if inverse is None:
            assert self.base is not None
            inverse = [self.base ** (-2 * pair / rotary) for pair in range(rotary // 2)]
        angles = [self.shift * each for each in inverse]
        return [cos(angle) for angle in angles], [sin(angle) for angle in angles]


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # a whole number past the range of floats
        return False


def _numbers(values: object, dim: int | None) -> tuple[float, ...]:
    """Return inverse frequencies as a tuple."""
    listed = values.tolist() if hasattr(values, "tolist") else values  # of a tensor or an array
    if not isinstance(listed, (list, tuple)) or not listed or not all(map(_is_number, listed)):
        raise _wrong("inv_freq", "finite numbers in a list, a tuple, an array or a tensor", values)
    if dim is not None and len(listed) != dim // 2:
        expected = f"{dim // 2} numbers, half of rotary_dim"
        raise _wrong("inv_freq", expected, f"{len(listed)} numbers")
    return tuple(map(float, listed))


def _wrong(name: str, expected: str, got: object) -> InvalidTerms:
    text = got if isinstance(got, str) and " " in got else shown(got)
    return InvalidTerms(f"Expected {name} to be {expected}, got {text}. Pass such a value.")
