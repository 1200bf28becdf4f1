# SPDX-License-Identifier: Apache-2.0
"""LMCache's formats as layouts: caches and memory objects of its ops as views.

No engine is imported. Adding a format is adding a line to `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from portakv import Index, KVView, LayoutError, Unsupported

_BLOCKED_SCALES = 14
_PLANES = 17
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
    _BLOCKED_SCALES: "layer | block (kv token dim)",  # of each block the values, then the scales
    15: "layer | kv block head 1 token dim",
    16: "layer kv | block token head dim",
    _PLANES: "layer kv | block token 1 dim",
    18: "layer | block token head dim",
}
MLA = (3, 5, _BLOCKED_SCALES, _PLANES)
FUSED = (10, 11, 12, 13)
_SCALE = 4  # bytes of a token's scale in a blocked-scale cache
_KEPT = 64  # views of caches
_WORDS = (torch.int64, torch.uint64)
#: Torch has storages of another kind there, so that memory is handed over as tensors alone.
NO_ADDRESSES = ("npu",)
#: A tensor at an address: shape, strides in elements (None: it is contiguous) and dtype.
Memory: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...] | None, torch.dtype]"
#: Caches: a table of addresses, a tensor, or the containers that the layout names.
Held: TypeAlias = "torch.Tensor | Sequence[Any]"


class Pool(NamedTuple):
    """What is known of caches beside their addresses; sizes in bytes."""

    layers: int
    blocks: int  # -1: unknown
    block_size: int
    heads: int
    row: int  # of one head
    step: int = 0  # from block to block; 0: they are dense

    def memory(self, dims: str) -> Memory:
        """A tensor of bytes with such dimensions."""
        sizes = {"layer": self.layers, "kv": 2, "block": self.blocks, "token": self.block_size}
        sizes |= {"head": self.heads, "dim": self.row, "1": 1}
        sizes["slots"] = max(self.blocks * self.block_size, -1)
        names = _names(dims)
        if self.blocks < 0 and names[0] not in ("block", "slots"):
            raise LayoutError(
                f"Caches of an unknown number of blocks were handed over as {dims!r}; expected "
                f"blocks that stand outermost. Pass page_buffer_size."
            )
        shape = tuple(sizes[each] for each in names)
        if not self.step or names[0] != "block":
            return shape, None, torch.uint8
        inner = (prod(shape[at + 1 :]) for at in range(1, len(shape)))
        return shape, (self.step, *inner), torch.uint8


def pool_of(desc: Any) -> Pool:
    size = int(desc.element_size)
    step = int(getattr(desc, "block_stride_elems", 0) or 0) * size
    sizes = (desc.nl, desc.nb, desc.bs, desc.nh, desc.hs * size, step)
    return Pool(*(int(each) for each in sizes))


def _names(dims: str) -> list[str]:
    """What each dimension of a tensor of the caches is called."""
    return dims.replace("(block token)", "slots").replace("(kv token dim)", "token dim").split()


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
    return number, text, "kv" in text.split() and number != _PLANES


def caches_of(engine_kv_format: Any, held: Held, pool: Pool, device: torch.device) -> KVView:
    """The caches of a call as a view. It is kept for other calls, since it keeps no memory; but one
    of tensors that differ, or on a device of `NO_ADDRESSES`, holds these and is made each time."""
    number, text, _ = layout_of(engine_kv_format)
    if not isinstance(held, (torch.Tensor, Sequence)) or not len(held):
        raise TypeError(
            f"Caches of LMCache's format {number} were handed over as {held!r}; expected a table "
            f"of addresses, or tensors, of at least one layer."
        )
    containers, _, dims = text.rpartition(" | ")
    version: object = 0
    if isinstance(held, torch.Tensor) and held.dim() == 1 and held.dtype in _WORDS:
        at = tuple(held.tolist()) if held.is_cpu else held
        memory = pool.memory(dims)
        if not held.is_cpu:  # in inference mode torch does not count what is written to it
            version = object() if held.is_inference() else held._version
    elif not isinstance(held, torch.Tensor) and isinstance(held[0], int):
        at = tuple(held)
        memory = pool.memory(dims)
    else:
        leaves = _leaves(number, containers, held)
        kinds = {(x.shape, x.stride(), x.dtype) for x in leaves}
        if device.type in NO_ADDRESSES or len(kinds) > 1:
            return _of_tensors(number, [_like(x, dims, pool) for x in leaves], held, pool)
        like = _like(leaves[0], dims, pool)
        at = tuple(x.data_ptr() for x in leaves)
        memory = tuple(like.shape), like.stride(), like.dtype
    return _view(number, at, memory, pool.block_size, device, version)


@lru_cache(_KEPT)
def _view(
    number: int, at: Any, memory: Memory, block_size: int, device: torch.device, version: object
) -> KVView:
    """The view of caches at addresses: numbers, or a table on a device as of one ``version``."""
    text = LAYOUTS[number]
    containers = text.rpartition(" | ")[0]
    if "kv" in containers:
        by = (2, -1) if containers == "kv layer" else (-1, 2)
        at = at.view(by) if isinstance(at, torch.Tensor) else np.array(at).reshape(by)
    shape, strides, dtype = memory
    rest = {"reinterpret": True} | _declared(number, shape, dtype, block_size)
    return KVView.at(at, text, shape=shape, strides=strides, dtype=dtype, device=device, **rest)


def _of_tensors(number: int, leaves: list[torch.Tensor], held: Any, pool: Pool) -> KVView:
    """The view of caches as tensors in the containers of their format."""
    text = LAYOUTS[number]
    containers = text.rpartition(" | ")[0]
    nested: Any = leaves
    declared = _declared(number, leaves[0].shape, leaves[0].dtype, pool.block_size)
    if "kv" in containers:
        by = len(leaves) // 2 if containers == "kv layer" else len(held[0])
        nested = [leaves[at : at + by] for at in range(0, len(leaves), by)]
        declared["kv"] = 2 if containers == "kv layer" else by
    return KVView(nested if containers else leaves[0], text, reinterpret=True, **declared)


def _declared(
    number: int, shape: Sequence[int], dtype: torch.dtype, block_size: int
) -> dict[str, Any]:
    """The extents that a tensor of the caches does not tell."""
    if number == _BLOCKED_SCALES:
        scale = _SCALE // dtype.itemsize
        return {"block_size": shape[1], "dim": (shape[2] - scale, scale)}
    return {"block_size": block_size} if "(block token)" in LAYOUTS[number] else {}


def _leaves(number: int, containers: str, held: Held) -> list[torch.Tensor]:
    """The tensors of caches, in the order of their containers."""
    if isinstance(held, torch.Tensor):
        return [held]
    if "kv" in containers and not isinstance(held[0], torch.Tensor):
        return [each for inner in held for each in inner]
    if containers == "layer kv" or not isinstance(held[0], torch.Tensor):
        raise TypeError(
            f"Caches of LMCache's format {number} were handed over as a list of "
            f"{type(held[0]).__name__}; expected "
            f"{'a tuple of tensors' if containers == 'layer kv' else 'a tensor'} for each layer."
        )
    return list(held)


def _like(held: torch.Tensor, dims: str, pool: Pool) -> torch.Tensor:
    """A tensor of the caches with the format's dimensions: one with more or fewer is read as
    these."""
    names = _names(dims)
    if held.dim() == len(names):
        return held
    if held.dim() > len(names):
        return held.flatten(len(names) - 1)
    return held.view(torch.uint8).view(pool.memory(dims)[0])


def objects_of(
    number: int, caches: KVView, objects: Sequence[Any], chunk: int, device: torch.device | None
) -> KVView:
    """Memory objects as one view, paged by objects if there are several.

    Args:
        objects: tensors of one shape; or addresses of memory of ``device`` (None: the driver says
            where), each of as many tokens as ``chunk`` says, in rows as the caches have them.
    """
    two_planes = layout_of(number)[2]
    tensors = isinstance(objects[0], torch.Tensor)
    text = "kv layer token (head dim)" if two_planes else "layer token (head dim)"
    rest: dict[str, Any] = {"reinterpret": True, "heads": caches.heads}
    if number in (_BLOCKED_SCALES, _PLANES):  # the planes of a token lie side by side
        wide = objects[0].element_size() if tensors else 1
        text = "layer token (kv dim)"
        rest["kv"] = caches.kv
        rest["dim"] = tuple(width // wide for width in caches.widths)
    text = text if len(objects) == 1 else f"block | {text}"
    if tensors:
        fused = number in FUSED
        held = [x if two_planes else _one_plane(x, caches.layers, fused) for x in objects]
        return KVView(held[0] if len(held) == 1 else held, text, **rest)
    row = caches.heads * (caches.widths[0] if two_planes else sum(caches.widths))
    shape = [*([2] if two_planes else []), caches.layers, chunk, row]
    at = np.array(objects)
    return KVView.at(at, text, shape=shape, dtype=torch.uint8, device=device, **rest)


def _one_plane(each: torch.Tensor, layers: int, fused: bool) -> torch.Tensor:
    """An object of one plane as ``[layers, tokens, row]``; it may come as the first of several, or
    if ``fused`` as two of half the row that were meant to be one."""
    if each.dim() < 4:
        return each
    return each.view(layers, -1, 2 * each.shape[-1]) if fused and len(each) == 2 else each[0]


def blocks_of(ids: torch.Tensor | Sequence[int], block_size: int) -> Index:
    """Block ids of a call; those on a device are an engine's own tables, which name its blocks and
    nothing else."""
    if isinstance(ids, torch.Tensor) and not ids.is_cpu:
        return Index(ids, block_size, trusted=True)
    return Index.of(ids, block_size)


def check_chunk(tokens: int, block_size: int, name: str) -> None:
    if block_size < 1 or tokens < 1 or tokens % block_size:
        raise ValueError(
            f"{name}={tokens} tokens was asked for with blocks of {block_size}; expected a "
            f"positive multiple."
        )


def kind_of(memory_object: Any) -> Any:
    """What memory objects have in common that one copy can move."""
    if isinstance(memory_object, torch.Tensor):
        return memory_object.shape, memory_object.stride(), memory_object.dtype
    return int
