# SPDX-License-Identifier: Apache-2.0
"""`portakv calibrate`: measure the cost of copies between a device and the host, and store it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from portakv.cli.console import print_json, print_prose, print_rows
from portakv.cli.sides import check_cache, in_bytes, in_time, read_above_zero, requested_accelerator
from portakv.errors import PortaKVError
from portakv.interconnect.costs import Point, Table
from portakv.runtime import kernel_cache

HELP = "measure the copies between a device and the host, once for each kind of device"
DESCRIPTION = """\
Measures every transfer strategy that copies between a device and host memory, over the
direction, the bytes of a run and the number of runs, and stores the table in
PORTAKV_CACHE_DIR, else in portakv in the user's cache folder. From then on the
choice of a strategy is a look-up there; `portakv explain --host` shows it.

The device should be idle. A table is valid for one model of device, its driver
and runtime, and torch's release; another combination gets a separate table."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--device", help="a torch device (default: the accelerator)")
    parser.add_argument(
        "--seconds",
        type=read_above_zero,
        metavar="S",
        default=20.0,
        help="the most time to measure; the remaining points are interpolated (default: 20)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, store and print a table.

    Raises:
        PortaKVError: there is no accelerator, or the table cannot be measured or stored.
        DeviceMismatch: torch cannot use the device.
    """
    from portakv.interconnect import calibration, costs  # only this command needs them

    device = requested_accelerator(args.device)
    if device is None:
        why = "this machine has no accelerator" if args.device is None else "the CPU is the host"
        raise PortaKVError(
            f"Expected an accelerator to measure copies between it and the host, but {why}. Run "
            f"`portakv calibrate` where torch finds an accelerator, or name one with --device."
        )

    check_cache("A table")
    measured = calibration.calibrate(device, args.seconds)
    try:
        path = costs.store(measured)
    except OSError as error:
        raise PortaKVError(
            f"The table cannot be stored in {costs.path_for(measured.device)} ({error.strerror}). "
            f"Set {kernel_cache.ENVIRONMENT} to a folder that you can write to."
        ) from error
    if args.json:
        print_json({"file": str(path), **costs.as_json(measured)})
    else:
        show(measured, calibration.by_point(measured), path, device)
    return 0


def show(
    table: Table,
    rows: Mapping[tuple[str, int, int], Mapping[str, Point]],
    path: Path,
    dev: torch.device,
) -> None:
    """Print the rates of every measured point, and the path of the table."""
    names = list(dict.fromkeys(strategy for strategy, _ in table.points))
    numbers = ["bytes of a run", "runs", "payload", *(f"{name}, GB/s" for name in names), "takes"]
    titles = ["direction", *numbers[:-1], "fastest", "takes"]
    lines = []
    for (direction, size, runs), points in rows.items():
        pinned = {name: point for name, point in points.items() if name != "pageable"} or points
        best = min(pinned, key=lambda name: pinned[name].seconds)
        payload = size * runs
        rates = [
            f"{payload / points[name].seconds / 1e9:.2f}" if name in points else ""
            for name in names
        ]
        sizes = [str(size), str(runs), in_bytes(payload)]
        lines.append([direction, *sizes, *rates, best, in_time(points[best].seconds)])
    print_rows(
        titles,
        lines,
        prose=numbers,
        right=numbers,
        title=f"{table.device.get('model') or dev}, {dev}",
    )
    print()
    if table.emulated:
        print_prose("The device is emulated: these times do not apply to any hardware.")
    for name, why in table.left_out.items():
        print_prose(f"{name} was not measured: {why}")
    if not table.whole:
        print_prose("The time was too short to measure every point; the rest is interpolated.")
    if table.timer:
        print_prose(f"Times are of {table.timer}.")
    print_prose(f"Measured in {table.took:.1f} s and stored in {path}")
