# SPDX-License-Identifier: Apache-2.0
"""Shapes of real models' caches, read from ``shapes.toml``; and how bytes of such caches are made
and found again, by plain arithmetic alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).resolve().parent.parent / "shapes.toml"

#: What destinations hold before a copy.
POISON = 0xA5
# An integer for each width: floats are compared as bits, and fp8 cannot be indexed.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
#: What an index list can be: slots drawn at random, one run of slots, block ids drawn at random.
INDEX_KINDS = ("random", "contiguous", "blocks")


@dataclass(frozen=True, slots=True)
class Shape:
    """Describe the rows that one transfer moves."""

    name: str  # what `--shape` takes
    model: str  # whose cache it is
    source: str  # where the numbers come from
    cache: str  # its layout
    chunk: str  # likewise
    layers: int
    dim: int  # in elements
    dtype: str  # a torch dtype's name
    block_size: int  # tokens of a block
    tokens: int  # moved by one copy, a multiple of ``block_size``
    kv: int = 2
    heads: int = 1
    pool: int = 4  # slots of the cache for each token moved
    index: tuple[str, ...] = INDEX_KINDS  # index lists to measure with
    objects: int = 3  # memory objects of each kind that the timed calls take turns with
    apart: bool = True  # measured with each layer in a separate allocation
    together: bool = True  # and with all in one
    compiled: bool = False  # backends that compile for seconds are measured with it

    @property
    def torch_dtype(self) -> torch.dtype:
        return cast(torch.dtype, getattr(torch, self.dtype))

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one token in one plane."""
        return self.heads * self.dim * self.torch_dtype.itemsize

    @property
    def payload(self) -> int:
        """Return the bytes moved, each counted once."""
        return self.layers * self.kv * self.tokens * self.row_bytes

    @property
    def blocks(self) -> int:
        """Return the number of blocks of the cache."""
        return -(-self.pool * self.tokens // self.block_size)

    @property
    def slots(self) -> int:
        """Return the number of token slots of the cache, the size of the pool."""
        return self.blocks * self.block_size

    @property
    def slots_used(self) -> float:
        """Return the share of the pool that one transfer touches."""
        return self.tokens / self.slots

    @property
    def layered(self) -> bool:
        """Return True if the cache is a list over layers, whose allocations can differ."""
        return self.cache.partition("|")[0].split() == ["layer"]


def load(path: Path = FILE) -> Mapping[str, Shape]:
    """Return the shapes of a file by name, in its order.

    Raises `ValueError` for a field that is wrong. An entry with ``like`` has every field that
    it does not write from the shape of that name.
    """
    results: dict[str, Shape] = {}
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["shape"]:
        name = entry.get("name")
        like = entry.pop("like", None)
        try:
            if like is not None and like not in results:
                raise ValueError(
                    f"expected like to name an earlier shape, got {like!r}. Move it up"
                )
            if name in results:
                raise ValueError(
                    "expected a separate name for each shape, got this name twice. Rename one"
                )
            fields = {**(asdict(results[like]) if like else {}), **entry}
            shape = Shape(**{**fields, "index": tuple(fields.get("index", INDEX_KINDS))})
            _check(shape)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path.name}, shape {name!r}: {error}.") from error
        results[name] = shape
    return MappingProxyType(results)


def _check(shape: Shape) -> None:
    if not shape.source.strip():
        raise ValueError(
            "expected a source that says where the numbers come from, got none. Name it"
        )
    if not isinstance(getattr(torch, shape.dtype, None), torch.dtype):
        raise ValueError(f"expected dtype to name a torch dtype, got {shape.dtype!r}. Correct it")
    if not shape.index or not set(shape.index) <= set(INDEX_KINDS):
        raise ValueError(
            f"expected index to be some of {INDEX_KINDS}, got {shape.index}. Correct it"
        )
    numbers = (shape.layers, shape.kv, shape.heads, shape.dim, shape.block_size, shape.tokens)
    broken = "blocks" in shape.index and shape.tokens % shape.block_size
    if min(*numbers, shape.pool, shape.objects) < 1 or broken:
        raise ValueError(
            f"expected every number to be at least 1, and whole blocks if the index is `blocks`, "
            f"got {shape.tokens} tokens in blocks of {shape.block_size} and extents {numbers}. "
            f"Correct the numbers"
        )


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
