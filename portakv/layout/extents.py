# SPDX-License-Identifier: Apache-2.0
"""Solve the extents of a layout's axes from shapes and declarations; contradictions are errors.

An axis with a dimension to itself has that extent. If axes share a dimension all but one must be
declared. Nothing is guessed. Integers only: this module never sees a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from portakv.arguments import as_whole
from portakv.errors import LayoutError
from portakv.layout.language import Factor, Group, Layout

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
