# SPDX-License-Identifier: Apache-2.0
"""Pictures that follow the reader's light or dark scheme: settings of matplotlib, and SVG text."""

from __future__ import annotations

from io import StringIO
from typing import Any

from matplotlib.figure import Figure

#: Colours of text and lines, of the ground, and of grids. A dark scheme replaces them. Plain black
#: would stay black there, since matplotlib does not write it out.
INK = "#1f2733"
PAPER = "#ffffff"
GRID = "#c9d1db"
_NIGHT = {INK: "#e8edf3", PAPER: "#161b22", GRID: "#39424e"}

#: For `matplotlib.rc_context`. Text is paths, and ids are fixed: the same rows give the same file.
SETTINGS: Any = {
    "svg.hashsalt": "portakv",
    "svg.fonttype": "path",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
}


def svg(figure: Figure, **metadata: str) -> str:
    """Return a figure that was drawn with `SETTINGS` as an SVG with rules for a dark scheme."""
    text = StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None, **metadata})
    rules = "".join(
        f'[style*="{part}: {day}"] {{ {part}: {night} !important }} '
        for day, night in _NIGHT.items()
        for part in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark) {{ {rules}}}</style>"
    head, opened, rest = text.getvalue().partition("<defs>")
    return f"{head}{style}\n {opened}{rest}"
