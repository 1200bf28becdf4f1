# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: the angles by which a shift of positions rotates keys. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, isfinite, sin

from portakv.arguments import shown
from portakv.errors import InvalidTerms, LayoutError

#: How the values of a head form pairs: ``neox`` value i with value i + rotary_dim / 2, ``gptj``
#: value 2i with value 2i + 1.
STYLES = ("neox", "gptj")
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
        style: ``neox`` or ``gptj``, see `STYLES`.
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
        if self.style not in STYLES:
            raise _wrong("style", f"one of {', '.join(map(repr, STYLES))}", self.style)
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
        self._check_angles()

    def _check_angles(self) -> None:
        """Raise `InvalidTerms` for angles past the range of floats."""
        if self.inv_freq is not None:
            most = max(map(abs, self.inv_freq))
        else:
            assert self.base is not None
            most = max(1.0, 1 / self.base)
        if not isfinite(self.shift * most):
            name = "base" if self.inv_freq is None else "inv_freq"
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
