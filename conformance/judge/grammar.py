# SPDX-License-Identifier: Apache-2.0
"""The oracle's own reading of the layout language; it shares no code with the library's parser."""

from __future__ import annotations

import re
from dataclasses import dataclass

AXES = ("layer", "kv", "block", "token", "head", "dim", "page")
_TOKEN = re.compile(r"\s*(?:([()|])|(?:([a-z]+)(?:([/%])([1-9][0-9]*))?|(1))(?![\w/%]))")


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
    """A layout as read: groups left and right of the bar, each outermost factor first.

    ``open_end`` says that the last right group may cover several trailing dimensions.
    """

    text: str
    left: tuple[Group, ...]
    right: tuple[Group, ...]
    open_end: bool

    def written(self, axis: str) -> bool:
        """Whether the axis occurs anywhere in the layout."""
        return any(f.axis == axis for group in self.left + self.right for f in group)

    def on_left(self, axis: str) -> bool:
        """Whether the axis, or a part of it, is a container."""
        return any(f.axis == axis for group in self.left for f in group)


def read_layout(text: str) -> Axes:
    """Read a layout string; ValueError where it is not in the language."""
    sides: list[list[Group]] = [[]]
    merged: list[Factor] | None = None
    last_in_parentheses = False
    for mark, axis, part, n, one in _tokens(text):
        if mark == "(" and merged is None:
            merged = []
        elif mark == ")" and merged:
            sides[-1].append(tuple(merged))
            merged, last_in_parentheses = None, True
        elif mark == "|" and merged is None and len(sides) == 1:
            sides.append([])
        elif axis and merged is not None:
            merged.append(Factor(axis, part, int(n or 0)))
        elif (axis or one) and merged is None:
            sides[-1].append((Factor(axis, part, int(n or 0)),) if axis else ())
            last_in_parentheses = False
        else:
            raise ValueError(f"The layout {text!r} has a misplaced {mark or one!r}.")
    if merged is not None:
        raise ValueError(f"The layout {text!r} leaves a parenthesis open.")
    left, right = (sides[0], sides[1]) if len(sides) == 2 else ([], sides[0])
    _check_axes(text, [f for group in left + right for f in group])
    ends_in_page = bool(right) and right[-1] == (Factor("page"),)
    open_end = bool(right) and (last_in_parentheses or ends_in_page)
    return Axes(text, tuple(left), tuple(right), open_end)


def _tokens(text: str) -> list[tuple[str, ...]]:
    found, at, end = [], 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"The layout {text!r} cannot be read from {text[at:]!r} on.")
        found.append(match.groups(""))
        at = match.end()
    return found


def _check_axes(text: str, factors: list[Factor]) -> None:
    for axis in {f.axis for f in factors}:
        if axis not in AXES:
            raise ValueError(f"The layout {text!r} names the unknown axis {axis!r}.")
        parts = sorted((f.part, f.n) for f in factors if f.axis == axis)
        whole = parts == [("", 0)]
        split = [part for part, _ in parts] == ["%", "/"] and parts[0][1] == parts[1][1]
        if not (whole or split):
            raise ValueError(
                f"The layout {text!r} must write {axis!r} once, or once as /N and once as %N."
            )
