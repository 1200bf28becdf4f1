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
from collections.abc import Mapping
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
        """Return the names of the axes that are written."""
        return frozenset(f.axis for g in self.containers + self.dims for f in g.factors)

    @property
    def paged(self) -> bool:
        """Return True if rows are addressed by slot, that is, if ``block`` is written."""
        return "block" in self.axes

    @property
    def opaque(self) -> bool:
        """Return True if only whole pages can be moved."""
        return "page" in self.axes

    @property
    def open_end(self) -> bool:
        """Return True if the last group may cover several dimensions: ``page``, or parentheses."""
        last = self.dims[-1]
        return last.merged or last.factors == (Factor("page"),)

    def shares(self, axis: str) -> bool:
        """Return True if ``axis`` shares a dimension with another axis; neither is then implied."""
        for group in self.containers + self.dims:
            names = {factor.axis for factor in group.factors}
            if axis in names and len(names) > 1:
                return True
        return False


def parse(text: str) -> Layout:
    """Parse a layout string.

    Raises:
        LayoutError: unknown axis, an axis twice, a factor without its partner, or axes that
            cannot go together; the message shows the string with the place marked.
    """
    if not isinstance(text, str):
        raise LayoutError(
            f"Expected a layout as a string of axis names, got {text!r}. Pass a string."
        )
    return _parse(text)


@lru_cache(maxsize=512)
def _parse(text: str) -> Layout:
    return _Parser(text).parse()


class _Parser:
    """Read one layout string from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        # Each factor, and its position in the string.
        self.places: list[tuple[Factor, int]] = []
        # The containers come first. `bar` is their number once `|` was read.
        self.groups: list[Group] = []
        self.bar: int | None = None
        # The factors since an open parenthesis, and the position of that parenthesis.
        self.inside: list[Factor] | None = None
        self.opened = 0

    def parse(self) -> Layout:
        """Return the layout; raise `LayoutError` as `parse` does."""
        text = self.text
        for token in _TOKEN.finditer(text):
            if token["other"]:
                self._fail(token.start(), f"{token[0]!r} is not part of the layout language.")
            if token["axis"]:
                self._read_factor(token)
            else:
                self._read_mark(token["mark"], token.start())
        if self.inside is not None:
            self._fail(self.opened, "This parenthesis is never closed.")
        bar = self.bar or 0
        if len(self.groups) == bar:
            self._fail(len(text.rstrip()), "The tensor has no dimension; name at least one axis.")
        self._check()
        return Layout(text, tuple(self.groups[:bar]), tuple(self.groups[bar:]))

    def _read_factor(self, token: re.Match[str]) -> None:
        at = token.start()
        factor = Factor(token["axis"], token["part"] or "", int(token["n"] or 0))
        if factor.axis not in AXES:
            self._fail(at, f"Unknown axis {factor.axis!r}; the axes are {', '.join(AXES)}.")
        if factor.part and not factor.n:
            self._fail(at, f"{token[0]!r} needs a positive number after `{factor.part}`.")
        self.places.append((factor, at))
        if self.inside is None:
            self.groups.append(Group((factor,)))
        else:
            self.inside.append(factor)

    def _read_mark(self, mark: str, at: int) -> None:
        """Read ``1``, ``|`` or a parenthesis."""
        if mark == "1":
            if self.inside is not None:
                self._fail(at, "`1` is a separate dimension and cannot stand in parentheses.")
            self.groups.append(Group(()))
        elif mark == "|":
            if self.bar is not None or self.inside is not None:
                self._fail(at, "`|` stands at most once, and outside of parentheses.")
            self.bar = len(self.groups)
        elif mark == "(":
            if self.inside is not None:
                self._fail(at, "Parentheses do not nest.")
            self.inside = []
            self.opened = at
        else:
            if not self.inside:
                self._fail(at, "This parenthesis closes nothing; write axes in between.")
            self.groups.append(Group(tuple(self.inside), merged=True))
            self.inside = None

    def _check(self) -> None:
        """Check that each axis is complete and all axes go together."""
        by_axis: dict[str, list[tuple[Factor, int]]] = {}
        for factor, at in self.places:
            earlier = by_axis.setdefault(factor.axis, [])
            for other, _ in earlier:
                self._check_pair(other, factor, at)
            earlier.append((factor, at))
        for (factor, at), *partners in by_axis.values():
            if factor.part:
                self._check_split(factor, at, not partners)
        self._check_axes({axis: places[0][1] for axis, places in by_axis.items()})

    def _check_pair(self, other: Factor, factor: Factor, at: int) -> None:
        """Check that two factors of one axis are quotient and remainder by one number."""
        if not (other.part and factor.part) or other.part == factor.part:
            self._fail(at, f"Axis {factor.axis!r} occurs twice ({other} and {factor}).")
        if other.n != factor.n:
            why = f"{other} and {factor} do not belong together; use one number for both."
            self._fail(at, why)

    def _check_split(self, factor: Factor, at: int, alone: bool) -> None:
        """Check that an axis is split into both quotient and remainder, and may be."""
        if alone:
            partner = Factor(factor.axis, "%" if factor.part == "/" else "/", factor.n)
            self._fail(at, f"{factor} needs its partner {partner} somewhere in the layout.")
        if factor.axis == "page":
            self._fail(at, "`page` is opaque and cannot be split.")
        if factor.axis == "kv":
            self._fail(at, "`kv` cannot be split into quotient and remainder.")

    def _check_axes(self, first: Mapping[str, int]) -> None:
        """Check that the named axes go together; ``first`` has the position where each begins."""
        if "page" not in first:
            for axis in ("token", "dim"):
                if axis not in first:
                    why = f"The layout must name {axis!r} (or `page`)."
                    if axis == "dim":
                        why += (
                            " If a row is one number, such as a scale, pass tensor.unsqueeze(-1), "
                            "or write '(head dim)' for 'head' and declare dim=1."
                        )
                    self._fail(len(self.text.rstrip()), why)
            return
        for axis in ("token", "head", "dim"):
            if axis in first:
                why = (
                    f"`page` is a block's opaque content and cannot go together with {axis!r}, "
                    f"except in a layout of encoded blocks, which encoding (--encoding) declares."
                )
                self._fail(first[axis], why)
        if "block" not in first:
            why = "`page` is a block's content; the layout must name `block`."
            self._fail(first["page"], why)

    def _fail(self, at: int, why: str) -> NoReturn:
        """Raise a `LayoutError` that shows the string with a caret under position ``at``."""
        shown = re.sub(r"\s", " ", self.text)  # a line break or a tab would move the caret
        raise LayoutError(f"{why}\n    {shown}\n    {' ' * at}^")
