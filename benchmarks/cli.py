# SPDX-License-Identifier: Apache-2.0
"""`portakv bench`: measure backends on real models' shapes, and with ``--host`` the copies between
a device and host memory; print tables, write JSON.

Exit codes: 0 all bytes right, 1 some bytes wrong, 2 the command cannot be carried out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from portakv.engines.costs import costs_of
from portakv_benchmarks.check import HOST_SUITE
from portakv_benchmarks.device import suite
from portakv_benchmarks.device.cold_start import measure_startup
from portakv_benchmarks.device.overhead import measure_overhead
from portakv_benchmarks.device.ways import run_ladder
from portakv_benchmarks.host.calls import call_steps
from portakv_benchmarks.host.grid import direct_steps, duplex_steps, grid_steps
from portakv_benchmarks.host.interference import interference_steps, peer_steps
from portakv_benchmarks.host.pageable import pageable_steps
from portakv_benchmarks.host.pinning import pinning_steps
from portakv_benchmarks.host.small import small_steps
from portakv_benchmarks.host.suite import HOST_PRESETS, Bench
from portakv_benchmarks.host.waiting import waiting_steps
from portakv_benchmarks.shared import command
from portakv_benchmarks.shared.command import Refused, Rows, Step
from portakv_benchmarks.shared.machine import describe, short_name
from portakv_benchmarks.shared.peers import PEERS, load_peer
from portakv_benchmarks.shared.shapes import Shape, load
from portakv_benchmarks.shared.timers import DeviceTimer, HostTimer

LADDER = "seed"  # the founding scenario
#: What ``--host`` measures, in this order: the grid first, since most bars are about it, and peers
#: last, since the kernel of another that fails may leave no device for what follows.
PARTS: Mapping[str, Callable[[Bench], Iterator[Step]]] = {
    "grid": grid_steps,
    "direct": direct_steps,
    "duplex": duplex_steps,
    "calls": call_steps,
    "small": small_steps,
    "interference": interference_steps,
    "waiting": waiting_steps,
    "pageable": pageable_steps,
    "pinning": pinning_steps,
    "peers": peer_steps,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit code.

    Args:
        argv: the words behind `portakv bench`; by default the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--host" in words:
        words.remove("--host")
        asked = _host_parser().parse_args(words)
        return command.conclude("bench --host", asked, run_host, lambda r: f"{r['name']}.json")
    asked = _device_parser().parse_args(words)
    return command.conclude("bench", asked, run_device, partial(_file_name, asked))


def run_device(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure copies inside a device; returns what is written as JSON.

    Raises:
        Refused: `PORTAKV_BACKEND` is set, or the device or a name is unknown.
        PeerMissing: a peer cannot be called here.
    """
    command.refuse_forced()
    device = command.pick_device(asked.device)
    preset = suite.PRESETS[asked.preset]
    shapes = _shapes(asked.shape or preset.shapes)
    backends = _backends(asked.backend, device, preset)
    peers = [load_peer(name) for name in asked.peer or ()]
    timer = HostTimer(device) if device.type == "cpu" else DeviceTimer(device)
    field = suite.Field(backends, peers, timer, device)
    machine = describe(device)
    rows, left_out = command.carry_out(
        list(_device_steps(preset, shapes, field)), device, asked.seconds
    )
    suite.relate(rows)
    return {
        "format": command.RESULT_FORMAT,
        "machine": machine,
        "asked": {
            "preset": asked.preset,
            "backends": backends,
            "peers": {peer.name: peer.release for peer in peers},
            "timer": timer.name,
        },
        "left_out": left_out + suite.peer_failures(rows),
        "rows": rows,
    }


def _device_steps(
    preset: suite.Preset, shapes: Sequence[Shape], field: suite.Field
) -> Iterator[Step]:
    """Everything to measure, by name; what compiles for seconds comes last."""
    device = field.device
    fast = [name for name in field.backends if name not in suite.COMPILING]
    slow = [name for name in field.backends if name in suite.COMPILING]

    def overhead(backend: str) -> Step:
        rounds = preset.overhead_rounds
        return f"overhead of {backend}", lambda: (measure_overhead(backend, device, rounds), [])

    def start(backend: str, rounds: int) -> Step:
        name = f"fresh process with {backend}"
        return name, lambda: (measure_startup(backend, str(device), rounds), [])

    def workload(task: suite.Task) -> Step:
        name = f"{task.shape.name}, layers {task.arrangement}"
        if task.left_out:
            return name, lambda: ([], [f"{name}: {task.left_out}"])
        return name, lambda: suite.run_task(task, preset, field)

    yield from (overhead(backend) for backend in fast)
    if preset.starts:  # the first is what the registry would choose
        yield from (start(name, preset.starts if name == fast[0] else 1) for name in fast)
    yield from (workload(task) for task in suite.tasks(preset, shapes, device))
    if preset.ladder and any(shape.name == LADDER for shape in shapes):
        shape = next(shape for shape in shapes if shape.name == LADDER)
        yield f"ladder of {LADDER}", lambda: run_ladder(shape, field, preset.rounds)
    yield from (overhead(backend) for backend in slow)


def run_host(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure copies between a device and the host; returns what is written as JSON.

    Raises:
        Refused: a forced backend, or a device that is no accelerator or only emulated.
        PeerMissing: a peer cannot be called here.
    """
    command.refuse_forced()
    device = command.pick_device(asked.device)
    _check_link(device, asked.preset)
    parts = _parts(asked.only)
    bench = Bench(
        device, HOST_PRESETS[asked.preset], [load_peer(name) for name in asked.peer or ()]
    )
    machine = describe(device)
    steps = [_of_part(part, step) for part in parts for step in _host_steps(part, bench)]
    rows, left_out = command.carry_out(steps, device, asked.seconds)
    left_out = list(dict.fromkeys(left_out))  # some steps leave out the same for the same reason
    bench.forget()
    name = f"{short_name(device)}-host"
    return {
        "format": command.RESULT_FORMAT,
        "suite": HOST_SUITE,
        "name": name if len(parts) == len(PARTS) else "-".join([name, *parts]),
        "machine": machine,
        "asked": {
            "preset": asked.preset,
            "parts": parts,
            "peers": {peer.name: peer.release for peer in bench.peers},
            "timer": bench.timer.name,
            "calibrated": costs_of(device).measured,
        },
        "left_out": [f"{engine}: {why}" for engine, why in bench.absent.items()] + left_out,
        "rows": rows,
    }


def _host_steps(part: str, bench: Bench) -> list[Step]:
    """The steps of a part; of one that cannot tell them a step that says why, so that the others
    are measured."""
    try:
        return list(PARTS[part](bench))
    except Exception as error:
        why = f"{part}: {type(error).__name__}: {error}"
        return [(part, lambda: ([], [why]))]


def _of_part(part: str, step: Step) -> Step:
    """A step that says which part it belongs to, and whose rows do."""
    name, measure = step

    def labelled() -> tuple[Rows, list[str]]:
        rows, left_out = measure()
        return [{**row, "part": part} for row in rows], left_out

    return f"{part}: {name}", labelled


def _check_link(device: torch.device, preset: str) -> None:
    if device.type == "cpu":
        raise Refused(
            "copies between a device and the host were to be measured, but torch finds no "
            "accelerator here. Run it on a machine that has one."
        )
    emulated = getattr(torch.get_device_module(device), "EMULATED", False)
    if emulated and preset != "tiny":
        raise Refused(
            f"{device} is emulated, and figures come from real hardware only; --preset tiny tries "
            f"the benchmark itself."
        )


def _parts(only: str | None) -> list[str]:
    asked = list(PARTS) if only is None else [word.strip() for word in only.split(",")]
    unknown = [word for word in asked if word not in PARTS]
    if unknown:
        raise Refused(f"Part {unknown[0]!r} was asked for; known are {', '.join(PARTS)}.")
    return [part for part in PARTS if part in asked]


def _shapes(names: Sequence[str] | None) -> list[Shape]:
    known = load()
    for name in names or ():
        if name not in known:
            raise Refused(f"Shape {name!r} was asked for; known are {', '.join(known)}.")
    return [known[name] for name in names or known]


def _backends(names: Sequence[str] | None, device: torch.device, preset: suite.Preset) -> list[str]:
    accepted = suite.accepted_backends(device)
    for name in names or ():
        if name not in accepted:
            raise Refused(
                f"Backend {name!r} was asked for; on {device} the registry accepts "
                f"{', '.join(accepted)} (`portakv backends` says why not the others)."
            )
    return list(names or (n for n in accepted if preset.compiling or n not in suite.COMPILING))


def _file_name(asked: argparse.Namespace, results: dict[str, Any]) -> str:
    """Stable from run to run; with backends by name, these are part of it."""
    device = command.pick_device(asked.device)
    return "-".join([short_name(device), *(asked.backend or [])]) + ".json"


def _device_parser() -> argparse.ArgumentParser:
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
    command.add_options(parser, sorted(suite.PRESETS), "core")
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help="may be repeated (default: all accepted)"
    )
    parser.add_argument(
        "--shape", action="append", metavar="NAME", help="may be repeated (default: the preset's)"
    )
    _add_peer(parser, "a released peer to measure beside")
    return parser


def _host_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="portakv bench --host",
        description="Measures copies between a device and host memory by every engine, in turns "
        "with a plain memcpy of the same bytes, and checks every byte in the same run.",
    )
    command.add_options(parser, sorted(HOST_PRESETS), "full")
    parser.add_argument(
        "--only", metavar="PARTS", help=f"some parts alone, separated by commas: {', '.join(PARTS)}"
    )
    _add_peer(parser, "a released peer, for the part `peers`")
    return parser


def _add_peer(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--peer", action="append", metavar="NAME",
        help=f"{what}; may be repeated: {', '.join(PEERS)}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
