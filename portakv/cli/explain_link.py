# SPDX-License-Identifier: Apache-2.0
"""`portakv explain --host`: which engine copies between a device and the host, and why; `--peer`,
how rows of other processes come here, is told by `portakv.cli.migrate`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from portakv.cli import migrate, sides
from portakv.cli.console import Column, print_json, print_prose, print_table
from portakv.copy.between import carrier
from portakv.interconnect.choose import ORDER, Host, pick
from portakv.interconnect.costs import DIRECTIONS, Table, TableError, costs_of, read, unmeasured
from portakv.interconnect.pieces import Shape
from portakv.interconnect.strategy import OVERLAPS, Terms
from portakv.registry.registry import Choice
from portakv.view.view import KVView

#: Options that only `--host` reads, by where argparse leaves them.
_ONLY = (
    "run_bytes",
    "payload",
    "direction",
    "host_runs",
    "pageable",
    "overlap",
    "max_gbps",
    "max_thread_blocks",
    "table",
)
_RUN_BYTES = 32 << 10


def add_options(parser: Any) -> None:
    """Add `--peer`, and `--host` and what belongs to it."""
    peer = "explain instead how rows of other processes would be pulled here"
    parser.add_argument("--peer", action="store_true", help=peer)
    group = parser.add_argument_group(
        "copies between a device and the host",
        "The engine for --blocks runs of --run-bytes, which lie apart on both sides.",
    )
    add = group.add_argument
    memory = "host memory that is not pinned"
    add("--host", action="store_true", help="explain the choice of an engine, instead of a plan")
    run = f"bytes of a run on the device, such as 32768 or 32K (default: {_RUN_BYTES >> 10}K)"
    add("--run-bytes", type=sides.read_bytes, metavar="N", help=run)
    add("--payload", type=sides.read_bytes, metavar="N", help="all bytes, instead of --blocks")
    add("--direction", choices=DIRECTIONS, help="default: d2h")
    runs = "runs in host memory, 1 if it is dense (default: as many as on the device)"
    add("--host-runs", type=sides.positive, metavar="N", help=runs)
    add("--pageable", action="store_true", default=None, help=memory)
    add("--overlap", choices=OVERLAPS, help="what else the device does (compute)")
    rate = partial(sides.read_above_zero, what="10^9 bytes in a second, above 0")
    add("--max-gbps", type=rate, metavar="R", help="the most 10^9 bytes in a second")
    blocks = "the most thread blocks of a kernel that reads or writes host memory"
    add("--max-thread-blocks", type=sides.positive, metavar="N", help=blocks)
    table = "a table of `portakv calibrate`, perhaps of another device"
    add("--table", type=_table, metavar="FILE", help=table)


def _table(file: str) -> Table:
    try:
        return read(Path(file))
    except TableError as error:
        why = f"{file} was to be read as a table, but {error}"
        todo = "pass a file that `portakv calibrate` wrote"
        raise argparse.ArgumentTypeError(f"{why}; {todo}") from error


def misplaced(asked: argparse.Namespace) -> str:
    """What was asked that does not go together, as a sentence; empty if it does."""
    if asked.peer and (asked.host or asked.src is not None):
        return "--peer goes with --device and --json alone"
    if asked.host and asked.src is not None:
        return "--host takes no layouts, but --blocks, --run-bytes and --direction"
    if asked.host and asked.payload is not None and asked.blocks is not None:
        return "--payload goes without --blocks"
    if (asked.host or asked.peer) and asked.src_device is not None:
        return "--src-device goes with two layouts"
    both = () if asked.src_device is None else ("overlap", "max_thread_blocks")
    for name in () if asked.host else [x for x in _ONLY if x not in both]:
        if getattr(asked, name) is not None:
            return f"--{name.replace('_', '-')} goes with --host"
    if not (asked.host or asked.peer) and (asked.src is None or asked.dst is None):
        return "the following arguments are required: SRC_LAYOUT, DST_LAYOUT (or --host)"
    return ""


def between(asked: argparse.Namespace, src: KVView, dst: KVView, choice: Choice) -> Choice:
    """What carries a peer's rows; whether they can be read where they are is tried for it."""
    return carrier(src, dst, choice, Terms(asked.overlap or "compute", asked.max_thread_blocks))


def run(asked: argparse.Namespace) -> int:
    """Print the engine, what each would take, the terms, and where the figures come from. Raises
    `DeviceMismatch` for a device that torch cannot use, `Unsupported` if none takes it."""
    if asked.peer:
        return migrate.explain_peer(asked.device, asked.json)
    run_bytes = asked.run_bytes or _RUN_BYTES
    runs = asked.blocks or (-(-asked.payload // run_bytes) if asked.payload else 1)
    nbytes = asked.payload or runs * run_bytes
    host_runs = min(asked.host_runs or runs, nbytes)
    terms = Terms(asked.overlap or "compute", asked.max_thread_blocks, asked.max_gbps)
    direction = asked.direction or "d2h"
    memory = "pageable" if asked.pageable else "pinned"
    costs, out, note = _known(asked)
    for name in ORDER:
        if (name == "pageable") != (memory == "pageable"):
            out.setdefault(name, f"it does not copy {memory} memory")
    apart = Shape(nbytes, runs, runs)
    dense = Shape(nbytes, host_runs, host_runs)
    shapes = {"staged": dense, "batched_memcpy": apart, "zero_copy": apart, "pageable": dense}
    picked = pick(shapes, direction, out, terms, costs)  # as a transfer would
    found = {
        "direction": direction,
        "bytes": nbytes,
        "runs": runs,
        "host_runs": host_runs,
        "host_memory": memory,
        "engine": picked.strategy,
        "why": picked.why,
        "terms": {**asdict(terms), "text": _in_words(terms)},
        "measured": costs.measured,
        "origin": costs.origin,
        "note": note,
        "engines": [
            {
                "engine": one.strategy,
                "run_bytes": one.run_bytes,
                "runs": one.runs,
                "seconds": one.seconds,
                "host_seconds": one.host_seconds,
                "refused": one.refused,
                "measured": one.seconds is not None,
                "answer": "chosen"
                if one.strategy == picked.strategy
                else "rejected"
                if one.refused
                else "accepted",
                "gbps": nbytes / one.seconds / 1e9 if one.seconds else None,
            }
            for one in picked.alternatives
        ],
    }
    if asked.json:
        print_json(found)
    else:
        _print(found)
    return 0


def _in_words(terms: Terms) -> str:
    does = {"compute": "run a model meanwhile", "idle": "do nothing else"}[terms.overlap]
    text = f"overlap={terms.overlap!r}: the device is taken to {does}"
    for name in ("max_gbps", "max_thread_blocks"):
        if (limit := getattr(terms, name)) is not None:
            text += f"; {name}={limit:g}"
    return text


def _known(asked: argparse.Namespace) -> tuple[Table, dict[str, str], str]:
    """Costs, the engines that do not serve the device, and what a reader has to know of both."""
    device = sides.accelerator_asked(asked.device)
    costs = asked.table
    if device is None:
        note = "There is no accelerator here; all engines are taken to serve one."
        return costs or unmeasured("there is no accelerator to measure"), {}, note
    host = Host(device)
    return costs or costs_of(device), dict(host.out), f"On {device}."


def _print(found: Mapping[str, Any]) -> None:
    ends = ["the device", f"{found['host_memory']} host memory"]
    first, last = ends if found["direction"] == "d2h" else ends[::-1]
    runs = f"Runs: {found['runs']} on the device, {found['host_runs']} on the host."
    print_prose(f"{sides.in_bytes(found['bytes'])} from {first} to {last}. {runs} {found['note']}")
    print_prose(f"{found['engine']} carries it out: {found['why']}.")
    print()
    numbers = ("takes", "GB/s", "host")
    names = ("engine", "answer", *numbers, "cost of", "why not")
    columns = [Column(name, whole=name != "why not", right=name in numbers) for name in names]
    rows = []
    for one in found["engines"]:
        times = [sides.in_time(one[x]) if one[x] else "" for x in ("seconds", "host_seconds")]
        rate = f"{one['gbps']:.1f}" if one["gbps"] else ""
        size = f"{one['runs']} x {sides.in_bytes(one['run_bytes'])}"
        answers = [one["engine"], one["answer"], times[0] or "not known", rate, times[1]]
        rows.append([*answers, size, one["refused"]])
    print_table(columns, rows)
    print()
    print_prose(f"Terms: {found['terms']['text']}.")
    print_prose(f"Times: {found['origin']}.")
