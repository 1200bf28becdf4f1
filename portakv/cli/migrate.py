# SPDX-License-Identifier: Apache-2.0
"""`portakv migrate --demo`, and `portakv explain --peer`: how this process pulls rows of peers.

A peer is a process of this host or of another host.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from dataclasses import asdict

import torch

from portakv.backends.base import Decision
from portakv.cli.console import Column, Report, installing, print_json, print_prose, print_table
from portakv.errors import BackendUnavailable, PortaKVError, Unsupported
from portakv.runtime.devices import (
    device_name,
    devices_present,
    inside,
    usable_device,
    usual_device,
    version_of,
)

HELP = "demonstrate that rows go from one process to another (--demo)"
DESCRIPTION = """\
--demo: two ranks of one process own a model's rows. Three ranks of another
process pull them into pages of another layout and block size: once from the
owner's mapped memory, once through staging. The demo checks every byte, and that
no rank publishes rows of an expired offer; otherwise the exit code is 1. With
two accelerators the owner is on the second, else on the host. `portakv explain
--peer` prints how this process would pull rows of its peers, and why."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--demo", action="store_true", required=True, help="run the demo")
    parser.add_argument("--device", help="the reader's device (default: the accelerator, else cpu)")


def run(args: argparse.Namespace) -> int:
    """Run the demo. Raise the error of a process that failed."""
    from portakv.cli.demo.migrate import run_migrate_demo

    _check_installed()
    device = None if args.device is None else str(usable_device(args.device))
    return run_migrate_demo(device=device, json=args.json)


def explain_peer(device: str | None, as_json: bool) -> int:
    """Print which memory a peer can map, the links between devices, the transports and the channel.

    Raises `Unsupported` if a package that migration needs is not installed.
    """
    _check_installed()
    import msgspec
    import zmq

    from portakv.migrate.ipc import host_id
    from portakv.migrate.transports import forced

    where = usual_device() if device is None else usable_device(device)
    versions = {"msgspec": version_of(msgspec), "pyzmq": version_of(zmq)}
    versions["libzmq"] = zmq.zmq_version()
    report: Report = {
        "device": str(where),
        "mapped": [asdict(one) for one in _mapped(where)],
        "links": [asdict(one) for one in _links(where)],
        "movers": [
            asdict(one) | {"slots": str(buffers_on)}
            for buffers_on in dict.fromkeys((where, torch.device("cpu")))
            for one in _transports(buffers_on)
        ],
        "forced": forced(),
        "channel": {"host": host_id(), "curve": bool(zmq.has("curve")), "versions": versions},
    }
    if as_json:
        print_json(report)
    else:
        _print(report)
    return 0


def _check_installed() -> None:
    try:
        importlib.import_module("portakv.migrate")
    except ImportError as error:
        why = f"{error.__cause__ or error}; {installing('migrate')} brings it"
        raise Unsupported("Expected the packages that migration needs", why) from error


def _mapped(device: torch.device) -> Iterator[Decision]:
    """Yield whether another process of this host can map each kind of memory."""
    from portakv.migrate import ipc

    try:
        written = ipc.shared_empty(64, torch.uint8).fill_(7)
        same = torch.equal(ipc.open_shared(ipc.share(written)), written)
        why = "" if same else "the bytes read differ from the bytes written"
    except PortaKVError as error:
        why = str(error)
    good = "a process of this user maps it; views lie in `shared_empty` or share_memory_()"
    yield Decision("host memory", not why, why or good)
    if device.type == "cpu":
        return
    refused = ipc.why_not(torch.zeros(64, dtype=torch.uint8, device=device))
    yield Decision(f"memory of {device}", not refused, refused or "a process of this host maps it")
    try:
        event = torch.get_device_module(device).Event
        with inside(device):
            ipc.export_event(event(interprocess=True))
        yield Decision(f"events of {device}", True, "a peer's stream waits for an offer's rows")
    except (PortaKVError, AttributeError, RuntimeError, TypeError) as error:
        why = f"the owner's host waits instead: {getattr(error, 'why', error)}"
        yield Decision(f"events of {device}", False, why)


def _links(device: torch.device) -> Iterator[Decision]:
    """Yield whether the device reads the memory of each other device of its type."""
    can_access = getattr(torch.get_device_module(device), "can_device_access_peer", None)
    for other in devices_present():
        if other.type != device.type or other == device or device.type == "cpu":
            continue
        name = f"{device} reads {other}"
        if can_access is None:
            yield Decision(
                name, False, f"torch does not report {device.type} links; pulls try them"
            )
        elif can_access(device, other):
            yield Decision(name, True, "rows are read over the link, if the peer's check passes")
        else:
            yield Decision(name, False, "the driver gives no access; a transport moves the rows")


def _transports(device: torch.device) -> Iterator[Decision]:
    """Yield the answer of each transport for staging buffers on the device."""
    from portakv.migrate.transports import ONLY_BY_NAME, TRANSPORTS, load

    for name in TRANSPORTS.names():
        try:
            decision = load(name).probe(device)
        except BackendUnavailable as error:  # of another package: not a transport, or misnamed
            decision = Decision(name, False, str(error))
        if decision.accepted and name in ONLY_BY_NAME:
            decision = Decision(name, True, f"{decision.reason}; only if it is requested by name")
        yield decision


def _print(report: Report) -> None:
    name = device_name(torch.device(report["device"]))
    print_prose(f"How a reader on {report['device']} ({name}) would pull rows of its peers:")

    tables = {"mapped, on this host": report["mapped"], "between devices": report["links"]}
    for transport in report["movers"]:
        title = f"moved, through staging buffers on {transport['slots']}"
        tables.setdefault(title, []).append(transport)
    columns = [Column("subject", whole=True), Column("answer"), Column("why")]
    for title, decisions in tables.items():
        rows = []
        for decision in decisions:
            answer = "accepted" if decision["accepted"] else "rejected"
            rows.append([decision["name"], answer, decision["reason"]])
        if rows:
            print()
            print_table(columns, rows, title)

    print()
    taken = "If memory cannot be mapped, a pull uses the first transport that serves, or the "
    taken += "transport that a side names."
    forced = report["forced"]
    if forced:
        serves = any(one["accepted"] for one in report["movers"] if one["name"] == forced)
        taken = f"PORTAKV_MOVER={forced} forces that transport, if memory cannot be mapped"
        taken += "." if serves else ". It does not serve here: a pull is then rejected."
    buffers = "Staging buffers are on the host unless rows are on two devices of one type."
    print_prose(f"{taken} {buffers}")

    channel = report["channel"]
    tcp = "TCP with CURVE from a secret" if channel["curve"] else "no TCP, as libzmq has no CURVE"
    names = ", ".join(f"{name} {version}" for name, version in channel["versions"].items())
    print_prose(f"Channel: a Unix socket on this host, {tcp} ({names}).")
    print_prose(f"This host is {channel['host']}; peers with the same identity map its memory.")
