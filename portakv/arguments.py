# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments. Each returns the value, or raises `InvalidTerms` with a sentence that names
the argument at fault: "Expected X, got Y. Do Z."
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from difflib import get_close_matches
from math import inf
from numbers import Integral, Real
from operator import index
from typing import Any, TypeGuard, TypeVar

from portakv.errors import InvalidTerms, LayoutError, SlotError

Kind = TypeVar("Kind")
#: The most seconds of a wait, which are 31 years: a lock of Python's takes no more than 292.
FOREVER = 1e9
_LONGEST = 80  # characters of a value in a sentence


def invalid(name: str, expected: str, value: object, do: str = "Correct it.") -> InvalidTerms:
    """Return the error for an argument that has another value than expected."""
    return InvalidTerms(f"Expected {name} to be {expected}, got {shown(value)}. {do}")


def first_few(values: Sequence[object], most: int = 8) -> str:
    """Return the first of some values as a text, with dots if there are more."""
    return ", ".join(map(str, values[:most])) + (", ..." if len(values) > most else "")


def shown(value: object) -> str:
    """Return a short text for a value. Asks no tensor and no object of a caller for its text."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a whole number of {value.bit_length()} bits"
    plain = value is None or isinstance(value, str | bytes | int | float)
    if not plain and isinstance(value, list | tuple) and len(value) <= 8:
        plain = all(x is None or type(x) in (str, bytes, int, float, bool) for x in value)
    if not plain:
        return kind_of(value)
    text = repr(value)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    return text


def size_text(nbytes: float, digits: int = 3) -> str:
    """Return a number of bytes as a text: ``64 KiB``, ``1.5 GiB``, ``32 TiB``."""
    size = float(nbytes)
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < 1024:
            break
        size /= 1024
        unit = larger
    if size >= 10**digits - 0.5:  # as many digits would need an exponent
        return f"{size:.0f} {unit}"
    return f"{size:.{digits}g} {unit}"


def kind_of(value: object) -> str:
    """Return the name of a value's type with its article; that of None is None."""
    if value is None:
        return "None"
    name = type(value).__name__
    if type(value).__module__ == "numpy" and name in ("bool", "bool_"):  # by numpy's release
        name = "bool of numpy"  # it is not True or False, which read alike
    article = "an" if name[:1].lower() in ("a", "e", "i", "o", "u") else "a"
    return f"{article} {name}"


def _is_whole(value: object) -> TypeGuard[int]:
    """Return True for a whole number; a boolean is not a number."""
    # Most are plain, and asking an abstract class takes a microsecond.
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def as_whole(value: object) -> int | None:
    """Return what Python takes as an index, such as an integer of numpy, as an integer; None for
    all else, and for a boolean."""
    if type(value) is int:
        return value
    # Some releases of numpy take their own boolean as an index as well, with a warning.
    if type(value).__name__ in ("bool", "bool_"):
        return None
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _is_real(value: object) -> TypeGuard[float]:
    """Return True for a number; a boolean is not a number."""
    plain = type(value) is float or type(value) is int
    return plain or (isinstance(value, Real) and not isinstance(value, bool))


def flag(name: str, value: object) -> bool:
    """Return a flag, which is True or False."""
    if value is not True and value is not False:
        raise invalid(name, "True or False", value, "Pass one of these.")
    return value


def one_of(name: str, value: object, options: Iterable[str]) -> str:
    """Return a text that is one of several."""
    known = tuple(options)
    if isinstance(value, str) and value in known:
        return value
    do = "Pass one of these."
    if isinstance(value, str) and (close := get_close_matches(value, known, 1)):
        do = f"Did you mean {close[0]!r}?"
    expected = " or ".join(repr(each) for each in known)
    raise invalid(name, expected, value, do)


def whole(
    name: str, value: object, least: int = 0, most: int = (1 << 62) - 1, what: str = ""
) -> int:
    """Return a whole number from ``least`` to ``most``; ``what`` names its unit."""
    if type(value) is int and least <= value <= most:
        return value
    if _is_whole(value) and least <= value <= most:
        return int(value)
    expected = f"a whole number {what}".rstrip()
    too_large = _is_whole(value) and value > most
    limits = f"of at most {most}" if too_large else f"of at least {least}"
    raise invalid(name, f"{expected} {limits}", value, "Pass one.")


def nbytes(name: str, value: object, least: int = 0) -> int:
    """Return a number of bytes, which may be a float such as 1e9."""
    if _is_real(value) and least <= value < 1 << 62:
        return int(value)
    raise invalid(name, f"a number of bytes of at least {least}", value, "Pass one.")


def number(
    name: str, value: object, least: float = -inf, most: float = inf, what: str = "a number"
) -> float:
    """Return a number from ``least`` to ``most``; ``what`` names it with its limits."""
    if _is_real(value) and least <= value <= most:
        return float(min(value, 1e300))
    raise invalid(name, what, value, "Pass one.")


def seconds(name: str, value: object, above: bool = False, optional: bool = False) -> float:
    """Return seconds, from 0 on or ``above`` 0, and at most `FOREVER`; if ``optional`` None is
    `FOREVER`."""
    if value is None and optional:
        return FOREVER
    if _is_real(value) and (value > 0 or (value == 0 and not above)):
        return float(min(value, FOREVER))
    expected = "a number of seconds above 0" if above else "a number of seconds, 0 or more"
    if optional:
        expected += ", or None for no limit"
    raise invalid(name, expected, value, "Pass one.")


def rate(name: str, value: object) -> float:
    """Return 10^9 bytes in a second."""
    if _is_real(value) and 0 < value < 1e9:
        return float(value)
    expected = "a number of 10^9 bytes a second, above 0 and below 10^9"
    raise invalid(name, expected, value, "Pass None for the link's own rate.")


def text(name: str, value: object, least: int = 1, most: int = 1024) -> str:
    """Return a text of ``least`` to ``most`` characters, which UTF-8 can hold, without NUL: C
    would end it there."""
    if isinstance(value, str) and "\0" in value:
        raise invalid(name, "a text without the character NUL", value, "Leave it out.")
    if isinstance(value, str) and least <= len(value) <= most:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise invalid(name, "a text that UTF-8 can hold", value) from None
        return value
    raise invalid(name, f"a text of {least} to {most} characters", value, "Pass one.")


def octets(name: str, value: object, least: int = 0, most: int = (1 << 62) - 1) -> bytes:
    """Return bytes, of a length from ``least`` to ``most``."""
    if isinstance(value, bytes) and least <= len(value) <= most:
        return value
    size = f" of at least {least}" if least else ""
    raise invalid(name, f"bytes{size}", value, "Pass bytes.")


def naming(name: str, expected: str) -> AbstractContextManager[None]:
    """Have a `SlotError` or `LayoutError` name the argument that it is about."""
    return _Naming(name, expected)


class _Naming(AbstractContextManager[None]):
    """The context of `naming`; a generator would cost a call three times as much."""

    __slots__ = ("_expected", "_name")

    def __init__(self, name: str, expected: str) -> None:
        self._name = name
        self._expected = expected

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if not isinstance(error, SlotError | LayoutError) or self._name in str(error).split():
            return
        # The error is of the value alone, as in "Expected an index of int64, got dtype float32".
        _, got, rest = str(error).partition(", got ")
        text = f"Expected {self._name} to be {self._expected}{got or ': '}{rest or error}"
        raise type(error)(text) from error


def items(name: str, value: object, kind: str) -> list[Any]:
    """Return the items of a list or another sequence or iterable, but not of a text or bytes;
    ``kind`` names the items."""
    if type(value) is list or type(value) is tuple:  # most are, and need no abstract class
        return [*value]
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray):
        with suppress(TypeError):  # of a tensor without axes
            return [*value]
    raise invalid(name, f"a list of {kind}", value, "Put a single one into a list.")


def instance(name: str, value: object, kind: type[Kind], do: str = "") -> Kind:
    """Return an object of a class; ``do`` says how to make one."""
    if isinstance(value, kind):
        return value
    article = "an" if kind.__name__[:1] in ("A", "E", "I", "O", "U") else "a"
    expected = f"{article} {kind.__name__}"
    raise invalid(name, expected, value, do or f"Pass {expected}.")
