# SPDX-License-Identifier: Apache-2.0
"""Plots of a result: ``python -m benchmarks.shared.plots benchmarks/results/h200.json``.

Write SVG files next to the result. They need matplotlib (`pip install '.[bench]'`):

* ``h200.json``: bandwidth against bytes with the ceiling dashed, a heat map of time against
  `copy_`, the host time of a call, and the methods for one chunk;
* ``h200-host.json``: speed against a memcpy, and the slow-down of a model during transfers;
* ``h200-plugs.json``: the time of each integration, of the engine's own code;
* ``h200-storage.json``: rates, and loads while stores run;
* ``h200-x2.json``: pulls against raw copies;
* ``engines-h200.json``: what a request waits for, with each connector;
* ``h200-encodings.json``: payload over wire, which is the rate of raw rows of that of a memcpy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from portakv_benchmarks.shared import recorded
from portakv_benchmarks.shared.harness import Fields, Row, grouped, having
from portakv_benchmarks.shared.shapes import in_decimal, in_words
from portakv_benchmarks.shared.themes import INK, SETTINGS, svg

# One colour for each method, the same in all plots (Okabe and Ito's, which colour-blind readers
# distinguish); ink is the ceiling, shades of grey are peers.
COLOURS = {
    "cuda": "#0072B2", "triton": "#009E73", "compiled": "#CC79A7", "compiled graph": "#882255",
    "reference": "#D55E00", "lmcache slot kernel": "#777777", "lmcache block kernel": "#AAAAAA",
    "copy_": INK, "memcpy": INK, "host": "#0072B2", "host detached": "#56B4E9",
    "staged": "#009E73", "batched_memcpy": "#CC79A7", "zero_copy": "#D55E00",
    "zero_copy 8": "#D55E00", "pageable": "#0072B2", "lmcache": "#777777", "own": "#777777",
    "portakv": "#0072B2", "ring": "#0072B2",
    "threads": "#56B4E9", "tier": "#0072B2", "fio io_uring": "#444444", "fio psync": "#999999",
    "engine": "#444444", "mapped": "#0072B2", "raw copy": INK, "copy_rows": "#E69F00",
}  # fmt: skip
_MARKS = {"cuda": "o", "triton": "s", "reference": "^", "lmcache slot kernel": "x"}
_SWEEP = "llama3-8b"  # the shape that is measured from one token up
_LINK_MARKS = {"host": "o", "staged": "s", "batched_memcpy": "^", "zero_copy": "x"}
_WORDS = {"d2h": "device to host", "h2d": "host to device"}
#: The host side that stands for its runs: the hardest of those that were measured.
_SIDES = ("block-first random", "dense")
#: Where the rows of a known prompt come from, by connector and part; see `engines.rows`.
_SOURCES = {
    ("off", "recompute"): ("computed again", INK),
    ("portakv disk", "hit"): ("PortaKV, disk", "#56B4E9"),
    ("vllm", "hit"): ("vLLM's offloading, host memory", "#777777"),
    ("portakv host", "hit"): ("PortaKV, host memory", "#0072B2"),
    ("off", "device hit"): ("the GPU's own cache", "#009E73"),
}
_STREAMS = {"default": "the default stream", "own": "a separate stream"}


def draw(results: Fields, folder: Path, stem: str) -> list[Path]:
    """Write each plot that has rows in the result into a folder as ``STEM-NAME.svg``."""
    written = []
    kinds: dict[str, tuple[str, Callable[[list[Row], str], Figure | None]]] = {
        "bandwidth": ("copy", bandwidth), "heatmap": ("copy", heat_map),
        "host": ("overhead", host_cost), "ladder": ("ladder", methods_of_the_seed),
        "ratio": ("host_copy", ratio), "interference": ("host_interference", interference),
        "own": ("plug_copy", compared_with_own), "beside": ("plug_interference", interference),
        "rates": ("storage_engine", stored), "tier": ("storage_tier", stored),
        "urgent": ("storage_beside", urgent), "pulls": ("migrate_mapped", pulled),
        "first-token": ("engine_prompt", first_tokens),
        "payload": ("encoding_link", payload_over_link),
    }  # fmt: skip
    with matplotlib.rc_context(SETTINGS):
        for name, (kind, make) in kinds.items():
            rows = having(results["rows"], kind=kind)
            if rows and (figure := make(rows, results["machine"]["device"])):
                path = folder / f"{stem}-{name}.svg"
                path.write_text(svg(figure), encoding="utf-8")
                written.append(path)
    return written


def bandwidth(copies: list[Row], device: str) -> Figure | None:
    """Draw bandwidth, read and written, against bytes: Llama-3 8B from one token up."""
    rows = having(copies, row_bytes=2048, cache="layer | kv block token head dim", layers="apart")
    rows = [row for row in rows if row["shape"].startswith(_SWEEP) and row["slots_used"] < 1]
    if len({row["payload_bytes"] for row in rows}) < 2:
        return None
    figure = Figure(figsize=(9.5, 4.2))
    for op, axes in zip(("gather", "scatter"), figure.subplots(1, 2), strict=True):
        _line(
            axes,
            having(rows, backend="copy_"),
            "gb_per_s",
            label="copy_ (ceiling)",
            color=INK,
            linestyle="--",
            linewidth=1.6,
        )
        moved = having(rows, op=op, index="random")
        for method in _methods(moved):
            _line(
                axes,
                having(moved, backend=method),
                "gb_per_s",
                label=method,
                markersize=4,
                linewidth=1.2,
                color=COLOURS.get(method),
                marker=_MARKS.get(method, "d"),
            )
        _sizes_below(axes)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{op}, random slots, layers apart", fontsize=9)
    figure.axes[0].set_ylabel("GB/s, read and written")
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"Llama-3 8B, 1 to 16,384 tokens, rows of 2 KB · {device}", fontsize=10)
    return figure


def heat_map(copies: list[Row], device: str) -> Figure | None:
    """Draw the time of `copy_` / the time of the method, for each workload and method.

    The slots are random; shapes without slots use blocks."""
    rows = [row for row in copies if row["backend"] != "copy_" and row["verified"]]
    slotted = {row["shape"] for row in having(rows, index="random")}
    rows = [row for row in rows if row["index"] == "random" or row["shape"] not in slotted]
    methods = [method for method in _methods(rows) if method != "lmcache block kernel"]
    columns = list(product(methods, ("gather", "scatter")))
    rows.sort(key=lambda row: (row["layers"], row["payload_bytes"], row["shape"]))
    lines = list(dict.fromkeys(map(_workload, rows)))
    if not columns or not lines:
        return None
    matches = {(_workload(row), row["backend"], row["op"]): row["ratio"] for row in rows}
    cells = [[matches.get((line, *column), float("nan")) for column in columns] for line in lines]
    figure = Figure(figsize=(2.6 + 0.55 * len(columns), 0.6 + 0.19 * len(lines)))
    axes = figure.subplots()
    axes.imshow(cells, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
    for (y, line), (x, column) in product(enumerate(lines), enumerate(columns)):
        if (ratio := matches.get((line, *column))) is not None:
            ink = "#fefefe" if ratio < 0.12 or ratio > 0.92 else "black"
            axes.text(x, y, f"{ratio:.2f}", ha="center", va="center", fontsize=6.5, color=ink)
    axes.set_yticks(range(len(lines)), lines, fontsize=6.5)
    axes.set_xticks(range(len(columns)), [op for _, op in columns], fontsize=6, rotation=90)
    for at, method in enumerate(methods):
        axes.text(
            2 * at + 0.5, -0.7, method.replace(" ", "\n", 1), ha="center", va="bottom", fontsize=7
        )
        axes.axvline(2 * at - 0.5, color="white", linewidth=2)
    axes.set_title(
        f"Speed against copy_ of the same bytes (1 = a memory copy) · {device}", fontsize=9, pad=26
    )
    return figure


def host_cost(rows: list[Row], device: str) -> Figure:
    """Draw the host time of a registered call: the launch alone, and the rest of the call."""
    figure = Figure(figsize=(6.2, 0.9 + 0.32 * len(rows)))
    axes = figure.subplots()
    names = [f"{row['backend']}, {row['ids']}" for row in rows]
    launches = [row["launch_us"] for row in rows]
    added = [max(0.0, row["call_us"] - row["launch_us"]) for row in rows]
    axes.barh(names, launches, color="#999999", label="the prepared launch alone")
    axes.barh(names, added, left=launches, color="#0072B2", label="added by from_gpu")
    for y, row in enumerate(rows):
        axes.text(row["call_us"], y, f" {row['call_us']:.1f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("host time of one call in microseconds")
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    axes.margins(x=0.12)
    axes.set_title(f"Host cost of a registered call · {device}", fontsize=9, pad=22)
    return figure


def methods_of_the_seed(rows: list[Row], device: str) -> Figure:
    """Draw every method for one chunk, slowest first, on a logarithmic axis."""
    slowest = {own[0]["way"]: max(r["p50_us"] for r in own) for own in grouped(rows, "way")}
    order = sorted(slowest, key=lambda method: -slowest[method])
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(order)))
    axes = figure.subplots()
    places = {"gather": (-0.2, 1.0), "scatter": (0.2, 0.55), "copy_": (0.0, 1.0)}
    for op, (y, method) in product(places, enumerate(order)):
        shift, shade = places[op]
        for row in having(rows, way=method, op=op):
            time = row["p50_us"]
            colour = COLOURS.get(method, "#BBBBBB")
            axes.barh(y + shift, time, height=0.38, color=colour, alpha=shade)
            note = f" {time:.4g} us" if time < 1e3 else f" {time / 1e3:.4g} ms"
            note += "" if op == "copy_" else f" ({op})"
            axes.text(time, y + shift, note, va="center", fontsize=7)
    axes.set_yticks(range(len(order)), order)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=30 * max(slowest.values()))
    axes.set_xlabel("device time in microseconds (logarithmic)")
    axes.set_title(f"Methods for one chunk, 67 MB · {device}", fontsize=9)
    return figure


def ratio(rows: list[Row], device: str) -> Figure | None:
    """Draw the speed against a memcpy of the same bytes over payload.

    Each direction has a row, each length of runs a column."""
    runs = sorted({row["run_bytes"] for row in rows})
    if len({row["payload_bytes"] for row in rows}) < 2:
        return None
    shown = []
    for direction, run in product(_WORDS, runs):
        selected = having(rows, op=direction, run_bytes=run)
        side = next((s for s in _SIDES if having(selected, host_side=s)), "")
        shown.append((direction, run, side, having(selected, host_side=side)))
    drawn = [row for *_, own in shown for row in own if row["backend"] in _LINK_MARKS]
    lowest = min([0.9, *(row["ratio"] // 0.1 / 10 for row in drawn)])
    figure = Figure(figsize=(2.9 * len(runs), 5.6))
    for at, (direction, run, side, own) in enumerate(shown):
        axes = figure.add_subplot(len(_WORDS), len(runs), at + 1)
        axes.axhline(1.0, color=INK, linestyle="--", linewidth=1.2)
        for method, mark in _LINK_MARKS.items():
            _line(
                axes,
                having(own, backend=method),
                "ratio",
                label="chosen" if method == "host" else method,
                color=COLOURS[method],
                marker=mark,
                markersize=4,
                linewidth=1.2,
            )
        _sizes_below(axes)
        axes.set_ylim(lowest, 1.05)
        axes.set_title(f"{in_words(run)} runs, {side}", fontsize=8)
        if at % len(runs) == 0:
            axes.set_ylabel(f"{_WORDS[direction]}, of memcpy")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        ncols=len(labels),
        loc="lower center",
        frameon=False,
        bbox_to_anchor=(0.5, -0.05),
    )
    title = f"Speed against a pinned memcpy of the same bytes (from {lowest:g}) · {device}"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return figure


def interference(rows: list[Row], device: str) -> Figure:
    """Draw the slow-down of a loop during each strategy, and the bandwidth of the link."""
    points = grouped(rows, "loop", "stream", "op")
    heights = [max(map(len, points[at : at + 2])) for at in range(0, len(points), 2)]
    figure = Figure(figsize=(11, sum(1.1 + 0.2 * height for height in heights)))
    grid = figure.add_gridspec(len(heights), 2, height_ratios=[1 + height for height in heights])
    for at, selected in enumerate(points):
        axes = figure.add_subplot(grid[at // 2, at % 2])
        loop, stream, direction = (selected[0][name] for name in ("loop", "stream", "op"))
        names = [f"{row['backend']}, {row['shape']}" for row in selected]
        slow = [max(0.0, row["slowdown_pct"]) for row in selected]
        axes.barh(names, slow, color=[COLOURS.get(row["backend"], "#BBBBBB") for row in selected])
        for y, row in enumerate(selected):
            words = f" {row['slowdown_pct']:.1f} % · {row['link_gb_per_s']:.3g} GB/s"
            axes.text(slow[y], y, words, va="center", fontsize=7)
        axes.invert_yaxis()
        # The same axis everywhere: even up to 10 %, then logarithmic.
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(0, 10_000)
        axes.set_xticks([0, 5, 10, 100, 1000], ["0", "5", "10", "100", "1000"])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=7)
        axes.set_title(f"{loop} on {_STREAMS[stream]}, {_WORDS[direction]}", fontsize=9)
        axes.set_xlabel("slow-down of the loop in %", fontsize=8)
    figure.suptitle(f"Slow-down of a loop during transfers · {device}", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    return figure


def compared_with_own(rows: list[Row], device: str) -> Figure | None:
    """Draw the time of the integrations, of the engines' own code: a point for each case."""
    known = [row for row in rows if "of_own" in row and row["verified"]]
    if not known:
        return None
    figure = Figure(figsize=(9.5, 2.6))
    axes = figure.subplots()
    parts = sorted({row["part"] for row in known})
    for (at, part), (op, mark) in product(enumerate(parts), {"d2h": "v", "h2d": "^"}.items()):
        matches = [row["of_own"] for row in having(known, part=part, op=op)]
        place = [at + (0.12 if op == "h2d" else -0.12)] * len(matches)
        label = _WORDS[op] if at == 0 else None
        axes.plot(matches, place, mark, label=label, alpha=0.5, color=COLOURS["portakv"])
    axes.axvline(1.0, color=INK, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(parts)), parts)
    axes.set_xlabel("time by PortaKV / by the engine's own code")
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(f"Engines' transfers, by PortaKV · {device}", fontsize=10)
    return figure


def stored(rows: list[Row], device: str) -> Figure:
    """Draw the rate of each method of storing and loading, with the spread of its trials."""
    cases = grouped(rows, "op", "shape")
    figure = Figure(figsize=(9.5, 0.7 + 0.17 * (len(rows) + len(cases))))
    axes = figure.subplots()
    places = list[float]()
    names = list[str]()
    at = 0.0
    furthest = 0.0
    for selected in cases:
        for row in selected:
            rate = row["gb_per_s"]
            times = (row["p50_us"] / row[p] for p in ("p90_us", "p10_us"))
            low, high = (rate * factor for factor in times)
            axes.barh(at, rate, 0.8, color=COLOURS.get(row["backend"], "#BBBBBB"))
            axes.plot([low, high], [at, at], color="#D55E00", linewidth=1)
            words = f" {rate:.2f} GB/s · {row['cpu_us_per_mib']:.0f} us of CPU a MiB"
            axes.text(max(rate, high), at, words, va="center", fontsize=7)
            furthest = max(furthest, high)
            places.append(at)
            names.append(f"{row['shape']} {row['op']}, {row['backend']}")
            at += 1
        at += 0.6
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * furthest)
    axes.set_xlabel("GB/s, medians; the line goes from the first to the last decile")
    axes.set_title(f"Storing and loading in one folder, in turns · {device}", fontsize=10)
    return figure


def urgent(rows: list[Row], device: str) -> Figure:
    """Draw the time of urgent loads, alone and while stores keep the disk busy."""
    figure = Figure(figsize=(6.2, 2.4))
    axes = figure.subplots()
    (row, *_) = having(rows, op="load")
    stores = having(rows, op="store")
    for at, (name, end) in enumerate(product(("p50", "p99"), ("_alone_us", "_us"))):
        time = row[name + end] / 1e3
        axes.barh(at, time, color="#999999" if "alone" in end else "#0072B2")
        axes.text(time, at, f" {time:.1f} ms", va="center", fontsize=8)
    axes.set_yticks(
        range(4), ["p50 alone", "p50 with stores", "p99 alone", "p99 with stores"], fontsize=8
    )
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(f"ms of a load of {row['shape']}, {row['loads']} loads")
    rates = "".join(f": {x['gb_per_s']:.2f} of {x['alone_gb_per_s']:.2f} GB/s" for x in stores)
    axes.set_title(f"Urgent loads during stores{rates} · {device}", fontsize=9)
    return figure


def pulled(rows: list[Row], device: str) -> Figure | None:
    """Draw the rate of pulls / that of the raw copy over payload, a line for each case.

    On a host also draw it / the rate of the same copy within one process."""
    figures = {"of_raw": "the raw copy", "of_rows": "copy_rows in one process"}
    selected = having(rows, backend="mapped")
    known = [name for name in figures if any(name in row for row in selected)]
    if len({row["op"] for row in selected}) < 2:
        return None
    figure = Figure(figsize=(4.9 * len(known) + 0.6, 4.0))
    for name, axes in zip(known, figure.subplots(1, len(known), squeeze=False)[0], strict=True):
        for case, mark in zip(grouped(selected, "shape"), "os^xdv+*", strict=False):
            _line(axes, case, name, label=case[0]["shape"], marker=mark, markersize=4, linewidth=1)
        axes.axhline(1.0, color=INK, linestyle="--", linewidth=1)
        _sizes_below(axes)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"rate, of {figures[name]}")
    figure.axes[0].legend(fontsize=7, frameon=False)
    between = {"devices": "two devices", "processes": "two processes"}.get(
        selected[0]["across"], ""
    )
    figure.suptitle(f"Pulls between {between or 'processes on one device'} · {device}", fontsize=10)
    figure.tight_layout()
    return figure


def first_tokens(rows: list[Row], device: str) -> Figure:
    """Draw the time until the first token of a known prompt, by where its rows come from."""
    rows = [row for row in rows if row["verified"]]
    cases = grouped(rows, "shape")
    figure = Figure(figsize=(9.5, 0.7 + 0.17 * sum(len(_SOURCES) + 2 for _ in cases)))
    axes = figure.subplots()
    places = list[float]()
    names = list[str]()
    at = 0.0
    for selected in cases:
        axes.text(0, at, f" {selected[0]['shape']}", va="center", fontsize=8, weight="bold")
        at += 1
        for (connector, op), (name, colour) in _SOURCES.items():
            for row in having(selected, backend=connector, op=op):
                axes.barh(at, row["p50_ms"], 0.8, color=colour)
                axes.plot([row["least_ms"], row["most_ms"]], [at, at], color="#D55E00", linewidth=1)
                axes.text(row["most_ms"], at, f" {row['p50_ms']:.0f} ms", va="center", fontsize=7)
                places.append(at)
                names.append(name)
                at += 1
        at += 0.6
    axes.set_yticks(places, names, fontsize=7)
    axes.set_ylim(at - 0.4, -0.8)
    axes.set_xlim(0, 1.1 * max(row["most_ms"] for row in rows))
    axes.set_xlabel("ms until the first token, medians; the line goes from the least to the most")
    axes.set_title(f"The first token of a known prompt in vLLM · {device}", fontsize=10)
    return figure


def payload_over_link(rows: list[Row], device: str) -> Figure | None:
    """Draw payload over wire by size: the rate of raw rows, packed and as they are, of that of a
    memcpy over the same link. Thin lines are raw bytes / bytes of slots, which the link allows."""
    if len({row["payload_bytes"] for row in rows}) < 2:
        return None
    cases = grouped(having(rows, backend="pack"), "shape")
    plain = cases[0][0]["shape"] if cases else ""
    figure = Figure(figsize=(9.5, 4.2))
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    words = {**_WORDS, "both": "both at the same time"}
    for (op, title), axes in zip(words.items(), panels, strict=True):
        own = having(rows, op=op)
        axes.axhline(1.0, color=INK, linestyle="--", linewidth=1.2, label="memcpy")
        selected = having(own, backend="raw", shape=plain)
        _line(axes, selected, "ratio", label="raw rows", color=INK, linestyle=":", marker=".")
        for at, (case, mark) in enumerate(zip(cases, "os^xdv+*", strict=False)):
            packed = having(own, backend="pack", shape=case[0]["shape"])
            label = f"pack, {case[0]['shape']}"
            style: Fields = {"color": f"C{at}", "marker": mark, "markersize": 4}
            _line(axes, packed, "ratio", label=label, **style)
            axes.axhline(case[0]["payload_to_wire"], color=f"C{at}", linewidth=0.6, alpha=0.6)
        _sizes_below(axes)
        axes.set_title(title, fontsize=9)
    figure.axes[0].set_ylabel("payload rate / memcpy's rate")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        ncols=4,
        fontsize=7,
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.5, -0.07),
    )
    title = "Payload over wire by size, thin lines: raw bytes / bytes of slots"
    figure.suptitle(f"{title} · {device}", fontsize=10)
    figure.tight_layout()
    return figure


def _sizes_below(axes: Axes) -> None:
    """Set a logarithmic axis of payloads, with sizes in words, and a grid."""
    axes.set_xscale("log")
    words = FuncFormatter(lambda x, _: f"{x / 1e6:g} MB" if x < 1e9 else f"{x / 1e9:g} GB")
    axes.xaxis.set_major_formatter(words)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("payload")
    axes.grid(alpha=0.25)


def _methods(rows: Sequence[Row]) -> list[str]:
    matches = {str(row["backend"]) for row in rows} - {"copy_"}
    return [method for method in (*COLOURS, *sorted(matches - set(COLOURS))) if method in matches]


def _workload(row: Row) -> str:
    size = in_decimal(row["payload_bytes"])
    return f"{row['shape']}, layers {row['layers']} · {size} · {row['row_bytes']} B"


def _line(axes: Axes, rows: Sequence[Row], figure: str, **style: Any) -> None:
    points = {row["payload_bytes"]: row[figure] for row in rows if row["verified"]}
    axes.plot(sorted(points), [points[size] for size in sorted(points)], **style)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the plots of one file next to it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared.plots", description=__doc__)
    parser.add_argument("file", type=Path, help="a result of `portakv bench`")
    file = parser.parse_args(argv).file
    for path in draw(recorded.read(file), file.parent, file.stem):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
