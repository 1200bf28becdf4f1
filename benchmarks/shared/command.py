# SPDX-License-Identifier: Apache-2.0
"""What both suites' commands share: options, the device, steps with their progress, the file.

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

from portakv.cli.console import print_json
from portakv.errors import PortaKVError
from portakv.registry.registry import ENVIRONMENT
from portakv_benchmarks.check import judge, load_bars, print_verdicts
from portakv_benchmarks.shared.tables import print_results

RESULT_FORMAT = 2

_WIDTH = 24  # characters of the progress bar

Rows = list[dict[str, Any]]
#: A step's name, and what measures it: its rows, and a line for each thing that was left out.
Step = tuple[str, Callable[[], tuple[Rows, list[str]]]]


class Refused(Exception):
    """The command cannot be carried out; its text says why."""


def add_options(parser: argparse.ArgumentParser, presets: Sequence[str], preset: str) -> None:
    """The options of both suites; each adds its own."""
    parser.add_argument("--preset", choices=presets, default=preset, help=f"default: {preset}")
    parser.add_argument("--device", help="a torch device (default: the accelerator, if any)")
    parser.add_argument(
        "--seconds", type=float, help="start nothing new after this time; tell what was left out"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write DIR/<device>.json, and plots of it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    parser.add_argument(
        "--bars", action="store_true",
        help="judge the figures by this project's own bars, which were set for its own machines",
    )  # fmt: skip


def refuse_forced() -> None:
    """Raise `Refused` if the environment forces a backend, so that nothing can be compared."""
    if os.environ.get(ENVIRONMENT):
        raise Refused(
            f"{ENVIRONMENT}={os.environ[ENVIRONMENT]} forces every copy through one backend, so "
            f"that nothing can be compared. Unset it, and name backends with --backend."
        )


def pick_device(name: str | None) -> torch.device:
    """The device of a name, made the current one; None: the accelerator, else the CPU.

    Raises:
        Refused: torch finds no such device here.
    """
    if name is None:
        present = torch.accelerator.is_available()
        device = (torch.accelerator.current_accelerator() if present else None) or "cpu"
        device = torch.device(device)
    else:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise Refused(f"--device {name} was asked for: {error}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(device)
    if not module.is_available():
        raise Refused(f"--device {name} was asked for, but torch finds no such device here.")
    index = module.current_device() if device.index is None else device.index
    module.set_device(index)
    return torch.device(device.type, index)


def carry_out(
    steps: Sequence[Step], device: torch.device, seconds: float | None
) -> tuple[Rows, list[str]]:
    """Rows and what was left out. What is over time or interrupted is left out, and told.

    Args:
        steps: in their order.
        device: whose memory is given back between them.
        seconds: after these nothing new is begun.
    """
    rows: Rows = []
    left_out: list[str] = []
    began = perf_counter()
    with torch.no_grad(), _progress(len(steps)) as tell:
        for done, (name, step) in enumerate(steps):
            if seconds is not None and perf_counter() - began > seconds:
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
                _release(device)
            except RuntimeError as error:
                told = str(error).partition("\n")[0]
                left_out.append(f"{name} left the device unusable ({told}); the rest was not run")
                break
    return rows, left_out


def write(results: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write a result and its plots; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    try:
        from portakv_benchmarks.shared.plots import draw
    except ImportError as error:
        print(f"no plots: {error}; pip install 'portakv[bench]'", file=sys.stderr)
        return [path]
    return [path, *draw(results, folder, path.stem)]


def conclude(
    verb: str,
    asked: argparse.Namespace,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    file_name: Callable[[dict[str, Any]], str],
) -> int:
    """Measure, write to ``asked.out``, and print, as one JSON value if that was asked; returns the
    exit code.

    Args:
        verb: the command, as its error names it.
        asked: with the options of `add_options`.
        run: measures.
        file_name: what the results' file is called.
    """
    try:
        results = run(asked)
    except (Refused, PortaKVError) as error:
        print(f"portakv {verb}: {error}", file=sys.stderr)
        return 2
    written = write(results, asked.out, file_name(results)) if asked.out else []
    if asked.json:
        print_json(results)
    else:
        print_results(results)
        if asked.bars:
            print_bars(results)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    right = all(row["verified"] for row in results["rows"] if not row.get("peer"))
    return 0 if right else 1


def print_bars(results: dict[str, Any]) -> None:
    """The verdicts on what was measured; of the others how many there are."""
    verdicts = judge(results, load_bars())
    measured = [verdict for verdict in verdicts if verdict.rows]
    if measured:
        print_verdicts(measured)
    if len(measured) < len(verdicts):
        print(f"{len(verdicts) - len(measured)} bars are about rows that were not measured.")


def _release(device: torch.device) -> None:
    """Give memory back, so that the next workload sees what it can have."""
    gc.collect()
    if device.type != "cpu":
        empty = getattr(torch.get_device_module(device), "empty_cache", None)
        if empty is not None:
            empty()


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Tell the steps on standard error: a bar if there is rich and a terminal, else lines."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        terminal = False
    else:
        terminal = sys.stderr.isatty()
    step, began = 0, perf_counter()
    if not terminal:

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

        def advance(text: str) -> None:
            nonlocal step
            step += 1
            progress.update(bar, description=text, completed=step - 1)

        yield advance
