# SPDX-License-Identifier: Apache-2.0
"""What the commands print: tables, through `rich` where it is installed and plainly where not.

Both kinds share one rule for widths: nothing is ever cropped, and a column of names stays whole
for as long as the other columns can give way.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Columns of text where nobody says otherwise: output that is piped has no terminal to fit.
PIPED_WIDTH = 160

# A cell that is one of these words is coloured, on terminals that have colours.
_STYLES = {"chosen": "bold green", "accepted": "green", "rejected": "red"}
_GAP = 2  # blanks between two columns
_LEAST = 8  # a column of prose is not made narrower than this


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: its head.
        whole: its cells are names, which are wrapped only when nothing else can give way.
        right: its cells are numbers, which stand on the right.
    """

    title: str
    whole: bool = False
    right: bool = False


def output_width() -> int:
    """Columns of text to fill: ``COLUMNS``, else the terminal's, else `PIPED_WIDTH`."""
    return shutil.get_terminal_size(fallback=(PIPED_WIDTH, 24)).columns


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table to standard output.

    Args:
        columns: the columns.
        rows: for each row one text for each column.
        title: a line above it.
    """
    widths = fit_widths(columns, rows, output_width())
    if not _print_rich(columns, rows, widths, title):
        _print_plain(columns, rows, widths, title)


def print_prose(text: str) -> None:
    """Print a paragraph, folded at the width of the output."""
    print(textwrap.fill(text, output_width(), break_long_words=False, break_on_hyphens=False))


def print_json(value: Any) -> None:
    """Print a value as JSON, the only thing that a command with ``--json`` writes."""
    print(json.dumps(value, indent=2))


def fit_widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], limit: int) -> list[int]:
    """The width of each column such that a table fits ``limit`` where that can be done.

    Prose gives way first, each column in proportion, down to its longest word; then prose breaks
    words; names come last.
    """
    cells = [[column.title, *(row[i] for row in rows)] for i, column in enumerate(columns)]
    widths = [max(len(line) for cell in cell_list for line in cell.split("\n") or [""])
              for cell_list in cells]  # fmt: skip
    natural = list(widths)
    words = [max(len(word) for cell in cell_list for word in cell.split() or [""])
             for cell_list in cells]  # fmt: skip
    prose = [not column.whole for column in columns]
    spare = limit - _GAP * (len(columns) - 1)
    for may_shrink, least in (
        (prose, words),
        (prose, [_LEAST] * len(columns)),
        ([True] * len(columns), [1] * len(columns)),
    ):
        while sum(widths) > spare:
            able = [i for i, may in enumerate(may_shrink) if may and widths[i] > least[i]]
            if not able:
                break
            widths[max(able, key=lambda i: widths[i] / natural[i])] -= 1
    return widths


def _print_rich(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], widths: Sequence[int], title: str
) -> bool:
    """Print through rich; False where it is not installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    # No markup: layouts and shapes are full of square brackets.
    console = Console(width=output_width(), markup=False, emoji=False, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.header_style = "bold"
    for column, width in zip(columns, widths, strict=True):
        table.add_column(
            column.title,
            width=width,
            overflow="fold",
            justify="right" if column.right else "left",
            style="cyan" if column.whole else None,
        )
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    with console.capture() as captured:
        if title:
            console.print(Text(title, style="bold"))
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
    return True


def _print_plain(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], widths: Sequence[int], title: str
) -> None:
    if title:
        print(title)
    heads = [column.title for column in columns]
    for row in [heads, ["-" * width for width in widths], *rows]:
        cells = [_fold(cell, width) for cell, width in zip(row, widths, strict=True)]
        for at in range(max(map(len, cells))):
            pieces = [cell[at] if at < len(cell) else "" for cell in cells]
            placed = [
                f"{piece:>{width}}" if column.right else f"{piece:<{width}}"
                for piece, width, column in zip(pieces, widths, columns, strict=True)
            ]
            print((" " * _GAP).join(placed).rstrip())


def _fold(cell: str, width: int) -> list[str]:
    folded: list[str] = []
    for line in cell.split("\n"):
        folded += textwrap.wrap(line, width, break_on_hyphens=False) or [""]
    return folded
