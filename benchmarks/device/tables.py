# SPDX-License-Identifier: Apache-2.0
"""What `portakv bench` prints of a result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portakv.cli.console import Column, print_table

_FLAGS = "flags: noisy = p90 above 1.2 x median; host = the host's part shows in the time"


def print_results(results: Mapping[str, Any]) -> None:
    """Print the tables of a result, one for each kind of rows."""
    machine = results["machine"]
    print(f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}")
    by_kind = {kind: [row for row in results["rows"] if row["kind"] == kind] for kind in _TABLES}
    for kind, rows in by_kind.items():
        if rows:
            _TABLES[kind](rows)
    for line in results["left_out"]:
        print(f"left out: {line}")
    print(_FLAGS)


def _copies(rows: list[dict[str, Any]]) -> None:
    numbers = ("MB", "pool", "us", "GB/s r+w", "of copy_", "p90/p50", "x cuda", "x peer", "host us")
    columns = [Column(name, whole=True) for name in ("shape", "layers", "backend", "op", "index")]
    columns += [Column(name, right=True) for name in numbers] + [Column("bytes", whole=True)]
    title = "copies, in turns with copy_; pool = slots of the cache and the share that is moved"
    print_table(columns, [_copy_cells(row) for row in rows], title=title)


def _copy_cells(row: Mapping[str, Any]) -> list[str]:
    spread = f"{row['p90_us'] / row['p50_us']:.2f}" + (" noisy" if row["noisy"] else "")
    pool = f"{row['pool_slots']} {row['slots_used']:.2%}"
    return [
        row["shape"], row["layers"], row["backend"], row["op"], row["index"],
        f"{row['payload_bytes'] / 1e6:.4g}", pool, _time(row), f"{row['gb_per_s']:.4g}",
        f"{row['ratio']:.3f}", spread, _optional(row, "to_cuda"), _optional(row, "to_peer"),
        f"{row['host_us']:.1f}", _bytes(row),
    ]  # fmt: skip


def _ladder(rows: list[dict[str, Any]]) -> None:
    columns = [Column("way", whole=True), Column("op", whole=True)]
    columns += [Column(name, right=True) for name in ("us", "of copy_", "x cuda", "host us")]
    columns.append(Column("bytes", whole=True))
    cells = [
        [row["way"], row["op"], _time(row), f"{row['ratio']:.4f}", _optional(row, "to_cuda"),
         f"{row['host_us']:.1f}", _bytes(row)]
        for row in sorted(rows, key=lambda row: (row["op"], -row["p50_us"]))
    ]  # fmt: skip
    print_table(columns, cells, title=f"ladder: every way of moving {rows[0]['shape']}")


def _overheads(rows: list[dict[str, Any]]) -> None:
    times = ("launch_us", "call_us", "added_us")
    columns = [Column("backend", whole=True), Column("ids", whole=True)]
    columns += [Column(name.replace("_", " "), right=True) for name in times]
    table = [[row["backend"], row["ids"], *(f"{row[n]:.2f}" for n in times)] for row in rows]
    print_table(columns, table, title="host time of a registered call, one token of one layer")


def _starts(rows: list[dict[str, Any]]) -> None:
    columns = [Column("backend", whole=True), Column("cache", whole=True)]
    columns += [Column(name, right=True) for name in ("seconds", "worst", "imports")]
    numbers = ("seconds", "worst", "import_seconds")
    table = [[row["backend"], row["cache"], *(f"{row[n]:.3f}" for n in numbers)] for row in rows]
    print_table(columns, table, title="fresh process, registration to first finished transfer")


_TABLES = {"copy": _copies, "ladder": _ladder, "overhead": _overheads, "startup": _starts}


def _time(row: Mapping[str, Any]) -> str:
    return f"{row['p50_us']:.4g}" + ("" if row["host_hidden"] else " host")


def _optional(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.3f}" if name in row else "-"


def _bytes(row: Mapping[str, Any]) -> str:
    return "right" if row["verified"] else "WRONG"
