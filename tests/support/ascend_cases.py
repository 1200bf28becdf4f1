# SPDX-License-Identifier: Apache-2.0
"""Copies for the ascend backend on the simulated device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from portakv import (
    Index,
    KVView,
    copy_rows,
)

DEVICE, OTHER = torch.device("privateuseone", 0), torch.device("privateuseone", 1)

LAYERS, BLOCKS, SIZE, HEADS = 2, 4, 8, 2

SLOTS = BLOCKS * SIZE

IDS = [9, 2, 31, 17, 6, 0]

SCATTER, GATHER = "npu_scatter_pa_kv_cache", "npu_gather_pa_kv_cache"

UPDATE, COPY, SELECT = "npu_scatter_nd_update_", "index_copy_", "index_select"

NZ = "layer kv | block head dim/32 token dim%32"


class Recorded(TorchDispatchMode):
    """Counts the ops that move rows, and holds each call against what the ops forbid."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in (SCATTER, GATHER, UPDATE, COPY, SELECT):
            self.seen[name] += 1
            moved = [x for x in (*args, *given.values()) if isinstance(x, torch.Tensor)]
            assert all(x.is_contiguous() for x in moved), f"{name} was given holes"
            assert given.get("cache_mode", "Norm") == "Norm"
        return func(*args, **given)


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every pattern of bits, NaNs among them."""
    count = torch.Size(shape).numel() * dtype.itemsize
    numbers = (torch.arange(count, dtype=torch.int64) * 2654435761 + seed * 977) >> 7
    return numbers.to(torch.uint8).view(dtype).view(shape)


def tuples(dims: tuple[int, ...], dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """For each layer a tensor for each kv, ``[blocks, size, heads, dim]``."""
    return [
        tuple(bytes_of((BLOCKS, SIZE, HEADS, d), dtype, 8 * n + k) for k, d in enumerate(dims))
        for n in range(LAYERS)
    ]


def cached(name: str) -> tuple[Any, str, dict[str, Any], str]:
    """Caches on the host with their layout, what is declared of them, and the chunk's layout."""
    plain, rows = "layer kv | block token head dim", "layer kv | token head dim"
    if name == "tuples":
        return tuples((16, 16), torch.bfloat16), plain, {}, rows
    if name == "unequal":  # MLA: latent and rope
        return tuples((64, 32), torch.float16), plain, {}, rows
    if name == "three":  # DSA
        return tuples((64, 32, 16), torch.bfloat16), plain, {"kv": 3}, rows
    if name == "odd bytes":
        shape = (2, BLOCKS, HEADS, SIZE, 3)
        caches = [bytes_of(shape, torch.int8, n) for n in range(LAYERS)]
        return caches, "layer | kv block head token dim", {}, rows
    if name == "two bytes":
        return tuples((5, 5), torch.int16), plain, {}, rows
    if name == "holes":
        whole = tuples((24, 24), torch.float16)
        return [tuple(x[..., :16] for x in each) for each in whole], plain, {}, rows
    if name == "merged":
        shape = (2, BLOCKS, SIZE, HEADS, 16)
        caches = [bytes_of(shape, torch.float16, n) for n in range(LAYERS)]
        return caches, "layer | kv block token head dim", {}, rows
    if name == "offset":  # sliced out of one allocation
        flat = bytes_of((LAYERS * 2 * SLOTS * HEADS * 16 + 48,), torch.float16, 5)[48:]
        return list(flat.view(LAYERS, 2, BLOCKS, SIZE, HEADS, 16)), (
            "layer | kv block token head dim"
        ), {}, rows  # fmt: skip
    if name == "head-major":
        shape = (2, BLOCKS, HEADS, SIZE, 16)
        caches = [bytes_of(shape, torch.float16, n) for n in range(LAYERS)]
        return caches, "layer | kv block head token dim", {}, rows
    assert name == "nz"
    shape = (BLOCKS, HEADS, 2, SIZE, 32)
    pairs = [tuple(bytes_of(shape, torch.int8, 2 * n + k) for k in (0, 1)) for n in range(LAYERS)]
    return pairs, NZ, {}, rows


def moved(tree: Any, to: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same containers with other tensors."""
    if isinstance(tree, torch.Tensor):
        return to(tree)
    return type(tree)(moved(each, to) for each in tree)


def there(tensor: torch.Tensor) -> torch.Tensor:
    """On the device, at the same place of an allocation with the same strides."""
    span = torch.as_strided(
        tensor, (tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0
    )
    return span.to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of containers."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for each in tree for leaf in leaves(each)]


def chunk_for(view: KVView, tokens: int, dtype: torch.dtype, seed: int) -> Any:
    """A chunk on the host for a cache, ``[tokens, heads, dim]`` for each layer and kv."""
    widths = [width // dtype.itemsize for width in view.widths]
    return [
        tuple(bytes_of((tokens, HEADS, d), dtype, seed + 9 * n + k) for k, d in enumerate(widths))
        for n in range(LAYERS)
    ]


def both_ways(
    name: str, index: Index | list[int], tokens: int
) -> tuple[Counter[str], Counter[str]]:
    """Gather and scatter on the device as on the host by `reference`; the ops that were called."""
    caches, layout, extents, rows = cached(name)
    more = {"kv": extents["kv"]} if extents else {}
    seen = []
    for scatter in (False, True):
        at: dict[str, Any] = {"dst_index" if scatter else "src_index": index, "count": tokens}
        host = KVView(moved(caches, torch.clone), layout, **extents)
        dense = chunk_for(host, tokens, leaves(caches)[0].dtype, 70)
        chunk = KVView(moved(dense, torch.clone), rows, **more)
        copy_rows(*((chunk, host) if scatter else (host, chunk)), **at, backend="reference")
        far = KVView(moved(caches, there), layout, **extents)
        far_chunk = KVView(moved(dense, there), rows, **more)
        sides = (far_chunk, far) if scatter else (far, far_chunk)
        with Recorded() as recorded:
            copy_rows(*sides, **at, backend="ascend").synchronize()
        for mine, theirs in ((host, far), (chunk, far_chunk)):
            pairs = zip(leaves(mine.tensors), leaves(theirs.tensors), strict=True)
            assert all(plain(a).equal(plain(b.cpu())) for a, b in pairs)
        seen.append(recorded.seen)
    return seen[0], seen[1]


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor on the host."""
    return tensor.contiguous().view(torch.uint8)
