# SPDX-License-Identifier: Apache-2.0
"""Choose which part of its window a reader reads from which owner.

This is arithmetic on the model's axes alone. A shard is a view and its window, the layers and heads
of the model that the view contains. A piece is one `copy_rows` from a slice of an owner's view to a
slice of the reader's view.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from portakv import arguments
from portakv.errors import LayoutError
from portakv.layout.encodings import PACKED_DTYPE, pack_parameters_of
from portakv.migrate.messages import Box, Group, Range
from portakv.view import KVView

Mask = npt.NDArray[np.bool_]  # for each position of a copy
_MOST = 1 << 16  # layers or heads of a model, as messages have them
_SHOWN = 4  # the most holes, and positions, that an error names


class Shard:
    """A view and its window.

    ``layers`` and ``heads`` are each ``(from, to, of)`` on the model's axis; None: all of that
    axis. A packed view takes part with whole blocks only. Raises `LayoutError` for a window that
    does not match the view.
    """

    def __init__(
        self, view: KVView, layers: Range | None = None, heads: Range | None = None
    ) -> None:
        arguments.instance("view", view, KVView, "Make one: KVView(tensors, layout).")
        self.view = view
        form = view.form
        page = form.block_size if form.opaque else 0
        numbers = form.dtypes
        encoding = ""
        if form.encoding:
            numbers = (PACKED_DTYPE,) * form.kv
            encoding = pack_parameters_of(form.encoding).text
        ranges = _range("layers", layers, view), _range("heads", heads, view)
        #: The window, and the facts that the other side's shard must share (`unlike`).
        self.group = Group(*ranges, form.raw_widths, numbers, page, encoding)


# --- windows --------------------------------------------------------------------------------------


def _range(axis: str, requested: Range | None, view: KVView) -> Range:
    has = getattr(view, axis)
    if requested is None:
        return 0, has, has
    valid = isinstance(requested, tuple | list) and [*map(type, requested)] == [int, int, int]
    first, past, of = requested if valid else (0, 0, 0)
    if not 0 <= first < past <= of <= _MOST:
        raise LayoutError(
            f"Expected {axis}= of a shard to be (from, to, of) with 0 <= from < to <= of <= "
            f"{_MOST}, got {axis}={arguments.shown(requested)}. The view has {has} {axis}; `of` "
            f"is the number in the whole model. Leave it out if the view has all {axis}."
        )
    if past - first != has:
        raise LayoutError(
            f"Expected {axis}= of a shard to name the {has} {axis} that its view has, got "
            f"{axis}=({first}, {past}, {of}), which names {past - first}. Pass "
            f"(from, from + {has}, {axis} of the whole model)."
        )
    return first, past, of


def device_of(shards: Sequence[Shard]) -> torch.device:
    """Return the device of all shards; raise `LayoutError` if they are on several devices."""
    for shard in shards:
        arguments.instance("shards", shard, Shard, "Wrap each view: Shard(view).")
    devices = {shard.view.device for shard in shards}
    if len(devices) != 1:
        shown = ", ".join(sorted(map(str, devices))) or "no device"
        raise LayoutError(
            f"Expected shards to be one or more on one device, got {shown}. Pass other shards."
        )
    return devices.pop()


def unlike(local: Sequence[Group], remote: Sequence[Group]) -> str:
    """Return why rows of some shards cannot become rows of others, as a clause; empty if they can.

    Windows, layouts and block sizes may differ. One side may be packed: its rows are packed or
    unpacked by the pull.
    """
    facts: list[tuple[str, object, object]] = [("groups", len(local), len(remote))]
    for nth, (one, other) in enumerate(zip(local, remote, strict=False)):
        numbers = zip(one.numbers, other.numbers, strict=False)
        facts += [
            (f"kv of group {nth}", len(one.widths), len(other.widths)),
            (f"bytes of a row of group {nth}", one.widths, other.widths),
            (f"layers in all of group {nth}", one.layers[2], other.layers[2]),
            (f"heads in all of group {nth}", one.heads[2], other.heads[2]),
            (f"tokens of a page of group {nth}", *_pages(one, other)),
            *((f"numbers of group {nth}", a, b) for a, b in numbers if a and b),
        ]
        if one.encoding and other.encoding:
            facts.append((f"encoding of group {nth}", one.encoding, other.encoding))
    return ", ".join(f"{what}: {a} here and {b} there" for what, a, b in facts if a != b)


def _pages(one: Group, other: Group) -> tuple[int, int]:
    """Return the tokens of a page of each group; those of packed blocks count only between two
    packed groups."""
    pages = []
    for this, that in ((one, other), (other, one)):
        apart = this.encoding and not that.encoding
        pages.append(0 if apart else this.page)
    return pages[0], pages[1]


class Piece(NamedTuple):
    """A part of a box that one owner provides, and its positions (None: all)."""

    owner: int
    box: Box
    ids: Mask | None


def pieces(
    local: Box,
    remote: Sequence[Box],
    offered: Sequence[Mask | None] = (),
    prefer: Sequence[int] = (),
    whole: bool = False,
) -> list[Piece]:
    """Return the pieces that provide each layer, head and position of ``local`` once.

    Several owners provide one cell only if none of them has all positions. Raises `LayoutError`,
    which names the cells without an owner.

    Args:
        local: the reader's box.
        remote: the owners' boxes.
        offered: the positions of each owner, together with those that the reader skips (None: all).
        prefer: the owners to choose first.
        whole: only owners of all of ``local`` count, as for opaque pages.
    """
    order = dict.fromkeys((*prefer, *range(len(remote))))
    candidates = [n for n in order if not whole or overlap(local, remote[n]) == local]
    owners = {n: (remote[n], offered[n] if offered else None) for n in candidates}
    dealt, holes = deal(local, owners)
    if holes:
        shown = [f"{_named(box)}{_positions(mask)}" for box, mask in holes]
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        raise LayoutError(
            f"Expected owners of all of {_named(local)}, got {len(candidates)}"
            f"{' with all of it' if whole else ''}, none of which has "
            f"{', '.join(shown[:_SHOWN])}{more}. Pass a ticket of every owner."
        )
    return dealt


def deal(
    box: Box, owners: Mapping[int, tuple[Box, Mask | None]]
) -> tuple[list[Piece], list[tuple[Box, Mask | None]]]:
    """Deal a box of any number of axes to owners; return the pieces and the parts without an owner.

    Each cell goes to the first owner that has it. Owners of some positions come after all others.
    """
    size = next((len(mask) for _, mask in owners.values() if mask is not None), 1)
    everywhere = np.ones(size, bool)
    masks = {n: everywhere if x is None else x for n, (_, x) in owners.items()}
    dealt = list[Piece]()
    left = [(box, everywhere)]
    for n in sorted(owners, key=lambda n: not masks[n].all()):
        after = []
        for part, wanted in left:
            both = overlap(part, owners[n][0])
            offered = wanted & masks[n]
            if both is None or not offered.any():
                after.append((part, wanted))
                continue
            dealt.append(Piece(n, both, None if offered.all() else offered))
            after += [(other, wanted) for other in rest(part, both)]
            missing = wanted & ~offered
            if missing.any():
                after.append((both, missing))
        left = after
    return dealt, [(part, None if wanted.all() else wanted) for part, wanted in left]


def overlap(one: Box, other: Box) -> Box | None:
    """Return the box that two boxes share; None if they share nothing."""
    both = zip(one, other, strict=True)
    ends = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in both)
    return ends if all(first < past for first, past in ends) else None


def rest(box: Box, part: Box) -> Iterator[Box]:
    """Yield the boxes that remain of a box without a part of it."""
    for axis, ((first, past), (a, b)) in enumerate(zip(box, part, strict=True)):
        for ends in ((first, a), (b, past)):
            if ends[0] < ends[1]:
                yield (*part[:axis], ends, *box[axis + 1 :])


def slices(box: Box, window: Box) -> dict[str, Any]:
    """Return a box on the model's axes as slices of a view that has a window."""
    starts = zip(("layers", "heads"), box, window, strict=True)
    return {axis: slice(a - first, b - first) for axis, (a, b), (first, _) in starts}


def _named(box: Box) -> str:
    (a, b), (c, d) = box
    return f"layers {a}-{b - 1} x heads {c}-{d - 1}"


def _positions(mask: Mask | None) -> str:
    ids = [] if mask is None else np.flatnonzero(mask).tolist()
    shown = arguments.first_few(ids, _SHOWN)
    return f" at positions {shown}" if shown else ""
