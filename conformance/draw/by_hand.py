# SPDX-License-Identifier: Apache-2.0
"""Copies written down by hand: caches and chunks of a shape, for the fixed table of cases.

`strategies` draws such structures, here a case says what it wants. Seeds decide the bytes, and
which slots a shuffled list holds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partialmethod
from typing import Any, TypeAlias

import torch

from portakv_conformance.draw.arrangement import Arrangement, Case, Keywords, Side, side_of
from portakv_conformance.judge.grammar import Group, read_layout
from portakv_conformance.judge.pattern import Guarded

Ids: TypeAlias = "Sequence[int] | torch.Tensor | None"
DIRECTIONS = ("gather", "scatter")
PAGED = "layer | kv block token head dim"
CHUNK = "kv layer token (head dim)"
#: Layouts of caches; CORE is judged in the first that a backend takes. The last two need no table
#: of addresses, the last not even a loop.
BASE_LAYOUTS = (
    PAGED,
    "layer | kv block head token dim",
    "layer kv | block token head dim",
    "layer kv | block head token dim",
    "block layer kv token head dim",
    "block token layer kv head dim",
)
#: Layouts of chunks, for caches whose rows do not go to `CHUNK` in the fewest loops.
_CHUNKS = {BASE_LAYOUTS[-1]: "token layer kv (head dim)"}
_ELSEWHERE = 1000  # storage numbers of destinations, so that no source has the same bytes


@dataclass(frozen=True)
class Shape:
    """The shape that both sides of a copy share, and the paging of a cache.

    ``widths`` are bytes, one for each kv; ``page`` bytes for pages.
    """

    layers: int = 2
    heads: int = 2
    widths: tuple[int, ...] = (32, 32)
    block_size: int = 4
    blocks: int = 6

    @property
    def slots(self) -> int:
        """Return the number of tokens that a cache of this shape holds."""
        return self.block_size * self.blocks


def arranged(
    layout: str,
    shape: Shape,
    dtype: torch.dtype = torch.float16,
    *,
    source: bool = True,
    tokens: int = 0,
    memory: str = "",
    shift: int = 0,
    **how: Any,
) -> Arrangement:
    """Return the arrangement of the tensors of a layout.

    ``tokens`` if it is a chunk's; ``how`` are fields of `Arrangement`. A ``source`` is filled with
    the pattern, a destination with poison. ``memory`` is the physical order of the groups right of
    the bar, outermost first, if it is not the logical one; with the group left of it among them,
    all containers lie in one storage at equal distances. ``shift`` is the storage offset of the
    first tensor, in elements.
    """
    axes = read_layout(layout)
    opaque = axes.written("page")
    paged = axes.written("block")
    extents: Keywords = {
        "layer": shape.layers,
        "head": shape.heads,
        "kv": len(shape.widths),
        "block": shape.blocks if paged else 1,
        "token": shape.block_size if paged else tokens,
        "page" if opaque else "dim": tuple(width // dtype.itemsize for width in shape.widths),
    }
    names = _names(axes.right)
    order = list(range(len(names)))
    if memory:
        names.append(" ".join(_names(axes.left)))
        order = [names.index(name) for name in _names(read_layout(memory).right)]
        if len(order) == len(names):
            how["place"] = "strided"
    elif how.get("place") == "strided":
        order = [len(order), *order]
    how = {
        "kinds": (list,) * len(axes.left),
        "storage": 0 if source else _ELSEWHERE,
        "poison": not source,
        "offset": shift,
        "order": tuple(order),
        **how,
    }
    return Arrangement(layout, dtype, extents, **how)


def widened(layout: str, axis: str, elements: int) -> Keywords:
    """Return keywords of `arranged` that make an axis of a layout, if it is a dimension, lie
    ``elements`` further apart."""
    place = dimension(layout, axis)
    return {} if place is None else {"pads": {place + 1: elements}}


def reordered(layout: str, axes: str) -> str:
    """Return the dimensions of a layout in the order of ``axes``, as ``memory`` of `arranged`.

    Dimensions that are not in ``axes`` come outermost; axes that are not a dimension are skipped.
    """
    left = _names(read_layout(layout).left)
    names = _names(read_layout(layout).right)
    known = names + left if len(left) == 1 else names
    wanted = [axis for axis in axes.split() if axis in known]
    return " ".join([*(name for name in names if name not in wanted), *wanted])


def dimension(layout: str, axis: str) -> int | None:
    """Return the dimension of a layout that is an axis; None if none is."""
    names = _names(read_layout(layout).right)
    return names.index(axis) if axis in names else None


def _names(groups: Sequence[Group]) -> list[str]:
    words = [" ".join(map(str, group)) or "1" for group in groups]
    return [f"({w})" if len(group) > 1 else w for w, group in zip(words, groups, strict=True)]


@dataclass(frozen=True)
class Workshop:
    """Makes sides on one device, from one seed of bytes and of shuffled lists; ``paged`` is the
    layout of caches that name none."""

    device: str = "cpu"
    seed: int = 0
    paged: str = PAGED

    @property
    def dense(self) -> str:
        """Return the layout of chunks that name none."""
        return _CHUNKS.get(self.paged, CHUNK)

    def cache(
        self,
        shape: Shape,
        ids: Ids = None,
        *,
        layout: str = "",
        step: int = 1,
        offset: int = 0,
        **how: Any,
    ) -> Side:
        """Return a paged cache under slots, or under blocks if ``step`` is the block size."""
        to = arranged(layout or self.paged, shape, **self._own(how))
        return side_of(to, self.ids(ids), step, offset)

    def chunk(
        self, shape: Shape, tokens: int, *, layout: str = "", offset: int = 0, **how: object
    ) -> Side:
        """Return a chunk of so many tokens, from its token ``offset`` on."""
        to = arranged(layout or self.dense, shape, tokens=tokens, **self._own(how))
        return side_of(to, None, 1, offset)

    def _own(self, how: Keywords) -> Keywords:
        return {"seed": self.seed, "device": self.device, **how}

    def move(
        self,
        direction: str,
        shape: Shape,
        ids: Any,
        chunk: Keywords | None = None,
        **how: Any,
    ) -> Case:
        """Return a case of `DIRECTIONS`.

        ``how`` describes the cache, ``chunk`` the chunk; both have one dtype by default.
        """
        ids = self.ids(ids)
        source = direction == "gather"
        count = len(ids) * how.get("step", 1) - how.get("offset", 0)
        dense = {"dtype": how.get("dtype", torch.float16), **(chunk or {})}
        made = self.chunk(shape, max(count, 1), source=not source, **dense)
        return between(direction, self.cache(shape, ids, source=source, **how), made, count)

    gather = partialmethod(move, "gather")
    scatter = partialmethod(move, "scatter")

    def some(
        self, direction: str, shape: Shape, count: int, holes: int = 0, *chunk: Any, **how: Any
    ) -> Case:
        """Return a case under `shuffled` ids; the rest is as for `move`."""
        ids = self.shuffled(shape.slots // how.get("step", 1), count, holes)
        return self.move(direction, shape, ids, *chunk, **how)

    def ids(self, ids: Ids) -> torch.Tensor | None:
        """Return ids as a tensor: int64 on the host if they are a list."""
        if ids is None or isinstance(ids, torch.Tensor):
            return ids
        return torch.tensor(ids, dtype=torch.int64)

    def shuffled(self, units: int, count: int, holes: int = 0) -> list[int]:
        """Return ``count`` shuffled numbers below ``units``, ``holes`` of them negative."""
        rng = random.Random(self.seed)
        numbers = rng.sample(range(units), count)
        for place in rng.sample(range(count), holes):
            numbers[place] = rng.choice((-1, -2, -100))
        return numbers


def between(direction: str, cache: Side, chunk: Side, count: int) -> Case:
    """Return the copy of a direction between a cache and a chunk."""
    return Case(cache, chunk, count) if direction == "gather" else Case(chunk, cache, count)


def moved(side: Side, guards: list[Guarded]) -> Side:
    """Return a side with its tensors over other storages, one for each; lists stay lists."""
    by_address = dict(zip((g.whole.data_ptr() for g in side.guards), guards, strict=True))

    def move(level: Any) -> Any:
        if not isinstance(level, torch.Tensor):
            return [move(item) for item in level]
        whole = by_address[level.untyped_storage().data_ptr()].whole
        made = torch.empty(0, dtype=level.dtype, device=whole.device)
        where = (level.storage_offset(), level.shape, level.stride())
        return made.set_(whole.untyped_storage(), *where)

    return replace(side, tensors=move(side.tensors), guards=guards, arrangement=None)


def on_host(side: Side, pinned: bool) -> Side:
    """Return a side with its tensors on the host, pinned if requested, with the same bytes."""
    if not pinned and all(guard.whole.device.type == "cpu" for guard in side.guards):
        return side
    guards = [replace(guard, whole=guard.whole.cpu()) for guard in side.guards]
    if pinned:
        guards = [replace(guard, whole=guard.whole.pin_memory()) for guard in guards]
    return moved(side, guards)


def lifted(side: Side, nbytes: int) -> Side:
    """Return a side in storages that begin ``nbytes`` after an address of the allocator, as
    those of tensors do that another library made; storage offsets stay as they are."""
    guards = []
    for guard in side.guards:
        wide = guard.whole.new_empty(guard.whole.numel() + nbytes)
        part = wide.untyped_storage()[nbytes:]
        whole = wide.new_empty(0).set_(part)
        guards.append(replace(guard, whole=whole.copy_(guard.whole)))
    return moved(side, guards)
