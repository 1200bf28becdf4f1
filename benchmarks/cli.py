# SPDX-License-Identifier: Apache-2.0
"""`portakv bench`: measure backends on real models' shapes; print tables and write JSON.

``--host`` measures copies between a device and host memory, ``--wall`` the same as a caller waits
for them; next to ``--storage`` or ``--migration`` it selects their parts that do so. ``--plugs``
compares engines' own transfers with those of PortaKV's integrations. ``--storage`` measures block
stores in a folder, and ``--migration`` measures rows and weights that cross between two processes.
``--engines`` measures requests of a serving engine with each place from which their rows may come.
``--encodings`` measures copies that pack and unpack rows.

Exit codes: 0 all bytes are right; 1 bytes are wrong or a requested part failed; 2 the command line
is wrong. Absent parts, failures of peers and parts without time left are reported only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import TypeVar

import numpy
import torch

import portakv
from portakv.cli.console import Parser, installing, print_json
from portakv.cli.sides import Shape, load_shapes, read_above_zero
from portakv.errors import PortaKVError
from portakv.interconnect.costs import costs_of
from portakv.registry.registry import ENVIRONMENT
from portakv.runtime.devices import device_name, usable_device, usual_device
from portakv.runtime.resources import require_linux
from portakv_benchmarks.check import (
    ENCODING_SUITE,
    ENGINE_SUITE,
    HOST_SUITE,
    INTEGRATION_SUITE,
    MIGRATION_SUITE,
    STORAGE_SUITE,
    SUITES,
    WALL_SUITE,
    judge,
    load_targets,
    print_verdicts,
)
from portakv_benchmarks.device import suite
from portakv_benchmarks.device.cold_start import measure_startup
from portakv_benchmarks.device.methods import run_all_methods
from portakv_benchmarks.device.overhead import measure_overhead
from portakv_benchmarks.device.registered import registered_steps
from portakv_benchmarks.device.whole_call import inside_steps
from portakv_benchmarks.encodings import across, alongside, codecs, inside, stored, transports
from portakv_benchmarks.encodings.suite import ENCODING_PRESETS, EncodingBench
from portakv_benchmarks.engines import models
from portakv_benchmarks.host import anew, calls, grid, interference, memory, small, whole_call
from portakv_benchmarks.host.driver_clock import driver_clock
from portakv_benchmarks.host.suite import HOST_PRESETS, Bench
from portakv_benchmarks.plugs.engine import engine_steps
from portakv_benchmarks.plugs.lmcache import lmcache_steps
from portakv_benchmarks.plugs.sglang import sglang_steps
from portakv_benchmarks.plugs.suite import INTEGRATION_PRESETS, IntegrationBench, medians
from portakv_benchmarks.plugs.vllm import vllm_steps
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import (
    DeviceTimer,
    Fields,
    HostTimer,
    Row,
    Rows,
    Step,
    in_a_line,
)
from portakv_benchmarks.shared.peers import PEERS, load_peer
from portakv_benchmarks.shared.shapes import in_bytes
from portakv_benchmarks.shared.tables import print_results
from portakv_benchmarks.storage import costs, stores, tiers, waits
from portakv_benchmarks.storage.suite import STORAGE_PRESETS, StorageBench

AnyBench = TypeVar("AnyBench", bound=Bench)
Parts = Mapping[str, Callable[[AnyBench], Iterator[Step]]]

RESULT_FORMAT = 2
SEED = "seed"  # the first scenario of PortaKV
#: The parts of ``--host``, in this order. The grid comes first, since most performance targets are
#: about it. Peers come last, since a failing kernel of a peer may leave the device unusable.
PARTS: Mapping[str, Callable[[Bench], Iterator[Step]]] = {
    "grid": grid.grid_steps,
    "direct": grid.zero_copy_steps,
    "duplex": grid.duplex_steps,
    "calls": calls.call_steps,
    "small": small.small_steps,
    "interference": interference.interference_steps,
    "short": interference.short_steps,
    "waiting": interference.waiting_steps,
    "pageable": memory.pageable_steps,
    "pinning": memory.pinning_steps,
    "peers": interference.peer_steps,
}
#: The parts of ``--wall``.
WALL: Mapping[str, Callable[[Bench], Iterator[Step]]] = {
    "link": whole_call.whole_call_steps,
    "pages": whole_call.page_steps,
    "inside": inside_steps,
    "registered": registered_steps,
    "blocks": calls.new_id_steps,
    "anew": anew.anew_steps,
}
#: Those that need no accelerator.
WALL_ON_CPU = ("anew",)
#: The parts of ``--plugs``, by engine. LMCache comes last: its kernels accept any layout.
INTEGRATIONS: Mapping[str, Callable[[IntegrationBench], Iterator[Step]]] = {
    "sglang": sglang_steps,
    "vllm": vllm_steps,
    "engine": engine_steps,
    "lmcache": lmcache_steps,
}
#: The parts of ``--storage``.
STORAGE: Mapping[str, Callable[[StorageBench], Iterator[Step]]] = {
    "engine": tiers.engine_steps,
    "tier": tiers.tier_steps,
    "costs": costs.cost_steps,
    "remote": tiers.remote_steps,
    "store": stores.store_steps,
    "waits": waits.wait_steps,
    "served": lambda bench: _needs_migration("storage.served").served_steps(bench),
}
#: The parts of ``--migration``, in modules that need its extra. Parts that depend on no other
#: engine or library come first.
MIGRATION: Mapping[str, str] = {
    "mapped": "pulls:mapped_steps",
    "both": "pulls:both_steps",
    "costs": "pulls:cost_steps",
    "wall": "wall:waiting_steps",
    "setup": "setup:setup_steps",
    "weights": "pulls:weight_steps",
    "beside": "beside:loop_steps",
    "staged": "moved:staged_steps",
    "scattered": "moved:scattered_steps",
}
#: The parts of ``--encodings``.
ENCODINGS: Mapping[str, Callable[[EncodingBench], Iterator[Step]]] = {
    "inside": inside.inside_steps,
    "across": across.across_steps,
    "transports": transports.transport_steps,
    "alongside": alongside.alongside_steps,
    "stored": stored.stored_steps,
    "held": stored.held_steps,
    "codecs": codecs.codec_steps,
}
#: The parts of a suite that have targets by the wall clock, which ``--wall`` measures alone.
BY_WALL: Mapping[str, Sequence[str]] = {
    STORAGE_SUITE: ("tier", "waits", "served"),
    MIGRATION_SUITE: ("wall", "weights", "staged"),
}
_PARTS_OF: Mapping[str, Fields] = {
    HOST_SUITE: PARTS,
    WALL_SUITE: WALL,
    INTEGRATION_SUITE: INTEGRATIONS,
    STORAGE_SUITE: STORAGE,
    MIGRATION_SUITE: MIGRATION,
    ENGINE_SUITE: dict.fromkeys([*models.MODELS, *models.HANDOVERS]),
    ENCODING_SUITE: ENCODINGS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write to ``--out``, print, and return the exit code.

    ``argv`` are the words after `portakv bench`, by default those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    kind = _suite_of(words)
    parser = _parser(kind)
    args = parser.parse_args(words)
    _select_by_wall(parser, kind, args)
    try:
        require_linux("`portakv bench`")
        if os.environ.get(ENVIRONMENT):
            raise PortaKVError(
                f"Expected {ENVIRONMENT} to be unset, got {os.environ[ENVIRONMENT]!r}, which "
                f"forces every copy through one backend. Unset it, and pass --backend."
            )
        device = pick_device(args.device)
        runs: dict[str, Callable[[argparse.Namespace, torch.device], Row]] = {
            HOST_SUITE: partial(run_host, HOST_SUITE, PARTS),
            WALL_SUITE: partial(run_host, WALL_SUITE, WALL),
            INTEGRATION_SUITE: run_integrations,
            STORAGE_SUITE: run_storage,
        }
        runs[MIGRATION_SUITE] = run_migration
        runs[ENGINE_SUITE] = run_engines
        runs[ENCODING_SUITE] = run_encodings
        run = runs.get(kind or "", run_device)
        results = run(args, device)
    except PortaKVError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    # The name is stable from run to run. It has the backends that the command names.
    stem = results.get("name") or "-".join([short_name(device), *(args.backend or ())])
    written = write(results, args.out, stem) if args.out else []
    if args.json:
        print_json(results)
    else:
        print_results(results)
        if args.targets:
            print_targets(results)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    # For integrations, left_out names the engines' own code that failed.
    lines = [] if kind == INTEGRATION_SUITE else results["left_out"]
    failed = any(isinstance(line, harness.Failed) for line in lines)
    return int(failed or not all(x["verified"] for x in results["rows"] if not x.get("peer")))


def _suite_of(words: Sequence[str]) -> str | None:
    """Return the suite that a command names; None for copies inside a device.

    Next to another suite, ``--wall`` selects parts of it.
    """
    named = [name for name in SUITES if f"--{name}" in words]
    return min(named, key=lambda name: name == WALL_SUITE, default=None)


def _select_by_wall(
    parser: argparse.ArgumentParser, kind: str | None, args: argparse.Namespace
) -> None:
    """Select the parts by the wall clock if ``--wall`` requests them; end for wrong options."""
    if kind is None or kind not in BY_WALL or not args.wall:
        return
    if args.only is not None:
        parser.error("Expected --wall or --only, got both. Leave one out.")
    args.only = ",".join(BY_WALL[kind])


_MEASURED = {
    None: "backends on real models' shapes, in turns with copy_",
    HOST_SUITE: (
        "copies between a device and host memory by every transfer strategy, in turns with a memcpy"
    ),
    WALL_SUITE: (
        "copies to, from and inside a device by the wall clock, from the call until the host "
        "sees the end on an idle device, in turns with a memcpy"
    ),
    INTEGRATION_SUITE: (
        "engines' transfers by their own code and by integrations, in turns with a memcpy"
    ),
    STORAGE_SUITE: "block stores and their parts, in turns with fio and LMCache,",
    MIGRATION_SUITE: "transfers between two processes and their devices, in turns with raw copies",
    ENGINE_SUITE: "requests of a serving engine with each connector, in turns in one engine,",
    ENCODING_SUITE: "copies that pack and unpack rows, in turns with plain copies",
}
_INSTEAD = {
    HOST_SUITE: "copies between the device and the host",
    WALL_SUITE: "the same by the wall clock, as a caller waits for them",
    INTEGRATION_SUITE: "engines' own transfers compared with those of PortaKV's integrations",
    STORAGE_SUITE: "block stores in a folder compared with fio and LMCache",
    MIGRATION_SUITE: "rows and weights that cross between two processes",
    ENGINE_SUITE: "requests of a real engine whose rows come from the device, the host or a disk",
    ENCODING_SUITE: "copies that pack and unpack rows, inside a device and over its link",
}


def _parser(kind: str | None) -> argparse.ArgumentParser:
    """Return the parser of a suite; None means copies inside a device."""
    parser = Parser(
        prog="portakv bench" + (f" --{kind}" if kind else ""),
        description=f"Measures {_MEASURED[kind]} of the same bytes, and checks every byte in the "
        f"same run.",
    )
    add = parser.add_argument
    for name in (kind,) if kind else _INSTEAD:
        instead = f"measure {_INSTEAD[name]}; see `bench --{name} --help`"
        add(f"--{name}", action="store_true", help=argparse.SUPPRESS if kind else instead)
    known: dict[str | None, Fields]
    known = {
        None: suite.PRESETS,
        HOST_SUITE: HOST_PRESETS,
        WALL_SUITE: HOST_PRESETS,
        INTEGRATION_SUITE: INTEGRATION_PRESETS,
        STORAGE_SUITE: STORAGE_PRESETS,
        MIGRATION_SUITE: dict.fromkeys(("full", "quick", "tiny")),
        ENGINE_SUITE: dict.fromkeys(("full", "tiny")),
        ENCODING_SUITE: ENCODING_PRESETS,
    }
    presets = known[kind]
    preset = "full" if kind else "core"
    add("--preset", choices=sorted(presets), default=preset, help=f"default: {preset}")
    add("--device", help="a torch device (default: the accelerator, if any)")
    add("--seconds", type=read_above_zero, metavar="S", help="begin nothing new after this time")
    add("--out", type=Path, metavar="DIR", help="write DIR/<device>.json, and plots of it")
    add("--json", action="store_true", help="print one JSON value")
    add(
        "--bars",
        dest="targets",
        action="store_true",
        help="compare with this project's performance targets, which are for its own machines",
    )
    several: Row = {"action": "append", "metavar": "NAME"}
    if kind:
        parts = ", ".join(_PARTS_OF[kind])
        add("--only", metavar="PARTS", help=f"some parts alone, separated by commas: {parts}")
        if kind in BY_WALL:
            timed = ", ".join(BY_WALL[kind])
            add("--wall", action="store_true", help=f"the parts by the wall clock alone: {timed}")
    else:
        add("--backend", help="may be repeated (default: all accepted)", **several)
        add("--shape", help="may be repeated (default: the preset's)", **several)
    use = ", for the part `peers`" if kind == HOST_SUITE else " to compare with"
    if kind in (STORAGE_SUITE, ENGINE_SUITE):
        add("--dir", type=Path, required=True, help="a folder on the disk; left as it was")
    if kind == STORAGE_SUITE:
        add("--sizes", metavar="LIST", help="of a slot, such as 256K,1M (default: the preset's)")
        add("--gib", type=read_above_zero, help="moved in one trial (default: the preset's)")
        add("--rounds", type=int, help="trials of each method (default: the preset's)")
        add("--pause", type=float, metavar="S", help="before each trial (default: the preset's)")
        add("--fio", metavar="FILE", help="fio's program (default: that of the path)")
        add("--lmcache-python", metavar="FILE", help="a Python that has LMCache")
    elif kind in (None, HOST_SUITE, WALL_SUITE):
        add("--peer", help=f"a released peer{use}; may be repeated: {', '.join(PEERS)}", **several)
    return parser


def pick_device(name: str | None) -> torch.device:
    """Make the named device current and return it; by default the accelerator, else the CPU."""
    device = usual_device() if name is None else usable_device(name)
    if device.type == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(device)
    module.set_device(module.current_device() if device.index is None else device.index)
    return torch.device(device.type, module.current_device())


def run_device(args: argparse.Namespace, device: torch.device) -> Row:
    """Measure copies inside a device; return the result as JSON."""
    preset = suite.PRESETS[args.preset]
    known = load_shapes()
    accepted = suite.accepted_backends(device)
    _check_known("--shape", args.shape or (), known)
    for name in args.backend or ():
        if name not in accepted:
            raise PortaKVError(
                f"Expected --backend to be one of {', '.join(accepted)} on {device}, got {name!r}. "
                f"`portakv backends` prints why it rejects the others."
            )
    shapes = [known[name] for name in args.shape or preset.shapes or known]
    usual = [name for name in accepted if preset.compiling or name not in suite.COMPILING]
    peers = [load_peer(name) for name in args.peer or ()]
    timer = HostTimer(device) if device.type == "cpu" else DeviceTimer(device)
    field = suite.Field(args.backend or usual, peers, timer, device, [])
    machine = describe(device)
    steps = _on_device(preset, shapes, field)
    rows = carry_out(steps, device, args.seconds, field.left_out)
    suite.relate(rows)
    return {
        "format": RESULT_FORMAT,
        "machine": machine,
        "asked": {
            "preset": args.preset,
            "backends": field.backends,
            "peers": {peer.name: peer.release for peer in peers},
            "timer": timer.name,
        },
        "left_out": field.left_out + suite.peer_failures(rows),
        "rows": rows,
    }


def _check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise PortaKVError(
                f"Expected {what} to be one of {', '.join(known)}, got {name!r}. Correct the name."
            )


def _on_device(preset: suite.Preset, shapes: Sequence[Shape], field: suite.Field) -> Iterator[Step]:
    """Yield the steps by name; backends that compile for seconds come last."""
    device = field.device
    fast = [name for name in field.backends if name not in suite.COMPILING]
    overheads = {
        name: (
            f"overhead of {name}",
            partial(
                measure_overhead,
                name,
                device,
                preset.overhead_rounds,
                field.peers if name == "cuda" else (),
            ),
        )
        for name in field.backends
    }
    yield from (overheads[name] for name in fast)
    for backend in fast if preset.starts else ():  # the registry would choose the first
        rounds = preset.starts if backend == fast[0] else 1
        yield (
            f"fresh process with {backend}",
            partial(measure_startup, backend, str(device), rounds),
        )
    for task in suite.tasks(preset, shapes, device):
        yield f"{task}", partial(suite.run_task, task, preset, field)
    for shape in shapes:
        if preset.all_methods and shape.name == SEED:
            yield (
                f"every method of moving {SEED}",
                partial(run_all_methods, shape, field, preset.rounds),
            )
    yield from (step for name, step in overheads.items() if name not in fast)


def run_host(kind: str, parts: Parts[Bench], args: argparse.Namespace, device: torch.device) -> Row:
    """Measure parts of copies between a device and the host; return the result as JSON."""
    if device.type == "cpu" and kind == WALL_SUITE:
        parts = {name: parts[name] for name in WALL_ON_CPU}
    elif device.type == "cpu":
        raise PortaKVError(
            "Expected an accelerator, whose copies to and from the host are measured, got the CPU. "
            "Name another --device, or run it on a machine with one. `portakv bench --device cpu "
            "--preset quick` measures copies on the CPU."
        )
    peers = [load_peer(name) for name in getattr(args, "peer", None) or ()]
    bench = Bench(device, HOST_PRESETS[args.preset], peers)
    bench.clock = driver_clock() if device.type == "cuda" else None
    if device.type == "cpu":
        bench.absent.clear()  # strategies that no part measures there
    return _run_parts(args, kind, parts, bench)


def run_integrations(args: argparse.Namespace, device: torch.device) -> Row:
    """Measure engines' transfers by their own code and by the integrations; return the result.

    The releases whose own code was measured are the result's peers.
    """
    results = _run_parts(
        args, INTEGRATION_SUITE, INTEGRATIONS, IntegrationBench(device, args.preset)
    )
    results["rows"] += medians(results["rows"])
    return results


def run_storage(args: argparse.Namespace, device: torch.device) -> Row:
    """Measure block stores in a folder, which is unchanged after it; return the result as JSON."""
    if not os.path.isdir(args.dir):
        raise PortaKVError(f"Expected --dir to be a folder, got {args.dir}. Make it first.")
    preset = STORAGE_PRESETS[args.preset]
    if forced := os.environ.get("PORTAKV_IO"):
        raise PortaKVError(
            f"Expected PORTAKV_IO to be unset, got {forced!r}, which forces one engine on all "
            f"methods. Unset it."
        )
    try:
        sizes = tuple(map(in_bytes, args.sizes.split(","))) if args.sizes else preset.sizes
        arguments = {
            "nbytes": args.gib and int(args.gib * (1 << 30)),
            "rounds": args.rounds,
            "pause": args.pause,
        }
        more = {name: value for name, value in arguments.items() if value is not None}
        preset = replace(preset, sizes=sizes, **more)
        peers = {"fio": args.fio, "lmcache": args.lmcache_python}
        bench = StorageBench(device, preset, args.dir, peers)
    except (OSError, RuntimeError, ValueError) as error:
        raise PortaKVError(
            f"Expected --dir to be a folder in which block stores can be measured, got {args.dir}: "
            f"{str(error).rstrip('.')}. Pass a folder that you may write to, or correct --sizes."
        ) from None
    try:
        return _run_parts(args, STORAGE_SUITE, STORAGE, bench)
    finally:
        bench.forget()


def run_migration(args: argparse.Namespace, device: torch.device) -> Row:
    """Measure what crosses between two processes; returns what is written as JSON."""
    if forced := os.environ.get("PORTAKV_MOVER"):
        raise PortaKVError(
            f"Expected PORTAKV_MOVER to be unset, got {forced!r}, which forces one transport on "
            f"all methods. Unset it."
        )
    suite_ = _needs_migration("migration.suite")
    parts = {
        name: getattr(_needs_migration(f"migration.{module}"), steps)
        for name, (module, _, steps) in ((x, y.partition(":")) for x, y in MIGRATION.items())
    }
    bench = suite_.MigrationBench(device, suite_.MIGRATION_PRESETS[args.preset])
    try:
        return _run_parts(args, MIGRATION_SUITE, parts, bench)
    finally:
        bench.forget()


def _needs_migration(module: str) -> ModuleType:
    """Import a module of the benchmarks that needs the packages of the extra `migrate`.

    Other suites need torch and numpy alone. Raises `PortaKVError` without the packages.
    """
    try:
        return import_module(f"portakv_benchmarks.{module}")
    except ImportError as error:
        raise PortaKVError(
            f"Expected the packages that migration needs, but {error}. Install them."
        ) from None


def run_engines(args: argparse.Namespace, device: torch.device) -> Row:
    """Measure requests of engines, one for each model; returns what is written as JSON."""
    if not os.path.isdir(args.dir):
        raise PortaKVError(f"Expected --dir to be a folder, got {args.dir}. Make it first.")
    tiny = device.type == "cpu" or args.preset == "tiny"
    names = models.TINY if tiny else models.FULL
    steps = _needs_migration("engines.suite")
    parts: Parts[IntegrationBench]
    parts = {name: partial(steps.engine_steps, name, args.dir) for name in names}
    for name, steps_of in steps.HANDOVER_STEPS.items():
        parts[name] = partial(steps_of, args.dir, args.out, tiny)
    results = _run_parts(args, ENGINE_SUITE, parts, IntegrationBench(device, args.preset))
    place = short_name(device)
    results["name"] = results["name"].replace(f"{place}-{ENGINE_SUITE}", f"{ENGINE_SUITE}-{place}")
    return results


def run_encodings(args: argparse.Namespace, device: torch.device) -> Row:
    """Measure copies that pack and unpack; return the result as JSON."""
    bench = EncodingBench(device, ENCODING_PRESETS[args.preset])
    return _run_parts(args, ENCODING_SUITE, ENCODINGS, bench)


def _run_parts(args: argparse.Namespace, kind: str, known: Parts[AnyBench], bench: AnyBench) -> Row:
    """Measure the parts of a suite that were requested."""
    words = [*known] if args.only is None else [word.strip() for word in args.only.split(",")]
    _check_known("--only", words, known)
    parts = [part for part in known if part in words]
    device = bench.device
    if getattr(bench.module, "EMULATED", False) and args.preset != "tiny":
        raise PortaKVError(
            f"Expected real hardware for figures, got {device}, which is emulated. Pass --preset "
            f"tiny to try the benchmark itself."
        )
    machine = describe(device)
    steps = (step for part in parts for step in _steps_of(part, known[part], bench))
    rows = carry_out(steps, device, args.seconds, bench.left_out)
    bench.forget()
    timer = bench.busy_timer if kind == WALL_SUITE else bench.timer
    absent = [f"{engine}: {why}" for engine, why in bench.absent.items()]
    name = f"{short_name(device)}-{bench.named or kind}"
    return {
        "format": RESULT_FORMAT,
        "suite": kind,
        "name": name if len(parts) == len(known) else "-".join([name, *parts]),
        "machine": machine,
        "asked": {
            "preset": args.preset,
            "parts": parts,
            "peers": bench.releases,
            "timer": timer.name,
            "calibrated": costs_of(device).measured,
        },
        # Some steps leave out the same for the same reason.
        "left_out": absent + list(dict.fromkeys(bench.left_out)),
        "rows": rows,
    }


def _steps_of(
    part: str, steps: Callable[[AnyBench], Iterator[Step]], bench: AnyBench
) -> list[Step]:
    """Return the steps of a part, whose rows name it; none, with a line, if the part fails."""

    def labelled(measure: Callable[[], Rows]) -> Rows:
        return [{**row, "part": part} for row in measure()]

    try:
        return [(f"{part}: {name}", partial(labelled, step)) for name, step in steps(bench)]
    except Exception as error:  # libraries of peers raise errors of all kinds while they load
        line = f"{part}: {in_a_line(error)}"  # an error of PortaKV names what is absent here
        bench.left_out.append(line if isinstance(error, PortaKVError) else harness.Failed(line))
        return []


def carry_out(
    planned: Iterable[Step], device: torch.device, seconds: float | None, left_out: list[str]
) -> Rows:
    """Run the steps and return their rows; start no step after ``seconds``.

    The seconds include the loading of engines. A step that is late, fails or is interrupted adds a
    line to ``left_out``.
    """
    rows: Rows = []
    began = perf_counter()
    steps = [*planned]
    with torch.no_grad():
        for done, (name, step) in enumerate(steps):
            elapsed = perf_counter() - began
            if seconds is not None and elapsed > seconds:
                left_out += [f"{late}: no time was left" for late, _ in steps[done:]]
                break
            print(f"[{done + 1}/{len(steps)}] {elapsed:.0f} s: {name}", file=sys.stderr, flush=True)
            try:
                rows += step()
            except KeyboardInterrupt:
                left_out.append(f"interrupted: the last {len(steps) - done} steps")
                break
            except Exception as error:  # earlier rows must not be lost
                left_out.append(harness.Failed(f"{name}: {in_a_line(error)}"))
                harness.take_error()
            try:  # release memory, so that the next workload sees the free memory
                gc.collect()
                if hasattr(torch.get_device_module(device), "empty_cache"):
                    torch.get_device_module(device).empty_cache()
            except RuntimeError as error:
                why = in_a_line(error)
                left_out.append(f"{name} left the device unusable ({why}); the rest was not run")
                break
    return rows


def describe(device: torch.device) -> Row:
    """Return facts of the machine and versions as JSON."""
    facts: Row = {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "device_type": device.type,
        "device": _name(device),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "portakv": portakv.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["cuda"] = torch.version.cuda or torch.version.hip
        facts["multiprocessors"] = properties.multi_processor_count
        facts["l2_bytes"] = getattr(properties, "L2_cache_size", None)
        facts |= _smi(device)
    return facts


def _name(device: torch.device) -> str:
    return _cpu_name() if device.type == "cpu" else device_name(device) or device.type


def short_name(device: torch.device) -> str:
    """Return a name for files that is stable from run to run: ``cpu-2core``, ``h200``."""
    if device.type == "cpu":
        return f"cpu-{len(os.sched_getaffinity(0))}core"
    words = re.sub(r"[^a-z0-9]+", "-", _name(device).lower()).strip("-").split("-")
    return "-".join(word for word in words if word not in ("nvidia", "amd", "instinct"))


def _cpu_name() -> str:
    """Return the kernel's name of the processor."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    matches = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return matches.group(1).strip() if matches else platform.machine()


def _smi(device: torch.device) -> dict[str, str]:
    """Return driver, clocks and power limit as nvidia-smi reads them; change nothing."""
    args = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(args)}", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        line = process.stdout.splitlines()[device.index or 0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(args, (word.strip() for word in line.split(",")), strict=False))


def write(results: Row, folder: Path, stem: str) -> list[Path]:
    """Write a result and its plots; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    try:
        from portakv_benchmarks.shared.plots import draw
    except ImportError as error:
        print(f"no plots: {error}; {installing('bench')} brings it", file=sys.stderr)
        return [path]
    return [path, *draw(results, folder, stem)]


def print_targets(results: Row) -> None:
    """Print the verdicts on measured rows, and the number of all other targets."""
    verdicts = judge(results, load_targets())
    measured = [verdict for verdict in verdicts if verdict.rows]
    if measured:
        print_verdicts(measured)
    if more := len(verdicts) - len(measured):
        print(f"{more} targets concern rows that were not measured.")


if __name__ == "__main__":
    sys.exit(main())
