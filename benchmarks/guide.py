# SPDX-License-Identifier: Apache-2.0
"""Write all tables of the result files into one page: ``python -m benchmarks.guide``.

Every measured number in the page comes from a file in ``benchmarks/results``, or from a newer one
in its folder ``parts``. ``--check`` writes nothing and fails if the page differs from the text that
the files give. `benchmarks.choosing` makes the tables of docs/benchmarks.md, with plots.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress, product
from pathlib import Path
from statistics import median

from portakv_benchmarks.check import (
    ENCODING_SUITE,
    ENGINE_SUITE,
    HOST_SUITE,
    INTEGRATION_SUITE,
    MIGRATION_SUITE,
    STORAGE_SUITE,
    WALL_SUITE,
)
from portakv_benchmarks.shared import recorded
from portakv_benchmarks.shared.harness import Fields, Row, grouped, having, quickest
from portakv_benchmarks.shared.shapes import in_decimal, in_words

RESULTS = Path(__file__).with_name("results")
PAGE = RESULTS / "TABLES.md"
#: A ratio to the fastest method below this limit is within the difference of two runs.
CLOSE = 1.05

_ORDER = ("cuda", "triton", "compiled", "compiled graph", "reference")
_LAYERS = {"apart": "each layer an allocation", "together": "all layers in one allocation"}
DIRECTIONS = {"d2h": "device to host", "h2d": "host to device"}
_EITHER = {**DIRECTIONS, "both": "both"}
_STRATEGIES = ("staged", "batched_memcpy", "zero_copy")
_LARGE = 32_000_000
_LINK_LARGE = 128_000_000
_SLOW = 0.9

_HEAD = """<!-- Made from the files in benchmarks/results: python -m benchmarks.guide -->
# All measured tables

*Reference: measured times of backends, transfer strategies, stores and pulls.*

{summary}

[Benchmarks](../../docs/benchmarks.md#what-was-measured) shows the most important figures as plots.
Every figure comes from a file in this folder, and the run that measured it checked every byte.

| column | meaning |
| --- | --- |
| x cuda | the backend's device time / that of `cuda` |
| of copy_ | the time of `copy_` of the same bytes / the backend's time; 1.00 is a memory copy |
| compiled graph | the backend `compiled`, captured into a CUDA graph |"""

_CPU_HEAD = """
With {torch_threads} threads of torch on {cores} cores. Other virtual machines share the third-level
cache, from which `copy_` gains more than an indexed copy, so ratios vary from minute to minute."""

_LINK_HEAD = """\
*Of memcpy* is the time of one plain memcpy of the same bytes, between the device and the same
pinned memory in the same run, / the time of the strategy. 1.00 is the link itself."""


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _median_wait(row: Row) -> str:
    late = row["given_up"] > row["samples"] // 2
    return _NEVER if late else f"{row['wait_us']:,.0f}"


#: A column's text for a row: a format of its fields, or what makes it.
Cell = str | Callable[[Row], str]


def _if_there(field: str, form: str) -> Cell:
    """Return a cell that formats a field, empty in rows without the field."""
    return lambda row: format(row[field], form) if field in row else ""


_NEVER = "given up"
_METHOD: Mapping[str, Cell] = {
    "direction": lambda row: DIRECTIONS[row["op"]],
    "method": "`{backend}`",
}


def _chunk_method(row: Row) -> str:
    method: str = row["way"]
    return f"`{method}`" if method in (*_ORDER, "copy_") else method


def _in_ms(field: str) -> Cell:
    return lambda row: f"{row[field] / 1e3:.1f}" if field in row else ""


_STORED: Mapping[str, Cell] = {
    "blocks": "{shape}",
    "operation": "{op}",
    "method": "`{backend}`",
    "GB/s": "{gb_per_s:.2f}",
    "of fio": _if_there("of_fio", ".2f"),
    "of the engine": _if_there("of_engine", ".2f"),
    "of LMCache": _if_there("of_lmcache", ".2f"),
    "of requests": _if_there("of_raw", ".2f"),
    "of the whole": _if_there("of_whole", ".2f"),
    "first layer after": _if_there("first_of_whole", ".2f"),
    "processor, us a MiB": "{cpu_us_per_mib:.0f}",
}
_BETWEEN = {"devices": "two devices", "one device": "one device", "processes": "two processes"}
_RAW = [("migrate_mapped", method) for method in ("raw copy", "raw copy, one process", "copy_rows")]
_CROSSED: Mapping[str, Cell] = {
    "case": "{shape}",
    "bytes": "{op}",
    "method": lambda row: row["backend"],
    "GB/s": "{gb_per_s:.3g}",
    "of the raw copy": _if_there("of_raw", ".2f"),
    "of copy_rows": _if_there("of_rows", ".2f"),
    "of one buffer": _if_there("of_own", ".2f"),
    "times its rate": _if_there("of_peer", ".1f"),
}
_IDS = {"kept Index": "kept", "host tensor": "new"}
#: For each kind of rows in a list: the section's title, its introduction, its cells by column.
_LISTS: Mapping[str, tuple[str, str, Mapping[str, Cell]]] = {
    "overhead": (
        "What a call costs the host",
        "One token of one layer, call after call: the prepared launch, and `from_gpu` by a reused "
        "`Index` or a tensor. Each call reads a tensor on the host and copies it to the device.",
        {"backend": "`{backend}`", "slots": "{ids}", "launch alone, us": "{launch_us:.1f}",
         "registered call, us": "{call_us:.1f}"},
    ),
    "startup": (
        "A fresh process, to its first finished transfer", "",
        {"backend": "`{backend}`", "cache of kernels": "{cache}", "seconds": "{seconds:.2f}"},
    ),
    "ladder": (
        "Methods for one chunk",
        "A gather of 128 tokens of 32 layers, 67 MB, each layer an allocation (a 7B model).",
        {"method": _chunk_method,
         "time, us": "{p50_us:,.4g}",
         "x cuda": lambda row: _times(row["to_cuda"]) if "to_cuda" in row else ""},
    ),
    "wall_copy": (
        "Blocks of 2 MiB between a block-first pool and caches by layer",
        "From the call until the host sees the end on an idle device. *New* ids are lists that the "
        "library has not seen; `host idle` is PortaKV's choice with `overlap=\"idle\"`.",
        {"bytes": lambda row: in_words(row["payload_bytes"]),
         "direction": lambda row: DIRECTIONS[row["op"]],
         "method": "`{backend}`",
         "ids": lambda row: _IDS.get(row.get("ids", ""), "-"),
         "time, us": "{p50_us:,.4g}", "of memcpy": "{ratio:.2f}", "call, us": "{host_us:,.4g}"},
    ),
    "wall_pages": (
        "Pages of 2 MiB between two block-first pools",
        "As above, for 6 and 256 pages that are contiguous on both sides, as vLLM has them. "
        "`zero_copy beside` is the kernel with as few thread blocks as alongside a model.",
        {"bytes": lambda row: in_words(row["payload_bytes"]),
         "direction": lambda row: DIRECTIONS[row["op"]],
         "method": "`{backend}`",
         "ids": lambda row: _IDS.get(row.get("ids", ""), "-"),
         "time, us": "{p50_us:,.4g}", "of memcpy": "{ratio:.2f}", "call, us": "{host_us:,.4g}"},
    ),
    "wall_inside": (
        "Copies inside a device",
        "Registered caches, random slots in an `Index` that the caller keeps, and `copy_` of the "
        "same bytes.",
        {"shape": "{shape}", "bytes": lambda row: in_words(row["payload_bytes"]),
         "method": "`{backend}`", "call": "`{call}`",
         "time, us": "{p50_us:,.4g}", "of copy_": "{ratio:.2f}", "call, us": "{host_us:,.4g}"},
    ),
    "wall_registered": (
        "What a registered call of 32 layers costs the host",
        "`from_gpu` and `to_gpu`, call after call, next to LMCache's op for the same rows, alone "
        "and with an event after it.",
        {"call": "`{op}`", "method": "`{backend}`", "slots": "{ids}", "us": "{host_us:.1f}",
         "of op": _if_there("of_lmcache", ".2f"),
         "of op and event": _if_there("of_lmcache_event", ".2f")},
    ),
    "wall_blocks": (
        "What `copy_blocks` by new ids costs the host",
        "Blocks of 32 layers, call after call. *Driver* is the part of its own submissions: "
        "copies, launches, events and waits.",
        {"blocks": "{blocks}", "direction": lambda row: DIRECTIONS[row["op"]],
         "method": "`{backend}`", "us": "{host_us:,.4g}",
         "submissions": _if_there("submissions", ""), "driver, us": _if_there("driver_us", ",.4g")},
    ),
    "wall_anew": (
        "What precedes a launch",
        "On the CPU, the least of many calls.",
        {"what": "{shape}", "us": "{least_us:.1f}"},
    ),
    "host_interference": (
        "How a transfer slows a model down",
        "The loop runs alone, then during transfers at full speed, on the default stream or on a "
        "separate one. `host` is PortaKV's choice without `overlap=\"idle\"`; `host detached` is "
        "the same with `detached=True`.",
        {"loop": "{loop}", "stream": "{stream}", **_METHOD, "moved": "{shape}",
         "slow-down, %": "{slowdown_pct:.1f}", "link, GB/s": "{link_gb_per_s:.1f}"},
    ),
    "host_interference_short": (
        "How short transfers slow a model down",
        "The same loops during transfers of 12 MiB that follow each other, which a kernel of few "
        "thread blocks makes. `staged` and `batched_memcpy` use copy engines.",
        {"loop": "{loop}", "stream": "{stream}", **_METHOD, "moved": "{shape}",
         "slow-down, %": "{slowdown_pct:.1f}", "link, GB/s": "{link_gb_per_s:.1f}"},
    ),
    "host_waiting": (
        "How long a copy of another stream waits",
        "A pinned copy on another stream, in the direction of continuous transfers, until the host "
        "sees its end. A copy engine serves one stream as long as the stream has more copies. The "
        "benchmark gave up copies after 50 ms.",
        {"copy": "{other}", "direction": _METHOD["direction"], "during": "`{backend}`",
         "moved": "{shape}", "alone, us": "{alone_us:,.0f}", "median, us": _median_wait,
         "longest, us": lambda row: _NEVER if row["given_up"] else f"{row['worst_us']:,.0f}"},
    ),
    "host_small": (
        "Small copies",
        "The time from the call with int64 values until the host sees that the stream has them.",
        {"integers": "{integers:,}", "method": "`{backend}`", "idle, us": "{idle_us:.1f}",
         "during a copy of 1 GB, us": "{busy_us:,.1f}"},
    ),
    "host_call": (
        "What a block transfer costs the host",
        "{blocks:,} blocks x {planes} planes, after other transfers and as the first transfer on "
        "an idle device.",
        {"strategy": "`{backend}`", "direction": _METHOD["direction"], "host memory": "{host_side}",
         "ids": "{ids}", "rows": lambda row: in_words(row["row_bytes"]),
         "host, us": "{host_us:,.1f}", "idle, us": "{idle_us:,.1f}"},
    ),
    "host_pinning": (
        "Pinning", "The machine had touched the memory once before.",
        {"allocator": "`{backend}`", "requested": lambda row: in_words(row["payload_bytes"]),
         "allocated": lambda row: in_words(row["taken_bytes"]), "seconds": "{seconds:.2f}"},
    ),
    "storage_engine": (
        "Reading and writing a disk",
        "Random slots of one file past the page cache, by PortaKV's I/O engines and by fio with "
        "the same requests. fio uses its usual memory, pages of 4 KiB. PortaKV uses large pages, "
        "as a store does. Without large pages (`transparent_hugepage=never`), reads of 1 MB by "
        "`ring` fell from 2.6 - 2.8 to 2.2 - 2.3 GB/s on two cores, from 1.45 to 1.03 of fio.",
        _STORED,
    ),
    "storage_tier": (
        "A disk's tier",
        "With checksums and index, compared with its I/O engine alone and with LMCache's "
        "`fs_native` (O_DIRECT, 8 workers), which checks nothing, in the same folder.", _STORED,
    ),
    "storage_remote": (
        "A remote tier", "Against moto on the same cores, compared with plain requests of obstore.",
        _STORED,
    ),
    "storage_layered": (
        "From a disk to the device",
        "As a whole and layer by layer, compared with the disk's I/O engine.",
        _STORED,
    ),
    "storage_beside": (
        "Urgent loads while stores keep the disk busy", "With fewer than 100 loads, *99 of 100* is "
        "the time of a round's slowest load, the median of the rounds.",
        {"operation": "{op}",
         "loads": lambda row: f"{row['loads']} of {row['shape']}" if "loads" in row else "",
         "ms, median": _in_ms("p50_us"), "alone": _in_ms("p50_alone_us"),
         "99 of 100": _in_ms("p99_us"), "alone ": _in_ms("p99_alone_us"),
         "GB/s": _if_there("gb_per_s", ".2f"), "alone  ": _if_there("alone_gb_per_s", ".2f")},
    ),
    "storage_cost": (
        "What a store costs the host", "",
        {"case": "{shape}", "us": "{us:,.4g}", "of the processor, us": "{cpu_us:,.4g}"},
    ),
    "encoding_copy": (
        "Packing and unpacking inside a device",
        "Rates count raw rows. *Plain* is a gather or a scatter of the same rows.",
        {"planes": "{shape}", "bytes": lambda row: in_words(row["payload_bytes"]),
         "method": "`{backend}`", "GB/s": "{gb_per_s:,.4g}", "of copy_": "{ratio:.2f}",
         "of plain": _if_there("of_plain", ".2f"),
         "raw / packed": _if_there("payload_to_wire", ".3f")},
    ),
    "encoding_link": (
        "Packed rows between a device and host memory",
        "Rates count raw rows, in both directions together where both are copied.",
        {"planes": "{shape}", "bytes": lambda row: in_words(row["payload_bytes"]),
         "direction": lambda row: _EITHER[row["op"]],
         "method": "`{backend}`", "GB/s": "{gb_per_s:,.4g}", "of memcpy": "{ratio:.2f}",
         "of raw": _if_there("of_raw", ".2f"),
         "raw / packed": _if_there("payload_to_wire", ".3f")},
    ),
    "encoding_transport": (
        "Packed rows through staging buffers",
        "Pulls between two processes. Rates count raw rows.",
        {"transport": "{shape}", "bytes": "{op}", "method": "`{backend}`",
         "GB/s": "{gb_per_s:,.4g}", "of raw": _if_there("of_raw", ".2f"),
         "raw / packed": _if_there("payload_to_wire", ".3f")},
    ),
    "encoding_alongside": (
        "Packed rows while a model runs",
        "Detached copies alongside a loop of compute. Rates count raw rows.",
        {"loop": "{loop}", "direction": lambda row: _EITHER[row["op"]], "method": "`{backend}`",
         "slow-down %": "{slowdown_pct:.1f}", "GB/s": "{link_gb_per_s:,.4g}",
         "of memcpy": _if_there("link_ratio", ".2f")},
    ),
    "storage_hits": (
        "Waits for a store", "By the wall clock, from the call to usable blocks on an idle device: "
        "loads of blocks that the host tier has, and saves until their blocks may be written. "
        "Compared with a memcpy of as many bytes.",
        {"blocks": "{shape}", "on": "{on}", "operation": "{op}", "by": "{backend}",
         "ms": _in_ms("p50_us"), "of memcpy": _if_there("of_memcpy", ".2f")},
    ),
    "storage_served": (
        "A store server's clients", "Lookups of 1,000 keys in one call and loads through "
        "`portakv store serve`, in turns with a store of the client's process that has the same "
        "blocks.",
        {"of": "{shape}", "operation": "{op}", "from": _if_there("tier", ""), "by": "{backend}",
         "ms": _in_ms("p50_us"), "us a key": _if_there("us_per_key", ".3f"),
         "time, of local": _if_there("time_of_local", ".2f"),
         "rate, of local": _if_there("of_local", ".2f")},
    ),
    "storage_urgent": (
        "Urgent loads alongside background loads", "",
        {"loads": lambda row: f"{row['loads']} of {row['shape']}",
         "ms, median": _in_ms("p50_us"), "alone": _in_ms("p50_alone_us"),
         "95 of 100": _in_ms("p95_us"), "alone ": _in_ms("p95_alone_us")},
    ),
    "migrate_mapped": (
        "Pulls from mapped memory", "From one process's cache into another's, by random blocks, "
        "compared with a raw copy of as many dense bytes, and with `copy_rows` of the same rows "
        "within one process. Ratios are medians over rounds.", _CROSSED,
    ),
    "migrate_both": ("Both directions at the same time", "", _CROSSED),
    "migrate_cost": (
        "What a pull costs", "", {"case": "{shape}", "bytes": "{op}", "us": "{us:,.0f}"},
    ),
    "migrate_wall": (
        "Pulls by the wall clock", "From the call until the host sees the end, in turns with a raw "
        "copy of as many dense bytes.",
        {"rows": "{shape}", "method": "{backend}", "bytes": "{op}", "us": "{us:,.0f}",
         "beyond a raw copy, us": _if_there("over_raw_us", ",.0f"),
         "of a raw copy": _if_there("of_raw", ".2f")},
    ),
    "migrate_ticket": (
        "An offer and its ticket", "", {"bytes": "{op}", "us": "{us:,.0f}"},
    ),
    "migrate_setup": (
        "Wait of the owner before readers can pull", "By the wall clock.",
        {"call": "{shape}", "of": "{op}", "ms": "{ms:,.0f}"},
    ),
    "migrate_weights": (
        "Weights", "The copies alone, and `pull_weights`, which also requests names and compares "
        "checksums.", _CROSSED,
    ),
    "migrate_beside": (
        "How a pull slows a model down", "On the default terms.",
        {"loop": "{loop}", "on the": "{on}", "during": lambda row: row["backend"],
         "slow-down, %": "{slowdown_pct:.1f}", "GB/s": "{link_gb_per_s:.0f}"},
    ),
    "migrate_staged": (
        "Pulls through staging buffers", "Compared with the same library and one buffer of as "
        "many bytes.", _CROSSED,
    ),
    "migrate_scattered": (
        "Scattered blocks of 64 KB", "Pulls from mapped memory, compared with transport libraries "
        "that have a descriptor for each block.", _CROSSED,
    ),
}  # fmt: skip


def page(files: Iterable[Path], partial: Iterable[Path] = ()) -> str:
    """Return the page for result files, accelerators first, without those of integrations and
    engines.

    Args:
        files: whole results.
        partial: results of single parts; their rows replace older ones of one kind and machine.
    """
    read = [recorded.read(path) for path in sorted(files)]
    left_out = (INTEGRATION_SUITE, ENGINE_SUITE)
    whole = [result for result in read if result.get("suite") not in left_out]
    results = newest(whole, with_rows(partial))
    results.sort(key=lambda result: result["machine"]["device_type"] == "cpu")
    suites = {None: _device, HOST_SUITE: _link, WALL_SUITE: _whole_calls, STORAGE_SUITE: _storage}
    suites[MIGRATION_SUITE] = _migration
    suites[ENCODING_SUITE] = _encodings
    results.sort(key=lambda result: [*suites].index(result.get("suite")))
    parts = [_HEAD.replace("{summary}", _summary(results))]
    for result in results:
        parts += suites[result.get("suite")](result)
    return "\n".join(parts) + "\n"


def with_rows(files: Iterable[Path]) -> list[Fields]:
    """Return the results in the files that have measured rows; others count faults."""
    return [
        recorded.read(path)
        for path in sorted(files)
        if "rows" in json.loads(path.read_text(encoding="utf-8"))
    ]


def newest(results: Sequence[Fields], partial: Sequence[Fields]) -> list[Fields]:
    """Return the results with the newest rows of each kind. Rows of another day name it."""
    merged = {_of(result): {**result, "rows": list[Row]()} for result in results}
    ordered = sorted([*results, *partial], key=lambda x: (x["machine"]["date"], len(x["rows"])))
    for result in ordered:
        if (whole := merged.get(_of(result))) is None:
            continue
        kinds = {row["kind"] for row in result["rows"]}
        older = [row for row in whole["rows"] if row["kind"] not in kinds]
        date = result["machine"]["date"]
        day = {} if date == whole["machine"]["date"] else {"measured": date}
        whole["rows"] = [*older, *({**row, **day} for row in result["rows"])]
    return [*merged.values()]


def _of(result: Fields) -> tuple[str | None, str]:
    """Return the suite and the machine of a result."""
    return result.get("suite"), result["machine"]["device"]


def _summary(results: Sequence[Fields]) -> str:
    """Return one line: the fastest backend and the chosen strategy, on the first accelerator."""
    sentences = []
    for result in results:
        device = result["machine"]["device"]
        if result.get("suite") is None and (preferred := preference(copies_of(result))):
            method, ratios = next(iter(preferred.items()))
            sentences.append(f"On one {device}, `{method}` reaches {_shares(ratios, 'copy_')}.")
            break
    for result in results:
        device = result["machine"]["device"]
        if result.get("suite") == HOST_SUITE and (rows := _chosen_strategy(result["rows"])):
            shares = _shares([float(row["ratio"]) for row in rows], "memcpy")
            sentences.append(
                f"Between one {device} and pinned host memory, the strategy that PortaKV chooses "
                f"reaches {shares}."
            )
            break
    return " ".join(sentences)


def _shares(ratios: Sequence[float], peer: str) -> str:
    return f"{median(ratios):.2f} of `{peer}` in the median and {min(ratios):.2f} at worst"


def copies_of(result: Fields) -> list[Row]:
    return having(result["rows"], kind="copy", verified=True, peer=None)


def _chosen_strategy(rows: Sequence[Row]) -> list[Row]:
    return having(rows, kind="host_copy", backend="host", verified=True)


def _device(result: Fields) -> list[str]:
    machine = result["machine"]
    rows = result["rows"]
    copies = copies_of(result)
    driver = f", driver {machine['driver_version']}" if "driver_version" in machine else ""
    gathers = [row for row in rows if row.get("op") in ("gather", "copy_")]
    gathers.sort(key=lambda row: -float(row["p50_us"]))
    on_cpu = [_CPU_HEAD.format_map(machine)] if machine["device_type"] == "cpu" else []
    return [
        "",
        f"## {machine['device']}",
        "",
        f"{measured(machine)}{driver}.",
        *on_cpu,
        *_which(copies),
        *_slower(copies),
        *_sizes(copies),
        *_listed(rows, "overhead"),
        *_listed(rows, "startup"),
        *_peers(rows),
        *_listed(gathers, "ladder"),
    ]


def _link(result: Fields) -> list[str]:
    rows = having(result["rows"], verified=True)
    return _suite("Host memory", result, ["", _LINK_HEAD, *_expected(rows), *_link_best(rows)])


def _whole_calls(result: Fields) -> list[str]:
    return _suite("Host memory by the wall clock", result, [])


def _storage(result: Fields) -> list[str]:
    return _suite("Block stores", result, [])


def _encodings(result: Fields) -> list[str]:
    return _suite("Packed rows", result, [])


def _migration(result: Fields) -> list[str]:
    between = sorted({_BETWEEN[row["across"]] for row in result["rows"]})
    known = [x for x in result["rows"] if (x["kind"], x["backend"]) not in _RAW]
    return _suite(f"Migration between {' and '.join(between)}", {**result, "rows": known}, [])


def _suite(name: str, result: Fields, figures: list[str]) -> list[str]:
    """Return the lines of a suite on a machine: some figures, then its tables."""
    machine = result["machine"]
    rows = having(result["rows"], verified=True)
    head = ["", f"## {name}, {machine['device']}", "", f"{measured(machine)}."]
    return [*head, *figures, *(line for kind in _LISTS for line in _listed(rows, kind))]


def measured(machine: Fields) -> str:
    return f"Measured {machine['date']} with torch {machine['torch']}, Python {machine['python']}"


def _which(copies: Sequence[Row]) -> list[str]:
    intro = [
        f"- `{method}`: {median(matches):.2f} of `copy_` in the median of {len(matches)} rows, "
        f"{min(matches):.2f} at worst."
        for method, matches in preference(copies).items()
    ]
    return ["", "### Which one", "", *intro] if intro else []


def preference(copies: Sequence[Row]) -> dict[str, list[float]]:
    """Return the ratios of each method, the fastest first by median."""
    matches = [
        (method, [float(r["ratio"]) for r in having(copies, backend=method)]) for method in _ORDER
    ]
    return dict(sorted((one for one in matches if one[1]), key=lambda one: -median(one[1])))


def _slower(copies: Sequence[Row]) -> list[str]:
    table = [
        [f"`{method}`", words, *_spread(having(copies, backend=method, layers=layers), "to_cuda")]
        for (layers, words), method in product(_LAYERS.items(), _ORDER[1:])
    ]
    heads = ["backend", "layers", "x cuda, median", "x cuda, worst", "rows"]
    return _section("How much slower than `cuda`", "", heads, table)


def _sizes(copies: Sequence[Row]) -> list[str]:
    """Return times by payload, for the shape that is measured from one token up."""
    rows = having(
        copies,
        row_bytes=2048,
        op="gather",
        index="random",
        layers="apart",
        cache="layer | kv block token head dim",
    )
    rows = [r for r in rows if r["shape"].startswith("llama3-8b") and r["slots_used"] < 1]
    sizes = sorted({row["payload_bytes"] for row in rows})
    methods = [method for method in _ORDER if having(rows, backend=method)]
    if len(sizes) < 3 or len(methods) < 2:
        return []
    by = {(r["payload_bytes"], r["backend"]): r for r in rows}
    table = []
    for size in sizes:
        selected = [by.get((size, method)) for method in methods]
        cells = [f"{r['p50_us']:.4g} us ({r['host_us']:.0f})" if r else "" for r in selected]
        table.append([in_decimal(size), *cells])
    intro = (
        "Device time of a gather of random slots, and in brackets the host time of the call with "
        "cold caches, both in microseconds: Llama-3 8B, rows of 2 KB, each layer an allocation. If "
        "the host time is larger, a faster kernel helps only if other work hides the call."
    )
    fastest, *others = methods
    heads = ["payload", *(f"`{method}`" for method in methods)]
    lines = [*_section("From what size it matters", intro, heads, table), ""]
    for method in others:
        both = [n for n in sizes if (n, method) in by and (n, fastest) in by]
        slower = [n for n in both if by[n, method]["p50_us"] > CLOSE * by[n, fastest]["p50_us"]]
        at = ", ".join(map(in_decimal, slower)) if slower else "every size measured"
        if slower == both:
            at = "every size measured" if len(both) > 1 else f"{at}, the only size measured"
        lead = f"{'more than' if slower else 'at most'} {CLOSE - 1:.0%} slower than `{fastest}`"
        lines.append(f"- `{method}` is {lead} at {at}.")
    return lines


def _peers(rows: Sequence[Row]) -> list[str]:
    def workload(row: Row) -> str:
        if row["row_bytes"] < 256:
            return "rows under 256 B"
        large = row["payload_bytes"] >= _LARGE
        return f"rows of 256 B and more, {'from' if large else 'under'} 32 MB"

    kinds = (f"rows of 256 B and more, {how} 32 MB" for how in ("from", "under"))
    table = []
    for words, op in product((*kinds, "rows under 256 B"), ("gather", "scatter")):
        selected = having(rows, kind="copy", backend="cuda", op=op)
        table.append(
            [words, op, *_spread([r for r in selected if workload(r) == words], "to_peer")]
        )
    intro = (
        "Device time of `cuda` / that of the faster of LMCache's released kernels, in the rows "
        "that these kernels copied correctly in the same run; below 1, `cuda` is faster."
    )
    heads = ["workload", "direction", "median", "worst", "rows"]
    return _section("`cuda` compared with LMCache's kernels", intro, heads, table)


def link_sizes(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return heads and lines of a table: the chosen strategy's time, of memcpy, by payload."""
    chosen = _chosen_strategy(rows)
    table = []
    for payload in sorted({row["payload_bytes"] for row in chosen}):
        cells = [in_words(payload)]
        for op in DIRECTIONS:
            matches = [r["ratio"] for r in having(chosen, payload_bytes=payload, op=op)]
            cells += [f"{median(matches):.3f}", f"{min(matches):.3f}"] if matches else ["", ""]
        table.append(cells)
    columns = ((f"{words}, median", "worst") for words in DIRECTIONS.values())
    return ["payload", *(head for pair in columns for head in pair)], table


def _expected(rows: Sequence[Row]) -> list[str]:
    chosen = _chosen_strategy(rows)
    slow = Counter(f"*{row['host_side']}*" for row in chosen if row["ratio"] < _SLOW).most_common()
    intro = (
        "The strategy that PortaKV chooses, of memcpy, over all measured layouts. Of "
        f"{len(chosen)} rows, {' and '.join(f'{times} {side}' for side, times in slow)} are below "
        f"{_SLOW}. A layer-first pool has runs of one block in one plane."
    )
    return _section("What to expect", intro, *link_sizes(rows))


def _link_best(rows: Sequence[Row]) -> list[str]:
    ours = [row for row in having(rows, kind="host_copy") if row["backend"] in _STRATEGIES]
    fastest = [row for point in grouped(ours, "shape", "op") if (row := quickest(point))]
    table = []
    for run, large in product(sorted({row["run_bytes"] for row in fastest}), (False, True)):
        cells = [in_words(run), "from 128 MB" if large else "less"]
        for op in DIRECTIONS:
            selected = having(fastest, run_bytes=run, op=op)
            won = [r["backend"] for r in selected if (r["payload_bytes"] >= _LINK_LARGE) == large]
            best = Counter(won).most_common()
            cells.append(", ".join(f"`{name}` {times}" for name, times in best))
        table.append(cells)
    intro = "The fastest strategy on an idle device, and its number of points."
    return _section("Which strategy", intro, ["runs", "payload", *DIRECTIONS.values()], table)


def _listed(rows: Sequence[Row], kind: str) -> list[str]:
    title, intro, cells = _LISTS[kind]
    selected = having(rows, kind=kind)
    table = [
        [cell.format_map(row) if isinstance(cell, str) else cell(row) for cell in cells.values()]
        for row in selected
    ]
    filled = [any(column) for column in zip(*table, strict=True)]
    table = [[*compress(line, filled)] for line in table]
    heads = [*compress(cells, filled)]
    text = intro.format_map(selected[0]) if selected else ""
    if days := {row["measured"] for row in selected if "measured" in row}:
        text = f"{text} Measured {max(days)}.".lstrip()
    return _section(title, text, heads, table)


def _spread(rows: Sequence[Row], figure: str) -> list[str]:
    """Return median, worst and number of a figure over the rows that have it, or nothing."""
    matches = [float(row[figure]) for row in rows if figure in row]
    return [_times(median(matches)), _times(max(matches)), str(len(matches))] if matches else []


def _section(
    title: str, intro: str, heads: Sequence[str], table: Sequence[Sequence[str]]
) -> list[str]:
    """Return a section with the complete lines of a table, or nothing if no line is complete."""
    whole = [line for line in table if len(line) == len(heads)]
    if not whole:
        return []
    return ["", f"### {title}", "", *([intro, ""] if intro else []), *table_of(heads, whole)]


def table_of(heads: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *table)]


def recorded_page() -> str:
    """Return the page for the recorded results."""
    return page(RESULTS.glob("*.json"), (RESULTS / "parts").glob("*.json"))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or with ``--check`` compare it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guide", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the page is stale"
    )
    check = parser.parse_args(argv).check
    text = recorded_page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE}")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is stale. Run `python -m benchmarks.guide`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
