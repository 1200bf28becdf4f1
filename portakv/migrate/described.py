# SPDX-License-Identifier: Apache-2.0
"""Describe a view as data, for a process that sees its memory at other addresses, and export it.

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
from weakref import WeakValueDictionary

import msgspec
import numpy as np
import torch

from portakv.errors import LayoutError, PortaKVError, Unsupported
from portakv.layout.encodings import Pack
from portakv.layout.language import Factor, Layout
from portakv.migrate.messages import Described, Kind, Region, decoder_of
from portakv.migrate.shards import Shard
from portakv.migrate.shared_memory import (
    Held,
    SharedFiles,
    export,
    export_event,
    flat_bytes,
    proof,
    shared_empty,
    where,
)
from portakv.migrate.words import NameTable, Words
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


# ------------------------------------------------------------------------------------------------
# Export the memory of an owner, for readers that map it.

#: The exports of this process's devices: torch opens device memory of other processes only.
_exports: WeakValueDictionary[tuple[bytes, torch.device], Exports] = WeakValueDictionary()
EVENTS = 64  # recorded after offers' rows, in turn: so many offers have separate events


class Exports:
    """The memory of one epoch of an owner.

    Attributes:
        regions: the allocations and the proof, as readers get them.
        allocations: those that readers may map.
        words: the handle of the page of validity words; empty if nothing may be mapped, or if other
            processes may write the rows after this one has died, when its words hold for ever.
        names: the handle of the table of names; empty if there are no words.
        events: recorded after offers' rows; none if the device cannot export them.
    """

    def __init__(
        self,
        storages: Sequence[torch.UntypedStorage],
        epoch: bytes,
        device: torch.device,
        expose: str,
        words: Words,
        names: NameTable,
    ) -> None:
        self.allocations = list[Held]()
        # The proof is exported like a region, after all others.
        self._proof = proof(epoch, device)
        regions = list[Region]()
        if expose == "mapped":
            names.allocate()
        files = SharedFiles()
        for storage in [*storages, self._proof.untyped_storage()]:
            described_as = storage.nbytes(), where(storage.device)
            try:
                if expose != "mapped":
                    raise Unsupported("Mapping", "the owner exposes staged rows alone")
                self.allocations.append(export(storage, files))
                regions.append(Region(*described_as, self.allocations[-1].handle))
            except Unsupported as error:
                # A reader that cannot map a region reads staged rows of it.
                regions.append(Region(*described_as, why=error.why))
        self.regions = tuple(regions)
        self.words = b""
        self.names = b""
        self.events = list[torch.Event]()
        if self.allocations:
            self.events = _events(device)
            hosts = [x.data_ptr() for x in storages if x.device.type == "cpu"]
            if not any(files.has_name(address) for address in hosts):
                self.allocations.append(words.export(files))
                self.words = self.allocations[-1].handle
                self.allocations.append(names.export(files))
                self.names = self.allocations[-1].handle
        self.event_handles = tuple(export_event(event) for event in self.events)
        if self.allocations and device.type != "cpu":
            _exports[epoch, device] = self

    def flat(self) -> list[torch.Tensor]:
        """Return the regions as this process has them; empty after `close`."""
        held = [each.tensor for each in self.allocations[: len(self.regions)]]
        return [tensor for tensor in held if tensor is not None]

    def close(self) -> None:
        """Release the allocations: no process opens them from now on."""
        for region in self.allocations:
            region.close()


def exports_here(epoch: bytes, device: torch.device) -> Exports | None:
    """Return the exports of an epoch if they are this process's, and lie on this device."""
    return _exports.get((epoch, device))


def _events(device: torch.device) -> list[torch.Event]:
    """Return events for readers' streams to wait for; none if the device cannot export them."""
    if device.type == "cpu":
        return []
    try:
        module = torch.get_device_module(device)
        with module.device(device):
            made = [module.Event(interprocess=True) for _ in range(EVENTS)]
            for event in made:  # the first export binds an event to this device
                export_event(event)
    except (Unsupported, RuntimeError, TypeError):
        return []
    return made
