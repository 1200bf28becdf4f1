# SPDX-License-Identifier: Apache-2.0
"""What `portakv bench --host` prints of a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from portakv.cli.console import Column, print_table
from portakv_benchmarks.host.cases import size

Row = Mapping[str, Any]
#: A column's title, and the text of its cell; numbers stand on the right.
Cells = Sequence[tuple[str, Callable[[Row], str]]]

_FLAGS = (
    "flags: noisy = p90 above 1.2 x median; host = the host's part shows in the time. MB and GB of "
    "cases are 2^20 and 2^30 bytes; GB/s are 10^9, each byte counted once"
)
_NAMES = ("case", "way", "direction", "loop", "stream", "other", "ids", "bytes", "chosen", "best")


def print_host(results: Mapping[str, Any]) -> None:
    """Print the tables of a result, one for each kind of rows."""
    machine = results["machine"]
    print(f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}")
    for kind, (title, cells) in _TABLES.items():
        rows = [row for row in results["rows"] if row["kind"] == kind]
        if rows:
            _print(title, cells, rows)
    for line in results["left_out"]:
        print(f"left out: {line}")
    print(_FLAGS)


def _print(title: str, cells: Cells, rows: Sequence[Row]) -> None:
    columns = [Column(name, whole=name in _NAMES, right=name not in _NAMES) for name, _ in cells]
    print_table(columns, [[tell(row) for _, tell in cells] for row in rows], title=title)


def _time(row: Row) -> str:
    hidden = row["host_hidden"] or "perf_counter" in row.get("timer", "")
    return f"{row['p50_us']:,.5g}" + ("" if hidden else " host")


def _spread(row: Row) -> str:
    return f"{row['p90_us'] / row['p50_us']:.2f}" + (" noisy" if row["noisy"] else "")


def _text(name: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(name, "-"))


def _number(name: str, form: str = ".4g") -> Callable[[Row], str]:
    return lambda row: f"{row[name]:{form}}" if name in row else "-"


def _bytes(row: Row) -> str:
    return "right" if row["verified"] else "WRONG"


def _repeated(row: Row) -> str:
    return " ".join(f"{one:.1f}" for one in row["slowdowns_pct"])


_WHAT: Cells = (("case", _text("shape")), ("way", _text("backend")), ("direction", _text("op")))
_COPY: Cells = (
    *_WHAT,
    ("us", _time),
    ("GB/s", _number("gb_per_s")),
    ("of memcpy", _number("ratio", ".3f")),
    ("p90/p50", _spread),
    ("alone us", _number("alone_us")),
    ("host us", _number("host_us")),
)
_TABLES: Mapping[str, tuple[str, Cells]] = {
    "host_copy": (
        "device and pinned host, in turns with a memcpy of the same bytes; alone = from the call "
        "to its end on an idle device, nothing hidden",
        (
            *_COPY,
            ("staging MiB", _number("staging_mb", ".3g")),
            ("loss", _number("chosen_loss", ".3f")),
            ("chosen", _text("chosen")),
            (
                "best",
                lambda row: (
                    f"{row['best_engine']} {row['best_ratio']:.3f}" if "best_ratio" in row else "-"
                ),
            ),
            ("bytes", _bytes),
        ),
    ),
    "host_direct": ("direct, by its limit on thread blocks", (*_COPY, ("bytes", _bytes))),
    "host_duplex": (
        "both directions at once",
        (*_COPY, ("chosen", _text("chosen")), ("bytes", _bytes)),
    ),
    "host_pageable": (
        "device and pageable host, beside plain copies through a pinned ring; by the host's clock",
        (
            *_WHAT,
            ("us", _time),
            ("GB/s", _number("gb_per_s")),
            ("of best ring", _number("to_ring", ".3f")),
            ("p90/p50", _spread),
            ("bytes", _bytes),
        ),
    ),
    "host_interference": (
        "beside a loop of compute: its slow-down, and the link's bandwidth meanwhile",
        (
            ("loop", _text("loop")),
            ("stream", _text("stream")),
            *_WHAT,
            ("blocks", _text("thread_blocks")),
            ("slow-down %", _number("slowdown_pct")),
            ("repeats", _repeated),
            ("over memcpy", _number("over_memcpy")),
            ("GB/s", _number("link_gb_per_s")),
            ("of memcpy", _number("link_ratio", ".3f")),
            ("ran dry", _text("ran_dry")),
            ("chosen", _text("chosen")),
            ("bytes", _bytes),
        ),
    ),
    "host_waiting": (
        "a copy of somebody else, in the direction of transfers that follow each other, until the "
        "host sees its end; given up after 50 ms",
        (
            ("other", _text("other")),
            *_WHAT,
            ("alone us", _number("alone_us")),
            ("us", _number("wait_us")),
            ("worst us", _number("worst_us")),
            ("copies", _text("samples")),
            ("given up", _text("given_up")),
            ("chosen", _text("chosen")),
            ("bytes", _bytes),
        ),
    ),
    "host_small": (
        "integers from the host, until it sees that their stream has them; busy = beside a copy of "
        "1 GB; paced = as busy, but idle; device = by events on that stream",
        (
            ("integers", _text("integers")),
            ("way", _text("backend")),
            ("idle us", _number("idle_us")),
            ("paced us", _number("paced_us")),
            ("busy us", _number("busy_us")),
            ("busy/paced", _number("busy_to_idle", ".2f")),
            ("idle/pinned", _number("idle_to_pinned", ".2f")),
            ("paced/pinned", _number("paced_to_pinned", ".2f")),
            ("host us", _number("idle_host_us")),
            ("device us", _number("idle_device_us")),
            ("busy device us", _number("busy_device_us")),
            ("overtook", _text("overtook")),
            ("bytes", _bytes),
        ),
    ),
    "host_pinning": (
        "pinning, memory touched once before",
        (
            ("case", _text("shape")),
            ("way", _text("backend")),
            ("seconds", _number("seconds")),
            ("of torch", _number("to_torch", ".3f")),
            ("taken", lambda row: size(row["taken_bytes"])),
            ("resident", lambda row: size(row["resident_bytes"])),
            ("to free, s", _number("free_seconds")),
            ("bytes", _bytes),
        ),
    ),
    "host_call": (
        "host time of a block transfer; runs = pieces once neighbours are merged",
        (
            *_WHAT,
            ("ids", _text("ids")),
            ("blocks", _text("blocks")),
            ("planes", _text("planes")),
            ("runs", _text("merged_runs")),
            ("host us", _number("host_us")),
            ("p90", _number("host_us_p90")),
            ("idle", _number("idle_us")),
            ("first", _number("first_us")),
            ("us a run", _number("us_per_run", ".3g")),
            ("bytes", _bytes),
        ),
    ),
}
