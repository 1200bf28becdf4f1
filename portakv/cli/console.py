# SPDX-License-Identifier: Apache-2.0
"""Print the output of commands: tables, with colours on a terminal.

No text is ever cropped. Prose is folded first; names are folded only if prose cannot shrink more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NoReturn, TypeAlias

from portakv.extras import installing as installing

#: Characters of a line without a terminal and without ``COLUMNS``.
PIPED_WIDTH = 160

# ANSI's codes: of a cell that is one of these words, of titles, and of names.
_COLOURS = {"chosen": "1;32", "accepted": "32", "on request": "36", "rejected": "31"}
_BOLD = "1"
_CYAN = "36"
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


def output_width() -> int:
    """Return the characters of a line: ``COLUMNS``, else the terminal's, else `PIPED_WIDTH`."""
    return shutil.get_terminal_size(fallback=(PIPED_WIDTH, 24)).columns


def print_rows(
    titles: Sequence[str],
    rows: Rows,
    prose: Sequence[str] = (),
    right: Sequence[str] = (),
    title: str = "",
) -> None:
    """Print a table with a title above it; each row has one text for each column.

    Args:
        titles: of the columns. Columns have names, which are folded last, unless ``prose`` or
            ``right`` has their titles.
        rows: the cells.
        prose: the titles of columns of prose.
        right: the titles of columns that are aligned to the right, as numbers are.
        title: of the table.
    """
    colours = _has_colours()
    widths = fit_widths(titles, rows, prose, output_width())
    rule = ["-" * width for width in widths]
    lines = [_paint(line, _BOLD, colours) for line in textwrap.wrap(title, output_width())]
    for number, row in enumerate([titles, rule, *rows]):
        columns = []
        for cell, width, name in zip(row, widths, titles, strict=True):
            parts = [textwrap.wrap(x, width, break_on_hyphens=False) for x in cell.split("\n")]
            colour = _COLOURS.get(cell, "" if name in prose else _CYAN)
            if number < 2:
                colour = "" if number else _BOLD
            column = []
            for text in (text for part in parts for text in part or [""]):
                blanks = " " * (width - len(text))
                painted = _paint(text, colour, colours)
                column.append(blanks + painted if name in right else painted + blanks)
            columns.append(column)
        for cells in zip_longest(*columns):
            whole = [text or " " * width for text, width in zip(cells, widths, strict=True)]
            lines.append((" " * _GAP).join(whole).rstrip())
    print("\n".join(lines))


def _has_colours() -> bool:
    """Return whether the output is a terminal whose user wants colours."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and sys.stdout.isatty()


def _paint(text: str, colour: str, colours: bool) -> str:
    return f"\033[{colour}m{text}\033[0m" if colours and text and colour else text


def print_prose(text: str) -> None:
    """Print a paragraph, folded at the width of the output."""
    print(textwrap.fill(text, output_width(), break_long_words=False, break_on_hyphens=False))


def print_json(value: object) -> None:
    """Print a value as JSON, the only thing that a command with ``--json`` writes."""
    print(json.dumps(value, indent=2))


def fit_widths(titles: Sequence[str], rows: Rows, prose: Sequence[str], limit: int) -> list[int]:
    """Return the width of each column, so that the table fits ``limit`` if possible.

    The widest column of prose shrinks first, then the widest of all columns.
    """
    cells = zip(titles, *rows, strict=True)
    widths = [max(len(line) for cell in own for line in cell.split("\n")) for own in cells]
    while sum(widths) + _GAP * (len(widths) - 1) > limit and max(widths) > 1:
        of_prose = [i for i, x in enumerate(titles) if x in prose and widths[i] > _LEAST]
        widths[max(of_prose or range(len(widths)), key=widths.__getitem__)] -= 1
    return widths
