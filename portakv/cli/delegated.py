# SPDX-License-Identifier: Apache-2.0
"""`portakv demo`, `conform` and `bench`, whose work is done by packages of their own that are
imported when the verb runs; and the accelerator that a command was asked about."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import torch

from portakv.errors import DeviceMismatch, PortaKVError
from portakv.runtime.devices import usable_device, usual_device

BENCHMARKS = "portakv_benchmarks"
CONFORMANCE = "portakv_conformance"


def add_demo(verbs: Any) -> None:
    """Add `portakv demo` to the verbs."""
    parser = verbs.add_parser(
        "demo",
        help="move a model's KV cache out and back, and time the backends of this machine",
        description="Moves the KV cache of a small Llama with random weights out of its paged "
        "memory and back into other slots, with the next tokens unchanged; then checks and times "
        "the backends that PortaKV chooses from here. Nothing is downloaded.",
    )
    parser.add_argument("--device", help="a torch device (default: the accelerator, else cpu)")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    parser.set_defaults(run=demo)


def demo(asked: argparse.Namespace) -> int:
    """Run the demo; returns its exit code."""
    from portakv.cli.demo import (
        run_demo,  # its model part imports much more than any other verb needs
    )

    device = None if asked.device is None else str(usable_device(asked.device))
    return run_demo(device=device, json=asked.json)


def add_bench(verbs: Any) -> None:
    """Add `portakv bench` to the verbs; its own words are parsed by the benchmarks."""
    verbs.add_parser(
        "bench",
        help="measure backends on real models' shapes; see `portakv bench --help`",
        add_help=False,
    )


def bench(words: list[str]) -> int:
    """Hand the words behind `portakv bench` to the benchmarks; returns their exit code.

    Raises:
        PortaKVError: the benchmarks, or a package that they need, are not installed.
    """
    try:
        benchmarks = importlib.import_module(f"{BENCHMARKS}.cli")
    except ModuleNotFoundError as error:
        raise PortaKVError(_absent(error, "bench", BENCHMARKS, "bench")) from error
    return int(benchmarks.main(words) or 0)


def add_conform(verbs: Any) -> None:
    """Add `portakv conform` to the verbs; its own words are parsed by the suite."""
    verbs.add_parser(
        "conform",
        help="judge a backend by the conformance suite; see `portakv conform --help`",
        add_help=False,
    )


def conform(words: list[str]) -> int:
    """Hand the words behind `portakv conform` to the suite; returns its exit code.

    2 where the suite, or a package that it needs, is not installed: 1 would say that a backend
    failed.
    """
    try:
        for needed in ("pytest", "hypothesis"):
            importlib.import_module(needed)
        suite = importlib.import_module(f"{CONFORMANCE}.cli")
    except ModuleNotFoundError as error:
        print(f"portakv: {_absent(error, 'conform', CONFORMANCE, 'conformance')}", file=sys.stderr)
        return 2
    return int(suite.main(words))


def _absent(error: ModuleNotFoundError, verb: str, package: str, extra: str) -> str:
    missing = error.name or str(error)
    if missing.partition(".")[0] == package:
        return (
            f"`portakv {verb}` runs the package {package}, but this installation has no "
            f"{missing}; install PortaKV again from a release or a clone that has it."
        )
    return (
        f"`portakv {verb}` needs the package {missing!r}, which is not installed; "
        f"`pip install 'portakv[{extra}]'` brings what it needs."
    )


def accelerator_asked(name: str | None) -> torch.device | None:
    """The accelerator of that name, with its index; by default this machine's. None: the CPU.

    Raises:
        DeviceMismatch: torch cannot use it, or it has no memory to copy from.
    """
    device = usual_device() if name is None else usable_device(name)
    if device.type == "cpu":
        return None
    if device.index is not None:
        return device
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if present is None or present.type != device.type:
        raise DeviceMismatch(
            f"Device {name!r} was asked about copies between it and the host, but torch does not "
            f"take it for an accelerator here; name one that torch.accelerator lists."
        )
    return torch.device(device.type, torch.accelerator.current_device_index())
