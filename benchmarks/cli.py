# SPDX-License-Identifier: Apache-2.0
"""`portakv bench`: measure backends on real models' shapes, print a table, write JSON.

Exit codes: 0 all bytes right, 1 some bytes wrong, 2 the command cannot be carried out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from portakv_benchmarks.device.overhead import measure_overhead
from portakv_benchmarks.device.peers import PEERS, load_peer
from portakv_benchmarks.device.shapes import Shape, load
from portakv_benchmarks.device.startup import measure_startup
from portakv_benchmarks.device.suite import (
    COMPILING,
    PRESETS,
    Field,
    Preset,
    Task,
    accepted_backends,
    run_task,
    tasks,
)
from portakv_benchmarks.device.tables import print_results
from portakv_benchmarks.device.ways import run_ladder
from portakv_benchmarks.host.cli import main as measure_host
from portakv_benchmarks.shared.command import (
    RESULT_FORMAT,
    Refused,
    Step,
    carry_out,
    conclude,
    pick_device,
    refuse_forced,
)
from portakv_benchmarks.shared.machine import describe, short_name
from portakv_benchmarks.shared.ratios import peer_failures, relate
from portakv_benchmarks.shared.timers import timer_for

LADDER = "seed"  # the founding scenario


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks.

    Args:
        argv: the words behind `portakv bench`; by default the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--host" in words:
        words.remove("--host")
        return measure_host(words)
    asked = _parser().parse_args(words)
    return conclude("bench", asked, run, partial(_file_name, asked), print_results)


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for; returns what is written as JSON.

    Raises:
        Refused: `PORTAKV_BACKEND` is set, or the device or a name is unknown.
        PeerMissing: a peer cannot be called here.
    """
    refuse_forced()
    device = pick_device(asked.device)
    preset = PRESETS[asked.preset]
    shapes = _pick(asked.shape or preset.shapes)
    backends = _backends(asked.backend, device, preset)
    peers = [load_peer(name) for name in asked.peer or ()]
    field = Field(backends, peers, timer_for(device), device)
    machine = describe(device)
    rows, left_out = carry_out(list(_steps(preset, shapes, field)), device, asked.seconds)
    relate(rows)
    return {
        "format": RESULT_FORMAT,
        "machine": machine,
        "asked": {
            "preset": asked.preset,
            "backends": backends,
            "peers": {peer.name: peer.release for peer in peers},
            "timer": field.timer.name,
        },
        "left_out": left_out + peer_failures(rows),
        "rows": rows,
    }


def _steps(preset: Preset, shapes: Sequence[Shape], field: Field) -> Iterator[Step]:
    """Everything to measure, by name; what compiles for seconds comes last."""
    device = field.device
    fast = [name for name in field.backends if name not in COMPILING]
    slow = [name for name in field.backends if name in COMPILING]

    def overhead(backend: str) -> Step:
        rounds = preset.overhead_rounds
        return f"overhead of {backend}", lambda: (measure_overhead(backend, device, rounds), [])

    def start(backend: str, rounds: int) -> Step:
        name = f"fresh process with {backend}"
        return name, lambda: (measure_startup(backend, str(device), rounds), [])

    def workload(task: Task) -> Step:
        name = f"{task.shape.name}, layers {task.arrangement}"
        if task.left_out:
            return name, lambda: ([], [f"{name}: {task.left_out}"])
        return name, lambda: run_task(task, preset, field)

    yield from (overhead(backend) for backend in fast)
    if preset.starts:  # the first is what the registry would choose
        yield from (start(name, preset.starts if name == fast[0] else 1) for name in fast)
    yield from (workload(task) for task in tasks(preset, shapes, device))
    if preset.ladder and any(shape.name == LADDER for shape in shapes):
        shape = next(shape for shape in shapes if shape.name == LADDER)
        yield f"ladder of {LADDER}", lambda: run_ladder(shape, field, preset.rounds)
    yield from (overhead(backend) for backend in slow)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="portakv bench",
        description="Measures backends on real models' shapes, in turns with copy_ of the same "
        "bytes, and checks every byte in the same run.",
    )
    parser.add_argument(
        "--host",
        action="store_true",
        help="measure copies between the device and the host instead; see `bench --host --help`",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="core", help="default: core")
    parser.add_argument("--device", help="a torch device (default: the accelerator, else cpu)")
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help="may be repeated (default: all accepted)"
    )
    parser.add_argument(
        "--shape", action="append", metavar="NAME", help="may be repeated (default: the preset's)"
    )
    parser.add_argument(
        "--peer",
        action="append",
        metavar="NAME",
        help=f"a released peer to measure beside, may be repeated: {', '.join(PEERS)}",
    )
    parser.add_argument(
        "--seconds", type=float, help="start nothing new after this time; tell what was left out"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write DIR/<device>.json, and plots of it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    return parser


def _pick(names: Sequence[str] | None) -> list[Shape]:
    known = load()
    for name in names or ():
        if name not in known:
            raise Refused(f"Shape {name!r} was asked for; known are {', '.join(known)}.")
    return [known[name] for name in names or known]


def _backends(names: Sequence[str] | None, device: torch.device, preset: Preset) -> list[str]:
    accepted = accepted_backends(device)
    for name in names or ():
        if name not in accepted:
            raise Refused(
                f"Backend {name!r} was asked for; on {device} the registry accepts "
                f"{', '.join(accepted)} (`portakv backends` says why not the others)."
            )
    return list(names or (n for n in accepted if preset.compiling or n not in COMPILING))


def _file_name(asked: argparse.Namespace, results: dict[str, Any]) -> str:
    """Stable from run to run; with backends by name, these are part of it."""
    device = pick_device(asked.device)
    return "-".join([short_name(device), *(asked.backend or [])]) + ".json"


if __name__ == "__main__":
    sys.exit(main())
