# SPDX-License-Identifier: Apache-2.0
"""Describe a view as data, for a process that sees its memory at other addresses.

A description has the arguments of `KVView`, with places in regions in place of tensors. `rebuild`
makes all checks of `KVView` again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import msgspec
import numpy as np
import torch

from portakv.errors import LayoutError, PortaKVError
from portakv.layout.encodings import Pack
from portakv.layout.language import Factor, Layout
from portakv.migrate.messages import Described, Kind, decoder_of
from portakv.migrate.shards import Shard
from portakv.migrate.shared_memory import flat_bytes, shared_empty
from portakv.view import KVView
from portakv.view.bound import reach

#: Bytes between the starts of two scratch tensors: more than the widest vector of a kernel.
APART = 256
_NORESERVE = 0x4000  # Linux; not every Python's mmap has a name for it


class Regions:
    """The allocations of tensors, each once. The object retains them."""

    def __init__(self) -> None:
        self.storages: list[torch.UntypedStorage] = []
        self._numbers: dict[tuple[int, int], int] = {}

    def add(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Return the number of a tensor's allocation, and the tensor's byte offset in it."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        if key not in self._numbers:
            self._numbers[key] = len(self.storages)
            self.storages.append(storage)
        return self._numbers[key], tensor.data_ptr() - storage.data_ptr()

    def flat(self) -> list[torch.Tensor]:
        """Return each allocation as a flat uint8 tensor."""
        return [flat_bytes(storage) for storage in self.storages]


def describe(shard: Shard, regions: Regions) -> Described:
    """Return a shard as data, and add its allocations to ``regions``.

    Raises:
        LayoutError: a view of raw addresses, a slice of a view, more tensors than a message
            holds, or memory that was replaced after the view was made.
    """
    view = shard.view
    sizes = []
    if view.raw:
        raise LayoutError(
            f"Expected a view of tensors, got {view} of raw addresses. Make the view of tensors."
        )
    level: list[Any] = [view.tensors]
    for _ in view.layout.containers:
        rows = [[*x.values()] if isinstance(x, Mapping) else [*x] for x in level]
        sizes.append(len(rows[0]))
        level = [tensor for row in rows for tensor in row]
    kinds: dict[Kind, int] = {}
    places = []
    for tensor in level:
        kind = str(tensor.dtype).partition(".")[2], tuple(tensor.shape), tensor.stride()
        places.append((*regions.add(tensor), kinds.setdefault(kind, len(kinds))))
    described = Described(
        *(shard.group, view.layout.text, tuple(kinds), tuple(sizes), tuple(places)),
        view.block_size or 0,
    )
    try:
        decoder_of(Described).decode(msgspec.msgpack.encode(described))
        seen = rebuild(described, regions.flat()).view
        why = "" if (seen.form, seen.origins) == (view.form, view.origins) else f"they are {seen}"
    except (LayoutError, msgspec.ValidationError) as error:
        why = str(error.__context__ or error)
    if why:
        raise LayoutError(
            f"{view} cannot be described by its {len(places)} tensors: {why.rstrip('.')}. If it is "
            f"a slice, pass the whole view and its whole window: readers take the part that they "
            f"need. Otherwise make the view again, of few tensors that still have their memory."
        )
    return described


def rebuild(described: Described, regions: Sequence[torch.Tensor]) -> Shard:
    """Return the shard of a description on the regions of this process, each flat uint8.

    Touches no byte of the regions.

    Raises:
        LayoutError: the description is wrong.
    """
    group = described.group
    try:
        kinds = [(_dtype(name), shape, strides) for name, shape, strides in described.kinds]
        tensors: list[Any] = []
        for number, offset, kind in described.places:
            tensors.append(strided(regions[number], offset, *kinds[kind]))
        if len(tensors) != prod(described.containers):
            raise LayoutError(f"{len(tensors)} places in containers of {described.containers}")
        for size in reversed(described.containers):
            tensors = [tensors[at : at + size] for at in range(0, len(tensors), size)]
        size = max(dtype.itemsize for dtype, _, _ in kinds)
        extents: dict[str, Any] = {
            "layers": group.layers[1] - group.layers[0],
            "heads": group.heads[1] - group.heads[0],
            "kv": len(group.widths),
            "dim": [width // size for width in group.widths] if len(kinds) == 1 else None,
            "block_size": described.block_size or None,
            "reinterpret": not group.numbers,
        }
        if group.encoding:
            extents["dim"] = [width // 2 for width in group.widths]
            extents["encoding"] = Pack.of_text(group.encoding)
        view = KVView(tensors[0], described.layout, **extents)
        shard = Shard(view, group.layers, group.heads)
        if shard.group != group:
            raise LayoutError(f"expected {group}, got {shard.group}")
    except (PortaKVError, ArithmeticError, LookupError, RuntimeError, ValueError) as error:
        raise LayoutError(
            f"Expected a view of {described.layout!r} that fits its {len(regions)} regions, got "
            f"another: {str(error).rstrip('.')}. Describe a view together with its regions."
        ) from None
    return shard


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise LayoutError(f"expected a dtype of torch {torch.__version__}, got {name}")
    return dtype


def strided(
    region: torch.Tensor,
    offset: int,
    dtype: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[int],
) -> torch.Tensor:
    """Return a tensor in a region; raise `LayoutError` if the region does not contain it.

    `as_strided` never grows the region.
    """
    size = dtype.itemsize
    if len(shape) != len(strides):
        raise LayoutError(f"{len(shape)} extents with {len(strides)} strides")
    ends = offset + reach(shape, strides) * dtype.itemsize
    if offset % size or ends > region.numel():
        raise LayoutError(f"bytes {offset} to {ends} of a region of {region.numel()}, as {dtype}")
    whole = region[: region.numel() // size * size].view(dtype)
    return whole.as_strided(shape, strides, whole.storage_offset() + offset // size)


def reserve(nbytes: int) -> torch.Tensor:
    """Reserve addresses for a region that is not mapped: uint8 without memory or access rights.

    Views on the tensor compute where rows lie. Reading it ends the process.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    tensor = torch.frombuffer(mmap.mmap(-1, max(nbytes, 1), flags=flags), dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.numel()), 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return tensor[:nbytes]


def can_resize(shard: Shard) -> bool:
    """Return whether `scratch_like` can make blocks of another size."""
    return _alone(shard.view.layout, "token") is not None


def scratch_like(shard: Shard, size: int, tokens: int, *, listed: bool = False) -> Shard:
    """Return a shard of the same rows over new memory, with blocks of ``size`` tokens for so many
    tokens. With the shard's own size a block has the same strides.

    ``listed``: the addresses of layers become a table, as those of separate allocations do, and no
    stride. So copies use the same kernels.
    """
    described = describe(shard, Regions())
    layout = shard.view.layout
    blocks = -(-tokens // size)
    kinds = tuple(
        _resized(kind, layout, shard.view.block_size or size, size, blocks)
        for kind in described.kinds
    )
    places = list[tuple[int, int, int]]()
    nbytes = 0
    for _, _, kind in described.places:
        places.append((0, nbytes, kind))
        name, shape, strides = kinds[kind]
        nbytes += -(-reach(shape, strides) * _dtype(name).itemsize // APART) * APART
    if listed:  # the last layer first: no stride leads backwards
        numbers = np.arange(len(places)).reshape(described.containers)
        for level, group in enumerate(layout.containers):
            if Factor("layer") in group.factors:
                numbers = np.flip(numbers, axis=level)
        places = [places[number] for number in numbers.flat]
    device = shard.view.device
    if device.type == "cpu":
        region = shared_empty(nbytes, torch.uint8)
    else:
        with torch.inference_mode(False):  # threads write it that are in no such mode
            region = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    block_size = size if described.block_size else 0
    changed: Described = msgspec.structs.replace(
        described, kinds=kinds, places=tuple(places), block_size=block_size
    )
    return rebuild(changed, [region])


def _resized(kind: Kind, layout: Layout, own: int, size: int, blocks: int) -> Kind:
    """Return the kind of a tensor with other blocks: their size and their number."""
    name, shape, strides = kind
    extents = [*shape]
    at = _alone(layout, "block")
    if at is None:
        # One dimension has all slots.
        (at,) = [n for n, group in enumerate(layout.dims) if Factor("block") in group.factors]
        extents[at] = blocks * size
    else:
        extents[at] = blocks
    if size == own:
        return name, tuple(extents), strides
    token = _alone(layout, "token")
    if token is not None:
        extents[token] = size
    order = sorted(range(len(extents)), key=lambda n: -strides[n])
    dense = [0] * len(extents)
    step = 1
    for n in reversed(order):
        dense[n] = step
        step *= extents[n]
    return name, tuple(extents), tuple(dense)


def _alone(layout: Layout, axis: str) -> int | None:
    """Return the dimension of a tensor that is this axis alone; None if there is none."""
    for number, group in enumerate(layout.dims):
        if group.factors == (Factor(axis),):
            return number
    return None
