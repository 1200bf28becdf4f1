# SPDX-License-Identifier: Apache-2.0
"""Tensors that fit a layout, made from its extents: for `explain`, the demo and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from portakv.errors import LayoutError
from portakv.layout.language import (
    Group,
    Layout,
    Values,
    factor_extent,
    known_parts,
    parse,
    positive,
)
from portakv.layout.presets import memory_order, resolve
from portakv.view.bound import as_dtype
from portakv.view.view import KVView


def example_tensors(
    layout: str,
    *,
    layers: int = 1,
    kv: int | None = None,
    heads: int | None = None,
    dim: int | Sequence[int] | None = None,
    blocks: int = 1,
    tokens: int = 1,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
) -> Any:
    """Return uninitialised tensors of a layout or preset, in the containers that it names.

    They are contiguous, unless a preset has another memory order. ``tokens`` are those of a block,
    or of the chunk if there is no `block`. ``dim`` counts elements (of a page: its elements), one
    number or one for each kv. None means the preset's value; else 1, and 2 kv if the layout names
    them and ``dim`` has one number.

    Raises:
        LayoutError: the layout cannot be parsed, a factor does not divide its extent, or the
            number of widths is not the number of kv.
    """
    text, fixed = resolve(layout)
    always: dict[str, Any] = {**fixed}
    parsed = parse(text)
    memory = parse(memory_order(layout))
    dim = always.get("dim", 1) if dim is None else dim
    if kv is None:
        usual = 2 if "kv" in parsed.axes else 1
        if isinstance(dim, Sequence):
            usual = len(dim)
        kv = always.get("kv", usual)
    widths = dim if isinstance(dim, Sequence) else [dim] * positive("kv", kv)
    if len(widths) != kv:
        raise LayoutError(
            f"dim={dim} holds {len(widths)} widths, but {layout!r} has kv={kv}; give one number, "
            f"or one for each kv."
        )
    shared = {
        "kv": kv,
        "layer": positive("layers", layers),
        "head": positive("heads", always.get("heads", 1) if heads is None else heads),
        "block": positive("blocks", blocks),
        "token": positive("tokens", tokens),
    }
    values = [{**shared, "dim": width, "page": width} for width in widths]
    empty = torch.empty(0, dtype=as_dtype(dtype), device=device)
    made = _nested(memory, memory.containers, values, 0, empty)
    return made if memory == parsed else _ordered(made, memory, parsed)


def _nested(
    layout: Layout, containers: Sequence[Group], values: Values, k: int, empty: torch.Tensor
) -> Any:
    """Return the tensors inside some container levels, of which kv ``k`` is known, like
    ``empty``."""
    if not containers:
        return empty.new_empty([known_parts(group, values)[k] for group in layout.dims])
    factors = containers[0].factors
    kv_at = next((i for i, factor in enumerate(factors) if factor.axis == "kv"), None)
    steps = product(*(range(factor_extent(factor, values[0]) or 1) for factor in factors))
    kvs = [k if kv_at is None else step[kv_at] for step in steps]
    return [_nested(layout, containers[1:], values, at, empty) for at in kvs]


def _ordered(made: Any, memory: Layout, layout: Layout) -> Any:
    """Return tensors of a memory order, read by a layout; one more container is a list of views."""
    if not isinstance(made, torch.Tensor):
        return [_ordered(one, memory, layout) for one in made]
    groups = [*layout.containers[len(memory.containers) :], *layout.dims]
    turned = made.permute([memory.dims.index(group) for group in groups])
    return list(turned.unbind(0)) if len(groups) > len(layout.dims) else turned


def example_chunk(cache: KVView, layout: str, tokens: int) -> Any:
    """Return a contiguous memory object for ``tokens`` tokens of a cache, in its dtype."""
    dtype = cache.owners[0].dtype
    paged = parse(resolve(layout)[0]).paged
    size = cache.block_size or tokens
    return example_tensors(
        layout,
        layers=cache.layers,
        kv=cache.kv,
        heads=cache.heads,
        dim=[width // dtype.itemsize for width in cache.widths],
        blocks=-(-tokens // size),
        tokens=size if paged else tokens,
        dtype=dtype,
        device=cache.device,
    )
