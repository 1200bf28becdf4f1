# SPDX-License-Identifier: Apache-2.0
"""Shapes of real models' caches, read from ``shapes.toml``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).resolve().parent.parent / "shapes.toml"

#: What an index list can be: slots drawn at random, one run of slots, block ids drawn at random.
INDEX_KINDS = ("random", "contiguous", "blocks")


@dataclass(frozen=True, slots=True)
class Shape:
    """What one transfer moves.

    Attributes:
        name: what `--shape` takes.
        model, source: whose cache it is, and where the numbers come from.
        cache, chunk: layouts.
        layers, kv, heads, dim: extents; ``dim`` in elements.
        dtype: a torch dtype's name.
        block_size: tokens of a block.
        tokens: tokens moved at once, a multiple of ``block_size``.
        pool: slots of the cache for each token moved.
        index: index lists to measure with, of `INDEX_KINDS`.
        objects: memory objects of each kind that the timed calls take turns with.
        apart, together: whether it is measured with each layer in an allocation of its own, and
            with all in one.
        compiled: whether backends that compile for seconds are measured with it.
    """

    name: str
    model: str
    source: str
    cache: str
    chunk: str
    layers: int
    dim: int
    dtype: str
    block_size: int
    tokens: int
    kv: int = 2
    heads: int = 1
    pool: int = 4
    index: tuple[str, ...] = INDEX_KINDS
    objects: int = 3
    apart: bool = True
    together: bool = True
    compiled: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one plane."""
        return self.heads * self.dim * self.torch_dtype.itemsize

    @property
    def payload(self) -> int:
        """Bytes moved, each counted once."""
        return self.layers * self.kv * self.tokens * self.row_bytes

    @property
    def blocks(self) -> int:
        """Blocks of the cache."""
        return -(-self.pool * self.tokens // self.block_size)

    @property
    def slots(self) -> int:
        """Token slots of the cache, the size of the pool."""
        return self.blocks * self.block_size

    @property
    def slots_used(self) -> float:
        """Share of the pool that one transfer touches."""
        return self.tokens / self.slots

    @property
    def layered(self) -> bool:
        """True where the cache is a list over layers, so that their allocations can differ."""
        return self.cache.partition("|")[0].split() == ["layer"]


def load(path: Path = FILE) -> Mapping[str, Shape]:
    """The shapes of a file by name, in its order.

    An entry with ``like`` has every field that it does not write from the shape of that name.

    Raises:
        ValueError: a name that occurs twice, a field that is missing, unknown or out of range.
    """
    found: dict[str, Shape] = {}
    whole: dict[str, dict[str, Any]] = {}
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["shape"]:
        name, like = entry.get("name"), entry.pop("like", None)
        if like is not None and like not in whole:
            raise ValueError(
                f"{path.name}: shape {name!r} is like {like!r}; expected the name of a shape "
                f"above it."
            )
        fields = whole[name] = {**whole.get(like, {}), **entry}
        try:
            shape = Shape(**{**fields, "index": tuple(fields.get("index", INDEX_KINDS))})
        except TypeError as error:
            raise ValueError(f"{path.name}: shape {name!r}: {error}") from error
        _check(path.name, shape, found)
        found[shape.name] = shape
    return MappingProxyType(found)


def _check(file: str, shape: Shape, found: Mapping[str, Shape]) -> None:
    where = f"{file}: shape {shape.name!r}"
    if shape.name in found:
        raise ValueError(f"{where} occurs twice; give each shape a name of its own.")
    if not shape.source.strip():
        raise ValueError(f"{where} names no source; say where its numbers come from.")
    if not isinstance(getattr(torch, shape.dtype, None), torch.dtype):
        raise ValueError(f"{where} has dtype {shape.dtype!r}; expected the name of a torch dtype.")
    unknown = set(shape.index) - set(INDEX_KINDS)
    if unknown or not shape.index:
        raise ValueError(f"{where} has index {shape.index}; expected some of {INDEX_KINDS}.")
    numbers = (shape.layers, shape.kv, shape.heads, shape.dim, shape.block_size, shape.tokens)
    broken = "blocks" in shape.index and shape.tokens % shape.block_size
    if min(*numbers, shape.pool, shape.objects) < 1 or broken:
        raise ValueError(
            f"{where} has {shape.tokens} tokens in blocks of {shape.block_size} and extents "
            f"{numbers}; expected whole blocks where the index is `blocks`, and every number at "
            f"least 1."
        )
