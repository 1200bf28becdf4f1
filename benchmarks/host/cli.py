# SPDX-License-Identifier: Apache-2.0
"""`portakv bench --host`: copies between a device and host memory, against a plain memcpy.

Exit codes as of `portakv bench`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from portakv.engines.costs import costs_of
from portakv_benchmarks.check import HOST_SUITE
from portakv_benchmarks.host.calls import call_steps
from portakv_benchmarks.host.grid import direct_steps, duplex_steps, grid_steps
from portakv_benchmarks.host.interference import interference_steps, peer_steps
from portakv_benchmarks.host.pageable import pageable_steps
from portakv_benchmarks.host.peers import PEERS, load_host_peer
from portakv_benchmarks.host.pinning import pinning_steps
from portakv_benchmarks.host.small import small_steps
from portakv_benchmarks.host.suite import PRESETS, Bench
from portakv_benchmarks.host.tables import print_host
from portakv_benchmarks.host.waiting import waiting_steps
from portakv_benchmarks.shared.command import (
    RESULT_FORMAT,
    Refused,
    Rows,
    Step,
    carry_out,
    conclude,
    pick_device,
    refuse_forced,
)
from portakv_benchmarks.shared.machine import describe, short_name

#: What can be measured on its own, in this order: the grid first, since most bars are about it, and
#: peers last, since the kernel of another that fails may leave no device for what follows.
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


def main(argv: Sequence[str]) -> int:
    """Run the host benchmarks.

    Args:
        argv: the words behind `portakv bench`, without ``--host``.
    """
    asked = _parser().parse_args(argv)
    return conclude("bench --host", asked, run, lambda found: f"{found['name']}.json", print_host)


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for; returns what is written as JSON.

    Raises:
        Refused: a forced backend, or a device that is no accelerator or only emulated.
        PeerMissing: a peer cannot be called here.
    """
    refuse_forced()
    device = pick_device(asked.device)
    _check(device, asked.preset)
    parts = _parts(asked.only)
    peers = [load_host_peer(name) for name in asked.peer or ()]
    bench = Bench(device, PRESETS[asked.preset], peers)
    machine = describe(device)
    steps = [_of_part(part, step) for part in parts for step in _steps(part, bench)]
    rows, left_out = carry_out(steps, device, asked.seconds)
    left_out = list(dict.fromkeys(left_out))  # some steps leave out the same for the same reason
    bench.forget()
    name = f"{short_name(device)}-host"
    return {
        "format": RESULT_FORMAT,
        "suite": HOST_SUITE,
        "name": name if len(parts) == len(PARTS) else "-".join([name, *parts]),
        "machine": machine,
        "asked": {
            "preset": asked.preset,
            "parts": parts,
            "peers": {peer.name: peer.release for peer in peers},
            "timer": bench.timer.name,
            "calibrated": costs_of(device).measured,
        },
        "left_out": [f"{engine}: {why}" for engine, why in bench.absent.items()] + left_out,
        "rows": rows,
    }


def _steps(part: str, bench: Bench) -> list[Step]:
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


def _check(device: torch.device, preset: str) -> None:
    if device.type == "cpu":
        raise Refused(
            "copies between a device and the host were to be measured, but torch finds no "
            "accelerator here. Run it where there is one."
        )
    emulated = getattr(torch.get_device_module(device), "EMULATED", False)
    if emulated and preset != "tiny":
        raise Refused(
            f"{device} is emulated, and figures come from real hardware only; --preset tiny tries "
            f"the benchmark itself."
        )


def _parts(only: str | None) -> list[str]:
    if only is None:
        return list(PARTS)
    asked = [word.strip() for word in only.split(",")]
    unknown = [word for word in asked if word not in PARTS]
    if unknown:
        raise Refused(f"Part {unknown[0]!r} was asked for; known are {', '.join(PARTS)}.")
    return [part for part in PARTS if part in asked]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="portakv bench --host",
        description="Measures copies between a device and host memory by every engine, in turns "
        "with a plain memcpy of the same bytes, and checks every byte in the same run.",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full", help="default: full")
    parser.add_argument("--device", help="a torch device (default: the accelerator)")
    parser.add_argument(
        "--only", metavar="PARTS", help=f"some parts alone, separated by commas: {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--peer", action="append", metavar="NAME",
        help=f"a released peer, for the part `peers`; may be repeated: {', '.join(PEERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, help="start nothing new after this time; tell what was left out"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write DIR/<device>-host.json, and plots of it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    return parser
