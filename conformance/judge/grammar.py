# SPDX-License-Identifier: Apache-2.0
"""The oracle's own reading of the layout language; it shares no code with the library's parser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

AXES = ("layer", "kv", "block", "token", "head", "dim", "page")
_WORD = r"[a-z]+(?:[/%][1-9][0-9]*)?"
_FACTOR = re.compile(r"([a-z]+)([/%]?)([0-9]*)")
#: A factor, several in parentheses, or a 1, which is not a factor.
_GROUP = re.compile(
    rf"\s*(?:\((?P<merged>(?:\s*{_WORD}(?![\w/%]))+)\s*\)|(?:(?P<one>{_WORD})|1)(?![\w/%]))"
)


@dataclass(frozen=True)
class Factor:
    """One axis (``part`` is ``""``), its quotient (``"/"``) or its remainder (``"%"``) by ``n``."""

    axis: str
    part: str = ""
    n: int = 0

    def __str__(self) -> str:
        return f"{self.axis}{self.part}{self.n}" if self.part else self.axis


Group = tuple[Factor, ...]


@dataclass(frozen=True)
class Axes:
    """A layout as read: groups left and right of the bar, each outermost factor first."""

    text: str
    left: tuple[Group, ...]
    right: tuple[Group, ...]
    open_end: bool  # the last right group may cover several trailing dimensions

    def written(self, axis: str) -> bool:
        """Return True if the axis occurs anywhere in the layout."""
        return any(f.axis == axis for group in self.left + self.right for f in group)

    def on_left(self, axis: str) -> bool:
        """Return True if the axis, or a part of it, is a container."""
        return any(f.axis == axis for group in self.left for f in group)


def read_layout(text: str) -> Axes:
    """Read a layout string; ValueError where it is not in the language."""
    left, _, right = text.rpartition("|")
    containers, dimensions = (tuple(_groups(text, side)) for side in (left, right))
    _check_axes(text, [factor for group in containers + dimensions for factor in group])
    last = dimensions[-1] if dimensions else ()
    open_end = right.rstrip().endswith(")") or last == (Factor("page"),)
    return Axes(text, containers, dimensions, open_end)


def _groups(text: str, side: str) -> Iterator[Group]:
    at = 0
    end = len(side.rstrip())
    while at < end:
        match = _GROUP.match(side, at)
        if match is None:
            raise ValueError(
                f"Expected an axis or a group in the layout {text!r}, got {side[at:]!r}. Write "
                f"groups such as `block`, `token/16` or `(head dim)`, with spaces between them."
            )
        factors = _FACTOR.findall(match["merged"] or match["one"] or "")
        yield tuple(Factor(axis, part, int(n or 0)) for axis, part, n in factors)
        at = match.end()


def _check_axes(text: str, factors: list[Factor]) -> None:
    for axis in {f.axis for f in factors}:
        if axis not in AXES:
            known = ", ".join(AXES)
            raise ValueError(
                f"Expected some of {known} in the layout {text!r}, got {axis!r}. Correct the name."
            )
        parts = sorted((f.part, f.n) for f in factors if f.axis == axis)
        whole = parts == [("", 0)]
        split = [part for part, _ in parts] == ["%", "/"] and parts[0][1] == parts[1][1]
        if not (whole or split):
            raise ValueError(
                f"Expected {axis!r} once, or once as /N and once as %N, got the layout {text!r}. "
                f"Remove the other factors of {axis!r}."
            )
