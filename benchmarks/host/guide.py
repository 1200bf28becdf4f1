# SPDX-License-Identifier: Apache-2.0
"""The part of the decision guide that is about host memory, from results of ``bench --host``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from portakv_benchmarks.host.cases import DIRECTIONS, size

Row = Mapping[str, Any]
_WORDS = {"d2h": "device to host", "h2d": "host to device"}
_ENGINES = ("staged", "descriptors", "direct")
_LARGE = 128_000_000

_HEAD = """\
*Of memcpy* is the time of one plain memcpy of the same bytes, between the device and the same
pinned memory in the same run, / the way's own: 1.00 is the link itself."""


def section(result: Mapping[str, Any]) -> list[str]:
    """The section of one result."""
    machine, rows = result["machine"], [row for row in result["rows"] if row["verified"]]
    told = ["", f"## Host memory, {machine['device']}", ""]
    told.append(f"Measured {machine['date']} with torch {machine['torch']}, Python "
                f"{machine['python']}.")  # fmt: skip
    told += ["", *_HEAD.splitlines()]
    for part in (_sizes, _best, _beside, _waiting, _small, _calls, _pinning):
        told += part(rows)
    return told


def _sizes(rows: Sequence[Row]) -> list[str]:
    """The chosen engine by payload, over all layouts."""
    chosen = _of(rows, "host_copy", backend="host")
    payloads = sorted({row["payload_bytes"] for row in chosen})
    table = []
    for payload in payloads:
        cells = [size(payload)]
        for direction in DIRECTIONS:
            found = [r["ratio"] for r in chosen
                     if (r["payload_bytes"], r["op"]) == (payload, direction)]  # fmt: skip
            cells += [f"{median(found):.3f}", f"{min(found):.3f}"] if found else ["", ""]
        table.append(cells)
    heads = ["payload"]
    for direction in DIRECTIONS:
        heads += [f"{_WORDS[direction]}, median", "worst"]
    told = "The engine that PortaKV chooses, of memcpy, over all layouts that were measured."
    return _titled("What to expect", told, heads, table)


def _best(rows: Sequence[Row]) -> list[str]:
    """Which engine was the fastest, by runs and direction."""
    grid = [row for row in rows if row["kind"] == "host_copy" and row["backend"] in _ENGINES]
    points: dict[tuple[str, str], list[Row]] = {}
    for row in grid:
        points.setdefault((row["shape"], row["op"]), []).append(row)
    table = []
    for run in sorted({row["run_bytes"] for row in grid}):
        for large in (False, True):
            cells = [size(run), "from 128 MB" if large else "less"]
            for direction in DIRECTIONS:
                won = Counter(
                    min(point, key=lambda row: float(row["p50_us"]))["backend"]
                    for (_, op), point in points.items()
                    if op == direction and point[0]["run_bytes"] == run
                    and (point[0]["payload_bytes"] >= _LARGE) == large
                )  # fmt: skip
                cells.append(", ".join(f"`{name}` {times}" for name, times in won.most_common()))
            table.append(cells)
    heads = ["runs", "payload", *(_WORDS[d] for d in DIRECTIONS)]
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
        "A pinned copy of somebody else, on another stream and in the direction of transfers that "
        "follow each other, until the host sees its end. Copy engines stay with one stream for as "
        "long as it has more for them; who waited for 50 ms was given up."
    )
    return _titled("What a copy of somebody else waits for", told, heads, table)


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
         size(row["row_bytes"]), f"{row['host_us']:,.1f}", f"{row['idle_us']:,.1f}"]
        for row in found
    ]  # fmt: skip
    heads = ["engine", "direction", "host memory", "ids", "rows", "host, us", "idle, us"]
    many = f"{found[0]['blocks']:,} blocks x {found[0]['planes']} planes" if found else ""
    told = f"{many}, behind other transfers and as the first one on an idle device."
    return _titled("What a block transfer costs the host", told, heads, table)


def _pinning(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row["kind"] == "host_pinning"]
    table = [
        [f"`{row['backend']}`", size(row["payload_bytes"]), size(row["taken_bytes"]),
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
