# SPDX-License-Identifier: Apache-2.0
"""`portakv bench`: measure backends on real models' shapes, print a table, write JSON.

Exit codes: 0 all bytes right, 1 some bytes wrong, 2 the command cannot be carried out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from portakv.console import print_json
from portakv.errors import PortaKVError
from portakv.registry import ENVIRONMENT

from .check import judge, load_bars, print_verdicts
from .derive import peer_failures, relate
from .ladder import run_ladder
from .machine import describe, short_name
from .overhead import measure_overhead
from .peers import PEERS, load_peer
from .shapes import Shape, load
from .startup import measure_startup
from .suite import COMPILING, PRESETS, Field, Preset, Task, accepted_backends, run_task, tasks
from .tables import print_results
from .timers import timer_for

RESULT_FORMAT = 2
LADDER = "seed"  # the founding scenario

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
    written = _write(results, asked.out, _file_name(asked, results)) if asked.out else []
    if asked.json:
        print_json(results)
    else:
        print_results(results)
        print_verdicts(judge(results, load_bars()))
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    right = all(row["verified"] for row in results["rows"] if not row.get("peer"))
    return 0 if right else 1


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for; returns what is written as JSON.

    Raises:
        _Refused: `PORTAKV_BACKEND` is set, or the device or a name is unknown.
        PeerMissing: a peer cannot be called here.
    """
    if os.environ.get(ENVIRONMENT):
        raise _Refused(
            f"{ENVIRONMENT}={os.environ[ENVIRONMENT]} forces every copy through one backend, so "
            f"that nothing can be compared. Unset it, and name backends with --backend."
        )
    device = _device(asked.device)
    preset = PRESETS[asked.preset]
    shapes = _pick(asked.shape or preset.shapes)
    backends = _backends(asked.backend, device, preset)
    peers = [load_peer(name) for name in asked.peer or ()]
    field = Field(backends, peers, timer_for(device), device)
    machine = describe(device)
    rows, left_out = _measure(asked, preset, shapes, field)
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


Step = tuple[str, Callable[[], tuple[list[dict[str, Any]], list[str]]]]


def _measure(
    asked: argparse.Namespace, preset: Preset, shapes: Sequence[Shape], field: Field
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and what was left out. What is over time or interrupted is left out, and told."""
    steps = list(_steps(preset, shapes, field))
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    began = perf_counter()
    with torch.no_grad(), _progress(len(steps)) as tell:
        for done, (name, step) in enumerate(steps):
            if asked.seconds is not None and perf_counter() - began > asked.seconds:
                left_out += [f"{late}: no time was left" for late, _ in steps[done:]]
                break
            tell(name)
            try:
                found, refused = step()
            except KeyboardInterrupt:
                left_out.append(f"interrupted: the last {len(steps) - done} steps")
                break
            except Exception as error:  # what was measured before must not be lost
                found, refused = [], [f"{name}: {type(error).__name__}: {error}"]
            rows += found
            left_out += refused
            try:
                _release(field.device)
            except RuntimeError as error:
                told = str(error).partition("\n")[0]
                left_out.append(f"{name} left the device unusable ({told}); the rest was not run")
                break
    return rows, left_out


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


def _release(device: torch.device) -> None:
    """Give memory back, so that the next workload sees what it can have."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


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


def _backends(names: Sequence[str] | None, device: torch.device, preset: Preset) -> list[str]:
    accepted = accepted_backends(device)
    for name in names or ():
        if name not in accepted:
            raise _Refused(
                f"Backend {name!r} was asked for; on {device} the registry accepts "
                f"{', '.join(accepted)} (`portakv backends` says why not the others)."
            )
    return list(names or (n for n in accepted if preset.compiling or n not in COMPILING))


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
        step, began = 0, perf_counter()

        def line(text: str) -> None:
            nonlocal step
            step += 1
            elapsed = f"{perf_counter() - began:.0f} s"
            print(f"[{step}/{total}] {elapsed}: {text}", file=sys.stderr, flush=True)

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


def _write(results: dict[str, Any], folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    try:
        from .plots import draw
    except ImportError as error:
        print(f"no plots: {error}; pip install 'portakv[bench]'", file=sys.stderr)
        return [path]
    return [path, *draw(results, folder, path.stem)]


if __name__ == "__main__":
    sys.exit(main())
