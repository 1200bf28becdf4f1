# SPDX-License-Identifier: Apache-2.0
"""`portakv layouts`: print the presets, or one layout with its picture."""

from __future__ import annotations

import argparse

from portakv.cli.console import (
    Column,
    Report,
    fit_widths,
    output_width,
    print_json,
    print_prose,
    print_table,
)
from portakv.layout.picture import draw
from portakv.layout.presets import PRESETS, Preset, resolve

HELP = "list the named layouts; with a name, its string, note and picture"
DESCRIPTION = """\
Without a name, prints every preset. With a name, prints the preset's facts and
how its tensors are read. A layout string gets its picture too."""

#: A width that no table reaches, and the blanks between the columns of the table.
NO_LIMIT = 1 << 20
GAPS = 6


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
    columns = [Column(name, whole=name != "engine") for name in names]
    rows = [[str(getattr(preset, name)) for name in names] for preset in presets]
    if sum(fit_widths(columns, rows, NO_LIMIT)) + GAPS > output_width():
        # One line a layout is worth more than its releases, which `portakv layouts NAME` prints.
        columns = columns[:-1]
        rows = [row[:-1] for row in rows]
    print_table(columns, rows)
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
    facts = {**_facts(preset), "picture": draw(text), "same_layout": same}
    if json:
        print_json(facts)
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
    print_table([Column(head[0], whole=True), Column(head[1])], rows)
    print(f"\n{facts['picture']}")
    return 0


def _facts(preset: Preset) -> Report:
    """Return a preset as JSON."""
    return {
        "name": preset.name or None,
        "layout": preset.layout,
        "engine": preset.engine,
        "releases": preset.releases,
        "extents": dict(preset.extents),
        "memory": preset.memory or None,
        "note": preset.note,
    }
