# SPDX-License-Identifier: Apache-2.0
"""Print a result for `portakv bench`: a table for each kind of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from portakv.cli.console import print_rows
from portakv_benchmarks.shared.harness import Fields, Row, having
from portakv_benchmarks.shared.shapes import in_words

#: A column's title; and the field that it shows, as it is ("op") or as a number on the right
#: ("ratio:.3f", "blocks:"), "-" in rows without it; or what makes its text, on the right.
Cell = tuple[str, "str | Callable[[Row], str]"]

_FLAGS = (
    "flags: noisy = p90 above 1.2 x median; host = the host's part shows in the time. MB and GB of "
    "cases to the host are 2^20 and 2^30 bytes; their GB/s are 10^9, each byte counted once"
)


def print_results(results: Fields) -> None:
    """Print the tables of a result, one for each kind of rows."""
    machine = results["machine"]
    print(f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}")
    for kind, (title, cells) in _TABLES.items():
        rows = having(results["rows"], kind=kind)
        if kind == "ladder":
            rows.sort(key=lambda row: (row["op"], -row["p50_us"]))
        # Columns that no row fills are left out.
        filled = [cell for cell in cells if {_text(row, cell[1]) for row in rows} - {"-"}]
        if filled:
            titles = [name for name, _ in filled]
            numbers = [name for name, shown in filled if not _is_name(shown)]
            lines = [[_text(row, shown) for _, shown in filled] for row in rows]
            print_rows(titles, lines, numbers, numbers, title)
    for line in results["left_out"]:
        print(f"left out: {line}")
    print(_FLAGS)


def _is_name(shown: str | Callable[[Row], str]) -> bool:
    return isinstance(shown, str) and ":" not in shown


def _text(row: Row, shown: str | Callable[[Row], str]) -> str:
    if not isinstance(shown, str):
        return shown(row)
    name, _, form = shown.partition(":")
    if name == "verified":
        return "right" if row[name] else "WRONG"
    return f"{row[name]:{form}}" if name in row else "-"


def _time(row: Row) -> str:
    hidden = row["host_hidden"] or "perf_counter" in row.get("timer", "")
    return f"{row['p50_us']:,.5g}" + ("" if hidden else " host")


def _spread(row: Row) -> str:
    return f"{row['p90_us'] / row['p50_us']:.2f}" + (" noisy" if row["noisy"] else "")


def _best(row: Row) -> str:
    return f"{row['best_engine']} {row['best_ratio']:.3f}" if "best_ratio" in row else "-"


_BYTES: Cell = ("bytes", "verified")
_WHAT: tuple[Cell, ...] = (("case", "shape"), ("method", "backend"), ("direction", "op"))
_LINK: tuple[Cell, ...] = (
    *_WHAT, ("us", _time), ("GB/s", "gb_per_s:.4g"), ("of memcpy", "ratio:.3f"),
    ("p90/p50", _spread), ("alone us", "alone_us:.4g"), ("host us", "host_us:.4g"),
)  # fmt: skip
_INTEGRATION: tuple[Cell, ...] = (("engine", "part"), *_WHAT, ("format", "format:"))
_STORED: tuple[Cell, ...] = (
    *_WHAT,
    *(("ms", lambda row: f"{row['p50_us'] / 1e3:.4g}"), ("GB/s", "gb_per_s:.4g")),
    *(("of fio", "of_fio:.3f"), ("of engine", "of_engine:.3f"), ("of lmcache", "of_lmcache:.3f")),
    *(("of raw", "of_raw:.3f"), ("first", "first_of_whole:.3f"), ("of whole", "of_whole:.3f")),
    *(("CPU us/MiB", "cpu_us_per_mib:.4g"), ("p90/p50", _spread), ("rounds", "rounds:"), _BYTES),
)
_CROSSED: tuple[Cell, ...] = (
    ("case", "shape"),
    ("of", "op"),
    ("method", "backend"),
    ("between", "across"),
    ("us", lambda row: f"{row['p50_us']:,.5g}"),
    ("GB/s", "gb_per_s:.4g"),
    ("of raw", "of_raw:.3f"),
    ("of copy_rows", "of_rows:.3f"),
    ("of own", "of_own:.3f"),
    ("of peer", "of_peer:.4g"),
    ("p90/p50", _spread),
    _BYTES,
)
_TABLES: Mapping[str, tuple[str, Sequence[Cell]]] = {
    "copy": (
        "copies, in turns with copy_; pool = slots of the cache and the share that is moved",
        (*((name, name) for name in ("shape", "layers", "backend", "op", "index")),
         ("MB", lambda row: f"{row['payload_bytes'] / 1e6:.4g}"),
         ("pool", lambda row: f"{row['pool_slots']} {row['slots_used']:.2%}"), ("us", _time),
         ("GB/s r+w", "gb_per_s:.4g"), ("of copy_", "ratio:.3f"), ("p90/p50", _spread),
         ("x cuda", "to_cuda:.3f"), ("x peer", "to_peer:.3f"), ("host us", "host_us:.1f"), _BYTES),
    ),
    "ladder": (
        "methods of moving one chunk of a 7B model",
        (("method", "way"), ("op", "op"), ("us", _time), ("of copy_", "ratio:.4f"),
         ("x cuda", "to_cuda:.3f"), ("host us", "host_us:.1f"), _BYTES),
    ),
    "overhead": (
        "host time of a registered call, one token of one layer",
        (("backend", "backend"), ("ids", "ids"), ("launch us", "launch_us:.2f"),
         ("call us", "call_us:.2f"), ("added us", "added_us:.2f")),
    ),
    "startup": (
        "fresh process, registration to first finished transfer",
        (("backend", "backend"), ("cache", "cache"), ("seconds", "seconds:.3f"),
         ("worst", "worst:.3f"), ("imports", "import_seconds:.3f")),
    ),
    "host_copy": (
        "device and pinned host, in turns with a memcpy of the same bytes; alone = from the call "
        "to its end on an idle device, nothing hidden",
        (*_LINK, ("staging MiB", "staging_mb:.3g"), ("loss", "chosen_loss:.3f"),
         ("chosen", "chosen"), ("best", _best), _BYTES),
    ),
    "wall_copy": (
        "device and pinned host by the wall, from the call until the host sees the end on an idle "
        "device, in turns with a memcpy of the same bytes",
        (*_WHAT, ("ids", "ids"), ("us", _time), ("GB/s", "gb_per_s:.4g"),
         ("of memcpy", "ratio:.3f"), ("ceiling", "ceiling:.3f"), ("p90/p50", _spread),
         ("host us", "host_us:.1f"), ("chosen", "chosen"), _BYTES),
    ),
    "wall_pages": (
        "pages of 2 MiB by the wall, contiguous on both sides, in turns with a memcpy of the same "
        "bytes",
        (*_WHAT, ("ids", "ids"), ("us", _time), ("GB/s", "gb_per_s:.4g"),
         ("of memcpy", "ratio:.3f"), ("ceiling", "ceiling:.3f"), ("p90/p50", _spread),
         ("host us", "host_us:.1f"), ("chosen", "chosen"), _BYTES),
    ),
    "wall_inside": (
        "inside a device by the wall, registered caches and a kept Index, in turns with copy_ of "
        "the same bytes",
        (*_WHAT, ("MB", lambda row: f"{row['payload_bytes'] / 1e6:.3g}"), ("us", _time),
         ("of copy_", "ratio:.3f"), ("x cuda", "to_cuda:.3f"), ("p90/p50", _spread),
         ("host us", "host_us:.1f"), _BYTES),
    ),
    "wall_registered": (
        "host time of registered calls of 32 layers, back to back",
        (("case", "shape"), ("method", "backend"), ("call", "op"), ("ids", "ids"),
         ("host us", "host_us:.2f"), ("least", "least_us:.2f"),
         ("x lmcache", "of_lmcache:.2f"), ("x lmcache and event", "of_lmcache_event:.2f"), _BYTES),
    ),
    "wall_blocks": (
        "host time of copy_blocks by new ids, 32 layers, back to back; driver = of it, the "
        "driver's own submissions",
        (("blocks", "blocks:"), ("method", "backend"), ("direction", "op"),
         ("host us", "host_us:.1f"), ("p90", "host_us_p90:.1f"), ("idle", "idle_us:.1f"),
         ("submissions", "submissions:"), ("driver us", "driver_us:.1f"),
         ("chosen", "chosen"), _BYTES),
    ),
    "wall_anew": (
        "host time before a launch, on the CPU",
        (("what", "shape"), ("least us", "least_us:.2f"), ("median us", "host_us:.2f"), _BYTES),
    ),
    "host_direct": ("zero_copy, by its limit on thread blocks", (*_LINK, _BYTES)),
    "host_duplex": ("both directions at the same time", (*_LINK, ("chosen", "chosen"), _BYTES)),
    "host_pageable": (
        "device and pageable host, alongside plain copies through a pinned ring; by "
        "the host's clock",
        (*_WHAT, ("us", _time), ("GB/s", "gb_per_s:.4g"), ("of best ring", "to_ring:.3f"),
         ("p90/p50", _spread), _BYTES),
    ),
    "host_interference": (
        "alongside a loop of compute: its slow-down, and the link's bandwidth meanwhile",
        (("loop", "loop"), ("stream", "stream"), *_WHAT, ("blocks", "thread_blocks:"),
         ("slow-down %", "slowdown_pct:.4g"),
         ("repeats", lambda row: " ".join(f"{one:.1f}" for one in row["slowdowns_pct"])),
         ("over memcpy", "over_memcpy:.4g"), ("GB/s", "link_gb_per_s:.4g"),
         ("of memcpy", "link_ratio:.3f"), ("ran dry", "ran_dry:"), ("chosen", "chosen"), _BYTES),
    ),
    "host_interference_short": (
        "alongside a loop of compute, short transfers that follow each other: its slow-down, and "
        "the link's bandwidth meanwhile",
        (("loop", "loop"), ("stream", "stream"), *_WHAT, ("blocks", "thread_blocks:"),
         ("slow-down %", "slowdown_pct:.4g"),
         ("repeats", lambda row: " ".join(f"{one:.1f}" for one in row["slowdowns_pct"])),
         ("over memcpy", "over_memcpy:.4g"), ("GB/s", "link_gb_per_s:.4g"),
         ("of memcpy", "link_ratio:.3f"), ("ran dry", "ran_dry:"), ("chosen", "chosen"), _BYTES),
    ),
    "host_waiting": (
        "a copy of another stream, in the direction of transfers that follow each other, from its "
        "call, or from the end of the kernel for which it waits, until the host sees its end; "
        "given up after 50 ms",
        (("other", "other"), *_WHAT, ("alone us", "alone_us:.4g"), ("us", "wait_us:.4g"),
         ("worst us", "worst_us:.4g"), ("copies", "samples:"), ("given up", "given_up:"),
         ("chosen", "chosen"), _BYTES),
    ),
    "host_small": (
        "integers from the host, until it sees that their stream has them; busy = alongside a "
        "copy of 1 GB; paced = as busy, but idle; device = by events on that stream",
        (("integers", "integers:"), ("method", "backend"), ("idle us", "idle_us:.4g"),
         ("paced us", "paced_us:.4g"), ("busy us", "busy_us:.4g"),
         ("busy/paced", "busy_to_idle:.2f"), ("idle/pinned", "idle_to_pinned:.2f"),
         ("paced/pinned", "paced_to_pinned:.2f"), ("host us", "idle_host_us:.4g"),
         ("device us", "idle_device_us:.4g"), ("busy device us", "busy_device_us:.4g"),
         ("overtook", "overtook:"), _BYTES),
    ),
    "host_pinning": (
        "pinning, memory touched once before",
        (("case", "shape"), ("method", "backend"), ("seconds", "seconds:.4g"),
         ("of torch", "to_torch:.3f"), ("taken", lambda row: in_words(row["taken_bytes"])),
         ("resident", lambda row: in_words(row["resident_bytes"])),
         ("to free, s", "free_seconds:.4g"), _BYTES),
    ),
    "host_call": (
        "host time of a block transfer; runs = pieces once neighbours are merged",
        (*_WHAT, ("ids", "ids"), ("blocks", "blocks:"), ("planes", "planes:"),
         ("runs", "merged_runs:"), ("host us", "host_us:.4g"), ("p90", "host_us_p90:.4g"),
         ("idle", "idle_us:.4g"), ("first", "first_us:.4g"), ("us a run", "us_per_run:.3g"),
         _BYTES),
    ),
    "plug_copy": (
        "engines' transfers by their own code and by PortaKV, in turns with a memcpy of the same "
        "bytes",
        (*_INTEGRATION, ("us", _time), ("GB/s", "gb_per_s:.4g"), ("of memcpy", "ratio:.3f"),
         ("x own", "of_own:.3f"), ("p90/p50", _spread), ("host us", "host_us:.4g"),
         ("x own", "host_of_own:.3f"), ("whole x own", "whole_of_own:.3f"), _BYTES),
    ),
    "plug_interference": (
        "alongside a loop of compute: its slow-down, and the link's bandwidth meanwhile",
        (("loop", "loop"), *_INTEGRATION, ("slow-down %", "slowdown_pct:.4g"),
         ("over own", "over_own:.4g"), ("over noise", "over_noise:.4g"),
         ("GB/s", "link_gb_per_s:.4g"), ("x own", "link_to_own:.3f"),
         ("ran dry", "ran_dry:"), _BYTES),
    ),
    "plug_calls": (
        "calls of torch's operators, and those that the host waits for",
        (
            *_INTEGRATION,
            ("calls", "calls:"),
            ("waits", "waits:"),
            ("own / these", "fewer:.3g"),
            _BYTES,
        ),
    ),
    "plug_median": (
        "time of the integration / that of the engine's own code, the median of all wide rows",
        (("engine", "part"), ("over", "shape"), ("x own", "of_own:.3f"), _BYTES),
    ),
    "plug_job": (
        "host time of jobs in a step of a real engine, by its own worker and by PortaKV's",
        (("job", "shape"), ("of", "op"), ("method", "backend"), ("host us", "host_us:,.4g"),
         ("x own", "host_of_own:.3f"), ("least us", "least_us:,.4g"),
         ("x own", "least_of_own:.3f"), ("first us", "first_us:,.4g"), ("jobs", "rounds:"),
         _BYTES),
    ),
    "plug_prompt": (
        "prompts in a real engine, until eight tokens are there",
        (("prompt", "shape"), ("part", "op"), ("method", "backend"), ("ms", "p50_ms:.4g"),
         ("least", "least_ms:.4g"), ("most", "most_ms:.4g"), ("prompts", "rounds:"), _BYTES),
    ),
    "engine_prompt": (
        "requests in a real engine, until the first token is there; ratios are medians of pairs",
        (("prompt", "shape"), ("part", "op"), ("connector", "backend"), ("ms", "p50_ms:.4g"),
         ("least", "least_ms:.4g"), ("most", "most_ms:.4g"), ("x vLLM's", "of_own:.3f"),
         ("x off", "of_off:.3f"), ("x raw", "of_raw:.3f"),
         ("above a device hit", "above_device_hit_ms:.4g"),
         ("first ms", "first_ms:.4g"), ("prompts", "rounds:"), ("tokens", "verified")),
    ),
    "engine_decode": (
        "steps of a real engine while requests decode",
        (("case", "shape"), ("meanwhile", "op"), ("connector", "backend"),
         ("mean ms", "mean_ms:.4g"), ("x vLLM's", "of_own:.3f"), ("median", "p50_ms:.4g"),
         ("most", "most_ms:.4g"), ("runs", "rounds:")),
    ),
    "encoding_copy": (
        "packing and unpacking inside a device, in turns with copy_; GB/s of raw rows",
        (*_WHAT, ("MB", lambda row: f"{row['payload_bytes'] / 1e6:.4g}"), ("us", _time),
         ("GB/s", "gb_per_s:.4g"), ("of copy_", "ratio:.3f"), ("of plain", "of_plain:.3f"),
         ("raw / wire", "payload_to_wire:.3f"), ("p90/p50", _spread), ("host us", "host_us:.1f"),
         _BYTES),
    ),
    "encoding_link": (
        "packed and raw rows between a device and pinned host, in turns with a memcpy of the raw "
        "bytes; GB/s of raw rows",
        (*_WHAT, ("MB", lambda row: f"{row['payload_bytes'] / 1e6:.4g}"), ("us", _time),
         ("GB/s", "gb_per_s:.4g"), ("of memcpy", "ratio:.3f"), ("of raw", "of_raw:.3f"),
         ("raw / wire", "payload_to_wire:.3f"), ("p90/p50", _spread), ("host us", "host_us:.1f"),
         _BYTES),
    ),
    "encoding_transport": (
        "packed and raw pulls through staging buffers; GB/s of raw rows",
        (("transport", "shape"), ("of", "op"), ("method", "backend"),
         ("us", lambda row: f"{row['p50_us']:,.5g}"),
         ("GB/s", "gb_per_s:.4g"), ("of raw", "of_raw:.3f"), ("raw / wire", "payload_to_wire:.3f"),
         ("rounds", "rounds:"), _BYTES),
    ),
    "encoding_alongside": (
        "detached copies of packed and raw rows alongside a loop of compute; GB/s of raw rows",
        (("loop", "loop"), *_WHAT, ("slow-down %", "slowdown_pct:.4g"),
         ("repeats", lambda row: " ".join(f"{one:.1f}" for one in row["slowdowns_pct"])),
         ("over memcpy", "over_memcpy:.4g"), ("over raw", "over_raw:.4g"),
         ("GB/s", "link_gb_per_s:.4g"), ("of memcpy", "link_ratio:.3f"), ("ran dry", "ran_dry:"),
         _BYTES),
    ),
    "encoding_store": (
        "saves and loads of block stores by the wall clock, in turns; GB/s of raw rows",
        (("rows, tier", "shape"), ("call", "op"), ("store", "backend"), ("form", "form"),
         ("us", lambda row: f"{row['p50_us']:,.5g}"), ("GB/s", "gb_per_s:.4g"),
         ("of raw", "of_raw:.3f"), ("of raws", "of_raws:.3f"),
         ("CPU us/MiB", "cpu_us_per_mib:,.4g"), ("rounds", "rounds:"), _BYTES),
    ),
    "encoding_codec": (
        "packing next to other codecs by the wall clock, in turns; GB/s of raw rows",
        (*_WHAT, ("us", lambda row: f"{row['p50_us']:,.5g}"), ("GB/s", "gb_per_s:.4g"),
         ("of nvCOMP", "of_nvcomp:.3f"), ("raw / coded", "payload_to_wire:.3f"),
         ("rounds", "rounds:"), _BYTES),
    ),
    "encoding_capacity": (
        "blocks that the same bytes of a tier hold",
        (("tier", "shape"), ("store", "backend"), ("blocks", "blocks:,.4g"),
         ("of raw", "of_raw:.3f"), _BYTES),
    ),
    "engine_handover": (
        "requests of a decode engine, until the first token is there; the prefill engine has "
        "computed the prompt, and ratios are medians of pairs",
        (("prompt", "shape"), ("part", "op"), ("connector", "backend"), ("ms", "p50_ms:.4g"),
         ("least", "least_ms:.4g"), ("most", "most_ms:.4g"), ("x recompute", "of_off:.3f"),
         ("after prefill", "after_prefill_ms:.4g"), ("prefill", "prefill_ms:.4g"),
         ("prompts", "rounds:"), ("same bits", "same_bits:"), ("near ties", "near_ties:"),
         ("tokens", "verified")),
    ),
    "engine_handover_pull": (
        "pulls of prompts' rows, next to raw copies of the same bytes between the same devices",
        (("prompt", "shape"), ("part", "op"), ("strategy", "backend"), ("ms", "p50_ms:.4g"),
         ("least", "least_ms:.4g"), ("most", "most_ms:.4g"), ("GB/s", "gb_per_s:.4g"),
         ("raw ms", "raw_ms:.4g"), ("raw GB/s", "raw_gb_per_s:.4g"), ("of raw", "of_raw:.3f"),
         ("pulls", "rounds:"), _BYTES, ("before", "queued_ms:.4g"), ("seen", "seen_ms:.4g"),
         ("rest", "rest_ms:.4g")),
    ),
    "engine_handover_fault": (
        "answers of a decode engine while something happens to the rows",
        (("fault", "shape"), ("case", "op"), ("answers", "answers:"), ("pulled", "pulled:"),
         ("computed", "computed:"), ("preempted", "preemptions:"), ("same bits", "same_bits:"),
         ("near ties", "near_ties:"), ("wrong", "wrong:"), ("as expected", "verified")),
    ),
    "storage_engine": ("reading and writing random slots of one file", _STORED),
    "storage_tier": ("a disk's tier alongside its engine with as many bytes", _STORED),
    "storage_remote": ("a remote tier alongside plain requests", _STORED),
    "storage_layered": ("from a disk to the device", _STORED),
    "storage_cost": (
        "what a store costs the host",
        (("case", "shape"), ("us", "us:,.4g"), ("CPU us", "cpu_us:,.4g"), _BYTES),
    ),
    "storage_beside": (
        "urgent loads alongside stores that keep the disk busy",
        (
            *(*_WHAT, ("p50 alone us", "p50_alone_us:,.4g"), ("p50 us", "p50_us:,.4g")),
            *(("of alone", "p50_ratio:.3f"), ("p99 alone us", "p99_alone_us:,.4g")),
            *(("p99 us", "p99_us:,.4g"), ("of alone", "p99_ratio:.3f"), ("loads", "loads:")),
            *(("GB/s", "gb_per_s:.4g"), ("of alone", "rate_ratio:.3f"), _BYTES),
        ),
    ),
    "storage_hits": (
        "loads from the host tier and saves by the wall clock, on an idle device",
        (*_WHAT, ("on", "on"), ("us", "p50_us:,.4g"), ("p90", "p90_us:,.4g"),
         ("of memcpy", "of_memcpy:.3f"), _BYTES),
    ),
    "storage_served": (
        "lookups and loads of a store server's client, next to a store of the process",
        (*_WHAT, ("from", "tier"), ("us", "p50_us:,.4g"), ("p90", "p90_us:,.4g"),
         ("us a key", "us_per_key:.3f"), ("time of local", "time_of_local:.3f"),
         ("rate of local", "of_local:.3f"), _BYTES),
    ),
    "storage_urgent": (
        "urgent loads alongside background loads of many small blocks",
        (*_WHAT, ("p50 alone us", "p50_alone_us:,.4g"), ("p50 us", "p50_us:,.4g"),
         ("p95 alone us", "p95_alone_us:,.4g"), ("p95 us", "p95_us:,.4g"), ("loads", "loads:"),
         _BYTES),
    ),
    "migrate_mapped": ("pulls of mapped memory, alongside raw copies of as many bytes", _CROSSED),
    "migrate_both": ("both processes pull from each other at the same time", _CROSSED),
    "migrate_cost": (
        "what a pull costs",
        (("case", "shape"), ("of", "op"), ("between", "across"), ("us", "us:,.4g"),
         ("p90", "p90_us:,.4g"), ("calls", "rounds:"), _BYTES),
    ),
    "migrate_wall": (
        "pulls by the wall clock, in turns with raw copies of as many bytes",
        (("case", "shape"), ("method", "backend"), ("of", "op"), ("between", "across"),
         ("us", "us:,.4g"), ("p90", "p90_us:,.4g"), ("over raw us", "over_raw_us:,.4g"),
         ("of raw", "of_raw:.3f"), ("calls", "rounds:"), _BYTES),
    ),
    "migrate_ticket": (
        "offers, each with its ticket",
        (("case", "shape"), ("of", "op"), ("us", "us:,.4g"), ("p90", "p90_us:,.4g"),
         ("calls", "rounds:"), _BYTES),
    ),
    "migrate_setup": (
        "what is waited for before others can take",
        (("call", "shape"), ("of", "op"), ("ms", "ms:,.4g"), ("p90", "p90_ms:,.4g"),
         ("calls", "rounds:"), _BYTES),
    ),
    "migrate_weights": ("weights: their copies alone, and with names and digests", _CROSSED),
    "migrate_beside": (
        "alongside a loop of compute: its slow-down, and the link's bandwidth meanwhile",
        (("loop", "loop"), ("on", "on"), ("case", "shape"), ("method", "backend"), ("of", "op"),
         ("slow-down %", "slowdown_pct:.4g"),
         ("repeats", lambda row: " ".join(f"{one:.1f}" for one in row["slowdowns_pct"])),
         ("over raw", "over_raw:.4g"), ("GB/s", "link_gb_per_s:.4g"), ("of raw", "of_raw:.3f"),
         _BYTES),
    ),
    "migrate_staged": (
        "through staging, alongside one buffer of as many bytes by the same library", _CROSSED,
    ),
    "migrate_scattered": ("scattered blocks of 64 KB, compared with transport libraries", _CROSSED),
}  # fmt: skip
