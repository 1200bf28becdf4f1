# SPDX-License-Identifier: Apache-2.0
"""The layout language: a string of axis names becomes groups of factors.

    layout := [group* "|"] group*
    group  := factor | "(" factor+ ")" | "1"
    factor := axis | axis "/" N | axis "%" N

Left of ``|`` stand the containers (list, tuple, dict in its order), outermost first; right of it
the tensor's dimensions in their logical order. This module knows strings only: no tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from portakv.errors import LayoutError

AXES = ("layer", "kv", "block", "token", "head", "dim", "page")

_TOKEN = re.compile(
    r"(?P<axis>[A-Za-z_]\w*)(?:(?P<part>[/%])(?P<n>\d*))?|(?P<mark>[|()]|1(?!\w))|(?P<other>\S)"
)


@dataclass(frozen=True, slots=True)
class Factor:
    """An axis (``part == ""``), its quotient by ``n`` (``"/"``) or its remainder (``"%"``)."""

    axis: str
    part: str = ""
    n: int = 0

    def __str__(self) -> str:
        return f"{self.axis}{self.part}{self.n}" if self.part else self.axis


@dataclass(frozen=True, slots=True)
class Group:
    """One container level or tensor dimension: its factors, outermost first; none for ``1``.

    ``merged`` is True if they stand in parentheses, be it only one.
    """

    factors: tuple[Factor, ...]
    merged: bool = False

    def __str__(self) -> str:
        names = " ".join(map(str, self.factors))
        return f"({names})" if self.merged else names or "1"


@dataclass(frozen=True, slots=True)
class Layout:
    """A parsed layout. ``containers`` and ``dims`` are in the order of the string."""

    text: str
    containers: tuple[Group, ...]
    dims: tuple[Group, ...]

    @property
    def axes(self) -> frozenset[str]:
        """The names of the axes that are written."""
        return frozenset(f.axis for g in self.containers + self.dims for f in g.factors)

    @property
    def paged(self) -> bool:
        """True if rows are addressed by slot, that is, if ``block`` is written."""
        return "block" in self.axes

    @property
    def opaque(self) -> bool:
        """True if only whole pages can be moved."""
        return "page" in self.axes

    @property
    def open_end(self) -> bool:
        """True if the last group, ``page`` or in parentheses, may cover several dimensions."""
        last = self.dims[-1]
        return last.merged or last.factors == (Factor("page"),)

    def shares(self, axis: str) -> bool:
        """True if ``axis`` shares a dimension with another axis, so that neither is implied."""
        groups = [{f.axis for f in group.factors} for group in self.containers + self.dims]
        return any(axis in names and len(names) > 1 for names in groups)


def parse(text: str) -> Layout:
    """Parse a layout string.

    Raises:
        LayoutError: unknown axis, an axis twice, a factor without its partner, or axes that
            cannot go together; the message shows the string with the place marked.
    """
    if not isinstance(text, str):
        raise LayoutError(f"A layout is a string of axis names, but {text!r} was given.")
    return _parse(text)


@lru_cache(maxsize=512)
def _parse(text: str) -> Layout:
    groups: list[Group] = []  # containers first
    bar: int | None = None  # how many of them stand left of `|`
    places: list[tuple[Factor, int]] = []
    inside: list[Factor] | None = None  # factors since an open parenthesis
    opened = 0
    for token in _TOKEN.finditer(text):
        at = token.start()
        mark = token["mark"]
        if token["other"]:
            fail(text, at, f"{token[0]!r} is not part of the layout language.")
        elif token["axis"]:
            factor = Factor(token["axis"], token["part"] or "", int(token["n"] or 0))
            if factor.axis not in AXES:
                fail(text, at, f"Unknown axis {factor.axis!r}; the axes are {', '.join(AXES)}.")
            if factor.part and not factor.n:
                fail(text, at, f"{token[0]!r} needs a positive number after `{factor.part}`.")
            places.append((factor, at))
            if inside is None:
                groups.append(Group((factor,)))
            else:
                inside.append(factor)
        elif mark == "1":
            if inside is not None:
                fail(text, at, "`1` is a separate dimension and cannot stand in parentheses.")
            groups.append(Group(()))
        elif mark == "|":
            if bar is not None or inside is not None:
                fail(text, at, "`|` stands at most once, and outside of parentheses.")
            bar = len(groups)
        elif mark == "(":
            if inside is not None:
                fail(text, at, "Parentheses do not nest.")
            inside = []
            opened = at
        else:
            if not inside:
                fail(text, at, "This parenthesis closes nothing; write axes in between.")
            groups.append(Group(tuple(inside), merged=True))
            inside = None
    if inside is not None:
        fail(text, opened, "This parenthesis is never closed.")
    if len(groups) == (bar or 0):
        fail(text, len(text.rstrip()), "The tensor has no dimension; name at least one axis.")
    _check(text, places)
    return Layout(text, tuple(groups[: bar or 0]), tuple(groups[bar or 0 :]))


def fail(text: str, at: int, why: str) -> NoReturn:
    """Raise a `LayoutError` that shows ``text`` with a caret under position ``at``."""
    shown = re.sub(r"\s", " ", text)  # a line break or a tab would move the caret
    raise LayoutError(f"{why}\n    {shown}\n    {' ' * at}^")


def _check(text: str, places: list[tuple[Factor, int]]) -> None:
    """Each axis occurs once, whole or as quotient and remainder by one number; all go together."""
    seen: dict[str, list[tuple[Factor, int]]] = {}
    for factor, at in places:
        earlier = seen.setdefault(factor.axis, [])
        for other, _ in earlier:
            if not (other.part and factor.part) or other.part == factor.part:
                fail(text, at, f"Axis {factor.axis!r} occurs twice ({other} and {factor}).")
            if other.n != factor.n:
                why = f"{other} and {factor} do not belong together; use one number for both."
                fail(text, at, why)
        earlier.append((factor, at))
    for (factor, at), *others in seen.values():
        if factor.part and not others:
            partner = Factor(factor.axis, "%" if factor.part == "/" else "/", factor.n)
            fail(text, at, f"{factor} needs its partner {partner} somewhere in the layout.")
        if factor.part and factor.axis == "page":
            fail(text, at, "`page` is opaque and cannot be split.")
        if factor.part and factor.axis == "kv":
            fail(text, at, "`kv` cannot be split into quotient and remainder.")
    opaque = "page" in seen
    for axis in ("token", "head", "dim"):
        if opaque and axis in seen:
            why = f"`page` is a block's opaque content and cannot go together with {axis!r}."
            fail(text, seen[axis][0][1], why)
        if not opaque and axis != "head" and axis not in seen:
            fail(text, len(text.rstrip()), f"The layout must name {axis!r} (or `page`).")
    if opaque and "block" not in seen:
        at = seen["page"][0][1]
        fail(text, at, "`page` is a block's content; the layout must name `block`.")
