# SPDX-License-Identifier: Apache-2.0
"""Solve the extents of a layout's axes from shapes and declarations; contradictions are errors.

An axis with a dimension to itself has that extent. Where axes share a dimension all but one must
be declared. Nothing is guessed. Integers only: this module never sees a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from operator import index

from portakv.errors import LayoutError
from portakv.layout.language import Factor, Group, Layout

#: How a caller declares the extent of an axis.
DECLARED_AS = {
    "layer": "layers",
    "kv": "kv",
    "token": "block_size",
    "head": "heads",
    "dim": "dim",
    "page": "dim",
}

Values = list[dict[str, int]]  # for each kv, the extent of each axis


def declare(layout: Layout, extents: Mapping[str, int | Sequence[int] | None]) -> Values:
    """For each ``kv`` the extents that ``layers``, ``kv``, ``block_size``, ``heads`` (integers) and
    ``dim`` (elements: an integer, or one for each kv) declare.

    Raises:
        LayoutError: a declaration for an axis that the layout does not have, of the wrong
            length, or not positive.
    """
    given = {name: value for name, value in extents.items() if value is not None}
    kv = positive("kv", given.pop("kv", 2 if "kv" in layout.axes else 1))
    if "kv" not in layout.axes and kv != 1:
        raise _unwritten(layout, "kv", kv, "kv")
    values: Values = [{"kv": kv} for _ in range(kv)]
    for axis in ("layer", "head"):
        name, written = DECLARED_AS[axis], axis in layout.axes
        if name in given or not written:
            extent = positive(name, given.pop(name, 1))
            if extent != 1 and not written:
                raise _unwritten(layout, name, extent, axis)
            _fill(values, axis, [extent] * kv)
    _declare_tokens(layout, values, given.pop("block_size", None))
    _declare_widths(layout, values, given.pop("dim", None))
    if given:
        names = ", ".join(sorted(given))
        raise LayoutError(f"Unknown extents {names}; declare layers, kv, block_size, heads or dim.")
    return values


Sized = tuple[Group, Sequence[int]]  # a group and, for each kv, its size


def solve(layout: Layout, values: Values, sized: Sequence[Sized]) -> list[Sized]:
    """Settle as many groups as can be, completing ``values`` in place; return the others.

    Raises:
        LayoutError: sizes and extents contradict each other.
    """
    pending = list(sized)
    while True:
        stuck = [item for item in pending if not _settle(layout, values, *item)]
        if len(stuck) == len(pending):
            return stuck
        pending = stuck


def finish(layout: Layout, values: Values, stuck: Sequence[Sized]) -> None:
    """Check that every extent is known, that none is 0 and that all kv agree.

    Only what grows may be empty: the blocks of a paged view, the tokens of a chunk.

    Raises:
        LayoutError: an extent stayed unknown or is 0, or kv differ in more than their width.
    """
    if stuck:
        raise _undeclared(layout, values, *stuck[0])
    grows = "block" if layout.paged else "token"
    for known in values:
        for axis, extent in known.items():
            if not extent and axis != grows:
                raise LayoutError(
                    f"Axis {axis!r} of {layout.text!r} has extent 0; a view needs at least 1. Hand "
                    f"over tensors that hold rows."
                )
    # Only the width may differ between keys and values.
    for axis in ("layer", "block", "token", "head"):
        found = [known.get(axis) for known in values]
        if len(set(found)) > 1:
            raise LayoutError(
                f"In {layout.text!r} axis {axis!r} has extents {found} for the "
                f"{len(found)} kv; expected one extent for all. Hand over tensors that agree."
            )


def factor_extent(factor: Factor, known: Mapping[str, int]) -> int | None:
    """The extent of one factor, or None while its axis is unknown."""
    if factor.part == "%":
        return factor.n
    extent = known.get(factor.axis)
    if extent is None or not factor.part:
        return extent
    if extent % factor.n:
        raise LayoutError(
            f"Axis {factor.axis!r} has extent {extent}, which {factor} cannot divide; "
            f"use a factor that divides it."
        )
    return extent // factor.n


def _settle(layout: Layout, values: Values, group: Group, sizes: Sequence[int]) -> bool:
    """Check one group, or solve its one unknown axis; False where two are still unknown."""
    unknown = {f for known in values for f in group.factors if factor_extent(f, known) is None}
    if len(unknown) > 1:
        return False
    for k, (size, known_part) in enumerate(zip(sizes, known_parts(group, values), strict=True)):
        if not known_part or size % known_part or (not unknown and size != known_part):
            raise _contradiction(layout, group, known_part, size, values[k])
        for factor in unknown:
            values[k][factor.axis] = size // known_part * (factor.n or 1)
    return True


def known_parts(group: Group, values: Values) -> list[int]:
    """For each kv, the product of what is known; kv parts of a group lie one behind the other."""
    kv_at = next((i for i, f in enumerate(group.factors) if f.axis == "kv"), None)
    if kv_at is None:
        return [_product(group.factors, known) for known in values]
    inner = sum(_product(group.factors[kv_at + 1 :], known) for known in values)
    return [inner * _product(group.factors[:kv_at], known) for known in values]


def _product(factors: Sequence[Factor], known: Mapping[str, int]) -> int:
    return prod(e for f in factors if (e := factor_extent(f, known)) is not None)


def positive(name: str, value: object) -> int:
    """A declared extent as an integer; raise `LayoutError` where it is no positive integer."""
    try:
        extent = 0 if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        extent = 0
    if extent < 1:
        raise LayoutError(f"{name}={value!r} was declared; an extent is a positive integer.")
    return extent


def _fill(values: Values, axis: str, extents: Sequence[int]) -> None:
    for known, extent in zip(values, extents, strict=True):
        known[axis] = extent


def _declare_tokens(layout: Layout, values: Values, block_size: object) -> None:
    if block_size is not None:
        if not layout.paged:
            raise LayoutError(
                f"block_size={block_size} was declared, but {layout.text!r} has no `block` axis; "
                f"leave it out."
            )
        _fill(values, "token", [positive("block_size", block_size)] * len(values))
    elif layout.opaque:
        raise LayoutError(
            f"{layout.text!r} holds opaque pages, whose number of tokens cannot be read from "
            f"a shape; declare block_size."
        )


def _declare_widths(layout: Layout, values: Values, dim: object) -> None:
    if dim is None:
        return
    axis = "page" if layout.opaque else "dim"
    listed = list(dim) if isinstance(dim, (tuple, list)) else [dim] * len(values)
    widths = [positive("dim", value) for value in listed]
    if len(widths) != len(values):
        raise LayoutError(
            f"dim={dim!r} declares {len(widths)} widths, but kv has extent {len(values)}; "
            f"declare one number, or one for each kv."
        )
    _fill(values, axis, widths)
    if len(set(widths)) > 1 and not _widths_may_differ(layout, axis):
        raise LayoutError(
            f"dim={dim!r} declares unequal widths, but in {layout.text!r} `kv` stands neither in "
            f"a container nor left of `{axis}` in its parentheses, so all kv have one width."
        )


def _widths_may_differ(layout: Layout, axis: str) -> bool:
    names = [[f.axis for f in group.factors] for group in layout.dims]
    listed = any(f.axis == "kv" for group in layout.containers for f in group.factors)
    return listed or any("kv" in x and axis in x[x.index("kv") :] for x in names)


def _unwritten(layout: Layout, name: str, extent: int, axis: str) -> LayoutError:
    return LayoutError(
        f"{name}={extent} was declared, but {layout.text!r} does not name {axis!r}, whose extent "
        f"is then 1; name the axis or leave the declaration out."
    )


def _contradiction(
    layout: Layout, group: Group, expected: int, size: int, known: Mapping[str, int]
) -> LayoutError:
    what = "The dimension `1`"
    if len(group.factors) == 1:
        what = f"Axis {group.factors[0].axis!r}"
    elif group.factors:
        parts = ", ".join(f"{f}={factor_extent(f, known) or '?'}" for f in group.factors)
        what = f"The dimension {group} ({parts})"
    return LayoutError(
        f"{what} of {layout.text!r} was expected to have extent {expected or 1}, but {size} was "
        f"found; correct the layout, the declared extents or the tensors."
    )


def _undeclared(layout: Layout, values: Values, group: Group, sizes: Sequence[int]) -> LayoutError:
    unknown = [f.axis for f in group.factors if factor_extent(f, values[0]) is None]
    # What grows is never declared: it is what remains.
    grows = "block" if layout.paged else "token"
    names = " or ".join(dict.fromkeys(DECLARED_AS[axis] for axis in unknown if axis != grows))
    return LayoutError(
        f"The dimension {group} of {layout.text!r} has {sizes[0]} entries, which "
        f"{' and '.join(unknown)} share; all but one of them must be declared: declare {names}."
    )
