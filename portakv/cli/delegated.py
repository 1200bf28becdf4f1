# SPDX-License-Identifier: Apache-2.0
"""`portakv demo` and `portakv bench`: verbs whose work is done in modules of their own."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from portakv.errors import PortaKVError

from ..devices import usable_device

BENCHMARKS = "portakv_benchmarks"


def add_demo(verbs: Any) -> None:
    """Add `portakv demo` to the verbs."""
    parser = verbs.add_parser(
        "demo",
        help="move a real model's KV cache out and back, and time every backend",
        description="Moves a real model's KV cache out of its paged memory and back into other "
        "slots, with the next tokens unchanged; then times every backend that serves this machine.",
    )
    parser.add_argument("--device", help="a torch device (default: the accelerator, else cpu)")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    parser.set_defaults(run=demo)


def demo(asked: argparse.Namespace) -> int:
    """Run the demo; returns its exit code."""
    from portakv.demo import run_demo  # its model part imports much more than any other verb needs

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
        raise PortaKVError(_absent(error)) from error
    return int(benchmarks.main(words) or 0)


def _absent(error: ModuleNotFoundError) -> str:
    missing = error.name or str(error)
    if missing.partition(".")[0] == BENCHMARKS:
        return (
            f"`portakv bench` runs the package {BENCHMARKS}, but this installation has no "
            f"{missing}; install PortaKV again from a release or a clone that has it."
        )
    return (
        f"`portakv bench` needs the package {missing!r}, which is not installed; "
        f"`pip install 'portakv[bench]'` brings what the benchmarks need."
    )
