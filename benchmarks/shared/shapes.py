# SPDX-License-Identifier: Apache-2.0
"""Make the bytes of real models' caches and find them again, by plain arithmetic alone.

The shapes themselves are `portakv.cli.sides`, which `portakv warmup` reads too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from portakv.cli.sides import Shape

#: What destinations hold before a copy.
POISON = 0xA5
# An integer for each width: floats are compared as bits, and fp8 cannot be indexed.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def planes(tensors: Any, layout: str, shape: Shape) -> list[torch.Tensor]:
    """Return each plane, layers outermost, as integers ``[blocks, tokens, heads, dim]``.

    A chunk has one block. Layouts must have no split axes, and no container except a list over
    layers.
    """
    order = ("layer", "kv", "block", "token", "head", "dim")
    names = [name for group in _groups(layout) for name in group]
    missing = [name for name in order if name not in names]
    results = []
    for tensor in tensors if layout.rpartition("|")[0].strip() else [tensors]:
        whole = tensor.view(_BITS[tensor.element_size()])
        for at, group in enumerate(_groups(layout)):
            if len(group) > 1:
                whole = whole.unflatten(at, [_axis(name, shape, 1, shape.tokens) for name in group])
        whole = whole.view(*whole.shape, *(1 for _ in missing))
        ordered = whole.permute([[*names, *missing].index(name) for name in order])
        results += [plane for layer in ordered for plane in layer]
    return results


def sizes(layout: str, shape: Shape, blocks: int, tokens: int) -> tuple[int, ...]:
    """Return the size of each dimension of a tensor that is read through a layout."""
    groups = _groups(layout)
    return tuple(prod(_axis(name, shape, blocks, tokens) for name in group) for group in groups)


def _groups(layout: str) -> list[list[str]]:
    """Return the axes of each dimension of a layout's tensors."""
    groups: list[str] = re.findall(r"\(.+?\)|\w+", layout.rpartition("|")[2])
    return [group.strip("()").split() for group in groups]


def _axis(name: str, shape: Shape, blocks: int, tokens: int) -> int:
    extents = {"block": blocks, "token": tokens, "layer": shape.layers, "head": shape.heads}
    return {**extents, "kv": shape.kv, "dim": shape.dim}[name]


def fill(words: torch.Tensor, salt: int) -> torch.Tensor:
    """Fill int64 words with a counter times an odd number: every 8 bytes differ, and so do the
    salts. Returns them."""
    torch.arange(words.numel(), out=words)
    return words.mul_(-0x61C8864680B583EB).add_(salt * 0x2545F4914F6CDD1D % (1 << 62))


def moved(
    sources: Sequence[torch.Tensor], out_of: Any, targets: Sequence[torch.Tensor], into: Any
) -> torch.Tensor:
    """Return whether rows of planes equal the rows of their sources in every byte.
    Overwrites them with poison: then nothing but poison is left if no other row was written."""
    same = []
    for source, target in zip(sources, targets, strict=True):
        same.append((target[into] == source[out_of]).all())
        target[into] = int.from_bytes(
            [POISON] * target.element_size(), "big", signed=target.dtype.is_signed
        )
    return torch.stack(same).all()


def in_words(nbytes: int) -> str:
    """Return a size such as ``256 B``, ``2 KB``, ``32 MB`` or ``1 GB``, by 1024."""
    for unit, name in ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "KB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.4g} {name}"
    return f"{nbytes} B"


def in_decimal(nbytes: int) -> str:
    """Return a size such as ``0.131 MB`` or ``1.07 GB``, by 1000."""
    return f"{nbytes / 1e6:.3g} MB" if nbytes < 999_500_000 else f"{nbytes / 1e9:.3g} GB"


def in_bytes(words: str) -> int:
    """Return the number of a size such as ``256K``, ``4M`` or ``1G``."""
    match = re.fullmatch(r"(\d+)([KMG])", words.strip().upper())
    if not match:
        raise ValueError(f"Expected a size such as 256K, 1M or 1G, got {words!r}. Add K, M or G.")
    return int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]]
