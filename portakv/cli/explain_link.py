# SPDX-License-Identifier: Apache-2.0
"""`portakv explain --host`: print the transfer strategy between a device and the host, and why.

`portakv.cli.migrate` prints `portakv explain --peer`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from portakv.cli import migrate, sides
from portakv.cli.console import Column, Report, print_json, print_prose, print_table
from portakv.cli.explain_encoding import explain_encoding
from portakv.copy.between import executor_of
from portakv.interconnect.choose import Host
from portakv.interconnect.costs import DIRECTIONS, Table, TableError, costs_of, read, unmeasured
from portakv.interconnect.pick import ORDER, Alternative, pick
from portakv.interconnect.pieces import Shape
from portakv.interconnect.strategy import OVERLAPS, Terms
from portakv.registry.registry import Choice
from portakv.view.view import KVView

#: Options that only `--host` reads, by their names in argparse's namespace.
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--peer`, and `--host` with its options."""
    peer = "explain instead how rows of other processes would be pulled here"
    parser.add_argument("--peer", action="store_true", help=peer)
    group = parser.add_argument_group(
        "copies between a device and the host",
        "The transfer strategy for --blocks runs of --run-bytes. The runs are not contiguous on "
        "either side.",
    )
    add = group.add_argument
    memory = "host memory that is not pinned"
    add("--host", action="store_true", help="explain the choice of a strategy, instead of a plan")
    run = f"bytes of a run on the device, such as 32768 or 32K (default: {_RUN_BYTES >> 10}K)"
    add("--run-bytes", type=sides.read_bytes, metavar="N", help=run)
    add("--payload", type=sides.read_bytes, metavar="N", help="all bytes, instead of --blocks")
    add("--direction", choices=DIRECTIONS, help="default: d2h")
    runs = "runs in host memory, 1 if it is dense (default: as many as on the device)"
    add("--host-runs", type=sides.positive, metavar="N", help=runs)
    add("--pageable", action="store_true", default=None, help=memory)
    add("--overlap", choices=OVERLAPS, help="other work of the device (default: compute)")
    rate = partial(sides.read_above_zero, what="10^9 bytes in a second, above 0")
    add("--max-gbps", type=rate, metavar="R", help="the most 10^9 bytes in a second")
    blocks = "the most thread blocks of a kernel that reads or writes host memory"
    add("--max-thread-blocks", type=sides.positive, metavar="N", help=blocks)
    table = "a table that `portakv calibrate` wrote, also for another device"
    add("--table", type=_table, metavar="FILE", help=table)


def _table(file: str) -> Table:
    try:
        return read(Path(file))
    except TableError as error:
        message = f"expected a table in {file}, but {error}; pass a file of `portakv calibrate`"
        raise argparse.ArgumentTypeError(message) from error


def misplaced(args: argparse.Namespace) -> str:
    """Return a sentence that names options that exclude each other; empty if all agree."""
    return _excluded(args) or _host_only(args)


def _excluded(args: argparse.Namespace) -> str:
    if args.encoding is not None and (args.host or args.peer or args.src_device is not None):
        return "--encoding goes with two layouts and one device"
    if args.peer and (args.host or args.src is not None):
        return "--peer goes with --device and --json alone"
    if args.host and args.src is not None:
        return "--host takes no layouts, but --blocks, --run-bytes and --direction"
    if args.host and args.payload is not None and args.blocks is not None:
        return "--payload goes without --blocks"
    if (args.host or args.peer) and args.src_device is not None:
        return "--src-device goes with two layouts"
    return ""


def _host_only(args: argparse.Namespace) -> str:
    if args.host:
        return ""

    # Copies between two devices have terms, too.
    shared = () if args.src_device is None else ("overlap", "max_thread_blocks")
    for name in _ONLY:
        if name not in shared and getattr(args, name) is not None:
            return f"--{name.replace('_', '-')} goes with --host"
    if not args.peer and (args.src is None or args.dst is None):
        return "the following arguments are required: SRC_LAYOUT, DST_LAYOUT (or --host)"
    return ""


def between(args: argparse.Namespace, src: KVView, dst: KVView, choice: Choice) -> Choice:
    """Return the choice for rows of another device; tests whether they can be read there."""
    return executor_of(src, dst, choice, Terms(args.overlap or "compute", args.max_thread_blocks))


def run(args: argparse.Namespace) -> int:
    """Print the strategy, the time of each strategy, the terms, and the origin of the times.

    Raises:
        DeviceMismatch: torch cannot use the device.
        Unsupported: no strategy accepts the copy.
    """
    if args.encoding is not None:
        return explain_encoding(args)
    if args.peer:
        return migrate.explain_peer(args.device, args.json)

    run_bytes = args.run_bytes or _RUN_BYTES
    runs = args.blocks or (-(-args.payload // run_bytes) if args.payload else 1)
    nbytes = args.payload or runs * run_bytes
    host_runs = min(args.host_runs or runs, nbytes)
    terms = Terms(args.overlap or "compute", args.max_thread_blocks, args.max_gbps)
    direction = args.direction or "d2h"
    memory = "pageable" if args.pageable else "pinned"
    known = _known(args)
    costs = known.costs
    out = dict(known.left_out)
    for name in ORDER:
        if (name == "pageable") != (memory == "pageable"):
            out.setdefault(name, f"it does not copy {memory} memory")

    apart = Shape(nbytes, runs, runs)
    dense = Shape(nbytes, host_runs, host_runs)
    shapes = {"staged": dense, "batched_memcpy": apart, "zero_copy": apart, "pageable": dense}
    picked = pick(shapes, direction, out, terms, costs)  # the same as a transfer does

    report: Report = {
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
        "note": known.note,
        "engines": [
            _alternative_json(alternative, picked.strategy, nbytes)
            for alternative in picked.alternatives
        ],
    }
    if args.json:
        print_json(report)
    else:
        _print(report)
    return 0


def _alternative_json(alternative: Alternative, chosen: str, nbytes: int) -> Report:
    answer = "rejected" if alternative.refused else "accepted"
    if alternative.strategy == chosen:
        answer = "chosen"
    seconds = alternative.seconds
    return {
        "engine": alternative.strategy,
        "run_bytes": alternative.run_bytes,
        "runs": alternative.runs,
        "seconds": seconds,
        "host_seconds": alternative.host_seconds,
        "refused": alternative.refused,
        "measured": seconds is not None,
        "answer": answer,
        "gbps": nbytes / seconds / 1e9 if seconds else None,
    }


def _in_words(terms: Terms) -> str:
    work = {"compute": "runs a model meanwhile", "idle": "does nothing else"}[terms.overlap]
    text = f"overlap={terms.overlap!r}: assume that the device {work}"
    for name in ("max_gbps", "max_thread_blocks"):
        limit = getattr(terms, name)
        if limit is not None:
            text += f"; {name}={limit:g}"
    return text


class _Known(NamedTuple):
    """The facts about a device that a choice needs."""

    costs: Table
    left_out: Mapping[str, str]  # the strategies that do not serve the device, and why
    note: str


def _known(args: argparse.Namespace) -> _Known:
    device = sides.requested_accelerator(args.device)
    costs: Table | None = args.table
    if device is None:
        note = "There is no accelerator here; the answers assume that every strategy serves one."
        return _Known(costs or unmeasured("there is no accelerator to measure"), {}, note)
    return _Known(costs or costs_of(device), Host(device).out, f"On {device}.")


def _print(report: Report) -> None:
    ends = ["the device", f"{report['host_memory']} host memory"]
    first, last = ends if report["direction"] == "d2h" else ends[::-1]
    runs = f"Runs: {report['runs']} on the device, {report['host_runs']} on the host."
    size = sides.in_bytes(report["bytes"])
    print_prose(f"{size} from {first} to {last}. {runs} {report['note']}")
    print_prose(f"{report['engine']} executes it: {report['why']}.")
    print()
    numbers = ("takes", "GB/s", "host")
    names = ("strategy", "answer", *numbers, "cost of", "why not")
    columns = [Column(name, whole=name != "why not", right=name in numbers) for name in names]
    rows = []
    for one in report["engines"]:
        times = [sides.in_time(one[x]) if one[x] else "" for x in ("seconds", "host_seconds")]
        rate = f"{one['gbps']:.1f}" if one["gbps"] else ""
        size = f"{one['runs']} x {sides.in_bytes(one['run_bytes'])}"
        answers = [one["engine"], one["answer"], times[0] or "unknown", rate, times[1]]
        rows.append([*answers, size, one["refused"]])
    print_table(columns, rows)
    print()
    print_prose(f"Terms: {report['terms']['text']}.")
    print_prose(f"Times: {report['origin']}.")
