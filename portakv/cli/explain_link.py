# SPDX-License-Identifier: Apache-2.0
"""`portakv explain --host`: which engine copies between a device and the host, and why."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from portakv.cli.console import Column, print_json, print_prose, print_table
from portakv.cli.delegated import accelerator_asked
from portakv.cli.sides import in_bytes, in_time, read_bytes, read_rate
from portakv.engines.choose import ORDER, Alternative, Host, Pick, pick
from portakv.engines.costs import DIRECTIONS, Table, TableError, costs_of, read, unmeasured
from portakv.engines.engine import OVERLAPS, Terms
from portakv.engines.pieces import Shape
from portakv.errors import PortaKVError

#: Options that only `--host` reads, by where argparse leaves them.
_ONLY = (
    "run_bytes", "payload", "direction", "host_runs", "pageable", "overlap", "max_gbps",
    "max_thread_blocks", "table",
)  # fmt: skip
_RUN_BYTES = 32 << 10


@dataclass(frozen=True)
class Explained:
    """A copy between a device and the host, and the engine that it takes."""

    direction: str
    nbytes: int
    runs: int
    host_runs: int
    pageable: bool
    terms: Terms
    costs: Table
    note: str
    pick: Pick

    @property
    def policy(self) -> str:
        """The terms, as a sentence."""
        terms = self.terms
        text = {
            "compute": "overlap='compute': the device is taken to run a model meanwhile",
            "idle": "overlap='idle': the device is taken to do nothing else",
        }[terms.overlap]
        if terms.max_gbps is not None:
            text += f"; max_gbps={terms.max_gbps:g}"
        if terms.max_thread_blocks is not None:
            text += f"; max_thread_blocks={terms.max_thread_blocks}"
        return text


def add_options(parser: Any, positive: Any) -> None:
    """Add `--host` and what belongs to it; ``positive`` reads a number above 0."""
    group = parser.add_argument_group(
        "copies between a device and the host",
        "The engine for --blocks runs of --run-bytes, which lie apart on both sides.",
    )
    group.add_argument(
        "--host", action="store_true", help="explain the choice of an engine, instead of a plan"
    )
    group.add_argument(
        "--run-bytes", type=read_bytes, metavar="N",
        help=f"bytes of a run on the device, such as 32768 or 32K (default: {_RUN_BYTES >> 10}K)",
    )  # fmt: skip
    group.add_argument(
        "--payload", type=read_bytes, metavar="N", help="all bytes, instead of --blocks"
    )
    group.add_argument("--direction", choices=DIRECTIONS, help="default: d2h")
    group.add_argument(
        "--host-runs", type=positive, metavar="N",
        help="runs in host memory, 1 where it is dense (default: as many as on the device)",
    )  # fmt: skip
    group.add_argument(
        "--pageable", action="store_true", default=None, help="host memory that is not pinned"
    )
    group.add_argument("--overlap", choices=OVERLAPS, help="what else the device does (compute)")
    group.add_argument(
        "--max-gbps", type=read_rate, metavar="R", help="the most 10^9 bytes in a second"
    )
    group.add_argument(
        "--max-thread-blocks", type=positive, metavar="N",
        help="the most thread blocks of a kernel that reads or writes host memory",
    )  # fmt: skip
    group.add_argument(
        "--table", metavar="FILE", help="a table of `portakv calibrate`, perhaps of another device"
    )


def misplaced(asked: argparse.Namespace) -> str:
    """What was asked that does not go together, as a sentence; empty where it does."""
    if not asked.host:
        for name in _ONLY:
            if getattr(asked, name) is not None:
                return f"--{name.replace('_', '-')} goes with --host"
        if asked.src is None or asked.dst is None:
            return "the following arguments are required: SRC_LAYOUT, DST_LAYOUT (or --host)"
        return ""
    if asked.src is not None:
        return "--host takes no layouts, but --blocks, --run-bytes and --direction"
    if asked.payload is not None and asked.blocks is not None:
        return "--payload goes without --blocks"
    return ""


def run(asked: argparse.Namespace) -> int:
    """Print the engine, what each would take, the terms, and where the figures come from.

    Raises:
        PortaKVError: a file that is no table; a device that torch cannot use.
        Unsupported: no engine takes the copy.
    """
    explained = explain(asked)
    if asked.json:
        print_json(_as_json(explained))
    else:
        _print(explained)
    return 0


def explain(asked: argparse.Namespace) -> Explained:
    """Pick an engine, as a transfer would."""
    run_bytes = asked.run_bytes or _RUN_BYTES
    runs = asked.blocks or (-(-asked.payload // run_bytes) if asked.payload else 1)
    nbytes = asked.payload or runs * run_bytes
    host_runs = min(asked.host_runs or runs, nbytes)
    terms = Terms(asked.overlap or "compute", asked.max_thread_blocks, asked.max_gbps)
    direction, pageable = asked.direction or "d2h", bool(asked.pageable)
    costs, out, note = _known(asked)
    for name in ORDER:
        if (name == "ring") != pageable:
            out.setdefault(name, f"it does not copy {'pageable' if pageable else 'pinned'} memory")
    apart, dense = Shape(nbytes, runs, runs), Shape(nbytes, host_runs, host_runs)
    shapes = {"staged": dense, "descriptors": apart, "direct": apart, "ring": dense}
    picked = pick(shapes, direction, out, terms, costs)
    return Explained(
        direction, nbytes, runs, host_runs, pageable, terms, costs, note, picked
    )  # fmt: skip


def _known(asked: argparse.Namespace) -> tuple[Table, dict[str, str], str]:
    """Costs, the engines that do not serve the device, and what a reader has to know of both."""
    device = accelerator_asked(asked.device)
    costs: Table | None = None
    if asked.table is not None:
        try:
            costs = read(Path(asked.table))
        except TableError as error:
            raise PortaKVError(
                f"{asked.table} was to be read as a table, but {error}. Pass a file that `portakv "
                f"calibrate` wrote."
            ) from error
    if device is None:
        note = "There is no accelerator here; all engines are taken to serve one."
        return costs or unmeasured("there is no accelerator to measure"), {}, note
    host = Host(device)
    return costs or costs_of(device), dict(host.out), f"On {device}."


def _print(explained: Explained) -> None:
    pick, nbytes = explained.pick, explained.nbytes
    host = f"{'pageable' if explained.pageable else 'pinned'} host memory"
    ends = "the device", host
    first, last = ends if explained.direction == "d2h" else ends[::-1]
    print_prose(
        f"{in_bytes(nbytes)} from {first} to {last}. Runs: {explained.runs} on the device, "
        f"{explained.host_runs} on the host. {explained.note}"
    )
    print_prose(f"{pick.engine} carries it out: {pick.why}.")
    print()
    columns = [
        Column("engine", whole=True), Column("answer", whole=True),
        Column("takes", whole=True, right=True), Column("GB/s", whole=True, right=True),
        Column("host", whole=True, right=True), Column("looked up as", whole=True),
        Column("why not"),
    ]  # fmt: skip
    print_table(columns, [_row(one, pick, nbytes) for one in pick.alternatives])
    print()
    print_prose(f"Terms: {explained.policy}.")
    print_prose(f"Times: {explained.costs.origin}.")


def _row(one: Alternative, pick: Pick, nbytes: int) -> list[str]:
    gbps = one.gbps(nbytes)
    return [
        one.engine,
        _answer(one, pick),
        in_time(one.seconds) if one.seconds else "not known",
        f"{gbps:.1f}" if gbps else "",
        in_time(one.host_seconds) if one.host_seconds else "",
        f"{one.runs} x {in_bytes(one.run_bytes)}",
        one.refused,
    ]


def _answer(one: Alternative, pick: Pick) -> str:
    if one.engine == pick.engine:
        return "chosen"
    return "rejected" if one.refused else "accepted"


def _as_json(explained: Explained) -> dict[str, Any]:
    pick, nbytes = explained.pick, explained.nbytes
    return {
        "direction": explained.direction,
        "bytes": nbytes,
        "runs": explained.runs,
        "host_runs": explained.host_runs,
        "host_memory": "pageable" if explained.pageable else "pinned",
        "engine": pick.engine,
        "why": pick.why,
        "terms": {**asdict(explained.terms), "text": explained.policy},
        "measured": explained.costs.measured,
        "origin": explained.costs.origin,
        "note": explained.note,
        "engines": [
            {**one._asdict(), "answer": _answer(one, pick), "gbps": one.gbps(nbytes)}
            for one in pick.alternatives
        ],
    }
