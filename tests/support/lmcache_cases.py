# SPDX-License-Identifier: Apache-2.0
"""LMCache's formats as physical tensors, built from one logical array by numpy alone: the oracle of
the integration's tests, which knows no layout strings."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.int16]


class Geometry(NamedTuple):
    """Caches of one format; ``dim`` counts 16-bit elements of a head's row."""

    number: int
    kv: int  # planes of an object
    heads: int
    dim: int
    layers: int = 3
    blocks: int = 7
    block_size: int = 4

    @property
    def slots(self) -> int:
        return self.blocks * self.block_size

    @property
    def row(self) -> int:
        return self.heads * self.dim

    def logical(self, seed: int = 0) -> Array:
        """Return random rows ``[kv, layers, blocks, block_size, heads, dim]``."""
        shape = (self.kv, self.layers, self.blocks, self.block_size, self.heads, self.dim)
        drawn = np.random.default_rng(seed).integers(-(2**15), 2**15, shape, dtype=np.int64)
        return drawn.astype(np.int16)

    def rows(self, logical: Array) -> Array:
        """Return rows by slot: ``[kv, layers, slots, row]``."""
        return logical.reshape(self.kv, self.layers, self.slots, self.row)

    def descriptor(self) -> Any:
        """Return LMCache's description of the caches for the block op, with the names of its
        fields."""
        return SimpleNamespace(
            kv_size=self.kv,
            nl=self.layers,
            nb=self.blocks,
            bs=self.block_size,
            nh=self.heads,
            hs=self.dim,
            element_size=2,
            block_stride_elems=0,
        )


GEOMETRIES = {
    number: Geometry(number, *sizes)
    for number, sizes in {
        0: (2, 2, 8),
        1: (2, 2, 8),
        2: (2, 2, 8),
        3: (1, 1, 24),
        4: (2, 2, 8),
        5: (1, 1, 24),
        6: (2, 2, 8),
        7: (2, 2, 8),
        8: (2, 2, 8),
        9: (2, 2, 8),
        10: (1, 2, 12),
        11: (1, 2, 12),
        12: (1, 2, 12),
        13: (1, 2, 12),
        14: (1, 1, 66),
        15: (2, 2, 8),
        16: (2, 2, 8),
        17: (1, 1, 24),
        18: (1, 2, 8),
    }.items()
}
PLANES = (12, 8, 4)  # of format 17


def physical(geometry: Geometry, logical: Array) -> list[Any]:
    """Return the arrays of caches of a format, in its containers."""
    g = geometry
    x = logical
    pages = [x[:, layer] for layer in range(g.layers)]  # [kv, blocks, block_size, heads, dim]
    number = g.number
    if number in (0, 8):
        whole = x.transpose(2, 1, 0, 3, 4, 5) if number == 0 else x.transpose(2, 1, 0, 4, 3, 5)
        return [_own(whole)]
    if number in (4, 9):
        shape = (g.slots, g.heads, g.dim) if number == 4 else pages[0].shape[1:]
        return [[_own(page[kv].reshape(shape)) for page in pages] for kv in range(2)]
    if number == 16:
        return [(_own(page[0]), _own(page[1])) for page in pages]
    if number == 17:
        cuts = np.cumsum(PLANES)[:-1]
        return [tuple(_own(part) for part in np.split(page[0], cuts, -1)) for page in pages]
    orders: dict[int, Callable[[Array], Array]] = {
        1: lambda p: p,
        2: lambda p: p.swapaxes(0, 1),
        3: lambda p: p[0, :, :, 0],
        5: lambda p: p.reshape(g.slots, 1, g.dim),
        6: lambda p: p.swapaxes(2, 3),
        7: lambda p: p.transpose(1, 0, 3, 2, 4),
        10: lambda p: p[0].swapaxes(1, 2).reshape(g.blocks, g.heads, g.block_size, 2, -1),
        11: lambda p: p[0].reshape(g.blocks, g.block_size, g.heads, 2, -1),
        12: lambda p: p[0].swapaxes(1, 2),
        13: lambda p: p[0],
        14: _blocked_scales,
        15: lambda p: p.swapaxes(2, 3)[:, :, :, None],
        18: lambda p: p[0],
    }
    return [_own(orders[number](page)) for page in pages]


def _blocked_scales(page: Array) -> Array:
    """Return blocks that each have all values, then all scales of 4 bytes."""
    rows = page[0, :, :, 0]
    blocks, block_size, dim = rows.shape
    values = rows[..., :-2].reshape(blocks, -1)
    scales = rows[..., -2:].reshape(blocks, -1)
    page = np.concatenate([values, scales], axis=1)
    return page.reshape(blocks, block_size, dim)


def _own(array: Array) -> Array:
    return np.array(array, dtype=np.int16, order="C")


def tensors(nested: Any, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return arrays in containers as tensors on a device, in a dtype of 16 bits."""
    if isinstance(nested, np.ndarray):
        return torch.from_numpy(nested.copy()).view(dtype).to(device)
    return type(nested)(tensors(each, device, dtype) for each in nested)


def arrays(nested: Any) -> Any:
    """Return tensors in containers as arrays: the reverse of `tensors`."""
    if isinstance(nested, torch.Tensor):
        return nested.cpu().view(torch.int16).numpy()
    return type(nested)(arrays(each) for each in nested)


def flat(nested: Any) -> list[Any]:
    """Return the leaves of containers, in order."""
    if isinstance(nested, (list, tuple)):
        return [leaf for each in nested for leaf in flat(each)]
    return [nested]


def assert_equal(actual: Any, expected: Any) -> None:
    """Check that caches hold these rows, bit for bit, and nothing else changed."""
    pairs = zip(flat(arrays(actual)), flat(expected), strict=True)
    for number, (one, other) in enumerate(pairs):
        np.testing.assert_array_equal(one, other, err_msg=f"tensor {number} of the caches")


def pointers(nested: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Return a table of addresses as LMCache makes it."""
    at = [leaf.data_ptr() for leaf in flat(nested)]
    return torch.tensor(at, dtype=dtype).to(device)


def bits(array: Array, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).view(torch.bfloat16).to(device)
