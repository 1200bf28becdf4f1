# SPDX-License-Identifier: Apache-2.0
"""Containers of tensors (list, tuple, dict) become a grid, and a grid a table of addresses.

Tensors of one allocation at equal distances become a stride, so that a block that is contiguous
over all layers is one run; what is left stays a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import LayoutError
from portakv.layout.language import Factor, Layout

Grid = npt.NDArray[np.object_]


def to_grid(layout: Layout, tensors: Any) -> Grid:
    """Lay nested containers out as an array of tensors, one axis for each container level.

    Raises:
        LayoutError: a container where a tensor was expected or the reverse, levels of unequal
            length, or an empty level.
    """
    shape: list[int] = []
    level = [tensors]
    for group in layout.containers:
        rows = [_items(layout, container) for container in level]
        first = len(rows[0])
        if not first:
            raise LayoutError(
                f"A container of {layout.text!r} is empty; hand over at least one tensor."
            )
        for row in rows:
            if len(row) != first:
                raise LayoutError(
                    f"Containers of {group} in {layout.text!r} have unequal lengths {first} and "
                    f"{len(row)}; all must be equally long."
                )
        shape.append(first)
        level = [item for row in rows for item in row]
    grid = np.empty(len(level), dtype=object)
    for at, tensor in enumerate(level):
        if not isinstance(tensor, torch.Tensor):
            _refuse_array(tensor)
            raise LayoutError(
                f"{layout.text!r} expects tensors inside {len(shape)} container level(s), but a "
                f"{type(tensor).__name__} was found; add a container axis left of `|`."
            )
        grid[at] = tensor
    return grid.reshape(shape)


def _items(layout: Layout, level: Any) -> list[Any]:
    if isinstance(level, Mapping):
        return list(level.values())
    if isinstance(level, (list, tuple)):
        return list(level)
    _refuse_array(level)
    raise LayoutError(
        f"{layout.text!r} names {len(layout.containers)} container level(s) left of `|`, but a "
        f"{type(level).__name__} was found where a list, tuple or dict was expected; write its "
        f"axis right of `|` if it is a dimension of the tensor."
    )


def _refuse_array(level: Any) -> None:
    if isinstance(level, np.ndarray):
        raise LayoutError(
            f"A numpy array of shape {level.shape} was found where tensors are read; hand over "
            f"torch.from_numpy(array), which shares its memory."
        )


#: How a container factor walks: entries of the table, and bytes for each kv, of one step.
Walks = dict[Factor, tuple[int, tuple[int, ...]]]


def tabulate(
    factors: Sequence[tuple[Factor, int]], grid: Grid, kv: int
) -> tuple[tuple[int, ...], tuple[torch.Tensor, ...], Walks]:
    """Collapse a grid into the smallest table.

    Args:
        factors: each container factor and its extent, in the order of the string.
        grid: tensors, of any shape with as many entries as the extents multiply to.
        kv: the number of kv.

    Returns:
        The addresses, for each of them the tensor in whose storage it lies, and how each factor
        walks through them.
    """
    # Blocks stand outermost: then no step of another axis depends on how many there are.
    rank = {"block": 0, "token": 1}
    order = sorted(range(len(factors)), key=lambda i: rank.get(factors[i][0].axis, 2))
    cube = grid.reshape([extent for _, extent in factors]).transpose(order)
    axes = [factors[i][0] for i in order]
    flat = list(cube.reshape(-1))
    where = np.array([t.data_ptr() for t in flat], dtype=np.int64).reshape(cube.shape)
    homes = np.array([t.untyped_storage().data_ptr() for t in flat], dtype=np.int64)
    homes = homes.reshape(cube.shape)
    walks: Walks = {}
    for at, factor in enumerate(axes):
        kv_at = next((i for i, f in enumerate(axes) if f.axis == "kv" and i != at), None)
        distances = _distances(where, homes, at, kv_at, kv)
        # Memory objects come and go: whether they lie at equal distances must not change a form.
        if factor.axis not in ("block", "token") and distances is not None:
            walks[factor] = (0, distances)
            where, homes, cube = (x.take([0], axis=at) for x in (where, homes, cube))
    entries = 1
    for at in reversed(range(len(axes))):
        if axes[at] not in walks:
            walks[axes[at]] = (entries, (0,) * kv)
            entries *= where.shape[at]
    return tuple(where.reshape(-1).tolist()), tuple(cube.reshape(-1)), walks


def _distances(
    where: npt.NDArray[np.int64], homes: npt.NDArray[np.int64], at: int, kv_at: int | None, kv: int
) -> tuple[int, ...] | None:
    """For each kv the constant distance along axis ``at`` inside one allocation, else None."""
    if where.shape[at] == 1:
        return (0,) * kv
    steps = np.diff(where, axis=at)
    if np.diff(homes, axis=at).any():
        return None
    by_kv = steps.reshape(1, -1) if kv_at is None else np.moveaxis(steps, kv_at, 0)
    by_kv = by_kv.reshape(by_kv.shape[0], -1)
    if (by_kv != by_kv[:, :1]).any():
        return None
    found = tuple(int(row[0]) for row in by_kv)
    if min(found) < 0:
        return None  # torch has no negative strides, so descending tensors stay a table
    return found if len(found) == kv else found * kv
