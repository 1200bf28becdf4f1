# SPDX-License-Identifier: Apache-2.0
"""`portakv backends`: print every candidate's answer for this machine's devices or a named device.

Other commands use this module for the candidates' answers for a device or a plan.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import cast

import torch

from portakv import __version__
from portakv.backends.base import Decision
from portakv.cli.console import Report, print_json, print_prose, print_rows
from portakv.errors import BackendUnavailable, DeviceMismatch
from portakv.plan.plan import CopyPlan
from portakv.registry import (
    ENVIRONMENT,
    MADE_FOR,
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
HELP = "list the backends that serve this machine, and why the others do not"
DESCRIPTION = """\
Queries every candidate for every type of device on this machine. The chosen
backend first copies a known pattern on the device, and every byte is compared."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    about = "query this device, such as npu or cuda:1; it may be absent here"
    parser.add_argument("--device", metavar="D", help=about)


def run(args: argparse.Namespace) -> int:
    """Print the candidates' answers. Return 1 if no device is served, 0 otherwise."""
    report: Report = versions()
    if args.device is None:
        report["devices"] = [_device_report(device, "") for device in devices_present()]
    else:
        report["devices"] = [_device_report(*_device(args.device))]
    (print_json if args.json else _print)(report)
    if any(one["chosen"] for one in report["devices"]):
        return 0
    where = args.device or "any device of this machine"
    print(f"portakv: no backend is chosen for {where}.", file=sys.stderr)
    return 1


def versions() -> Report:
    """Return the versions of this process, and the backend that the environment forces."""
    return {
        "portakv": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "forced": forced_backend(),
    }


def print_versions(report: Report) -> None:
    """Print the versions of a report."""
    print(f"portakv {report['portakv']}, torch {report['torch']}, Python {report['python']}")


def _device(text: str) -> tuple[torch.device | str, str]:
    """Return the device and an empty text, or its name and why torch cannot use it here.

    Raises `DeviceMismatch` if neither torch nor a backend has devices of that name.
    """
    try:
        device = available_device(text)
        torch.empty(0, device=device)
        return device, ""
    except BackendUnavailable as error:
        absent = error.__cause__
    except Exception as error:  # torch raises another type for each absent device
        return text, f"{text} is not here: {type(error).__name__}: {error}"
    assert isinstance(absent, DeviceAbsent)
    known = absent.known and str(absent.device) == text
    if known or REGISTRY.serves(cast(torch.device, absent.device)):
        return text, f"{text} is not here: {absent}."
    names = ", ".join(sorted({"cpu", *MADE_FOR.values()}))
    why = f"neither torch nor a backend knows that name; name one of {names}, or cuda:1."
    raise DeviceMismatch(
        f"Expected a known device, got {text!r}: {absent if absent.meant else why}"
    )


def _device_report(device: torch.device | str, missing: str) -> Report:
    """Return the answers for a device, or for the name of a device that torch cannot use here."""
    candidates = candidates_for(device)
    level = _level_on(device)
    absent = isinstance(device, str)
    return {
        "device": str(device),
        "name": "" if absent else device_name(torch.device(device)),
        "count": 0 if absent else torch.get_device_module(device).device_count(),
        "missing": missing,
        "chosen": next((c["name"] for c in candidates if c["chosen"]), None),
        "candidates": [{**one, "verified": level(one["name"])} for one in candidates],
    }


def _print(report: Report) -> None:
    print_versions(report)
    is_set = f"={report['forced']} is set: no other backend is chosen."
    if report["forced"] is None:
        is_set = " is not set: the first accepted candidate is chosen."
    print(f"{ENVIRONMENT}{is_set}\n")
    for one in report["devices"]:
        count = {0: "not here", 1: ""}.get(one["count"], f"{one['count']} devices")
        if one["missing"]:
            print_prose(one["missing"])
        parts = one["device"], one["name"], count
        print_candidates(one["candidates"], ", ".join(filter(None, parts)))
        print()
    print_prose(_LEVELS)


def _level_on(device: torch.device | str) -> Callable[[str], str]:
    """Return what tells a backend's support level, here or elsewhere: ``R6``, ``R3 on mlu``.

    Levels are empty without the conformance package, or if this Python cannot read its data.
    """
    try:
        from portakv_conformance.evidence import support_matrix
    except ImportError:
        return lambda name: ""
    if isinstance(device, str):
        listed = device
    elif device.type == "cpu":
        listed = support_matrix.cpu_name(platform.machine())
    elif getattr(torch.get_device_module(device), "EMULATED", False):
        listed = f"{device.type}, emulated"
    else:
        listed = device_name(device)
    levels = support_matrix.read()
    return lambda name: support_matrix.summary(name, listed, levels)


#: A backend's answer in JSON: ``name, accepted, on_request, chosen, reason``. At most one backend
#: is chosen. A backend that is ``on_request`` is accepted, but used only if a caller names it.
Candidate = Report


def forced_backend() -> str | None:
    """Return the name of the backend that the environment forces, or None."""
    return os.environ.get(ENVIRONMENT) or None


def candidates_for(device: torch.device | str) -> list[Candidate]:
    """Return every candidate's answer for a device; the chosen backend has passed its self-check.

    For the name of a device that torch cannot use here, each answer names what is missing.
    """
    chosen = None
    with suppress(BackendUnavailable):  # the answers below explain it
        chosen = choose(device).name
    decisions = [*trace(device)]
    usual = [] if isinstance(device, str) else REGISTRY.automatic(device)
    forced = forced_backend()
    if forced is not None and forced not in REGISTRY.names():
        decisions.insert(0, Decision(forced, False, REGISTRY.catalog.unknown(forced)))
    # A rejected entry point can share its name with a backend: `accepted` distinguishes them.
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
    """Return every candidate's answer for a plan that the backend of ``taken`` executes."""
    answers = {decision.name: decision for decision in taken.trace}
    candidates = candidates_for(taken.backend.device)
    why = "was forced" if taken.forced else "comes before it"
    for one in (one for one in candidates if one["accepted"]):
        name = one["name"]
        message = f"accepts the plan too, but {taken.name} {why}"
        if one["on_request"] and not taken.forced:
            message = "accepts the plan too, if a caller names it"

        # Check the plan with the candidates that the choice did not reach.
        known = answers.get(name) or _passed_over(name, plan, taken)
        one["chosen"] = name == taken.name
        if one["chosen"]:
            message = taken.trace[-1].reason
        one["accepted"] = known.accepted
        one["reason"] = f"{one['reason']}; {message}" if known.accepted else known.reason
    return candidates


def _passed_over(name: str, plan: CopyPlan, taken: Choice) -> Decision:
    """Return a candidate's decision for a plan that another backend executes."""
    backend, decision = REGISTRY.ask(name, taken.backend.device, check=False)
    if backend is None:
        return decision
    try:
        return backend.check(plan)
    except Exception as error:  # a third party's backend may raise anything
        return Decision(name, False, f"its check failed: {type(error).__name__}: {error}")


def print_candidates(candidates: Sequence[Candidate], title: str) -> None:
    """Print a table of candidates, with the column ``verified`` if any candidate has a level."""
    shown = ["verified", "reason"] if any(c.get("verified") for c in candidates) else ["reason"]
    rows = []
    for one in candidates:
        accepted = "on request" if one["on_request"] else "accepted"
        answer = "chosen" if one["chosen"] else accepted if one["accepted"] else "rejected"
        rows.append([one["name"], answer, *(one[name] for name in shown)])
    print_rows(["backend", "answer", *shown], rows, prose=shown, title=title)
