# SPDX-License-Identifier: Apache-2.0
"""`portakv doctor`: what of PortaKV would work here, and why the rest would not: plugs, devices and
extras. Engines are looked up by their metadata, and none is imported."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

from portakv import __version__
from portakv.arguments import one_of
from portakv.cli.backends import candidates_for, forced_backend
from portakv.cli.console import Column, installing, print_json, print_prose, print_table
from portakv.errors import InvalidTerms
from portakv.integrations import INTEGRATIONS, MATRIX, Integration, untested, why_not
from portakv.registry import ENVIRONMENT
from portakv.runtime import kernel_cache as _kernel_cache
from portakv.runtime.devices import device_name, devices_present

HELP = "which plugs, devices and extras would work here, and why not the others"
DESCRIPTION = """\
Tells for each plug whether its engine is installed in a release that it serves,
which devices of this machine it would serve there, and the line of
configuration that chooses it; then the backend of each device, and the extras
that are missing. No engine is imported."""

#: The modules that an extra brings, and what for.
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "cli": (("rich",), "tables with colours and lines"),
    "demo": (("transformers",), "the model of `portakv demo`"),
    "conformance": (("pytest", "hypothesis", "jinja2"), "`portakv conform`"),
    "bench": (("rich", "matplotlib"), "the tables and plots of `portakv bench`"),
    "cuda": (("cuda.bindings",), "the backend `cuda` and copies by the driver, on NVIDIA's GPUs"),
    "storage": (("xxhash",), "block stores on the host and on disks"),
    "remote": (("xxhash", "obstore"), "block stores in S3, GCS, Azure and the like"),
    "migrate": (("msgspec", "zmq"), "rows and weights of other processes"),
    "nixl": (("nixl",), "rows of other hosts over UCX: RDMA, sockets"),
    "mooncake": (("mooncake",), "the same over Mooncake, on CUDA 13"),
    "metrics": (("prometheus_client",), "the counters of block stores for Prometheus"),
    "triton": (("triton",), "the backends `triton` and `compiled` on GPUs"),
}

#: The values of variables that choose one of several. Their modules need extras, and are not
#: imported.
CHOICES: dict[str, tuple[str, ...]] = {
    "PORTAKV_MOVER": ("distributed", "nixl", "mooncake"),
    "PORTAKV_IO": ("ring", "threads"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The verb takes none."""


def run(asked: argparse.Namespace) -> int:
    """Print what was found; always 0, since that can be told on every machine."""
    devices = [_device(device) for device in devices_present()]
    served = [one["type"] for one in devices if one["backend"]]
    told: dict[str, Any] = {
        "portakv": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "forced": forced_backend(),
        "variables": [*_wrong_variables()],
        "plugs": [_plug(name, served) for name in INTEGRATIONS],
        "devices": devices,
        "extras": [one for one in map(_extra, EXTRAS) if one["missing"]],
    }
    (print_json if asked.json else _print)(told)
    return 0


def _wrong_variables() -> Iterator[str]:
    """Yield a sentence for each variable of PortaKV whose value cannot be used."""
    for name, choices in CHOICES.items():
        value = os.environ.get(name)
        if not value:
            continue
        try:
            one_of(name, value, choices)
        except InvalidTerms as error:
            yield str(error)
            continue
        missing = _extra(value)["missing"] if value in EXTRAS else []
        if missing:
            yield (
                f"Expected {name} to be one that runs here, got {value!r}: {', '.join(missing)} is "
                f"not installed. {installing(value)} brings it."
            )
    refusal = _kernel_cache.refusal()
    if refusal:
        yield (
            f"Expected {_kernel_cache.ENVIRONMENT} to be a folder of your own that can be written: "
            f"{refusal}. Set it to one; each process compiles its kernels until then."
        )


def _plug(name: str, served: Sequence[str]) -> dict[str, Any]:
    """What is told of a plug, on a machine with these types of devices that a backend serves."""
    plug = INTEGRATIONS[name]
    releases = MATRIX[name]
    kinds = [kind for kind in served if kind in (plug.devices or served)]
    named = _named(plug)
    # The accelerator stands last.
    kind = next((x for x in kinds if plug.at(x) == named), (kinds or ["cpu"])[-1])
    reasons = [missing] if (missing := why_not(name)) else list(_in_the_way(plug, kind, named))
    if not kinds:
        forced = f" with PORTAKV_BACKEND={x!r}" if (x := os.environ.get("PORTAKV_BACKEND")) else ""
        reasons.append(
            f"The plug {name!r} needs a device with a backend, and no device of this machine has "
            f"one{forced}. Run `portakv backends`, which tells why."
        )
    notes = [
        f"It serves {', '.join(plug.devices)}, and not {other}."
        for other in served
        if other not in kinds
    ]
    return {
        "plug": name,
        "found": _found(releases.package),
        "serves": str(releases),
        "devices": kinds,
        "answer": "rejected" if reasons else "chosen" if named else "on request",
        "line": plug.line.replace("{device}", kind),
        "reasons": reasons,
        "notes": [*notes, *filter(None, [untested(name)])],
    }


def _named(plug: Integration) -> str:
    """What the environment has in the variable that chooses a plug; nothing for none, or 0."""
    given = os.environ.get(plug.variable, "").strip().lower()
    return "" if given == "0" else given


def _in_the_way(plug: Integration, kind: str, named: str) -> Iterator[str]:
    """Why an engine that is here would not take a plug for a type of device."""
    if not plug.group:
        return
    entry = plug.at(kind)
    others = os.environ.get(plug.allows, "")
    found = metadata.entry_points(group=plug.group, name=entry)
    theirs = [each for each in found if not each.value.startswith("portakv.")]
    if len(found) == len(theirs):
        yield (
            f"The engine finds PortaKV by the entry point {entry} of {plug.group}, and found was "
            f"none. Install PortaKV again: a folder on PYTHONPATH has no entry points."
        )
    for each in theirs:
        package = each.dist.name if each.dist else "another package"
        yield (
            f"The entry point {entry} of {plug.group} is to be PortaKV's, and {package} has it for "
            f"{each.value} as well. Uninstall {package}."
        )
    if others and entry not in map(str.strip, others.split(",")):
        yield (
            f"{plug.allows}={others} is set, so that the engine loads no other plugins. Unset it, "
            f"or add {entry}."
        )
    if named and plug.devices and named != entry:
        yield (
            f"{plug.variable}={named} is set, and no device here is served by that name; expected "
            f"{entry}. Set that, or unset it."
        )


def _found(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device(device: torch.device) -> dict[str, Any]:
    """The backend that would be chosen for a device, and the registry's reason."""
    taken = next((one for one in candidates_for(device) if one["chosen"]), None)
    why = "no backend is chosen; `portakv backends` prints what each one answered"
    return {
        "device": str(device),
        "type": device.type,
        "name": device_name(device),
        "backend": taken["name"] if taken else None,
        "reason": taken["reason"] if taken else why,
    }


def _extra(extra: str) -> dict[str, Any]:
    """Which modules of an extra are not installed."""
    modules, gives = EXTRAS[extra]
    missing = [module for module in modules if not _is_here(module)]
    return {"extra": extra, "missing": missing, "gives": gives}


def _is_here(module: str) -> bool:
    """Whether a module could be imported; only packages above it are."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # no parent; a module without a spec
        return False


def _print(told: dict[str, Any]) -> None:
    print(f"portakv {told['portakv']}, torch {told['torch']}, Python {told['python']}")
    if told["forced"]:
        print(f"{ENVIRONMENT}={told['forced']} is set: no other backend is chosen.")
    for sentence in told["variables"]:
        print_prose(sentence)
    print()
    _table(told["plugs"], "plug", "found", "serves", "devices", "answer")
    for one in told["plugs"]:
        print()
        if one["answer"] != "rejected":
            print(f"{one['plug']}: {one['line']}")  # in one line, since it is to be copied
        for sentence in (*one["reasons"], *one["notes"]):
            print_prose(f"{one['plug']}: {sentence}")
    print()
    _table(told["devices"], "device", "name", "backend", "reason")
    print()
    if not told["extras"]:
        print("No extra is missing.")
        return
    _table(told["extras"], "extra", "missing", "gives")
    print()
    print_prose(f"{installing(','.join(one['extra'] for one in told['extras']))} brings them.")


def _table(told: Sequence[dict[str, Any]], *names: str) -> None:
    rows = [[_text(one[name]) for name in names] for one in told]
    print_table([Column(name, whole=name not in ("reason", "gives")) for name in names], rows)


def _text(value: str | Sequence[str] | None) -> str:
    """A cell: ``-`` if there is nothing."""
    return (value if isinstance(value, str) else ", ".join(value or [])) or "-"
