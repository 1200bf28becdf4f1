# SPDX-License-Identifier: Apache-2.0
"""Draw a small picture of a layout: how to find one row, then each level from outer to inner."""

from __future__ import annotations

from portakv.layout.language import Factor, Group, Layout, parse

# The meaning of one step along an axis, for a reader who has never seen a KV cache.
_MEANING = {
    "layer": "one step for each layer",
    "kv": "key, then value",
    "block": "a block (page) of block_size tokens",
    "head": "a KV head",
    "dim": "an element of the row",
    "page": "the block's bytes, moved whole",
}


def draw(layout_text: str) -> str:
    """Draw a layout string: a few lines, the first like the Python that finds one element; below it
    one for each container and dimension, outermost first, each inside the one above.

    Raises:
        LayoutError: the string is not a layout.
    """
    layout = parse(layout_text)
    inner = len(layout.containers) - 1
    places = ["list of lists" if at < inner else "list of tensors" for at in range(inner + 1)]
    places += [f"dim {at}" for at in range(len(layout.dims))]
    if layout.open_end:
        places[-1] += " .."  # the last group may cover several trailing dimensions
    groups = layout.containers + layout.dims
    left = [_branch(depth, group) for depth, group in enumerate(groups)]
    wide = max(map(len, left))
    middle = max(map(len, places))
    lines = [
        f"{name:<{wide}}   {place:<{middle}}   {_meaning(group, layout)}".rstrip()
        for name, place, group in zip(left, places, groups, strict=True)
    ]
    return "\n".join([_expression(layout), "", *lines])


def _branch(depth: int, group: Group) -> str:
    return f"{'   ' * (depth - 1)}└─ {group}" if depth else str(group)


def _meaning(group: Group, layout: Layout) -> str:
    if not group.factors:
        return "always extent 1"
    if len(group.factors) > 1:
        return _run(group.factors)
    (factor,) = group.factors
    if factor.part == "%":
        return f"which of those {factor.n} {factor.axis}s"
    if factor.part:
        return f"which {factor.n} {factor.axis}s"
    if factor.axis == "token":
        return "a token of the block" if layout.paged else "a token: its position in the chunk"
    return _MEANING[factor.axis]


def _run(factors: tuple[Factor, ...]) -> str:
    """Return a merged group as it lies in memory, like ``kv 0 [dim 0 1 ..] kv 1 [..] ..``."""
    outer = factors[0]
    inner = factors[1:]
    if not inner:
        return f"{outer} 0 1 .."
    again = "[..]" if len(inner) > 1 else f"[{_run(inner)}]"
    return f"{outer} 0 [{_run(inner)}] {outer} 1 {again} .."


def _expression(layout: Layout) -> str:
    """Return the Python that finds an element: ``kv_caches[layer][kv, block, token, ..]``."""
    start = "kv_caches" if layout.paged else "chunk"
    steps = "".join(f"[{_index(group)}]" for group in layout.containers)
    dims = [_index(group) for group in layout.dims]
    if layout.opaque:
        dims[-1] = "..."
    return f"{start}{steps}[{', '.join(dims)}]"


def _index(group: Group) -> str:
    """Return the index along one level: ``0`` for ``1``, ``block * block_size + token`` for a
    merge."""
    text = ""
    for factor in group.factors:
        sign = {"/": "//"}.get(factor.part, factor.part)
        term = f"{factor.axis} {sign} {factor.n}" if factor.part else factor.axis
        outer = f"({text})" if " + " in text else text
        text = f"{outer} * {_size(factor)} + {term}" if text else term
    return text or "0"


def _size(factor: Factor) -> str:
    if factor.part == "%":
        return str(factor.n)
    extent = "block_size" if factor.axis == "token" else f"{factor.axis}s"
    return f"({extent} // {factor.n})" if factor.part else extent
