# SPDX-License-Identifier: Apache-2.0
"""The pictures of ``docs/benchmarks.md``; `benchmarks.choosing` writes them. They need matplotlib.

Each picture is an SVG that follows the reader's light or dark scheme, and names the result file
that it shows with the file's checksum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from portakv_benchmarks.shared.harness import Row, grouped, having
from portakv_benchmarks.shared.plots import COLOURS
from portakv_benchmarks.shared.themes import INK, SETTINGS, svg

_SETTINGS = {**SETTINGS, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
_WIDTH = 8.0
_DIRECTIONS = {"d2h": "device to host", "h2d": "host to device"}
_MARKS = {
    "cuda": "o",
    "triton": "s",
    "compiled": "d",
    "reference": "^",
    "host": "o",
    "staged": "s",
    "batched_memcpy": "^",
    "zero_copy": "x",
}
#: The strategies of the picture of a model, by method and moved rows, with their names there.
_TRANSFERS = {
    ("memcpy", "dense"): "one plain memcpy",
    ("host", "2 KB runs, dense"): "chosen",
    ("host detached", "2 KB runs, dense"): "chosen, detached",
    ("zero_copy 8", "2 KB runs, dense"): "zero_copy, 8 thread blocks",
    ("lmcache", "2 KB runs, dense"): "LMCache's kernel",
}
#: The methods of the picture of a disk, by kind of row, with their names there.
_METHODS = {
    "storage_engine": {
        "ring": "PortaKV, io_uring",
        "threads": "PortaKV, threads",
        "fio io_uring": "fio, io_uring",
        "fio psync": "fio, threads",
    },
    "storage_tier": {
        "tier": "PortaKV's disk tier",
        "engine": "its I/O engine alone",
        "lmcache": "LMCache, no checks",
    },
}
#: Colours of bars that both schemes show.
_SHADES = {"engine": "#8cc2ea", "fio io_uring": "#888888", "fio psync": "#b4b4b4"}


def backends(rows: list[Row], device: str) -> Figure:
    """Draw the bandwidth of a gather over its payload, a line for each backend."""
    layout = "layer | kv block token head dim"
    copies = having(rows, kind="copy", verified=True, row_bytes=2048, layers="apart", cache=layout)
    copies = [r for r in copies if r["shape"].startswith("llama3-8b") and r["slots_used"] < 1]
    figure = Figure(figsize=(_WIDTH, 3.8))
    axes = figure.subplots()
    ceiling = having(copies, backend="copy_")
    _line(axes, ceiling, "gb_per_s", label="copy_, the ceiling", color=INK, linestyle="--")
    for backend in ("cuda", "triton", "compiled", "reference"):
        drawn = having(copies, backend=backend, index="random", op="gather")
        style = {"color": COLOURS[backend], "marker": _MARKS[backend], "markersize": 5}
        _line(axes, drawn, "gb_per_s", label=backend, **style)
    _sizes(axes)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GB/s, read and written")
    axes.legend(frameon=False)
    axes.set_title(f"Gather of random slots, Llama-3 8B, each layer an allocation · {device}")
    return figure


def strategies(rows: list[Row], device: str) -> Figure:
    """Draw the speed of the strategies against a memcpy, by direction and length of runs."""
    copies = having(rows, kind="host_copy", verified=True)
    runs = (256, 32768, 2097152)
    words = ("runs of 256 B", "runs of 32 KB", "runs of 2 MB")
    figure = Figure(figsize=(_WIDTH, 5.4))
    grid = figure.subplots(2, len(runs), sharey=True)
    for (row, op), (column, run) in product(enumerate(_DIRECTIONS), enumerate(runs)):
        axes = grid[row][column]
        axes.axhline(1.0, color=INK, linestyle="--", linewidth=1.2)
        drawn = having(copies, op=op, run_bytes=run)
        sides = {r["host_side"] for r in drawn}
        side = "block-first random" if "block-first random" in sides else "dense"
        for backend in ("host", "staged", "batched_memcpy", "zero_copy"):
            name = "chosen" if backend == "host" else backend
            style = {"color": COLOURS[backend], "marker": _MARKS[backend], "markersize": 5}
            if backend == "host":
                style |= {"linewidth": 3, "alpha": 0.5}
            _line(
                axes, having(drawn, backend=backend, host_side=side), "ratio", label=name, **style
            )
        _sizes(axes, labelled=row == 1)
        axes.set_ylim(0.65, 1.05)
        if row == 0:
            axes.set_title(words[column], fontsize=10)
    for row, direction in enumerate(_DIRECTIONS.values()):
        grid[row][0].set_ylabel(f"{direction},\nof memcpy")
    handles, labels = grid[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, loc="lower center", frameon=False)
    figure.suptitle(
        f"Speed against one memcpy of as many bytes (from 0.65) · {device}", fontsize=11
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def model(rows: list[Row], device: str) -> Figure:
    """Draw how much transfers slow a model's loop down, and the rate that they reach."""
    loops = having(rows, kind="host_interference", verified=True, stream="default")
    figure = Figure(figsize=(_WIDTH, 5.2))
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    cases = product(("matmul", "attention"), _DIRECTIONS.items())
    for axes, (loop, (op, direction)) in zip(grid.flat, cases, strict=True):
        for at, (backend, shape) in enumerate(_TRANSFERS):
            for row in having(loops, loop=loop, op=op, backend=backend, shape=shape):
                slow = max(0.0, row["slowdown_pct"])
                axes.barh(at, slow, color=COLOURS[backend], height=0.7)
                note = f" {row['slowdown_pct']:.1f} % · {row['link_gb_per_s']:.0f} GB/s"
                axes.text(slow, at, note, va="center", fontsize=9)
        axes.set_yticks(range(len(_TRANSFERS)), _TRANSFERS.values())
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(0, 30_000)
        axes.set_xticks([0, 10, 100, 1000], ["0", "10", "100", "1000"])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{loop}, {direction}", fontsize=10)
    grid[0][0].invert_yaxis()
    for axes in grid[1]:
        axes.set_xlabel("slow-down of the loop in %")
    figure.suptitle(f"A model's loop during continuous transfers · {device}", fontsize=11)
    figure.tight_layout()
    return figure


def disks(rows: list[Row], device: str) -> Figure:
    """Draw the rates of a disk: its I/O engines next to fio, and its tier next to LMCache's."""
    figure = Figure(figsize=(_WIDTH, 3.9))
    titles = ("Random slots of 1 MB", "Blocks of 1 MB with checksums and index")
    for axes, kind, title in zip(figure.subplots(1, 2), _METHODS, titles, strict=True):
        places = list[float]()
        names = list[str]()
        at = 0.0
        for case in grouped(having(rows, kind=kind, shape="1 MB", verified=True), "op"):
            axes.text(0, at, case[0]["op"], va="center", fontsize=10, weight="bold")
            at += 1
            for row in case:
                colour = _SHADES.get(row["backend"]) or COLOURS[row["backend"]]
                axes.barh(at, row["gb_per_s"], color=colour, height=0.8)
                axes.text(row["gb_per_s"], at, f" {row['gb_per_s']:.2f}", va="center", fontsize=9)
                places.append(at)
                names.append(_METHODS[kind][row["backend"]])
                at += 1
            at += 0.3
        axes.set_yticks(places, names, fontsize=9)
        axes.set_ylim(at - 0.5, -0.8)
        axes.margins(x=0.15)
        axes.set_xlabel("GB/s")
        axes.set_title(title, fontsize=10, pad=10)
    figure.suptitle(f"One disk, medians of measurements in turns · {device}'s host", fontsize=11)
    figure.tight_layout()
    return figure


def pulls(rows: list[Row], device: str) -> Figure:
    """Draw the rate of pulls from mapped memory, of the rate of a raw copy, over payload."""
    figure = Figure(figsize=(_WIDTH, 3.6))
    axes = figure.subplots()
    mapped = having(rows, kind="migrate_mapped", backend="mapped", verified=True)
    colours = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#777777")
    for case, mark, colour in zip(grouped(mapped, "shape"), "os^xdv", colours, strict=False):
        style = {"marker": mark, "markersize": 5, "color": colour}
        _line(axes, case, "of_raw", label=case[0]["shape"], **style)
    axes.axhline(1.0, color=INK, linestyle="--", linewidth=1.2)
    _sizes(axes)
    axes.set_ylim(0, 1.2)
    axes.set_ylabel("rate, of a raw copy")
    axes.legend(frameon=False, ncols=2, loc="lower left")
    axes.set_title(f"Pulls of scattered blocks between the memories of two {device}s", fontsize=11)
    return figure


def _line(axes: Axes, rows: Sequence[Row], figure: str, **style: Any) -> None:
    points = sorted({row["payload_bytes"]: row[figure] for row in rows}.items())
    axes.plot([size for size, _ in points], [value for _, value in points], **style)


def _sizes(axes: Axes, labelled: bool = True) -> None:
    """Set a logarithmic axis of payloads with sizes in words, and a grid."""
    axes.set_xscale("log")
    axes.set_xticks([1e6, 1e7, 1e8, 1e9])
    words = FuncFormatter(lambda x, _: f"{x / 1e6:g} MB" if x < 1e9 else f"{x / 1e9:g} GB")
    axes.xaxis.set_major_formatter(words)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=9)
    if labelled:
        axes.set_xlabel("payload")
    axes.grid(alpha=0.5)


PICTURES: dict[str, Callable[[list[Row], str], Figure]] = {
    "backends": backends,
    "strategies": strategies,
    "model": model,
    "disks": disks,
    "pulls": pulls,
}


def write(folder: Path, name: str, rows: list[Row], device: str, source: str) -> Path:
    """Write one picture into a folder; returns its path."""
    path = folder / f"choosing-{name}.svg"
    with matplotlib.rc_context(_SETTINGS):
        path.write_text(svg(PICTURES[name](rows, device), Source=source), encoding="utf-8")
    return path
