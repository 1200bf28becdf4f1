# SPDX-License-Identifier: Apache-2.0
"""`portakv backends`: what every candidate says of this machine's devices, or of a named one."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import torch

from portakv import __version__
from portakv.cli.candidates import (
    Candidate,
    as_json,
    candidates_for,
    forced_backend,
    print_candidates,
)
from portakv.cli.console import print_json, print_prose
from portakv.errors import BackendUnavailable, DeviceMismatch
from portakv.registry import ENVIRONMENT, MADE_FOR, found
from portakv.runtime.devices import device_count, device_name, devices_present

_RUNGS = (
    "verified: R6 run on the hardware, R5 built by the vendor's toolchain, R4 cross-compiled, R3 "
    "semantics emulated, R2 accepted by the vendor's schemas, R1 called against a stand-in."
)

#: Each device with what is said of it; its name, where torch cannot use it here.
Traces = list[tuple[torch.device | str, list[Candidate]]]


def add_to(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "backends",
        help="which backends serve this machine, and why not the others",
        description="Asks every candidate about every type of device on this machine. The chosen "
        "one copies a known pattern there first, and every byte is compared.",
    )
    parser.add_argument(
        "--device",
        metavar="D",
        help="ask about this one, such as npu or cuda:1, which need not be here",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    parser.set_defaults(run=run)


def run(asked: argparse.Namespace) -> int:
    """Print the traces. 1 where no device is served, as under a forced name that is unknown."""
    asks = [_device(asked.device)] if asked.device else devices_present()
    traces: Traces = [(device, candidates_for(device)) for device in asks]
    if asked.json:
        print_json(_as_json(traces))
    else:
        _print(traces)
    if any(c.chosen for _, candidates in traces for c in candidates):
        return 0
    where = asked.device or "any device of this machine"
    print(f"portakv: no backend is chosen for {where}.", file=sys.stderr)
    return 1


def _device(text: str) -> torch.device | str:
    """The device; its name, if torch cannot use it here.

    Raises:
        DeviceMismatch: no torch and no backend has devices of that name.
    """
    with suppress(BackendUnavailable):
        return found(text)
    kind, _, index = text.partition(":")
    known = sorted({"cpu", *MADE_FOR.values()})
    with suppress(RuntimeError):
        known.append(torch.device(kind).type)
    if kind in known and (index.isdecimal() or text == kind):
        return text
    near = ["cuda"] if kind.lower() == "gpu" else get_close_matches(text.lower(), known, 1)
    raise DeviceMismatch(
        f"Device {text!r} was asked about, but neither torch nor a backend knows that name; "
        + (f"did you mean {near[0]!r}?" if near else f"name one of {', '.join(known)}, or cuda:1.")
    )


def _print(traces: Traces) -> None:
    print(f"portakv {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    forced = forced_backend()
    if forced is None:
        print(f"{ENVIRONMENT} is not set: the first accepted candidate is chosen.")
    else:
        print(f"{ENVIRONMENT}={forced} is set: no other backend is chosen.")
    for device, candidates in traces:
        count, name = _facts(device)
        parts = [str(device), name, {0: "not here", 1: ""}.get(count, f"{count} devices")]
        print()
        rungs = _verified([c.name for c in candidates], device)
        print_candidates(candidates, ", ".join(part for part in parts if part), rungs)
    print()
    print_prose(_RUNGS)


def _as_json(traces: Traces) -> dict[str, Any]:
    return {
        "portakv": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "forced": forced_backend(),
        "devices": [
            {
                "device": str(device),
                "name": _facts(device)[1],
                "count": _facts(device)[0],
                "chosen": next((c.name for c in candidates if c.chosen), None),
                "candidates": _with_rungs(device, candidates),
            }
            for device, candidates in traces
        ],
    }


def _facts(device: torch.device | str) -> tuple[int, str]:
    """How many there are, and what they are called."""
    if isinstance(device, str):
        return 0, ""
    return device_count(device), device_name(device)


def _with_rungs(device: torch.device | str, candidates: list[Candidate]) -> list[dict[str, Any]]:
    rungs = _verified([c.name for c in candidates], device)
    return [row | {"verified": rungs.get(row["name"], "")} for row in as_json(candidates)]


def _verified(names: Iterable[str], device: torch.device | str) -> dict[str, str]:
    """For each backend of that name how far it was verified, on ``device`` or elsewhere; a device
    that is not here is a name.

    ``R6``, ``R3 on mlu, emulated``, ``expired R6 on NVIDIA H200``. Empty without the suite, which a
    bare installation on Python 3.10 cannot read.
    """
    try:
        from portakv_conformance.evidence import ladder
    except ImportError:
        return {}
    rungs = ladder.read()
    return {name: ladder.told(name, _listed(device), rungs) for name in names}


def _listed(device: torch.device | str) -> str:
    """A device as the ladder names it."""
    from portakv_conformance.evidence.ladder import cpu_name

    if isinstance(device, str):
        return device
    if device.type == "cpu":
        return cpu_name(platform.machine())
    if getattr(torch.get_device_module(device), "EMULATED", False):
        return f"{device.type}, emulated"
    return device_name(device)
