# SPDX-License-Identifier: Apache-2.0
"""`portakv calibrate`: measure what copies between a device and the host cost, and keep it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portakv.cli.console import Column, print_json, print_prose, print_table
from portakv.cli.sides import accelerator_asked, check_cache, in_bytes, in_time, read_above_zero
from portakv.errors import PortaKVError
from portakv.runtime import kernel_cache as _kernel_cache

HELP = "measure the copies between a device and the host, once for each kind of device"
DESCRIPTION = """\
Measures every engine that copies between a device and host memory, over the
direction, the bytes of a run and the number of runs, and keeps the table in
PORTAKV_CACHE_DIR, else in portakv in the user's cache folder. From then on the
choice of an engine is a look-up there; `portakv explain --host` shows it.

The device should be idle. A table is true for one model of device, its driver
and runtime, and torch's release; another one is measured beside it."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.add_argument("--device", help="a torch device (default: the accelerator)")
    parser.add_argument(
        "--seconds",
        type=read_above_zero,
        metavar="S",
        default=20.0,
        help="time to measure at most; what is left then is interpolated (default: 20)",
    )


def run(asked: argparse.Namespace) -> int:
    """Measure, keep and print. Raises `PortaKVError` if there is no accelerator, or nothing could
    be measured or kept, `DeviceMismatch` if torch cannot use the device."""
    from portakv.interconnect import calibration, costs  # no other command needs what measures

    device = accelerator_asked(asked.device)
    if device is None:
        why = "this machine has no accelerator" if asked.device is None else "the CPU is the host"
        raise PortaKVError(
            f"Copies between a device and the host were to be measured, but {why}; run `portakv "
            f"calibrate` where torch finds an accelerator, or name one with --device."
        )
    check_cache("A table")
    measured = calibration.calibrate(device, asked.seconds)
    try:
        path = costs.store(measured)
    except OSError as error:
        raise PortaKVError(
            f"The table cannot be kept in {costs.path_for(measured.device)} ({error.strerror}). "
            f"Set {_kernel_cache.ENVIRONMENT} to a folder that you can write to."
        ) from error
    if asked.json:
        print_json({"file": str(path), **costs.as_json(measured)})
    else:
        show(measured, calibration.by_point(measured), path, device)
    return 0


def show(table: Any, rows: Mapping[Any, Mapping[str, Any]], path: Path, dev: Any) -> None:
    names = list(dict.fromkeys(strategy for strategy, _ in table.points))
    columns = [Column("direction", whole=True)]
    numbers = ["bytes of a run", "runs", "payload", *(f"{name}, GB/s" for name in names)]
    columns += [Column(title, right=True) for title in numbers]
    columns += [Column("fastest", whole=True), Column("takes", right=True)]
    lines = []
    for (direction, size, runs), found in rows.items():
        pinned = {name: point for name, point in found.items() if name != "pageable"} or found
        best = min(pinned, key=lambda name: pinned[name].seconds)
        payload = size * runs
        rates = [
            f"{payload / found[name].seconds / 1e9:.2f}" if name in found else "" for name in names
        ]
        sizes = [str(size), str(runs), in_bytes(payload)]
        lines.append([direction, *sizes, *rates, best, in_time(found[best].seconds)])
    print_table(columns, lines, f"{table.device.get('model') or dev}, {dev}")
    print()
    if table.emulated:
        print_prose("The device is emulated: these times say nothing about any hardware.")
    for name, why in table.left_out.items():
        print_prose(f"{name} was not measured: {why}")
    if not table.whole:
        print_prose("The time did not suffice for every point; the rest is interpolated.")
    if table.timer:
        print_prose(f"Times are of {table.timer}.")
    print_prose(f"Measured in {table.took:.1f} s and kept in {path}")
