# SPDX-License-Identifier: Apache-2.0
"""Draw layouts, extents and tensors for views: mostly right, and some that a view refuses."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from portakv.layout.encodings import Pack, plane_of

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.int32,
    torch.complex64,
    torch.bool,
)
#: Elements of the tensors of a view together, unless each has a storage.
MOST = 1 << 22
#: The argument that declares an axis's extent.
ARGUMENTS = {"layer": "layers", "kv": "kv", "token": "block_size", "head": "heads", "page": "dim"}


@dataclass(frozen=True)
class Drawn:
    """The arguments of one view."""

    tensors: Any
    layout: str
    extents: dict[str, Any]
    reinterpret: bool = False
    encoding: str | None = None


@dataclass(frozen=True)
class Factor:
    """A factor of the layout: its text and its extent (for dim and page: for each kv)."""

    text: str
    axis: str
    extents: tuple[int, ...]


def draw_view(rng: random.Random) -> Drawn:
    """Draw a view whose tensors mostly fit its layout."""
    opaque = rng.random() < 0.2
    paged = opaque or rng.random() < 0.7
    kv = rng.choice((1, 2, 2, 2, 3)) if rng.random() < 0.7 else 0  # 0: not named
    axes: dict[str, tuple[int, ...]] = {}
    many = max(kv, 1)
    if rng.random() < 0.7:
        axes["layer"] = (rng.choice((1, 2, 3, 4)),) * many
    if kv:
        axes["kv"] = (kv,) * many
    if paged:
        axes["block"] = (rng.choice((0, 1, 2, 3, 5)),) * many
    width = rng.choice((1, 2, 3, 4, 6, 8))
    packed: dict[str, Any] = {}
    if opaque and rng.random() < 0.4:
        packed = {"block_size": rng.choice((4, 8, 16)), "dim": rng.choice((64, 128))}
        width = plane_of(Pack(), packed["block_size"], packed["dim"]).slot_bytes
    if opaque:
        axes["page"] = (width,) * many
    else:
        axes["token"] = (rng.choice((0, 1, 2, 4, 5) if not paged else (1, 2, 4, 6)),) * many
        axes["dim"] = (width,) * many
        if rng.random() < 0.6:
            axes["head"] = (rng.choice((1, 2, 3, 4)),) * many
    factors = _split(rng, axes)
    rng.shuffle(factors)
    containers, dims = _groups(rng, factors)
    if not opaque and kv > 1 and rng.random() < 0.2 and _may_differ(containers, dims):
        wide = tuple(rng.choice((2, 4, 6)) for _ in range(kv))
        containers, dims = (
            [[Factor(f.text, f.axis, wide) if f.text == "dim" else f for f in group] for group in x]
            for x in (containers, dims)
        )
        axes["dim"] = wide
    layout = _text(rng, containers, dims)
    extents = _declared(rng, axes, containers, dims, paged, opaque)
    dtype = rng.choice(DTYPES)
    if packed:
        extents = {name: extents[name] for name in extents if name not in packed} | packed
        dtype = rng.choice((torch.uint8, torch.uint8, torch.uint8, *DTYPES))
    tensors = _tensors(rng, containers, dims, many, dtype, layout.endswith((")", "page")))
    return Drawn(tensors, layout, extents, rng.random() < 0.2, "pack" if packed else None)


def _split(rng: random.Random, axes: dict[str, tuple[int, ...]]) -> list[Factor]:
    """Draw the factors of each axis: the whole axis, or its quotient and its remainder."""
    factors = []
    for axis, extents in axes.items():
        by = rng.choice((1, 2, 2, 3))
        if axis in ("kv", "page") or extents[0] % by or rng.random() < 0.7:
            factors.append(Factor(axis, axis, extents))
        else:
            outer = tuple(extent // by for extent in extents)
            factors.append(Factor(f"{axis}/{by}", axis, outer))
            factors.append(Factor(f"{axis}%{by}", axis, (by,) * len(extents)))
    return factors


def _groups(
    rng: random.Random, factors: list[Factor]
) -> tuple[list[list[Factor]], list[list[Factor]]]:
    """Draw which factors are containers, and which stand in parentheses together."""
    containers: list[list[Factor]] = []
    dims: list[list[Factor]] = []
    listed = rng.choice((0.0, 0.2, 0.4))
    for factor in factors:
        may = factor.axis not in ("dim", "page") or rng.random() < 0.1
        into = containers if may and rng.random() < listed and all(factor.extents) else dims
        if into and rng.random() < 0.25:
            into[-1].append(factor)
        else:
            into.append([factor])
    while rng.random() < 0.1:
        dims.insert(rng.randrange(len(dims) + 1), [])
    if not dims:
        dims.append([])
    return containers, dims


def _may_differ(containers: list[list[Factor]], dims: list[list[Factor]]) -> bool:
    """Return True if each kv may have a width: separate tensors, or kv left of a whole dim."""
    if any(f.text == "dim" for group in containers for f in group):
        return False
    if any(f.axis == "kv" for group in containers for f in group):
        return any(f.text == "dim" for group in dims for f in group)
    for group in dims:
        names = [f.text for f in group]
        if "kv" in names and "dim" in names[names.index("kv") :]:
            return True
    return False


def _text(rng: random.Random, containers: list[list[Factor]], dims: list[list[Factor]]) -> str:
    def one(group: list[Factor]) -> str:
        names = " ".join(factor.text for factor in group)
        if not group:
            return "1"
        return f"({names})" if len(group) > 1 or rng.random() < 0.1 else names

    left = " ".join(map(one, containers))
    right = " ".join(map(one, dims))
    return f"{left} | {right}" if containers else right


def _declared(
    rng: random.Random,
    axes: dict[str, tuple[int, ...]],
    containers: list[list[Factor]],
    dims: list[list[Factor]],
    paged: bool,
    opaque: bool,
) -> dict[str, Any]:
    """Draw the declared extents: mostly all that the layout needs."""
    shared = set()
    for group in containers + dims:
        if len({factor.axis for factor in group}) > 1:
            shared |= {factor.axis for factor in group}
    extents: dict[str, Any] = {}
    for axis, of_kv in axes.items():
        if axis == "block" or (axis == "token" and not paged):
            continue
        name = ARGUMENTS.get(axis, axis)
        uneven = len(set(of_kv)) > 1
        needed = axis in shared or uneven or (axis == "kv" and of_kv[0] != 2)
        if rng.random() < (0.97 if needed else 0.3):
            extents[name] = list(of_kv) if uneven else of_kv[0]
    if opaque and rng.random() < 0.97:
        extents["block_size"] = rng.choice((1, 3, 4, 16))
    if extents and rng.random() < 0.03:
        name = rng.choice(list(extents))
        if isinstance(extents[name], int):
            extents[name] += 1
    return extents


def _tensors(
    rng: random.Random,
    containers: list[list[Factor]],
    dims: list[list[Factor]],
    kv: int,
    dtype: torch.dtype,
    open_end: bool,
) -> Any:
    """Draw tensors in nested containers, in one storage or in several."""
    split = any(f.axis == "kv" for group in containers for f in group)
    shapes = []
    for k in range(kv if split else 1):
        shapes.append([_size(group, k, kv) for group in dims])
    sizes = [_size(group, 0, kv) for group in containers]
    which = _kv_of_tensors(containers, kv)
    count = prod(sizes)
    made = _places(rng, count, [shapes[which[n] % len(shapes)] for n in range(count)], dtype)
    if open_end and rng.random() < 0.3:
        made = _split_end(rng, made)
    if rng.random() < 0.1:
        made = [_strange(tensor) for tensor in made]
    if made and rng.random() < 0.03:
        made[rng.randrange(count)] = _odd(rng, made[0])
    level: list[Any] = made
    for size in reversed(sizes):
        kind = rng.choice((list, tuple, dict))
        level = [
            dict(enumerate(level[n : n + size])) if kind is dict else kind(level[n : n + size])
            for n in range(0, len(level), size)
        ]
    return level[0]


def _size(group: list[Factor], k: int, kv: int) -> int:
    """Return the size of a group: planes of kv follow each other, and may differ in width."""
    at = next((n for n, factor in enumerate(group) if factor.axis == "kv"), None)
    if at is None:
        return prod(factor.extents[k] for factor in group)
    inner = sum(prod(factor.extents[j] for factor in group[at + 1 :]) for j in range(kv))
    return inner * prod(factor.extents[k] for factor in group[:at])


def _kv_of_tensors(containers: list[list[Factor]], kv: int) -> list[int]:
    """Return the kv of each tensor in the order of the containers."""
    numbers = [0]
    for group in containers:
        for factor in group:
            steps = range(factor.extents[0])
            is_kv = factor.axis == "kv"
            numbers = [k if is_kv else number for number in numbers for k in steps]
    return numbers


def _places(
    rng: random.Random, count: int, shapes: list[list[int]], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Draw where tensors lie: separate, or in one storage at equal or other distances."""
    how = rng.choice(("separate", "strided", "scattered", "descending"))
    gap = rng.choice((0, 0, 1, 8, 16))
    pad = rng.choice((0, 0, 0, 1, 8))
    order = None
    if shapes and rng.random() < 0.3:
        order = rng.sample(range(len(shapes[0])), len(shapes[0]))
    if max((_room(shape, pad) for shape in shapes), default=0) * count > MOST:
        how = "separate"
        pad = 0
    if how == "separate":
        return [_fresh(shape, dtype, gap, pad, order) for shape in shapes]
    largest = max((_room(shape, pad) for shape in shapes), default=0) + gap
    places = list(range(count))
    if how == "scattered":
        places = rng.sample(range(2 * count), count)
    elif how == "descending":
        places.reverse()
    whole = torch.empty(largest * (2 * count + 1) + gap, dtype=dtype)
    return [
        _at(whole, gap + largest * place, shape, pad, order)
        for place, shape in zip(places, shapes, strict=True)
    ]


def _room(shape: list[int], pad: int) -> int:
    return prod(size + pad for size in shape)


def _fresh(
    shape: list[int], dtype: torch.dtype, gap: int, pad: int, order: list[int] | None
) -> torch.Tensor:
    return _at(torch.empty(gap + _room(shape, pad), dtype=dtype), gap, shape, pad, order)


def _at(
    whole: torch.Tensor, start: int, shape: list[int], pad: int, order: list[int] | None
) -> torch.Tensor:
    """Return a tensor over a part of ``whole``, its dimensions in memory in ``order``."""
    strides = [0] * len(shape)
    step = 1
    for d in reversed(order or range(len(shape))):
        strides[d] = step
        step *= shape[d] + pad
    return whole.as_strided(shape, strides, start)


def _split_end(rng: random.Random, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors with two dimensions in place of the last one."""
    by = rng.choice((1, 2, 3))
    if any(not tensor.dim() or tensor.shape[-1] % by for tensor in tensors):
        return tensors
    split = [tensor.unflatten(-1, (tensor.shape[-1] // by, by)) for tensor in tensors]
    if rng.random() < 0.1:
        return [tensor.transpose(-1, -2) for tensor in split]
    return split


def _strange(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with an odd stride at dimensions of extent 1."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    strides = [step if size != 1 else 7 for size, step in pairs]
    return tensor.as_strided(tensor.shape, strides, tensor.storage_offset())


def _odd(rng: random.Random, like: torch.Tensor) -> torch.Tensor:
    """Draw a tensor unlike the others."""
    shape = list(like.shape)
    if shape and rng.random() < 0.5:
        shape[rng.randrange(len(shape))] += 1
        return torch.empty(shape, dtype=like.dtype)
    return torch.empty(shape, dtype=torch.float64)
