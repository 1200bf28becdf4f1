# SPDX-License-Identifier: Apache-2.0
"""The decision guide, ``docs/choosing.md``, from result files: ``python -m benchmarks.guide``.

Every number in the page is a figure of a file in ``benchmarks/results``; nothing is typed by hand.
``--check`` writes nothing and fails where the page is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from portakv_benchmarks.check import HOST_SUITE
from portakv_benchmarks.shared.shapes import in_words

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
PAGE = ROOT / "docs" / "choosing.md"
#: A way matters less than this much slower than the fastest: within what two runs differ by.
CLOSE = 1.05

Row = Mapping[str, Any]
_ORDER = ("cuda", "triton", "compiled", "compiled graph", "reference")
_LAYERS = {"apart": "each layer an allocation", "together": "all layers in one allocation"}

_HEAD = """<!-- Made from the files in benchmarks/results: python -m benchmarks.guide -->
# Choosing a backend

PortaKV chooses by itself; `portakv backends` prints what it chose here and why. This page says what
the choice is worth, from the result files in `benchmarks/results`. The order in which the registry
asks is the order of *which one* below, the fastest first. *x cuda* is a backend's device
time as a multiple of that of `cuda`, *of copy_* is the time of `copy_` of the same bytes / its own:
1.00 is a memory copy. *compiled graph* is `compiled` captured into
a CUDA graph. Every byte behind these figures was checked in the same run.
"""

_WORDS = {"d2h": "device to host", "h2d": "host to device"}
_ENGINES = ("staged", "descriptors", "direct")
_LINK_LARGE = 128_000_000

_LINK_HEAD = """\
*Of memcpy* is the time of one plain memcpy of the same bytes, between the device and the same
pinned memory in the same run, / the way's own: 1.00 is the link itself."""


def page(files: Iterable[Path]) -> str:
    """The whole page for result files, those of accelerators first."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(files)]
    results.sort(key=lambda result: result["machine"]["device_type"] == "cpu")
    hosts = [result for result in results if result.get("suite") == HOST_SUITE]
    parts = [_HEAD.rstrip("\n")]
    for result in results:
        parts += [] if result in hosts else _device(result)
    for result in hosts:
        parts += _link(result)
    return "\n".join(parts).rstrip("\n") + "\n"


def _device(result: Mapping[str, Any]) -> list[str]:
    machine, rows = result["machine"], result["rows"]
    copies = [r for r in rows if r["kind"] == "copy" and r["verified"] and not r.get("peer")]
    told = ["", f"## {machine['device']}", ""]
    versions = [f"torch {machine['torch']}", f"Python {machine['python']}"]
    if "driver_version" in machine:
        versions.append(f"driver {machine['driver_version']}")
    told.append(f"Measured {machine['date']} with {', '.join(versions)}.")
    for section in (_which, _slower, _sizes, _hosts, _starts, _peers, _rungs):
        told += section(copies if section in (_which, _slower, _sizes) else rows)
    return told


def _which(copies: Sequence[Row]) -> list[str]:
    """What to take, in the order of the median over all workloads."""
    speeds = {way: _ratios(copies, backend=way) for way in _ORDER}
    speeds = {way: found for way, found in speeds.items() if found}
    if not speeds:
        return []
    told = ["", "### Which one", ""]
    for way in preference(copies):
        found = speeds[way]
        told.append(
            f"- `{way}`: {_two(median(found))} of `copy_` in the median of {len(found)} rows, "
            f"{_two(min(found))} at worst."
        )
    return told


def preference(copies: Sequence[Row]) -> list[str]:
    """The ways from the fastest to the slowest, by the median over their rows."""
    found = {way: _ratios(copies, backend=way) for way in _ORDER}
    return sorted((way for way in _ORDER if found[way]), key=lambda way: -median(found[way]))


def _slower(copies: Sequence[Row]) -> list[str]:
    """How much slower each way is than `cuda`, by how the layers lie."""
    table = []
    for layers, words in _LAYERS.items():
        for way in _ORDER[1:]:
            found = [
                float(r["to_cuda"]) for r in copies
                if r["backend"] == way and r["layers"] == layers and "to_cuda" in r
            ]  # fmt: skip
            if found:
                table.append(
                    [f"`{way}`", words, _times(median(found)), _times(max(found)), str(len(found))]
                )
    if not table:
        return []
    heads = ["backend", "layers", "x cuda, median", "x cuda, worst", "rows"]
    return ["", "### How much slower than `cuda`", "", *_table(heads, table)]


def _sizes(copies: Sequence[Row]) -> list[str]:
    """Against payload, for the shape that is measured from one token up."""
    rows = [
        r for r in copies
        if r["shape"].startswith("llama3-8b") and r["row_bytes"] == 2048 and r["op"] == "gather"
        and r["index"] == "random" and r["layers"] == "apart" and r["slots_used"] < 1
        and r["cache"] == "layer | kv block token head dim"
    ]  # fmt: skip
    sizes = sorted({int(r["payload_bytes"]) for r in rows})
    ways = [way for way in _ORDER if any(r["backend"] == way for r in rows)]
    if len(sizes) < 3 or len(ways) < 2:
        return []
    by = {(r["payload_bytes"], r["backend"]): r for r in rows}
    table = []
    for size in sizes:
        cells = [_size(size)]
        for way in ways:
            row = by.get((size, way))
            cells.append(f"{row['p50_us']:.4g} us ({row['host_us']:.0f})" if row else "")
        table.append(cells)
    return [
        "",
        "### From what size it matters",
        "",
        "Device time of a gather of random slots, and in brackets the host time of the call, both "
        "in microseconds: Llama-3 8B, rows of 2 KB, each layer an allocation. Where the host time "
        "is the larger, a faster kernel is not seen unless other work hides the call.",
        "",
        *_table(["payload", *(f"`{way}`" for way in ways)], table),
        *_thresholds(by, sizes, ways),
    ]


def _thresholds(by: Mapping[Any, Row], sizes: Sequence[int], ways: Sequence[str]) -> list[str]:
    """From which payload on another way costs more than its launch."""
    told = [""]
    fastest = ways[0]
    for way in ways[1:]:
        slower = [
            size for size in sizes
            if (size, way) in by and (size, fastest) in by
            and by[size, way]["p50_us"] > CLOSE * by[size, fastest]["p50_us"]
        ]  # fmt: skip
        words = (
            f"is at most {CLOSE - 1:.0%} slower than `{fastest}` at every size measured"
            if not slower
            else f"is more than {CLOSE - 1:.0%} slower than `{fastest}`, of the sizes measured, at "
            + ", ".join(_size(size) for size in slower)
        )
        told.append(f"- `{way}` {words}.")
    return told


def _hosts(rows: Sequence[Row]) -> list[str]:
    found = [r for r in rows if r["kind"] == "overhead"]
    table = [
        [f"`{r['backend']}`", r["ids"], f"{r['launch_us']:.1f}", f"{r['call_us']:.1f}"]
        for r in found
    ]
    heads = ["backend", "slots", "launch alone, us", "registered call, us"]
    return ["", "### What a call costs the host", "", *_table(heads, table)] if table else []


def _starts(rows: Sequence[Row]) -> list[str]:
    found = [r for r in rows if r["kind"] == "startup"]
    table = [[f"`{r['backend']}`", r["cache"], f"{r['seconds']:.2f}"] for r in found]
    heads = ["backend", "cache of kernels", "seconds"]
    told = ["", "### A fresh process, to its first finished transfer", ""]
    return [*told, *_table(heads, table)] if table else []


def _peers(rows: Sequence[Row]) -> list[str]:
    """`cuda` against the peer, by direction and rows."""
    found = [r for r in rows if r["kind"] == "copy" and r["backend"] == "cuda" and "to_peer" in r]
    if not found:
        return []
    table = []
    kinds: tuple[tuple[str, Callable[[Row], bool]], ...] = (
        ("rows of 256 B and more, from 32 MB", lambda r: _wide(r) and _large(r)),
        ("rows of 256 B and more, under 32 MB", lambda r: _wide(r) and not _large(r)),
        ("rows under 256 B", lambda r: not _wide(r)),
    )
    for words, picks in kinds:
        for op in ("gather", "scatter"):
            times = [float(r["to_peer"]) for r in found if r["op"] == op and picks(r)]
            if times:
                table.append(
                    [words, op, _times(median(times)), _times(max(times)), str(len(times))]
                )
    heads = ["workload", "direction", "median", "worst", "rows"]
    told = ["", "### `cuda` beside LMCache's kernels", ""]
    told.append(
        "Device time of `cuda` / that of the faster of LMCache's released kernels, in the rows "
        "that these carried out correctly in the same run; below 1 is faster."
    )
    return [*told, "", *_table(heads, table)]


def _rungs(rows: Sequence[Row]) -> list[str]:
    found = [r for r in rows if r["kind"] == "ladder" and r["op"] in ("gather", "copy_")]
    table = [
        [f"`{r['way']}`" if r["way"] in (*_ORDER, "copy_") else r["way"], f"{r['p50_us']:,.4g}",
         _times(r["to_cuda"]) if "to_cuda" in r else ""]
        for r in sorted(found, key=lambda r: -float(r["p50_us"]))
    ]  # fmt: skip
    if not table:
        return []
    told = ["", "### Ways of moving the founding scenario", ""]
    told.append("A gather of 128 tokens of 32 layers, 67 MB, each layer an allocation.")
    return [*told, "", *_table(["way", "device time, us", "x cuda"], table)]


def _link(result: Mapping[str, Any]) -> list[str]:
    """The section of one result."""
    machine, rows = result["machine"], [row for row in result["rows"] if row["verified"]]
    told = ["", f"## Host memory, {machine['device']}", ""]
    told.append(f"Measured {machine['date']} with torch {machine['torch']}, Python "
                f"{machine['python']}.")  # fmt: skip
    told += ["", *_LINK_HEAD.splitlines()]
    for part in (_link_sizes, _link_best, _beside, _waiting, _small, _calls, _pinning):
        told += part(rows)
    return told


def _link_sizes(rows: Sequence[Row]) -> list[str]:
    """The chosen engine by payload, over all layouts."""
    chosen = _of(rows, "host_copy", backend="host")
    payloads = sorted({row["payload_bytes"] for row in chosen})
    table = []
    for payload in payloads:
        cells = [in_words(payload)]
        for direction in _WORDS:
            found = [r["ratio"] for r in chosen
                     if (r["payload_bytes"], r["op"]) == (payload, direction)]  # fmt: skip
            cells += [f"{median(found):.3f}", f"{min(found):.3f}"] if found else ["", ""]
        table.append(cells)
    heads = ["payload"]
    for direction in _WORDS:
        heads += [f"{_WORDS[direction]}, median", "worst"]
    told = "The engine that PortaKV chooses, of memcpy, over all layouts that were measured."
    return _titled("What to expect", told, heads, table)


def _link_best(rows: Sequence[Row]) -> list[str]:
    """Which engine was the fastest, by runs and direction."""
    grid = [row for row in rows if row["kind"] == "host_copy" and row["backend"] in _ENGINES]
    points: dict[tuple[str, str], list[Row]] = {}
    for row in grid:
        points.setdefault((row["shape"], row["op"]), []).append(row)
    table = []
    for run in sorted({row["run_bytes"] for row in grid}):
        for large in (False, True):
            cells = [in_words(run), "from 128 MB" if large else "less"]
            for direction in _WORDS:
                won = Counter(
                    min(point, key=lambda row: float(row["p50_us"]))["backend"]
                    for (_, op), point in points.items()
                    if op == direction and point[0]["run_bytes"] == run
                    and (point[0]["payload_bytes"] >= _LINK_LARGE) == large
                )  # fmt: skip
                cells.append(", ".join(f"`{name}` {times}" for name, times in won.most_common()))
            table.append(cells)
    heads = ["runs", "payload", *(_WORDS[d] for d in _WORDS)]
    told = "Which engine was the fastest on an idle device, and at how many points."
    return _titled("Which engine", told, heads, table)


def _beside(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row["kind"] == "host_interference"]
    table = [
        [row["loop"], row["stream"], _WORDS[row["op"]], f"`{row['backend']}`", row["shape"],
         f"{row['slowdown_pct']:.1f}", f"{row['link_gb_per_s']:.1f}"]
        for row in found
    ]  # fmt: skip
    heads = ["loop", "stream", "direction", "way", "moved", "slow-down, %", "link, GB/s"]
    told = (
        "The loop runs alone, then beside transfers at full speed, on the default stream or on one "
        "of its own. `host` is what PortaKV chooses "
        "unless it is told that the device is idle; `host detached` the same with `detached=True`."
    )
    return _titled("What a transfer does to what runs beside it", told, heads, table)


def _waiting(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row["kind"] == "host_waiting"]
    table = [
        [row["other"], _WORDS[row["op"]], f"`{row['backend']}`", row["shape"],
         f"{row['alone_us']:,.0f}", *(_at_least(row, name) for name in ("wait_us", "worst_us"))]
        for row in found
    ]  # fmt: skip
    heads = ["copy", "direction", "beside", "moved", "alone, us", "median, us", "longest, us"]
    told = (
        "A pinned copy of another owner, on another stream and in the direction of transfers that "
        "follow each other, until the host sees its end. Copy engines stay with one stream for as "
        "long as it has more for them; a copy that waited for 50 ms was given up."
    )
    return _titled("What a copy of another stream waits for", told, heads, table)


def _at_least(row: Row, name: str) -> str:
    never = row["given_up"] > (0 if name == "worst_us" else row["samples"] // 2)
    return "given up" if never else f"{row[name]:,.0f}"


def _small(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row["kind"] == "host_small"]
    table = [
        [f"{row['integers']:,}", f"`{row['backend']}`", f"{row['idle_us']:.1f}",
         f"{row['busy_us']:,.1f}"]
        for row in found
    ]  # fmt: skip
    heads = ["integers", "way", "idle, us", "beside a copy of 1 GB, us"]
    told = "From handing int64 values over until the host sees that their stream has them."
    return _titled("Small copies", told, heads, table)


def _calls(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row["kind"] == "host_call"]
    table = [
        [f"`{row['backend']}`", _WORDS[row["op"]], row["host_side"], row["ids"],
         in_words(row["row_bytes"]), f"{row['host_us']:,.1f}", f"{row['idle_us']:,.1f}"]
        for row in found
    ]  # fmt: skip
    heads = ["engine", "direction", "host memory", "ids", "rows", "host, us", "idle, us"]
    many = f"{found[0]['blocks']:,} blocks x {found[0]['planes']} planes" if found else ""
    told = f"{many}, behind other transfers and as the first one on an idle device."
    return _titled("What a block transfer costs the host", told, heads, table)


def _pinning(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row["kind"] == "host_pinning"]
    table = [
        [f"`{row['backend']}`", in_words(row["payload_bytes"]), in_words(row["taken_bytes"]),
         f"{row['seconds']:.2f}"]
        for row in found
    ]  # fmt: skip
    told = "Memory that the machine had touched once before."
    return _titled("Pinning", told, ["allocator", "asked", "taken", "seconds"], table)


def _of(rows: Sequence[Row], kind: str, **fields: str) -> list[Row]:
    return [
        row for row in rows
        if row["kind"] == kind and all(row[name] == value for name, value in fields.items())
    ]  # fmt: skip


def _titled(
    title: str, told: str, heads: Sequence[str], table: Sequence[Sequence[str]]
) -> list[str]:
    if not table:
        return []
    lines = [heads, ["---"] * len(heads), *table]
    return ["", f"### {title}", "", told, "", *(f"| {' | '.join(line)} |" for line in lines)]


def _wide(row: Row) -> bool:
    return int(row["row_bytes"]) >= 256


def _large(row: Row) -> bool:
    return int(row["payload_bytes"]) >= 32_000_000


def _ratios(rows: Sequence[Row], **fields: str) -> list[float]:
    return [
        float(r["ratio"]) for r in rows if all(r[name] == value for name, value in fields.items())
    ]


def _size(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size < 999_500_000 else f"{size / 1e9:.3g} GB"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or with ``--check`` compare it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guide", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where it is old")
    asked = parser.parse_args(argv)
    text = page(RESULTS.glob("*.json"))
    if not asked.check:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE}")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is not what the results say: python -m benchmarks.guide", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
