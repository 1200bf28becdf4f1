# SPDX-License-Identifier: Apache-2.0
"""Dense buffers in which rows lie in the order that they have in another form.

A mirror of host memory on the device turns a scattered copy across the link into a copy inside the
device, and few long runs across the link.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise, takewhile
from math import prod
from typing import Any, NamedTuple

import torch

from portakv.errors import PortaKVError
from portakv.view.bound import bind_layout
from portakv.view.form import Form, Part
from portakv.view.view import KVView

_UNBOUNDED = 0
_OUTERMOST = 1 << 62  # where an axis of extent 1 stands: no step of it is ever made


class _Factor(NamedTuple):
    """A factor of an axis in memory: where one step leads, its name, and its extent."""

    table: int
    stride: int
    name: str
    extent: int  # 0: unbounded


class DenseRows:
    """Dense buffers for rows of a form.

    Args:
        form: whose order the rows keep.
        by_layer: they lie layer by layer instead, in the order that every backend knows.

    Attributes:
        block_size: tokens of a block; 1 where the form is not paged.
        outside: which of ``kv`` and ``layer`` lie outside the tokens, outermost first; an axis of
            extent 1 does not.
    """

    def __init__(self, form: Form, by_layer: bool = False) -> None:
        self.form = form
        self.block_size = form.block_size or 1
        layout, self._shape, extents = _described(form, by_layer)
        self._bound = bind_layout(layout, **extents)
        names = [name for name, n in zip(layout.split(), self._shape, strict=False) if n != 1]
        self.outside = tuple(takewhile(lambda name: name in ("kv", "layer"), names))

    def nbytes(self, slots: int) -> int:
        """Bytes of a buffer for so many slots, a multiple of `block_size`."""
        per = self.block_size if self.form.opaque else 1
        return slots * self.form.token_bytes // per

    def view(self, buffer: torch.Tensor, slots: int) -> KVView:
        """The first bytes of a uint8 buffer as rows of ``slots`` slots."""
        capacity = slots // self.block_size
        shape = [extent or capacity for extent in self._shape]
        return KVView.through(self._bound, buffer[: self.nbytes(slots)].view(shape), lasting=True)


@lru_cache(maxsize=256)
def dense_rows(form: Form, by_layer: bool = False) -> DenseRows:
    """The mirror of a form; made once."""
    return DenseRows(form, by_layer)


def _described(form: Form, by_layer: bool) -> tuple[str, list[int], Mapping[str, Any]]:
    """Layout, shape (0: unbounded) and declared extents of dense rows."""
    if not by_layer:
        layout, shape, extents = _in_order(form)
        try:
            probe = torch.empty([extent or 1 for extent in shape], dtype=torch.uint8)
            KVView(probe, layout, **extents)
            return layout, shape, extents
        except PortaKVError:
            pass  # an order that the language cannot say
    return _by_layer(form)


def _in_order(form: Form) -> tuple[str, list[int], Mapping[str, Any]]:
    """The form's own order in memory, outermost first."""
    factors = sorted(_factors(form), key=lambda f: (f.table, f.stride), reverse=True)
    names = [factor.name for factor in factors]
    shape = [factor.extent for factor in factors]
    if len(set(form.widths)) > 1:
        # Unequal parts lie one behind the other, each with all that lies inside it.
        at = names.index("kv")
        if _UNBOUNDED in shape[at + 1 :]:
            return _by_layer(form)  # the language knows no parts whose lengths depend on a buffer's
        inner = [n for n in shape[at + 1 :] if n]
        each = prod(inner[:-1]) if inner else 1
        shape = [*shape[:at], each * sum(form.widths)]
        names = [*names[:at], f"({' '.join(names[at:])})"]
    return " ".join(names), shape, _extents(form)


def _by_layer(form: Form) -> tuple[str, list[int], Mapping[str, Any]]:
    """Layer by layer: an order that every form has."""
    each = form.heads * sum(form.widths)
    if form.opaque:
        return "layer block (kv page)", [form.layers, _UNBOUNDED, each], _extents(form)
    if form.paged:
        shape = [form.layers, _UNBOUNDED, form.block_size, each]
        return "layer block token (kv head dim)", shape, _extents(form)
    return "layer token (kv head dim)", [form.layers, _UNBOUNDED, each], _extents(form)


def _extents(form: Form) -> Mapping[str, Any]:
    known: dict[str, Any] = {"layers": form.layers, "kv": form.kv, "dim": tuple(form.widths)}
    if form.block_size:
        known["block_size"] = form.block_size
    if not form.opaque:
        known["heads"] = form.heads
    return known


def _factors(form: Form) -> list[_Factor]:
    """Every factor of a form's axes, by its first part."""
    part = form.parts[0]
    found = [_kv(form.parts)]
    inner = "page" if form.opaque else "dim"
    for axis, name in (("layer", "layer"), ("block", "block"), ("token", "token"),
                       ("head", "head"), ("dim", inner)):  # fmt: skip
        if form.opaque and axis in ("token", "head"):
            continue
        if axis == "block" and not form.paged:
            continue
        found += _split(part, axis, name)
    return found


def _kv(parts: Sequence[Part]) -> _Factor:
    steps = {(b.table - a.table, b.offset - a.offset) for a, b in pairwise(parts)}
    table, stride = steps.pop() if len(steps) == 1 else (0, _OUTERMOST)
    return _Factor(table, stride, "kv", len(parts))


def _split(part: Part, axis: str, name: str) -> list[_Factor]:
    steps = part.axis(axis)
    if not steps:
        return [_Factor(0, 1 if axis == "dim" else _OUTERMOST, name, 1)]
    if len(steps) == 1:
        (step,) = steps
        return [_Factor(step.table, step.stride, name, step.extent)]
    below = prod(step.extent for step in steps[1:])
    outer, *rest = steps
    found = [_Factor(outer.table, outer.stride, f"{name}/{below}", outer.extent)]
    if len(rest) == 1:
        return [*found, _Factor(rest[0].table, rest[0].stride, f"{name}%{below}", below)]
    return [*found, *(_Factor(s.table, s.stride, f"{name}%?", s.extent) for s in rest)]
