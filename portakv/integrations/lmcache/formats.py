# SPDX-License-Identifier: Apache-2.0
"""Views over the caches and the memory objects of LMCache's ops, with LMCache's formats as layouts.

The module imports no engine. To add a format, add its preset, and raise the number in `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import prod
from typing import Any, NamedTuple, SupportsInt, TypeAlias

import numpy as np
import torch

from portakv import Index, KVView, LayoutError, Unsupported
from portakv.layout.presets import PRESETS
from portakv.runtime.bounded import Bounded

_BLOCKED_SCALES = 14
_PLANES = 17
#: The layout of each format's caches, by the number in LMCache's EngineKVFormat. Formats 10 to 13
#: have keys and values next to each other in one row; here that is one plane, as in an object.
LAYOUTS = {number: PRESETS[f"lmcache-{number}"].layout for number in range(19)} | {
    10: "layer | block head token dim",
    11: "layer | block token head dim",
    _BLOCKED_SCALES: "layer | block (kv token dim)",  # in each block the values, then the scales
}
MLA = (3, 5, _BLOCKED_SCALES, _PLANES)
#: The formats whose rows have keys and values next to each other.
FUSED = (10, 11, 12, 13)
_SCALE = 4  # bytes of a token's scale in a blocked-scale cache
_views: Bounded[Hashable, KVView] = Bounded("views of LMCache's pools", 64)
_WORDS = (torch.int64, torch.uint64)
#: Devices whose torch storages PortaKV cannot address, so that views are made of tensors.
NO_ADDRESSES = ("npu",)
#: A table of addresses, a tensor, or tensors in the containers that the layout names.
Caches: TypeAlias = "torch.Tensor | Sequence[Any]"
#: A memory object: its tensor, or its address.
MemoryObject: TypeAlias = "torch.Tensor | int"


#: LMCache's ``PageBufferShapeDesc``: layers, blocks, tokens of a block, heads, elements of a head
#: and bytes of an element of caches that are passed by addresses.
ShapeDesc: TypeAlias = Any


class Format(NamedTuple):
    """One of LMCache's formats.

    Attributes:
        number: its number in LMCache's EngineKVFormat.
        layout: the layout of its caches.
        two_planes: an object has a plane of keys and a plane of values.
    """

    number: int
    layout: str
    two_planes: bool

    @property
    def containers(self) -> str:
        """Return the axes of the containers in the layout, empty for one tensor."""
        return self.layout.rpartition(" | ")[0]

    @property
    def dims(self) -> str:
        """Return the axes of each tensor in the layout."""
        return self.layout.rpartition(" | ")[2]


class Pool(NamedTuple):
    """The shape of caches that are passed by addresses.

    Attributes:
        layers: the number of layers.
        blocks: the number of blocks; -1: unknown.
        block_size: tokens of a block.
        heads: the number of heads.
        row: bytes of one head's row.
        step: bytes from a block to the next; 0: the blocks are dense.
    """

    layers: int
    blocks: int
    block_size: int
    heads: int
    row: int
    step: int = 0

    def memory(self, dims: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Return the shape of a tensor of bytes with these dimensions, and its strides; None: it is
        contiguous."""
        sizes = {"layer": self.layers, "kv": 2, "block": self.blocks, "token": self.block_size}
        sizes |= {"head": self.heads, "dim": self.row, "1": 1}
        sizes["slots"] = max(self.blocks * self.block_size, -1)
        names = _names(dims)
        if self.blocks < 0 and names[0] not in ("block", "slots"):
            raise LayoutError(
                f"Expected blocks as the outermost dimension of caches with an unknown number of "
                f"blocks, got {dims!r}. Pass page_buffer_size."
            )
        shape = tuple(sizes[each] for each in names)
        if not self.step or names[0] != "block":
            return shape, None
        inner = (prod(shape[at + 1 :]) for at in range(1, len(shape)))
        return shape, (self.step, *inner)


def pool_of(desc: ShapeDesc) -> Pool:
    """Return the shape of caches as LMCache describes it."""
    size = int(desc.element_size)
    return Pool(
        layers=int(desc.nl),
        blocks=int(desc.nb),
        block_size=int(desc.bs),
        heads=int(desc.nh),
        row=int(desc.hs) * size,
        step=int(getattr(desc, "block_stride_elems", 0) or 0) * size,
    )


def _names(dims: str) -> list[str]:
    """Return the name of each dimension of a tensor of the caches."""
    return dims.replace("(block token)", "slots").replace("(kv token dim)", "token dim").split()


# --- Views of caches ------------------------------------------------------------------------------


def format_of(engine_kv_format: SupportsInt) -> Format:
    """Return a format by LMCache's number.

    Raises:
        Unsupported: the number is unknown.
    """
    number = int(engine_kv_format)
    if number not in LAYOUTS:
        raise Unsupported(
            f"Caches of LMCache's format {engine_kv_format}",
            f"PortaKV knows formats 0 to {max(LAYOUTS)}; install a release that knows this format",
        )
    layout = LAYOUTS[number]
    return Format(number, layout, "kv" in layout.split() and number != _PLANES)


def caches_of(
    engine_kv_format: SupportsInt, caches: Caches, pool: Pool, device: torch.device
) -> KVView:
    """Return the caches of a call as a view.

    A view of addresses holds no memory and is cached. Tensors of several shapes, and tensors on a
    device of `NO_ADDRESSES`, become a view that holds them and is made for each call.

    Raises:
        TypeError: neither a table nor tensors, or no layers.
    """
    form = format_of(engine_kv_format)
    if not isinstance(caches, (torch.Tensor, Sequence)) or not len(caches):
        raise TypeError(
            f"Expected a table of addresses, or tensors, of at least one layer for LMCache's "
            f"format {form.number}, got {caches!r}. Pass the caches."
        )
    version: Hashable = 0
    at: tuple[int, ...] | torch.Tensor | None = None
    if isinstance(caches, torch.Tensor):
        if caches.dim() == 1 and caches.dtype in _WORDS:
            at = tuple(caches.tolist()) if caches.is_cpu else caches
    elif isinstance(caches[0], int):
        at = tuple(caches)
    if isinstance(at, torch.Tensor):
        # Torch does not count writes to an inference tensor, so its view is never reused.
        version = object() if at.is_inference() else at._version
    if at is not None:
        shape, strides = pool.memory(form.dims)
        memory = shape, strides, torch.uint8
        return _known_view(version, form, at, memory, pool.block_size, device)

    leaves = _leaves(form, caches)
    kinds = {(x.shape, x.stride(), x.dtype) for x in leaves}
    first = _like(leaves[0], form.dims, pool)
    if device.type in NO_ADDRESSES or len(kinds) > 1:
        shaped = [_like(x, form.dims, pool) for x in leaves]
        extents = _extents(form, first.shape, first.dtype, pool.block_size)
        tensors: Any = shaped if form.containers else first
        if "kv" in form.containers:
            by_plane = form.containers == "kv layer"
            inner = len(shaped) // 2 if by_plane else len(caches[0])
            tensors = [shaped[x : x + inner] for x in range(0, len(shaped), inner)]
            extents["kv"] = 2 if by_plane else inner
        return KVView(tensors, form.layout, **extents, reinterpret=True)
    addresses = tuple(x.data_ptr() for x in leaves)
    memory = (tuple(first.shape), first.stride(), first.dtype)
    return _known_view(version, form, addresses, memory, pool.block_size, device)


def _known_view(version: Hashable, *terms: Any) -> KVView:
    """Return a view of `_view`.

    Args:
        version: differs after torch wrote to a table on a device.
    """
    return _views.get_or_make((version, *terms), lambda: _view(*terms))


def _view(
    form: Format,
    at: tuple[int, ...] | torch.Tensor,
    memory: tuple[tuple[int, ...], tuple[int, ...] | None, torch.dtype],
    block_size: int,
    device: torch.device,
) -> KVView:
    """Return the view of caches at addresses.

    Args:
        at: the addresses, or a table of them on a device.
        memory: shape, strides and dtype of the tensor at each address; strides None: contiguous.
    """
    shape, strides, dtype = memory
    addresses: Any = at
    if "kv" in form.containers:
        planes = (2, -1) if form.containers == "kv layer" else (-1, 2)
        addresses = at.view(planes) if isinstance(at, torch.Tensor) else np.reshape(at, planes)
    return KVView.at(
        addresses,
        form.layout,
        shape=shape,
        strides=strides,
        dtype=dtype,
        device=device,
        **_extents(form, shape, dtype, block_size),
        reinterpret=True,
    )


def _extents(
    form: Format, shape: Sequence[int], dtype: torch.dtype, block_size: int
) -> dict[str, Any]:
    """Return the extents of caches that their tensors do not show."""
    if form.number == _BLOCKED_SCALES:
        scale = _SCALE // dtype.itemsize
        return {"block_size": shape[1], "dim": (shape[2] - scale, scale)}
    if "(block token)" in form.layout:
        return {"block_size": block_size}
    return {}


def _leaves(form: Format, caches: Caches) -> list[torch.Tensor]:
    """Return the tensors of caches, in the order of their containers."""
    if isinstance(caches, torch.Tensor):
        return [caches]
    first = caches[0]
    if "kv" in form.containers and not isinstance(first, torch.Tensor):
        return [each for inner in caches for each in inner]
    if form.containers == "layer kv" or not isinstance(first, torch.Tensor):
        per_layer = "a tuple of tensors" if form.containers == "layer kv" else "a tensor"
        raise TypeError(
            f"Expected {per_layer} for each layer for LMCache's format {form.number}, got a list "
            f"of {type(first).__name__}. Pass the caches in that form."
        )
    return list(caches)


def _like(tensor: torch.Tensor, dims: str, pool: Pool) -> torch.Tensor:
    """Return a tensor of the caches with the format's dimensions.

    Further dimensions are flattened. A tensor with fewer dimensions gets the shape of the pool.
    """
    names = _names(dims)
    if tensor.dim() == len(names):
        return tensor
    if tensor.dim() > len(names):
        return tensor.flatten(len(names) - 1)
    return tensor.view(torch.uint8).view(pool.memory(dims)[0])


# --- Views of memory objects ----------------------------------------------------------------------


def objects_of(
    form: Format,
    caches: KVView,
    objects: Sequence[MemoryObject],
    chunk: int,
    device: torch.device | None,
) -> KVView:
    """Return memory objects as one view, with a block for each object if there are several.

    Args:
        form: the format of the caches.
        caches: the caches, whose rows the objects hold.
        objects: tensors of one shape, or addresses.
        chunk: tokens of an object at an address.
        device: the device of the memory at addresses; None: the driver reports it.
    """
    layout = "kv layer token (head dim)" if form.two_planes else "layer token (head dim)"
    tensors = [each for each in objects if isinstance(each, torch.Tensor)]
    kv = None
    dim = None
    if form.number in (_BLOCKED_SCALES, _PLANES):  # a token's planes are next to each other
        wide = tensors[0].element_size() if tensors else 1
        layout = "layer token (kv dim)"
        kv = caches.kv
        dim = tuple(width // wide for width in caches.widths)
    if len(objects) > 1:
        layout = f"block | {layout}"

    if tensors:
        if not form.two_planes:
            fused = form.number in FUSED
            tensors = [_one_plane(each, caches.layers, fused) for each in tensors]
        return KVView(
            tensors[0] if len(tensors) == 1 else tensors,
            layout,
            kv=kv,
            dim=dim,
            heads=caches.heads,
            reinterpret=True,
        )

    row = caches.heads * (caches.widths[0] if form.two_planes else sum(caches.widths))
    shape = [caches.layers, chunk, row]
    return KVView.at(
        np.array(objects),
        layout,
        shape=[2, *shape] if form.two_planes else shape,
        dtype=torch.uint8,
        device=device,
        kv=kv,
        dim=dim,
        heads=caches.heads,
        reinterpret=True,
    )


def _one_plane(tensor: torch.Tensor, layers: int, fused: bool) -> torch.Tensor:
    """Return an object of one plane as ``[layers, tokens, row]``.

    LMCache may pass the plane as the first of several. If ``fused`` it may pass one plane as two
    planes with half the row.
    """
    if tensor.dim() < 4:
        return tensor
    if fused and len(tensor) == 2:
        return tensor.view(layers, -1, 2 * tensor.shape[-1])
    return tensor[0]


def blocks_of(ids: torch.Tensor | Sequence[int], block_size: int) -> Index:
    """Return the block ids of a call as an index.

    Ids on a device are an engine's own tables, which name its blocks only, so they are trusted.
    """
    if isinstance(ids, torch.Tensor) and not ids.is_cpu:
        return Index(ids, block_size, trusted=True)
    return Index.of(ids, block_size)


def check_chunk(tokens: int, block_size: int, name: str) -> None:
    """Raise `ValueError` unless a chunk holds whole blocks."""
    if block_size < 1 or tokens < 1 or tokens % block_size:
        raise ValueError(
            f"Expected {name} to be a positive multiple of the block size {block_size}, got "
            f"{tokens} tokens. Pass whole blocks."
        )


def likeness_of(memory_object: MemoryObject) -> Hashable:
    """Return the properties that memory objects of one copy must share."""
    if isinstance(memory_object, torch.Tensor):
        return memory_object.shape, memory_object.stride(), memory_object.dtype
    return int
