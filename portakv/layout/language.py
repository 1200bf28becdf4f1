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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NoReturn

from portakv.arguments import as_whole
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


# ------------------------------------------------------------------------------------------------
# Solve the extents of a layout's axes from shapes and declarations; contradictions are errors.
#
# An axis with a dimension to itself has that extent. If axes share a dimension all but one must be
# declared. Nothing is guessed. Integers only: this code never sees a tensor.

#: The argument that declares an axis's extent; other axes by their own names.
DECLARED_AS = {"layer": "layers", "head": "heads", "token": "block_size", "page": "dim"}

Values = list[dict[str, int]]  # for each kv, the extent of each axis
_MOST_KV = 1024  # far above the extents of any cache, and the most that is walked through
Sized = tuple[Group, Sequence[int]]  # a group and, for each kv, its size


def positive(name: str, value: object) -> int:
    """Return a declared extent as an integer; raise `LayoutError` if it is not a positive
    integer."""
    extent = as_whole(value)
    if extent is None or extent < 1:
        raise LayoutError(f"Expected {name} to be a positive integer, got {value!r}. Declare one.")
    return extent


def declare(layout: Layout, extents: Mapping[str, Any]) -> Values:
    """Return for each ``kv`` the declared extents, all of them positive.

    ``layers``, ``kv``, ``block_size``, ``heads`` are integers; ``dim`` is in elements, an integer
    or a tuple of one for each kv.

    Raises:
        LayoutError: a declaration for an axis that the layout does not have, or of the wrong
            length.
    """
    shared: dict[str, int] = {}  # by all kv
    for axis in ("kv", "layer", "head"):
        name = DECLARED_AS.get(axis, axis)
        written = axis in layout.axes
        extent = extents.get(name, (2 if axis == "kv" else None) if written else 1)
        if not written and extent != 1:
            raise LayoutError(
                f"Expected {name}=1 for {layout.text!r}, which does not name {axis!r}, got "
                f"{extent}. Name the axis or leave {name} out."
            )
        if extent is not None:
            shared[axis] = extent
    if "block_size" in extents:
        shared["token"] = extents["block_size"]
        if not layout.paged:
            raise LayoutError(
                f"Expected no block_size for {layout.text!r}, which has no `block` axis, got "
                f"{shared['token']}. Leave it out."
            )
    elif layout.opaque:
        raise LayoutError(
            f"Expected block_size for {layout.text!r}, got None: no shape shows the number of "
            f"tokens of opaque pages. Declare block_size."
        )
    if shared["kv"] > _MOST_KV:
        raise LayoutError(
            f"Expected at most {_MOST_KV} planes for a token, got kv={shared['kv']}. Declare fewer."
        )
    values = [dict(shared) for _ in range(shared["kv"])]
    if "dim" not in extents:
        return values

    dim: int | tuple[int, ...] = extents["dim"]
    axis = "page" if layout.opaque else "dim"
    widths = dim if isinstance(dim, tuple) else (dim,) * len(values)
    if len(widths) != len(values):
        raise LayoutError(
            f"Expected dim to be one width, or {len(values)}, one for each kv, got {len(widths)} "
            f"widths, {dim!r}. Declare one number, or one for each kv."
        )
    if len(set(widths)) > 1 and not _may_differ(layout, axis):
        raise LayoutError(
            f"Expected one width for all kv of {layout.text!r}, where `kv` stands neither in a "
            f"container nor left of `{axis}` in its parentheses, got unequal widths, dim={dim!r}. "
            f"Declare one width, or move `kv`."
        )
    for known, width in zip(values, widths, strict=True):
        known[axis] = width
    return values


def _may_differ(layout: Layout, axis: str) -> bool:
    """Return True if each kv may have a separate width.

    Each kv then has separate tensors, or ``kv`` stands left of ``axis`` in one dimension.
    """
    for group in layout.containers + layout.dims:
        names = [factor.axis for factor in group.factors]
        if "kv" in names and (group in layout.containers or axis in names[names.index("kv") :]):
            return True
    return False


def solve(layout: Layout, values: Values, sized: Sequence[Sized]) -> None:
    """Complete ``values`` in place from the sizes of groups.

    Only what grows may be empty: the blocks of a paged view, the tokens of a chunk.

    Raises:
        LayoutError: sizes and extents contradict each other, an extent stays unknown or is 0, or
            kv differ in more than their width.
    """
    grows = "block" if layout.paged else "token"
    pending = list(sized)
    while pending:
        stuck = [item for item in pending if not _settle(layout, values, *item)]
        if len(stuck) == len(pending):
            group, sizes = stuck[0]
            unknown = [f.axis for f in group.factors if factor_extent(f, values[0]) is None]
            # The growing axis is never declared: it takes the rest.
            names = dict.fromkeys(DECLARED_AS.get(axis, axis) for axis in unknown if axis != grows)
            raise LayoutError(
                f"Expected at most one undeclared axis in dimension {group} of {layout.text!r}, "
                f"which has {sizes[0]} entries, got {' and '.join(unknown)}. Declare "
                f"{' or '.join(names)}."
            )
        pending = stuck
    for known in values:
        for axis, extent in known.items():
            if not extent and axis != grows:
                raise LayoutError(
                    f"Expected axis {axis!r} of {layout.text!r} to have an extent of at least 1, "
                    f"got 0. Pass tensors that hold rows."
                )
    for axis in ("layer", "block", "token", "head"):
        extents_of_kv = [known.get(axis) for known in values]
        if len(set(extents_of_kv)) > 1:
            raise LayoutError(
                f"Expected one extent of axis {axis!r} of {layout.text!r} for all "
                f"{len(extents_of_kv)} kv, got {extents_of_kv}. Pass tensors that agree."
            )


def _settle(layout: Layout, values: Values, group: Group, sizes: Sequence[int]) -> bool:
    """Check one group, or solve its one unknown axis; return False while two are unknown."""
    unknown = {f for known in values for f in group.factors if factor_extent(f, known) is None}
    if len(unknown) > 1:
        return False
    for known, size, expected in zip(values, sizes, known_parts(group, values), strict=True):
        # A known factor of extent 0 fits no size: only an axis that is still unknown may be empty.
        fits = expected > 0 and (size % expected == 0 if unknown else size == expected)
        if not fits:
            extent = f"extent {expected or 1}"
            if unknown:
                extent = f"an extent that {expected or 1} divides"
            raise LayoutError(
                f"Expected {_described(group, known)} of {layout.text!r} to have {extent}, got "
                f"{size}. Correct the layout, the declared extents or the tensors."
            )
        for factor in unknown:
            known[factor.axis] = size // expected * (factor.n or 1)
    return True


def _described(group: Group, known: Mapping[str, int]) -> str:
    """Return the name of a group for an error, with its known extents if it has several factors."""
    if not group.factors:
        return "the dimension `1`"
    if len(group.factors) == 1:
        return f"axis {group.factors[0].axis!r}"
    parts = ", ".join(f"{f}={factor_extent(f, known) or '?'}" for f in group.factors)
    return f"the dimension {group} ({parts})"


def factor_extent(factor: Factor, known: Mapping[str, int]) -> int | None:
    """Return the extent of one factor, or None while its axis is unknown."""
    if factor.part == "%":
        return factor.n
    extent = known.get(factor.axis)
    if extent is None or not factor.part:
        return extent
    if extent % factor.n:
        raise LayoutError(
            f"Expected axis {factor.axis!r} to have an extent that {factor} divides, got {extent}. "
            f"Use a factor that divides it."
        )
    return extent // factor.n


def known_parts(group: Group, values: Values) -> list[int]:
    """Return for each kv the product of the known extents; kv parts of a group follow each
    other."""
    at = next((i for i, f in enumerate(group.factors) if f.axis == "kv"), None)
    if at is None:
        return [_product(group.factors, known) for known in values]
    inner = sum(_product(group.factors[at + 1 :], known) for known in values)
    return [inner * _product(group.factors[:at], known) for known in values]


def _product(factors: Sequence[Factor], known: Mapping[str, int]) -> int:
    return prod(e for f in factors if (e := factor_extent(f, known)) is not None)
