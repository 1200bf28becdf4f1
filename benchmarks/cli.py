# SPDX-License-Identifier: Apache-2.0
"""`portakv bench`: measure backends on real models' shapes, print a table, write JSON.

Exit codes: 0 all bytes right, 1 some bytes wrong, 2 the command cannot be carried out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from portakv.console import Column, print_json, print_table
from portakv.errors import PortaKVError
from portakv.registry import ENVIRONMENT

from .machine import describe, short_name
from .overhead import measure_overhead
from .shapes import Shape, load
from .suite import PRESETS, accepted_backends, run_task, tasks
from .timers import timer_for

RESULT_FORMAT = 1

_WIDTH = 24  # columns of the progress bar


class _Refused(Exception):
    """The command cannot be carried out; its text says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks.

    Args:
        argv: the words behind `portakv bench`; by default the process's own.
    """
    asked = _parser().parse_args(argv)
    try:
        results = run(asked)
    except (_Refused, PortaKVError) as error:
        print(f"portakv bench: {error}", file=sys.stderr)
        return 2
    written = _write(results, asked.out, _file_name(asked, results)) if asked.out else None
    if asked.json:
        print_json(results)
    else:
        _print(results)
    if written:
        print(f"wrote {written}", file=sys.stderr)
    return 0 if all(row["verified"] for row in results["rows"]) else 1


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for; returns what is written as JSON.

    Raises:
        _Refused: `PORTAKV_BACKEND` is set, or the device or a name is unknown.
    """
    if os.environ.get(ENVIRONMENT):
        raise _Refused(
            f"{ENVIRONMENT}={os.environ[ENVIRONMENT]} forces every copy through one backend, so "
            f"that nothing can be compared. Unset it, and name backends with --backend."
        )
    device = _device(asked.device)
    preset = PRESETS[asked.preset]
    shapes = _pick(asked.shape or preset.shapes)
    backends = _backends(asked.backend, device)
    timer = timer_for(device)
    rows: list[dict[str, Any]] = []
    left_out = []
    jobs = list(tasks(preset, shapes, device))
    with torch.no_grad(), _progress(len(jobs) + len(backends)) as tell:
        for backend in backends:
            tell(f"overhead of {backend}")
            rows += measure_overhead(backend, device, preset.overhead_rounds)
        for done, task in enumerate(jobs):
            tell(f"{task.shape.name}, layers {task.arrangement}")
            if task.left_out:
                left_out.append(f"{task.shape.name}, {task.arrangement}: {task.left_out}")
                continue
            try:
                rows += run_task(task, preset, backends, timer, device)
            except KeyboardInterrupt:
                left_out.append(f"interrupted: the last {len(jobs) - done} workloads")
                break
    return {
        "format": RESULT_FORMAT,
        "machine": describe(device),
        "asked": {"preset": asked.preset, "backends": backends, "timer": timer.name},
        "left_out": left_out,
        "rows": rows,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="portakv bench",
        description="Measures backends on real models' shapes, in turns with copy_ of the same "
        "bytes, and checks every byte in the same run.",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="core", help="default: core")
    parser.add_argument("--device", help="a torch device (default: the accelerator, else cpu)")
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help="may be repeated (default: all accepted)"
    )
    parser.add_argument(
        "--shape", action="append", metavar="NAME", help="may be repeated (default: the preset's)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/<device>.json")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    return parser


def _device(name: str | None) -> torch.device:
    if name is None:
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        device = torch.device("cpu") if found is None else found
    else:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise _Refused(f"--device {name} was asked for: {error}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(device)
    if not module.is_available():
        raise _Refused(f"--device {name} was asked for, but torch finds no such device here.")
    index = module.current_device() if device.index is None else device.index
    module.set_device(index)
    return torch.device(device.type, index)


def _pick(names: Sequence[str] | None) -> list[Shape]:
    known = load()
    for name in names or ():
        if name not in known:
            raise _Refused(f"Shape {name!r} was asked for; known are {', '.join(known)}.")
    return [known[name] for name in names or known]


def _backends(names: Sequence[str] | None, device: torch.device) -> list[str]:
    accepted = accepted_backends(device)
    for name in names or ():
        if name not in accepted:
            raise _Refused(
                f"Backend {name!r} was asked for; on {device} the registry accepts "
                f"{', '.join(accepted)} (`portakv backends` says why not the others)."
            )
    return list(names or accepted)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Tell the steps on standard error: a bar where there is rich and a terminal, else lines."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        terminal = False
    else:
        terminal = sys.stderr.isatty()
    if not terminal:
        step = 0

        def line(text: str) -> None:
            nonlocal step
            step += 1
            print(f"[{step}/{total}] {text}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (BarColumn(_WIDTH), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=total)
        started = False

        def advance(text: str) -> None:
            nonlocal started
            progress.update(bar, description=text, advance=int(started))
            started = True

        yield advance


def _file_name(asked: argparse.Namespace, results: dict[str, Any]) -> str:
    """Stable from run to run; with backends by name, these are part of it."""
    device = _device(asked.device)
    return "-".join([short_name(device), *(asked.backend or [])]) + ".json"


def _write(results: dict[str, Any], folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def _print(results: dict[str, Any]) -> None:
    machine = results["machine"]
    print(f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}")
    copies = [row for row in results["rows"] if row["kind"] == "copy"]
    numbers = ["MB", "us", "GB/s r+w", "of copy_", "p90/p50", "host us"]
    columns = [Column(name, whole=True) for name in ("shape", "layers", "backend", "op", "index")]
    columns += [Column(name, right=True) for name in numbers] + [Column("bytes", whole=True)]
    print_table(columns, [_cells(row) for row in copies], title="copies, in turns with copy_")
    added = [row for row in results["rows"] if row["kind"] == "overhead"]
    times = ("launch_us", "call_us", "added_us")
    columns = [Column("backend", whole=True), Column("ids", whole=True)]
    columns += [Column(name.replace("_", " "), right=True) for name in times]
    table = [[row["backend"], row["ids"], *(f"{row[n]:.2f}" for n in times)] for row in added]
    print_table(columns, table, title="host time of a registered call, one token of one layer")
    for line in results["left_out"]:
        print(f"left out: {line}")
    print("flags: noisy = p90 above 1.2 x median; host = the host's part shows in the time")


def _cells(row: dict[str, Any]) -> list[str]:
    spread = f"{row['p90_us'] / row['p50_us']:.2f}" + (" noisy" if row["noisy"] else "")
    time = f"{row['p50_us']:.4g}" + ("" if row["host_hidden"] else " host")
    return [
        row["shape"], row["layers"], row["backend"], row["op"], row["index"],
        f"{row['payload_bytes'] / 1e6:.4g}", time, f"{row['gb_per_s']:.4g}", f"{row['ratio']:.3f}",
        spread, f"{row['host_us']:.1f}", "right" if row["verified"] else "WRONG",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
