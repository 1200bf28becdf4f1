# SPDX-License-Identifier: Apache-2.0
"""Plots of a result of `portakv bench --host`; `plots.draw` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from portakv_benchmarks.host.cases import DIRECTIONS, size
from portakv_benchmarks.host.loops import STREAMS

Row = Mapping[str, Any]

#: One colour for each way, in all plots; black is the ceiling.
COLOURS = {
    "host": "#0072B2", "host detached": "#56B4E9", "staged": "#009E73",
    "descriptors": "#CC79A7", "direct": "#D55E00", "direct 8": "#D55E00", "lmcache": "#777777",
    "memcpy": "black",
}  # fmt: skip
_MARKS = {"host": "o", "staged": "s", "descriptors": "^", "direct": "x"}
_WORDS = {"d2h": "device to host", "h2d": "host to device"}
#: The host side that stands for its runs: the hardest of those that were measured.
_SIDES = ("block-first random", "dense")


def ratio(results: Mapping[str, Any]) -> Figure | None:
    """Speed against a memcpy of the same bytes over payload: a row for each direction, a column for
    each length of runs."""
    rows = [row for row in results["rows"] if row["kind"] == "host_copy"]
    runs = sorted({row["run_bytes"] for row in rows})
    if len({row["payload_bytes"] for row in rows}) < 2:
        return None
    figure = Figure(figsize=(2.9 * len(runs), 5.6))
    for y, direction in enumerate(DIRECTIONS):
        for x, run in enumerate(runs):
            axes = figure.add_subplot(2, len(runs), y * len(runs) + x + 1)
            mine = [row for row in rows if row["op"] == direction and row["run_bytes"] == run]
            side = next(
                s for s in (*_SIDES, "") if any(row["host_side"] == s for row in mine) or not s
            )
            _ratios(axes, [row for row in mine if row["host_side"] == side])
            axes.set_title(f"{size(run)} runs, {side}", fontsize=8)
            if y:
                axes.set_xlabel("payload in bytes")
            if not x:
                axes.set_ylabel(f"{_WORDS[direction]}\nof memcpy")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="lower center", frameon=False,
                  bbox_to_anchor=(0.5, -0.05))  # fmt: skip
    machine = results["machine"]["device"]
    figure.suptitle(f"Speed against a pinned memcpy of the same bytes · {machine}", fontsize=10)
    figure.tight_layout()
    return figure


def _ratios(axes: Axes, rows: Sequence[Row]) -> None:
    axes.axhline(1.0, color="black", linestyle="--", linewidth=1.2)
    for way, mark in _MARKS.items():
        points = {row["payload_bytes"]: row["ratio"] for row in rows
                  if row["backend"] == way and row["verified"]}  # fmt: skip
        ordered = sorted(points)
        axes.plot(
            ordered, [points[x] for x in ordered], label="chosen" if way == "host" else way,
            color=COLOURS[way], marker=mark, markersize=4, linewidth=1.2,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.05)
    axes.grid(alpha=0.25)


def interference(results: Mapping[str, Any]) -> Figure | None:
    """The slow-down of a loop beside each way, and the link's bandwidth that it reached."""
    rows = [row for row in results["rows"] if row["kind"] == "host_interference"]
    points: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        points.setdefault((row["loop"], row["stream"], row["op"]), []).append(row)
    if not points:
        return None
    most = max(map(len, points.values()))
    figure = Figure(figsize=(11, (1.2 + 0.2 * most) * -(-len(points) // 2)))
    for at, ((loop, stream, direction), mine) in enumerate(points.items()):
        axes = figure.add_subplot(-(-len(points) // 2), 2, at + 1)
        names = [f"{row['backend']}, {row['shape']}" for row in mine]
        slow = [max(0.0, row["slowdown_pct"]) for row in mine]
        axes.barh(names, slow, color=[COLOURS.get(row["backend"], "#BBBBBB") for row in mine])
        for y, row in enumerate(mine):
            words = f" {row['slowdown_pct']:.1f} % · {row['link_gb_per_s']:.3g} GB/s"
            axes.text(slow[y], y, words, va="center", fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.45)
        axes.tick_params(labelsize=7)
        axes.set_title(f"{loop} on {STREAMS[stream]}, {_WORDS[direction]}", fontsize=9)
        axes.set_xlabel("slow-down of the loop in %", fontsize=8)
    machine = results["machine"]["device"]
    figure.suptitle(f"What a transfer does to what runs beside it · {machine}", fontsize=10)
    figure.tight_layout()
    return figure
