# SPDX-License-Identifier: Apache-2.0
"""The geometry of `fp8`, the lossy encoding of rows in e4m3. Integers only.

A plane has the rows of one block, layer, kv and head, token after token. Its slot has this order:

1. A byte for each value, token after token: e4m3 (sign, 4 bits of exponent with bias 7, 3 bits of
   mantissa, no infinity, 0x7F for NaN).
2. A scale for each token, bf16. A value is its e4m3 number times the scale of its token.
3. Zeros up to a multiple of 16 bytes.

All numbers are little endian. Equal rows give equal bytes, on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from portakv.errors import InvalidTerms, Unsupported

#: The name of the encoding, as callers spell it.
FP8 = "fp8"
#: The number types of the rows that `fp8` takes.
FP8_DTYPES = ("bfloat16", "float16", "float32")
#: The number of this format, part of every stored form.
FORMAT = 1
#: Slots are a multiple of this many bytes.
SLOT_STEP = 16
SCALE_BYTES = 2
#: The largest number of e4m3; the value of a token that is largest gets it.
LARGEST = 448.0
#: The least number of e4m3 above 0 that is normal, and the distance of numbers below it.
LEAST_NORMAL = 2.0**-6
STEP = 2.0**-9
#: The least scale. Values below 2 ** -126 count as 0, so that no arithmetic has subnormals.
LEAST_SCALE = 2.0**-117
LEAST_VALUE = 2.0**-126
NAN_CODE = 0x7F
_TEXT = f"{FP8}/{FORMAT}"


@dataclass(frozen=True, slots=True)
class Fp8:
    """The parameters of `fp8`: there are none."""

    @property
    def text(self) -> str:
        """Return the encoding as a text, with the number of the format, as forms are stored."""
        return _TEXT

    @classmethod
    def of_text(cls, text: str) -> Fp8:
        """Return the parameters that `text` wrote.

        Raises:
            InvalidTerms: another text, or one of another format.
        """
        if text != _TEXT:
            raise InvalidTerms(
                f"Expected encoding to be {_TEXT!r}, got {text!r}. Use the release that wrote it, "
                f"or pass what Fp8.text returns."
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
        return -(-self.scales_past // SLOT_STEP) * SLOT_STEP

    def __str__(self) -> str:
        return f"{self.tokens} x {self.dim} values in {self.slot_bytes} B"
