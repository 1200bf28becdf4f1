# SPDX-License-Identifier: Apache-2.0
"""`portakv backends`: what every candidate says of this machine's devices, or of a named one; and
for other commands what each says of a device, or of a plan."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import torch

from portakv import __version__
from portakv.backends.base import Decision
from portakv.cli.console import Column, print_json, print_prose, print_table
from portakv.errors import BackendUnavailable, DeviceMismatch
from portakv.plan.plan import CopyPlan
from portakv.registry import (
    ENVIRONMENT,
    MADE_FOR,
    OLD_NAMES,
    REGISTRY,
    available_device,
    choose,
    trace,
)
from portakv.registry.registry import Choice
from portakv.runtime.devices import DeviceAbsent, device_name, devices_present

_LEVELS = (
    "verified: R6 run on the hardware, R5 built by the vendor's toolchain, R4 cross-compiled, R3 "
    "semantics emulated, R2 accepted by the vendor's schemas, R1 called against a stand-in."
)
HELP = "which backends serve this machine, and why not the others"
DESCRIPTION = """\
Asks every candidate about every type of device on this machine. The chosen one
copies a known pattern there first, and every byte is compared."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    named = "ask about this one, such as npu or cuda:1, which need not be here"
    parser.add_argument("--device", metavar="D", help=named)


def run(asked: argparse.Namespace) -> int:
    """Print the traces. 1 if no device is served, as under a forced name that is unknown."""
    asks = [(d, "") for d in devices_present()] if asked.device is None else [_device(asked.device)]
    told: dict[str, Any] = {
        "portakv": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "forced": forced_backend(),
        "devices": [_told(*device) for device in asks],
    }
    (print_json if asked.json else _print)(told)
    if any(one["chosen"] for one in told["devices"]):
        return 0
    where = asked.device or "any device of this machine"
    print(f"portakv: no backend is chosen for {where}.", file=sys.stderr)
    return 1


def _device(text: str) -> tuple[torch.device | str, str]:
    """The device; or its name, if torch cannot use it here, and a sentence that says why. Raises
    `DeviceMismatch` if neither torch nor a backend has devices of that name."""
    try:
        device = available_device(text)
        torch.empty(0, device=device)
        return device, ""
    except BackendUnavailable as error:
        absent = error.__cause__
    except Exception as error:  # torch says in a different type for each device that it is not here
        return text, f"{text} is not here: {type(error).__name__}: {error}"
    assert isinstance(absent, DeviceAbsent)
    known = absent.known and str(absent.device) == text
    if known or REGISTRY.serves(cast(torch.device, absent.device)):
        return text, f"{text} is not here: {absent}."
    names = ", ".join(sorted({"cpu", *MADE_FOR.values()}))
    why = f"neither torch nor a backend knows that name; name one of {names}, or cuda:1."
    raise DeviceMismatch(f"Device {text!r} was asked about, but {absent if absent.meant else why}")


def _told(device: torch.device | str, missing: str) -> dict[str, Any]:
    """What is said of a device, or of the name of one that torch cannot use here."""
    candidates = candidates_for(device)
    levels = _verified([c["name"] for c in candidates], device)
    absent = isinstance(device, str)
    return {
        "device": str(device),
        "name": "" if absent else device_name(torch.device(device)),
        "count": 0 if absent else torch.get_device_module(device).device_count(),
        "missing": missing,
        "chosen": next((c["name"] for c in candidates if c["chosen"]), None),
        "candidates": [{**one, "verified": levels.get(one["name"], "")} for one in candidates],
    }


def _print(told: Mapping[str, Any]) -> None:
    print(f"portakv {told['portakv']}, torch {told['torch']}, Python {told['python']}")
    is_set = f"={told['forced']} is set: no other backend is chosen."
    if told["forced"] is None:
        is_set = " is not set: the first accepted candidate is chosen."
    print(f"{ENVIRONMENT}{is_set}\n")
    for one in told["devices"]:
        count = {0: "not here", 1: ""}.get(one["count"], f"{one['count']} devices")
        if one["missing"]:
            print_prose(one["missing"])
        parts = one["device"], one["name"], count
        print_candidates(one["candidates"], ", ".join(filter(None, parts)))
        print()
    print_prose(_LEVELS)


def _verified(names: Sequence[str], device: torch.device | str) -> dict[str, str]:
    """For each backend how far it was verified, on ``device`` or elsewhere: ``R6``, ``R3 on mlu,
    emulated``. Empty without the suite, which a bare installation on Python 3.10 cannot read."""
    try:
        from portakv_conformance.evidence import support_matrix
    except ImportError:
        return {}
    if isinstance(device, str):
        listed = device
    elif device.type == "cpu":
        listed = support_matrix.cpu_name(platform.machine())
    elif getattr(torch.get_device_module(device), "EMULATED", False):
        listed = f"{device.type}, emulated"
    else:
        listed = device_name(device)
    levels = support_matrix.read()
    return {name: support_matrix.summary(name, listed, levels) for name in names}


#: A backend's answer as JSON has it: ``name, accepted, on_request, chosen, reason``; at most one is
#: chosen, and what is ``on_request`` is accepted and used only if it is named.
Candidate = dict[str, Any]


def forced_backend() -> str | None:
    """What the environment forces, or None."""
    return os.environ.get(ENVIRONMENT) or None


def candidates_for(device: torch.device | str) -> list[Candidate]:
    """Every candidate's answer for a device, or for the name of one that torch cannot use here:
    each says what it lacks. The chosen one has passed its self-check."""
    chosen = None
    with suppress(BackendUnavailable):  # which the answers explain
        chosen = choose(device).name
    decisions = [*trace(device)]
    usual = [] if isinstance(device, str) else REGISTRY.automatic(device)
    forced = forced_backend()
    if forced is not None and not {forced, OLD_NAMES.get(forced)}.intersection(REGISTRY.names()):
        decisions.insert(0, REGISTRY.unknown(forced))
    # An entry point that was refused shares its name with a backend: accepted tells them apart.
    return [
        {
            "name": d.name,
            "accepted": d.accepted,
            "chosen": d.accepted and d.name == chosen,
            "on_request": d.accepted and d.name not in usual,
            "reason": d.reason,
        }
        for d in decisions
    ]


def candidates_for_plan(plan: CopyPlan, taken: Choice) -> list[Candidate]:
    """Every candidate's answer for a plan that ``taken`` carries out."""
    answers = {decision.name: decision for decision in taken.trace}
    found = candidates_for(taken.backend.device)
    why = "was forced" if taken.forced else "is asked before it"
    for one in (one for one in found if one["accepted"]):
        name = one["name"]
        told = f"takes the plan too, but {taken.name} {why}"
        if one["on_request"] and not taken.forced:
            told = "takes the plan too, if it is named"
        # One that was not asked about the plan is asked now.
        known = answers.get(name) or _passed_over(name, plan, taken)
        one["chosen"] = name == taken.name
        if one["chosen"]:
            told = taken.trace[-1].reason
        one["accepted"] = known.accepted
        one["reason"] = f"{one['reason']}; {told}" if known.accepted else known.reason
    return found


def _passed_over(name: str, plan: CopyPlan, taken: Choice) -> Decision:
    """What a candidate says of the plan that another takes."""
    backend, decision = REGISTRY.ask(name, taken.backend.device, check=False)
    if backend is None:
        return decision
    try:
        return backend.check(plan)
    except Exception as error:  # a third party's backend: explaining must go on
        return Decision(name, False, f"its check failed: {type(error).__name__}: {error}")


def print_candidates(candidates: Sequence[Candidate], title: str) -> None:
    """Print a table of candidates, with ``verified`` if any says it."""
    shown = ["verified", "reason"] if any(c.get("verified") for c in candidates) else ["reason"]
    columns = [Column("backend", whole=True), Column("answer", whole=True), *map(Column, shown)]
    rows = []
    for one in candidates:
        accepted = "on request" if one["on_request"] else "accepted"
        answer = "chosen" if one["chosen"] else accepted if one["accepted"] else "rejected"
        rows.append([one["name"], answer, *(one[name] for name in shown)])
    print_table(columns, rows, title)
