# SPDX-License-Identifier: Apache-2.0
"""Chunks: how memory objects are read beside the caches that they belong to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from portakv.errors import LayoutError
from portakv.layout.language import parse
from portakv.layout.presets import resolve
from portakv.view.bound import Reading, read_as
from portakv.view.index import Index
from portakv.view.view import KVView

#: A chunk from its first token on.
WHOLE = Index()

Job = tuple[KVView, Index, int]  # a chunk, the cache's index, tokens


class ChunkReader:
    """Reads memory objects in one chunk layout, with every extent that the cache view knows."""

    def __init__(self, cache: KVView, layout: str) -> None:
        self._cache = cache
        self._layout = layout
        self._readings: dict[int, Reading] = {}
        self._batch_readings: dict[int, Reading] = {}

    def read(self, memory_obj: Any) -> KVView:
        """The view of one memory object: a tensor, or anything with ``.tensor``.

        Raises:
            LayoutError: it does not hold rows of these caches.
        """
        tensor = probe = memory_obj
        if not isinstance(memory_obj, torch.Tensor):
            tensor = _tensor_of(memory_obj)
            probe = tensor if isinstance(tensor, torch.Tensor) else _first_tensor(tensor)
        itemsize = probe.itemsize
        reading = self._readings.get(itemsize)
        if reading is None:
            extents = _known_extents(self._cache, resolve(self._layout)[0], itemsize)
            reading = self._readings[itemsize] = read_as(self._layout, **extents)
        try:
            return KVView.through(reading, tensor)
        except LayoutError as error:
            raise LayoutError(
                f"The memory_obj does not hold chunks of these caches. {error} (Its dtype is "
                f"{probe.dtype}, the caches' {self._cache.owners[0].dtype}; widths are compared "
                f"in bytes.)"
            ) from error

    def sets(self, jobs: Sequence[Job]) -> list[tuple[KVView, Index, Index, int]]:
        """Chunks of equal form as one paged view: (view, its index, cache index, tokens)."""
        groups: dict[Any, list[Job]] = defaultdict(list)
        for job in jobs:
            if job[2]:
                # Equal in bytes is not enough: one view has tensors of one shape and dtype.
                chunk, first = job[0], job[0].owners[0]
                kind = (chunk.device, first.dtype, first.shape, first.stride())
                groups[chunk.form, chunk.slots, kind].append(job)
        found = []
        for members in groups.values():
            layout = members[0][0].layout
            if len(members) == 1 or layout.containers or layout.paged:
                found += [(chunk, WHOLE, index, count) for chunk, index, count in members]
                continue
            reading = self._batch_reading(members[0][0])
            view = KVView.through(reading, [chunk.tensors for chunk, _, _ in members])
            found.append((view, *_joined(members)))
        return found

    def _batch_reading(self, chunk: KVView) -> Reading:
        """A list of such chunks as one paged view, each a block."""
        itemsize = chunk.owners[0].dtype.itemsize
        reading = self._batch_readings.get(itemsize)
        if reading is None:
            text = f"block | {chunk.layout.text}"
            extents = _known_extents(self._cache, text, itemsize)
            extents.pop("block_size", None)
            reading = self._batch_readings[itemsize] = read_as(text, **extents)
        return reading


def _known_extents(cache: KVView, layout: str, itemsize: int) -> dict[str, Any]:
    parsed = parse(layout)
    extents: dict[str, Any] = {}
    for name, axis, value in (
        ("layers", "layer", cache.layers),
        ("kv", "kv", cache.kv),
        ("heads", "head", cache.heads),
    ):
        if axis in parsed.axes or value != 1:
            extents[name] = value
    if any(width % itemsize for width in cache.widths):
        raise LayoutError(
            f"The memory_obj's elements have {itemsize} bytes, which do not divide the caches' "
            f"rows of {cache.widths} bytes for each kv and head; use a dtype of their width."
        )
    extents["dim"] = [width // itemsize for width in cache.widths]
    if parsed.opaque or (parsed.paged and parsed.shares("token")):
        extents["block_size"] = cache.block_size
    return extents


def _joined(members: list[tuple[KVView, Index, int]]) -> tuple[Index, Index, int]:
    """(index of the chunks' view, index of the cache, tokens) for several jobs as one."""
    slots = members[0][0].slots
    total = sum(count for _, _, count in members)
    ids = [index for _, index, _ in members]
    shared = ids[0]
    follow, at = True, shared.offset
    for _, index, count in members:
        follow &= index.ids is shared.ids and index.step == shared.step and index.offset == at
        at += count
    if not follow:
        shared = Index.joined([(index, count) for _, index, count in members])
    if all(count == slots for _, _, count in members[:-1]):
        return Index(), shared, total
    rows = [
        torch.arange(i * slots, i * slots + count, device="cpu")
        for i, (_, _, count) in enumerate(members)
    ]
    return Index(torch.cat(rows)), shared, total


def _tensor_of(memory_obj: Any) -> Any:
    tensor = getattr(memory_obj, "tensor", memory_obj)
    if not isinstance(tensor, (torch.Tensor, list, tuple, Mapping)):
        raise LayoutError(
            f"memory_obj is a {type(memory_obj).__name__}; expected a tensor, the containers that "
            f"chunk_layout names, or an object with one of these as `.tensor`."
        )
    return tensor


def _first_tensor(level: Any) -> torch.Tensor:
    while not isinstance(level, torch.Tensor):
        if not isinstance(level, (list, tuple, Mapping)):
            raise LayoutError(
                f"The memory_obj holds a {type(level).__name__}; expected tensors in the "
                f"containers that chunk_layout names."
            )
        items = list(level.values()) if isinstance(level, Mapping) else list(level)
        if not items:
            raise LayoutError("The memory_obj is an empty container; pass its tensors.")
        level = items[0]
    return level
