# SPDX-License-Identifier: Apache-2.0
"""Find each byte of a row from the definition of the layout language alone.

A position in a group is a mixed-radix number, outermost factor first. Left groups pick a tensor out
of nested containers, right groups an index into its dimensions. It is meant to be checked by
reading it: nothing is collapsed, merged or vectorised beyond numpy broadcasting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from portakv_conformance.judge.grammar import Axes, Factor, Group, read_layout

Extents = Mapping[str, Any]
# The extent keywords of a view, and the axis that each of them declares.
_DECLARES = {"layers": "layer", "kv": "kv", "block_size": "token", "heads": "head", "dim": "dim"}


def leaves(tensors: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor of nested lists, tuples and dicts, in their order."""
    if isinstance(tensors, torch.Tensor):
        yield tensors
        return
    for item in tensors.values() if isinstance(tensors, Mapping) else tensors:
        yield from leaves(item)


class Rows:
    """Tensors read through a layout string (not a preset name) and declared extents: the address of
    every byte of every row. ValueError where these contradict each other.

    ``extents`` has the keywords of a view: ``layers``, ``kv``, ``block_size``, ``heads``, ``dim``
    (elements: one number, or one for each kv).

    Attributes: ``layers``, ``kv``, ``heads``; ``widths``, the bytes of ``dim`` (of ``page`` when
    ``opaque``) for each kv; ``block_size`` (None when not paged); ``slots``, the tokens that can
    be addressed; ``opaque``; ``axes``, the layout as read.
    """

    def __init__(self, tensors: Any, layout: str, extents: Extents | None = None) -> None:
        self.axes: Axes = read_layout(layout)
        self._nest(tensors)
        # Extents by axis, one for each kv; they differ in `dim` and `page` alone.
        self._extent: dict[str, list[int | None]] = {}
        self._declare({k: v for k, v in (extents or {}).items() if v is not None})
        self._measure()
        self.opaque: bool = self.axes.written("page")
        self.layers, self.kv, self.heads = map(self._whole, ("layer", "kv", "head"))
        content = "page" if self.opaque else "dim"
        self._elements = [self._whole(content, k) for k in range(self.kv)]
        self._itemsize = [self._tensor_of(k).element_size() for k in range(self.kv)]
        both = zip(self._elements, self._itemsize, strict=True)
        self.widths: tuple[int, ...] = tuple(elements * size for elements, size in both)
        paged = self.axes.written("block")
        self.block_size: int | None = self._whole("token") if paged else None
        self.slots: int = self._whole("token") * (self._whole("block") if paged else 1)

    def _nest(self, tensors: object) -> None:
        """Unfold the containers into arrays indexed by one position for each left group."""
        level: list[Any] = [tensors]
        shape: list[int] = []
        for _ in self.axes.left:
            rows = [list(c.values() if isinstance(c, Mapping) else c) for c in level]
            if len({len(row) for row in rows}) != 1:
                lengths = sorted({len(row) for row in rows})
                raise ValueError(
                    f"Expected containers of one length, got lengths {lengths}. Pass as many "
                    f"tensors in each."
                )
            shape.append(len(rows[0]))
            level = [item for row in rows for item in row]
        if not level:
            raise ValueError("Expected at least one tensor in the containers, got none. Pass one.")
        for leaf in level:
            if not isinstance(leaf, torch.Tensor):
                raise ValueError(
                    f"Expected a tensor inside the containers, got {type(leaf)}. Write a group "
                    f"left of the bar for each level of containers."
                )
            if leaf.dim() != level[0].dim():
                ranks = f"{level[0].dim()} and {leaf.dim()}"
                raise ValueError(
                    f"Expected tensors of one rank, got ranks {ranks}. Pass tensors of one shape."
                )
        self.tensors: list[torch.Tensor] = level
        self._rank = level[0].dim()
        self._levels = shape
        strides = [[s * t.element_size() for s in t.stride()] for t in level]
        self._number = np.arange(len(level), dtype=np.int64).reshape(shape)
        self._base = np.array([t.data_ptr() for t in level], dtype=np.int64).reshape(shape)
        rank = [*shape, self._rank]
        sizes = [list(t.shape) for t in level]
        self._sizes = np.array(sizes, dtype=np.int64).reshape(rank)
        self._strides = np.array(strides, dtype=np.int64).reshape(rank)

    def _tensor_of(self, kv: int) -> torch.Tensor:
        """Return the first tensor that holds rows of this kv."""
        return self.tensors[int(self._number[self._container({"kv": kv}, kv)])]

    def _whole(self, axis: str, kv: int = 0) -> int:
        known = self._extent[axis][kv]
        if known is None:
            raise ValueError(
                f"Expected the extent of {axis!r} in {self.axes.text!r}, got none. Declare it."
            )
        return known

    def _declare(self, extents: Extents) -> None:
        if unknown := set(extents) - set(_DECLARES):
            raise ValueError(
                f"Expected some of {[*_DECLARES]}, got {sorted(unknown)}. Remove the others."
            )
        written = self.axes.written
        parts = int(extents.get("kv", 2 if written("kv") else 1))
        self._extent.update(kv=[parts] * parts, block=[None] * parts, page=[None] * parts)
        for keyword in ("layers", "heads", "block_size"):
            self._extent[_DECLARES[keyword]] = [self._declared(keyword, extents)] * parts
        if not written("page") and not (written("block") and written("token")):
            # A chunk has no block_size: its tokens are counted. A block may be of one token.
            self._extent["token"] = [1 if written("block") else None] * parts
        dim = extents.get("dim")
        each = [dim] * parts if dim is None or isinstance(dim, int) else list(map(int, dim))
        if len(each) != parts:
            raise ValueError(
                f"Expected {parts} widths in dim, one for each kv, got {dim}. Pass one number, or "
                f"{parts}."
            )
        self._extent["dim"] = list(each)

    def _declared(self, keyword: str, extents: Extents) -> int | None:
        """Return a declared extent, 1 for an axis that the layout does not have."""
        axis = _DECLARES[keyword]
        declared = extents.get(keyword)
        if axis != "token" and not self.axes.written(axis):
            if declared not in (None, 1):
                raise ValueError(
                    f"Expected extents of axes that the layout has, got {keyword}={declared} for a "
                    f"layout without {axis!r}. Remove {keyword}, or add the axis."
                )
            return 1
        return None if declared is None else int(declared)

    def _measure(self) -> None:
        """Find every extent that is not declared, then check every group against the tensors."""
        every = range(self._whole("kv"))
        groups = [(g, n, every) for g, n in zip(self.axes.left, self._levels, strict=True)]
        for group, length, kvs in groups:
            self._solve(group, length, kvs)
        for kv in every:
            kvs = range(kv, kv + 1) if self.axes.on_left("kv") else every
            for group, length in self._dimensions(self._tensor_of(kv)):
                self._solve(group, length, kvs)
                groups.append((group, length, kvs))
        for group, length, kvs in groups:
            for kv in kvs:
                if self._size(group, kv) != length:
                    text = " ".join(map(str, group)) or "1"
                    expected = self._size(group, kv)
                    raise ValueError(
                        f"Expected length {expected} for ({text}), got {length}. Correct the "
                        f"extents or the layout."
                    )

    def _dimensions(self, tensor: torch.Tensor) -> list[tuple[Group, int]]:
        """Return each right group and the length of its dimension, or dimensions."""
        shape = list(tensor.shape)
        wanted = len(self.axes.right)
        if len(shape) < wanted or (len(shape) > wanted and not self.axes.open_end):
            raise ValueError(
                f"Expected {wanted} dimensions for {self.axes.text!r}, got the shape {shape}. "
                f"Write a group right of the bar for each dimension."
            )
        if self.axes.open_end:
            shape = [*shape[: wanted - 1], math.prod(shape[wanted - 1 :])]
        return list(zip(self.axes.right, shape, strict=True))

    def _solve(self, group: Group, length: int, kvs: range) -> None:
        """Find the extent of the one axis in a group that is not known yet, if there is one."""
        unknown = [f for f in group if f.part != "%" and self._extent[f.axis][kvs[0]] is None]
        if {f.axis for f in unknown} == {"block", "token"}:
            # A flat pool without a declared block size: any block size gives the same bytes.
            self._extent["token"] = [1] * len(self._extent["token"])
            unknown = [f for f in unknown if f.axis == "block"]
        if len(unknown) > 1:
            raise ValueError(
                f"Expected at most one unknown extent in a dimension, got "
                f"{[str(f) for f in unknown]}. Declare all but one."
            )
        for factor in unknown:
            extent = self._extent[factor.axis]
            step = factor.n if factor.part else 1
            alike = kvs if factor.axis in ("dim", "page") else range(len(extent))
            # The length of a group is linear in each axis, so one evaluation at 1 solves it.
            extent[alike.start : alike.stop] = [step] * len(alike)
            parts = length // max(self._size(group, kvs[0]), 1)
            extent[alike.start : alike.stop] = [parts * step] * len(alike)

    def _size(self, group: Group, kv: int) -> int:
        """Return the length of a group. Parts of unequal width lie one after the other."""
        if not group:
            return 1
        first = group[0]
        rest = group[1:]
        if first == Factor("kv"):
            return sum(self._size(rest, k) for k in range(self._whole("kv")))
        if first.part == "%":
            return first.n * self._size(rest, kv)
        whole = self._whole(first.axis, kv)
        if first.part and whole % first.n:
            raise ValueError(
                f"Expected {first.axis!r} to be a multiple of {first.n} for {first}, got {whole}. "
                f"Correct the extent or the factor."
            )
        return whole // max(first.n, 1) * self._size(rest, kv)

    def _position(self, group: Group, at: Extents, kv: int) -> Any:
        """Return the place in a group of the coordinates ``at`` (numpy arrays that broadcast)."""
        if not group:
            return 0
        first = group[0]
        rest = group[1:]
        inner = self._position(rest, at, kv)
        if first == Factor("kv"):
            return sum(self._size(rest, k) for k in range(kv)) + inner
        digit = at.get(first.axis, 0)
        if first.part:
            digit = digit // first.n if first.part == "/" else digit % first.n
        return digit * self._size(rest, kv) + inner

    def _container(self, at: Extents, kv: int) -> tuple[Any, ...]:
        return tuple(self._position(group, at, kv) for group in self.axes.left)

    def row_addresses(self, kv: int, layer: int, slots: object) -> np.ndarray:
        """Return the absolute addresses of rows, int64 ``[len(slots), heads, widths[kv]]``.

        Slots are not negative. For an opaque page the addresses are those of the whole block.
        `IndexError`: there is no such row.
        """
        slots = np.asarray(slots, dtype=np.int64).reshape(-1, 1, 1)
        if slots.size and not (0 <= slots.min() and slots.max() < self.slots):
            raise IndexError(
                f"Expected slots from 0 to {self.slots - 1} for {self.axes.text!r}, got slots from "
                f"{slots.min()} to {slots.max()}. Pass slots of this cache."
            )
        if not (0 <= kv < self.kv and 0 <= layer < self.layers):
            raise IndexError(
                f"Expected a layer below {self.layers} and a kv below {self.kv} for "
                f"{self.axes.text!r}, got layer {layer}, kv {kv}. Pass smaller numbers."
            )
        size = self.block_size
        at: dict[str, Any] = {"kv": kv, "layer": layer}
        at["block"], at["token"] = (0, slots) if size is None else (slots // size, slots % size)
        at["head"] = np.arange(self.heads, dtype=np.int64).reshape(1, -1, 1)
        elements = np.arange(self._elements[kv], dtype=np.int64).reshape(1, 1, -1)
        at["dim"] = elements
        at["page"] = elements
        where = self._container(at, kv)
        address = self._base[where]
        last = len(self.axes.right) - 1
        for dimension, group in enumerate(self.axes.right):
            position = self._position(group, at, kv)
            if dimension == last and self.axes.open_end:
                address = address + self._unravel(position, where, dimension)
            else:
                at_dimension = (*where, dimension)
                address = address + position * self._strides[at_dimension]
        rows = (slots.shape[0], self.heads)
        starts = np.broadcast_to(address, (*rows, self._elements[kv]))[..., None]
        item = np.arange(self._itemsize[kv], dtype=np.int64)
        return np.asarray(starts + item).reshape((*rows, self.widths[kv]))

    def _unravel(self, position: object, where: tuple[Any, ...], first: int) -> Any:
        """Return the byte offset of a position in the trailing dimensions from ``first`` on."""
        offset: Any = 0
        for dimension in reversed(range(first, self._rank)):
            at_dimension = (*where, dimension)
            size = np.maximum(self._sizes[at_dimension], 1)
            offset = offset + position % size * self._strides[at_dimension]
            position = position // size
        return offset
