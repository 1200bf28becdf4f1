# SPDX-License-Identifier: Apache-2.0
"""`portakv migrate --demo`, and `portakv explain --peer`: how this process would pull rows of
others, of this host or another one, and why not otherwise."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from portakv.backends.base import Decision
from portakv.cli.console import Column, installing, print_json, print_prose, print_table
from portakv.errors import PortaKVError, Unsupported
from portakv.runtime.devices import (
    device_name,
    devices_present,
    inside,
    usable_device,
    usual_device,
    version_of,
)

HELP = "rows go from one process to another: --demo shows it"
DESCRIPTION = """\
--demo: two ranks of one process own a model's rows, three of another process
pull them into pages of another layout and block size; once where the owner's
memory is mapped, once through staging. Every byte is checked, and an offer that
does not hold any more is published by nobody: exit code 1 otherwise. If there are
two accelerators, the owner is on the second, else on the host. What would be done
here for peers, and why: `portakv explain --peer`."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.add_argument("--demo", action="store_true", required=True, help="the one thing to do")
    parser.add_argument("--device", help="the reader's (default: the accelerator, else cpu)")


def run(asked: argparse.Namespace) -> int:
    """Run the demo; raises what a process of it met."""
    from portakv.cli.demo.migrate import run_migrate_demo

    _needed()
    device = None if asked.device is None else str(usable_device(asked.device))
    return run_migrate_demo(device=device, json=asked.json)


def explain_peer(device: str | None, as_json: bool) -> int:
    """Print what of each kind of memory can be mapped by a peer, the links between devices, movers,
    and the channel; raises `Unsupported` if what migration needs is not installed."""
    _needed()
    import msgspec
    import zmq

    from portakv.migrate.ipc import host_id
    from portakv.migrate.transports import forced

    where = usual_device() if device is None else usable_device(device)
    versions = {"msgspec": version_of(msgspec), "pyzmq": version_of(zmq)}
    versions["libzmq"] = zmq.zmq_version()
    found = {
        "device": str(where),
        "mapped": [asdict(one) for one in _mapped(where)],
        "links": [asdict(one) for one in _links(where)],
        "movers": [
            asdict(one) | {"slots": str(slots)}
            for slots in dict.fromkeys((where, torch.device("cpu")))
            for one in _movers(slots)
        ],
        "forced": forced(),
        "channel": {"host": host_id(), "curve": bool(zmq.has("curve")), "versions": versions},
    }
    if as_json:
        print_json(found)
    else:
        _print(found)
    return 0


def _needed() -> None:
    try:
        importlib.import_module("portakv.migrate")
    except ImportError as error:
        why = f"{error.__cause__ or error}; {installing('migrate')} brings it"
        raise Unsupported("Migration was asked for", why) from error


def _mapped(device: torch.device) -> Iterator[Decision]:
    """Whether memory of this process can be opened by another one of this host."""
    from portakv.migrate import ipc

    try:
        told = ipc.shared_empty(64, torch.uint8).fill_(7)
        same = torch.equal(ipc.open_shared(ipc.share(told)), told)
        why = "" if same else "what is read there is not what was written"
    except PortaKVError as error:
        why = str(error)
    good = "a process of this user maps it; views lie in `shared_empty` or share_memory_()"
    yield Decision("host memory", not why, why or good)
    if device.type == "cpu":
        return
    refused = ipc.why_not(torch.zeros(64, dtype=torch.uint8, device=device))
    yield Decision(f"memory of {device}", not refused, refused or "a process of this host maps it")
    try:
        made: Any = torch.get_device_module(device).Event
        with inside(device):
            ipc.export_event(made(interprocess=True))
        yield Decision(f"events of {device}", True, "a peer's stream waits for an offer's rows")
    except (PortaKVError, AttributeError, RuntimeError, TypeError) as error:
        why = f"the owner's host waits instead: {getattr(error, 'why', error)}"
        yield Decision(f"events of {device}", False, why)


def _links(device: torch.device) -> Iterator[Decision]:
    """Whether the device reads the memory of others of its type."""
    ask = getattr(torch.get_device_module(device), "can_device_access_peer", None)
    for other in devices_present():
        if other.type != device.type or other == device or device.type == "cpu":
            continue
        name = f"{device} reads {other}"
        if ask is None:
            yield Decision(name, False, f"torch does not tell for {device.type}; tried at a pull")
        elif ask(device, other):
            yield Decision(name, True, "rows are read over the link, if a peer's check is passed")
        else:
            yield Decision(name, False, "the driver gives no access; rows are moved")


def _movers(device: torch.device) -> Iterator[Decision]:
    """What each mover says of slots on the device."""
    from portakv.migrate.transports import MOVERS, ONLY_ASKED

    for name in MOVERS:
        said = MOVERS[name].probe(device)
        if said.accepted and name in ONLY_ASKED:
            said = Decision(name, True, f"{said.reason}; only if it is asked for by name")
        yield said


def _print(found: dict[str, Any]) -> None:
    named = device_name(torch.device(found["device"]))
    print_prose(f"How a reader on {found['device']} ({named}) would pull rows of its peers:")
    tables = {"mapped, on this host": found["mapped"], "between devices": found["links"]}
    for one in found["movers"]:
        tables.setdefault(f"moved, through slots on {one['slots']}", []).append(one)
    columns = [Column("what", whole=True), Column("answer"), Column("why")]
    for title, said in tables.items():
        answers = ["accepted" if one["accepted"] else "rejected" for one in said]
        rows = [[x["name"], y, x["reason"]] for x, y in zip(said, answers, strict=True)]
        if rows:
            print()
            print_table(columns, rows, title)
    print()
    taken = "If memory cannot be mapped, the first that serves is taken, or the one a side names."
    if found["forced"]:
        serves = any(one["accepted"] for one in found["movers"] if one["name"] == found["forced"])
        taken = f"PORTAKV_MOVER={found['forced']} forces that mover, if memory cannot be mapped"
        taken += "." if serves else ", and it does not serve here: then a pull is refused."
    print_prose(f"{taken} Slots are on the host unless rows are on two devices of one type.")
    channel = found["channel"]
    tcp = "TCP with CURVE from a secret" if channel["curve"] else "no TCP, as libzmq has no CURVE"
    names = ", ".join(f"{name} {version}" for name, version in channel["versions"].items())
    print_prose(f"Channel: a Unix socket on this host, {tcp} ({names}).")
    print_prose(f"This host is {channel['host']}; memory is mapped by peers that tell the same.")
