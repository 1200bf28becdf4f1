# SPDX-License-Identifier: Apache-2.0
"""Whether the planes of a form lie in memory as a vendor's op expects them: in order, no gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from portakv.view.form import Form, Part
    from portakv.view.view import KVView

#: Orders of a plane's axes, outermost first. ``kv`` stands where key and value alternate.
HND = ("block", "head", "token", "dim")
HND_IN_BLOCKS = ("block", "kv", "head", "token", "dim")
TOKENS = ("token", "head", "dim")


def packed(form: Form, order: Sequence[str]) -> bool:
    """True where each plane of ``form`` has its axes in ``order``, without a gap.

    Where layers lie does not matter.
    """
    if form.opaque or form.paged != ("block" in order):
        return False
    extents = {"block": 0, "kv": form.kv, "head": form.heads, "token": form.block_size}
    return all(
        _packed(part, [(name, extents.get(name, width)) for name in order])
        for part, width in zip(form.parts, form.widths, strict=True)
    )


def _packed(part: Part, axes: Sequence[tuple[str, int]]) -> bool:
    stride = 1
    for name, extent in reversed(axes):
        if name != "kv" and steps(part, name) != [(extent, 0, stride)] * (extent != 1):
            return False
        stride *= extent
    return True


def steps(part: Part, axis: str) -> list[tuple[int, int, int]]:
    """The steps of an axis as (extent, entries of the table, bytes), outermost first."""
    return [(step.extent, step.table, step.stride) for step in part.axis(axis)]


def apart(form: Form) -> int | None:
    """Bytes from key to value behind one address; None where they have none in common."""
    if form.kv != 2:
        return None
    first, second = form.parts
    alike = (first.table, first.layer) == (second.table, second.layer)
    return second.offset - first.offset if alike else None


def planes(view: KVView, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """For each layer the planes of each kv, as `KVView.plane` gives them; kept with the view."""
    key = (planes, dtype)
    if key not in view.derived:
        with torch.inference_mode(False):  # one made in it could not be written outside of it
            view.derived[key] = [
                [view.plane(layer, kv, dtype) for kv in range(view.kv)]
                for layer in range(view.layers)
            ]
    return view.derived[key]  # type: ignore[no-any-return]
