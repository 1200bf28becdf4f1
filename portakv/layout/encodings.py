# SPDX-License-Identifier: Apache-2.0
"""The encodings that forms can have: `pack` and `fp8`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from portakv.errors import InvalidTerms
from portakv.layout import packing
from portakv.layout.fp8 import FP8, FP8_DTYPES, Fp8, Fp8Plane
from portakv.layout.packing import PACK, PACKED_DTYPE, Pack, PackedPlane

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
    return packing.parameters_of(planes)  # type: ignore[arg-type]  # a form has planes of one kind


def is_lossy(encoding: str) -> bool:
    """Return True if an encoding, by the text of its parameters, does not keep every bit."""
    return encoding.startswith(FP8)
