# SPDX-License-Identifier: Apache-2.0
"""Tensors that fit a layout, made from its extents: for `explain`, the demo and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from portakv.errors import LayoutError
from portakv.layout.extents import Values, factor_extent, known_parts, positive
from portakv.layout.language import Factor, Group, Layout, parse
from portakv.layout.presets import memory_order, resolve
from portakv.view.bound import as_dtype

if TYPE_CHECKING:
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
    """Uninitialised tensors of a layout or preset, in the containers that it names: contiguous, but
    where a preset says that its tensors lie in another memory order.

    ``tokens`` are those of a block, or of the chunk if there is no `block`; ``dim`` counts elements
    (of a page: its elements), one number or one for each kv. What is None is what the preset says;
    else 1, and 2 kv if the layout names them and ``dim`` gives no number of widths.

    Raises:
        LayoutError: the layout cannot be parsed, a factor does not divide its extent, or the
            number of widths is not the number of kv.
    """
    text, fixed = resolve(layout)
    always: dict[str, Any] = {**fixed}
    parsed = parse(text)
    for name, extent in {"layers": layers, "blocks": blocks, "tokens": tokens}.items():
        if extent != 0:
            positive(name, extent)
    dim = always.get("dim", 1) if dim is None else dim
    usual = len(dim) if isinstance(dim, Sequence) else 2 if "kv" in parsed.axes else 1
    kv = always.get("kv", usual) if kv is None else kv
    widths = list(dim) if isinstance(dim, Sequence) else [dim] * kv
    if len(widths) != kv:
        raise LayoutError(
            f"dim={dim} holds {len(widths)} widths, but kv={kv} was asked of {layout!r}; give one "
            f"number, or one for each kv."
        )
    counted = always.get("heads", 1) if heads is None else heads
    shared = {"layer": layers, "kv": kv, "head": counted, "block": blocks, "token": tokens}
    values = [
        {axis: extent or 1 for axis, extent in {**shared, "dim": width, "page": width}.items()}
        for width in widths
    ]
    memory = parse(memory_order(layout))
    empty = torch.empty(0, dtype=as_dtype(dtype), device=device)
    made = _level(memory, memory.containers, values, 0, empty)
    return made if memory == parsed else _ordered(made, memory, parsed)


def _ordered(made: Any, memory: Layout, layout: Layout) -> Any:
    """Tensors of a memory order, read in the order of a layout; its containers are views."""
    if not isinstance(made, torch.Tensor):
        return [_ordered(one, memory, layout) for one in made]
    taken = len(memory.containers)
    wanted = [*layout.containers[taken:], *layout.dims]
    return _unbound(
        made.permute([memory.dims.index(group) for group in wanted]), len(wanted) - len(layout.dims)
    )


def _unbound(tensor: torch.Tensor, levels: int) -> Any:
    """The leading dimensions of a tensor as lists of views."""
    return [_unbound(one, levels - 1) for one in tensor.unbind(0)] if levels else tensor


def example_chunk(cache: KVView, layout: str, tokens: int) -> Any:
    """A contiguous memory object for ``tokens`` tokens of a cache, in the cache's dtype."""
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


def _level(
    layout: Layout, containers: Sequence[Group], values: Values, k: int, empty: torch.Tensor
) -> Any:
    """The tensors of one container level, of which kv ``k`` is known, like ``empty``."""
    if not containers:
        return empty.new_empty([known_parts(group, values)[k] for group in layout.dims])
    group, rest = containers[0], containers[1:]
    kv_at = next((i for i, factor in enumerate(group.factors) if factor.axis == "kv"), None)
    inner = 1 if kv_at is None else prod(_extent(f, values) for f in group.factors[kv_at + 1 :])
    items = []
    for position in range(prod(_extent(factor, values) for factor in group.factors)):
        at = k if kv_at is None else position // inner % len(values)
        items.append(_level(layout, rest, values, at, empty))
    return items


def _extent(factor: Factor, values: Values) -> int:
    return factor_extent(factor, values[0]) or 1
