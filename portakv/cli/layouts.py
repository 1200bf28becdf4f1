# SPDX-License-Identifier: Apache-2.0
"""`portakv layouts`: print the presets, or one layout with its picture.

A picture shows how to find one row, then each level from outer to inner.
"""

from __future__ import annotations

import argparse

from portakv.cli.console import (
    Report,
    fit_widths,
    output_width,
    print_json,
    print_prose,
    print_rows,
)
from portakv.layout.language import Factor, Group, Layout, parse
from portakv.layout.presets import PRESETS, Preset, resolve

HELP = "list the named layouts; with a name, its string, note and picture"
DESCRIPTION = """\
Without a name, prints every preset. With a name, prints the preset's facts and
how its tensors are read. A layout string gets its picture too."""

#: A width that no table reaches, and the blanks between the columns of the table.
NO_LIMIT = 1 << 20
GAPS = 6

# The meaning of one step along an axis, for a reader who has never seen a KV cache.
_MEANING = {
    "layer": "one step for each layer",
    "kv": "key, then value",
    "block": "a block (page) of block_size tokens",
    "head": "a KV head",
    "dim": "an element of the row",
    "page": "the block's bytes, moved whole",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a preset or a layout string")


def run(args: argparse.Namespace) -> int:
    """Print the table, or one layout."""
    if args.name is not None:
        return _run_one(args.name, args.json)
    if args.json:
        print_json({"layouts": [_facts(preset) for preset in PRESETS.values()]})
        return 0
    names = ["name", "layout", "engine", "releases"]
    # The numbers of LMCache's formats tell a reader the least, and come last.
    presets = sorted(PRESETS.values(), key=lambda preset: preset.name.startswith("lmcache-"))
    rows = [[str(getattr(preset, name)) for name in names] for preset in presets]
    if sum(fit_widths(names, rows, [], NO_LIMIT)) + GAPS > output_width():
        # One line a layout is worth more than its releases, which `portakv layouts NAME` prints.
        del names[-1]
        rows = [row[:-1] for row in rows]
    print_rows(names, rows, prose=["engine"])
    print()
    print_prose(
        f"{len(rows)} layouts. Presets of the same string differ in the order of memory, which a "
        f"view reads from the strides. `portakv layouts NAME` prints that order, the note and the "
        f"picture of a layout."
    )
    return 0


def _run_one(name: str, json: bool) -> int:
    text, _ = resolve(name)
    preset = PRESETS.get(name.strip()) or Preset("", text, "")
    same = [p.name for p in PRESETS.values() if p.layout == text and p.name != preset.name]
    picture = draw(text)
    if json:
        print_json({**_facts(preset), "picture": picture, "same_layout": same})
        return 0
    described = {
        "name": preset.name,
        "string": text,
        "engine": preset.engine,
        "releases": preset.releases,
        "memory": preset.memory,
        "extents": ", ".join(f"{name}={value}" for name, value in preset.extents.items()),
        "note": preset.note,
        "same string": ", ".join(same),
    }
    head, *rows = [[key, value] for key, value in described.items() if value]
    print_rows(head, rows, prose=head[1:])
    print(f"\n{picture}")
    return 0


def _facts(preset: Preset) -> Report:
    """Return a preset as JSON."""
    return {
        **vars(preset),
        "name": preset.name or None,
        "extents": dict(preset.extents),
        "memory": preset.memory or None,
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
    left = [f"{'   ' * (depth - 1)}└─ {group}" for depth, group in enumerate(groups)]
    left[0] = str(groups[0])
    wide = max(map(len, left))
    middle = max(map(len, places))
    lines = [
        f"{name:<{wide}}   {place:<{middle}}   {_meaning(group, layout)}".rstrip()
        for name, place, group in zip(left, places, groups, strict=True)
    ]
    return "\n".join([_expression(layout), "", *lines])


def _meaning(group: Group, layout: Layout) -> str:
    if not group.factors:
        return "always extent 1"
    if len(group.factors) > 1:
        return _merged(group.factors)
    (factor,) = group.factors
    if factor.part == "%":
        return f"which of those {factor.n} {factor.axis}s"
    if factor.part:
        return f"which {factor.n} {factor.axis}s"
    if factor.axis == "token":
        return "a token of the block" if layout.paged else "a token: its position in the chunk"
    return _MEANING[factor.axis]


def _merged(factors: tuple[Factor, ...]) -> str:
    """Return a merged group as it lies in memory, like ``kv 0 [dim 0 1 ..] kv 1 [..] ..``."""
    outer = factors[0]
    inner = factors[1:]
    if not inner:
        return f"{outer} 0 1 .."
    again = "[..]" if len(inner) > 1 else f"[{_merged(inner)}]"
    return f"{outer} 0 [{_merged(inner)}] {outer} 1 {again} .."


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
