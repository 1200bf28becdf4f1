# SPDX-License-Identifier: Apache-2.0
"""`portakv backends`: what every candidate says of every type of device on this machine."""

from __future__ import annotations

import argparse
import platform
import sys
from typing import Any

import torch

from portakv import __version__
from portakv.console import print_json, print_prose
from portakv.registry import ENVIRONMENT

from ..candidates import Candidate, as_json, candidates_for, forced_backend, print_candidates
from ..devices import device_count, device_name, devices_present
from .verified import verified

_RUNGS = (
    "verified: R6 run on the hardware, R5 built by the vendor's toolchain, R4 cross-compiled, R3 "
    "semantics emulated, R2 accepted by the vendor's schemas, R1 called against a stand-in."
)

Traces = list[tuple[torch.device, list[Candidate]]]


def add_to(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "backends",
        help="which backends serve this machine, and why not the others",
        description="Asks every candidate about every type of device on this machine. The chosen "
        "one copies a known pattern there first, and every byte is compared.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    parser.set_defaults(run=run)


def run(asked: argparse.Namespace) -> int:
    """Print the traces. 1 where no device is served, as under a forced name that is unknown."""
    found = [(device, candidates_for(device)) for device in devices_present()]
    if asked.json:
        print_json(_as_json(found))
    else:
        _print(found)
    if any(c.chosen for _, candidates in found for c in candidates):
        return 0
    print("portakv: no backend is chosen for any device of this machine.", file=sys.stderr)
    return 1


def _print(found: Traces) -> None:
    print(f"portakv {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    forced = forced_backend()
    if forced is None:
        print(f"{ENVIRONMENT} is not set: the first accepted candidate is chosen.")
    else:
        print(f"{ENVIRONMENT}={forced} is set: no other backend is chosen.")
    for device, candidates in found:
        count = device_count(device)
        parts = [str(device), device_name(device), f"{count} devices" if count > 1 else ""]
        print()
        rungs = verified([c.name for c in candidates], device)
        print_candidates(candidates, ", ".join(part for part in parts if part), rungs)
    print()
    print_prose(_RUNGS)


def _as_json(found: Traces) -> dict[str, Any]:
    return {
        "portakv": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "forced": forced_backend(),
        "devices": [
            {
                "device": str(device),
                "name": device_name(device),
                "count": device_count(device),
                "chosen": next((c.name for c in candidates if c.chosen), None),
                "candidates": _with_rungs(device, candidates),
            }
            for device, candidates in found
        ],
    }


def _with_rungs(device: torch.device, candidates: list[Candidate]) -> list[dict[str, Any]]:
    rungs = verified([c.name for c in candidates], device)
    return [row | {"verified": rungs.get(row["name"], "")} for row in as_json(candidates)]
