# SPDX-License-Identifier: Apache-2.0
"""LMCache's formats as layouts: caches and memory objects of its ops as views.

No engine is imported. Adding a format is adding a line to `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch

from portakv import KVView, Unsupported
from portakv.integrations.lmcache_memory import addresses_of, aliases, dense, key_of, tensor_at
from portakv.runtime.bounded import Bounded

_BLOCKED_SCALES, _PLANES = 14, 17
#: How LMCache's formats are read, by the number of its EngineKVFormat. Keys and values that lie
#: behind each other in one row (10 to 13) are one plane, as they are in an object.
LAYOUTS = {
    0: "block layer kv token head dim",
    1: "layer | kv block token head dim",
    2: "layer | block kv token head dim",
    3: "layer | block token dim",
    4: "kv layer | (block token) head dim",
    5: "layer | (block token) 1 dim",
    6: "layer | kv block head token dim",
    7: "layer | block kv head token dim",
    8: "block layer kv head token dim",
    9: "kv layer | block token head dim",
    10: "layer | block head token dim",
    11: "layer | block token head dim",
    12: "layer | block head token dim",
    13: "layer | block token head dim",
    _BLOCKED_SCALES: "layer kv | block token dim",  # of each block the values, then the scales
    15: "layer | kv block head 1 token dim",
    16: "layer kv | block token head dim",
    _PLANES: "layer kv | block token 1 dim",
    18: "layer | block token head dim",
}
MLA = (3, 5, _BLOCKED_SCALES, _PLANES)
FUSED = (10, 11, 12, 13)
_SCALE = 4  # bytes of a token's scale in a blocked-scale cache
_views: Bounded[tuple[Any, ...], KVView] = Bounded("views of LMCache's caches", 64)
#: Caches: a table of addresses, a tensor, or the containers that the layout names.
Held: TypeAlias = "torch.Tensor | Sequence[Any]"


class Pool(NamedTuple):
    """What is known of caches beside their addresses; sizes in bytes."""

    layers: int
    blocks: int
    block_size: int
    heads: int
    row: int  # of one head
    step: int = 0  # from block to block; 0: they are dense

    def shape(self, dims: str) -> list[int]:
        """The shape of a tensor of bytes with such dimensions."""
        fused = {"(block token)": self.blocks * self.block_size}
        sizes = {"layer": self.layers, "kv": 2, "block": self.blocks, "token": self.block_size}
        sizes |= {"head": self.heads, "dim": self.row, "1": 1}
        if dims.startswith("(block token)"):
            return [fused["(block token)"], *(sizes[each] for each in dims.split()[2:])]
        return [sizes[each] for each in dims.split()]


def pool_of(desc: Any) -> Pool:
    size = int(desc.element_size)
    step = int(getattr(desc, "block_stride_elems", 0) or 0) * size
    sizes = (desc.nl, desc.nb, desc.bs, desc.nh, desc.hs * size, step)
    return Pool(*(int(each) for each in sizes))


# --- Views ----------------------------------------------------------------------------------------


def layout_of(engine_kv_format: Any) -> tuple[int, str, bool]:
    """The number of a format, the layout of its caches, and whether it has two planes, keys and
    values, in an object."""
    number = int(engine_kv_format)
    if number not in LAYOUTS:
        raise Unsupported(
            f"Caches of LMCache's format {engine_kv_format} were handed over",
            f"formats 0 to {max(LAYOUTS)} are known; install a release of PortaKV that knows it",
        )
    text = LAYOUTS[number]
    return number, text, "kv" in text.split() and number not in (_BLOCKED_SCALES, _PLANES)


def caches_of(engine_kv_format: Any, held: Held, pool: Pool, device: torch.device) -> KVView:
    """The caches of a call as a view. It is kept for the next call, since it keeps no memory; but
    on a device whose vendor has storages of its own kind it is made of the tensors themselves."""
    number, text, _ = layout_of(engine_kv_format)
    addresses = addresses_of(held)
    if addresses is not None:
        key: tuple[Any, ...] = number, addresses, pool, device
        return _views.get_or_make(key, partial(_view, number, text, addresses, pool, device))
    leaves = [held] if isinstance(held, torch.Tensor) else list(held)
    if device.type == "npu":
        return _view(number, text, leaves, pool, device)
    key = number, key_of(leaves), pool, device
    return _views.get_or_make(key, lambda: _view(number, text, aliases(leaves), pool, device))


def _view(
    number: int, text: str, leaves: Sequence[Any], pool: Pool, device: torch.device
) -> KVView:
    containers, _, dims = text.rpartition(" | ")
    if number == _BLOCKED_SCALES:
        split = [_values_and_scales(_leaf(each, "block token dim", pool, device))
                 for each in leaves]  # fmt: skip
        return KVView(split, text, reinterpret=True)
    if containers == "layer kv":
        if not isinstance(leaves[0], (list, tuple)):
            raise TypeError(
                f"Caches of LMCache's format {number} were handed over as a "
                f"{type(leaves[0]).__name__}; expected a tuple of tensors for each layer."
            )
        return KVView(leaves, text, kv=len(leaves[0]), reinterpret=True)
    if containers == "kv layer" and not isinstance(leaves[0], (list, tuple)):
        half = len(leaves) // 2
        leaves = [leaves[:half], leaves[half:]]
    if containers == "kv layer":
        tensors: Any = [[_leaf(each, dims, pool, device) for each in plane] for plane in leaves]
    else:
        tensors = [_leaf(each, dims, pool, device) for each in leaves]
    block_size = pool.block_size if "(block token)" in dims else None
    return KVView(tensors if containers else tensors[0], text, block_size=block_size,
                  reinterpret=True)  # fmt: skip


def _leaf(held: Any, dims: str, pool: Pool, device: torch.device) -> torch.Tensor:
    """One tensor of the caches: made over an address, or as the caller has it; one with fewer or
    more dimensions than the format's is read as these."""
    number = len(dims.replace("(block token)", "slot").split())
    if not isinstance(held, torch.Tensor):
        shape = pool.shape(dims)
        if not pool.step or not dims.startswith("block "):
            return tensor_at(held, shape, device)
        return tensor_at(held, shape, device, [pool.step, *dense(shape)[1:]])
    if held.dim() == number:
        return held
    if held.dim() > number:
        return held.flatten(number - 1)
    return held.view(torch.uint8).view(pool.shape(dims))


def _values_and_scales(layer: torch.Tensor) -> list[torch.Tensor]:
    layer = layer.view(torch.uint8)
    blocks, block_size, row = layer.shape
    step, width = layer.stride(0), row - _SCALE
    start = layer.storage_offset()
    values = layer.as_strided((blocks, block_size, width), (step, width, 1), start)
    sizes, steps = (blocks, block_size, _SCALE), (step, _SCALE, 1)
    return [values, layer.as_strided(sizes, steps, start + block_size * width)]


def objects_at(
    objects: Sequence[Any], pool: Pool, chunk: int, two_planes: bool, device: torch.device
) -> list[torch.Tensor]:
    """Objects as tensors; addresses are read as the caches' rows require."""
    if not isinstance(objects, (list, tuple)):
        raise TypeError(
            f"Memory objects were handed over as a {type(objects).__name__}; expected a list of "
            f"tensors or addresses."
        )
    shape = [*([2] if two_planes else []), pool.layers, chunk, pool.heads * pool.row]
    found = []
    for each in objects:
        if not isinstance(each, (int, torch.Tensor)):
            raise TypeError(
                f"A memory object was handed over as a {type(each).__name__}; expected a tensor or "
                f"an address."
            )
        found.append(each if isinstance(each, torch.Tensor) else tensor_at(each, shape, device))
    return found


def objects_of(
    number: int, two_planes: bool, caches: KVView, objects: Sequence[torch.Tensor]
) -> KVView:
    """Memory objects as one view, paged by objects if there are several of one shape."""
    text, kv = "kv layer token (head dim)" if two_planes else "layer token (head dim)", None
    if number in (_BLOCKED_SCALES, _PLANES):
        cut = [_row_of_planes(each).split(caches.widths, -1) for each in objects]
        text, kv, tensors = "kv | layer token dim", caches.kv, cut
    elif two_planes:
        tensors = list(objects)
    else:
        row = caches.heads * caches.widths[0]
        tensors = [_one_plane(each, caches.layers, row) for each in objects]
    if len(tensors) == 1:
        return KVView(tensors[0], text, heads=_heads(text, caches), kv=kv, reinterpret=True)
    paged = f"block {text}" if "|" in text else f"block | {text}"
    return KVView(tensors, paged, heads=_heads(text, caches), kv=kv, reinterpret=True)


def _heads(text: str, caches: KVView) -> int | None:
    return caches.heads if "head" in text else None


def _row_of_planes(each: torch.Tensor) -> torch.Tensor:
    return (each[0] if each.dim() == 4 else each).view(torch.uint8)


def _one_plane(each: torch.Tensor, layers: int, row: int) -> torch.Tensor:
    """An object of one plane as ``[layers, tokens, row]``; it may come as ``[1, layers, tokens,
    row]``, or as planes of half the row that were meant to be one."""
    if each.dim() == 4:
        return each[0] if each.shape[0] == 1 else each.view(layers, -1, row // each.element_size())
    return each
