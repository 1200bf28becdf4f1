# SPDX-License-Identifier: Apache-2.0
"""Which part of its window a reader reads from which owner: arithmetic on the model's axes alone.

A shard is a view and its window, the layers and heads of the model that it holds. A piece is one
`copy_rows` from a slice of an owner's view to a slice of the reader's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from portakv import arguments
from portakv.errors import LayoutError
from portakv.migrate.messages import Box, Group, Range
from portakv.view import KVView

Mask = npt.NDArray[np.bool_]  # for each position of a copy
_MOST = 1 << 16  # layers or heads of a model, as messages have them
_TOLD = 4  # holes, and positions, that an error names


class Shard:
    """A view and its window: which layers and heads of the whole model it holds, each as ``(from,
    to, of)`` on the model's axis; None: all of that axis. Raises `LayoutError` for another window.
    """

    def __init__(
        self, view: KVView, layers: Range | None = None, heads: Range | None = None
    ) -> None:
        arguments.instance("view", view, KVView, "Make one: KVView(tensors, layout).")
        self.view = view
        form = view.form
        page = form.block_size if form.opaque else 0
        ranges = _range("layers", layers, view), _range("heads", heads, view)
        #: The window, and the facts that the other side's shard must share (`unlike`).
        self.group = Group(*ranges, form.widths, form.dtypes, page)


def _range(axis: str, asked: Range | None, view: KVView) -> Range:
    has = getattr(view, axis)
    if asked is None:
        return 0, has, has
    known = isinstance(asked, tuple | list) and [*map(type, asked)] == [int, int, int]
    first, past, of = asked if known else (0, 0, 0)
    if not 0 <= first < past <= of <= _MOST or past - first != has:
        raise LayoutError(
            f"Expected {axis}= of a shard to be (from, to, of) with 0 <= from < to <= of <= "
            f"{_MOST}, got "
            f"{axis}={arguments.shown(asked)}. The view has {has} {axis}; `of` is how many the "
            f"whole model has. Leave it out if the view has all {axis}."
        )
    return first, past, of


def device_of(shards: Sequence[Shard]) -> torch.device:
    """The device that all of an owner's or a reader's shards are on; `LayoutError` if none is."""
    for shard in shards:
        arguments.instance("shards", shard, Shard, "Wrap each view: Shard(view).")
    devices = {shard.view.device for shard in shards}
    if len(devices) != 1:
        told = ", ".join(sorted(map(str, devices))) or "no device"
        raise LayoutError(
            f"Expected shards to be one or more, on one device, got {told}. Pass some."
        )
    return devices.pop()


def unlike(mine: Sequence[Group], theirs: Sequence[Group]) -> str:
    """Why rows of some shards cannot become those of others, as a clause; empty if they can.
    Windows, layouts and block sizes may differ."""
    found: list[tuple[str, Any, Any]] = [("groups", len(mine), len(theirs))]
    for nth, (one, other) in enumerate(zip(mine, theirs, strict=False)):
        numbers = zip(one.numbers, other.numbers, strict=False)
        found += [
            (f"kv of group {nth}", len(one.widths), len(other.widths)),
            (f"bytes of a row of group {nth}", one.widths, other.widths),
            (f"layers in all of group {nth}", one.layers[2], other.layers[2]),
            (f"heads in all of group {nth}", one.heads[2], other.heads[2]),
            (f"tokens of a page of group {nth}", one.page, other.page),
            *((f"numbers of group {nth}", a, b) for a, b in numbers if a and b),
        ]
    return ", ".join(f"{what}: {a} here and {b} there" for what, a, b in found if a != b)


class Piece(NamedTuple):
    """What an owner brings: a part of a box, at which positions (None: all)."""

    owner: int
    box: Box
    ids: Mask | None


def pieces(
    mine: Box,
    theirs: Sequence[Box],
    here: Sequence[Mask | None] = (),
    prefer: Sequence[int] = (),
    whole: bool = False,
) -> list[Piece]:
    """The pieces that bring each layer, head and position of ``mine`` once.

    ``here``: which positions each owner has (None: all), and those that the reader does not want;
    several owners bring one cell only if none has them all. ``prefer``: owners that are asked
    first. ``whole``: only owners of all of ``mine`` count, as for opaque pages. Raises
    `LayoutError` that names what nobody holds.
    """
    order = dict.fromkeys((*prefer, *range(len(theirs))))
    asked = [n for n in order if not whole or overlap(mine, theirs[n]) == mine]
    given, holes = deal(mine, {n: (theirs[n], here[n] if here else None) for n in asked})
    if holes:
        told = [f"{_named(box)}{_positions(mask)}" for box, mask in holes]
        more = f" and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
        raise LayoutError(
            f"A pull of {_named(mine)} was asked: none of {len(asked)} owners"
            f"{' of all of it' if whole else ''} holds {', '.join(told[:_TOLD])}{more}; hand over "
            f"a ticket of every owner."
        )
    return given


def deal(
    box: Box, owners: Mapping[int, tuple[Box, Mask | None]]
) -> tuple[list[Piece], list[tuple[Box, Mask | None]]]:
    """A box of any number of axes in pieces, each given to the first owner that holds it; and what
    is left. Owners of some positions alone are asked behind all others."""
    size = next((len(mask) for _, mask in owners.values() if mask is not None), 1)
    everywhere = np.ones(size, bool)
    masks = {n: everywhere if x is None else x for n, (_, x) in owners.items()}
    given = list[Piece]()
    left = [(box, everywhere)]
    for n in sorted(owners, key=lambda n: not masks[n].all()):
        after = []
        for part, wanted in left:
            both = overlap(part, owners[n][0])
            if both is None or not (brings := wanted & masks[n]).any():
                after.append((part, wanted))
                continue
            given.append(Piece(n, both, None if brings.all() else brings))
            after += [(other, wanted) for other in rest(part, both)]
            after += [(both, still)] if (still := wanted & ~brings).any() else []
        left = after
    return given, [(part, None if wanted.all() else wanted) for part, wanted in left]


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes share; None if nothing."""
    both = zip(one, other, strict=True)
    ends = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in both)
    return ends if all(first < past for first, past in ends) else None


def rest(box: Box, part: Box) -> Iterator[Box]:
    """A box without a part of it, as boxes."""
    for axis, ((first, past), (a, b)) in enumerate(zip(box, part, strict=True)):
        for ends in ((first, a), (b, past)):
            if ends[0] < ends[1]:
                yield (*part[:axis], ends, *box[axis + 1 :])


def slices(box: Box, window: Box) -> dict[str, Any]:
    """A box on the model's axes as slices of a view that holds a window."""
    starts = zip(("layers", "heads"), box, window, strict=True)
    return {axis: slice(a - first, b - first) for axis, (a, b), (first, _) in starts}


def _named(box: Box) -> str:
    (a, b), (c, d) = box
    return f"layers {a}-{b - 1} x heads {c}-{d - 1}"


def _positions(mask: Mask | None) -> str:
    ids = [] if mask is None else np.flatnonzero(mask).tolist()
    told = ", ".join(map(str, ids[:_TOLD])) + (", ..." if ids[_TOLD:] else "")
    return f" at positions {told}" if told else ""
