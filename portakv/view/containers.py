# SPDX-License-Identifier: Apache-2.0
"""Containers of tensors (list, tuple, dict) become a grid, and a grid a table of addresses.

Tensors of one allocation at equal distances become a stride, so that a block that is contiguous
over all layers is one run; what is left stays a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import LayoutError
from portakv.layout.language import Factor, Layout

Grid = npt.NDArray[np.object_]
Entry = TypeVar("Entry", bound=np.generic)


def to_grid(layout: Layout, tensors: Any) -> Grid:
    """Lay nested containers out as an array of tensors, one axis for each container level.

    Raises:
        LayoutError: a container where a tensor was expected or the reverse, levels of unequal
            length, or an empty level.
    """
    shape = []
    level = tensors
    for _ in layout.containers:
        items = _items(layout, level)
        if not items:
            raise LayoutError(
                f"A container of {layout.text!r} is empty; hand over at least one tensor."
            )
        shape.append(len(items))
        level = items[0]
    grid = np.empty(shape, dtype=object)
    _fill(layout, grid, tensors, ())
    return grid


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


def _fill(layout: Layout, grid: Grid, level: Any, at: tuple[int, ...]) -> None:
    if len(at) == grid.ndim:
        if not isinstance(level, torch.Tensor):
            _refuse_array(level)
            raise LayoutError(
                f"{layout.text!r} expects tensors inside {grid.ndim} container level(s), but a "
                f"{type(level).__name__} was found; add a container axis left of `|`."
            )
        grid[at] = level
        return
    items = _items(layout, level)
    if len(items) != grid.shape[len(at)]:
        group = layout.containers[len(at)]
        raise LayoutError(
            f"Containers of {group} in {layout.text!r} have unequal lengths "
            f"{grid.shape[len(at)]} and {len(items)}; all must be equally long."
        )
    for i, item in enumerate(items):
        _fill(layout, grid, item, (*at, i))


@dataclass(frozen=True, slots=True)
class AddressTable:
    """What is left of a grid: entries, and how each container factor walks through them.

    ``steps`` maps a factor to (table entries, bytes for each kv) of one step.
    ``owners`` holds, for each entry, the tensor whose storage it lies in.
    """

    addresses: npt.NDArray[np.int64]
    owners: tuple[torch.Tensor, ...]
    steps: Mapping[Factor, tuple[int, tuple[int, ...]]]


def tabulate(factors: Sequence[tuple[Factor, int]], grid: Grid, kv: int) -> AddressTable:
    """Collapse a grid into the smallest table.

    Args:
        factors: each container factor and its extent, in the order of the string.
        grid: tensors, of any shape with as many entries as the extents multiply to.
        kv: the number of kv.
    """
    # Blocks stand outermost: then no step of another axis depends on how many there are.
    rank = {"block": 0, "token": 1}
    order = sorted(range(len(factors)), key=lambda i: rank.get(factors[i][0].axis, 2))
    cube = grid.reshape([extent for _, extent in factors]).transpose(order)
    axes = [factors[i][0] for i in order]
    where = _map_int(cube, torch.Tensor.data_ptr)
    homes = _map_int(cube, lambda t: t.untyped_storage().data_ptr())
    steps: dict[Factor, tuple[int, tuple[int, ...]]] = {}
    for factor in list(axes):
        at = axes.index(factor)
        kv_at = next((i for i, f in enumerate(axes) if f.axis == "kv" and i != at), None)
        distances = _distances(where, homes, at, kv_at, kv)
        # Memory objects come and go: whether they lie at equal distances must not change a form.
        if factor.axis in ("block", "token") or distances is None:
            continue
        steps[factor] = (0, distances)
        where, homes = _take_first(where, at), _take_first(homes, at)
        cube = _take_first(cube, at)
        axes.remove(factor)
    entries = 1
    for at in reversed(range(len(axes))):
        steps[axes[at]] = (entries, (0,) * kv)
        entries *= where.shape[at]
    return AddressTable(where.reshape(-1), tuple(cube.reshape(-1)), steps)


def _take_first(cube: npt.NDArray[Entry], at: int) -> npt.NDArray[Entry]:
    # A slice and not an index: an array without axes is still an array.
    first = cube[(slice(None),) * at + (slice(0, 1),)]
    return first.reshape(cube.shape[:at] + cube.shape[at + 1 :])


def _map_int(cube: Grid, read: Any) -> npt.NDArray[np.int64]:
    flat = [read(tensor) for tensor in cube.reshape(-1)]
    return np.array(flat, dtype=np.int64).reshape(cube.shape)


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
