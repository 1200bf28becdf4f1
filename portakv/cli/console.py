# SPDX-License-Identifier: Apache-2.0
"""Print the output of commands: tables, with `rich` if it is installed and as plain text if not.

No text is ever cropped. Prose is folded first; names are folded only if prose cannot shrink more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, NoReturn, TypeAlias

from portakv.extras import installing as installing

#: Characters of a line without a terminal and without ``COLUMNS``.
PIPED_WIDTH = 160

# A cell that is one of these words is coloured, on terminals that have colours.
_STYLES = {"chosen": "bold green", "accepted": "green", "on request": "cyan", "rejected": "red"}
_GAP = 2  # blanks between two columns
_LEAST = 8  # a column of prose gets narrower than this only together with all others

Rows = Sequence[Sequence[str]]
#: A JSON object that a command prints; its values have any JSON type.
Report: TypeAlias = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """A parser of options whose errors begin with the error, not with the usage."""

    def error(self, message: str) -> NoReturn:
        """Print one sentence, and which command lists the options; exit with 2."""
        self.exit(2, f"{self.prog}: error: {message}\n`{self.prog} --help` lists all options.\n")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    title: str
    whole: bool = False  # the cells are names, which are folded last
    right: bool = False  # the cells are numbers, aligned to the right


def columns_of(
    titles: Sequence[str], prose: Sequence[str] = (), right: Sequence[str] = ()
) -> list[Column]:
    """Return columns of names, but for those of ``prose``; those of ``right`` are aligned there."""
    return [Column(title, title not in prose, title in right) for title in titles]


def output_width() -> int:
    """Return the characters of a line: ``COLUMNS``, else the terminal's, else `PIPED_WIDTH`."""
    return shutil.get_terminal_size(fallback=(PIPED_WIDTH, 24)).columns


def print_table(columns: Sequence[Column], rows: Rows, title: str = "") -> None:
    """Print a table with a title above it; each row has one text for each column."""
    widths = fit_widths(columns, rows, output_width())
    try:
        lines = _by_rich(columns, rows, widths, title)
    except ImportError:
        lines = _plainly(columns, rows, widths, title)
    print("\n".join(line.rstrip() for line in lines))


def print_rows(
    titles: Sequence[str],
    rows: Rows,
    prose: Sequence[str] = (),
    right: Sequence[str] = (),
    title: str = "",
) -> None:
    """Print a table of columns with these titles; see `columns_of`."""
    print_table(columns_of(titles, prose, right), rows, title)


def print_prose(text: str) -> None:
    """Print a paragraph, folded at the width of the output."""
    print(textwrap.fill(text, output_width(), break_long_words=False, break_on_hyphens=False))


def print_json(value: object) -> None:
    """Print a value as JSON, the only thing that a command with ``--json`` writes."""
    print(json.dumps(value, indent=2))


def fit_widths(columns: Sequence[Column], rows: Rows, limit: int) -> list[int]:
    """Return the width of each column, so that the table fits ``limit`` if possible.

    The widest column of prose shrinks first, then the widest of all columns.
    """
    cells = zip([column.title for column in columns], *rows, strict=True)
    widths = [max(len(line) for cell in own for line in cell.split("\n")) for own in cells]
    while sum(widths) + _GAP * (len(widths) - 1) > limit and max(widths) > 1:
        prose = [i for i, c in enumerate(columns) if not c.whole and widths[i] > _LEAST]
        widths[max(prose or range(len(widths)), key=widths.__getitem__)] -= 1
    return widths


def _by_rich(columns: Sequence[Column], rows: Rows, widths: Sequence[int], title: str) -> list[str]:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # No markup: layouts and shapes are full of square brackets.
    console = Console(width=output_width(), markup=False, emoji=False, highlight=False)
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    for column, width in zip(columns, widths, strict=True):
        style = "cyan" if column.whole else None
        justify: Literal["right", "left"] = "right" if column.right else "left"
        table.add_column(column.title, style=style, width=width, overflow="fold", justify=justify)
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    with console.capture() as captured:
        if title:
            console.print(Text(title, style="bold"))
        console.print(table)
    return captured.get().splitlines()


def _plainly(columns: Sequence[Column], rows: Rows, widths: Sequence[int], title: str) -> list[str]:
    lines = textwrap.wrap(title, output_width())
    rule = ["-" * width for width in widths]
    for row in [[column.title for column in columns], rule, *rows]:
        folded = []
        for cell, width, column in zip(row, widths, columns, strict=True):
            parts = [textwrap.wrap(x, width, break_on_hyphens=False) for x in cell.split("\n")]
            side = ">" if column.right else "<"
            folded.append([f"{one:{side}{width}}" for part in parts for one in part or [""]])
        for cells in zip_longest(*folded, fillvalue=""):
            padded = [f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)]
            lines.append((" " * _GAP).join(padded))
    return lines
