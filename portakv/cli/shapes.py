# SPDX-License-Identifier: Apache-2.0
"""Shapes of real models' caches, read from ``shapes.toml``: for `portakv warmup` and for the
benchmarks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import cast

import torch

from portakv.errors import PortaKVError
from portakv.extras import installing

FILE = Path(__file__).resolve().parent / "shapes.toml"

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

    An entry with ``like`` has every field that it does not write from the shape of that name.

    Raises:
        ValueError: a field is wrong.
        PortaKVError: Python 3.10 without tomli, which reads such files.
    """
    tomllib = _toml_reader()
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


def _toml_reader() -> ModuleType:
    """Return the module that reads TOML: Python's own, or tomli for Python 3.10."""
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PortaKVError(
            f"Shapes are read by tomli on Python 3.10, and it is not installed. Run "
            f"{installing('cuda')}, or name two layouts with --layout."
        ) from error


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
